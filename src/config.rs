//! The configuration: one TOML file, overridden by environment variables, and checked as a whole.
//!
//! Callers pass the environment variables as an argument. Errors do not quote values that may be secrets.

mod check;
pub(crate) mod document;
mod environment;
mod file;
pub(crate) mod suggest;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, io,
    path::{Path, PathBuf},
};

use crate::{
    api::ApiSettings,
    base::{
        settings::{ConfigError, Field, Origin, Reader, Section},
        telemetry::LogSettings,
    },
    cache::CacheSettings,
    canary::settings::CanarySettings,
    ext_authz::{check::DecisionSettings, credential::CredentialSettings},
    freshness::FreshnessSettings,
    grpc::{GrpcSettings, LimitsSettings},
    redis::RedisSettings,
    server::admin::AdminSettings,
    store::StoreSettings,
};

/// The environment variable that contains the path of the configuration file. `--config` takes precedence.
pub(crate) const FILE_VARIABLE: &str = "TRUSTGATE_CONFIG";

/// Declares `Config` and `SECTIONS`. To add a section, add a line to the `sections!` call below.
macro_rules! sections {
    ($($name:ident: $Section:ty,)+) => {
        /// The values of all settings: configured values or defaults.
        #[derive(Clone, Debug, Default)]
        pub struct Config {
            $( #[doc = concat!("`[", stringify!($name), "]`")] pub $name: $Section, )+
            origins: BTreeMap<String, Origin>,
        }

        /// All sections, in the order in which the documentation lists them.
        pub const SECTIONS: &[SectionInfo] = &[
            $( SectionInfo { name: <$Section>::NAME, doc: <$Section>::DOC, fields: <$Section>::FIELDS }, )+
        ];

        fn read(reader: &mut Reader) -> Config {
            Config { $( $name: <$Section>::read(reader), )+ origins: BTreeMap::new() }
        }
    };
}

sections! {
    grpc: GrpcSettings,
    admin: AdminSettings,
    api: ApiSettings,
    store: StoreSettings,
    redis: RedisSettings,
    credential: CredentialSettings,
    decision: DecisionSettings,
    cache: CacheSettings,
    freshness: FreshnessSettings,
    limits: LimitsSettings,
    canary: CanarySettings,
    log: LogSettings,
}

/// The documentation of a section.
#[derive(Clone, Copy, Debug)]
pub struct SectionInfo {
    /// The name of the section: `[name]` in the file.
    pub name: &'static str,
    /// The description of the section.
    pub doc: &'static str,
    /// The settings of the section.
    pub fields: &'static [Field],
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path} (named by {named_by}): {source}")]
    Unreadable {
        /// The path of the file.
        path: PathBuf,
        /// The source of the path: `--config` or `TRUSTGATE_CONFIG`.
        named_by: &'static str,
        /// The error from the operating system.
        source: io::Error,
    },
    /// The configuration has errors. The value contains all of them.
    #[error("{0}")]
    Invalid(ConfigErrors),
}

/// All errors in a configuration. There is at least one error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "the configuration has {count} error{}:", if count == 1 { "" } else { "s" })?;
        for config_error in &self.0 {
            write!(f, "\n  {config_error}")?;
        }
        Ok(())
    }
}

/// The purpose for which the configuration is loaded. The purpose determines which files must be readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Answer checks.
    Serve,
    /// Run the canary.
    Canary,
    /// Change trusts and keys. Redis is not needed.
    Manage,
    /// Change the deny list in Redis. The database is needed only if the MAC key is stored in it.
    Deny,
    /// Find all errors in the configuration.
    Check,
}

impl Config {
    /// Returns the place where `section.name` is set; `None` if it is not set.
    #[must_use]
    pub fn origin(&self, section: &str, name: &str) -> Option<&str> {
        self.origins.get(&format!("{section}.{name}")).map(String::as_str)
    }
}

/// Reads the settings in `file` or, if that is `None`, in the file that `TRUSTGATE_CONFIG` names. The variables in
/// `environment` override the settings in the file. Settings that are not set have their defaults.
///
/// # Errors
/// If the file cannot be read, or if the configuration has errors. The returned error lists all of them.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    purpose: Purpose,
) -> Result<Config, LoadError> {
    let (config, config_errors) = load_with_errors(file, environment, purpose)?;
    if config_errors.is_empty() { Ok(config) } else { Err(LoadError::Invalid(ConfigErrors(config_errors))) }
}

