//! Tests the contract of a store. Each test runs on SQLite and on PostgreSQL.

use std::{collections::HashSet, future::poll_fn, path::PathBuf, pin::pin, sync::Arc, task::Poll, time::Duration};

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio_util::sync::CancellationToken;
use trustgate::testing::{
    base::{
        clock::{DatabaseTime, SystemClock},
        fault::{Fault, Tier},
        secret::Secret,
    },
    record::{
        ApiKeyDigest, Change, Digests, Fingerprint, KeyId, Lineage, Made, Nonce, StoredPeppers, TrustId, Version,
        Versioned,
    },
    store::{
        self, Actor, Heartbeat, Ledger, Missing, PollError, Preset, Source, StoreError, StoreSettings,
        ledger::{NewKey, TrustRef},
    },
};
use uuid::Uuid;

use crate::support::postgres::Postgres;

macro_rules! contract {
    ($($name:ident)+) => {
        mod sqlite {
            $( #[tokio::test] async fn $name() { super::$name(super::Db::sqlite()).await; } )+
        }
        mod postgres {
            $( #[tokio::test] async fn $name() { super::$name(super::Db::postgres().await).await; } )+
        }
    };
}

contract! {
    reads_of_known_and_unknown_keys_have_a_version
    a_key_stored_under_an_older_scheme_is_found
    a_record_and_its_version_are_from_one_snapshot
    the_fields_that_a_decision_needs_are_returned_as_stored
    only_keys_with_the_recorded_pepper_are_accepted
    servers_without_a_pepper_stay_compatible_after_the_first_peppered_key
    imported_digests_do_not_count_as_keys_without_a_pepper
    a_check_records_the_pepper_of_an_older_key
    a_trust_is_disabled_enabled_and_deleted_with_its_keys
    trust_names_and_key_digests_are_unique
    a_repeated_import_skips_stored_keys
    identifying_a_key_does_not_reveal_its_digest
    a_second_revocation_keeps_the_time_of_the_first
    clearing_the_caches_creates_a_version_with_a_new_nonce
    each_change_records_the_cache_entries_that_it_makes_out_of_date
    the_first_poll_returns_the_changes_of_the_last_15_minutes
    old_versions_are_pruned_and_the_newest_is_kept
    a_lost_lineage_is_replaced_once
    restoring_intact_triggers_creates_no_version
    a_change_and_its_audit_entry_are_one_transaction
    replicas_that_send_heartbeats_are_listed
    an_existing_table_is_read_and_not_changed
    a_missing_column_of_an_existing_table_is_reported_at_startup
    tables_that_are_too_new_are_refused_and_newer_compatible_tables_are_used
    repeated_and_concurrent_migrations_have_the_effect_of_one
    a_row_that_cannot_be_read_is_a_fault
    a_dropped_ledger_call_leaves_no_partial_change
}

/// An empty database.
struct Db {
    settings: StoreSettings,
    backend: Backend,
}

enum Backend {
    Sqlite { path: PathBuf, _dir: tempfile::TempDir },
    Postgres { server: Arc<Postgres>, database: String },
}

impl Db {
    fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/trustgate.db");
        let url = Some(Secret::new(format!("sqlite://{}", path.display())));
        Self { settings: StoreSettings { url, ..unhurried() }, backend: Backend::Sqlite { path, _dir: dir } }
    }

    async fn postgres() -> Self {
        let server = Postgres::shared().await;
        let database = server.database().await;
        // With this `search_path`, the tests can use the same table names on both databases.
        server.execute("postgres", &format!("ALTER DATABASE {database} SET search_path = trustgate, public")).await;
        let url = Some(Secret::new(server.url("admin", &database)));
        Self { settings: StoreSettings { url, ..unhurried() }, backend: Backend::Postgres { server, database } }
    }

    /// Creates trustgate's tables.
    async fn migrated(self) -> Self {
        store::migrate(&self.settings, NO_ENV).await.unwrap();
        self
    }

    async fn lookup(&self) -> Arc<dyn Source> {
        let lookup = self.open();
        lookup.prepare(Missing::Refuse).await.unwrap();
        lookup
    }

    fn open(&self) -> Arc<dyn Source> {
        store::open_lookup(&self.settings, NO_ENV, Arc::new(SystemClock)).unwrap()
    }

    async fn ledger(&self) -> Ledger {
        store::open_ledger(&self.settings, NO_ENV).await.unwrap()
    }

    /// Runs SQL on the database, on a separate connection.
    async fn execute(&self, sql: &str) {
        match &self.backend {
            Backend::Postgres { server, database } => server.execute(database, sql).await,
            Backend::Sqlite { path, .. } => {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
                let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }

    /// Runs a query and returns the first column of each row as a string.
    async fn texts(&self, sql: &str) -> Vec<String> {
        match &self.backend {
            Backend::Postgres { server, database } => {
                let rows =
                    sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut server.admin(database).await).await.unwrap();
                rows.iter().map(|row| row.get(0)).collect()
            }
            Backend::Sqlite { path, .. } => {
                let options = SqliteConnectOptions::new().filename(path);
                let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
                let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
                rows.iter().map(|row| row.get(0)).collect()
            }
        }
    }

    fn is_postgres(&self) -> bool {
        matches!(self.backend, Backend::Postgres { .. })
    }
}

const NO_ENV: store::Env<'static> = &|_| None;

/// Returns settings with timeouts that are long enough for a busy machine.
fn unhurried() -> StoreSettings {
    let second = Duration::from_secs(1);
    StoreSettings { read_timeout: 20 * second, connect_timeout: 20 * second, ..StoreSettings::default() }
}

fn actor() -> Actor {
    Actor("test:operator".into())
}

fn digest(number: u8) -> ApiKeyDigest {
    ApiKeyDigest::from_bytes([number; 32])
}

fn only(current: ApiKeyDigest) -> Digests {
    Digests { current, older: Vec::new() }
}

const PEPPER: Fingerprint = Fingerprint([0xAB; 8]);
const OTHER_PEPPER: Fingerprint = Fingerprint([0x0C; 8]);

fn new_key(number: u8) -> NewKey {
    NewKey {
        id: KeyId(Uuid::from_u128(u128::from(number))),
        digest: digest(number),
        older: Vec::new(),
        made: Made::Elsewhere,
        hint: "tg_abcde".into(),
        name: None,
        scopes: Vec::new(),
        allowed_cidrs: Vec::new(),
        not_before: None,
        expires_in: None,
    }
}

async fn newest(lookup: &Arc<dyn Source>) -> Versioned<()> {
    lookup.poll(None).await.unwrap().newest
}

fn acme() -> TrustRef {
    TrustRef::Name("acme".into())
}

async fn with_acme(ledger: &mut Ledger) -> TrustId {
    ledger.create_trust(&actor(), TrustId(Uuid::new_v4()), "acme").await.unwrap().id
}

async fn reads_of_known_and_unknown_keys_have_a_version(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    let trust = with_acme(&mut ledger).await;
    let before = ledger.now().await.unwrap();
    ledger.add_key(&actor(), &acme(), new_key(1)).await.unwrap();

    let found = lookup.find(&only(digest(1))).await.unwrap();
    let absent = lookup.find(&only(digest(2))).await.unwrap();
    let after = ledger.now().await.unwrap();
    let record = found.value.expect("stored");
    assert_eq!((record.key_id, record.trust_id, record.digest), (new_key(1).id, trust, digest(1)));
    assert!(record.trust_enabled);
    assert_eq!(absent.value, None);

    let by_id = lookup.find_by_id(new_key(1).id).await.unwrap();
    assert_eq!(by_id.value, Some(record));
    assert_eq!(lookup.find_by_id(new_key(2).id).await.unwrap().value, None);
    let newest = newest(&lookup).await;
    for (as_of, nonce, lineage, read_at) in [
        (found.as_of, found.nonce, found.lineage, found.read_at),
        (absent.as_of, absent.nonce, absent.lineage, absent.read_at),
        (by_id.as_of, by_id.nonce, by_id.lineage, before),
    ] {
        assert_eq!((as_of, nonce, lineage), (newest.as_of, newest.nonce, newest.lineage));
        assert!(read_at >= before && read_at <= after, "{before:?} {read_at:?} {after:?}");
    }
    assert!(newest.as_of >= Version(1));
    assert_ne!(newest.nonce, Nonce::default());
    assert_ne!(newest.lineage.incarnation, Uuid::nil());
    assert_eq!(newest.lineage.timeline, u32::from(db.is_postgres()));
    assert_eq!(newest.lineage.system != 0, db.is_postgres());
    lookup.close().await;
    assert!(matches!(lookup.find(&only(digest(1))).await, Err(Fault::Ended)));
}

async fn a_key_stored_under_an_older_scheme_is_found(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    for number in [7, 8] {
        ledger.add_key(&actor(), &acme(), new_key(number)).await.unwrap();
    }
    let find = async |current, older: &[u8]| {
        let digests = Digests { current: digest(current), older: older.iter().copied().map(digest).collect() };
        lookup.find(&digests).await.unwrap().value.map(|record| record.digest)
    };
    assert_eq!(find(1, &[2, 7]).await, Some(digest(7)));
    assert_eq!(find(8, &[7]).await, Some(digest(8)), "the current scheme takes precedence");
    assert_eq!(find(7, &[8]).await, Some(digest(7)), "the current scheme takes precedence");
    assert_eq!(find(1, &[2, 3]).await, None);
}

async fn a_record_and_its_version_are_from_one_snapshot(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    ledger.add_key(&actor(), &acme(), new_key(1)).await.unwrap();
    let issued = newest(&lookup).await.as_of;
    let stop = CancellationToken::new();
    let reading = tokio::spawn({
        let (lookup, stop) = (Arc::clone(&lookup), stop.clone());
        async move {
            let mut seen = Vec::new();
            while !stop.is_cancelled() {
                for found in [lookup.find(&only(digest(1))).await, lookup.find_by_id(new_key(1).id).await] {
                    let found = found.unwrap();
                    seen.push((found.as_of, found.value.unwrap().revoked_at.is_some()));
                }
            }
            seen
        }
    });
    let time = if db.is_postgres() { "now()" } else { "1" };
    for _ in 0..150 {
        db.execute(&format!("UPDATE api_key SET revoked_at = {time}")).await;
        db.execute("UPDATE api_key SET revoked_at = NULL").await;
    }
    stop.cancel();
    let seen = reading.await.unwrap();
    // The key is active at first and then alternates between revoked and active.
    let versions: Vec<_> = lookup.poll(Some(issued)).await.unwrap().versions.into_iter().map(|(of, _)| of).collect();
    assert_eq!(versions.len(), 301);
    for (as_of, revoked) in &seen {
        let turn = versions.iter().position(|version| version == as_of).unwrap();
        assert_eq!(*revoked, turn % 2 == 1, "read at version {turn} after it was issued");
    }
    let distinct: HashSet<_> = seen.iter().map(|(as_of, _)| as_of.0).collect();
    assert!(distinct.len() > 50, "{} reads saw {} versions", seen.len(), distinct.len());
}

async fn only_keys_with_the_recorded_pepper_are_accepted(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    let under = |number, made| NewKey { made, ..new_key(number) };
    let (first, second) = (Made::Peppered(PEPPER), Made::Peppered(OTHER_PEPPER));
    assert_eq!(lookup.poll(None).await.unwrap().peppers, StoredPeppers::default());
    ledger.add_key(&actor(), &acme(), under(1, first)).await.unwrap();
    let stored = |current, previous| StoredPeppers { current, previous };
    assert_eq!(lookup.poll(None).await.unwrap().peppers, stored(Some(PEPPER), None));
    // trustgate does not record a pepper for an imported digest, so it accepts the digest under any current pepper.
    ledger.import_keys(&actor(), &acme(), vec![new_key(2)]).await.unwrap();
    for (made, number) in [(second, 3), (Made::Plain, 4)] {
        let refused = ledger.add_key(&actor(), &acme(), under(number, made)).await;
        assert!(matches!(refused, Err(StoreError::OtherPepper { recorded: PEPPER, .. })), "{refused:?}");
        let refused = ledger.import_keys(&actor(), &acme(), vec![under(number, made)]).await;
        assert!(matches!(refused, Err(StoreError::OtherPepper { recorded: PEPPER, .. })), "{refused:?}");
    }
    assert_eq!(ledger.keys(None).await.unwrap().len(), 2);
    assert_eq!(ledger.use_pepper(&actor(), OTHER_PEPPER).await.unwrap(), Some(PEPPER));
    assert_eq!(
        ledger.use_pepper(&actor(), OTHER_PEPPER).await.unwrap(),
        Some(OTHER_PEPPER),
        "the second call changes nothing"
    );
    assert_eq!(lookup.poll(None).await.unwrap().peppers, stored(Some(OTHER_PEPPER), Some(PEPPER)));
    assert!(ledger.add_key(&actor(), &acme(), under(5, first)).await.is_err());
    ledger.add_key(&actor(), &acme(), under(6, second)).await.unwrap();
    let keys = ledger.keys(None).await.unwrap();
    let mut peppers: Vec<_> = keys.iter().map(|key| key.pepper).collect();
    peppers.sort_unstable();
    assert_eq!(peppers, [None, Some(OTHER_PEPPER), Some(PEPPER)]);
    for (known, others) in [
        (&[][..], 2),
        (&[PEPPER], 1),
        (&[OTHER_PEPPER], 1),
        (&[OTHER_PEPPER, PEPPER], 0),
        (&[Fingerprint([0xFF; 8])], 2),
        (&[Fingerprint([0; 8])], 2),
    ] {
        assert_eq!(lookup.tend_peppers(known).await.unwrap().others, others, "{known:?}");
    }
    let revoked = keys.iter().find(|key| key.pepper == Some(PEPPER)).unwrap().id;
    ledger.revoke_key(&actor(), revoked).await.unwrap();
    assert_eq!(lookup.tend_peppers(&[OTHER_PEPPER]).await.unwrap().others, 0, "only active keys count");
}

async fn servers_without_a_pepper_stay_compatible_after_the_first_peppered_key(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    ledger.add_key(&actor(), &acme(), NewKey { made: Made::Plain, ..new_key(1) }).await.unwrap();
    assert_eq!(lookup.poll(None).await.unwrap().peppers, StoredPeppers::default());
    ledger.add_key(&actor(), &acme(), NewKey { made: Made::Peppered(PEPPER), ..new_key(2) }).await.unwrap();
    let peppers = lookup.poll(None).await.unwrap().peppers;
    assert_eq!(peppers, StoredPeppers { current: Some(PEPPER), previous: Some(Fingerprint::NO_PEPPER) });
    assert!(peppers.fit(&[]) && peppers.fit(&[PEPPER]) && !peppers.fit(&[OTHER_PEPPER]));
}

async fn imported_digests_do_not_count_as_keys_without_a_pepper(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    let imported = NewKey { hint: String::new(), ..new_key(1) };
    ledger.import_keys(&actor(), &acme(), vec![imported]).await.unwrap();
    assert_eq!(lookup.poll(None).await.unwrap().peppers, StoredPeppers::default());
    ledger.add_key(&actor(), &acme(), NewKey { made: Made::Peppered(PEPPER), ..new_key(3) }).await.unwrap();
    let peppers = lookup.poll(None).await.unwrap().peppers;
    assert_eq!(peppers, StoredPeppers { current: Some(PEPPER), previous: None });
}

async fn a_check_records_the_pepper_of_an_older_key(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    for number in 1..=3 {
        ledger.add_key(&actor(), &acme(), NewKey { made: Made::Peppered(PEPPER), ..new_key(number) }).await.unwrap();
    }
    // Imitate an earlier release, which stored keys without a pepper fingerprint.
    let tables = if db.is_postgres() { "trustgate." } else { "" };
    db.execute(&format!("UPDATE {tables}api_key SET pepper_fingerprint = NULL")).await;
    db.execute(&format!("UPDATE {tables}meta SET pepper_fingerprint = NULL")).await;
    let before = lookup.poll(None).await.unwrap().newest.as_of;
    // Look up the first key by its digest under the current pepper and the second key by its digest under the previous
    // pepper. No lookup reads the third key.
    let found = lookup.find(&Digests { current: digest(1), older: vec![digest(9)] }).await.unwrap();
    assert!(found.value.is_some());
    let found = lookup.find(&Digests { current: digest(8), older: vec![digest(2)] }).await.unwrap();
    assert!(found.value.is_some());
    let tended = lookup.tend_peppers(&[OTHER_PEPPER, PEPPER]).await.unwrap();
    assert!(tended.others == 0 && tended.unrecorded.is_none(), "{tended:?}");
    let keys = ledger.keys(None).await.unwrap();
    let pepper = |number| keys.iter().find(|key| key.id == KeyId(Uuid::from_u128(number))).unwrap().pepper;
    assert_eq!([pepper(1), pepper(2), pepper(3)], [Some(OTHER_PEPPER), Some(PEPPER), None]);
    let polled = lookup.poll(None).await.unwrap();
    assert_eq!(polled.newest.as_of, before, "no decision reads the fingerprint, so there is no new version");
    assert_eq!(polled.peppers.current, Some(OTHER_PEPPER), "a key was found under the server's current pepper");
    // A later lookup does not replace a recorded pepper.
    lookup.find(&Digests { current: digest(1), older: Vec::new() }).await.unwrap();
    lookup.tend_peppers(&[PEPPER]).await.unwrap();
    let key = ledger.key(KeyId(Uuid::from_u128(1))).await.unwrap();
    assert_eq!(key.pepper, Some(OTHER_PEPPER));
}

async fn the_fields_that_a_decision_needs_are_returned_as_stored(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    let trust = with_acme(&mut ledger).await;
    let not_before = DatabaseTime::from_micros(1_700_000_000_123_456);
    let key = NewKey {
        name: Some("for 'invoices'; \\ \"x\"".into()),
        made: Made::Peppered(PEPPER),
        scopes: vec!["a:read".into(), "ü\"',{}".into()],
        allowed_cidrs: ["10.1.2.3/8", "2001:db8::/32", "192.0.2.7/32"].map(|cidr| cidr.parse().unwrap()).to_vec(),
        not_before: Some(not_before),
        expires_in: Some(Duration::from_hours(1)),
        ..new_key(1)
    };
    let before = ledger.now().await.unwrap();
    let stored = ledger.add_key(&actor(), &acme(), key.clone()).await.unwrap();
    let after = ledger.now().await.unwrap();
    assert_eq!((stored.id, stored.trust_id, &*stored.trust_name, stored.trust_enabled), (key.id, trust, "acme", true));
    assert_eq!((stored.hint, stored.scheme, stored.name), (key.hint, key.made.scheme(), key.name));
    assert_eq!((stored.not_before, stored.revoked_at, stored.pepper), (Some(not_before), None, Some(PEPPER)));
    assert!(stored.created_at >= before && stored.created_at <= after);

    let record = lookup.find(&only(digest(1))).await.unwrap().value.expect("stored");
    assert_eq!(*record.scopes, key.scopes);
    let networks: Vec<String> = record.allowed_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(networks, ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"]);
    assert_eq!((&*stored.scopes, &*stored.allowed_cidrs), (&*record.scopes, &*record.allowed_cidrs));
    assert_eq!((record.not_before, record.revoked_at), (Some(not_before), None));
    let expires = record.expires_at.expect("set");
    let hour = Duration::from_hours(1);
    assert!(expires >= before.after(hour) && expires <= after.after(hour), "{expires:?}");
    assert_eq!(stored.expires_at, Some(expires));

    // The longest duration still yields a valid time.
    let endless = NewKey { expires_in: Some(Duration::MAX), ..new_key(2) };
    assert!(ledger.add_key(&actor(), &acme(), endless).await.unwrap().expires_at > Some(expires));
}

async fn a_trust_is_disabled_enabled_and_deleted_with_its_keys(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    let id = with_acme(&mut ledger).await;
    ledger.create_trust(&actor(), TrustId(Uuid::new_v4()), "Zebra").await.unwrap();
    ledger.add_key(&actor(), &TrustRef::Id(id), new_key(1)).await.unwrap();
    ledger.add_key(&actor(), &acme(), new_key(2)).await.unwrap();

    let trust = ledger.trust(&acme()).await.unwrap();
    assert_eq!((trust.id, trust.enabled, trust.keys), (id, true, 2));
    assert_eq!(ledger.trust(&TrustRef::Id(id)).await.unwrap(), trust);
    let mut names: Vec<_> = ledger.trusts().await.unwrap().into_iter().map(|trust| trust.name).collect();
    names.sort();
    assert_eq!(names, ["Zebra", "acme"]);
    assert_eq!(ledger.keys(Some(&acme())).await.unwrap().len(), 2);
    assert_eq!(ledger.keys(None).await.unwrap().len(), 2);
    assert_eq!(ledger.keys(Some(&TrustRef::Name("Zebra".into()))).await.unwrap(), []);

    assert!(!ledger.enable_trust(&actor(), &acme(), false).await.unwrap().enabled);
    assert!(!lookup.find(&only(digest(1))).await.unwrap().value.unwrap().trust_enabled);
    assert!(ledger.enable_trust(&actor(), &acme(), true).await.unwrap().enabled);
    assert!(lookup.find(&only(digest(1))).await.unwrap().value.unwrap().trust_enabled);

    assert!(matches!(ledger.delete_trust(&actor(), &acme(), false).await, Err(StoreError::HasKeys(2))));
    assert!(lookup.find(&only(digest(1))).await.unwrap().value.is_some());
    assert_eq!(ledger.delete_trust(&actor(), &acme(), true).await.unwrap(), trust);
    assert_eq!(lookup.find(&only(digest(1))).await.unwrap().value, None);
    assert_eq!(lookup.find_by_id(new_key(1).id).await.unwrap().value, None);
    let no_trust = |outcome: Result<_, StoreError>| matches!(outcome, Err(StoreError::NoTrust(name)) if name == "acme");
    assert!(no_trust(ledger.trust(&acme()).await.map(drop)));
    assert!(no_trust(ledger.enable_trust(&actor(), &acme(), true).await.map(drop)));
    assert!(no_trust(ledger.delete_trust(&actor(), &acme(), true).await.map(drop)));
    assert!(no_trust(ledger.add_key(&actor(), &acme(), new_key(3)).await.map(drop)));
    assert!(no_trust(ledger.keys(Some(&acme())).await.map(drop)));
    assert!(matches!(ledger.key(new_key(1).id).await, Err(StoreError::NoKey(_))));
    ledger.delete_trust(&actor(), &TrustRef::Name("Zebra".into()), false).await.unwrap();
}

async fn trust_names_and_key_digests_are_unique(db: Db) {
    let db = db.migrated().await;
    let mut ledger = db.ledger().await;
    with_acme(&mut ledger).await;
    let again = ledger.create_trust(&actor(), TrustId(Uuid::new_v4()), "acme").await;
    assert!(matches!(again, Err(StoreError::NameTaken(name)) if name == "acme"));
    ledger.add_key(&actor(), &acme(), new_key(1)).await.unwrap();
    let other = NewKey { id: KeyId(Uuid::new_v4()), ..new_key(1) };
    let again = ledger.add_key(&actor(), &acme(), other).await;
    assert!(matches!(again, Err(StoreError::DigestTaken(id)) if id == new_key(1).id));
    assert_eq!(ledger.keys(None).await.unwrap().len(), 1);
    assert_eq!(ledger.trusts().await.unwrap().len(), 1);
}

async fn a_repeated_import_skips_stored_keys(db: Db) {
    let db = db.migrated().await;
    let mut ledger = db.ledger().await;
    with_acme(&mut ledger).await;
    let keys = |count: u32| -> Vec<NewKey> {
        let key = |number: u32| {
            let mut digest = [0; 32];
            digest[..4].copy_from_slice(&number.to_be_bytes());
            let name = number.is_multiple_of(2).then(|| format!("number {number}"));
            let scopes = vec!["s".to_owned(); usize::try_from(number % 3).unwrap()];
            NewKey { id: KeyId(Uuid::new_v4()), digest: ApiKeyDigest::from_bytes(digest), name, scopes, ..new_key(1) }
        };
        (0..count).map(key).collect()
    };
    assert_eq!(ledger.import_keys(&actor(), &acme(), keys(1_500)).await.unwrap(), 1_500);
    assert_eq!(ledger.import_keys(&actor(), &acme(), keys(1_600)).await.unwrap(), 100);
    assert_eq!(ledger.import_keys(&actor(), &acme(), Vec::new()).await.unwrap(), 0);
    let stored = ledger.keys(None).await.unwrap();
    assert_eq!(stored.len(), 1_600);
    assert_eq!(stored.iter().map(|key| key.scopes.len()).sum::<usize>(), 1_599, "each with its own scopes");
    assert_eq!(stored.iter().filter(|key| key.name.is_some()).count(), 800);
    // An import skips a key that is stored under an older digest. Otherwise the key would have two rows, and it would
    // still be granted after only one of the rows was revoked.
    let moved = |key: &NewKey| {
        let mut digest = [9; 32];
        digest[..16].copy_from_slice(key.id.0.as_bytes());
        NewKey { digest: ApiKeyDigest::from_bytes(digest), older: vec![key.digest], ..key.clone() }
    };
    let again: Vec<_> = keys(1_602).iter().map(moved).collect();
    assert_eq!(ledger.import_keys(&actor(), &acme(), again[..1_600].to_vec()).await.unwrap(), 0);
    assert_eq!(ledger.import_keys(&actor(), &acme(), again).await.unwrap(), 2);
    for row in [1_600, 1_601] {
        let under = Digests { current: keys(1_602)[row].digest, older: Vec::new() };
        assert!(ledger.identify(&under).await.unwrap().is_none(), "the new keys are not stored under the older digest");
    }
    // If one row fails, here because of a duplicate id, the import stores nothing.
    let mut broken = keys(1_700).split_off(1_600);
    broken[99].id = broken[0].id;
    assert!(ledger.import_keys(&actor(), &acme(), broken).await.is_err());
    assert_eq!(ledger.keys(None).await.unwrap().len(), 1_602);
}

async fn identifying_a_key_does_not_reveal_its_digest(db: Db) {
    let db = db.migrated().await;
    let mut ledger = db.ledger().await;
    with_acme(&mut ledger).await;
    let stored = ledger.add_key(&actor(), &acme(), new_key(9)).await.unwrap();
    let digests = Digests { current: digest(1), older: vec![digest(9)] };
    assert_eq!(ledger.identify(&digests).await.unwrap(), Some(stored.clone()));
    assert_eq!(ledger.identify(&only(digest(1))).await.unwrap(), None);
    let shown = format!("{stored:?}");
    assert!(!shown.contains("090909") && !shown.contains("9, 9, 9"), "{shown}");
}

async fn a_second_revocation_keeps_the_time_of_the_first(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    ledger.add_key(&actor(), &acme(), new_key(1)).await.unwrap();
    ledger.add_key(&actor(), &acme(), new_key(2)).await.unwrap();
    let before = ledger.now().await.unwrap();
    let revoked = ledger.revoke_key(&actor(), new_key(1).id).await.unwrap();
    assert!(revoked.revoked_at.unwrap() >= before);
    assert_eq!(lookup.find(&only(digest(1))).await.unwrap().value.unwrap().revoked_at, revoked.revoked_at);
    assert_eq!(lookup.find(&only(digest(2))).await.unwrap().value.unwrap().revoked_at, None);
    assert_eq!(ledger.revoke_key(&actor(), new_key(1).id).await.unwrap(), revoked);
    assert_eq!(ledger.key(new_key(1).id).await.unwrap(), revoked);
    assert!(matches!(ledger.revoke_key(&actor(), new_key(3).id).await, Err(StoreError::NoKey(_))));
    let audited = db.texts("SELECT object FROM audit WHERE action = 'key.revoke'").await;
    assert_eq!(audited, [new_key(1).id.to_string()], "only the first revocation changed the key");
}

async fn clearing_the_caches_creates_a_version_with_a_new_nonce(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    let first = newest(&lookup).await;
    let drawn = ledger.clear_caches(&actor()).await.unwrap();
    let second = newest(&lookup).await;
    assert!(drawn > first.as_of);
    assert_eq!((second.as_of, second.lineage), (drawn, first.lineage));
    assert_ne!(second.nonce, first.nonce);
    assert_eq!(lookup.find(&only(digest(1))).await.unwrap().as_of, drawn);

    // Each concurrent call creates a version.
    let mut clearing = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut ledger = db.ledger().await;
        clearing.spawn(async move { ledger.clear_caches(&actor()).await.unwrap() });
    }
    // The version that a call returns is at least as new as the version that the call created.
    let last = clearing.join_all().await.into_iter().max().unwrap();
    assert_eq!(newest(&lookup).await.as_of, last);
    let everything = (lookup.poll(Some(drawn)).await.unwrap().changes)
        .into_iter()
        .filter(|(_, change)| *change == Change::Everything);
    assert_eq!(everything.map(|(version, _)| version.0).collect::<HashSet<_>>().len(), 8);
}

async fn a_change_and_its_audit_entry_are_one_transaction(db: Db) {
    let db = db.migrated().await;
    let mut ledger = db.ledger().await;
    let id = with_acme(&mut ledger).await;
    ledger.add_key(&actor(), &acme(), new_key(0xab)).await.unwrap();
    ledger.enable_trust(&actor(), &acme(), false).await.unwrap();
    ledger.enable_trust(&actor(), &acme(), false).await.unwrap();
    ledger.import_keys(&actor(), &acme(), vec![new_key(2)]).await.unwrap();
    ledger.revoke_key(&actor(), new_key(2).id).await.unwrap();
    ledger.clear_caches(&actor()).await.unwrap();
    let all = ["trust.create", "key.issue", "trust.disable", "key.import", "key.revoke", "cache.clear"];
    assert_eq!(db.texts("SELECT action FROM audit ORDER BY id").await, all);
    let whole =
        "SELECT actor || ' ' || object || coalesce(CAST(before AS text), '-') || coalesce(CAST(after AS text), '-')
        FROM audit ORDER BY id";
    let entries = db.texts(whole).await;
    assert!(entries.iter().all(|entry| entry.starts_with("test:operator ")));
    assert!(entries[0].contains(&id.to_string()) && entries[0].contains("acme"), "{}", entries[0]);
    assert!(entries.iter().all(|entry| !entry.to_lowercase().contains("abab")), "the audit contains no digest");

    // If the audit entry cannot be written, the change is rolled back.
    let lookup = db.lookup().await;
    let before = newest(&lookup).await.as_of;
    db.execute("ALTER TABLE audit RENAME TO away").await;
    assert!(ledger.create_trust(&actor(), TrustId(Uuid::new_v4()), "other").await.is_err());
    assert!(ledger.add_key(&actor(), &acme(), new_key(3)).await.is_err());
    assert!(ledger.enable_trust(&actor(), &acme(), true).await.is_err());
    assert!(ledger.revoke_key(&actor(), new_key(0xab).id).await.is_err());
    assert!(ledger.import_keys(&actor(), &acme(), vec![new_key(4)]).await.is_err());
    assert!(ledger.clear_caches(&actor()).await.is_err());
    assert!(ledger.delete_trust(&actor(), &acme(), true).await.is_err());
    assert_eq!(ledger.trusts().await.unwrap().len(), 1);
    assert!(!ledger.trust(&acme()).await.unwrap().enabled);
    assert_eq!(ledger.keys(None).await.unwrap().len(), 2);
    assert_eq!(ledger.key(new_key(0xab).id).await.unwrap().revoked_at, None);
    assert_eq!(newest(&lookup).await.as_of, before, "a change that is rolled back creates no version");
    db.execute("ALTER TABLE away RENAME TO audit").await;
    ledger.delete_trust(&actor(), &acme(), true).await.unwrap();
    assert_eq!(db.texts("SELECT action FROM audit ORDER BY id").await.last().unwrap(), "trust.delete");
}

/// Returns the changes recorded after `version` as sorted strings without duplicates. Advances `version` to the newest
/// version.
async fn recorded_since(lookup: &Arc<dyn Source>, version: &mut Version) -> Vec<String> {
    let polled = lookup.poll(Some(*version)).await.unwrap();
    assert!(polled.triggers_intact && polled.complete, "{polled:?}");
    assert!(
        polled.versions.iter().any(|(found, _)| found == version),
        "the poll also returns the version that it starts from"
    );
    assert_eq!(polled.versions.last(), Some(&(polled.newest.as_of, polled.newest.nonce)));
    assert!(polled.versions.is_sorted_by_key(|(version, _)| *version));
    assert!(polled.changes.is_sorted_by_key(|(version, change)| (*version, matches!(change, Change::Gone(_)))));
    let versions: Vec<_> = polled.versions.iter().map(|(version, _)| *version).collect();
    assert!(polled.changes.iter().all(|(found, _)| found > version && versions.contains(found)), "{polled:?}");
    *version = polled.newest.as_of;
    let mut recorded: Vec<_> = polled.changes.iter().map(|(_, change)| format!("{change:?}")).collect();
    recorded.sort();
    recorded.dedup();
    recorded
}

async fn each_change_records_the_cache_entries_that_it_makes_out_of_date(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    let mut seen = newest(&lookup).await.as_of;
    let (one, two) = (new_key(1), new_key(2));
    let (key, absent, gone) =
        (Change::Key, |number| Change::Absent(digest(number)), |number| Change::Gone(digest(number)));
    let expect = |changes: &[Change]| {
        let mut words: Vec<_> = changes.iter().map(|change| format!("{change:?}")).collect();
        words.sort();
        words
    };

    let trust = with_acme(&mut ledger).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[Change::Trust(trust)]));
    ledger.add_key(&actor(), &acme(), one.clone()).await.unwrap();
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[absent(1)]), "cached records stay valid");
    ledger.import_keys(&actor(), &acme(), vec![two.clone(), new_key(3)]).await.unwrap();
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[absent(2), absent(3)]));
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[]), "a poll repeats no change");
    ledger.revoke_key(&actor(), one.id).await.unwrap();
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[key(one.id), absent(1), gone(1)]));
    let revoked = seen;
    ledger.revoke_key(&actor(), one.id).await.unwrap();
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[]));
    assert_eq!(seen, revoked, "a call that changes nothing creates no version");
    for enabled in [false, true] {
        ledger.enable_trust(&actor(), &acme(), enabled).await.unwrap();
        assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[Change::Trust(trust)]));
    }
    assert_eq!(ledger.newest().await.unwrap(), seen);

    let ahead = lookup.poll(Some(Version(seen.0 + 10))).await.unwrap();
    assert_eq!((ahead.newest.as_of, ahead.versions, ahead.changes), (seen, vec![], vec![]), "the lineage may be lost");

    let before = seen;
    db.execute("UPDATE api_key SET name = 'other', hint = 'tg_other'; UPDATE trust SET name = 'acme ltd'").await;
    db.execute("UPDATE api_key SET scheme = scheme, digest = digest; UPDATE trust SET enabled = enabled").await;
    db.execute(&format!("UPDATE api_key SET revoked_at = NULL WHERE id = '{}' AND name IS NULL", one.id)).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[]));
    assert_eq!(seen, before, "no decision reads these columns");

    let scheme = format!("UPDATE api_key SET scheme = 1 WHERE id = '{}'", two.id);
    db.execute(&scheme).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[key(two.id), absent(2)]));
    let bytes =
        if db.is_postgres() { format!("'\\x{}'", digest(4).to_hex()) } else { format!("x'{}'", digest(4).to_hex()) };
    db.execute(&format!("UPDATE api_key SET digest = {bytes} WHERE id = '{}'", two.id)).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[key(two.id), absent(4), gone(2)]));
    let moved = KeyId(Uuid::from_u128(99));
    db.execute(&format!("UPDATE api_key SET id = '{moved}' WHERE id = '{}'", two.id)).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[key(two.id), key(moved), absent(4)]));
    db.execute(&format!("DELETE FROM api_key WHERE id = '{moved}'")).await;
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[key(moved), gone(4)]));

    ledger.delete_trust(&actor(), &TrustRef::Id(trust), true).await.unwrap();
    let all = [key(one.id), gone(1), key(new_key(3).id), gone(3), Change::Trust(trust)];
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&all));
    ledger.clear_caches(&actor()).await.unwrap();
    assert_eq!(recorded_since(&lookup, &mut seen).await, expect(&[Change::Everything]));
}

