//! Tests `trustgate doctor` with real servers. In a healthy setup, each examination is ok. A problem appears in the
//! examination that covers it, with a remedy and without secrets.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt as _, path::Path};

use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use serde_json::Value;
use time::OffsetDateTime;

use crate::{
    program::{Place, Ran},
    support::{
        pgbouncer::PgBouncer,
        postgres::Postgres,
        redis::{Redis, USER},
    },
};

/// The names of all examinations, in the order of the report.
const NAMES: [&str; 23] = [
    "configuration",
    "deadlines",
    "envoy",
    "pepper",
    "tls",
    "deny_file",
    "database_address",
    "database_connection",
    "database_server",
    "database_tables",
    "database_rights",
    "management_rights",
    "database_watch",
    "database_polls",
    "database_pepper",
    "database_reads",
    "database_clock",
    "database_notifications",
    "redis_address",
    "redis_connection",
    "redis_commands",
    "redis_notifications",
    "redis_mac_key",
];

/// Returns an environment with timeouts that are long enough for a busy machine.
fn unhurried() -> Place {
    let settings = [
        ("STORE__READ_TIMEOUT", "40s"),
        ("STORE__CONNECT_TIMEOUT", "20s"),
        ("REDIS__TIMEOUT", "5s"),
        ("DECISION__DEADLINE", "50s"),
        ("DECISION__ENVOY_TIMEOUT", "60s"),
        ("FRESHNESS__POLL_TIMEOUT", "20s"),
        ("FRESHNESS__LEASE", "60s"),
    ];
    settings.iter().fold(Place::new(), |place, (name, value)| place.with(&format!("TRUSTGATE__{name}"), value))
}

/// The result of one run of `trustgate doctor`.
struct Report {
    ran: Ran,
    findings: Vec<Value>,
}

impl Report {
    #[track_caller]
    fn of(place: &Place) -> Self {
        let ran = place.run(&["--output", "json", "doctor"]);
        assert_eq!(ran.err, "", "{ran:?}");
        let findings = ran.parsed().as_array().unwrap().clone();
        let names: Vec<_> = findings.iter().map(|finding| finding["name"].as_str().unwrap()).collect();
        assert_eq!(names, NAMES);
        let failed = findings.iter().any(|finding| finding["state"] == "failed");
        assert_eq!(ran.code, i32::from(failed), "{ran:?}");
        for finding in &findings {
            let needs_remedy = finding["state"] == "failed" || finding["state"] == "warning";
            assert_eq!(finding["remedy"].is_string(), needs_remedy, "{finding}");
            assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        }
        Self { ran, findings }
    }

    fn one(&self, name: &str) -> &Value {
        self.findings.iter().find(|finding| finding["name"] == name).unwrap()
    }

    /// Asserts that the examination `name` has this state, and that its finding or remedy contains each of `texts`.
    #[track_caller]
    fn shows(&self, name: &str, state: &str, texts: &[&str]) -> &Self {
        let finding = self.one(name);
        assert_eq!(finding["state"], state, "{finding}");
        for text in texts {
            let contains = |field: &str| finding[field].as_str().is_some_and(|found| found.contains(text));
            assert!(contains("found") || contains("remedy"), "no {text:?} in {finding}");
        }
        self
    }

    /// Asserts that the examinations in `skipped` were skipped and that all other examinations are ok.
    #[track_caller]
    fn is_ok_except(&self, skipped: &[&str]) -> &Self {
        for finding in &self.findings {
            let name = finding["name"].as_str().unwrap();
            let state = if skipped.contains(&name) { "skipped" } else { "ok" };
            assert_eq!(finding["state"], state, "{finding}");
        }
        self
    }
}

/// A database with trustgate's tables, and with a serving and a managing role that have the printed grants.
struct Setup {
    server: std::sync::Arc<Postgres>,
    database: String,
    serve: String,
    manage: String,
}

impl Setup {
    async fn new() -> Self {
        let server = Postgres::shared().await;
        let database = server.database().await;
        let (serve, manage) = (format!("serve_{database}"), format!("manage_{database}"));
        let setup = Self { server, database, serve, manage };
        setup.owner().run(&["migrate"]).done();
        setup
            .execute(&format!(
                "CREATE ROLE {} LOGIN PASSWORD 'letmein'; CREATE ROLE {} LOGIN",
                setup.serve, setup.manage
            ))
            .await;
        let roles = ["--serve-role", &setup.serve, "--manage-role", &setup.manage];
        let printed = setup.owner().run(&[&["migrate", "--print-grants"], &roles[..]].concat()).done().out;
        setup.execute(&printed).await;
        setup
    }

