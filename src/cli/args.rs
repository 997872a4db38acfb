//! The commands and options of the program, declared for clap. Their doc comments are the text of `--help`.
//!
//! No argument takes an API key, because other users of the machine can read the command line. Commands read keys from
//! standard input.

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

/// External authorization server for Envoy: identifies the caller of each request and decides whether the request may
/// pass.
///
/// Exit codes: 0 success, 1 failure, 2 usage error. The command `check` exits with code 3 if the key is denied.
#[derive(Parser)]
#[command(name = "trustgate", version = VERSION, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Path of the configuration file. Default: the value of the environment variable `TRUSTGATE_CONFIG`, if it is set.
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
    /// Human-readable columns.
    Table,
    /// JSON for programs.
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the server that answers Envoy's checks.
    ///
    /// At startup, the server creates or upgrades the tables of an embedded SQLite database. For a PostgreSQL database,
    /// run `trustgate migrate` first. The server shuts down on SIGTERM, SIGQUIT or SIGINT.
    Serve,
    /// Continuously test that running replicas apply revocations in time.
    ///
    /// In each round, the canary issues a key, checks that every replica grants the key, revokes the key, and measures
    /// how soon every replica denies it. The results are exposed as metrics. Run the canary with the same configuration
    /// as the replicas, plus the settings in the section `[canary]` and a database role that may change keys. The
    /// canary stops on SIGTERM, SIGQUIT or SIGINT.
    Canary,
    /// Create, upgrade or repair the tables in the database.
    ///
    /// It is safe to run this command more than once.
    Migrate {
        /// Print the SQL statements that grant the PostgreSQL roles the rights they need. With this option, the command
        /// changes nothing.
        #[arg(long)]
        print_grants: bool,
        /// Also start a new database history. Use this option once after you restore a backup or a copy of the
        /// database, so that replicas do not use data cached from the previous history.
        #[arg(long, conflicts_with = "print_grants")]
        new_incarnation: bool,
        /// Role that `trustgate serve` connects as, for the statements that --print-grants prints.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_serve", requires = "print_grants")]
        serve_role: String,
        /// Role that the management commands (`trust`, `key`, `pepper`, `cache`) connect as, for the statements that
        /// --print-grants prints.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_manage", requires = "print_grants")]
        manage_role: String,
    },
    /// Record every change to an existing table (`store.table`), so that replicas can cache its rows under the lease.
    ///
    /// The command adds two triggers to the table and makes no other changes to it. Run `trustgate migrate` first.
    /// Afterwards, set `store.attached = true` and restart every replica.
    Attach(Alter),
    /// Remove the triggers that `trustgate attach` added to the existing table.
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
    /// Manage the deny list, which denies keys even if the database grants them or is unavailable.
    #[command(subcommand)]
    Deny(Deny),
    /// Manage the caches of the replicas.
    #[command(subcommand)]
    Cache(Cache),
    /// Copy trusts and keys to another database.
    #[command(subcommand)]
    Store(Store),
    /// Validate the configuration, or print the default configuration.
    #[command(subcommand)]
    Config(Config),
    /// Read a key from standard input, decide whether to grant it, and print the decision and the reason.
    ///
    /// The command reads the database and uses neither caches nor the deny list. Exit code 3 means that the key is
    /// denied.
    Check,
    /// Examine everything that `trustgate serve` needs: configuration, deadlines, files, database, rights and Redis.
    ///
    /// Run this command on the machine that runs `trustgate serve`, as the same user and with the same configuration.
    /// The command prints the result of each examination and a remedy for each problem, and changes nothing. Exit code
    /// 1 means that at least one examination failed.
    Doctor,
    /// Print a script that enables tab completion in a shell.
    Completions {
        /// Shell to print the script for.
        shell: Shell,
    },
}

