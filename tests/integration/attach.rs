//! Tests `trustgate attach` and `detach` on an existing table: the triggers record each change that decisions depend
//! on, the application needs no rights on trustgate's tables, and `detach` leaves nothing behind.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use trustgate::testing::{
    base::{
        clock::{DatabaseTime, SystemClock},
        secret::Secret,
        settings::{RawValue, Setting},
    },
    record::{ApiKeyDigest, Change, ChangeKind, Digests, KeyId, Version},
    store::{self, Missing, PollError, Source, StoreError, StoreSettings, TableName},
};
use uuid::Uuid;

use crate::{program::Place, support::postgres::Postgres};

/// A database with an application's table. The role `…-owner` owns this table, and the role `…-app` writes to it.
/// Neither role has any right on trustgate's tables, which belong to the role `…-gate`. The role `…-serve` reads the
/// application's table and trustgate's tables.
struct AppDb {
    server: Arc<Postgres>,
    name: String,
    place: Place,
}

const TABLE: &str = "
CREATE SCHEMA hospital;
CREATE TABLE hospital.trust (
    id uuid PRIMARY KEY, api_key_hash char(64) UNIQUE, revoked_at timestamptz, seen_at timestamptz, note text
);
CREATE INDEX ON hospital.trust (api_key_hash) WHERE api_key_hash IS NOT NULL;
";

impl AppDb {
    async fn new() -> Self {
        Self::with(TABLE).await
    }

    async fn with(table: &str) -> Self {
        let server = Postgres::shared().await;
        let name = server.database().await;
        for role in ["owner", "app", "gate", "serve"] {
            server.execute(&name, &format!("CREATE ROLE \"{name}-{role}\" LOGIN")).await;
        }
        server.execute(&name, &format!("GRANT CREATE ON DATABASE {name} TO \"{name}-owner\", \"{name}-gate\"")).await;
        let place = Place::new()
            .with("TRUSTGATE__STORE__URL", &server.url(&format!("{name}-serve"), &name))
            .with("TRUSTGATE__STORE__MANAGEMENT_URL", &server.url(&format!("{name}-gate"), &name))
            .with("TRUSTGATE__STORE__TABLE", "hospital.trust")
            .with("TRUSTGATE__STORE__TABLE_REVOKED_AT", "revoked_at")
            .with("TRUSTGATE__STORE__ATTACHED", "true");
        let app_db = Self { server, name, place };
        app_db.run("owner", table).await;
        app_db.run("owner", &format!("GRANT USAGE ON SCHEMA hospital TO \"{0}-app\"", app_db.name)).await;
        let rights = "SELECT, INSERT, UPDATE, DELETE, TRUNCATE";
        app_db.run("owner", &format!("GRANT {rights} ON hospital.trust TO \"{}-app\"", app_db.name)).await;
        app_db.place.run(&["migrate"]).done();
        let roles =
            ["--serve-role", &format!("{}-serve", app_db.name), "--manage-role", &format!("{}-gate", app_db.name)];
        let grants = app_db.place.run(&[&["migrate", "--print-grants"], &roles[..]].concat()).done().out;
        app_db.server.execute(&app_db.name, &grants).await;
        app_db
    }

    async fn as_role(&self, role: &str) -> PgConnection {
        let options: PgConnectOptions = self.server.url(&format!("{}-{role}", self.name), &self.name).parse().unwrap();
        PgConnection::connect_with(&options).await.unwrap()
    }

    async fn run(&self, role: &str, sql: &str) {
        execute(&mut self.as_role(role).await, sql).await;
    }

    /// Runs each part of the printed statements as the role that the comment before the part names.
    async fn run_printed(&self, command: &str) {
        let printed = self.place.run(&[command, "--print"]).done().out;
        let parts: Vec<_> = printed.split("-- As the owner of ").skip(1).collect();
        assert!(!parts.is_empty(), "{printed}");
        for part in parts {
            let (head, sql) = part.split_once(":\n").unwrap();
            let role = head.rsplit_once(", ").unwrap().1.trim_matches('"').strip_prefix(&format!("{}-", self.name));
            let role = role.unwrap();
            self.run(role, sql).await;
        }
    }