    async fn execute(&self, sql: &str) {
        self.server.execute(&self.database, sql).await;
    }

    /// Returns an environment that connects as the role that owns the tables.
    fn owner(&self) -> Place {
        Place::new().with("TRUSTGATE__STORE__URL", &self.server.url("admin", &self.database))
    }

    fn place(&self) -> Place {
        unhurried()
            .with("TRUSTGATE__STORE__URL", &self.server.url(&self.serve, &self.database))
            .with("TRUSTGATE__STORE__MANAGEMENT_URL", &self.server.url(&self.manage, &self.database))
    }
}

const WITHOUT_REDIS: [&str; 5] =
    ["redis_address", "redis_connection", "redis_commands", "redis_notifications", "redis_mac_key"];
/// The examinations of optional features, which are skipped because the tests do not configure these features.
const FILES: [&str; 3] = ["envoy", "tls", "deny_file"];

#[tokio::test]
async fn doctor_passes_a_healthy_set_up_and_changes_nothing() {
    let (setup, redis) = (Setup::new().await, Redis::start().await);
    let place = setup.place().with("TRUSTGATE__REDIS__URL", &redis.url());
    let before = setup.server.dump(&setup.database, &[]);
    Report::of(&place).is_ok_except(&FILES);

    let table = place.run(&["doctor"]).done().out;
    let lines: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "STATE", "FOUND"]);
    let names: Vec<_> = lines[1..=NAMES.len()].iter().map(|words| words[0]).collect();
    assert_eq!(names, NAMES);
    let two = "Envoy's timeout must not be shorter than decision.envoy_timeout:\n  decision.envoy_timeout  60s, set in \
               TRUSTGATE__DECISION__ENVOY_TIMEOUT\n  grpc_service.timeout    60s or more, in Envoy's ext_authz filter\n";
    assert!(table.ends_with(two), "{table}");

    assert_eq!(setup.server.dump(&setup.database, &[]), before);
    let written = redis.ask::<String>(&["INFO", "persistence"]).await;
    assert!(written.contains("rdb_changes_since_last_save:0\r\n"), "{written}");
}

#[tokio::test]
async fn doctor_proposes_the_statement_that_grants_a_missing_right() {
    let setup = Setup::new().await;
    let Setup { serve, manage, .. } = &setup;
    let place = setup.place();
    for (name, lost, given) in [
        (
            "database_rights",
            format!("SELECT ON trustgate.change FROM {serve}"),
            format!("GRANT SELECT ON trustgate.change TO \"{serve}\";"),
        ),
        (
            "database_rights",
            format!("DELETE ON trustgate.replica FROM {serve}"),
            format!("GRANT DELETE ON trustgate.replica TO \"{serve}\";"),
        ),
        (
            "database_rights",
            format!("EXECUTE ON FUNCTION trustgate.poll(bigint, bigint) FROM {serve}"),
            format!("GRANT EXECUTE ON FUNCTION trustgate.poll(bigint, bigint) TO \"{serve}\";"),
        ),
        (
            "database_rights",
            format!("USAGE ON SCHEMA trustgate FROM {serve}"),
            format!("GRANT USAGE ON SCHEMA trustgate TO \"{serve}\";"),
        ),
        (
            "management_rights",
            format!("INSERT ON trustgate.audit FROM {manage}"),
            format!("GRANT INSERT ON trustgate.audit TO \"{manage}\";"),
        ),
    ] {
        setup.execute(&format!("REVOKE {lost}")).await;
        let report = Report::of(&place);
        report.shows(name, "failed", &[&given, " lacks 1 of "]);
        assert_eq!(report.ran.code, 1, "{lost}");
        let table = place.run(&["doctor"]);
        assert!(table.code == 1 && table.out.contains(&given), "{table:?}");
        let setting = if name == "database_rights" { "store.url" } else { "store.management_url" };
        let is_set = format!("{setting} is set in TRUSTGATE__{}", setting.to_uppercase().replace('.', "__"));
        assert!(table.out.contains(&is_set), "{table:?}");
        let remedy = report.one(name)["remedy"].as_str().unwrap();
        let statements: Vec<_> = remedy.lines().filter(|line| line.starts_with("GRANT ")).collect();
        setup.execute(&statements.concat()).await;
        Report::of(&place).is_ok_except(&[&FILES[..], &WITHOUT_REDIS].concat());
    }
    setup.execute(&format!("REVOKE ALL ON ALL TABLES IN SCHEMA trustgate FROM {serve}")).await;
    Report::of(&place).shows("database_rights", "failed", &["lacks 12 of the 21", "and so on", "--print-grants"]);
}

