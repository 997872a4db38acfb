//! Checks that need more than one setting or the file system: settings that exclude each other, timeouts that must fit
//! within other timeouts, and files that must be readable.
//!
//! No check opens a connection. A setting that already has an error is not compared with other settings.

mod files;
mod refuse;

use std::{net::SocketAddr, time::Duration};

use self::refuse::{either, needs, refuse_first_set, scheme, sound};
use super::{Config, Purpose};
use crate::{
    base::{settings::Reader, units::ByteSize},
    canary::settings::CanarySettings,
    ext_authz::credential::Pepper,
    freshness::{Freshness, FreshnessSettings},
    grpc::{GrpcSettings, listener::ListenAddress},
    redis::RedisSettings,
};

/// The maximum of `limits.message_size`. The protocol layer rejects longer messages.
const MESSAGE_SIZE_MAX: ByteSize = ByteSize::from_bytes(4 << 20);

/// Checks the settings in `config` against each other, and adds the errors to `reader`.
pub(crate) fn run(config: &Config, purpose: Purpose, reader: &mut Reader) {
    listeners(config, reader);
    canary(config, reader);
    store(config, reader);
    redis(config, reader);
    credential(config, purpose, reader);
    deadlines(config, reader);
    freshness(config, reader);
    amounts(config, reader);
    files::run(config, purpose, reader);
}

fn listeners(config: &Config, reader: &mut Reader) {
    for (section, name, is_empty) in [
        ("grpc", "listen", config.grpc.listen.is_empty()),
        ("admin", "listen", config.admin.listen.is_empty()),
        ("canary", "listen", config.canary.listen.is_empty()),
        ("canary", "targets", config.canary.targets.is_empty()),
    ] {
        if is_empty && sound(reader, &[&format!("{section}.{name}")]) {
            reader.refuse(section, name, "needs at least one address".to_owned());
        }
    }
    let is_both = |at: &&SocketAddr| at.port() != 0 && config.grpc.listen.contains(&ListenAddress::Tcp(**at));
    if let Some(both) = config.admin.listen.iter().find(is_both) {
        reader.refuse("admin", "listen", format!("{both} is also in grpc.listen: use a different port"));
    }
    let GrpcSettings { tls_certificate_file, tls_key_file, tls_client_ca_file, .. } = &config.grpc;
    let (certificate, key) = (tls_certificate_file.is_some(), tls_key_file.is_some());
    needs(reader, "grpc", ("tls_certificate_file", certificate), ("tls_key_file", key));
    needs(reader, "grpc", ("tls_key_file", key), ("tls_certificate_file", certificate));
    needs(reader, "grpc", ("tls_client_ca_file", tls_client_ca_file.is_some()), ("tls_certificate_file", certificate));
    if !config.api.listen.is_empty() {
        reader.refuse("api", "listen", "this release has no management API: leave it unset".to_owned());
    }
}

fn canary(config: &Config, reader: &mut Reader) {
    let CanarySettings { interval, tls_ca_file, tls_server_name, tls_certificate_file, tls_key_file, .. } =
        &config.canary;
    if *interval < CANARY_INTERVAL_MIN {
        let problem = format!("must be at least {}", humantime::format_duration(CANARY_INTERVAL_MIN));
        reader.refuse("canary", "interval", problem);
    }
    let (ca, certificate, key) = (tls_ca_file.is_some(), tls_certificate_file.is_some(), tls_key_file.is_some());
    needs(reader, "canary", ("tls_server_name", tls_server_name.is_some()), ("tls_ca_file", ca));
    needs(reader, "canary", ("tls_certificate_file", certificate), ("tls_ca_file", ca));
    needs(reader, "canary", ("tls_certificate_file", certificate), ("tls_key_file", key));
    needs(reader, "canary", ("tls_key_file", key), ("tls_certificate_file", certificate));
}

/// The minimum of `canary.interval`. Each round makes four changes that all replicas must apply, so rounds must not be
/// too frequent.
const CANARY_INTERVAL_MIN: Duration = Duration::from_secs(1);

