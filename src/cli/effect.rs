//! Shows the operator which replicas have applied a change.
//!
//! The change is already committed when this module runs. A failure to determine its effect is therefore part of the
//! answer, not an error.

use serde_json::{Value, json};

use super::answer::{self, Answer};
use crate::{
    base::{clock::SystemClock, saturate::Saturate as _},
    config::Config,
    freshness::Freshness,
    manage::{Effect, Manager},
};

/// Waits up to `freshness.lease` for all replicas to apply the committed change, and adds to `answer` which replicas
/// have applied it. Does not change the exit code, because the change is already committed.
pub(crate) async fn with_effect(answer: Answer, manager: &mut Manager, config: &Config) -> Answer {
    let effect = manager.effect(&SystemClock, config.freshness.lease).await;
    let (json, note) = match &effect {
        Ok(effect) => (effect_json(effect), effect.to_string()),
        Err(error) => {
            (Value::Null, format!("the change is committed, but its effect on the replicas is unknown: {error}"))
        }
    };
    let answer = answer.member("effect", json).note(&note);
    match config.freshness.mode {
        Some(Freshness::Ttl) => answer.note(&format!(
            "With `freshness.mode` \"ttl\", cached records are used for up to {} (`freshness.ttl`). To clear them now, \
             run `trustgate cache clear`.",
            humantime::format_duration(config.freshness.ttl)
        )),
        Some(Freshness::Lease | Freshness::Strict | Freshness::Live) | None => answer,
    }
}

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
        "after_ms": effect.after.as_millis().saturate::<u64>(),
        "missing": missing.collect::<Vec<_>>(),
    })
}
