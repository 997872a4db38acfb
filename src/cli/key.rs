//! The `trustgate key` commands.
//!
//! `key issue` prints the new key. The other commands print neither keys nor text from standard input
//! (`tests/integration/cli.rs`).

use std::{fs::File, path::Path};

use indicatif::ProgressStyle;
use serde_json::{Value, json};

use super::{
    answer::{self, Answer},
    args,
    effect::with_effect,
    exit::FAILED,
    progress, stdin,
};
use crate::{
    base::clock::DatabaseTime,
    config::Config,
    ext_authz::credential::format,
    manage::{
        ManageError, Manager, import,
        keys::{Identified, Issued, KeyState, Wanted},
    },
    store::ledger::KeyDetails,
};

const COLUMNS: &[&str] = &["id", "trust_name", "hint", "name", "state", "scopes", "created_at", "expires_at"];
const PEPPER_COLUMNS: &[&str] = &["id", "trust_name", "hint", "name", "state", "pepper", "created_at", "expires_at"];
const IDENTIFIED_COLUMNS: &[&str] = &["line", "result", "key_id", "trust_name", "hint", "name"];

pub(crate) async fn run(manager: &mut Manager, config: &Config, command: args::Key) -> Result<Answer, ManageError> {
    match command {
        args::Key::Issue(args::Issue { trust, name, expires_in, scopes, allowed_cidrs }) => {
            let wanted = Wanted { trust, name, scopes, allowed_cidrs, expires_in };
            Ok(issued(&manager.issue_key(wanted).await?))
        }
        args::Key::List { trust, pepper } => {
            let (keys, now) = manager.keys(trust.as_ref(), pepper).await?;
            let columns = if pepper.is_some() { PEPPER_COLUMNS } else { COLUMNS };
            Ok(Answer::list(keys.iter().map(|key| data(key, now)).collect(), columns))
        }
        args::Key::Show(which) => {
            let (key, now) = manager.key(which.id).await?;
            Ok(Answer::object(data(&key, now), COLUMNS))
        }
        args::Key::Revoke(which) => {
            let (key, now) = manager.revoke_key(which.id).await?;
            Ok(with_effect(Answer::object(data(&key, now), COLUMNS), manager, config).await)
        }
        args::Key::Identify => {
            let (found, now) = manager.identify_keys(stdin::text()?.expose()).await?;
            Ok(identified(&found, now))
        }
        args::Key::Import(args::Import { trust, plaintext, file }) => {
            let form = if plaintext { import::LineForm::Plaintext } else { import::LineForm::Digests };
            let input = if file == Path::new("-") { stdin::open()? } else { File::open(&file)? };
            let length = input.metadata().ok().filter(std::fs::Metadata::is_file).map(|metadata| metadata.len());
            let progress = progress::reading(length);
            let storing = |count| {
                progress.set_style(ProgressStyle::default_spinner());
                progress.set_message(format!("storing {count} keys"));
            };
            let imported = manager.import_keys(&trust, form, progress.wrap_read(input), storing).await;
            progress.finish_and_clear();
            Ok(stored(&imported?))
        }
    }
}

fn issued(Issued { key, secret }: &Issued) -> Answer {
    let mut object = data(key, key.created_at);
    object["key"] = json!(secret.expose());
    Answer::object(object, &["key", "id"]).note("This is the only time the key is shown: save it now.").if_lost(
        format!("key {id} was issued, but could not be shown: revoke it with `trustgate key revoke {id}`", id = key.id),
    )
}

fn stored(imported: &import::Imported) -> Answer {
    let object = json!({
        "trust_id": imported.trust.id.to_string(),
        "trust_name": imported.trust.name,
        "imported": imported.new,
        "already_stored": imported.known,
    });
    Answer::object(object, &["imported", "already_stored"])
}

fn identified(found: &[Identified], now: DatabaseTime) -> Answer {
    let known = found.iter().any(|one| one.key.is_some());
    let objects = found.iter().map(|one| {
        let result = match (&one.key, one.form) {
            (Some(key), _) => KeyState::of(key, now).as_str(),
            (None, format::Form::Ours) => "unknown",
            (None, format::Form::Mistyped) => "mistyped",
            (None, format::Form::Foreign) => "foreign",
        };
        let key = one.key.as_ref();
        json!({
            "line": one.line,
            "result": result,
            "key_id": key.map(|key| key.id.to_string()),
            "trust_id": key.map(|key| key.trust_id.to_string()),
            "trust_name": key.map(|key| &key.trust_name),
            "hint": key.map(|key| &key.hint),
            "name": key.and_then(|key| key.name.as_ref()),
        })
    });
    let answer = Answer::list(objects.collect(), IDENTIFIED_COLUMNS);
    if known { answer } else { answer.note("No key from this database was found in the input.").exit(FAILED) }
}

fn data(key: &KeyDetails, now: DatabaseTime) -> Value {
    let cidrs: Vec<_> = key.allowed_cidrs.iter().map(ToString::to_string).collect();
    json!({
        "id": key.id.to_string(),
        "trust_id": key.trust_id.to_string(),
        "trust_name": key.trust_name,
        "hint": key.hint,
        "name": key.name,
        "state": KeyState::of(key, now).as_str(),
        "scheme": key.scheme.as_str(),
        "pepper": key.pepper.map(|pepper| pepper.to_string()),
        "scopes": key.scopes,
        "allowed_cidrs": cidrs,
        "created_at": answer::time(key.created_at),
        "not_before": answer::time_or_null(key.not_before),
        "expires_at": answer::time_or_null(key.expires_at),
        "revoked_at": answer::time_or_null(key.revoked_at),
    })
}