async fn the_first_poll_returns_the_changes_of_the_last_15_minutes(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    let mut versions = Vec::new();
    for number in 1..=4 {
        ledger.add_key(&actor(), &acme(), new_key(number)).await.unwrap();
        versions.push(newest(&lookup).await.as_of);
    }
    let first_poll = async |aged: Version, by: u32| {
        let at = if db.is_postgres() {
            format!("now() - interval '{by} minutes'")
        } else {
            format!("(unixepoch() - {by} * 60) * 1000000")
        };
        db.execute(&format!("UPDATE version SET at = {at} WHERE version <= {}", aged.0)).await;
        let polled = lookup.poll(None).await.unwrap();
        let recorded: Vec<_> = polled.changes.iter().map(|(version, _)| *version).collect();
        let first = polled.versions[0].0;
        assert!(recorded.iter().all(|version| *version >= first), "{polled:?}");
        assert_eq!(polled.versions.last().unwrap().0, versions[3]);
        (first, recorded.contains(&first))
    };
    assert_eq!(first_poll(versions[0], 16).await, (versions[1], true), "the changes of the first version are included");
    // A poll must not filter versions by time: a long transaction's version can have an old time.
    let at = if db.is_postgres() { "now() - interval '1 hour'" } else { "at - 3600000000" };
    db.execute(&format!("UPDATE version SET at = {at} WHERE version = {}", versions[2].0)).await;
    assert_eq!(first_poll(versions[0], 14).await.0, Version(1));
    assert_eq!(first_poll(versions[0], 16).await, (versions[1], true));
    assert_eq!(
        lookup.poll(None).await.unwrap().versions.len(),
        usize::try_from(versions[3].0 - versions[0].0).unwrap()
    );
    assert_eq!(first_poll(versions[3], 16).await, (versions[3], true), "the newest version, regardless of age");
}

