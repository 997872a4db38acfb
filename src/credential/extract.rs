//! Finds the one credential of a request, or says why there is none, and what must be removed before the upstream.
//!
//! Needs no I/O. Never keeps a key: it borrows where it can, and overwrites what it had to decode.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use smallvec::SmallVec;

use super::{CredentialSettings, OnMultiple, Source, is_well_formed, source::Scheme};
use crate::wire::view::View;

/// Why a request has no usable credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialError {
    /// No source holds anything.
    Missing,
    /// Nobody can tell which credential is meant.
    Ambiguous,
    /// There is one, but it cannot be a key.
    Malformed,
}

/// What was found in a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Extracted<'m, 's> {
    /// The key, as it lies in the message (or percent-decoded from the query).
    pub key: Result<Key<'m>, CredentialError>,
    /// What to remove so that no credential reaches the upstream.
    pub removals: Removals<'s>,
}

/// A presented key. Printed as stars.
#[derive(PartialEq, Eq)]
pub struct Key<'m>(Cow<'m, [u8]>);

impl Key<'_> {
    /// The key's bytes; the name makes every use easy to find.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Key<'_> {
    fn drop(&mut self) {
        if let Cow::Owned(bytes) = &mut self.0 {
            zeroize::Zeroize::zeroize(bytes);
        }
    }
}

impl std::fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Where credentials were found: what the upstream must not see.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removals<'s> {
    /// Headers to remove.
    pub headers: SmallVec<[&'s str; 2]>,
    /// Query parameters to remove.
    pub query: SmallVec<[&'s str; 2]>,
    /// The cookies that are left, where a credential was among them; empty where none are.
    pub cookies: Option<String>,
}

/// What one source holds, of which [`FOUND_MAX`] are looked at.
type Found<'m> = SmallVec<[Cow<'m, [u8]>; 1]>;

/// Two in one source are ambiguous, however many follow.
const FOUND_MAX: usize = 2;

/// The credential of the request in `view`, by the rules of `settings`.
#[must_use]
pub fn extract<'m, 's>(settings: &'s CredentialSettings, view: &View<'m>) -> Extracted<'m, 's> {
    let mut removals = Removals::default();
    let mut keys: Found<'m> = SmallVec::new();
    let mut ambiguous = false;
    for source in &settings.sources {
        let mut found: Found<'m> = match source {
            Source::Header(name) => view.header(name).map(Cow::Borrowed).take(FOUND_MAX).collect(),
            Source::Authorization(scheme) => authorization(view, *scheme),
            Source::Query(name) => query(view.path, name),
            Source::Cookie(name) => cookies(view, name),
        };
        if found.is_empty() {
            continue;
        }
        match source {
            Source::Header(name) => removals.headers.push(name),
            Source::Authorization(_) => removals.headers.push("authorization"),
            Source::Query(name) => removals.query.push(name),
            Source::Cookie(_) => {}
        }
        // Envoy joins repeated headers with a comma, so that one header with a comma may have been two.
        ambiguous |= found.len() > 1 || found.iter().any(|key| key.contains(&b','));
        keys.append(&mut found);
    }
    removals.cookies = cookies_left(settings, view);
    Extracted { key: choose(settings, keys, ambiguous), removals }
}

fn choose<'m>(settings: &CredentialSettings, keys: Found<'m>, ambiguous: bool) -> Result<Key<'m>, CredentialError> {
    let differ = keys.windows(2).any(|pair| pair[0] != pair[1]);
    let mut keys = keys.into_iter().map(Key);
    let Some(key) = keys.next() else { return Err(CredentialError::Missing) };
    if ambiguous || (differ && settings.on_multiple == OnMultiple::Deny) {
        Err(CredentialError::Ambiguous)
    } else if is_well_formed(settings, key.expose()) {
        Ok(key)
    } else {
        Err(CredentialError::Malformed)
    }
}