    fn settings(&self) -> StoreSettings {
        let column = |name: &str| Setting::read(&RawValue::One(name.to_owned()));
        StoreSettings {
            url: Some(Secret::new(self.server.url(&format!("{}-serve", self.name), &self.name))),
            table: TableName::read(&RawValue::One("hospital.trust".to_owned())),
            table_revoked_at: column("revoked_at"),
            attached: true,
            read_timeout: std::time::Duration::from_secs(20),
            connect_timeout: std::time::Duration::from_secs(20),
            ..StoreSettings::default()
        }
    }

    async fn lookup(&self) -> Arc<dyn Source> {
        let lookup = store::open_lookup(&self.settings(), &|_| None, Arc::new(SystemClock)).unwrap();
        lookup.prepare(Missing::Refuse).await.unwrap();
        lookup
    }

    /// Opens a lookup on the attached table and examines the triggers. Returns the lookup and the newest version.
    async fn attached_lookup(&self) -> (Arc<dyn Source>, Version) {
        let lookup = self.lookup().await;
        lookup.restore_watch().await.unwrap();
        let newest = lookup.poll(None).await.unwrap().newest.as_of;
        (lookup, newest)
    }
}

async fn execute(connection: &mut PgConnection, sql: &str) {
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Returns the changes recorded after `version`, sorted, and the number of new versions. Advances `version` to the
/// newest version.
async fn recorded(lookup: &Arc<dyn Source>, version: &mut Version) -> (Vec<String>, usize) {
    let polled = lookup.poll(Some(*version)).await.unwrap();
    assert!(polled.triggers_intact && polled.complete, "{polled:?}");
    *version = polled.newest.as_of;
    let mut changes: Vec<_> = polled.changes.iter().map(|(_, change)| format!("{change:?}")).collect();
    changes.sort();
    (changes, polled.versions.len() - 1)
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn digest(number: u128) -> ApiKeyDigest {
    ApiKeyDigest::from_hex(&hash(number)).unwrap()
}

fn hash(number: u128) -> String {
    format!("{number:064x}")
}

fn texts(changes: &[Change]) -> Vec<String> {
    let mut texts: Vec<_> = changes.iter().map(|change| format!("{change:?}")).collect();
    texts.sort();
    texts
}

fn key(number: u128) -> Change {
    Change::Key(KeyId(id(number)))
}

/// Returns statements that an application may run, in this order, and the changes that each statement must record.
fn statements() -> Vec<(String, Vec<Change>)> {
    vec![
        // A row without a digest is not a key yet.
        (format!("INSERT INTO hospital.trust (id) VALUES ('{}')", id(1)), vec![]),
        (
            format!("UPDATE hospital.trust SET api_key_hash = '{}' WHERE id = '{}'", hash(11), id(1)),
            vec![key(1), Change::Absent(digest(11))],
        ),
        (
            format!("INSERT INTO hospital.trust (id, api_key_hash) VALUES ('{}', '{}')", id(2), hash(12)),
            vec![Change::Absent(digest(12))],
        ),
        ("UPDATE hospital.trust SET seen_at = clock_timestamp(), note = 'seen'".to_owned(), vec![]),
        (format!("UPDATE hospital.trust SET api_key_hash = '{}' WHERE id = '{}'", hash(11), id(1)), vec![]),
        (
            format!("UPDATE hospital.trust SET api_key_hash = '{}' WHERE id = '{}'", hash(13), id(1)),
            vec![key(1), Change::Absent(digest(13)), Change::Gone(digest(11))],
        ),
        (
            format!("UPDATE hospital.trust SET api_key_hash = NULL WHERE id = '{}'", id(1)),
            vec![key(1), Change::Gone(digest(13))],
        ),
        (
            format!("UPDATE hospital.trust SET revoked_at = now() WHERE id = '{}'", id(2)),
            vec![key(2), Change::Absent(digest(12)), Change::Gone(digest(12))],
        ),
        (
            format!("UPDATE hospital.trust SET id = '{}', revoked_at = NULL WHERE id = '{}'", id(3), id(2)),
            vec![key(2), key(3), Change::Absent(digest(12))],
        ),
        (
            format!("UPDATE hospital.trust SET revoked_at = 'infinity' WHERE id = '{}'", id(3)),
            vec![key(3), Change::Absent(digest(12))],
        ),
        (
            format!(
                "INSERT INTO hospital.trust (id, api_key_hash) VALUES ('{}', '{}')
                     ON CONFLICT (id) DO UPDATE SET api_key_hash = excluded.api_key_hash",
                id(3),
                hash(14)
            ),
            vec![key(3), Change::Absent(digest(14)), Change::Gone(digest(12))],
        ),
        (
            format!(
                "MERGE INTO hospital.trust t USING (VALUES ('{}'::uuid), ('{}')) AS n (id) ON t.id = n.id
                     WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (n.id, '{}')",
                id(3),
                id(4),
                hash(15)
            ),
            vec![key(3), Change::Gone(digest(14)), Change::Absent(digest(15))],
        ),
        (format!("DELETE FROM hospital.trust WHERE id = '{}'", id(4)), vec![key(4), Change::Gone(digest(15))]),
        (format!("DELETE FROM hospital.trust WHERE id = '{}'", id(1)), vec![key(1)]),
    ]
}

#[tokio::test]
async fn changes_to_an_attached_table_are_recorded_and_last_seen_updates_are_not() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let (lookup, mut seen) = app_db.attached_lookup().await;
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let mut app = app_db.as_role("app").await;
        execute(&mut app, &format!("SET default_transaction_isolation = '{level}'")).await;
        for (sql, changes) in statements() {
            execute(&mut app, &sql).await;
            let versions = usize::from(!changes.is_empty());
            assert_eq!(recorded(&lookup, &mut seen).await, (texts(&changes), versions), "{level}: {sql}");
        }
        let mut copy = app.copy_in_raw("COPY hospital.trust (id, api_key_hash) FROM STDIN").await.unwrap();
        copy.send(format!("{}\t{}\n{}\t\\N\n", id(20), hash(20), id(21)).into_bytes()).await.unwrap();
        copy.finish().await.unwrap();
        assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Absent(digest(20))]), 1), "{level}");
        execute(&mut app, "BEGIN; DELETE FROM hospital.trust; ROLLBACK").await;
        assert_eq!(
            recorded(&lookup, &mut seen).await,
            (vec![], 0),
            "a transaction that is rolled back records nothing"
        );
        execute(&mut app, "TRUNCATE hospital.trust").await;
        // TRUNCATE gives the table a new file, as replacing the table does. A poll cannot distinguish the two, so it
        // stops confirming the lease.
        assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact);
        lookup.restore_watch().await.unwrap();
        let whole = [Change::Whole(ChangeKind::Keys), Change::Whole(ChangeKind::Trusts), Change::Everything];
        assert_eq!(recorded(&lookup, &mut seen).await, (texts(&whole), 2), "{level}");
    }
    let rights = format!(
        "SELECT has_schema_privilege('{0}-app', 'trustgate', 'USAGE') OR has_schema_privilege('{0}-owner', 'trustgate', 'USAGE')",
        app_db.name
    );
    assert!(
        !app_db.server.value::<bool>(&app_db.name, &rights).await,
        "the application and the table owner need no right on trustgate's tables"
    );
}

