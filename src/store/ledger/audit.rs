//! Creates audit entries, which contain neither keys nor digests.

use serde_json::{Value, json};

use super::{
    backend::LedgerBackend,
    types::{Actor, AuditEntry, KeyDetails, Trust},
};
use crate::base::clock::DatabaseTime;

/// Writes an audit entry.
pub(crate) async fn note(
    tables: &mut dyn LedgerBackend,
    actor: &Actor,
    action: &'static str,
    object: impl ToString + Send,
    before: Option<Value>,
    after: Option<Value>,
) -> Result<(), sqlx::Error> {
    let entry = AuditEntry { action, object: object.to_string(), before, after };
    tables.insert_audit(actor, &entry).await
}

pub(crate) fn trust_json(trust: &Trust) -> Value {
    let Trust { id, name, enabled, created_at, keys } = trust;
    json!({
        "id": id.to_string(), "name": name, "enabled": enabled, "created_at": time_json(*created_at), "keys": keys,
    })
}

pub(crate) fn key_json(key: &KeyDetails) -> Value {
    let KeyDetails { id, trust_id, hint, scheme, name, scopes, .. } = key;
    let cidrs: Vec<String> = key.allowed_cidrs.iter().map(ToString::to_string).collect();
    json!({
        "id": id.to_string(), "trust_id": trust_id.to_string(), "hint": hint, "scheme": scheme.as_str(), "name": name,
        "scopes": scopes, "allowed_cidrs": cidrs, "created_at": time_json(key.created_at),
        "not_before": key.not_before.map(time_json), "expires_at": key.expires_at.map(time_json),
        "revoked_at": key.revoked_at.map(time_json),
    })
}

/// Formats a time as in RFC 3339, or as the number of microseconds since the Unix epoch if RFC 3339 cannot represent
/// the time.
fn time_json(time: DatabaseTime) -> Value {
    time.to_rfc3339().map_or_else(|| json!(time.micros()), Value::from)
}
