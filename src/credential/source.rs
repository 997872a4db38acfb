//! Where a credential may stand in a request.

use crate::settings::{Setting, Written};

/// One place a key may stand in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A request header, by its lower-case name.
    Header(String),
    /// `Authorization` with this scheme.
    Authorization(Scheme),
    /// A query parameter, by its exact name.
    Query(String),
    /// A cookie, by its exact name.
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
    fn read(written: &Written) -> Option<Self> {
        let text = String::read(written)?;
        let (place, name) = text.split_once(':')?;
        // RFC 9110 token characters that need no encoding in any of the three places.
        let plain =
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte));
        match (place, name) {
            ("authorization", "bearer") => Some(Self::Authorization(Scheme::Bearer)),
            ("authorization", "apikey") => Some(Self::Authorization(Scheme::ApiKey)),
            ("header", "authorization" | "cookie") => None,
            ("header", name) if plain => Some(Self::Header(name.to_ascii_lowercase())),
            ("query", name) if plain => Some(Self::Query(name.to_owned())),
            ("cookie", name) if plain => Some(Self::Cookie(name.to_owned())),
            _ => None,
        }
    }
}
