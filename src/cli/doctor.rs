//! The examination of everything `serve` needs around it: each part says what it finds, and here it is put in order.
//!
//! Changes nothing, and ends in bounded time whatever hangs: every part bounds its own waits, and no lookup of a name
//! that was given up is waited for.

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use super::{answer::Answer, error::CliError, exit::FAILED};
use crate::{
    base::{
        clock::{Clock as _, SystemClock, wall_time},
        settings::ConfigError,
    },
    config::{Config, ConfigErrors, SECTIONS},
    doctor::{
        database::{NAMES as DATABASE, diagnose as examine_database},
        diagnosis::{Diagnosis, State, complete},
        redis::{NAMES as REDIS, diagnose as examine_redis},
        session::{Examined, Use},
    },
    ext_authz::credential::Hasher,
    freshness::deny_list,
    grpc::tls,
    redis::read_mac_key,
    store::Env,
};

const COLUMNS: &[&str] = &["name", "state", "found"];

const CONFIGURATION: &str = "configuration";
const DEADLINES: &str = "deadlines";
const ENVOY: &str = "envoy";
const PEPPER: &str = "pepper";
const DENY_FILE: &str = "deny_file";
const MAC_KEY: &str = "redis_mac_key";

/// Envoy should have this much more time than a check may take: the way there and back, and its own turn.
const MARGIN: Duration = Duration::from_millis(20);

pub(crate) fn run(loaded: Result<(Config, Vec<ConfigError>), ConfigErrors>, env: Env<'_>) -> Result<Answer, CliError> {
    tls::install_provider();
    let (told, unreadable) = match loaded {
        Ok((config, config_errors)) => (Told { config, config_errors }, None),
        Err(error) => (Told { config: Config::default(), config_errors: Vec::new() }, Some(error.to_string())),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CliError::new(format!("cannot start: {error}")))?;
    let diagnoses = match &unreadable {
        Some(problem) => {
            let remedy = "correct the path, or let this user read the file";
            let diagnosis = Diagnosis::failed(CONFIGURATION, problem.as_str(), remedy);
            complete(&names(), vec![diagnosis], "because of configuration")
        }
        None => runtime.block_on(diagnose(&told, env)),
    };
    // A name that nobody resolves keeps a thread waiting.
    runtime.shutdown_background();
    Ok(answer(&diagnoses, &told.config, unreadable.is_none() && told.because(&["decision"]).is_none()))
}

/// Every examination, in order.
fn names() -> Vec<&'static str> {
    let own = [CONFIGURATION, DEADLINES, ENVOY, PEPPER, tls::EXAMINATION, DENY_FILE];
    [&own[..], DATABASE, REDIS, &[MAC_KEY]].concat()
}

/// What was configured, mistakes included.
struct Told {
    config: Config,
    config_errors: Vec<ConfigError>,
}

impl Told {
    /// Why what these sections say cannot be gone by, if it cannot: a mistake in one of them, or one that may belong
    /// into any.
    fn because(&self, sections: &[&str]) -> Option<String> {
        let section =
            |config_error: &ConfigError| config_error.setting.split('.').next().unwrap_or_default().to_owned();
        let concerns = |config_error: &&ConfigError| {
            let section = section(config_error);
            sections.contains(&section.as_str()) || !SECTIONS.iter().any(|known| known.name == section)
        };
        self.config_errors.iter().find(concerns).map(|config_error| format!("because of the mistake: {config_error}"))
    }

