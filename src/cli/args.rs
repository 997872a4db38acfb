//! The commands and options, for clap. Their doc comments are the text of `--help`.
//!
//! No argument takes an API key, because other users of the machine can read the command line. Keys come from standard
//! input.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{NonEmptyStringValueParser, TypedValueParser},
};
use clap_complete::Shell;
use ipnet::IpNet;
use uuid::Uuid;

use crate::{
    base::{secret::Secret, units::parse_duration},
    manage::{keys::PepperFilter, trusts::trust_ref},
    record::{ApiKeyDigest, Fingerprint, KeyId, TrustId, canonical},
    store::ledger::TrustRef,
};

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("TRUSTGATE_COMMIT"), ")");

/// External authorization for Envoy: identifies the caller of each request and decides whether it may pass.
///
/// Exit codes: 0 success, 1 failure, 2 usage error. `check` exits with 3 if the key is denied.
#[derive(Parser)]
#[command(name = "trustgate", version = VERSION, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Configuration file. Default: the file named by the variable `TRUSTGATE_CONFIG`, or none.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Output format.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Columns, for people.
    Table,
    /// JSON, for programs.
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the server that answers Envoy's checks.
    ///
    /// Creates and upgrades an embedded SQLite database; a PostgreSQL database needs `migrate` first. Stops on SIGTERM,
    /// SIGQUIT or SIGINT.
    Serve,
    /// Test on running replicas that revocations take effect in time (`[canary]`).
    ///
    /// Repeatedly issues a key, checks that each replica grants it, revokes it, and checks it until each replica denies
    /// it. Run it with the configuration of the replicas and with a database role that may change keys. Exposes its
    /// results as metrics. Stops on SIGTERM, SIGQUIT or SIGINT.
    Canary,
    /// Create, upgrade or repair the tables in the database.
    ///
    /// It is safe to run this again.
    Migrate {
        /// Print the statements that grant the PostgreSQL roles the rights they need, and change nothing.
        #[arg(long)]
        print_grants: bool,
        /// Also start a new database history. Use this once, after restoring a backup or a copy of the database, so
        /// that replicas do not use values cached from the earlier history.
        #[arg(long, conflicts_with = "print_grants")]
        new_incarnation: bool,
        /// Role of `serve` in the printed statements.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_serve", requires = "print_grants")]
        serve_role: String,
        /// Role of the management commands (`trust`, `key`, `cache`) in the printed statements.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_manage", requires = "print_grants")]
        manage_role: String,
    },
    /// Record the changes to an existing table (`store.table`), so that replicas can cache its rows under the lease.
    ///
    /// Adds two triggers to the table, and changes nothing else in it. Run `migrate` first. Afterwards, set
    /// `store.attached = true` and restart every replica.
    Attach(Alter),
    /// Remove the triggers that `attach` added.
    Detach(Alter),
    /// Manage trusts, the tenant organisations that keys belong to.
    #[command(subcommand)]
    Trust(Trust),
    /// Manage API keys.
    #[command(subcommand)]
    Key(Key),
    /// Manage the pepper, the secret that keys are hashed with.
    #[command(subcommand)]
    Pepper(Pepper),
    /// Manage the deny list, which denies keys whatever the database says, even while the database is down.
    #[command(subcommand)]
    Deny(Deny),
    /// Manage the caches of the replicas.
    #[command(subcommand)]
    Cache(Cache),
    /// Copy a whole database.
    #[command(subcommand)]
    Store(Store),
    /// Check the configuration, or print the default one.
    #[command(subcommand)]
    Config(Config),
    /// Read a key from standard input and print the decision and its reason.
    ///
    /// Reads the database, not a cache. Exit code 3: the key is denied.
    Check,
    /// Examine everything that `serve` needs: configuration, deadlines, files, database, rights and Redis.
    ///
    /// Run it on the machine that runs `serve`, as the same user and with the same configuration. Prints the result of
    /// each examination and a remedy for each problem. Changes nothing. Exit code 1: something that `serve` needs does
    /// not work.
    Doctor,
    /// Print a completion script for a shell.
    Completions {
        /// Shell that the script is for.
        shell: Shell,
    },
}

