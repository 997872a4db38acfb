//! What can be written on the command line.
//!
//! Never holds a key: keys come on standard input, where other users of the machine cannot see them.

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

/// Decides for Envoy whose request it is and whether it may pass.
#[derive(Parser)]
#[command(name = "trustgate", version = VERSION, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// The configuration file; else the one that the variable `TRUSTGATE_CONFIG` names, else none.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How answers are shown.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How answers are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Answer Envoy's checks until told to stop.
    Serve,
    /// Create or upgrade the tables in the database.
    Migrate {
        /// Only print the statements that give the roles in PostgreSQL the rights they need.
        #[arg(long)]
        print_grants: bool,
        /// Also begin a new history: run it once after a backup or a copy of the database was put in place, so that no
        /// replica takes what it remembers for what is stored now.
        #[arg(long, conflicts_with = "print_grants")]
        new_incarnation: bool,
        /// The role of `serve` in these statements.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_serve", requires = "print_grants")]
        serve_role: String,
        /// The role of `trust`, `key` and `cache` in these statements.
        #[arg(long, value_name = "ROLE", default_value = "trustgate_manage", requires = "print_grants")]
        manage_role: String,
    },
    /// Make an existing table, `store.table`, name its changes, so that what is read from it can be relied on under the
    /// lease: two triggers are added to it, and nothing else. Run `migrate` before.
    Attach(Alter),
    /// Take away what `attach` added.
    Detach(Alter),
    /// The organisations that keys speak for.
    #[command(subcommand)]
    Trust(Trust),
    /// API keys.
    #[command(subcommand)]
    Key(Key),
    /// Manage the pepper, the secret that keys are hashed with.
    #[command(subcommand)]
    Pepper(Pepper),
    /// What is denied whatever the database says, also while it cannot be reached.
    #[command(subcommand)]
    Deny(Deny),
    /// What replicas remember.
    #[command(subcommand)]
    Cache(Cache),
    /// The database as a whole.
    #[command(subcommand)]
    Store(Store),
    /// The configuration.
    #[command(subcommand)]
    Config(Config),
    /// Decide one key, read from standard input, and say why. Exit code 3: denied.
    Check,
    /// Examine what `serve` would find with this configuration: deadlines, files, the database, the rights there, Redis.
    /// Changes nothing. Exit code 1: something that is needed does not work.
    Doctor,
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Args)]
pub(crate) struct Alter {
    /// Only print the statements, each under the role that has to run it.
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Subcommand)]
pub(crate) enum Trust {
    /// Create a trust.
    Create {
        /// Its name.
        name: String,
    },
    /// List all trusts.
    List,
    /// Show one trust.
    Show(WhichTrust),
    /// Let the keys of a trust be granted again.
    Enable(WhichTrust),
    /// Deny every key of a trust until it is enabled again.
    Disable(WhichTrust),
    /// Delete a trust.
    Delete {
        #[command(flatten)]
        which: WhichTrust,
        /// Delete its keys too.
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
    /// Make a key and show it, once.
    Issue(Issue),
    /// List keys, newest first.
    List {
        /// Only those of this trust.
        #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
        trust: Option<TrustRef>,
        /// Only keys issued under this pepper: `current` or `previous` of this configuration, `unknown` (not in this
        /// configuration), `unrecorded` (no check has identified it yet), or a fingerprint of 16 hexadecimal digits.
        #[arg(long, value_name = "PEPPER", value_parser = to_pepper)]
        pepper: Option<PepperFilter>,
    },
    /// Show one key.
    Show(WhichKey),
    /// Revoke a key for good.
    Revoke(WhichKey),
    /// Read a key, or any text that may hold keys, from standard input and say whose they are. Exit code 1: no key of
    /// this database.
    Identify,
    /// Store keys made elsewhere, one a line, all or none.
    Import(Import),
}

#[derive(Subcommand)]
pub(crate) enum Pepper {
    /// Record the configured pepper as the one for new keys. Run it after every server has the new pepper, with the old one
    /// in `credential.previous_pepper_files`.
    Use,
}

#[derive(Args)]
pub(crate) struct WhichKey {
    /// Id of the key.
    #[arg(value_name = "KEY_ID", value_parser = to_key)]
    pub(crate) id: KeyId,
}

#[derive(Args)]
pub(crate) struct Issue {
    /// Whom the key speaks for.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// What the key is for.
    #[arg(long, value_name = "TEXT")]
    pub(crate) name: Option<String>,
    /// How long it is valid, such as 90d or 12h; without it, until it is revoked.
    #[arg(long, value_name = "DURATION", value_parser = to_duration)]
    pub(crate) expires_in: Option<Duration>,
    /// What it may be used for; can be given several times.
    #[arg(long = "scope", value_name = "SCOPE")]
    pub(crate) scopes: Vec<String>,
    /// A network it may be used from, such as 192.0.2.0/24; can be given several times. Without it, from anywhere.
    #[arg(long = "allow-cidr", value_name = "CIDR", value_parser = to_network)]
    pub(crate) allowed_cidrs: Vec<IpNet>,
}

#[derive(Args)]
pub(crate) struct Import {
    /// Whom the keys speak for.
    #[arg(long, value_name = "NAME_OR_ID", value_parser = to_trust())]
    pub(crate) trust: TrustRef,
    /// The lines are keys, to be hashed at once, instead of SHA-256 digests in hexadecimal.
    #[arg(long)]
    pub(crate) plaintext: bool,
    /// Where to read from; - is standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Deny {
    /// Deny a key, or every key of a trust, for some time. Needs Redis, and not the database where `redis.mac_key_file` is
    /// set.
    Add {
        #[command(flatten)]
        which: WhichDenied,
        /// For how long, such as 12h or 90d.
        #[arg(long = "for", value_name = "DURATION", value_parser = to_duration)]
        life: Duration,
    },
    /// List what is denied in this way. What is in the file of `freshness.deny_file` is not listed.
    List,
    /// End what `add` began.
    Remove {
        #[command(flatten)]
        which: WhichDenied,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct WhichDenied {
    /// The key with this id.
    #[arg(long, value_name = "KEY_ID", value_parser = to_key)]
    pub(crate) key: Option<KeyId>,
    /// Every key of the trust with this id. Not its name: that only the database knows.
    #[arg(long, value_name = "TRUST_ID", value_parser = to_trust_id)]
    pub(crate) trust: Option<TrustId>,
    /// The key with this digest, 64 hexadecimal digits.
    #[arg(long, value_name = "DIGEST", value_parser = to_digest)]
    pub(crate) digest: Option<ApiKeyDigest>,
    /// The key that is read from standard input.
    #[arg(long)]
    pub(crate) stdin: bool,
}

#[derive(Subcommand)]
pub(crate) enum Cache {
    /// Make every replica forget what it read from the database, and wait until all have.
    Clear,
}

#[derive(Subcommand)]
pub(crate) enum Store {
    /// Copy every trust and key from one database into another, which `migrate` has made and which is empty. Keys keep
    /// working, under the same peppers. The audit and the history stay where they are.
    Copy(Copy),
}

#[derive(Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Copy {
    /// The database to copy from, as `store.url` has it; without it, the configured one. Others of this machine can read
    /// the command line: leave a password to the variable PGPASSWORD, a `.pgpass` file, or the configuration.
    #[arg(long, value_name = "URL", value_parser = to_secret())]
    pub(crate) from: Option<Secret>,
    /// The database to copy to; without it, the configured one.
    #[arg(long, value_name = "URL", value_parser = to_secret())]
    pub(crate) to: Option<Secret>,
}

#[derive(Subcommand)]
pub(crate) enum Config {
    /// Tell every mistake in the configuration.
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

// What was written is not repeated: somebody may have put a key there.
fn to_key(text: &str) -> Result<KeyId, String> {
    Uuid::parse_str(text)
        .map(KeyId)
        .map_err(|_| "expected a key's id, a UUID as `trustgate key list` shows it".to_owned())
}

fn to_trust_id(text: &str) -> Result<TrustId, String> {
    Uuid::parse_str(text)
        .map(TrustId)
        .map_err(|_| "expected a trust's id, a UUID as `trustgate trust list` shows it".to_owned())
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
    fn the_declarations_hold_together_and_every_command_explains_itself() {
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
    fn an_address_is_a_network_of_one() {
        assert_eq!(to_network("192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert!(to_network("192.0.2.0/33").is_err());
        assert_eq!(to_network("::ffff:10.0.0.0/104").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(to_network("::ffff:192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert_eq!(to_network("::/0").unwrap().to_string(), "::/0");
    }
}
