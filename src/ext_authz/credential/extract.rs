//! Extracts the one credential from a request, and lists what Envoy must remove so that no credential reaches the
//! upstream.
//!
//! This module does no I/O. A key borrows from the message where possible. A decoded copy of a key is overwritten in
//! memory when it is dropped.

use std::borrow::Cow;

use percent_encoding::{percent_decode, percent_decode_str};
use smallvec::SmallVec;

use super::{
    CredentialSettings, OnMultiple, QueryRemoval, Source,
    format::{self, Form},
    is_well_formed,
    source::Scheme,
};
use crate::ext_authz::request::View;

/// Why a request has no usable credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialError {
    /// No source contains a credential.
    Missing,
    /// The request has more than one credential, or a value that may be two credentials.
    Ambiguous,
    /// The request has one credential, but the credential cannot be a key.
    Malformed,
}

/// The result of [`extract`].
#[derive(Debug, PartialEq, Eq)]
pub struct Extracted<'m, 's> {
    /// The key, borrowed from the message or percent-decoded from the query.
    pub key: Result<PresentedKey<'m>, CredentialError>,
    /// What to remove so that no credential reaches the upstream.
    pub removals: Removals<'s>,
}

/// A presented key. Its `Debug` form is `***`.
#[derive(PartialEq, Eq)]
pub struct PresentedKey<'m>(Cow<'m, [u8]>);

impl PresentedKey<'_> {
    /// Returns the key's bytes. The name `expose` makes each use easy to find.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for PresentedKey<'_> {
    fn drop(&mut self) {
        if let Cow::Owned(bytes) = &mut self.0 {
            zeroize::Zeroize::zeroize(bytes);
        }
    }
}

impl std::fmt::Debug for PresentedKey<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// The parts of a request that contained credentials and must be removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removals<'s> {
    /// Headers to remove.
    pub headers: SmallVec<[&'s str; 2]>,
    /// Query parameters to remove, as the request spells their names.
    pub query: SmallVec<[&'s str; 2]>,
    /// The new path, if a credential was cut out of the query (`query_removal = "exact"`).
    pub path: Option<String>,
    /// The remaining cookies, if a credential was among the cookies. Empty if none remain.
    pub cookies: Option<String>,
}

/// The values found in one source.
type FoundKeys<'m> = SmallVec<[Cow<'m, [u8]>; 1]>;

/// Maximum number of values to collect from one source. Two values are already ambiguous, so further values make no
/// difference.
const FOUND_MAX: usize = 2;

/// Extracts the credential from the request in `view`, according to `settings`.
#[must_use]
pub fn extract<'m: 's, 's>(settings: &'s CredentialSettings, view: &View<'m>) -> Extracted<'m, 's> {
    let mut found: SmallVec<[(&'s Source, FoundKeys<'m>); 2]> = SmallVec::new();
    for source in &settings.sources {
        let values: FoundKeys<'m> = match source {
            Source::Header(name) => view.header(name).map(Cow::Borrowed).take(FOUND_MAX).collect(),
            Source::Authorization(scheme) => authorization(view, *scheme),
            Source::Query(name) => query(view.path, name),
            Source::Cookie(name) => cookies(view, name),
        };
        if !values.is_empty() {
            found.push((source, values));
        }
    }
    // `Authorization` often belongs to the application. If another source has a key, a single token in `Authorization`
    // that cannot be a key is not a credential and stays in the request. Anything else in `Authorization` may be a
    // second key.
    if found.len() > 1 && found.iter().any(|(_, values)| values.iter().all(|value| is_well_formed(settings, value))) {
        let has_one = view.header("authorization").count() == 1;
        found.retain(|(source, values)| {
            let is_one_token = has_one && values.len() == 1 && !values[0].iter().any(|byte| b", \t".contains(byte));
            !(matches!(source, Source::Authorization(_)) && is_one_token && is_foreign(settings, &values[0]))
        });
    }
    let mut removals = Removals::default();
    let mut keys: FoundKeys<'m> = SmallVec::new();
    let mut ambiguous = false;
    for (source, mut values) in found {
        match source {
            Source::Header(name) => removals.headers.push(name),
            Source::Authorization(_) => removals.headers.push("authorization"),
            Source::Query(name) if settings.query_removal == QueryRemoval::Parameter => {
                removals.query.extend(spellings(view.path, name));
            }
            Source::Query(_) => removals.path = Some(path_left(settings, view.path)),
            Source::Cookie(_) => removals.cookies = Some(cookies_left(settings, view)),
        }
        // Envoy joins repeated headers with a comma, so one value with a comma may have been two headers.
        ambiguous |= values.len() > 1 || values.iter().any(|key| key.contains(&b','));
        keys.append(&mut values);
    }
    Extracted { key: choose(settings, keys, ambiguous), removals }
}

