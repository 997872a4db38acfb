//! The address of the database: the URL, the password, and the default path of the embedded database. A file that
//! contains the URL or the password is read again at each use.
//!
//! Messages show the kind of database, its host or path and its name. They contain no user, no password and no URL
//! parameters.

use std::path::{Path, PathBuf};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};

use super::{error::StoreError, settings::StoreSettings};
use crate::base::secret::Secret;

/// Looks up an environment variable.
pub type Env<'a> = &'a (dyn Fn(&str) -> Option<String> + Sync);

/// The kind of database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// An SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL server.
    Postgres,
}

/// The purpose of a connection, which selects the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Reads by `serve`: `store.url`.
    Serve,
    /// Changes by management commands: `store.management_url`, or `store.url` if that is not set.
    Manage,
}

/// The database URL and password, or the files that contain them.
#[derive(Clone, Debug)]
pub(crate) struct StoreUrl {
    url: Option<Secret>,
    url_file: Option<PathBuf>,
    password: Option<Secret>,
    password_file: Option<PathBuf>,
    /// The names of the settings for the URL and for its file, for messages.
    names: (&'static str, &'static str),
}

impl StoreUrl {
    /// Returns the URL and password for `role`.
    pub(crate) fn of(settings: &StoreSettings, role: Role) -> Self {
        let StoreSettings { url, url_file, management_url, management_url_file, password, password_file, .. } =
            settings.clone();
        let own = role == Role::Manage && (management_url.is_some() || management_url_file.is_some());
        let (url, url_file, names) = if own {
            (management_url, management_url_file, ("store.management_url", "store.management_url_file"))
        } else {
            (url, url_file, ("store.url", "store.url_file"))
        };
        Self { url, url_file, password, password_file, names }
    }

    /// Creates the address for a URL that was given in the command's option `name`.
    pub(crate) const fn given(name: &'static str, url: Secret) -> Self {
        Self { url: Some(url), url_file: None, password: None, password_file: None, names: (name, name) }
    }

    /// Returns the kind of database that the URL selects.
    pub(crate) fn backend(&self, env: Env<'_>) -> Result<Backend, StoreError> {
        let Some(url) = self.url()? else { return Ok(Backend::Sqlite(default_path(env)?)) };
        match url.expose().split_once(':') {
            Some(("sqlite", rest)) => sqlite_path(rest).map(Backend::Sqlite).ok_or_else(|| {
                self.refuse(
                    "an SQLite URL is sqlite:// and an absolute path, such as \
                     sqlite:///var/lib/trustgate/trustgate.db, without parameters",
                )
            }),
            Some(("postgres" | "postgresql", _)) => Ok(Backend::Postgres),
            _ => Err(self.refuse("expected a URL that begins with sqlite://, postgres:// or postgresql://")),
        }
    }