    /// The findings of `examination`, or why these `names` cannot be examined.
    async fn unless_mistaken(
        &self,
        sections: &[&str],
        names: &[&'static str],
        examination: impl Future<Output = Vec<Diagnosis>>,
    ) -> Vec<Diagnosis> {
        match self.because(sections) {
            Some(because) => complete(names, Vec::new(), &because),
            None => examination.await,
        }
    }
}

async fn diagnose(told: &Told, env: Env<'_>) -> Vec<Diagnosis> {
    let config = &told.config;
    let mut diagnoses = vec![configuration(&told.config_errors)];
    let now = wall_time(&SystemClock, SystemClock.now());
    for (name, sections, diagnosis) in [
        (DEADLINES, &["store", "redis", "decision"][..], deadlines as fn(&Config) -> Diagnosis),
        (ENVOY, &["decision"][..], envoy),
        (PEPPER, &["credential"][..], pepper),
        (DENY_FILE, &["freshness"][..], deny_file),
    ] {
        diagnoses.push(
            told.because(sections).map_or_else(|| diagnosis(config), |because| Diagnosis::skipped(name, because)),
        );
    }
    let skipped = |because: String| Diagnosis::skipped(tls::EXAMINATION, because);
    diagnoses.push(told.because(&["grpc"]).map_or_else(|| tls::diagnose(&config.grpc, now), skipped));

    let hints = config.freshness.hints;
    let mut in_database = Err("because the database was not examined".to_owned());
    let hasher = told.because(&["credential"]).is_none().then(|| config.credential.hasher_again().ok()).flatten();
    let peppers = hasher.as_ref().map(Hasher::fingerprints);
    let usage = Use { peppers, poll_timeout: config.freshness.poll_timeout, hints };
    let database = Box::pin(async {
        let Examined { diagnoses, redis_mac_key } = examine_database(&config.store, usage, env, &SystemClock).await;
        in_database = redis_mac_key;
        diagnoses
    });
    diagnoses.extend(told.unless_mistaken(&["store", "freshness"], DATABASE, database).await);
    let redis_names = [REDIS, &[MAC_KEY]].concat();
    let redis = async {
        let mut diagnoses = examine_redis(&config.redis, hints, &SystemClock).await;
        diagnoses.push(mac_key(config, in_database));
        diagnoses
    };
    diagnoses.extend(told.unless_mistaken(&["redis", "freshness"], &redis_names, redis).await);
    complete(&names(), diagnoses, "")
}

fn configuration(config_errors: &[ConfigError]) -> Diagnosis {
    match config_errors {
        [] => Diagnosis::ok(CONFIGURATION, "no mistakes"),
        some => {
            let told: Vec<_> = some.iter().map(ToString::to_string).collect();
            let remedy = "correct the configuration: `serve` does not start with it";
            Diagnosis::failed(CONFIGURATION, told.join("; "), remedy)
        }
    }
}

/// How the deadlines nest. What does not nest at all is a mistake of the configuration.
fn deadlines(config: &Config) -> Diagnosis {
    let (read, redis) = (config.store.read_timeout, config.redis.timeout);
    let (deadline, envoy) = (config.decision.deadline, config.decision.envoy_timeout);
    let (margin, rest) = (envoy.saturating_sub(deadline), deadline.saturating_sub(read + redis));
    let found = format!(
        "Redis {redis:?} and a read {read:?} leave {rest:?} of a check's {deadline:?}; that leaves {margin:?} of \
         Envoy's {envoy:?}"
    );
    if margin < MARGIN {
        let remedy = format!(
            "leave {MARGIN:?} or more between decision.deadline and decision.envoy_timeout (and Envoy's own): an \
             answer that comes when Envoy has stopped waiting is an error there"
        );
        Diagnosis::warning(DEADLINES, found, remedy).about(&["decision.deadline", "decision.envoy_timeout"])
    } else {
        Diagnosis::ok(DEADLINES, found)
    }
}

/// Envoy's side, which only the operator can see.
fn envoy(config: &Config) -> Diagnosis {
    let timeout = config.decision.envoy_timeout;
    let found = format!(
        "Envoy cannot be asked: its grpc_service.timeout must not be shorter than {}, as decision.envoy_timeout is {timeout:?}",
        in_envoy(timeout)
    );
    Diagnosis::skipped(ENVOY, found).about(&["decision.envoy_timeout"])
}

/// A duration as Envoy's configuration writes it.
fn in_envoy(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}

fn pepper(config: &Config) -> Diagnosis {
    let settings = &config.credential;
    match settings.hasher() {
        Err(error) => {
            let remedy = "let this user read the file: without the pepper every key is unknown";
            Diagnosis::failed(PEPPER, error.to_string(), remedy)
                .about(&["credential.pepper_file", "credential.previous_pepper_files"])
        }
        Ok(_) if settings.pepper.is_none() && settings.pepper_file.is_none() => {
            Diagnosis::ok(PEPPER, "none is set: digests are plain SHA-256")
        }
        Ok(_) => {
            Diagnosis::ok(PEPPER, format!("one is set, and {} earlier ones", settings.previous_pepper_files.len()))
        }
    }
}

fn deny_file(config: &Config) -> Diagnosis {
    const SETTING: &[&str] = &["freshness.deny_file"];
    let Some(file) = &config.freshness.deny_file else {
        return Diagnosis::skipped(DENY_FILE, "freshness.deny_file is not set");
    };
    match deny_list::check_file(file) {
        Ok(()) => Diagnosis::ok(DENY_FILE, format!("{} can be read to its end", file.display())),
        Err(error) => {
            let remedy = "correct the file: `serve` does not heed what it cannot read";
            Diagnosis::failed(DENY_FILE, format!("{}: {error}", file.display()), remedy).about(SETTING)
        }
    }
}

/// Where the key comes from that authenticates what is in Redis.
fn mac_key(config: &Config, in_database: Result<(), String>) -> Diagnosis {
    const SETTING: &[&str] = &["redis.mac_key_file"];
    if !config.redis.is_configured() {
        return Diagnosis::skipped(MAC_KEY, "redis.url is not set: Redis is not used");
    }
    let remedy = "Redis holds nothing for replicas without it: make the database answer, or set redis.mac_key_file to \
                  a file with 32 bytes or 64 hexadecimal digits, the same for every replica";
    match &config.redis.mac_key_file {
        Some(file) => match read_mac_key(file) {
            Ok(_) => Diagnosis::ok(MAC_KEY, format!("in {}", file.display())),
            Err(error) => Diagnosis::failed(MAC_KEY, format!("{}: {error}", file.display()), remedy).about(SETTING),
        },
        None => match in_database {
            Ok(()) => Diagnosis::ok(MAC_KEY, "in the database"),
            Err(problem) => {
                Diagnosis::failed(MAC_KEY, format!("it cannot be had from the database: {problem}"), remedy)
                    .about(SETTING)
            }
        },
    }
}

fn answer(diagnoses: &[Diagnosis], config: &Config, envoy_is_known: bool) -> Answer {
    let mut answer = Answer::list(diagnoses.iter().map(|diagnosis| data(diagnosis, config)).collect(), COLUMNS);
    for diagnosis in diagnoses {
        if let Some(remedy) = &diagnosis.remedy {
            answer = answer.note(&advice(diagnosis, remedy, config));
        }
    }
    if envoy_is_known {
        let timeout = config.decision.envoy_timeout;
        answer = answer.note(&format!(
            "The second must not be shorter than the first:\n  decision.envoy_timeout  {timeout:?}, {}\n  grpc_service.timeout    {}, in the \
             ext_authz filter of Envoy",
            origin(config, "decision.envoy_timeout")
                .map_or_else(|| "the default".to_owned(), |at| format!("set in {at}")),
            in_envoy(timeout),
        ));
    }
    if diagnoses.iter().any(|diagnosis| diagnosis.state == State::Failed) { answer.exit(FAILED) } else { answer }
}

/// What to do, and where the settings that led there were set.
fn advice(diagnosis: &Diagnosis, remedy: &str, config: &Config) -> String {
    let mut text = format!("{} ({}): {}", diagnosis.name, diagnosis.state.as_str(), remedy.replace('\n', "\n    "));
    for (setting, origin) in settings(diagnosis, config) {
        // Writing to a text does not fail.
        let _ = match origin {
            Some(origin) => write!(text, "\n  {setting} is set in {origin}"),
            None => write!(text, "\n  {setting} is not set"),
        };
    }
    text
}

fn data(diagnosis: &Diagnosis, config: &Config) -> Value {
    let Diagnosis { name, state, found, remedy, .. } = diagnosis;
    let settings = settings(diagnosis, config).into_iter();
    let settings: Vec<_> = settings.map(|(setting, origin)| json!({ "setting": setting, "origin": origin })).collect();
    json!({ "name": name, "state": state.as_str(), "found": found, "remedy": remedy, "settings": settings })
}

/// The settings of `diagnosis` that somebody set; the first of them, where nobody set any.
fn settings<'c>(diagnosis: &Diagnosis, config: &'c Config) -> Vec<(&'static str, Option<&'c str>)> {
    let all: Vec<_> = diagnosis.settings.iter().map(|setting| (*setting, origin(config, setting))).collect();
    let set: Vec<_> = all.iter().copied().filter(|(_, origin)| origin.is_some()).collect();
    if set.is_empty() { all.into_iter().take(1).collect() } else { set }
}

fn origin<'c>(config: &'c Config, setting: &str) -> Option<&'c str> {
    let (section, name) = setting.split_once('.')?;
    config.origin(section, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_keeps_from_examining_its_section_alone_and_one_that_may_be_anywhere_everything() {
        let config_error =
            |setting: &str| ConfigError { setting: setting.to_owned(), origin: None, problem: "no".to_owned() };
        let told = |setting: &str| Told { config: Config::default(), config_errors: vec![config_error(setting)] };
        assert_eq!(told("redis.url").because(&["store", "freshness"]), None);
        assert!(told("store.urls").because(&["store"]).is_some_and(|because| because.contains("store.urls")));
        for anywhere in ["", "stroe", "not TOML"] {
            assert!(told(anywhere).because(&["grpc"]).is_some(), "{anywhere:?}");
        }
    }

    #[test]
    fn deadlines_need_room_for_the_network() {
        let mut config = Config::default();
        assert_eq!(deadlines(&config).state, State::Ok);
        config.decision.envoy_timeout = config.decision.deadline + Duration::from_millis(19);
        assert_eq!(deadlines(&config).state, State::Warning);
        assert_eq!(in_envoy(Duration::from_millis(250)), "0.25s");
    }
}
