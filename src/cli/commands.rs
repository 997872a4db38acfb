//! Runs a command: loads the configuration, opens the database if the command needs it, and returns the answer. The
//! module `cli` writes the answer.

use std::ffi::OsString;

use clap::CommandFactory;
use serde_json::json;

use super::{
    answer::Answer,
    args::{self, Alter, Arguments, Command},
    canary, deny, doctor,
    effect::effect_json,
    error::{At, CliError},
    exit::{DENIED, FAILED},
    explain, key, progress, stdin, trust,
};
use crate::{
    base::{clock::SystemClock, secret::Secret, settings::ConfigError},
    config::{self, Config, LoadError, Purpose, document},
    manage::{Effect, ManageError, Manager},
    server,
    store::{
        self, Actor, Env, Ledger, StoreError, StoreSettings,
        ledger::copy::{self, Copied, Ends, GivenUrl},
    },
};

pub(crate) fn run(arguments: Arguments, environment: &[(OsString, OsString)]) -> Result<Answer, CliError> {
    let Arguments { config: file, command, .. } = arguments;
    let load = |purpose| config::load(file.as_deref(), environment.iter().cloned(), purpose);
    match command {
        Command::Completions { shell } => Ok(completions(shell)),
        Command::Config(args::Config::Default) => {
            Ok(Answer { json: Some(document::json()), ..Answer::text(document::toml()) })
        }
        Command::Config(args::Config::Check) => checked(load(Purpose::Check)),
        Command::Serve => {
            let config = load(Purpose::Serve)?;
            Ok(server::serve(config, &|name| variable(environment, name)).map(|()| Answer::text(String::new()))?)
        }
        Command::Canary => {
            let config = load(Purpose::Canary)?;
            Ok(canary::run(&config, &|name| variable(environment, name)).map(|()| Answer::text(String::new()))?)
        }
        Command::Check => {
            let config = load(Purpose::Serve)?;
            let text = stdin::text().map_err(|error| CliError::new(format!("cannot read the key: {error}")))?;
            Ok(explained(&explain::explain(
                &config,
                &|name| variable(environment, name),
                &Secret::new(text.expose().trim().to_owned()),
            )?))
        }
        Command::Doctor => {
            let loaded = config::load_with_errors(file.as_deref(), environment.iter().cloned(), Purpose::Serve);
            doctor::run(loaded, &|name| variable(environment, name))
        }
        Command::Migrate { print_grants: true, serve_role, manage_role, .. } => {
            Ok(Answer::text(store::grants(&load(Purpose::Manage)?.store, &serve_role, &manage_role)))
        }
        Command::Migrate { new_incarnation, .. } => {
            let config = load(Purpose::Manage)?;
            let migrated = block_on(migrate(&config, environment, new_incarnation))?;
            migrated.map_err(|error| CliError::of_store(error, &config))
        }
        Command::Attach(Alter { print }) => alter(&load(Purpose::Manage)?, environment, true, print),
        Command::Detach(Alter { print }) => alter(&load(Purpose::Manage)?, environment, false, print),
        Command::Trust(command) => {
            managing(&load(Purpose::Manage)?, environment, store::open_ledger, async |manager, config| {
                trust::run(manager, config, command).await
            })
        }
        Command::Key(command) => {
            managing(&load(Purpose::Manage)?, environment, store::open_ledger, async |manager, config| {
                key::run(manager, config, command).await
            })
        }
        Command::Pepper(args::Pepper::Use) => {
            managing(&load(Purpose::Manage)?, environment, store::open_ledger, async |manager, _| {
                pepper_used(manager).await
            })
        }
        Command::Deny(command) => {
            let config = load(Purpose::Deny)?;
            block_on(deny::run(&config, &|name| variable(environment, name), command))?
        }
        Command::Store(args::Store::Copy(args::Copy { from, to })) => {
            let config = load(Purpose::Manage)?;
            let given = |option, url: Option<Secret>| url.map(|url| GivenUrl { option, url });
            let ends = Ends { from: given("--from", from), to: given("--to", to) };
            block_on(copy(&config, environment, ends))?
        }
        Command::Cache(args::Cache::Clear) => {
            managing(&load(Purpose::Manage)?, environment, store::open_history, async |manager, config| {
                Ok(cleared(&manager.clear_caches(&SystemClock, config.freshness.lease).await?))
            })
        }
    }
}

/// Opens the configured database with `open` and runs `command` with a [`Manager`] for it.
fn managing(
    config: &Config,
    environment: &[(OsString, OsString)],
    open: impl AsyncFnOnce(&StoreSettings, Env<'_>) -> Result<Ledger, StoreError>,
    command: impl AsyncFnOnce(&mut Manager, &Config) -> Result<Answer, ManageError>,
) -> Result<Answer, CliError> {
    block_on(async {
        let variable = |name: &str| variable(environment, name);
        let ledger = open(&config.store, &variable).await;
        let ledger = ledger.map_err(|error| CliError::of_store(error, config))?;
        let mut manager = Manager::new(ledger, actor(environment), config.credential.clone())
            .map_err(|error| CliError::new(format!("cannot read the pepper: {error}")))?;
        command(&mut manager, config).await.map_err(|error| error.at(config))
    })?
}

fn block_on<T>(work: impl Future<Output = T>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| CliError::new(format!("cannot start the async runtime: {error}")))?.block_on(work))
}