async fn old_versions_are_pruned_and_the_newest_is_kept(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    for number in 1..=5 {
        ledger.add_key(&actor(), &acme(), new_key(number)).await.unwrap();
    }
    let all = lookup.poll(None).await.unwrap();
    let numbers: Vec<u64> = all.versions.iter().map(|(version, _)| version.0).collect();
    let left = async || {
        lookup.prune().await.unwrap();
        let left = db.texts("SELECT CAST(version AS text) FROM version ORDER BY version").await;
        left.iter().map(|number| number.parse::<u64>().unwrap()).collect::<Vec<_>>()
    };
    let old = if db.is_postgres() { "now() - interval '21 minutes'" } else { "at - 21 * 60000000" };
    assert_eq!(left().await, numbers, "no version is old enough");
    let third = numbers[numbers.len() - 3];
    // If the clock is set back, a version can have an earlier time than the versions before it. Pruning stops at the
    // first recent version, so it deletes nothing here.
    db.execute(&format!("UPDATE version SET at = {old} WHERE version = {third}")).await;
    assert_eq!(left().await, numbers);
    db.execute(&format!("UPDATE version SET at = {old} WHERE version <= {third}")).await;
    assert_eq!(left().await, numbers[numbers.len() - 3..], "the first of these was the newest 20 minutes ago");
    let polled = lookup.poll(Some(Version(third))).await.unwrap();
    assert_eq!((polled.versions[0], polled.oldest), (all.versions[numbers.len() - 3], Version(third)));
    let polled = lookup.poll(Some(Version(numbers[0]))).await.unwrap();
    assert_eq!(
        (polled.versions[0].0, polled.oldest),
        (Version(third), Version(third)),
        "the earlier versions were pruned"
    );
    let changes = "SELECT CAST(count(*) AS text) FROM change";
    assert_eq!(db.texts(changes).await, ["3"], "only the changes of the kept versions are left");
    db.execute(&format!("UPDATE version SET at = {old}")).await;
    assert_eq!(left().await, [*numbers.last().unwrap()], "the newest version is kept");
    assert_eq!(newest(&lookup).await.nonce, all.newest.nonce);
    // Insert more old versions than one call prunes.
    let numbers = "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 1500)";
    let (nonce, old) = if db.is_postgres() { ("decode(repeat('00', 16), 'hex')", old) } else { ("zeroblob(16)", "0") };
    let last = all.newest.as_of.0;
    db.execute(&format!(
        "INSERT INTO version (version, nonce, at) {numbers} SELECT {last} + n, {nonce}, {old} FROM number"
    ))
    .await;
    assert!(lookup.prune().await.unwrap(), "more versions are left");
    assert!(!lookup.prune().await.unwrap());
    assert_eq!(left().await, [last + 1_500]);
    db.execute(&format!("UPDATE version SET version = {last}")).await;
    assert!(ledger.clear_caches(&actor()).await.unwrap() > all.newest.as_of);
}