/// Credentials of `scheme` in `Authorization`. Where Envoy joined several headers with commas, each part is looked at;
/// a part of our scheme beside another part leaves the comma in, which makes it ambiguous.
fn authorization<'m>(view: &View<'m>, scheme: Scheme) -> Found<'m> {
    let scheme = match scheme {
        Scheme::Bearer => &b"bearer"[..],
        Scheme::ApiKey => b"apikey",
    };
    let ours = |part: &'m [u8]| {
        let part = part.trim_ascii();
        let (name, rest) = part.split_at_checked(scheme.len())?;
        let ends = rest.first().is_none_or(|byte| *byte == b' ' || *byte == b'\t');
        (name.eq_ignore_ascii_case(scheme) && ends).then(|| rest.trim_ascii())
    };
    let mut found = Found::new();
    let mut other = false;
    for value in view.header("authorization") {
        if found.len() == FOUND_MAX {
            break;
        }
        match ours(value) {
            Some(key) => found.push(Cow::Borrowed(key)),
            None if value.split(|byte| *byte == b',').any(|part| ours(part).is_some()) => {
                found.push(Cow::Borrowed(value));
            }
            None => other = true,
        }
    }
    if other && !found.is_empty() {
        found.push(Cow::Borrowed(b",")); // a second Authorization header: which one would the application believe?
    }
    found
}

/// Values of the query parameter `name`, percent-decoded.
fn query<'m>(path: &'m str, name: &str) -> Found<'m> {
    let path = path.split('#').next().unwrap_or_default();
    let Some((_, query)) = path.split_once('?') else { return Found::new() };
    let value = |pair: &'m str| match pair.split_once('=') {
        Some((key, value)) => (key == name).then(|| percent_decode_str(value).into()),
        None => (pair == name).then(|| Cow::Borrowed(&b""[..])),
    };
    query.split('&').filter_map(value).take(FOUND_MAX).collect()
}

/// The cookies of a request, `name=value` each. Separated by `;` (RFC 6265), and by `,` where Envoy joined two lines.
fn each_cookie<'a, 'm>(view: &'a View<'m>) -> impl Iterator<Item = &'m [u8]> + 'a {
    view.header("cookie")
        .flat_map(|line| line.split(|byte| *byte == b';' || *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|cookie| !cookie.is_empty())
}

fn cookie_value<'m>(cookie: &'m [u8], name: &str) -> Option<&'m [u8]> {
    let value = cookie.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
    Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
}

fn cookies<'m>(view: &View<'m>, name: &str) -> Found<'m> {
    each_cookie(view).filter_map(|cookie| cookie_value(cookie, name)).map(Cow::Borrowed).take(FOUND_MAX).collect()
}