fn store(config: &Config, reader: &mut Reader) {
    let store = &config.store;
    either(reader, "store", "url", store.url.is_some(), store.url_file.is_some());
    either(reader, "store", "password", store.password.is_some(), store.password_file.is_some());
    either(reader, "store", "management_url", store.management_url.is_some(), store.management_url_file.is_some());

    let schemes = ["sqlite://", "postgres://", "postgresql://"];
    let expected = "expected sqlite:///path/to/trustgate.db or postgres://user@host/database";
    for (name, url) in [("url", &store.url), ("management_url", &store.management_url)] {
        scheme(reader, "store", name, url.as_ref(), &schemes, expected);
    }
    let no_url = store.url.is_none() && store.url_file.is_none();
    for (name, set) in [
        ("password", store.password.is_some()),
        ("password_file", store.password_file.is_some()),
        ("management_url", store.management_url.is_some()),
        ("management_url_file", store.management_url_file.is_some()),
    ] {
        if set && no_url {
            reader.refuse("store", name, "needs store.url: the embedded database ignores this setting".to_owned());
        }
    }
    if store.reads_existing() {
        let name = if store.preset.is_some() { "preset" } else { "table" };
        if no_url {
            reader.refuse("store", name, "needs store.url, the database with this table".to_owned());
        }
        if config.credential.pepper.is_some() || config.credential.pepper_file.is_some() {
            let pepper = if config.credential.pepper.is_some() { "pepper" } else { "pepper_file" };
            let problem = format!(
                "has no effect with store.{name}, because that table has plain SHA-256 digests: unset one of the two \
                 settings"
            );
            reader.refuse("credential", pepper, problem);
        }
    }
    if store.attached {
        match &store.table {
            None => reader.refuse("store", "attached", "needs store.table, the attached table".to_owned()),
            Some(table) if table.schema.is_none() => {
                let problem = format!("needs its schema, such as \"public.{table}\", because store.attached is set");
                reader.refuse("store", "table", problem);
            }
            Some(_) => {}
        }
    }
    if store.table.is_none() {
        let columns = ["enabled", "scopes", "not_before", "expires_at", "revoked_at"];
        for name in columns.map(|column| format!("table_{column}")) {
            if reader.origin("store", &name).is_some() {
                reader.refuse("store", &name, "needs store.table, the table with this column".to_owned());
            }
        }
    }
}

fn redis(config: &Config, reader: &mut Reader) {
    let redis = &config.redis;
    either(reader, "redis", "url", !redis.url.is_empty(), redis.url_file.is_some());
    either(reader, "redis", "password", redis.password.is_some(), redis.password_file.is_some());
    let (value, file) = (redis.sentinel_password.is_some(), redis.sentinel_password_file.is_some());
    either(reader, "redis", "sentinel_password", value, file);
    for (name, set) in [
        ("password", redis.password.is_some()),
        ("password_file", redis.password_file.is_some()),
        ("sentinel_master", redis.sentinel_master.is_some()),
        ("cluster", redis.cluster),
        ("mac_key_file", redis.mac_key_file.is_some()),
        ("ca_file", redis.ca_file.is_some()),
    ] {
        if set && !redis.is_configured() && sound(reader, &["redis.url"]) {
            reader.refuse("redis", name, "needs redis.url: without it, Redis is not used".to_owned());
        }
    }
    for (name, set) in [("sentinel_password", value), ("sentinel_password_file", file)] {
        if set && redis.sentinel_master.is_none() {
            reader.refuse("redis", name, "needs redis.sentinel_master: without it, no Sentinels are used".to_owned());
        }
    }
    if redis.cluster && redis.sentinel_master.is_some() {
        let problem = "excludes redis.sentinel_master, because a Cluster has no Sentinels: unset one of the two";
        reader.refuse("redis", "cluster", problem.to_owned());
    }
    redis_urls(redis, reader);
}

