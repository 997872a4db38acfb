//! The `trustgate deny` commands.
//!
//! This module hashes a key from standard input. Only the digests of the key are stored and printed
//! (`tests/integration/deny.rs`).

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    answer::{self, Answer},
    args,
    error::{At, CliError},
    stdin,
};
use crate::{
    base::telemetry::{self, Format, Level, LogSettings},
    config::Config,
    ext_authz::credential::is_well_formed,
    freshness::deny_list::entries::Denied,
    manage::deny::{Denials, DenyEntry, DenyError, mac_key},
    store::Env,
};

const COLUMNS: &[&str] = &["kind", "id", "set_at", "until"];
/// Replicas read the deny list in Redis every 500 ms, so a limit of 1 s leaves room for one failed read.
const EFFECTIVE: &str =
    "Every replica that can reach Redis applies the change within 1 s, even while the database is down.";

pub(crate) async fn run(config: &Config, env: Env<'_>, command: args::Deny) -> Result<Answer, CliError> {
    // Start logging, because the reason for a failed connection to Redis appears only in the log.
    telemetry::start(&LogSettings { level: Level::Warn, format: Format::Text });
    let (which, life) = match command {
        args::Deny::List => (Vec::new(), None),
        args::Deny::Add { which, life } => (denied(&which, config)?, Some(life)),
        args::Deny::Remove { which } => (denied(&which, config)?, None),
    };
    change(config, env, &which, life).await.map_err(|error| error.at(config))
}

/// Adds the entries in `which` if `life` is set, otherwise removes them. Lists all entries if `which` is empty.
async fn change(config: &Config, env: Env<'_>, which: &[Denied], life: Option<Duration>) -> Result<Answer, DenyError> {
    if !config.redis.is_configured() {
        return Err(DenyError::NoRedis(if life.is_some() { which.to_owned() } else { Vec::new() }));
    }
    let mac_key = mac_key(&config.redis, &config.store, env).await?;
    Denials::with(config.redis.clone(), mac_key, async |denials| {
        Ok(match (which, life) {
            ([], _) => {
                let listed = denials.list().await?;
                let answer = list(&listed.entries);
                match listed.refused {
                    0 => answer,
                    refused => answer.note(&format!(
                        "Entries that replicas ignore (wrong MAC, or written by another release): {refused}."
                    )),
                }
            }
            (which, Some(life)) => list(&denials.add(which, life).await?).note(EFFECTIVE),
            (which, None) => list(&denials.remove(which).await?).note(EFFECTIVE),
        })
    })
    .await
}

fn list(entries: &[DenyEntry]) -> Answer {
    Answer::list(entries.iter().map(data).collect(), COLUMNS)
}

fn data(entry: &DenyEntry) -> Value {
    let DenyEntry { denied, set_at, until } = entry;
    json!({
        "kind": denied.kind(),
        "id": denied.id(),
        "set_at": answer::time(*set_at),
        "until": answer::time(*until),
    })
}

fn denied(which: &args::WhichDenied, config: &Config) -> Result<Vec<Denied>, CliError> {
    let args::WhichDenied { key, trust, digest, stdin: _ } = which;
    let given = [key.map(Denied::Key), trust.map(Denied::Trust), digest.map(Denied::Digest)];
    if let Some(denied) = given.into_iter().flatten().next() {
        return Ok(vec![denied]);
    }
    let unreadable = |what: &str, error: std::io::Error| CliError::new(format!("cannot read {what}: {error}"));
    let text = stdin::text().map_err(|error| unreadable("the key", error))?;
    let key = text.expose().trim().as_bytes();
    if !is_well_formed(&config.credential, key) {
        let problem = "standard input is not a key: too short or too long, not visible ASCII, or a wrong checksum";
        return Err(CliError::usage(problem.to_owned()));
    }
    let hasher = config.credential.hasher().map_err(|error| unreadable("the pepper", error))?;
    // The database may store a digest that was hashed with any configured pepper or without one. Deny all of them.
    Ok(hasher.digests(hasher.current(key), key).all().copied().map(Denied::Digest).collect())
}