#[tokio::test]
async fn a_read_of_an_attached_table_returns_the_record_and_its_version() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let (lookup, newest) = app_db.attached_lookup().await;
    let digests = |number| Digests { current: digest(number), older: Vec::new() };
    assert_eq!(lookup.find(&digests(11)).await.unwrap().value, None);
    app_db
        .run(
            "app",
            &format!(
                "INSERT INTO hospital.trust (id, api_key_hash, revoked_at) VALUES ('{}', '{}', 'infinity'), ('{}', '{}', now())",
                id(1), hash(11), id(2), hash(12)
            ),
        )
        .await;
    let good = lookup.find(&digests(11)).await.unwrap();
    let record = good.value.clone().unwrap();
    assert_eq!((record.key_id.0, record.trust_id.0, record.trust_enabled), (id(1), id(1), true));
    assert_eq!((record.revoked_at, record.expires_at), (None, None), "an infinite time counts as unset");
    let polled = lookup.poll(Some(newest)).await.unwrap();
    assert_eq!(
        (good.as_of, good.nonce, good.lineage),
        (polled.newest.as_of, polled.newest.nonce, polled.newest.lineage)
    );
    let revoked = lookup.find_by_id(KeyId(id(2))).await.unwrap();
    assert!(revoked.value.unwrap().revoked_at.is_some());
    assert!(lookup.redis_mac_key().await.unwrap().is_some());
}