fn redis_urls(redis: &RedisSettings, reader: &mut Reader) {
    let beginning_with = |scheme| redis.url.iter().filter(|url| url.expose().starts_with(scheme)).count();
    let (all, plain, secured) = (redis.url.len(), beginning_with("redis://"), beginning_with("rediss://"));
    let config_error = if plain + secured < all {
        Some(("url", "expected redis://user@host:6379/0 or rediss://user@host:6379/0, or a list of them"))
    } else if all > 1 && !redis.cluster && redis.sentinel_master.is_none() {
        let problem =
            "has several URLs: set redis.sentinel_master or redis.cluster (and write %2C for a comma in a URL)";
        Some(("url", problem))
    } else if plain > 0 && secured > 0 {
        Some(("url", "mixes redis:// and rediss://: use TLS for all URLs or for none"))
    } else if plain > 0 && redis.ca_file.is_some() {
        Some(("ca_file", "needs TLS: use a redis.url that begins with rediss://"))
    } else {
        None
    };
    if let Some((name, problem)) = config_error {
        reader.refuse("redis", name, problem.to_owned());
    }
}

fn credential(config: &Config, purpose: Purpose, reader: &mut Reader) {
    let credential = &config.credential;
    either(reader, "credential", "pepper", credential.pepper.is_some(), credential.pepper_file.is_some());
    // `trustgate deny` must work in an emergency, even if the pepper is too short.
    if let Some(Err(short)) = credential.pepper.as_ref().filter(|_| purpose != Purpose::Deny).map(Pepper::check_length)
    {
        reader.refuse("credential", "pepper", short.to_string());
    }
    if credential.sources.is_empty() && sound(reader, &["credential.sources"]) {
        reader.refuse("credential", "sources", "needs at least one source".to_owned());
    }
    let no_pepper = credential.pepper.is_none() && credential.pepper_file.is_none();
    if no_pepper && !credential.previous_pepper_files.is_empty() {
        let problem = "needs credential.pepper or credential.pepper_file, the pepper that new keys are hashed with";
        reader.refuse("credential", "previous_pepper_files", problem.to_owned());
    }
}

fn deadlines(config: &Config, reader: &mut Reader) {
    let (read, redis) = (config.store.read_timeout, config.redis.timeout);
    let (deadline, envoy) = (config.decision.deadline, config.decision.envoy_timeout);
    if sound(reader, &["store.read_timeout", "redis.timeout", "decision.deadline"]) && read + redis > deadline {
        let problem = format!(
            "store.read_timeout ({read:?}) and redis.timeout ({redis:?}) must not exceed decision.deadline \
             ({deadline:?}) in total"
        );
        let settings = [("store", "read_timeout"), ("redis", "timeout"), ("decision", "deadline")];
        refuse_first_set(reader, &settings, problem);
    }
    if sound(reader, &["decision.deadline", "decision.envoy_timeout"]) && deadline >= envoy {
        let problem = format!(
            "decision.deadline ({deadline:?}) must be shorter than decision.envoy_timeout ({envoy:?}): otherwise \
             Envoy stops waiting before the reply arrives"
        );
        refuse_first_set(reader, &[("decision", "deadline"), ("decision", "envoy_timeout")], problem);
    }
}

