//! The decision: turns a record, the route's demands and the time into a grant or a denial.
//!
//! This module is pure: it does no I/O and uses no clock, configuration or key.

use super::{credential::extract::CredentialError, route::Demands};
use crate::{
    base::clock::DatabaseTime,
    record::{KeyId, Record, TrustId},
};

/// The result of a check: whether the request may pass, and on whose behalf.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<'r> {
    /// The request belongs to a trust and may pass.
    Allow(Grant<'r>),
    /// The request may pass without an identity.
    Anonymous,
    /// The request may not pass.
    Deny(DenyReason),
}

/// Proof that [`decide`] accepted a key: no other function constructs a grant.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant<'r>(&'r Record);

impl<'r> Grant<'r> {
    /// The trust that the key belongs to.
    #[must_use]
    pub const fn trust_id(&self) -> TrustId {
        self.0.trust_id
    }

    /// The id of the presented key.
    #[must_use]
    pub const fn key_id(&self) -> KeyId {
        self.0.key_id
    }

    /// The key's scopes.
    #[must_use]
    pub fn scopes(&self) -> &'r [String] {
        &self.0.scopes
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $Reason:ident = $word:literal,)+) => {
        /// Why a request is denied. Unlike the cause of a fault, the reason lies in the request or its credential.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DenyReason { $( $(#[doc = $doc])+ $Reason, )+ }

impl DenyReason {
            /// All reasons.
            pub const ALL: [Self; [$($word),+].len()] = [$(Self::$Reason),+];

            /// Returns the word for labels, metadata and logs.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$Reason => $word, )+ }
            }
        }
    };
}

reasons! {
    /// The request has no credential.
    Missing = "missing",
    /// The request has more than one credential, or a value that may be two credentials.
    Ambiguous = "ambiguous",
    /// The credential cannot be a key.
    Malformed = "malformed",
    /// The store has no such key.
    Unknown = "unknown",
    /// The key was revoked.
    Revoked = "revoked",
    /// The key has expired.
    Expired = "expired",
    /// The key is not valid yet.
    NotYetValid = "not_yet_valid",
    /// The key's trust is disabled.
    TrustDisabled = "trust_disabled",
    /// The key, its digest or its trust is on the deny list.
    DenyListed = "deny_listed",
    /// The key lacks a scope that the route demands.
    Scope = "scope",
    /// The key may not be used from the request's source address.
    Source = "source",
    /// The message cannot be decoded, or does not describe an HTTP request.
    Undecodable = "undecodable",
    /// The message is larger than `limits.message_size`.
    TooLarge = "too_large",
}

impl DenyReason {
    /// True if the reason depends on the store: the key is unknown or not valid, or its trust is disabled. Clients
    /// receive the same response for all these reasons.
    #[must_use]
    pub const fn is_of_key(self) -> bool {
        matches!(self, Self::Unknown | Self::Revoked | Self::Expired | Self::NotYetValid | Self::TrustDisabled)
    }
}

/// How recently the database confirmed the data behind a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The database confirmed the data recently enough for the route's freshness mode.
    Confirmed,
    /// The last confirmation is too old: the lease is stale because the database does not answer.
    Stale,
}

impl From<CredentialError> for DenyReason {
    fn from(error: CredentialError) -> Self {
        match error {
            CredentialError::Missing => Self::Missing,
            CredentialError::Ambiguous => Self::Ambiguous,
            CredentialError::Malformed => Self::Malformed,
        }
    }
}

/// Decides a request from the record of its key (`None`: the store has no such key) and the demands of its route. `now`
/// is the time according to the database's clock.
#[must_use]
pub fn decide<'r>(record: Option<&'r Record>, demands: &Demands<'_>, now: DatabaseTime) -> Decision<'r> {
    let Some(record) = record else { return Decision::Deny(DenyReason::Unknown) };
    let has_scope = |scope: &&str| record.scopes.iter().any(|own| own == scope);
    let is_allowed_from = |cidrs: &[ipnet::IpNet]| {
        // A source without an address (a Unix socket) is in no network.
        cidrs.is_empty() || demands.source.is_some_and(|source| cidrs.iter().any(|cidr| cidr.contains(&source)))
    };
    let denial = if !record.trust_enabled {
        Some(DenyReason::TrustDisabled)
    } else if record.revoked_at.is_some() {
        Some(DenyReason::Revoked)
    } else if record.not_before.is_some_and(|start| now < start) {
        Some(DenyReason::NotYetValid)
    } else if record.expires_at.is_some_and(|end| now >= end) {
        Some(DenyReason::Expired)
    } else if !is_allowed_from(&record.allowed_cidrs) {
        Some(DenyReason::Source)
    } else if !demands.scopes.iter().all(has_scope) {
        Some(DenyReason::Scope)
    } else {
        None
    };
    denial.map_or(Decision::Allow(Grant(record)), Decision::Deny)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::ApiKeyDigest;

    fn record() -> Record {
        Record {
            key_id: KeyId(uuid::Uuid::from_u128(1)),
            trust_id: TrustId(uuid::Uuid::from_u128(2)),
            trust_enabled: true,
            digest: ApiKeyDigest::from_bytes([0; 32]),
            scopes: ["read", "write"].map(str::to_owned).into(),
            allowed_cidrs: ["10.0.0.0/8", "2001:db8::/32"].map(|cidr| cidr.parse().unwrap()).into(),
            not_before: Some(DatabaseTime::from_micros(100)),
            expires_at: Some(DatabaseTime::from_micros(200)),
            revoked_at: None,
        }
    }

    fn demands(scopes: &[&'static str], source: &str) -> Demands<'static> {
        Demands { scopes: scopes.iter().copied().collect(), source: source.parse().ok(), ..Demands::default() }
    }

    #[test]
    fn each_unmet_condition_is_enough_to_deny() {
        use DenyReason::*;
        type Change = fn(&mut Record);
        let same: Change = |_| ();
        for (name, change, scopes, source, now, want) in [
            ("valid", same, &[][..], "10.1.2.3", 150, None),
            ("valid, IPv6", same, &["read"], "2001:db8::1", 150, None),
            ("from the first moment", same, &[], "10.1.2.3", 100, None),
            ("before it", same, &[], "10.1.2.3", 99, Some(NotYetValid)),
            ("at the last moment", same, &[], "10.1.2.3", 199, None),
            ("after it", same, &[], "10.1.2.3", 200, Some(Expired)),
            (
                "revoked, even in future",
                |r| r.revoked_at = Some(DatabaseTime::from_micros(999)),
                &[],
                "10.1.2.3",
                150,
                Some(Revoked),
            ),
            ("trust disabled", |r| r.trust_enabled = false, &[], "10.1.2.3", 150, Some(TrustDisabled)),
            ("source outside the networks", same, &[], "11.0.0.1", 150, Some(Source)),
            ("source without an address", same, &[], "", 150, Some(Source)),
            ("no network restriction", |r| r.allowed_cidrs = [].into(), &[], "", 150, None),
            ("one scope missing", same, &["read", "admin"], "10.1.2.3", 150, Some(Scope)),
        ] {
            let mut record = record();
            change(&mut record);
            let demands = demands(scopes, source);
            let decision = decide(Some(&record), &demands, DatabaseTime::from_micros(now));
            let got = match decision {
                Decision::Deny(reason) => Some(reason),
                Decision::Allow(_) => None,
                Decision::Anonymous => panic!("{name}"),
            };
            assert_eq!(got, want, "{name}");
        }
        assert_eq!(decide(None, &Demands::default(), DatabaseTime::from_micros(0)), Decision::Deny(Unknown));
    }
}