#[tokio::test]
async fn detach_restores_the_original_schema() {
    for printed in [true, false] {
        let mut app_db = AppDb::new().await;
        if !printed {
            // Use a role that may run both parts of each command.
            let all = app_db.server.url("admin", &app_db.name);
            app_db.place = app_db.place.with("TRUSTGATE__STORE__MANAGEMENT_URL", &all);
        }
        let schema = || app_db.server.dump(&app_db.name, &["--schema-only"]);
        let before = schema();
        for _ in 0..2 {
            if printed {
                app_db.run_printed("attach").await;
            } else {
                let answer = app_db.place.json(&["attach"]);
                assert_eq!((&answer["table"], &answer["attached"]), (&"hospital.trust".into(), &true.into()));
            }
        }
        let attached = schema();
        assert!(attached.contains("CREATE TRIGGER trustgate_changed") && attached.contains("attached_changed"));
        let (lookup, newest) = app_db.attached_lookup().await;
        if printed {
            app_db.run_printed("detach").await;
        } else {
            assert_eq!(app_db.place.json(&["detach"])["attached"], false);
        }
        assert!(schema() == before, "{}", schema());
        assert!(
            !lookup.poll(Some(newest)).await.unwrap().triggers_intact,
            "the poll detects that the triggers are gone"
        );
        let problem = lookup.restore_watch().await.unwrap_err().to_string();
        assert!(problem.contains("run `trustgate attach`"), "{problem}");
        app_db.run("app", &format!("INSERT INTO hospital.trust (id) VALUES ('{}')", id(1))).await;
    }
}

#[tokio::test]
async fn attach_refuses_a_table_whose_changes_it_cannot_record() {
    let app_db = AppDb::with(
        "CREATE SCHEMA hospital;
         CREATE TABLE hospital.base (id bigint, api_key_hash text, revoked_at timestamp);
         CREATE VIEW hospital.trust AS SELECT * FROM hospital.base;
         CREATE TABLE hospital.hidden (id uuid PRIMARY KEY, api_key_hash text UNIQUE, revoked_at timestamptz);
         ALTER TABLE hospital.hidden ENABLE ROW LEVEL SECURITY",
    )
    .await;
    app_db.place.run(&["attach"]).failed(1, &["hospital.trust cannot be attached", "is a view or a foreign table"]);
    let with_table = |table: &str| Place::new().like(&app_db.place).with("TRUSTGATE__STORE__TABLE", table);
    with_table("hospital.base").run(&["attach"]).failed(
        1,
        &[
            "column \"id\" (store.table_id) has type bigint, not uuid",
            "no index of all rows begins with column \"id\"",
            "no index of all rows begins with column \"api_key_hash\" (store.table_digest)",
            "CREATE INDEX CONCURRENTLY ON \"hospital\".\"base\" (\"api_key_hash\")",
            "column \"revoked_at\" (store.table_revoked_at) has type timestamp without time zone",
        ],
    );
    with_table("hospital.hidden").run(&["attach"]).failed(1, &["has row level security"]);
    with_table("hospital.gone").run(&["attach"]).failed(1, &["there is no such table"]);
    with_table("hospital.hidden")
        .with("TRUSTGATE__STORE__TABLE_TRUST", "tenant")
        .run(&["attach"])
        .failed(1, &["column \"tenant\" (store.table_trust) not found"]);
    let sqlite = Place::new().like(&app_db.place).with("TRUSTGATE__STORE__MANAGEMENT_URL", "sqlite:///nowhere/t.db");
    sqlite.run(&["attach"]).failed(1, &["only a table in PostgreSQL"]);
}