/// Like [`load`], but returns the configuration even if it has errors. A setting with an invalid value gets its
/// default.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn load_with_errors(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    purpose: Purpose,
) -> Result<(Config, Vec<ConfigError>), LoadError> {
    let variables: Vec<_> = environment.into_iter().collect();
    let named = variables.iter().find(|(name, value)| name == FILE_VARIABLE && !value.is_empty());
    let file = file.map(|path| (path, "--config")).or(named.map(|(_, path)| (Path::new(path), FILE_VARIABLE)));

    let mut reader = Reader::default();
    if let Some((path, named_by)) = file {
        let text = std::fs::read_to_string(path).map_err(|source| LoadError::Unreadable {
            path: path.to_owned(),
            named_by,
            source,
        })?;
        file::put(&mut reader, &path.display().to_string(), &text);
    }
    environment::put(&mut reader, &variables);

    let mut config = read(&mut reader);
    check::run(&config, purpose, &mut reader);
    config.origins = origins(&reader);
    Ok((config, reader.into_errors()))
}

fn origins(reader: &Reader) -> BTreeMap<String, Origin> {
    let names = SECTIONS.iter().flat_map(|section| section.fields.iter().map(|field| (section.name, field.name)));
    names
        .filter_map(|(section, name)| Some((format!("{section}.{name}"), reader.origin(section, name)?.clone())))
        .collect()
}

fn section(name: &str) -> Option<&'static SectionInfo> {
    SECTIONS.iter().find(|section| section.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::listener::ListenAddress;

    /// Returns the configuration errors in a file with the content `text` and in the variables in `environment`: one
    /// string per error, as an operator sees the error.
    pub(crate) fn config_errors(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trustgate.toml");
        std::fs::write(&path, text).unwrap();
        let variables = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        match load(Some(&path), variables, Purpose::Check) {
            Ok(_) => Vec::new(),
            Err(LoadError::Invalid(config_errors)) => config_errors
                .to_string()
                .replace(&format!("{}/", dir.path().display()), "")
                .lines()
                .skip(1)
                .map(|line| line.trim().to_owned())
                .collect(),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn defaults_apply_if_nothing_is_set() {
        let config = load(None, [], Purpose::Serve).unwrap();
        assert_eq!(config.grpc.listen, [ListenAddress::Tcp("127.0.0.1:50051".parse().unwrap())]);
        assert!(config.store.url.is_none());
        assert_eq!(config.origin("grpc", "listen"), None);
    }

    #[test]
    fn the_environment_overrides_the_file_and_origins_are_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        std::fs::write(&path, "[grpc]\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\n[cache]\nsize = \"1GiB\"\n")
            .unwrap();
        let set = [("TRUSTGATE__GRPC__LISTEN", "127.0.0.1:3, 127.0.0.1:4"), ("TRUSTGATE_PORT", "tcp://10.0.0.1:1")];
        let config = load(Some(&path), set.map(|(name, value)| (name.into(), value.into())), Purpose::Serve).unwrap();
        let tcp = |address: &str| ListenAddress::Tcp(address.parse().unwrap());
        assert_eq!(config.grpc.listen, [tcp("127.0.0.1:3"), tcp("127.0.0.1:4")]);
        assert_eq!(config.cache.size.to_string(), "1GiB");
        assert_eq!(config.origin("grpc", "listen"), Some("TRUSTGATE__GRPC__LISTEN"));
        assert_eq!(config.origin("cache", "size"), Some(format!("{}:4", path.display()).as_str()));
    }

    #[test]
    fn all_errors_are_reported_at_once_with_their_origins() {
        let text = "[grpc]\nlisten = \"nowhere\"\n\n[chache]\nsize = 1\n[store]\nurls = \"x\"\nread_timeout = 100\n";
        assert_eq!(
            config_errors(text, &[("TRUSTGATE__LIMITS__MESAGE_SIZE", "1MiB"), ("TRUSTGATE__CACHE__SIZE", "lots")]),
            [
                "trustgate.toml:4: chache: there is no such section; did you mean [cache]?",
                "trustgate.toml:7: store.urls: there is no such setting; did you mean store.url?",
                "TRUSTGATE__LIMITS__MESAGE_SIZE: there is no such setting; did you mean \
                 TRUSTGATE__LIMITS__MESSAGE_SIZE?",
                "trustgate.toml:2: grpc.listen: expected an address with its port, such as \"127.0.0.1:50051\", \
                 or \"unix:///run/trustgate/trustgate.sock\"",
                "trustgate.toml:8: store.read_timeout: expected a duration with its unit, such as \"150ms\", \"20s\" \
                 or \"15m\"",
                "TRUSTGATE__CACHE__SIZE: cache.size: expected a size with its unit, such as \"256KiB\" or \"128MiB\"",
            ]
        );
    }

    #[test]
    fn error_for_a_missing_file_names_the_source_of_its_path() {
        let missing = OsString::from("/nowhere/trustgate.toml");
        let error = load(None, [(FILE_VARIABLE.into(), missing)], Purpose::Serve).unwrap_err().to_string();
        assert!(error.contains("/nowhere/trustgate.toml (named by TRUSTGATE_CONFIG)"), "{error}");
    }
}