    /// Returns the options for a connection to PostgreSQL. Reads the files that contain the URL and the password again.
    pub(crate) fn postgres(&self) -> Result<PgConnectOptions, StoreError> {
        let url =
            self.url()?.ok_or_else(|| self.refuse("no URL is set: expected postgres://user@host:5432/database"))?;
        let url = url.expose();
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(self.refuse("expected a URL that begins with postgres:// or postgresql://"));
        }
        if let Some(parameter) = unknown_parameter(url) {
            let problem = format!("unknown parameter {parameter:?}: expected one of {}", PARAMETERS.join(", "));
            return Err(self.refuse(&problem));
        }
        // The parser's error may contain a part of the URL, so it is not shown.
        let mut options: PgConnectOptions =
            url.parse().map_err(|_| self.refuse("malformed URL: expected postgres://user@host:5432/database"))?;
        // A URL has brackets around an IPv6 address (RFC 3986, section 3.2.2), which the parser does not remove.
        if let Some(host) = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            let host = host.to_owned();
            options = options.host(&host);
        }
        if !holds_password(url)
            && let Some(password) = self.password()?
        {
            options = options.password(password.expose());
        }
        if options.get_application_name().is_none() {
            options = options.application_name("trustgate");
        }
        // Do not send `extra_float_digits`: a pooler would refuse it, and no statement here reads floating-point
        // numbers. Do not log statements at any level: they contain digests.
        Ok(options.extra_float_digits(None).disable_statement_logging())
    }

    /// Checks that the URL can be parsed, then describes the database for messages.
    pub(crate) fn checked(&self, env: Env<'_>) -> Result<String, StoreError> {
        if self.backend(env)? == Backend::Postgres {
            self.postgres()?;
        }
        Ok(self.describe(env))
    }

    /// Describes the database, for messages.
    pub(crate) fn describe(&self, env: Env<'_>) -> String {
        match self.backend(env) {
            Ok(Backend::Sqlite(path)) => describe_sqlite(&path),
            Ok(Backend::Postgres) => self.describe_postgres(),
            Err(problem) => problem.to_string(),
        }
    }

    /// Describes the PostgreSQL database, for messages.
    pub(crate) fn describe_postgres(&self) -> String {
        let options = match self.postgres() {
            Ok(options) => options,
            Err(problem) => return problem.to_string(),
        };
        let host = match options.get_socket() {
            Some(socket) => socket.display().to_string(),
            None => format!("{}:{}", options.get_host(), options.get_port()),
        };
        match options.get_database() {
            Some(database) => format!("the PostgreSQL database {database:?} at {host}"),
            None => format!("the PostgreSQL server at {host}"),
        }
    }

    fn url(&self) -> Result<Option<Secret>, StoreError> {
        if self.url.is_some() && self.url_file.is_some() {
            return Err(self.refuse(&format!("set it or {}, not both", self.names.1)));
        }
        secret(self.url.as_ref(), self.url_file.as_deref(), self.names.1)
    }

    fn password(&self) -> Result<Option<Secret>, StoreError> {
        if self.password.is_some() && self.password_file.is_some() {
            return Err(StoreError::Unusable("set store.password or store.password_file, not both".into()));
        }
        secret(self.password.as_ref(), self.password_file.as_deref(), "store.password_file")
    }

    fn refuse(&self, problem: &str) -> StoreError {
        let (value, file) = self.names;
        let name = if self.url_file.is_some() && self.url.is_none() { file } else { value };
        StoreError::Unusable(format!("{name}: {problem}"))
    }
}

/// Describes the SQLite database at `path`, for messages.
pub(crate) fn describe_sqlite(path: &Path) -> String {
    format!("the SQLite database at {}", path.display())
}

/// Returns the default path of the embedded database: `$STATE_DIRECTORY/trustgate.db` (systemd sets this variable),
/// else `$XDG_STATE_HOME/trustgate/trustgate.db`, else `~/.local/state/trustgate/trustgate.db`.
///
/// # Errors
/// [`StoreError::Unusable`] if the environment sets none of these variables to an absolute path.
fn default_path(env: Env<'_>) -> Result<PathBuf, StoreError> {
    // A relative path would depend on where the command was started; the XDG Base Directory Specification says to
    // ignore it.
    let directory = |name: &str, pick: fn(&str) -> &str| {
        env(name).map(|value| PathBuf::from(pick(&value))).filter(|path| path.is_absolute())
    };
    let path = directory("STATE_DIRECTORY", |list| list.split(':').next().unwrap_or(list))
        .or_else(|| directory("XDG_STATE_HOME", |path| path).map(|home| home.join("trustgate")))
        .or_else(|| directory("HOME", |path| path).map(|home| home.join(".local/state/trustgate")));
    path.map(|directory| directory.join("trustgate.db")).ok_or_else(|| {
        StoreError::Unusable(
            "no path for the embedded database: set `store.url`, or one of STATE_DIRECTORY, XDG_STATE_HOME and HOME"
                .into(),
        )
    })
}

/// The parameters that may follow the `?` in a PostgreSQL URL. The parser would silently ignore any other parameter,
/// such as a misspelt `sslmode`.
const PARAMETERS: &[&str] = &[
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

fn secret(value: Option<&Secret>, file: Option<&Path>, name: &str) -> Result<Option<Secret>, StoreError> {
    let Some(file) = file else { return Ok(value.cloned()) };
    Secret::read(file)
        .map(Some)
        .map_err(|error| StoreError::Unusable(format!("{name}: cannot read {}: {error}", file.display())))
}

/// Returns the path in `rest`, the part of an SQLite URL after `sqlite:`. Does not decode percent-encoded characters.
fn sqlite_path(rest: &str) -> Option<PathBuf> {
    let path = rest.strip_prefix("//")?;
    (path.starts_with('/') && path.len() > 1 && !path.contains('?')).then(|| PathBuf::from(path))
}

fn parameters(url: &str) -> impl Iterator<Item = &str> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    query
        .split('#')
        .next()
        .unwrap_or("")
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name))
}