#[tokio::test]
async fn attach_without_the_required_rights_fails_and_suggests_the_print_option() {
    let app_db = AppDb::new().await;
    app_db.place.run(&["attach"]).failed(1, &["hospital.trust", "--print"]);
    let (lookup, newest) = (app_db.lookup().await, Version(1));
    assert!(
        !lookup.poll(Some(newest)).await.is_ok_and(|polled| polled.triggers_intact),
        "the failed attach added no triggers"
    );
}

#[tokio::test]
async fn altered_triggers_end_the_lease_until_attach_restores_them() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    for (harm, text) in [
        ("ALTER TABLE hospital.trust DISABLE TRIGGER trustgate_changed", "is not enabled for every session"),
        ("DROP TRIGGER trustgate_changed ON hospital.trust", "is missing"),
        ("DROP TRIGGER trustgate_truncated ON hospital.trust", "is missing"),
        (
            "ALTER TABLE hospital.trust RENAME TO old;
             CREATE TABLE hospital.trust (LIKE hospital.old INCLUDING ALL);
             DROP TABLE hospital.old",
            "is missing",
        ),
        ("DROP TABLE hospital.trust", "there is no table hospital.trust"),
    ] {
        let (lookup, mut seen) = app_db.attached_lookup().await;
        app_db.run("owner", harm).await;
        assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact, "{harm}");
        let problem = lookup.restore_watch().await.unwrap_err().to_string();
        assert!(problem.contains(text) && problem.contains("run `trustgate attach`"), "{harm}: {problem}");
        if harm.starts_with("DROP TABLE") {
            app_db.run("owner", TABLE.split_once(';').unwrap().1).await;
        }
        app_db.run("owner", &format!("GRANT SELECT ON hospital.trust TO \"{}-serve\"", app_db.name)).await;
        app_db.run_printed("attach").await;
        lookup.restore_watch().await.unwrap();
        let (changes, _) = recorded(&lookup, &mut seen).await;
        assert!(
            changes.contains(&format!("{:?}", Change::Everything)),
            "changes may have passed unrecorded, so everything is out of date: {changes:?}"
        );
    }
}

#[tokio::test]
async fn a_partition_that_is_added_after_attach_receives_the_triggers_automatically() {
    let app_db = AppDb::with(
        "CREATE SCHEMA hospital;
         CREATE TABLE hospital.trust (id uuid, api_key_hash char(64), revoked_at timestamptz, PRIMARY KEY (id))
             PARTITION BY HASH (id);
         CREATE INDEX ON hospital.trust (api_key_hash);
         CREATE TABLE hospital.one PARTITION OF hospital.trust FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
    )
    .await;
    app_db.run_printed("attach").await;
    let (lookup, mut seen) = app_db.attached_lookup().await;
    let part = "CREATE TABLE hospital.two PARTITION OF hospital.trust FOR VALUES WITH (MODULUS 2, REMAINDER 1)";
    app_db.run("owner", part).await;
    assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact, "the new partition has not been examined yet");
    lookup.restore_watch().await.unwrap();
    assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Everything]), 1));
    for number in 1..9 {
        let insert =
            format!("INSERT INTO hospital.trust (id, api_key_hash) VALUES ('{}', '{}')", id(number), hash(number));
        app_db.run("app", &insert).await;
        assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Absent(digest(number))]), 1));
    }
    app_db.run("owner", "TRUNCATE hospital.two").await;
    assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact);
    lookup.restore_watch().await.unwrap();
    assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Everything]), 1));
    app_db.run_printed("detach").await;
    assert!(!app_db.server.dump(&app_db.name, &["--schema-only"]).contains("trustgate.attached_changed()"));
}