#[tokio::test]
async fn doctor_warns_if_the_serving_role_may_change_keys() {
    let setup = Setup::new().await;
    setup.execute(&format!("GRANT UPDATE ON trustgate.api_key TO {}", setup.serve)).await;
    let report = Report::of(&setup.place());
    report.shows("database_rights", "warning", &["may also change trusts and keys", &setup.manage]);
    assert_eq!(report.ran.code, 0);
    // A role that both serves and manages needs this right, so there is no warning.
    let place = unhurried().with("TRUSTGATE__STORE__URL", &setup.server.url("admin", &setup.database));
    let report = Report::of(&place);
    report.shows("database_rights", "ok", &[]).shows(
        "management_rights",
        "skipped",
        &["store.management_url is not set"],
    );
    let elsewhere = setup.server.database().await;
    let place = place.with("TRUSTGATE__STORE__MANAGEMENT_URL", &setup.server.url("admin", &elsewhere));
    Report::of(&place).shows("management_rights", "failed", &["a different database"]);
}

#[tokio::test]
async fn doctor_reports_broken_triggers_to_a_role_that_cannot_repair_them() {
    let setup = Setup::new().await;
    let place = setup.place();
    for (harm, text) in [
        (
            "ALTER TABLE trustgate.api_key DISABLE TRIGGER trustgate_changed",
            "trustgate_changed on table trustgate.api_key",
        ),
        ("DROP TRIGGER trustgate_stamp ON trustgate.tx", "trustgate_stamp on table trustgate.tx is missing"),
    ] {
        setup.execute(harm).await;
        Report::of(&place).shows("database_watch", "failed", &[text, "trustgate migrate"]);
        setup.owner().run(&["migrate"]).done();
        Report::of(&place).shows("database_watch", "ok", &[]);
    }
    setup.execute("ALTER TABLE trustgate.api_key ADD COLUMN note text").await;
    Report::of(&place).shows("database_watch", "ok", &["were altered", "next poll verifies them again"]);
}

#[tokio::test]
async fn doctor_fails_if_the_table_is_not_attached_or_was_attached_with_other_columns() {
    let setup = Setup::new().await;
    setup
        .execute(&format!(
            "CREATE TABLE tenant (id uuid PRIMARY KEY, api_key_hash char(64) UNIQUE, gone_at timestamptz);
         GRANT SELECT ON tenant TO {}",
            setup.serve
        ))
        .await;
    let attached = |place: Place| {
        place.with("TRUSTGATE__STORE__TABLE", "public.tenant").with("TRUSTGATE__STORE__ATTACHED", "true")
    };
    let (place, owner) = (attached(setup.place()), attached(setup.owner()));
    let missing = ["public.tenant is not attached", "run `trustgate attach`"];
    let report = Report::of(&place);
    report.shows("database_watch", "failed", &missing);
    assert_eq!(report.ran.code, 1);
    owner.run(&["attach"]).done();
    Report::of(&place).shows("database_watch", "ok", &["every change is recorded"]);
    let other = attached(setup.place()).with("TRUSTGATE__STORE__TABLE_REVOKED_AT", "gone_at");
    Report::of(&other).shows("database_watch", "failed", &missing);
    setup.execute("DROP TRIGGER trustgate_changed ON tenant").await;
    let report = Report::of(&place);
    report.shows(
        "database_watch",
        "failed",
        &["trustgate_changed on table tenant is missing", "run `trustgate attach`"],
    );
    assert!(!report.one("database_watch").to_string().contains("trustgate migrate"));
}

#[tokio::test]
async fn doctor_reports_missing_tables_too_new_tables_and_a_read_only_role() {
    let setup = Setup::new().await;
    let empty = setup.server.database().await;
    let place = unhurried().with("TRUSTGATE__STORE__URL", &setup.server.url("admin", &empty));
    let report = Report::of(&place);
    report.shows("database_tables", "failed", &["has no trustgate tables", "run `trustgate migrate`"]);
    report.shows("database_rights", "skipped", &["because of database_tables"]).shows(
        "database_notifications",
        "ok",
        &[],
    );
    assert_eq!(report.one("database_tables")["settings"][0]["origin"], "TRUSTGATE__STORE__URL");

    let read_only = format!("ALTER ROLE {} SET default_transaction_read_only", setup.serve);
    setup.execute(&format!("{read_only} = on")).await;
    let report = Report::of(&setup.place());
    report.shows("database_server", "failed", &["read-only", "default_transaction_read_only"]);
    report.shows("database_polls", "failed", &["read-only"]).shows("database_rights", "ok", &[]);
    setup.execute(&format!("{read_only} = off; INSERT INTO trustgate.schema VALUES (99, 99)")).await;
    Report::of(&setup.place()).shows("database_tables", "failed", &["version 99", "start a newer trustgate"]);
}