async fn a_lost_lineage_is_replaced_once(db: Db) {
    let db = db.migrated().await;
    let lookup = db.lookup().await;
    let mut seen = newest(&lookup).await.as_of;
    let first = newest(&lookup).await.lineage;
    lookup.renew_incarnation(Uuid::new_v4()).await.unwrap();
    assert_eq!(newest(&lookup).await.lineage, first, "a call with an outdated incarnation changes nothing");
    assert_eq!(recorded_since(&lookup, &mut seen).await, Vec::<String>::new());
    lookup.renew_incarnation(first.incarnation).await.unwrap();
    lookup.renew_incarnation(first.incarnation).await.unwrap();
    let second = newest(&lookup).await;
    assert_ne!(second.lineage.incarnation, first.incarnation);
    assert_eq!(Lineage { incarnation: first.incarnation, ..second.lineage }, first);
    assert_eq!(recorded_since(&lookup, &mut seen).await, ["Everything"]);
    assert_eq!(lookup.find(&only(digest(1))).await.unwrap().lineage, second.lineage);

    store::new_incarnation(&db.settings, NO_ENV).await.unwrap();
    let third = newest(&lookup).await.lineage.incarnation;
    assert!(third != first.incarnation && third != second.lineage.incarnation);
    assert_eq!(recorded_since(&lookup, &mut seen).await, ["Everything"]);
}