async fn migrate(
    config: &Config,
    environment: &[(OsString, OsString)],
    new_incarnation: bool,
) -> Result<Answer, StoreError> {
    let variable = |name: &str| variable(environment, name);
    store::migrate(&config.store, &variable).await?;
    if new_incarnation {
        store::new_incarnation(&config.store, &variable).await?;
    }
    let database = store::describe(&config.store, &variable);
    let json = Some(json!({ "database": database, "migrated": true, "new_incarnation": new_incarnation }));
    let more = if new_incarnation { "; a new database history was started" } else { "" };
    let text = format!("tables up to date: {database} has this release's table version{more}");
    Ok(Answer { json, ..Answer::text(text) })
}

/// Attaches the change log to an existing table, or detaches it. With `print`, returns the SQL statements instead.
fn alter(
    config: &Config,
    environment: &[(OsString, OsString)],
    attached: bool,
    print: bool,
) -> Result<Answer, CliError> {
    let (settings, env) = (&config.store, |name: &str| variable(environment, name));
    let altered = block_on(async {
        Ok(match (attached, print) {
            (true, true) => Answer::text(store::print_attach(settings, &env).await?),
            (false, true) => Answer::text(store::print_detach(settings, &env).await?),
            (true, false) => altered(config, &env, &store::attach(settings, &env).await?, true),
            (false, false) => altered(config, &env, &store::detach(settings, &env).await?, false),
        })
    })?;
    altered.map_err(|error| CliError::of_store(error, config))
}

fn altered(config: &Config, env: Env<'_>, table: &str, attached: bool) -> Answer {
    let object = json!({ "database": store::describe(&config.store, env), "table": table, "attached": attached });
    let answer = Answer::object(object, &["database", "table", "attached"]);
    if !attached || config.store.attached {
        return answer;
    }
    answer.note("Set `store.attached = true` and restart every replica. Until then, replicas ignore the change log.")
}

async fn copy(config: &Config, environment: &[(OsString, OsString)], ends: Ends) -> Result<Answer, CliError> {
    let variable = |name: &str| variable(environment, name);
    let progress = progress::keys();
    let report = |done, total| {
        progress.set_length(total);
        progress.set_position(done);
    };
    let copied = copy::copy(&config.store, ends, &variable, &actor(environment), report).await;
    progress.finish_and_clear();
    let Copied { from, to, trusts, keys } = copied.map_err(|error| CliError::new(error.to_string()))?;
    let object = json!({ "from": from, "to": to, "trusts": trusts, "keys": keys });
    Ok(Answer::object(object, &["from", "to", "trusts", "keys"]))
}

/// Returns the value of an environment variable; `None` if the variable is not set or not UTF-8.
fn variable(environment: &[(OsString, OsString)], name: &str) -> Option<String> {
    environment.iter().find(|(found, _)| found == name)?.1.to_str().map(str::to_owned)
}

/// Returns the operator's name for the audit log, from the variable `USER` or `LOGNAME`. The operator can set these
/// variables, so the name proves nothing.
fn actor(environment: &[(OsString, OsString)]) -> Actor {
    let user = ["USER", "LOGNAME"].iter().find_map(|name| variable(environment, name).filter(|user| !user.is_empty()));
    let user: String =
        user.unwrap_or_else(|| "unknown".to_owned()).chars().filter(|c| !c.is_control()).take(64).collect();
    Actor(format!("cli:{user}"))
}

fn completions(shell: clap_complete::Shell) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "trustgate", &mut script);
    Answer::text(String::from_utf8_lossy(&script).into_owned())
}

fn checked(config: Result<Config, LoadError>) -> Result<Answer, CliError> {
    match config {
        Ok(_) => Ok(Answer { json: Some(json!({ "ok": true, "mistakes": [] })), ..Answer::text("ok".to_owned()) }),
        Err(LoadError::Invalid(config_errors)) => {
            let object = |error: &ConfigError| json!({ "setting": error.setting, "origin": error.origin, "problem": error.problem });
            let objects: Vec<_> = config_errors.0.iter().map(object).collect();
            let json = Some(json!({ "ok": false, "mistakes": objects }));
            Ok(Answer { json, ..Answer::text(config_errors.to_string()) }.exit(FAILED))
        }
        Err(error) => Err(error.into()),
    }
}

async fn pepper_used(manager: &mut Manager) -> Result<Answer, ManageError> {
    let (pepper, before) = manager.use_pepper().await?;
    let object = json!({ "pepper": pepper.to_string(), "before": before.map(|before| before.to_string()) });
    let answer = Answer::object(object, &["pepper", "before"]);
    Ok(match before {
        Some(before) if before != pepper => answer.note(
            "Existing keys keep working on servers that list the previous pepper in credential.previous_pepper_files. \
             List these keys with `trustgate key list --pepper previous`.",
        ),
        Some(_) => answer.note("This pepper was already recorded; nothing changed."),
        None => answer,
    })
}

fn cleared(effect: &Effect) -> Answer {
    let answer = Answer { json: Some(effect_json(effect)), ..Answer::text(effect.to_string()) };
    if effect.missing.is_empty() { answer } else { answer.exit(FAILED) }
}

fn explained(explanation: &explain::Explanation) -> Answer {
    let explain::Explanation { allowed, reason, sentence, trust_id, key_id, scopes } = explanation;
    let object = json!({
        "decision": if *allowed { "allow" } else { "deny" },
        "reason": reason,
        "sentence": sentence,
        "trust_id": trust_id.map(|id| id.to_string()),
        "key_id": key_id.map(|id| id.to_string()),
        "scopes": scopes,
    });
    let answer = Answer::object(object, &["decision", "reason", "sentence"]);
    if *allowed { answer } else { answer.exit(DENIED) }
}