#[derive(Args)]
pub(crate) struct Alter {
    /// Print the statements, each under the role that has to run it, and change nothing.
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Subcommand)]
pub(crate) enum Trust {
    /// Create a trust.
    Create {
        /// Name of the trust.
        name: String,
    },
    /// List all trusts.
    List,
    /// Show one trust.
    Show(WhichTrust),
    /// Enable a trust, so that its keys are granted again.
    Enable(WhichTrust),
    /// Disable a trust: all its keys are denied until it is enabled again.
    ///
    /// Prints how many replicas have applied the change.
    Disable(WhichTrust),
    /// Delete a trust. Fails if the trust still has keys, unless you also delete the keys.
    ///
    /// Prints how many replicas have applied the change.
    Delete {
        #[command(flatten)]
        which: WhichTrust,
        /// Also delete the keys of the trust.
        #[arg(long)]
        with_keys: bool,
    },
}

#[derive(Args)]
pub(crate) struct WhichTrust {
    /// Name or id of the trust.
    #[arg(value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
}

#[derive(Subcommand)]
pub(crate) enum Key {
    /// Create a key and print it. The key cannot be shown again.
    Issue(Issue),
    /// List keys, newest first.
    List {
        /// List only the keys of this trust.
        #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
        trust: Option<TrustRef>,
        /// List only the keys issued under this pepper: `current` or `previous` (in this configuration), `unknown` (not
        /// in this configuration), `unrecorded` (no check has identified it yet), or a fingerprint of 16 hexadecimal
        /// digits.
        #[arg(long, value_name = "PEPPER", value_parser = to_pepper)]
        pepper: Option<PepperFilter>,
    },
    /// Show one key.
    Show(WhichKey),
    /// Revoke a key permanently.
    ///
    /// Prints how many replicas have applied the revocation. Revoking a key again changes nothing.
    Revoke(WhichKey),
    /// Find the keys in a text from standard input, and print which trust each belongs to.
    ///
    /// The text can be a single key or a longer text, such as a log, of up to 1 MiB. Exit code 1: the text contains no
    /// key from this database.
    Identify,
    /// Import existing keys, one per line.
    ///
    /// Imports nothing if any line is invalid. Skips blank lines and lines that begin with `#`.
    Import(Import),
}

#[derive(Subcommand)]
pub(crate) enum Pepper {
    /// Record the configured pepper as the one for new keys.
    ///
    /// First give every server the new pepper, with the old one in `credential.previous_pepper_files`.
    Use,
}

#[derive(Args)]
pub(crate) struct WhichKey {
    /// Id of the key, as shown by `trustgate key list`.
    #[arg(value_name = "KEY_ID", value_parser = to_key)]
    pub(crate) id: KeyId,
}

#[derive(Args)]
pub(crate) struct Issue {
    /// Trust that the key belongs to.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// Name of the key: what it is for.
    #[arg(long, value_name = "TEXT")]
    pub(crate) name: Option<String>,
    /// How long the key is valid, such as 90d or 12h. Default: until it is revoked.
    #[arg(long, value_name = "DURATION", value_parser = to_duration)]
    pub(crate) expires_in: Option<Duration>,
    /// Scope of the key: what it may be used for. Can be given several times.
    #[arg(long = "scope", value_name = "SCOPE")]
    pub(crate) scopes: Vec<String>,
    /// Network that the key may be used from, such as 192.0.2.0/24. Can be given several times. Default: any network.
    #[arg(long = "allow-cidr", value_name = "CIDR", value_parser = to_network)]
    pub(crate) allowed_cidrs: Vec<IpNet>,
}