fn unknown_parameter(url: &str) -> Option<&str> {
    parameters(url).find(|name| !PARAMETERS.contains(name) && !name.starts_with("options["))
}

fn holds_password(url: &str) -> bool {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or("");
    let in_authority = authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'));
    in_authority || parameters(url).any(|name| name == "password")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(url: &str) -> StoreUrl {
        StoreUrl::of(&StoreSettings { url: Some(Secret::new(url.into())), ..StoreSettings::default() }, Role::Serve)
    }

    #[test]
    fn the_default_path_follows_systemd_then_xdg_then_home() {
        let path = |vars: &[(&str, &str)]| {
            default_path(&|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
                .ok()
                .map(|path| path.display().to_string())
        };
        let (state, xdg, home) = (("STATE_DIRECTORY", "/s:/t"), ("XDG_STATE_HOME", "/x"), ("HOME", "/h"));
        assert_eq!(path(&[home, xdg, state]).as_deref(), Some("/s/trustgate.db"));
        assert_eq!(path(&[home, xdg]).as_deref(), Some("/x/trustgate/trustgate.db"));
        assert_eq!(path(&[home]).as_deref(), Some("/h/.local/state/trustgate/trustgate.db"));
        assert_eq!(path(&[home, ("XDG_STATE_HOME", "")]).as_deref(), Some("/h/.local/state/trustgate/trustgate.db"));
        assert_eq!(path(&[("HOME", "relative")]), None);
        assert_eq!(path(&[]), None);
    }

    #[test]
    fn each_scheme_selects_its_database_and_other_schemes_are_refused() {
        let place = |url: &str| address(url).backend(&|_| None).map_err(|error| error.to_string());
        assert_eq!(place("sqlite:///a/b.db"), Ok(Backend::Sqlite("/a/b.db".into())));
        assert_eq!(place("postgres://u@h/d"), Ok(Backend::Postgres));
        assert_eq!(place("postgresql://u@h/d"), Ok(Backend::Postgres));
        for bad in
            ["mysql://root:hunter2@h/d", "hunter2", "sqlite://relative.db", "sqlite::memory:", "sqlite:///a?mode=rwc"]
        {
            let problem = place(bad).unwrap_err();
            assert!(problem.starts_with("store.url: ") && problem.contains("sqlite://"), "{problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn a_separate_password_is_used_only_if_the_url_contains_none() {
        for (url, holds) in [
            ("postgres://u@h/d", false),
            ("postgres://u:p@h/d", true),
            ("postgres://u@h:5432/d?sslmode=require", false),
            ("postgres://u@h/d?password=p", true),
            ("postgres://h/d?application_name=a:b@c", false),
        ] {
            assert_eq!(holds_password(url), holds, "{url}");
        }
    }

    #[test]
    fn an_ipv6_address_loses_its_brackets() {
        for url in
            ["postgres://u@[::1]:5433/d", "postgres://u:p@[2001:db8::1]/d?sslmode=require", "postgresql://[fe80::1]/d"]
        {
            let host = address(url).postgres().unwrap().get_host().to_owned();
            assert!(host.parse::<std::net::Ipv6Addr>().is_ok(), "{url}: {host}");
        }
    }

    #[test]
    fn descriptions_and_errors_contain_no_secret() {
        let described = address("postgres://someone:hunter2@db.example:5433/keys?sslmode=require").describe(&|_| None);
        assert_eq!(described, "the PostgreSQL database \"keys\" at db.example:5433");
        for bad in [
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hunter2@h/d?sslmoode=require",
            "postgres://u:hunter2@h/d?sslmode=hunter2",
        ] {
            let problem = address(bad).postgres().unwrap_err().to_string();
            assert!(problem.starts_with("store.url: ") && !problem.contains("hunter2"), "{problem}");
        }
    }
}