#[tokio::test]
async fn doctor_reports_that_the_database_is_a_standby() {
    let primary = Postgres::start().await;
    let owner = Place::new().with("TRUSTGATE__STORE__URL", &primary.url("admin", "postgres"));
    owner.run(&["migrate"]).done();
    let standby = primary.standby().await;
    let place = unhurried().with("TRUSTGATE__STORE__URL", &standby.url("admin", "postgres"));
    let report = Report::of(&place);
    report.shows("database_server", "failed", &["standby", "point the URL to the primary"]);
    report.shows("database_polls", "failed", &["standby"]).shows("database_tables", "ok", &[]);
    report.shows("database_notifications", "warning", &["notifications do not arrive: replicas rely on polling only"]);
}

#[tokio::test]
async fn through_a_pooler_doctor_warns_only_about_notifications() {
    let setup = Setup::new().await;
    let pooler = PgBouncer::start(&setup.server).await;
    let report = Report::of(&unhurried().with("TRUSTGATE__STORE__URL", &pooler.url(&setup.database)));
    report.shows("database_notifications", "warning", &["notifications do not arrive: replicas rely on polling only"]);
    for name in ["database_connection", "database_rights", "database_watch", "database_polls", "database_reads"] {
        report.shows(name, "ok", &[]);
    }
    assert_eq!(report.ran.code, 0);
}

#[tokio::test]
async fn doctor_reports_an_unreachable_database_with_a_remedy_and_without_its_password() {
    let setup = Setup::new().await;
    let quick = |url: &str| Place::new().with("TRUSTGATE__STORE__URL", url);
    let tcp = setup.server.tcp_url(&setup.serve, &setup.database);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hangs = format!("postgres://me:hunter2@{}/db", silent.local_addr().unwrap());
    for (place, name, texts) in [
        (
            quick("postgres://me:hunter2@no.such.host.invalid/db"),
            "database_address",
            &["no.such.host.invalid", "correct the host"][..],
        ),
        (quick("postgres://me:hunter2@%2Fno%2Fsuch/db"), "database_address", &["/no/such/.s.PGSQL.5432"]),
        (quick("postgres://me:hunter2@127.0.0.1:1/db"), "database_connection", &["127.0.0.1:1", "start the server"]),
        (
            quick(&tcp).with("TRUSTGATE__STORE__PASSWORD", "hunter2"),
            "database_connection",
            &["password authentication failed", "store.password_file"],
        ),
        (
            quick(&setup.server.url("admin", "nowhere")).with("TRUSTGATE__STORE__PASSWORD", "hunter2"),
            "database_connection",
            &["\"nowhere\" does not exist", "create the database"],
        ),
        (
            quick(&hangs).with("TRUSTGATE__STORE__CONNECT_TIMEOUT", "500ms"),
            "database_connection",
            &["no answer within 500ms", "store.connect_timeout"],
        ),
    ] {
        let report = Report::of(&place);
        report.shows(name, "failed", texts);
        report.shows("database_reads", "skipped", &[&format!("because of {name}")]);
        let table = place.run(&["doctor"]);
        assert!(table.code == 1 && table.err.is_empty(), "{table:?}");
        for ran in [&report.ran, &table] {
            ran.hides("hunter2");
        }
    }
    let good = quick(&tcp).with("TRUSTGATE__STORE__PASSWORD", "letmein");
    Report::of(&good).shows("database_connection", "ok", &["without TLS, on this machine"]).ran.hides("letmein");
    let management = setup.place().with("TRUSTGATE__STORE__MANAGEMENT_URL", "postgres://me:hunter2@127.0.0.1:1/db");
    let report = Report::of(&management);
    report.shows("management_rights", "failed", &["127.0.0.1:1"]).shows("database_rights", "ok", &[]);
    report.ran.hides("hunter2");
}

