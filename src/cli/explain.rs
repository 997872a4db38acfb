//! Implements `trustgate check`: decides whether to grant one key without a request, and explains the decision.

use std::sync::Arc;

use tokio::runtime::Builder;

use crate::{
    base::{
        clock::{DatabaseTime, SystemClock},
        secret::Secret,
    },
    cache::{api_key::ApiKey, cacheable::Cacheable as _},
    config::Config,
    ext_authz::{
        credential::is_well_formed,
        decision::{Decision, DenyReason, decide},
        route::Demands,
    },
    record::{KeyId, Record, TrustId},
    server::AppError,
    store::{self, Env, Missing},
};

/// The decision on one key, and its reason.
#[derive(Clone, Debug)]
pub(crate) struct Explanation {
    /// True if the key is granted.
    pub allowed: bool,
    /// The reason, as shown in metrics and in Envoy's dynamic metadata: `granted`, `revoked` and so on.
    pub reason: &'static str,
    /// The reason as a human-readable sentence.
    pub sentence: String,
    /// The trust that the key belongs to, if the database contains the key.
    pub trust_id: Option<TrustId>,
    /// The key id, if the database contains the key.
    pub key_id: Option<KeyId>,
    /// The scopes of the key.
    pub scopes: Vec<String>,
}

/// Decides whether to grant `key`, as if a request to a route without demands contained the key. Reads the record from
/// the database, not from a cache.
///
/// # Errors
/// A setting is invalid, a pepper file cannot be read, or the database cannot be read.
pub(crate) fn explain(config: &Config, env: Env<'_>, key: &Secret) -> Result<Explanation, AppError> {
    let bytes = key.expose().as_bytes();
    if bytes.is_empty() {
        return Ok(explained(&Decision::Deny(DenyReason::Missing), None));
    }
    if !is_well_formed(&config.credential, bytes) {
        return Ok(explained(&Decision::Deny(DenyReason::Malformed), None));
    }
    let pepper_failed = |source| AppError::SecretFile { setting: "credential.pepper_file", source };
    let hasher = config.credential.hasher().map_err(pepper_failed)?;
    let digests = hasher.digests(hasher.current(bytes), bytes);
    let place = store::describe(&config.store, env);
    let failed = |source| AppError::Store { place: place.clone(), source };
    let source = store::open_lookup(&config.store, env, Arc::new(SystemClock)).map_err(failed)?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        source.prepare(Missing::Refuse).await.map_err(failed)?;
        let found = ApiKey::load(&*source, &digests).await.map_err(|fault| failed(fault.into()));
        source.close().await;
        let found = found?;
        let record = found.value.as_ref();
        // Without a request, there is no source address. Use an address that the key allows; the explanation lists the
        // allowed networks.
        let demands = Demands { source: record.and_then(from_an_allowed_network), ..Demands::default() };
        Ok(explained(&decide(record, &demands, found.read_at), record))
    })
}

fn from_an_allowed_network(record: &Record) -> Option<std::net::IpAddr> {
    record.allowed_cidrs.first().map(ipnet::IpNet::addr)
}

fn explained(decision: &Decision<'_>, record: Option<&Record>) -> Explanation {
    let date = |time: Option<DatabaseTime>| time.map(|time| time.to_string()).unwrap_or_default();
    let (reason, sentence) = match decision {
        Decision::Allow(_) => match record.map_or(&[][..], |record| &*record.allowed_cidrs) {
            [] => ("granted", "the key is valid".to_owned()),
            cidrs => {
                let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
                ("granted", format!("the key is valid, but only from {}", cidrs.join(", ")))
            }
        },
        Decision::Anonymous => ("anonymous", "the request passes without a key".to_owned()),
        Decision::Deny(reason) => {
            let sentence = match reason {
                DenyReason::Missing => "no key was given".to_owned(),
                DenyReason::Malformed => {
                    "this is not a key: too short or too long, not visible ASCII, or a wrong checksum".to_owned()
                }
                DenyReason::Unknown => {
                    "the database has no such key, or the key needs a pepper that is not configured".to_owned()
                }
                DenyReason::Revoked => format!("revoked at {}", date(record.and_then(|record| record.revoked_at))),
                DenyReason::Expired => format!("expired at {}", date(record.and_then(|record| record.expires_at))),
                DenyReason::NotYetValid => format!("valid from {}", date(record.and_then(|record| record.not_before))),
                DenyReason::TrustDisabled => "the key's trust is disabled".to_owned(),
                other => format!("denied: {}", other.as_str()),
            };
            (reason.as_str(), sentence)
        }
    };
    Explanation {
        allowed: matches!(decision, Decision::Allow(_) | Decision::Anonymous),
        reason,
        sentence,
        trust_id: record.map(|record| record.trust_id),
        key_id: record.map(|record| record.key_id),
        scopes: record.map(|record| record.scopes.to_vec()).unwrap_or_default(),
    }
}
