//! The demands of a route, from Envoy's `context_extensions`.
//!
//! Envoy merges the extensions of the virtual host with those of the route, so both can contribute. An invalid
//! trustgate extension is a fault: if trustgate ignored the extension, the route could admit requests that it should
//! refuse.

use std::net::IpAddr;

use smallvec::SmallVec;

use super::request::{Peer, View};
use crate::{
    base::fault::{Fault, quoted},
    freshness::Freshness,
    record::is_scope,
};

/// The demands of a route on a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Demands<'m> {
    /// The scopes that the route demands. The key must have all of them.
    pub scopes: SmallVec<[&'m str; 4]>,
    /// The freshness that the route demands; `None` if the route demands none.
    pub freshness: Option<Freshness>,
    /// The value of `trustgate.optional`. The value has an effect only if [`Self::admits_anonymous`] returns true.
    pub optional: bool,
    /// The request's source address: the address of Envoy's direct peer, if the peer has one.
    pub source: Option<IpAddr>,
}

const PREFIX: &str = "trustgate.";
/// The known extension names, without the prefix.
const NAMES: [&str; 3] = ["scopes", "freshness", "optional"];

impl<'m> Demands<'m> {
    /// Reads the route's demands from `view`.
    ///
    /// # Errors
    /// [`Fault::Route`] for a trustgate extension that is invalid, misspelt, or unknown to this release.
    pub fn of(view: &View<'m>) -> Result<Self, Fault> {
        let mut demands = Self { source: source(view), ..Self::default() };
        for (name, value) in view.context_extensions() {
            match name.strip_prefix(PREFIX) {
                Some(demand) => demands.take(demand, value).map_err(|problem| route(name, value, problem))?,
                None if is_misspelt(name) => {
                    return Err(route(
                        name,
                        value,
                        "unknown name; use trustgate.scopes, trustgate.freshness or trustgate.optional",
                    ));
                }
                None => {}
            }
        }
        Ok(demands)
    }

    /// Reads one demand. The error describes the expected value.
    fn take(&mut self, name: &str, value: &'m str) -> Result<(), &'static str> {
        match name {
            "scopes" => {
                self.scopes = value.split_ascii_whitespace().collect();
                let is_valid = !self.scopes.is_empty() && self.scopes.iter().all(|scope| is_scope(scope));
                is_valid.then_some(()).ok_or(
                    "expected one or more scopes, separated by spaces: each has 1 to 128 visible ASCII characters \
                     other than \", \\ and comma",
                )
            }
            "freshness" => {
                self.freshness = Freshness::from_word(value);
                self.freshness.map(|_| ()).ok_or("expected lease, strict, live or ttl")
            }
            "optional" => {
                self.optional = value == "true";
                (self.optional || value == "false").then_some(()).ok_or("expected true or false")
            }
            _ => Err("unknown name; use trustgate.scopes, trustgate.freshness or trustgate.optional"),
        }
    }

    /// True if a request without a credential may pass. A route that demands scopes does not admit such a request, even
    /// if the virtual host sets `trustgate.optional`, because an anonymous request has no scopes.
    #[must_use]
    pub fn admits_anonymous(&self) -> bool {
        self.optional && self.scopes.is_empty()
    }
}

fn route(name: &str, value: &str, problem: &'static str) -> Fault {
    Fault::Route { name: quoted(name.as_bytes()), value: quoted(value.as_bytes()), problem }
}

/// True if `name` does not have the prefix `trustgate.` but is probably meant for trustgate. Such a name begins with
/// `trustgate` in another spelling (`Trustgate.scopes`, `trust-gate/scopes`, `trustgate_scopes`), or it ends in a known
/// name after a word that differs from `trustgate` in one or two letters.
fn is_misspelt(name: &str) -> bool {
    let letters = name.bytes().filter(u8::is_ascii_alphanumeric).map(|byte| byte.to_ascii_lowercase());
    if letters.take("trustgate".len()).eq(*b"trustgate") {
        return true;
    }
    let ends_in_our_name = NAMES.iter().any(|known| {
        let end = name.len().checked_sub(known.len()).and_then(|start| name.get(start..));
        end.is_some_and(|end| end.eq_ignore_ascii_case(known))
    });
    ends_in_our_name
        && name.split_once(|letter: char| !letter.is_ascii_alphanumeric()).is_some_and(|(first, _)| {
            first.len() <= "trustgate".len() + 2 && strsim::osa_distance(&first.to_ascii_lowercase(), "trustgate") <= 2
        })
}

fn source(view: &View<'_>) -> Option<IpAddr> {
    match view.peer? {
        Peer::Socket(address) => address.parse::<IpAddr>().ok().map(|address| address.to_canonical()),
        Peer::Pipe => None,
    }
}

/// True if the request is a CORS preflight (Fetch standard, "CORS-preflight fetch"). Browsers send preflights without
/// credentials.
#[must_use]
pub(crate) fn is_preflight(view: &View<'_>) -> bool {
    let has = |name| view.header(name).next().is_some();
    view.method == "OPTIONS" && has("origin") && has("access-control-request-method")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_extension_names_are_recognised() {
        for name in [
            "Trustgate.scopes",
            "TRUSTGATE.SCOPES",
            "trustgate_scopes",
            "trustgate-scopes",
            "trustgate/scopes",
            "trustgate",
            "trustgatescopes",
            "trust-gate.scopes",
            "trust_gate_optional",
            " trustgate.scopes",
            "trustgates.scopes",
            "trusgate.scopes",
            "trustgaet.optional",
            "tustgate.freshness",
            "turstgate.Scopes",
        ] {
            assert!(is_misspelt(name), "{name}");
        }
        for name in
            ["team", "scopes", "optional", "other.scopes", "rust.scopes", "virtual_host", "", "gate.scopes", "é.scopes"]
        {
            assert!(!is_misspelt(name), "{name}");
        }
    }
}