#[tokio::test]
async fn redis_examinations_report_an_invalid_mac_key_and_a_failed_connection() {
    let mut redis = Redis::start().await;
    let place = unhurried().with("TRUSTGATE__REDIS__URL", &redis.url());
    place.run(&["migrate"]).done();
    let report = Report::of(&place);
    for name in ["redis_address", "redis_connection", "redis_commands", "redis_notifications", "redis_mac_key"] {
        report.shows(name, "ok", &[]);
    }
    assert_eq!(report.one("redis_mac_key")["found"], "read from the database");

    let key_file = place.write("mac-key", "too short");
    let place = place.with("TRUSTGATE__REDIS__MAC_KEY_FILE", key_file.to_str().unwrap());
    Report::of(&place).shows("redis_mac_key", "failed", &["32 bytes or 64 hexadecimal digits"]);
    place.write("mac-key", &"7".repeat(64));
    let place = place.with("TRUSTGATE__FRESHNESS__NOTIFICATIONS", "false");
    Report::of(&place).shows("redis_mac_key", "ok", &["mac-key"]).shows(
        "redis_notifications",
        "skipped",
        &["freshness.notifications"],
    );

    let place = place.with("TRUSTGATE__FRESHNESS__NOTIFICATIONS", "true");
    let frozen = redis.freeze();
    let report = Report::of(&place);
    report.shows("redis_connection", "failed", &["no answer in time"]);
    report.shows("redis_notifications", "skipped", &["because of redis_connection"]);
    report.shows("redis_mac_key", "ok", &[]).shows("database_reads", "ok", &[]);
    drop(frozen);
    redis.kill();
    Report::of(&place).shows("redis_connection", "failed", &["refused", "start Redis"]);
    let place = place.with("TRUSTGATE__REDIS__URL", "redis://me:hunter2@no.such.host.invalid/");
    let report = Report::of(&place);
    report.shows("redis_address", "failed", &["no.such.host.invalid"]).ran.hides("hunter2");
}

#[tokio::test]
async fn doctor_reports_a_redis_user_that_lacks_a_command() {
    let redis = Redis::start_secured().await;
    let place = unhurried()
        .with("TRUSTGATE__REDIS__URL", &redis.url())
        .with("TRUSTGATE__REDIS__CA_FILE", redis.ca_file().to_str().unwrap());
    place.run(&["migrate"]).done();
    let place = place.with("TRUSTGATE__REDIS__PASSWORD", "hunter2");
    let report = Report::of(&place);
    report.shows("redis_connection", "failed", &["redis.password_file"]).ran.hides("hunter2");
    let place = place.with("TRUSTGATE__REDIS__PASSWORD", USER.1);
    let report = Report::of(&place);
    // Only the deny list needs these commands. The deny list is optional, so the result is a warning.
    report.shows(
        "redis_commands",
        "warning",
        &["the deny list in Redis cannot be read", "HSTRLEN", "docs/configuration.md"],
    );
    report.shows("redis_address", "ok", &["with TLS"]).shows("redis_connection", "ok", &["PING"]);
    report.shows("redis_notifications", "ok", &[]).ran.hides(USER.1);
    redis.ask::<()>(&["ACL", "SETUSER", USER.0, "+time", "+hlen", "+hkeys", "+hstrlen", "+hget"]).await;
    Report::of(&place).shows("redis_commands", "ok", &[]);
    redis.ask::<()>(&["ACL", "SETUSER", USER.0, "-eval", "-publish"]).await;
    let report = Report::of(&place);
    report.shows("redis_commands", "failed", &["EVAL: ", "ACL SETUSER"]).shows("redis_notifications", "warning", &[]);
    assert!(
        !report.one("redis_commands")["found"].as_str().unwrap().contains("SET:"),
        "only refused commands are listed"
    );
}

#[tokio::test]
async fn doctor_examines_the_sqlite_database_file() {
    let place = unhurried();
    let path = place.path().join("trustgate.db");
    let report = Report::of(&place);
    report.shows("database_address", "warning", &["no database at", "`serve` creates it"]);
    report.shows("database_tables", "skipped", &["because of database_address"]);
    assert!(report.ran.code == 0 && !path.exists(), "{:?}", report.ran);

    place.run(&["migrate"]).done();
    let skipped = ["database_rights", "management_rights", "database_clock", "database_notifications"];
    Report::of(&place).is_ok_except(&[&FILES[..], &WITHOUT_REDIS, &skipped].concat());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    Report::of(&place).shows("database_address", "warning", &["mode 644", "chmod 600"]);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    sqlite(&path, "DROP TRIGGER api_key_delete").await;
    Report::of(&place).shows(
        "database_watch",
        "failed",
        &["the trigger api_key_delete is missing", "trustgate migrate"],
    );
    fs::write(&path, "notes that are longer than the header of a database file".repeat(50)).unwrap();
    let report = Report::of(&place);
    assert_eq!(report.ran.code, 1, "{:?}", report.ran);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    Report::of(&place).shows("database_tables", "warning", &["`serve` creates or upgrades the tables when it starts"]);
}