fn freshness(config: &Config, reader: &mut Reader) {
    let FreshnessSettings { mode, lease, stale_if_unconfirmed, poll_interval, poll_timeout, .. } = config.freshness;
    if !config.store.tracks_changes() && matches!(mode, Some(Freshness::Lease | Freshness::Strict)) {
        let problem = "needs a table with a change log: run `trustgate attach` and set store.attached, or use \"ttl\" \
                       or \"live\"";
        reader.refuse("freshness", "mode", problem.to_owned());
    }
    if sound(reader, &["freshness.lease", "freshness.poll_interval", "freshness.poll_timeout"]) {
        // The lease must stay fresh even if one poll times out.
        if poll_interval + poll_timeout * 2 > lease {
            let problem = format!(
                "freshness.lease ({lease:?}) must be at least freshness.poll_interval ({poll_interval:?}) plus twice \
                 freshness.poll_timeout ({poll_timeout:?}): otherwise one slow poll makes the lease stale"
            );
            let settings = [("freshness", "lease"), ("freshness", "poll_interval"), ("freshness", "poll_timeout")];
            refuse_first_set(reader, &settings, problem);
        }
    }
    let sample_interval = config.freshness.sample_interval;
    if sample_interval > Duration::ZERO && !config.store.tracks_changes() {
        let problem =
            "needs a table with a change log: run `trustgate attach` and set store.attached, or unset this setting";
        reader.refuse("freshness", "sample_interval", problem.to_owned());
    }
    if sample_interval > Duration::ZERO && sample_interval < SAMPLE_INTERVAL_MIN {
        let min = humantime::format_duration(SAMPLE_INTERVAL_MIN);
        reader.refuse("freshness", "sample_interval", format!("must be at least {min}, or 0s to turn it off"));
    }
    for (name, set, max) in [("lease", lease, LEASE_MAX), ("stale_if_unconfirmed", stale_if_unconfirmed, STALE_MAX)] {
        if set > max {
            reader.refuse("freshness", name, format!("must be at most {}", humantime::format_duration(max)));
        }
    }
}

/// The maximum of `freshness.lease`. With a longer lease, the revocation bound would be no better than a TTL.
const LEASE_MAX: Duration = Duration::from_mins(1);
/// The maximum of `freshness.stale_if_unconfirmed`. A replica that cannot reach the database for a longer time must
/// stop granting keys.
const STALE_MAX: Duration = Duration::from_mins(15);

/// The minimum of `freshness.sample_interval`. More frequent samples would burden the database.
const SAMPLE_INTERVAL_MIN: Duration = Duration::from_millis(10);

