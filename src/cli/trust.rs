//! The commands about trusts.
//!
//! Never changes a trust itself: `manage` does.

use serde_json::{Value, json};

use super::{
    answer::{self, Answer},
    args,
};
use crate::{
    manage::{ManageError, Manager},
    store::ledger::Trust,
};

const COLUMNS: &[&str] = &["name", "id", "enabled", "keys", "created_at"];

pub(super) async fn run(manager: &mut Manager, command: args::Trust) -> Result<Answer, ManageError> {
    let trust = match command {
        args::Trust::List => {
            return Ok(Answer::list(manager.trusts().await?.iter().map(data).collect(), COLUMNS));
        }
        args::Trust::Create { name } => manager.create_trust(&name).await?,
        args::Trust::Show(which) => manager.trust(&which.trust).await?,
        args::Trust::Enable(which) => manager.enable_trust(&which.trust, true).await?,
        args::Trust::Disable(which) => manager.enable_trust(&which.trust, false).await?,
        args::Trust::Delete { which, with_keys } => {
            let trust = manager.delete_trust(&which.trust, with_keys).await?;
            return Ok(Answer::object(data(&trust), COLUMNS).note("The trust is deleted."));
        }
    };
    Ok(Answer::object(data(&trust), COLUMNS))
}

fn data(trust: &Trust) -> Value {
    let Trust { id, name, enabled, created_at, keys } = trust;
    json!({
        "id": id.to_string(),
        "name": name,
        "enabled": enabled,
        "created_at": answer::time(*created_at),
        "keys": keys,
    })
}