#[derive(Args)]
pub(crate) struct Import {
    /// Trust that the keys belong to.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// The lines are keys instead of SHA-256 digests in hexadecimal. Only the digests of the keys are stored.
    #[arg(long)]
    pub(crate) plaintext: bool,
    /// File to read; - is standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Deny {
    /// Deny a key, or every key of a trust, for a limited time.
    ///
    /// Needs Redis. Needs the database only if `redis.mac_key_file` is not set.
    Add {
        #[command(flatten)]
        which: WhichDenied,
        /// How long to deny it, such as 12h or 90d.
        #[arg(long = "for", value_name = "DURATION", value_parser = to_duration)]
        life: Duration,
    },
    /// List the entries that `deny add` made.
    ///
    /// Does not list the entries in the file of `freshness.deny_file`.
    List,
    /// Remove entries that `deny add` made.
    Remove {
        #[command(flatten)]
        which: WhichDenied,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct WhichDenied {
    /// Key with this id.
    #[arg(long, value_name = "KEY_ID", value_parser = to_key)]
    pub(crate) key: Option<KeyId>,
    /// Every key of the trust with this id. A name is not accepted, because only the database could resolve it.
    #[arg(long, value_name = "TRUST_ID", value_parser = to_trust_id)]
    pub(crate) trust: Option<TrustId>,
    /// Key with this digest of 64 hexadecimal digits.
    #[arg(long, value_name = "DIGEST", value_parser = to_digest)]
    pub(crate) digest: Option<ApiKeyDigest>,
    /// Key read from standard input.
    #[arg(long)]
    pub(crate) stdin: bool,
}

#[derive(Subcommand)]
pub(crate) enum Cache {
    /// Clear the caches of all replicas.
    ///
    /// Waits up to `freshness.lease` until every replica has cleared its caches, and lists the replicas that have not.
    /// Exit code 1: at least one replica has not.
    Clear,
}

#[derive(Subcommand)]
pub(crate) enum Store {
    /// Copy every trust and key from one database into an empty one.
    ///
    /// Run `migrate` on the target first. The keys keep working under the same peppers. The audit log and the change
    /// log are not copied.
    Copy(Copy),
}

#[derive(Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Copy {
    /// URL of the database to copy from, in the format of `store.url`. Default: the configured database. Other users of
    /// this machine can read the command line, so put a password into the variable PGPASSWORD, a `.pgpass` file or the
    /// configuration.
    #[arg(long, value_name = "URL", value_parser = to_secret())]
    pub(crate) from: Option<Secret>,
    /// URL of the database to copy to, in the format of `store.url`. Default: the configured database.
    #[arg(long, value_name = "URL", value_parser = to_secret())]
    pub(crate) to: Option<Secret>,
}

#[derive(Subcommand)]
pub(crate) enum Config {
    /// Validate the configuration and list every error.
    ///
    /// Exit code 1: there are errors.
    Check,
    /// Print a configuration file with every setting, its meaning and its default.
    Default,
}

fn to_trust() -> impl TypedValueParser<Value = TrustRef> {
    NonEmptyStringValueParser::new().map(|text| trust_ref(&text))
}

fn to_secret() -> impl TypedValueParser<Value = Secret> {
    NonEmptyStringValueParser::new().map(Secret::new)
}

fn to_pepper(text: &str) -> Result<PepperFilter, &'static str> {
    Ok(match text {
        "current" => PepperFilter::Current,
        "previous" => PepperFilter::Previous,
        "unknown" => PepperFilter::Unknown,
        "unrecorded" => PepperFilter::Unrecorded,
        _ => PepperFilter::Fingerprint(
            Fingerprint::from_hex(text)
                .ok_or("expected current, previous, unknown, unrecorded, or a fingerprint of 16 hexadecimal digits")?,
        ),
    })
}

// These messages do not repeat the value, because it may be a secret.
fn to_key(text: &str) -> Result<KeyId, String> {
    Uuid::parse_str(text)
        .map(KeyId)
        .map_err(|_| "expected a key's id: a UUID, as shown by `trustgate key list`".to_owned())
}

fn to_trust_id(text: &str) -> Result<TrustId, String> {
    Uuid::parse_str(text)
        .map(TrustId)
        .map_err(|_| "expected a trust's id: a UUID, as shown by `trustgate trust list`".to_owned())
}

fn to_digest(text: &str) -> Result<ApiKeyDigest, String> {
    ApiKeyDigest::from_hex(text).ok_or_else(|| "expected 64 hexadecimal digits".to_owned())
}

fn to_duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration with its unit, such as 90d or 12h".to_owned())
}

fn to_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().ok().or_else(|| text.parse().ok().map(|address: IpAddr| address.into()));
    let network = network.map(canonical);
    network.ok_or_else(|| "expected a network, such as 192.0.2.0/24 or 2001:db8::/32".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_declarations_are_valid_and_every_command_and_argument_has_help() {
        fn explained(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(explained);
        }
        let command = Arguments::command();
        command.clone().debug_assert();
        explained(&command);
    }

    #[test]
    fn an_address_without_a_prefix_length_is_a_network_of_one_address() {
        assert_eq!(to_network("192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert!(to_network("192.0.2.0/33").is_err());
        assert_eq!(to_network("::ffff:10.0.0.0/104").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(to_network("::ffff:192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert_eq!(to_network("::/0").unwrap().to_string(), "::/0");
    }
}
