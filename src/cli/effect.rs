//! From when on a change counts, for whoever made it.
//!
//! Never fails: what was committed is committed, also where nobody can say yet which replicas know of it.

use serde_json::{Value, json};

use super::answer::{self, Answer};
use crate::{
    base::clock::SystemClock,
    config::Config,
    freshness::Freshness,
    manage::{Effect, Manager},
};

/// Adds to `answer` where the change just committed is effective, waiting at most `freshness.lease` for all replicas. The
/// exit code stays: the change is made.
pub(crate) async fn with_effect(answer: Answer, manager: &mut Manager, config: &Config) -> Answer {
    let effect = manager.effect(&SystemClock, config.freshness.lease).await;
    let (json, note) = match &effect {
        Ok(effect) => (effect_json(effect), effect.to_string()),
        Err(error) => {
            (Value::Null, format!("the change is made; on which replicas it is effective is not known: {error}"))
        }
    };
    let answer = answer.member("effect", json).note(&note);
    match config.freshness.mode {
        Some(Freshness::Ttl) => answer.note(&format!(
            "Where `freshness.mode` is \"ttl\", records that were read before are used for up to {} (`freshness.ttl`); \
             `trustgate cache clear` ends that at once.",
            humantime::format_duration(config.freshness.ttl)
        )),
        Some(Freshness::Lease | Freshness::Strict | Freshness::Live) | None => answer,
    }
}

/// The effect for programs.
pub(crate) fn effect_json(effect: &Effect) -> Value {
    let missing = effect.missing.iter().map(|replica| {
        json!({
            "id": replica.id.to_string(),
            "name": replica.name,
            "seen_at": answer::time(replica.seen_at),
            "until": answer::time(replica.until),
        })
    });
    json!({
        "version": effect.version.0,
        "replicas": effect.replicas,
        "applied": effect.applied(),
        "after_ms": u64::try_from(effect.after.as_millis()).unwrap_or(u64::MAX),
        "missing": missing.collect::<Vec<_>>(),
    })
}