async fn sqlite(path: &Path, sql: &'static str) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    sqlx::Connection::close(connection).await.unwrap();
}

#[test]
fn doctor_lists_configuration_errors_and_still_runs_independent_examinations() {
    let place = unhurried();
    place.run(&["migrate"]).done();
    place.write(
        "t.toml",
        "[credential]\npepper_file = \"/nowhere/pepper\"\n[redis]\nurl = \"http://:hunter2@h\"\n[grpc]\nsocket_mode = \
         \"rw\"\n",
    );
    let place = place.with("TRUSTGATE_CONFIG", "t.toml");
    let report = Report::of(&place);
    let config_errors = [
        "t.toml:2: credential.pepper_file: cannot read /nowhere/pepper",
        "t.toml:4: redis.url: expected",
        "grpc.socket_mode",
    ];
    report.shows("configuration", "failed", &config_errors).shows(
        "pepper",
        "skipped",
        &["because of this configuration error: t.toml:2"],
    );
    report.shows("redis_connection", "skipped", &["redis.url"]).shows("tls", "skipped", &["grpc.socket_mode"]);
    report.shows("database_reads", "ok", &[]).shows("deadlines", "skipped", &["redis.url"]);
    report.ran.hides("hunter2");

    let report = Report::of(&place.with("TRUSTGATE_CONFIG", "nowhere.toml"));
    report.shows("configuration", "failed", &["nowhere.toml (named by TRUSTGATE_CONFIG)"]);
    report.shows("database_address", "skipped", &["the configuration file cannot be read"]);
}

#[test]
fn doctor_examines_deadlines_the_deny_file_and_the_pepper() {
    let place = unhurried();
    place.run(&["migrate"]).done();
    let margin = place.with("TRUSTGATE__DECISION__ENVOY_TIMEOUT", "50010ms");
    Report::of(&margin).shows("deadlines", "warning", &["is longer by 10ms", "decision.deadline"]);
    margin.write("denied", "key 00000000-0000-0000-0000-000000000001\nnonsense\n");
    let place = margin.with("TRUSTGATE__FRESHNESS__DENY_FILE", "denied");
    Report::of(&place).shows("deny_file", "failed", &["line 2"]);
    place.write("pepper", "hunter2-hunter2-hunter2");
    let place = place.with("TRUSTGATE__CREDENTIAL__PEPPER_FILE", "pepper");
    Report::of(&place).shows("pepper", "ok", &["a pepper and 0 previous peppers are set"]).ran.hides("hunter2");
}

#[test]
fn doctor_reports_a_listener_certificate_that_is_invalid_or_does_not_match_its_key() {
    let place = unhurried()
        .with("TRUSTGATE__GRPC__TLS_CERTIFICATE_FILE", "server.pem")
        .with("TRUSTGATE__GRPC__TLS_KEY_FILE", "server.key");
    place.run(&["migrate"]).done();
    Report::of(&place).shows("tls", "failed", &["grpc.tls_certificate_file", "server.pem"]);
    let now = OffsetDateTime::now_utc();
    let (years, days) = (time::Duration::days(400), time::Duration::days(10));
    for (begins, ends, state, text) in [
        (now - years, now + years, "ok", "for 399 days"),
        (now - years, now + days, "warning", "renew the certificate"),
        (date_time_ymd(2019, 1, 1), date_time_ymd(2020, 1, 2), "failed", "expired at 2020-01-02T00:00:00Z"),
        (now + days, now + years, "failed", "valid only from"),
    ] {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (begins, ends);
        let key = KeyPair::generate().unwrap();
        place.write("server.pem", &params.self_signed(&key).unwrap().pem());
        place.write("server.key", &key.serialize_pem());
        Report::of(&place).shows("tls", state, &[text]);
    }
    place.write("server.key", &KeyPair::generate().unwrap().serialize_pem());
    Report::of(&place).shows("tls", "failed", &["grpc.tls_key_file"]);
}