#[tokio::test]
async fn renaming_columns_ends_the_lease_and_does_not_break_application_writes() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let rows = [(1, 11), (2, 12)].map(|(row, key)| format!("('{}', '{}', 'infinity')", id(row), hash(key))).join(", ");
    app_db.run("app", &format!("INSERT INTO hospital.trust (id, api_key_hash, revoked_at) VALUES {rows}")).await;
    let (lookup, mut seen) = app_db.attached_lookup().await;
    let digests = |number| Digests { current: digest(number), older: Vec::new() };
    let rename = |from: &str, to: &str| format!("ALTER TABLE hospital.trust RENAME {from} TO {to};");

    // Swapping two columns replaces the digests of all keys without writing a row.
    app_db.run("owner", "ALTER TABLE hospital.trust ADD COLUMN next char(64) UNIQUE").await;
    app_db.run("app", &format!("UPDATE hospital.trust SET next = '{}' WHERE id = '{}'", hash(21), id(1))).await;
    lookup.restore_watch().await.unwrap();
    seen = lookup.poll(Some(seen)).await.unwrap().newest.as_of;
    let swap = [rename("api_key_hash", "old"), rename("next", "api_key_hash")].concat();
    app_db.run("owner", &format!("BEGIN; {swap} COMMIT")).await;
    assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact);
    lookup.restore_watch().await.unwrap();
    assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Everything]), 1));
    assert!(lookup.find(&digests(11)).await.unwrap().value.is_none());
    assert!(lookup.find(&digests(21)).await.unwrap().value.is_some());
    let gone = vec![key(1), Change::Gone(digest(21))];
    app_db.run("app", &format!("DELETE FROM hospital.trust WHERE id = '{}'", id(1))).await;
    assert_eq!(
        recorded(&lookup, &mut seen).await,
        (texts(&gone), 1),
        "the trigger reads the column that now has the name"
    );

    // If a column that decisions need is missing, the trigger cannot compare rows and records `Change::Everything`.
    app_db.run("owner", &rename("revoked_at", "ended_at")).await;
    assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact);
    for sql in [
        format!("UPDATE hospital.trust SET ended_at = now() WHERE id = '{}'", id(2)),
        format!("INSERT INTO hospital.trust (id) VALUES ('{}')", id(3)),
        "DELETE FROM hospital.trust".to_owned(),
    ] {
        app_db.run("app", &sql).await;
        let polled = lookup.poll(Some(seen)).await.unwrap();
        seen = polled.newest.as_of;
        assert!(polled.changes.iter().all(|(_, change)| *change == Change::Everything), "{sql}: {polled:?}");
        assert!(!polled.changes.is_empty(), "{sql}");
    }
    assert!(lookup.find(&digests(21)).await.is_err(), "the lookup cannot read the missing column");
}