#[derive(Args)]
pub(crate) struct Alter {
    /// Print the SQL statements, each with the role that must run it. With this option, the command changes nothing.
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Subcommand)]
pub(crate) enum Trust {
    /// Create a trust.
    Create {
        /// Name of the new trust.
        name: String,
    },
    /// List all trusts.
    List,
    /// Show a single trust.
    Show(WhichTrust),
    /// Enable a trust, so that its keys are granted again.
    Enable(WhichTrust),
    /// Disable a trust, so that all its keys are denied until the trust is enabled again.
    ///
    /// The command waits up to `freshness.lease` for all replicas to apply the change, and prints how many have applied
    /// it.
    Disable(WhichTrust),
    /// Delete a trust. A trust that still has keys is deleted only with --with-keys.
    ///
    /// The command waits up to `freshness.lease` for all replicas to apply the change, and prints how many have applied
    /// it.
    Delete {
        #[command(flatten)]
        which: WhichTrust,
        /// Also delete all keys of the trust.
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
    /// Issue a new key and print it. The key is shown only once.
    Issue(Issue),
    /// List keys, newest first.
    List {
        /// List only the keys of this trust.
        #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
        trust: Option<TrustRef>,
        /// List only the keys that are hashed with this pepper: `current` or `previous` (a pepper of this
        /// configuration), `unknown` (a pepper that is not in this configuration), `unrecorded` (no check has found the
        /// key yet, so the database has not recorded the key's pepper), or a fingerprint of 16 hexadecimal digits.
        #[arg(long, value_name = "PEPPER", value_parser = to_pepper)]
        pepper: Option<PepperFilter>,
    },
    /// Show a single key.
    Show(WhichKey),
    /// Revoke a key permanently.
    ///
    /// The command waits up to `freshness.lease` for all replicas to apply the revocation, and prints how many have
    /// applied it. Revoking a revoked key again changes nothing.
    Revoke(WhichKey),
    /// Find the keys in text read from standard input, and print which trust each key belongs to.
    ///
    /// The input can be a single key or longer text, such as a log file, up to 1 MiB. Exit code 1 means that the
    /// input contains no key from this database.
    Identify,
    /// Import existing keys from a file or from standard input, one key per line.
    ///
    /// If any line is invalid, the command imports nothing. Blank lines and lines that begin with `#` are skipped.
    Import(Import),
}

#[derive(Subcommand)]
pub(crate) enum Pepper {
    /// Record in the database that new keys are hashed with the configured pepper.
    ///
    /// Before you run this command, configure the new pepper on every server, and list the old pepper in
    /// `credential.previous_pepper_files`.
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
    /// Name or id of the trust that the key belongs to.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// Name that describes the purpose of the key.
    #[arg(long, value_name = "TEXT")]
    pub(crate) name: Option<String>,
    /// Time until the key expires, such as 90d or 12h. Default: the key does not expire.
    #[arg(long, value_name = "DURATION", value_parser = to_duration)]
    pub(crate) expires_in: Option<Duration>,
    /// Scope of the key. Repeat this option to give the key several scopes.
    #[arg(long = "scope", value_name = "SCOPE")]
    pub(crate) scopes: Vec<String>,
    /// Network from which the key may be used, such as 192.0.2.0/24. Repeat this option to allow several networks.
    /// Default: any network.
    #[arg(long = "allow-cidr", value_name = "CIDR", value_parser = to_network)]
    pub(crate) allowed_cidrs: Vec<IpNet>,
}

#[derive(Args)]
pub(crate) struct Import {
    /// Name or id of the trust that the keys belong to.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// Read each line as a plaintext key. Without this option, each line is a SHA-256 digest in hexadecimal. In both
    /// cases, only digests are stored.
    #[arg(long)]
    pub(crate) plaintext: bool,
    /// File to read. Use - for standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Deny {
    /// Deny a key, or every key of a trust, for a limited time.
    ///
    /// The command needs Redis. It needs the database only if `redis.mac_key_file` is not set.
    Add {
        #[command(flatten)]
        which: WhichDenied,
        /// Time until the entry expires, such as 12h or 90d.
        #[arg(long = "for", value_name = "DURATION", value_parser = to_duration)]
        life: Duration,
    },
    /// List the entries that `trustgate deny add` created.
    ///
    /// Entries in the file specified by `freshness.deny_file` are not listed.
    List,
    /// Remove the entries that `trustgate deny add` created for a key or a trust.
    Remove {
        #[command(flatten)]
        which: WhichDenied,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct WhichDenied {
    /// Select the key with this id.
    #[arg(long, value_name = "KEY_ID", value_parser = to_key)]
    pub(crate) key: Option<KeyId>,
    /// Select every key of the trust with this id. A name is not accepted, because only the database can resolve a
    /// name.
    #[arg(long, value_name = "TRUST_ID", value_parser = to_trust_id)]
    pub(crate) trust: Option<TrustId>,
    /// Select the key with this digest (64 hexadecimal digits).
    #[arg(long, value_name = "DIGEST", value_parser = to_digest)]
    pub(crate) digest: Option<ApiKeyDigest>,
    /// Read the key from standard input.
    #[arg(long)]
    pub(crate) stdin: bool,
}

#[derive(Subcommand)]
pub(crate) enum Cache {
    /// Clear the caches of all replicas.
    ///
    /// The command waits up to `freshness.lease` for every replica to clear its caches, and lists the replicas that
    /// have not. Exit code 1 means that at least one replica has not cleared its caches.
    Clear,
}

#[derive(Subcommand)]
pub(crate) enum Store {
    /// Copy every trust and key from one database to an empty database.
    ///
    /// Run `trustgate migrate` on the target database first. The copied keys keep working with the same peppers. The
    /// audit log and the change log are not copied.
    Copy(Copy),
}

#[derive(Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Copy {
    /// URL of the database to copy from, in the format of `store.url`. Default: the configured database. Other users of
    /// this machine can read the command line, so put the password in the environment variable PGPASSWORD, a `.pgpass`
    /// file or the configuration.
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
    /// Exit code 1 means that the configuration has errors.
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

// The error messages below do not quote the argument, because the argument may be a secret.
fn to_key(text: &str) -> Result<KeyId, String> {
    Uuid::parse_str(text)
        .map(KeyId)
        .map_err(|_| "expected the UUID of a key, as shown by `trustgate key list`".to_owned())
}

fn to_trust_id(text: &str) -> Result<TrustId, String> {
    Uuid::parse_str(text)
        .map(TrustId)
        .map_err(|_| "expected the UUID of a trust, as shown by `trustgate trust list`".to_owned())
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
    fn every_command_and_argument_is_declared_correctly_and_has_help() {
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
    fn address_without_a_prefix_length_is_read_as_a_network_of_one_address() {
        assert_eq!(to_network("192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert!(to_network("192.0.2.0/33").is_err());
        assert_eq!(to_network("::ffff:10.0.0.0/104").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(to_network("::ffff:192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert_eq!(to_network("::/0").unwrap().to_string(), "::/0");
    }
}