/// True if `value` cannot be a key, not even a mistyped trustgate key.
fn is_foreign(settings: &CredentialSettings, value: &[u8]) -> bool {
    !is_well_formed(settings, value) && format::form(&settings.prefix, value) == Form::Foreign
}

fn choose<'m>(
    settings: &CredentialSettings,
    keys: FoundKeys<'m>,
    ambiguous: bool,
) -> Result<PresentedKey<'m>, CredentialError> {
    let differ = keys.windows(2).any(|pair| pair[0] != pair[1]);
    let mut keys = keys.into_iter().map(PresentedKey);
    let Some(key) = keys.next() else { return Err(CredentialError::Missing) };
    if ambiguous || (differ && settings.on_multiple == OnMultiple::Deny) {
        Err(CredentialError::Ambiguous)
    } else if is_well_formed(settings, key.expose()) {
        Ok(key)
    } else {
        Err(CredentialError::Malformed)
    }
}

/// Returns the credentials with the scheme `scheme` in `Authorization`. Envoy may have joined several headers with
/// commas. If one of the joined parts has this scheme, the result contains a comma, which [`extract`] treats as
/// ambiguous.
fn authorization<'m>(view: &View<'m>, scheme: Scheme) -> FoundKeys<'m> {
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
    let mut found = FoundKeys::new();
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
        found.push(Cow::Borrowed(b",")); // a second Authorization header makes the credential ambiguous
    }
    found
}

/// Splits a path into the part before `?`, the query, and the fragment with its `#`.
fn split_path(path: &str) -> Option<(&str, &str, &str)> {
    let end = path.find('#').unwrap_or(path.len());
    let (before, query) = path[..end].split_once('?')?;
    Some((before, query, &path[end..]))
}

/// True if `written`, a parameter name as the query spells it, means `name`. Applications compare decoded names (WHATWG
/// URL Standard, section 5.1), so `k%65y` means `key`.
fn is_name(written: &str, name: &str) -> bool {
    written == name
        || (written.contains(['%', '+'])
            && percent_decode_str(written).map(|byte| if byte == b'+' { b' ' } else { byte }).eq(name.bytes()))
}

/// Returns the query parameters whose name means `name`: each name as the query spells it, and its value.
fn pairs_of<'m>(path: &'m str, name: &str) -> impl Iterator<Item = (&'m str, Option<&'m str>)> {
    let query = split_path(path).map_or("", |(_, query, _)| query);
    let pairs = query.split('&').map(|pair| match pair.split_once('=') {
        Some((written, value)) => (written, Some(value)),
        None => (pair, None),
    });
    pairs.filter(move |(written, _)| is_name(written, name))
}

/// Returns the values of the query parameter `name`, percent-decoded.
fn query<'m>(path: &'m str, name: &str) -> FoundKeys<'m> {
    let values = pairs_of(path, name).map(|(_, value)| percent_decode_str(value.unwrap_or_default()).into());
    values.take(FOUND_MAX).collect()
}

/// Returns the spellings of the parameter `name` in the query, without duplicates.
fn spellings<'m>(path: &'m str, name: &str) -> SmallVec<[&'m str; 2]> {
    let mut spellings = SmallVec::<[&str; 2]>::new();
    for (written, _) in pairs_of(path, name) {
        if !spellings.contains(&written) {
            spellings.push(written);
        }
    }
    spellings
}

/// Returns `path` without the query parameters that contain credentials. All other bytes stay the same.
fn path_left(settings: &CredentialSettings, path: &str) -> String {
    let Some((before, query, fragment)) = split_path(path) else { return path.to_owned() };
    let is_ours = |pair: &&str| {
        let written = pair.split_once('=').map_or(*pair, |(written, _)| written);
        settings.sources.iter().any(|source| matches!(source, Source::Query(name) if is_name(written, name)))
    };
    let left: Vec<_> = query.split('&').filter(|pair| !is_ours(pair)).collect();
    let mark = if left.is_empty() { "" } else { "?" };
    [before, mark, &left.join("&"), fragment].concat()
}

/// Splits a `Cookie` header into cookies, which keep the spaces around them. Only `;` separates cookies (RFC 6265,
/// section 4.2.1); a comma is part of a value.
fn each_cookie(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b';')
}

