//! The `trustgate trust` commands: they call [`Manager`] and print the trusts that it returns.

use serde_json::{Value, json};

use super::{
    answer::{self, Answer},
    args,
    effect::with_effect,
};
use crate::{
    config::Config,
    manage::{ManageError, Manager},
    store::ledger::Trust,
};

const COLUMNS: &[&str] = &["name", "id", "enabled", "keys", "created_at"];

pub(crate) async fn run(manager: &mut Manager, config: &Config, command: args::Trust) -> Result<Answer, ManageError> {
    Ok(match command {
        args::Trust::List => Answer::list(manager.trusts().await?.iter().map(data).collect(), COLUMNS),
        args::Trust::Create { name } => shown(&manager.create_trust(&name).await?),
        args::Trust::Show(which) => shown(&manager.trust(&which.trust).await?),
        args::Trust::Enable(which) => shown(&manager.enable_trust(&which.trust, true).await?),
        args::Trust::Disable(which) => {
            let trust = manager.enable_trust(&which.trust, false).await?;
            with_effect(shown(&trust), manager, config).await
        }
        args::Trust::Delete { which, with_keys } => {
            let trust = manager.delete_trust(&which.trust, with_keys).await?;
            with_effect(shown(&trust).note("The trust is deleted."), manager, config).await
        }
    })
}

fn shown(trust: &Trust) -> Answer {
    Answer::object(data(trust), COLUMNS)
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