#[tokio::test]
async fn row_level_security_that_is_enabled_after_attach_ends_the_lease() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let (lookup, seen) = app_db.attached_lookup().await;
    app_db.run("owner", "ALTER TABLE hospital.trust ENABLE ROW LEVEL SECURITY").await;
    assert!(!lookup.poll(Some(seen)).await.unwrap().triggers_intact);
    let problem = lookup.restore_watch().await.unwrap_err().to_string();
    assert!(problem.contains("ALTER TABLE hospital.trust DISABLE ROW LEVEL SECURITY"), "{problem}");
    app_db.run("owner", "ALTER TABLE hospital.trust DISABLE ROW LEVEL SECURITY").await;
    lookup.restore_watch().await.unwrap();
}

#[tokio::test]
async fn unusual_column_values_are_read_correctly_and_a_duplicate_digest_is_an_error() {
    let app_db = AppDb::with(
        "CREATE SCHEMA hospital;
         CREATE TABLE hospital.trust (
             id uuid PRIMARY KEY, tenant uuid, api_key_hash text, scopes text[],
             starts_at timestamptz, ends_at timestamptz, revoked_at timestamptz
         );
         CREATE INDEX ON hospital.trust (api_key_hash)",
    )
    .await;
    let column = |name: &str| Setting::read(&RawValue::One(name.to_owned()));
    let settings = StoreSettings {
        attached: false,
        table_trust: column("tenant").unwrap(),
        table_scopes: column("scopes"),
        table_not_before: column("starts_at"),
        table_expires_at: column("ends_at"),
        ..app_db.settings()
    };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    let own = |number| format!("'{}', '{}', '{}'", id(number), id(90), hash(number));
    let rows = [
        format!("({}, '{{read,NULL,write,\"read admin\",\"\"}}', '-infinity', 'infinity', 'infinity')", own(1)),
        format!("({}, NULL, 'infinity', '-infinity', '-infinity')", own(2)),
        format!("({}, '{{{{read}},{{write}}}}', '294276-12-31', '4713-01-01 BC', NULL)", own(3)),
        format!("('{}', NULL, '{}', NULL, NULL, NULL, NULL)", id(4), hash(4)),
        format!("({}, NULL, NULL, NULL, NULL)", own(5)),
        format!("('{}', '{}', '{}', NULL, NULL, NULL, NULL)", id(6), id(90), hash(5)),
    ];
    app_db.run("app", &format!("INSERT INTO hospital.trust VALUES {}", rows.join(", "))).await;
    let found = async |number| {
        let digests = Digests { current: digest(number), older: Vec::new() };
        lookup.find(&digests).await.map(|versioned| versioned.value)
    };
    let now = DatabaseTime::from_micros(1_700_000_000_000_000);
    let good = found(1).await.unwrap().unwrap();
    assert_eq!((good.not_before, good.expires_at, good.revoked_at), (None, None, None));
    assert_eq!(good.scopes.iter().map(|scope| &**scope).collect::<Vec<_>>(), ["read", "write"]);
    let bad = found(2).await.unwrap().unwrap();
    assert!(bad.not_before > Some(now) && bad.expires_at.unwrap() < now && bad.revoked_at.is_some(), "{bad:?}");
    let far = found(3).await.unwrap().unwrap();
    assert!(far.not_before > Some(now) && far.expires_at.unwrap() < now && far.scopes.len() == 2, "{far:?}");
    assert_eq!(found(4).await.unwrap(), None, "a row without a trust is not a key");
    let twice = found(5).await.unwrap_err();
    assert!(twice.is_answer() && !twice.blames_tier(), "{twice}");
}

