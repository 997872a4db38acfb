//! Decides one key without a request, and says why: `trustgate check`.

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

/// What a check of one key came to, and why.
#[derive(Clone, Debug)]
pub(crate) struct Explanation {
    /// Whether the key is granted.
    pub allowed: bool,
    /// The word that metrics and metadata use for the outcome: `granted`, `revoked`, ...
    pub reason: &'static str,
    /// The same in a sentence.
    pub sentence: String,
    /// Whose key it is, if it is known.
    pub trust_id: Option<TrustId>,
    /// Which key it is, if it is known.
    pub key_id: Option<KeyId>,
    /// What it may be used for.
    pub scopes: Vec<String>,
}

/// Decides `key` as a request without further demands would be, by what the database holds now.
///
/// # Errors
/// When the database cannot be asked.
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
        // Where a request comes from is not known here: a key that is bound to networks is explained as if from one.
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
            [] => ("granted", "the key is good".to_owned()),
            cidrs => {
                let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
                ("granted", format!("the key is good, from {} alone", cidrs.join(", ")))
            }
        },
        Decision::Anonymous => ("anonymous", "the request passes without a key".to_owned()),
        Decision::Deny(reason) => {
            let sentence = match reason {
                DenyReason::Missing => "nothing was given".to_owned(),
                DenyReason::Malformed => {
                    "this cannot be a key: too short or long, not visible ASCII, or the checksum is wrong".to_owned()
                }
                DenyReason::Unknown => "no such key is stored (under this pepper)".to_owned(),
                DenyReason::Revoked => format!("revoked at {}", date(record.and_then(|record| record.revoked_at))),
                DenyReason::Expired => format!("expired at {}", date(record.and_then(|record| record.expires_at))),
                DenyReason::NotYetValid => format!("valid from {}", date(record.and_then(|record| record.not_before))),
                DenyReason::TrustDisabled => "its trust is disabled".to_owned(),
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
