//! What a route asks of a request, from Envoy's `context_extensions`.
//!
//! Envoy merges the extensions of the virtual host with those of the route, so both can contribute. An extension that names
//! trustgate and is invalid is a fault: ignoring it would open the route.

use std::net::IpAddr;

use smallvec::SmallVec;

use super::request::{Peer, View};
use crate::{
    base::fault::{Fault, quoted},
    freshness::Freshness,
    record::is_scope,
};

/// What a route asks of a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Demands<'m> {
    /// Scopes the key must have, all of them.
    pub scopes: SmallVec<[&'m str; 4]>,
    /// How fresh the record must be, where the route says so.
    pub freshness: Option<Freshness>,
    /// `trustgate.optional`; whether it has an effect is [`Self::admits_anonymous`].
    pub optional: bool,
    /// Where the request came from: the direct peer of Envoy, where it has an address.
    pub source: Option<IpAddr>,
}

const PREFIX: &str = "trustgate.";
/// The names after the prefix.
const NAMES: [&str; 3] = ["scopes", "freshness", "optional"];

impl<'m> Demands<'m> {
    /// The demands of the route that `view` came by.
    ///
    /// # Errors
    /// [`Fault::Route`] for an extension that names trustgate and that this release does not understand.
    pub fn of(view: &View<'m>) -> Result<Self, Fault> {
        let mut demands = Self { source: source(view), ..Self::default() };
        for (name, value) in view.context_extensions() {
            match name.strip_prefix(PREFIX) {
                Some(demand) => demands.take(demand, value).map_err(|problem| route(name, value, problem))?,
                None if is_misspelt(name) => {
                    return Err(route(
                        name,
                        value,
                        "write trustgate.scopes, trustgate.freshness or trustgate.optional",
                    ));
                }
                None => {}
            }
        }
        Ok(demands)
    }

    /// Takes in one demand; says what was expected if it cannot be understood.
    fn take(&mut self, name: &str, value: &'m str) -> Result<(), &'static str> {
        match name {
            "scopes" => {
                self.scopes = value.split_ascii_whitespace().collect();
                let is_understood = !self.scopes.is_empty() && self.scopes.iter().all(|scope| is_scope(scope));
                is_understood.then_some(()).ok_or(
                    "expected one scope or several, separated by spaces: each 1 to 128 visible ASCII characters without \
                     \", \\ and comma",
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

    /// Whether a request without a credential may pass. A route that demands scopes never admits one, even if the virtual host
    /// sets `trustgate.optional`: an anonymous request has no scopes.
    #[must_use]
    pub fn admits_anonymous(&self) -> bool {
        self.optional && self.scopes.is_empty()
    }
}

fn route(name: &str, value: &str, problem: &'static str) -> Fault {
    Fault::Route { name: quoted(name.as_bytes()), value: quoted(value.as_bytes()), problem }
}

/// Whether an extension without our prefix is meant for us all the same: it begins with `trustgate` in another spelling, such as
/// `Trustgate.scopes`, `trust-gate/scopes` or `trustgate_scopes`, or it ends in one of our names after a word that differs from
/// `trustgate` in one or two letters.
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

/// Whether the request is a CORS preflight (Fetch standard, "CORS-preflight fetch"), which browsers send without
/// credentials.
#[must_use]
pub fn is_preflight(view: &View<'_>) -> bool {
    let has = |name| view.header(name).next().is_some();
    view.method == "OPTIONS" && has("origin") && has("access-control-request-method")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_spellings_of_our_prefix_are_recognized() {
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
