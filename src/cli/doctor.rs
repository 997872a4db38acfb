//! Implements `trustgate doctor`: examines everything that `serve` needs, and lists the diagnoses in a fixed order.
//!
//! The command changes nothing. It terminates even if a server hangs: each examination has timeouts, and name lookups
//! that time out are abandoned.

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use super::{answer::Answer, error::CliError, exit::FAILED};
use crate::{
    base::{
        clock::{Clock as _, SystemClock, wall_time},
        settings::ConfigError,
    },
    config::{Config, LoadError, SECTIONS},
    doctor::{
        database::{NAMES as DATABASE, diagnose as examine_database},
        diagnosis::{Diagnosis, DiagnosisState, complete},
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

/// The minimum difference between Envoy's timeout and the deadline of a check. It leaves time for the network round
/// trip and for Envoy itself.
const MARGIN: Duration = Duration::from_millis(20);

pub(crate) fn run(loaded: Result<(Config, Vec<ConfigError>), LoadError>, env: Env<'_>) -> Result<Answer, CliError> {
    tls::install_provider();
    let (loaded, unreadable) = match loaded {
        Ok((config, config_errors)) => (LoadedConfig { config, config_errors }, None),
        Err(error) => (LoadedConfig { config: Config::default(), config_errors: Vec::new() }, Some(error.to_string())),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CliError::new(format!("cannot start the async runtime: {error}")))?;
    let diagnoses = match &unreadable {
        Some(problem) => {
            let remedy = "correct the path, or let this user read the file";
            let diagnosis = Diagnosis::failed(CONFIGURATION, problem.as_str(), remedy);
            complete(&names(), vec![diagnosis], "the configuration file cannot be read")
        }
        None => runtime.block_on(diagnose(&loaded, env)),
    };
    // Do not wait for the runtime's threads: a name lookup that gets no reply blocks its thread.
    runtime.shutdown_background();
    Ok(answer(&diagnoses, &loaded.config, unreadable.is_none() && loaded.skip_reason(&["decision"]).is_none()))
}

/// Returns the names of all examinations, in the order in which the answer lists them.
fn names() -> Vec<&'static str> {
    let own = [CONFIGURATION, DEADLINES, ENVOY, PEPPER, tls::EXAMINATION, DENY_FILE];
    [&own[..], DATABASE, REDIS, &[MAC_KEY]].concat()
}

/// The configuration and its errors.
struct LoadedConfig {
    config: Config,
    config_errors: Vec<ConfigError>,
}

impl LoadedConfig {
    /// Returns the reason to skip examinations that depend on `sections`: the first configuration error in one of these
    /// sections. An error outside the known sections may concern any section, so it counts for all of them.
    fn skip_reason(&self, sections: &[&str]) -> Option<String> {
        let section =
            |config_error: &ConfigError| config_error.setting.split('.').next().unwrap_or_default().to_owned();
        let concerns = |config_error: &&ConfigError| {
            let section = section(config_error);
            sections.contains(&section.as_str()) || !SECTIONS.iter().any(|known| known.name == section)
        };
        let first = self.config_errors.iter().find(concerns);
        first.map(|config_error| format!("because of this configuration error: {config_error}"))
    }

    /// Runs `examination`, or skips the examinations in `names` if `sections` have a configuration error.
    async fn unless_skipped(
        &self,
        sections: &[&str],
        names: &[&'static str],
        examination: impl Future<Output = Vec<Diagnosis>>,
    ) -> Vec<Diagnosis> {
        match self.skip_reason(sections) {
            Some(reason) => complete(names, Vec::new(), &reason),
            None => examination.await,
        }
    }
}

async fn diagnose(loaded: &LoadedConfig, env: Env<'_>) -> Vec<Diagnosis> {
    let config = &loaded.config;
    let mut diagnoses = vec![configuration(&loaded.config_errors)];
    let now = wall_time(&SystemClock, SystemClock.now());
    for (name, sections, diagnosis) in [
        (DEADLINES, &["store", "redis", "decision"][..], deadlines as fn(&Config) -> Diagnosis),
        (ENVOY, &["decision"][..], envoy),
        (PEPPER, &["credential"][..], pepper),
        (DENY_FILE, &["freshness"][..], deny_file),
    ] {
        let skip_reason = loaded.skip_reason(sections);
        diagnoses.push(skip_reason.map_or_else(|| diagnosis(config), |reason| Diagnosis::skipped(name, reason)));
    }
    let skipped = |reason: String| Diagnosis::skipped(tls::EXAMINATION, reason);
    diagnoses.push(loaded.skip_reason(&["grpc"]).map_or_else(|| tls::diagnose(&config.grpc, now), skipped));

    let notifications = config.freshness.notifications;
    let mut in_database = Err("the database was not examined".to_owned());
    let hasher = loaded.skip_reason(&["credential"]).is_none().then(|| config.credential.hasher_again().ok()).flatten();
    let peppers = hasher.as_ref().map(Hasher::fingerprints);
    let usage = Use { peppers, poll_timeout: config.freshness.poll_timeout, notifications };
    let database = Box::pin(async {
        let Examined { diagnoses, redis_mac_key } = examine_database(&config.store, usage, env, &SystemClock).await;
        in_database = redis_mac_key;
        diagnoses
    });
    diagnoses.extend(loaded.unless_skipped(&["store", "freshness"], DATABASE, database).await);
    let redis_names = [REDIS, &[MAC_KEY]].concat();
    let redis = async {
        let mut diagnoses = examine_redis(&config.redis, notifications, &SystemClock).await;
        diagnoses.push(mac_key(config, in_database));
        diagnoses
    };
    diagnoses.extend(loaded.unless_skipped(&["redis", "freshness"], &redis_names, redis).await);
    complete(&names(), diagnoses, "")
}

fn configuration(config_errors: &[ConfigError]) -> Diagnosis {
    match config_errors {
        [] => Diagnosis::ok(CONFIGURATION, "no configuration errors"),
        some => {
            let texts: Vec<_> = some.iter().map(ToString::to_string).collect();
            let remedy = "correct the configuration: `serve` does not start with these errors";
            Diagnosis::failed(CONFIGURATION, texts.join("; "), remedy)
        }
    }
}

/// Warns if `decision.envoy_timeout` exceeds `decision.deadline` by too little. A timeout that does not exceed the
/// deadline is a configuration error.
fn deadlines(config: &Config) -> Diagnosis {
    let (read, redis) = (config.store.read_timeout, config.redis.timeout);
    let (deadline, envoy) = (config.decision.deadline, config.decision.envoy_timeout);
    let (margin, rest) = (envoy.saturating_sub(deadline), deadline.saturating_sub(read + redis));
    let found = format!(
        "a check may take {deadline:?}: {redis:?} for Redis, {read:?} for a database read and {rest:?} for other work; \
         Envoy's timeout ({envoy:?}) is longer by {margin:?}"
    );
    if margin < MARGIN {
        let remedy = format!(
            "make decision.envoy_timeout (and grpc_service.timeout in Envoy) at least {MARGIN:?} longer than \
             decision.deadline: Envoy treats a reply after its timeout as an error"
        );
        Diagnosis::warning(DEADLINES, found, remedy).about(&["decision.deadline", "decision.envoy_timeout"])
    } else {
        Diagnosis::ok(DEADLINES, found)
    }
}

/// Reminds the operator to check the timeout in Envoy's configuration, which `doctor` cannot read.
fn envoy(config: &Config) -> Diagnosis {
    let timeout = config.decision.envoy_timeout;
    let found = format!(
        "Envoy's configuration cannot be read from here; its grpc_service.timeout must be {} or more, because \
         decision.envoy_timeout is {timeout:?}",
        in_envoy(timeout)
    );
    Diagnosis::skipped(ENVOY, found).about(&["decision.envoy_timeout"])
}

/// Formats a duration for Envoy's configuration: `0.25s`.
fn in_envoy(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}

fn pepper(config: &Config) -> Diagnosis {
    let settings = &config.credential;
    match settings.hasher() {
        Err(error) => {
            let remedy = "correct the file, or let this user read it: `serve` does not start without the pepper";
            Diagnosis::failed(PEPPER, error.to_string(), remedy)
                .about(&["credential.pepper_file", "credential.previous_pepper_files"])
        }
        Ok(_) if settings.pepper.is_none() && settings.pepper_file.is_none() => {
            Diagnosis::ok(PEPPER, "no pepper is set: digests are plain SHA-256")
        }
        Ok(_) => {
            let previous = settings.previous_pepper_files.len();
            Diagnosis::ok(PEPPER, format!("a pepper and {previous} previous peppers are set"))
        }
    }
}

fn deny_file(config: &Config) -> Diagnosis {
    const SETTING: &[&str] = &["freshness.deny_file"];
    let Some(file) = &config.freshness.deny_file else {
        return Diagnosis::skipped(DENY_FILE, "freshness.deny_file is not set");
    };
    match deny_list::check_file(file) {
        Ok(()) => Diagnosis::ok(DENY_FILE, format!("every line of {} is valid", file.display())),
        Err(error) => {
            let remedy = "correct the file: `serve` ignores invalid lines";
            Diagnosis::failed(DENY_FILE, format!("{}: {error}", file.display()), remedy).about(SETTING)
        }
    }
}

/// Diagnoses whether the MAC key for Redis values can be read, and from which source.
fn mac_key(config: &Config, in_database: Result<(), String>) -> Diagnosis {
    const SETTING: &[&str] = &["redis.mac_key_file"];
    if !config.redis.is_configured() {
        return Diagnosis::skipped(MAC_KEY, "redis.url is not set: Redis is not used");
    }
    let remedy = "without this key, replicas do not use Redis: make the database reachable, or set redis.mac_key_file \
                  to a file with 32 bytes or 64 hexadecimal digits, the same for every replica";
    match &config.redis.mac_key_file {
        Some(file) => match read_mac_key(file) {
            Ok(_) => Diagnosis::ok(MAC_KEY, format!("read from {}", file.display())),
            Err(error) => Diagnosis::failed(MAC_KEY, format!("{}: {error}", file.display()), remedy).about(SETTING),
        },
        None => match in_database {
            Ok(()) => Diagnosis::ok(MAC_KEY, "read from the database"),
            Err(problem) => {
                let found = format!("cannot read the key from the database: {problem}");
                Diagnosis::failed(MAC_KEY, found, remedy).about(SETTING)
            }
        },
    }
}

fn answer(diagnoses: &[Diagnosis], config: &Config, envoy_timeout_is_valid: bool) -> Answer {
    let mut answer = Answer::list(diagnoses.iter().map(|diagnosis| data(diagnosis, config)).collect(), COLUMNS);
    for diagnosis in diagnoses {
        if let Some(remedy) = &diagnosis.remedy {
            answer = answer.note(&advice(diagnosis, remedy, config));
        }
    }
    if envoy_timeout_is_valid {
        let timeout = config.decision.envoy_timeout;
        answer = answer.note(&format!(
            "Envoy's timeout must not be shorter than decision.envoy_timeout:\n  decision.envoy_timeout  {timeout:?}, \
             {}\n  grpc_service.timeout    {} or more, in Envoy's ext_authz filter",
            origin(config, "decision.envoy_timeout")
                .map_or_else(|| "the default".to_owned(), |at| format!("set in {at}")),
            in_envoy(timeout),
        ));
    }
    if diagnoses.iter().any(|diagnosis| diagnosis.state == DiagnosisState::Failed) {
        answer.exit(FAILED)
    } else {
        answer
    }
}

/// Formats the remedy of `diagnosis`, and the places where the settings that may have caused the problem are set.
fn advice(diagnosis: &Diagnosis, remedy: &str, config: &Config) -> String {
    let mut text = format!("{} ({}): {}", diagnosis.name, diagnosis.state.as_str(), remedy.replace('\n', "\n    "));
    for (setting, origin) in settings(diagnosis, config) {
        // Writing to a `String` cannot fail.
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

/// Returns the settings of `diagnosis` that are set, with their origins. If none of them is set, returns the first one,
/// without an origin.
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
    fn config_error_skips_dependent_examinations_and_all_examinations_if_its_section_is_unknown() {
        let config_error =
            |setting: &str| ConfigError { setting: setting.to_owned(), origin: None, problem: "no".to_owned() };
        let loaded =
            |setting: &str| LoadedConfig { config: Config::default(), config_errors: vec![config_error(setting)] };
        assert_eq!(loaded("redis.url").skip_reason(&["store", "freshness"]), None);
        assert!(loaded("store.urls").skip_reason(&["store"]).is_some_and(|reason| reason.contains("store.urls")));
        for anywhere in ["", "stroe", "not TOML"] {
            assert!(loaded(anywhere).skip_reason(&["grpc"]).is_some(), "{anywhere:?}");
        }
    }

    #[test]
    fn deadline_close_to_the_envoy_timeout_is_a_warning() {
        let mut config = Config::default();
        assert_eq!(deadlines(&config).state, DiagnosisState::Ok);
        config.decision.envoy_timeout = config.decision.deadline + Duration::from_millis(19);
        assert_eq!(deadlines(&config).state, DiagnosisState::Warning);
        assert_eq!(in_envoy(Duration::from_millis(250)), "0.25s");
    }
}