fn amounts(config: &Config, reader: &mut Reader) {
    let Config { store, redis, decision, cache, freshness, limits, .. } = config;
    for (section, name, duration) in [
        ("store", "read_timeout", store.read_timeout),
        ("store", "connect_timeout", store.connect_timeout),
        ("store", "breaker_open", store.breaker_open),
        ("redis", "timeout", redis.timeout),
        ("redis", "breaker_open", redis.breaker_open),
        ("decision", "deadline", decision.deadline),
        ("cache", "value_age_max", cache.value_age_max),
        ("freshness", "ttl", freshness.ttl),
        ("freshness", "negative_ttl", freshness.negative_ttl),
        ("freshness", "poll_interval", freshness.poll_interval),
        ("freshness", "poll_timeout", freshness.poll_timeout),
        ("freshness", "lease", freshness.lease),
        ("limits", "preface_timeout", limits.preface_timeout),
        ("limits", "keepalive_interval", limits.keepalive_interval),
        ("limits", "keepalive_timeout", limits.keepalive_timeout),
        ("limits", "connection_age", limits.connection_age),
    ] {
        if duration == Duration::ZERO {
            reader.refuse(section, name, "must be longer than zero".to_owned());
        }
    }
    for (section, name, size) in [
        ("cache", "size", cache.size),
        ("cache", "negative_size", cache.negative_size),
        ("limits", "message_size", limits.message_size),
    ] {
        if size.bytes() == 0 {
            reader.refuse(section, name, "must be larger than zero".to_owned());
        }
    }
    let (message, all) = (limits.message_size, limits.messages_in_flight_size);
    if message > MESSAGE_SIZE_MAX {
        reader.refuse("limits", "message_size", format!("must be at most {MESSAGE_SIZE_MAX}"));
    }
    if sound(reader, &["limits.message_size", "limits.messages_in_flight_size"]) && all < message {
        let problem =
            format!("limits.messages_in_flight_size ({all}) must be at least limits.message_size ({message})");
        let settings = [("limits", "messages_in_flight_size"), ("limits", "message_size")];
        refuse_first_set(reader, &settings, problem);
    }
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn inconsistent_existing_table_settings_are_refused() {
        for (text, want) in [
            ("store.table = \"a.b.c\"", "trustgate.toml:1: store.table: expected a table, such as \"public.trust\""),
            ("store.table = \"public.t\"", "trustgate.toml:1: store.table: needs store.url"),
            ("store.table_scopes = \"may\"", "trustgate.toml:1: store.table_scopes: needs store.table"),
            (
                "store.url = \"postgres://h/d\"\nstore.preset = \"trust-table\"\nstore.attached = true",
                "trustgate.toml:3: store.attached: needs store.table",
            ),
            (
                "store.url = \"postgres://h/d\"\nstore.table = \"t\"\nstore.attached = true",
                "trustgate.toml:2: store.table: needs its schema, such as \"public.t\"",
            ),
            (
                "store.url = \"postgres://h/d\"\nstore.table = \"t\"\nfreshness.mode = \"lease\"",
                "trustgate.toml:3: freshness.mode: needs a table with a change log",
            ),
        ] {
            refused(text, want);
        }
    }

    #[test]
    fn inconsistent_settings_are_refused() {
        for (text, want) in [
            ("grpc.listen = []", "trustgate.toml:1: grpc.listen: needs at least one address"),
            (
                "admin.listen = \"127.0.0.1:50051\"",
                "trustgate.toml:1: admin.listen: 127.0.0.1:50051 is also in grpc.listen",
            ),
            ("grpc.tls_key_file = \"/k\"", "trustgate.toml:1: grpc.tls_key_file: also needs grpc.tls_certificate_file"),
            (
                "grpc.tls_client_ca_file = \"/c\"",
                "trustgate.toml:1: grpc.tls_client_ca_file: also needs grpc.tls_certificate_file",
            ),
            ("grpc.listen = \"unix:relative\"", "trustgate.toml:1: grpc.listen: expected an address with its port"),
            ("grpc.socket_mode = \"rw\"", "trustgate.toml:1: grpc.socket_mode: expected permission bits in octal"),
            ("api.listen = \"127.0.0.1:1\"", "trustgate.toml:1: api.listen: this release has no management API"),
            ("store.url = \"mysql://hunter2@h/d\"", "trustgate.toml:1: store.url: expected sqlite:///"),
            ("store.password = \"hunter2\"", "trustgate.toml:1: store.password: needs store.url"),
            ("store.preset = \"trust-table\"", "trustgate.toml:1: store.preset: needs store.url"),
            (
                "store.url = \"postgres://h/d\"\nstore.preset = \"trust-table\"\n\
                 credential.pepper = \"hunter2-hunter2-hunter2\"",
                "trustgate.toml:3: credential.pepper: has no effect with store.preset",
            ),
            ("credential.sources = []", "trustgate.toml:1: credential.sources: needs at least one source"),
            (
                "decision.deadline = \"110ms\"",
                "trustgate.toml:1: decision.deadline: store.read_timeout (100ms) and redis.timeout (20ms) must",
            ),
            (
                "decision.deadline = \"200ms\"",
                "trustgate.toml:1: decision.deadline: decision.deadline (200ms) must be shorter",
            ),
            (
                "decision.envoy_timeout = \"150ms\"",
                "trustgate.toml:1: decision.envoy_timeout: decision.deadline (150ms) must",
            ),
            (
                "redis.timeout = \"60ms\"",
                "trustgate.toml:1: redis.timeout: store.read_timeout (100ms) and redis.timeout (60ms) must",
            ),
            ("freshness.poll_interval = \"0ms\"", "trustgate.toml:1: freshness.poll_interval: must be longer"),
            ("cache.size = \"0B\"", "trustgate.toml:1: cache.size: must be larger"),
            ("limits.message_size = \"5MiB\"", "trustgate.toml:1: limits.message_size: must be at most 4MiB"),
            (
                "limits.messages_in_flight_size = \"1KiB\"",
                "trustgate.toml:1: limits.messages_in_flight_size: limits.mess",
            ),
            (
                "credential.pepper_file = \"/nowhere\"",
                "trustgate.toml:1: credential.pepper_file: cannot read /nowhere: No such",
            ),
            (
                "credential.pepper_file = \"/dev/null\"",
                "trustgate.toml:1: credential.pepper_file: cannot read /dev/null: the text is empty",
            ),
        ] {
            refused(text, want);
        }
    }

    #[test]
    fn invalid_sampler_and_canary_settings_are_refused() {
        for (text, want) in [
            (
                "freshness.sample_interval = \"9ms\"",
                "trustgate.toml:1: freshness.sample_interval: must be at least 10ms",
            ),
            (
                "store.url = \"postgres://h/d\"\nstore.preset = \"trust-table\"\nfreshness.sample_interval = \"1s\"",
                "trustgate.toml:3: freshness.sample_interval: needs a table with a change log",
            ),
            ("canary.interval = \"999ms\"", "trustgate.toml:1: canary.interval: must be at least 1s"),
            ("canary.targets = []", "trustgate.toml:1: canary.targets: needs at least one address"),
            ("canary.targets = \"localhost\"", "trustgate.toml:1: canary.targets: expected a host with its port"),
            (
                "canary.tls_server_name = \"a\"",
                "trustgate.toml:1: canary.tls_server_name: also needs canary.tls_ca_file",
            ),
            (
                "canary.tls_ca_file = \"/dev/zero\"\ncanary.tls_key_file = \"/dev/zero\"",
                "trustgate.toml:2: canary.tls_key_file: also needs canary.tls_certificate_file",
            ),
            ("canary.tls_ca_file = \"/nowhere\"", "trustgate.toml:1: canary.tls_ca_file: cannot read /nowhere"),
        ] {
            refused(text, want);
        }
    }

    #[test]
    fn inconsistent_redis_settings_are_refused() {
        for (text, want) in [
            ("redis.url = \"http://hunter2@h\"", "trustgate.toml:1: redis.url: expected redis://"),
            ("redis.ca_file = \"/dev/zero\"\n#", "trustgate.toml:1: redis.ca_file: needs redis.url"),
            ("redis.cluster = true", "trustgate.toml:1: redis.cluster: needs redis.url"),
            (
                "redis.url = [\"redis://a\", \"redis://:hunter2@b\"]",
                "trustgate.toml:1: redis.url: has several URLs: set redis.sentinel_master",
            ),
            (
                "redis.url = [\"redis://a\", \"rediss://:hunter2@b\"]\nredis.cluster = true",
                "trustgate.toml:1: redis.url: mixes redis:// and rediss://",
            ),
            (
                "redis.url = [\"redis://a\", \"http://:hunter2@b\", \"c\"]\nredis.cluster = true",
                "trustgate.toml:1: redis.url: expected redis://",
            ),
            (
                "redis.url = \"redis://a\"\nredis.cluster = true\nredis.sentinel_master = \"main\"",
                "trustgate.toml:2: redis.cluster: excludes redis.sentinel_master",
            ),
            (
                "redis.url = \"redis://a\"\nredis.sentinel_password = \"hunter2\"",
                "trustgate.toml:2: redis.sentinel_password: needs redis.sentinel_master",
            ),
        ] {
            refused(text, want);
        }
    }

    fn refused(text: &str, want: &str) {
        let got = config_errors(&text.replace("/dev/zero", "/proc/version"), &[]);
        assert!(got.len() == 1 && got[0].starts_with(want), "{text:?}: {got:?}");
        assert!(!got[0].contains("hunter2"), "{got:?}");
    }

    #[test]
    fn setting_and_its_file_variant_exclude_each_other_even_if_one_is_an_environment_variable() {
        let text = "[credential]\npepper_file = \"/proc/version\"";
        assert_eq!(
            config_errors(text, &[("TRUSTGATE__CREDENTIAL__PEPPER", "hunter2-hunter2-hunter2")]),
            ["trustgate.toml:2: credential.pepper_file: credential.pepper is also set \
                 (TRUSTGATE__CREDENTIAL__PEPPER): set only one of the two"]
        );
    }

    #[test]
    fn setting_with_an_error_is_not_compared_with_other_settings() {
        let got = config_errors("store.read_timeout = \"long\"\ndecision.deadline = \"110ms\"", &[]);
        assert_eq!(got.len(), 1, "{got:?}");
    }
}