async fn restoring_intact_triggers_creates_no_version(db: Db) {
    let db = db.migrated().await;
    let lookup = db.lookup().await;
    let first = newest(&lookup).await;
    lookup.restore_watch().await.unwrap();
    assert_eq!(newest(&lookup).await.as_of, first.as_of);
    db.execute("UPDATE meta SET fingerprint = NULL").await;
    assert!(!lookup.poll(None).await.unwrap().triggers_intact);
    let mut restoring = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let lookup = Arc::clone(&lookup);
        restoring.spawn(async move { lookup.restore_watch().await.unwrap() });
    }
    restoring.join_all().await;
    let mut seen = first.as_of;
    assert_eq!(recorded_since(&lookup, &mut seen).await, ["Everything"]);
    assert_eq!(seen, Version(first.as_of.0 + 1), "the concurrent calls create one version");
}

fn heartbeat(replica: Uuid, applied: u64) -> Heartbeat {
    let lasts = Duration::from_mins(2);
    Heartbeat { replica, name: format!("pod-{applied}'\\\"; ü"), applied: Version(applied), lasts }
}

async fn replicas_that_send_heartbeats_are_listed(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    assert_eq!(ledger.replicas().await.unwrap(), []);
    let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
    for (replica, applied) in [(one, 1), (one, 5), (other, 3)] {
        lookup.report(&heartbeat(replica, applied)).await.unwrap();
    }
    let mut seen = ledger.replicas().await.unwrap();
    seen.sort_by_key(|replica| replica.id);
    let applied: Vec<_> = seen.iter().map(|replica| (replica.id, replica.applied.0)).collect();
    assert_eq!(applied, [(one, 5), (other, 3)]);
    assert!(seen.iter().all(|replica| replica.name.starts_with("pod-")), "{seen:?}");
    let now = ledger.now().await.unwrap();
    assert!(seen.iter().all(|replica| replica.seen_at <= now && now.since(replica.seen_at) < Duration::from_secs(20)));
    assert!(seen.iter().all(|replica| replica.until == replica.seen_at.after(Duration::from_mins(2))));

    let ago = |seconds: u32| {
        if db.is_postgres() {
            format!("now() - interval '{seconds} seconds'")
        } else {
            format!("seen_at - {seconds} * 1000000")
        }
    };
    db.execute(&format!("UPDATE replica SET until = {} WHERE id = '{one}'", ago(1))).await;
    assert_eq!(ledger.replicas().await.unwrap().iter().map(|replica| replica.id).collect::<Vec<_>>(), [other]);
    lookup.report(&heartbeat(other, 4)).await.unwrap();
    assert_eq!(db.texts("SELECT CAST(count(*) AS text) FROM replica").await, ["2"], "a row expired for 1 s is kept");
    db.execute(&format!("UPDATE replica SET until = {} WHERE id = '{one}'", ago(25 * 60 * 60))).await;
    lookup.report(&heartbeat(other, 6)).await.unwrap();
    assert_eq!(
        db.texts("SELECT CAST(count(*) AS text) FROM replica").await,
        ["1"],
        "a row that expired more than a day ago is deleted"
    );
    lookup.report(&Heartbeat { lasts: Duration::ZERO, ..heartbeat(other, 7) }).await.unwrap();
    assert_eq!(ledger.replicas().await.unwrap(), [], "a heartbeat with a duration of zero expires at once");

    let key = lookup.redis_mac_key().await.unwrap().expect("made by the first migration");
    assert_ne!(key, [0; 32]);
    assert_eq!(db.lookup().await.redis_mac_key().await.unwrap(), Some(key));
}