/// Returns the value of a cookie, without quotes, if its name means `name`. Compares the trimmed name, both as sent
/// and decoded: applications trim cookie names, and some also decode them.
fn cookie_value<'m>(cookie: &'m [u8], name: &str) -> Option<&'m [u8]> {
    let at = cookie.iter().position(|byte| *byte == b'=')?;
    let (written, value) = (cookie[..at].trim_ascii(), cookie[at + 1..].trim_ascii());
    let is_ours = written == name.as_bytes() || percent_decode(written).eq(name.bytes());
    let unquoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    is_ours.then_some(unquoted)
}

fn cookies<'m>(view: &View<'m>, name: &str) -> FoundKeys<'m> {
    let cookies = || view.header("cookie").flat_map(each_cookie);
    let values = cookies().filter_map(|cookie| cookie_value(cookie, name)).map(Cow::Borrowed);
    let mut found: FoundKeys<'m> = values.take(FOUND_MAX).collect();
    // Without raw headers, a comma may be part of a value, or mark the place where Envoy joined two `Cookie` headers,
    // which a client may send in violation of RFC 6265, section 5.4. The two cases look the same, so the credential is
    // ambiguous.
    let follows_comma =
        |cookie: &[u8]| cookie.split(|byte| *byte == b',').skip(1).any(|part| cookie_value(part, name).is_some());
    if !view.has_raw_headers() && cookies().any(follows_comma) {
        found.push(Cow::Borrowed(b","));
    }
    found
}

