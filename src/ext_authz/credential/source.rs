//! The places in a request where trustgate looks for a credential: the values of `credential.sources`.

use crate::{
    base::settings::{RawValue, Setting},
    ext_authz::identity,
};

/// One place to look for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A request header, by its lower-case name.
    Header(String),
    /// `Authorization` with this scheme.
    Authorization(Scheme),
    /// A query parameter, by its case-sensitive name.
    Query(String),
    /// A cookie, by its case-sensitive name.
    Cookie(String),
}

/// An `Authorization` scheme (RFC 9110, section 11.1), matched without regard to case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `Bearer`
    Bearer,
    /// `ApiKey`
    ApiKey,
}

impl Setting for Source {
    const EXPECTED: &'static str = "header:NAME, authorization:bearer, authorization:apikey, query:NAME or cookie:NAME";
    fn read(written: &RawValue) -> Option<Self> {
        let text = String::read(written)?;
        let (place, name) = text.split_once(':')?;
        // Allow only the token characters of RFC 9110 that need no encoding in a header, a query or a cookie.
        let plain =
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte));
        match (place, name) {
            ("authorization", "bearer") => Some(Self::Authorization(Scheme::Bearer)),
            ("authorization", "apikey") => Some(Self::Authorization(Scheme::ApiKey)),
            ("header", name) if plain => header(name.to_ascii_lowercase()),
            ("query", name) if plain => Some(Self::Query(name.to_owned())),
            ("cookie", name) if plain => Some(Self::Cookie(name.to_owned())),
            _ => None,
        }
    }
}

/// Returns the source `header:NAME`. Refuses `authorization` and `cookie`, for which separate sources exist, and the
/// identity headers: Envoy sets the identity headers before it removes the header that contained the credential, so
/// Envoy would remove the identity.
fn header(name: String) -> Option<Source> {
    let reserved = ["authorization", "cookie"].contains(&name.as_str()) || identity::HEADERS.contains(&name.as_str());
    (!reserved).then_some(Source::Header(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_headers_are_refused_as_sources() {
        let read = |text: &str| Source::read(&RawValue::One(text.to_owned()));
        assert_eq!(read("header:X-Api-Key"), Some(Source::Header("x-api-key".to_owned())));
        for name in ["authorization", "Authorization", "cookie", "Cookie"].iter().chain(&identity::HEADERS) {
            assert_eq!(read(&format!("header:{name}")), None, "{name}");
        }
        assert_eq!(read("header:X-Trust-Id"), None);
    }
}