/// The cookies that may go on to the upstream, where one of them was a credential. A cookie that is not visible ASCII
/// cannot be sent on in an answer and is dropped with the credential.
fn cookies_left(settings: &CredentialSettings, view: &View<'_>) -> Option<String> {
    if !settings.sources.iter().any(|source| matches!(source, Source::Cookie(_))) {
        return None;
    }
    let is_ours = |cookie: &[u8]| {
        settings
            .sources
            .iter()
            .any(|source| matches!(source, Source::Cookie(name) if cookie_value(cookie, name).is_some()))
    };
    if !each_cookie(view).any(is_ours) {
        return None;
    }
    let mut left = String::new();
    for cookie in each_cookie(view).filter(|cookie| !is_ours(cookie)) {
        match std::str::from_utf8(cookie) {
            Ok(cookie) if cookie.bytes().all(|byte| matches!(byte, b' '..=b'~')) => {
                left.push_str(if left.is_empty() { "" } else { "; " });
                left.push_str(cookie);
            }
            _ => {}
        }
    }
    Some(left)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::{
        config::core::v3::{HeaderMap, HeaderValue},
        service::auth::v3::{
            AttributeContext, CheckRequest,
            attribute_context::{HttpRequest, Request},
        },
    };
    use prost::Message;

    use super::{CredentialError::*, *};
    use crate::settings::{Reader, Section, Written};

    const A: &str = "a-foreign-key-of-32-characters-A";
    const B: &str = "a-foreign-key-of-32-characters-B";

    fn message(path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
        let headers = headers
            .iter()
            .map(|(key, value)| HeaderValue {
                key: (*key).into(),
                raw_value: value.as_bytes().to_vec(),
                ..Default::default()
            })
            .collect();
        let http = HttpRequest { path: path.into(), header_map: Some(HeaderMap { headers }), ..Default::default() };
        let request = Some(Request { http: Some(http), ..Default::default() });
        CheckRequest { attributes: Some(AttributeContext { request, ..Default::default() }) }.encode_to_vec()
    }

    fn settings(sources: &str, on_multiple: &str) -> CredentialSettings {
        let mut reader = Reader::default();
        reader.put("credential", "sources", Written::One(sources.into()), String::new());
        reader.put("credential", "on_multiple", Written::One(on_multiple.into()), String::new());
        let settings = CredentialSettings::read(&mut reader);
        assert_eq!(reader.mistakes(), []);
        settings
    }

    #[test]
    fn exactly_one_credential_or_the_reason_why_not() {
        let all = "header:x-api-key,authorization:bearer,authorization:apikey,query:key,cookie:key";
        let long = "k".repeat(513);
        let (bearer_a, cookie_a) = (format!("bEaReR  {A}"), format!("x=1; key={A}; y=2"));
        let (joined, two_bearers) = (format!("{A},{B}"), format!("Basic x,Bearer {A}"));
        let (query_a, query_twice) = (format!("/p?z=1&key={A}"), format!("/p?key={A}&key={A}"));
        let encoded = format!("/p?key={}", A.replace('-', "%2D"));
        for (name, path, headers, want) in [
            ("nothing", "/", vec![], Err(Missing)),
            ("a header", "/", vec![("x-api-key", A)], Ok(A)),
            ("any case of the name", "/", vec![("X-Api-Key", A)], Ok(A)),
            ("twice the same", "/", vec![("x-api-key", A), ("x-api-key", A)], Err(Ambiguous)),
            ("joined by Envoy", "/", vec![("x-api-key", joined.as_str())], Err(Ambiguous)),
            ("empty", "/", vec![("x-api-key", "")], Err(Malformed)),
            ("too short", "/", vec![("x-api-key", "fifteen-charact")], Err(Malformed)),
            ("too long", "/", vec![("x-api-key", long.as_str())], Err(Malformed)),
            ("blank inside", "/", vec![("x-api-key", "sixteen characte")], Err(Malformed)),
            ("not ASCII", "/", vec![("x-api-key", "sixteen-charäcter")], Err(Malformed)),
            ("bearer", "/", vec![("authorization", bearer_a.as_str())], Ok(A)),
            ("bearer alone", "/", vec![("authorization", "Bearer")], Err(Malformed)),
            ("another scheme", "/", vec![("authorization", "Basic abc")], Err(Missing)),
            ("a longer scheme", "/", vec![("authorization", "BearerX abcdefghijklmnop")], Err(Missing)),
            ("two schemes joined", "/", vec![("authorization", two_bearers.as_str())], Err(Ambiguous)),
            (
                "two schemes apart",
                "/",
                vec![("authorization", "Basic x"), ("authorization", &bearer_a)],
                Err(Ambiguous),
            ),
            ("query", query_a.as_str(), vec![], Ok(A)),
            ("query, encoded", encoded.as_str(), vec![], Ok(A)),
            ("query, twice", query_twice.as_str(), vec![], Err(Ambiguous)),
            ("query, no value", "/p?key", vec![], Err(Malformed)),
            ("query, in the fragment", "/p#?key=abcdefghijklmnopqrst", vec![], Err(Missing)),
            ("cookie", "/", vec![("cookie", cookie_a.as_str())], Ok(A)),
            ("the same in two sources", query_a.as_str(), vec![("x-api-key", A)], Ok(A)),
            ("different in two sources", query_a.as_str(), vec![("x-api-key", B)], Err(Ambiguous)),
        ] {
            let (settings, bytes) = (settings(all, "deny"), message(path, &headers));
            let view = View::parse(&bytes).unwrap();
            let got = extract(&settings, &view).key;
            let got = got.as_ref().map(|key| std::str::from_utf8(key.expose()).unwrap()).map_err(|why| *why);
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn whatever_held_a_credential_is_removed() {
        let settings = settings("header:x-api-key,query:key,cookie:key", "first");
        let cookie = format!("a=1; key={A}; b=2,key={B}");
        let bytes = message(&format!("/p?key={B}"), &[("x-api-key", A), ("cookie", &cookie)]);
        let removals = extract(&settings, &View::parse(&bytes).unwrap()).removals;
        assert_eq!((&*removals.headers, &*removals.query), (&["x-api-key"][..], &["key"][..]));
        assert_eq!(removals.cookies.as_deref(), Some("a=1; b=2"));
    }

    #[test]
    fn the_first_source_wins_where_that_is_configured() {
        let settings = settings("query:key,header:x-api-key", "first");
        let bytes = message(&format!("/p?key={B}"), &[("x-api-key", A)]);
        let extracted = extract(&settings, &View::parse(&bytes).unwrap());
        assert_eq!(extracted.key.unwrap().expose(), B.as_bytes());
    }
}