#[tokio::test]
async fn attach_reports_conflicting_triggers_missing_indexes_and_an_already_attached_table() {
    let app_db = AppDb::with(&format!(
        "{TABLE}
         CREATE FUNCTION hospital.theirs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER trustgate_changed AFTER INSERT ON hospital.trust EXECUTE FUNCTION hospital.theirs();
         CREATE TABLE hospital.other (id uuid PRIMARY KEY, api_key_hash text, revoked_at timestamptz);
         CREATE INDEX ON hospital.other (api_key_hash) WHERE revoked_at IS NULL"
    ))
    .await;
    app_db
        .place
        .run(&["attach"])
        .failed(1, &["hospital.trust already has a different trigger named trustgate_changed"]);
    let other = Place::new().like(&app_db.place).with("TRUSTGATE__STORE__TABLE", "hospital.other");
    other.run(&["attach"]).failed(1, &["no index of all rows begins with column \"api_key_hash\""]);
    app_db.run("owner", "DROP TRIGGER trustgate_changed ON hospital.trust").await;
    app_db.run_printed("attach").await;
    other.run(&["detach"]).failed(1, &["hospital.trust is attached, not hospital.other"]);
    other.run(&["attach"]).failed(1, &["hospital.trust is attached, and only one table can be"]);
    app_db.attached_lookup().await;
}

#[tokio::test]
async fn migrate_restores_trustgate_table_triggers_even_if_the_attached_table_lacks_its_trigger() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    app_db.run("owner", "DROP TRIGGER trustgate_changed ON hospital.trust").await;
    app_db.run("gate", "DROP TRIGGER trustgate_changed ON trustgate.api_key").await;
    app_db.place.run(&["migrate"]).done();
    let lookup = app_db.lookup().await;
    let problem = lookup.restore_watch().await.unwrap_err().to_string();
    assert!(problem.contains("hospital.trust is missing: run `trustgate attach`"), "{problem}");
    app_db.run_printed("attach").await;
    app_db.attached_lookup().await;
}

#[tokio::test]
async fn a_replica_whose_columns_differ_from_the_attached_columns_has_no_lease() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let (lookup, newest) = app_db.attached_lookup().await;
    assert!(lookup.poll(Some(newest)).await.unwrap().triggers_intact);
    let settings = StoreSettings { table_revoked_at: None, ..app_db.settings() };
    let other = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    other.prepare(Missing::Refuse).await.unwrap();
    assert!(!other.poll(Some(newest)).await.unwrap().triggers_intact);
    assert!(other.restore_watch().await.unwrap_err().to_string().contains("run `trustgate attach`"));
}

#[tokio::test]
async fn cache_clear_works_and_trust_create_is_refused_for_an_attached_table() {
    let app_db = AppDb::new().await;
    app_db.run_printed("attach").await;
    let (lookup, mut seen) = app_db.attached_lookup().await;
    app_db.place.run(&["cache", "clear"]).done();
    assert_eq!(recorded(&lookup, &mut seen).await, (texts(&[Change::Everything]), 1));
    app_db.place.run(&["trust", "create", "acme"]).failed(1, &["your existing table", "store.table is set in"]);
    app_db.place.run(&["migrate"]).done();
}

#[tokio::test]
async fn attach_before_migrate_fails_and_suggests_migrate() {
    let server = Postgres::shared().await;
    let name = server.database().await;
    server.execute(&name, TABLE).await;
    let place = Place::new()
        .with("TRUSTGATE__STORE__URL", &server.url("admin", &name))
        .with("TRUSTGATE__STORE__TABLE", "hospital.trust");
    place.run(&["attach"]).failed(1, &["run `trustgate migrate`"]);
    place.run(&["migrate"]).failed(1, &["which trustgate does not change"]);
    let attached = place.with("TRUSTGATE__STORE__ATTACHED", "true");
    let settings = StoreSettings {
        url: Some(Secret::new(server.url("admin", &name))),
        table: TableName::read(&RawValue::One("hospital.trust".to_owned())),
        attached: true,
        ..StoreSettings::default()
    };
    let lookup = store::open_lookup(&settings, &|_| None, Arc::new(SystemClock)).unwrap();
    assert!(matches!(lookup.prepare(Missing::Refuse).await, Err(StoreError::Schema(_))));
    assert!(matches!(lookup.poll(None).await, Err(PollError::Unusable(_))));
    attached.run(&["migrate"]).done();
    attached.run(&["attach"]).done();
    lookup.prepare(Missing::Refuse).await.unwrap();
}