/// Returns the cookies that contain no credential, byte for byte, for the upstream. Drops a cookie that is not UTF-8 or
/// contains a control character, because a `CheckResponse` cannot contain it.
fn cookies_left(settings: &CredentialSettings, view: &View<'_>) -> String {
    let is_ours = |cookie: &[u8]| {
        settings
            .sources
            .iter()
            .any(|source| matches!(source, Source::Cookie(name) if cookie_value(cookie, name).is_some()))
    };
    let text = |cookie| std::str::from_utf8(cookie).ok().filter(|text| !text.contains(char::is_control));
    let lines = view.header("cookie").filter_map(|line| {
        let kept = each_cookie(line).filter(|cookie| !is_ours(cookie)).filter_map(text).collect::<Vec<_>>().join(";");
        let kept = kept.trim_ascii();
        (!kept.is_empty()).then(|| kept.to_owned())
    });
    lines.collect::<Vec<_>>().join("; ")
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
    use crate::base::settings::{RawValue, Reader, Section};

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
        reader.put("credential", "sources", RawValue::One(sources.into()), String::new());
        reader.put("credential", "on_multiple", RawValue::One(on_multiple.into()), String::new());
        let settings = CredentialSettings::read(&mut reader);
        assert_eq!(reader.config_errors(), []);
        settings
    }

    #[test]
    fn extract_returns_one_credential_or_an_error() {
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
            ("bearer without a token", "/", vec![("authorization", "Bearer")], Err(Malformed)),
            ("another scheme", "/", vec![("authorization", "Basic abc")], Err(Missing)),
            ("a longer scheme", "/", vec![("authorization", "BearerX abcdefghijklmnop")], Err(Missing)),
            ("two schemes joined", "/", vec![("authorization", two_bearers.as_str())], Err(Ambiguous)),
            (
                "two schemes in separate headers",
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
    fn credentials_are_removed_from_all_sources() {
        let settings = settings("header:x-api-key,query:key,cookie:key", "first");
        let cookie = format!("a=1; key={A}; b=2,key={B}");
        let bytes = message(&format!("/p?key={B}"), &[("x-api-key", A), ("cookie", &cookie)]);
        let removals = extract(&settings, &View::parse(&bytes).unwrap()).removals;
        assert_eq!((&*removals.headers, &*removals.query), (&["x-api-key"][..], &["key"][..]));
        assert_eq!(removals.cookies.as_deref(), Some(format!("a=1; b=2,key={B}").as_str()));
    }

    #[test]
    fn only_the_key_is_removed_from_the_cookies() {
        let settings = settings("cookie:key", "deny");
        for (cookie, left) in [
            ("prefs={\"a\":1,\"b\":2}; key=K; x=1", "prefs={\"a\":1,\"b\":2}; x=1"),
            ("a=1,2,3; key=K", "a=1,2,3"),
            ("key=K", ""),
            ("key=K; x=1", "x=1"),
            ("x=1;y=2 ;key=K;z=3", "x=1;y=2 ;z=3"),
            ("x=1; key =K; k%65y=K", "x=1"),
            ("name=\u{e9}; key=K", "name=\u{e9}"),
            ("flag; key=K", "flag"),
        ] {
            let cookie = cookie.replace('K', A);
            let bytes = message("/", &[("cookie", &cookie)]);
            let removals = extract(&settings, &View::parse(&bytes).unwrap()).removals;
            assert_eq!(removals.cookies.as_deref(), Some(left), "{cookie}");
        }
        let bytes = message("/", &[("cookie", "x=1,2"), ("cookie", &format!("key={A}")), ("cookie", "y=3")]);
        let removals = extract(&settings, &View::parse(&bytes).unwrap()).removals;
        assert_eq!(removals.cookies.as_deref(), Some("x=1,2; y=3"));
    }

    #[test]
    fn query_parameter_names_are_compared_after_decoding() {
        let by_parameter = settings("query:key", "deny");
        let path = format!("/p?a=1&k%65y={A}&key={A}");
        let bytes = message(&path, &[]);
        let extracted = extract(&by_parameter, &View::parse(&bytes).unwrap());
        assert_eq!((extracted.key, &*extracted.removals.query), (Err(Ambiguous), &["k%65y", "key"][..]));
        let bytes = message(&format!("/p?%6Bey={A}"), &[]);
        let extracted = extract(&by_parameter, &View::parse(&bytes).unwrap());
        assert_eq!(extracted.key.unwrap().expose(), A.as_bytes());
        assert_eq!(&*extracted.removals.query, &["%6Bey"][..]);
    }

    #[test]
    fn exact_removal_does_not_change_other_query_parameters() {
        let settings = CredentialSettings { query_removal: QueryRemoval::Exact, ..settings("query:key", "deny") };
        for (path, left) in [
            ("/things?z=1&a=2&key=K&m=3", "/things?z=1&a=2&m=3"),
            ("/things?flag&key=K", "/things?flag"),
            ("/things?key=K&param[0:1:0]", "/things?param[0:1:0]"),
            ("/things?&&a=1&&key=K&", "/things?&&a=1&&"),
            ("/things?key=K", "/things"),
            ("/things?a=%2f+%20&k%65y=K#part?key=1", "/things?a=%2f+%20#part?key=1"),
        ] {
            let bytes = message(&path.replace('K', A), &[]);
            let removals = extract(&settings, &View::parse(&bytes).unwrap()).removals;
            assert_eq!((removals.path.as_deref(), removals.query.len()), (Some(left), 0), "{path}");
        }
        let bytes = message("/things?a=1", &[]);
        assert_eq!(extract(&settings, &View::parse(&bytes).unwrap()).removals.path, None);
    }

    #[test]
    fn an_application_token_is_not_removed_if_another_source_has_a_key() {
        let sources = "header:x-api-key,authorization:bearer";
        let settings = CredentialSettings { require_checksum: true, ..settings(sources, "deny") };
        let key = format::generate(&settings.prefix).unwrap();
        let token = "Bearer eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhIn0.c2ln";
        let bytes = message("/", &[("x-api-key", key.expose()), ("authorization", token)]);
        let extracted = extract(&settings, &View::parse(&bytes).unwrap());
        assert_eq!(extracted.key.unwrap().expose(), key.expose().as_bytes());
        assert_eq!(&*extracted.removals.headers, &["x-api-key"][..]);
        // Without a key in another source, the token may be an invalid key, so the request is denied.
        let bytes = message("/", &[("authorization", token)]);
        assert_eq!(extract(&settings, &View::parse(&bytes).unwrap()).key, Err(Malformed));
        for unclear in [format!("Basic x,Bearer {A}"), format!("Bearer {A}, Bearer y"), "Bearer x y".to_owned()] {
            let bytes = message("/", &[("x-api-key", key.expose()), ("authorization", &unclear)]);
            assert_eq!(extract(&settings, &View::parse(&bytes).unwrap()).key, Err(Ambiguous), "{unclear}");
        }
        // A mistyped trustgate key does not count as an application token.
        let mut mistyped = key.expose().to_owned();
        mistyped.replace_range(4..5, if mistyped.as_bytes()[4] == b'A' { "B" } else { "A" });
        let mistyped = format!("Bearer {mistyped}");
        let bytes = message("/", &[("x-api-key", key.expose()), ("authorization", &mistyped)]);
        assert_eq!(extract(&settings, &View::parse(&bytes).unwrap()).key, Err(Ambiguous));
    }

    #[test]
    fn on_multiple_first_uses_the_key_of_the_first_source() {
        let settings = settings("query:key,header:x-api-key", "first");
        let bytes = message(&format!("/p?key={B}"), &[("x-api-key", A)]);
        let extracted = extract(&settings, &View::parse(&bytes).unwrap());
        assert_eq!(extracted.key.unwrap().expose(), B.as_bytes());
    }
}