async fn an_existing_table_is_read_and_not_changed(mut db: Db) {
    let id_type = if db.is_postgres() { "uuid" } else { "text" };
    db.execute(&format!("CREATE TABLE trust (id {id_type} PRIMARY KEY, api_key_hash char(64) NULL)")).await;
    db.settings.preset = Some(Preset::TrustTable);
    let (first, second) = (Uuid::from_u128(0xabc), Uuid::from_u128(2));
    db.execute(&format!("INSERT INTO trust VALUES ('{first}', '{}'), ('{second}', NULL)", digest(1).to_hex())).await;

    let lookup = db.lookup().await;
    let digests = Digests { current: digest(5), older: vec![digest(1)] };
    let found = lookup.find(&digests).await.unwrap();
    assert_eq!((found.as_of, found.nonce, found.lineage.incarnation), (Version(0), Nonce::default(), Uuid::nil()));
    let absent = lookup.find(&only(digest(5))).await.unwrap();
    assert_eq!((absent.as_of, absent.lineage, absent.value.as_ref()), (Version(0), Lineage::default(), None));
    assert!(found.read_at.micros() > 1_700_000_000_000_000 && found.read_at <= newest(&lookup).await.read_at);
    let record = found.value.expect("there");
    assert_eq!((record.trust_id, record.key_id, record.digest), (TrustId(first), KeyId(first), digest(1)));
    assert!(record.trust_enabled && record.scopes.is_empty() && record.allowed_cidrs.is_empty());
    assert_eq!(lookup.find_by_id(KeyId(first)).await.unwrap().value, Some(record));
    assert_eq!(lookup.find_by_id(KeyId(second)).await.unwrap().value, None, "a row without a digest is not a key");
    if !db.is_postgres() {
        let odd = first.simple().to_string().to_uppercase();
        db.execute(&format!("UPDATE trust SET id = '{odd}' WHERE id = '{first}'")).await;
        assert!(lookup.find_by_id(KeyId(first)).await.unwrap().value.is_some(), "{odd}");
    }
    db.execute(&format!("UPDATE trust SET api_key_hash = '{}'", digest(1).to_hex())).await;
    assert!(matches!(lookup.find(&only(digest(1))).await, Err(Fault::Corrupt { .. })), "two rows have this digest");
    db.execute("UPDATE trust SET api_key_hash = NULL").await;
    assert_eq!(lookup.find(&only(digest(1))).await.unwrap().value, None);

    assert_eq!(lookup.redis_mac_key().await.unwrap(), None);
    let polled = lookup.poll(Some(Version(0))).await.unwrap();
    assert_eq!(
        (polled.newest.as_of, polled.newest.nonce, polled.triggers_intact),
        (Version(0), Nonce::default(), false)
    );
    assert!(polled.changes.is_empty() && polled.complete, "{polled:?}");
    lookup.report(&heartbeat(first, 0)).await.unwrap();
    lookup.restore_watch().await.unwrap();
    lookup.renew_incarnation(Uuid::nil()).await.unwrap();
    lookup.prune().await.unwrap();
    let listening =
        tokio::time::timeout(Duration::from_millis(200), lookup.listen(&|| panic!("an unexpected notification")));
    assert!(listening.await.is_err(), "an existing table sends no notifications");
    assert!(matches!(store::open_ledger(&db.settings, NO_ENV).await, Err(StoreError::NotOurs)));
    assert!(matches!(store::migrate(&db.settings, NO_ENV).await, Err(StoreError::NotOurs)));
    assert!(matches!(store::new_incarnation(&db.settings, NO_ENV).await, Err(StoreError::NotOurs)));
}

