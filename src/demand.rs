//! What a route asks of a request, from Envoy's per-route `context_extensions`.
//!
//! Never guesses: an extension of ours that cannot be understood is a fault, for taking it lightly would open the route.

use std::net::IpAddr;

use smallvec::SmallVec;

use crate::{
    fault::Fault,
    wire::view::{Peer, View},
};

crate::words! {
    /// How fresh a record must be.
    pub enum Freshness ("\"lease\", \"strict\", \"live\" or \"ttl\"") {
        /// As the newest change that a poll confirmed within `freshness.lease`; for `freshness.stale_if_unconfirmed`
        /// longer while the database does not answer.
        Lease = "lease",
        /// As `lease`, but not a moment longer: then the database is asked for each request.
        Strict = "strict",
        /// As old as `freshness.ttl`, counted from the database read, whatever tiers it passed through.
        Ttl = "ttl",
        /// As the database holds it now: one read by primary key for each request.
        Live = "live",
    }
}

/// What a route asks of a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Demands<'m> {
    /// Scopes the key must have, all of them.
    pub scopes: SmallVec<[&'m str; 4]>,
    /// How fresh the record must be, where the route says so.
    pub freshness: Option<Freshness>,
    /// Whether a request without any credential may pass as anonymous.
    pub optional: bool,
    /// Where the request came from: the direct peer of Envoy, where it has an address.
    pub source: Option<IpAddr>,
}

const PREFIX: &str = "trustgate.";

impl<'m> Demands<'m> {
    /// The demands of the route that `view` came by.
    ///
    /// # Errors
    /// [`Fault::Route`] for an extension that begins with `trustgate.` and that this release does not understand.
    pub fn of(view: &View<'m>) -> Result<Self, Fault> {
        let mut demands = Self { source: source(view), ..Self::default() };
        for (name, value) in view.context_extensions() {
            let Some(name) = name.strip_prefix(PREFIX) else { continue };
            match (name, value) {
                ("scopes", scopes) => demands.scopes = scopes.split_ascii_whitespace().collect(),
                ("freshness", word) => {
                    let unknown = Fault::Route { name: "trustgate.freshness" };
                    demands.freshness = Some(Freshness::from_word(word).ok_or(unknown)?);
                }
                ("optional", "true") => demands.optional = true,
                ("optional", "false") => demands.optional = false,
                ("optional", _) => return Err(Fault::Route { name: "trustgate.optional" }),
                _ => return Err(Fault::Route { name: "trustgate.*" }),
            }
        }
        Ok(demands)
    }
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