async fn a_missing_column_of_an_existing_table_is_reported_at_startup(mut db: Db) {
    db.settings.preset = Some(Preset::TrustTable);
    db.execute("CREATE TABLE trust (id text)").await;
    let problem = db.open().prepare(Missing::Create).await.unwrap_err().to_string();
    assert!(problem.contains("api_key_hash"), "{problem}");
}

async fn tables_that_are_too_new_are_refused_and_newer_compatible_tables_are_used(db: Db) {
    // Without tables, commands fail. On PostgreSQL, `serve` also fails, because it creates tables only on SQLite.
    if db.is_postgres() {
        let problem = db.open().prepare(Missing::Create).await.unwrap_err();
        assert!(matches!(problem, StoreError::Schema(_)) && problem.to_string().contains("trustgate migrate"));
        assert!(matches!(store::open_ledger(&db.settings, NO_ENV).await, Err(StoreError::Schema(_))));
    } else {
        assert!(matches!(db.open().prepare(Missing::Refuse).await, Err(StoreError::NoDatabase { .. })));
        assert!(matches!(store::open_ledger(&db.settings, NO_ENV).await, Err(StoreError::NoDatabase { .. })));
    }
    let db = db.migrated().await;
    let at = if db.is_postgres() { "now()" } else { "0" };
    db.execute(&format!("INSERT INTO schema (version, compatible_from, at) VALUES (50, 1, {at})")).await;
    db.lookup().await;
    db.ledger().await;
    store::migrate(&db.settings, NO_ENV).await.unwrap();
    db.execute(&format!("INSERT INTO schema (version, compatible_from, at) VALUES (51, 51, {at})")).await;
    for problem in [
        db.open().prepare(Missing::Create).await.unwrap_err(),
        store::open_ledger(&db.settings, NO_ENV).await.err().expect("refused"),
        store::migrate(&db.settings, NO_ENV).await.unwrap_err(),
    ] {
        let text = problem.to_string();
        assert!(matches!(problem, StoreError::Schema(_)) && text.contains("version 51"), "{text}");
    }
}

async fn repeated_and_concurrent_migrations_have_the_effect_of_one(db: Db) {
    let mut migrating = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let settings = db.settings.clone();
        migrating.spawn(async move { store::migrate(&settings, NO_ENV).await.unwrap() });
    }
    migrating.join_all().await;
    let first = newest(&db.lookup().await).await;
    store::migrate(&db.settings, NO_ENV).await.unwrap();
    let again = newest(&db.lookup().await).await;
    assert_eq!((again.as_of, again.nonce, again.lineage), (first.as_of, first.nonce, first.lineage));
    assert_eq!(db.texts("SELECT CAST(count(*) AS text) FROM setting").await, ["1"]);
}

async fn a_row_that_cannot_be_read_is_a_fault(db: Db) {
    let db = db.migrated().await;
    let (lookup, mut ledger) = (db.lookup().await, db.ledger().await);
    with_acme(&mut ledger).await;
    ledger.add_key(&actor(), &acme(), new_key(1)).await.unwrap();
    let mut breaks = vec!["scheme = 77"];
    breaks.extend(if db.is_postgres() {
        ["scopes = '{a,NULL}'", "allowed_cidrs = '{NULL}'"]
    } else {
        ["scopes = '{}'", "allowed_cidrs = '[\"10.0.0.0/99\"]'"]
    });
    for broken in breaks {
        db.execute(&format!("UPDATE api_key SET scheme = 0, scopes = '{0}', allowed_cidrs = '{0}'", empty(&db))).await;
        assert!(lookup.find(&only(digest(1))).await.unwrap().value.is_some());
        db.execute(&format!("UPDATE api_key SET {broken}")).await;
        let outcome = lookup.find(&only(digest(1))).await;
        assert!(matches!(outcome, Err(Fault::Corrupt { tier: Tier::Store, .. })), "{broken}: {outcome:?}");
        let absent = lookup.find(&only(digest(2))).await;
        assert_eq!(absent.unwrap().value, None, "other keys are not affected");
    }
    db.execute("DELETE FROM version").await;
    let outcome = lookup.find(&only(digest(2))).await;
    assert!(matches!(outcome, Err(Fault::Corrupt { .. })), "a read without any version fails: {outcome:?}");
    let outcome = lookup.poll(None).await;
    assert!(matches!(outcome, Err(PollError::Unusable(_))), "a poll without any version is unusable: {outcome:?}");
}

fn empty(db: &Db) -> &'static str {
    if db.is_postgres() { "{}" } else { "[]" }
}

async fn a_dropped_ledger_call_leaves_no_partial_change(db: Db) {
    let db = db.migrated().await;
    let mut ledger = db.ledger().await;
    // Each call is dropped after a different number of polls. None of them may leave a partial change behind.
    for polls in 0..40 {
        let name = format!("trust {polls}");
        let actor = actor();
        poll_and_drop(ledger.create_trust(&actor, TrustId(Uuid::new_v4()), &name), polls).await;
    }
    with_acme(&mut ledger).await;
    let trusts = ledger.trusts().await.unwrap().len().to_string();
    assert_eq!(db.texts("SELECT CAST(count(*) AS text) FROM audit").await, [trusts]);
}

/// Polls `future` the given number of times and then drops it.
async fn poll_and_drop(future: impl Future, polls: u32) {
    let (mut future, mut left) = (pin!(future), polls);
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        future.as_mut().poll(context).map(drop)
    })
    .await;
}
