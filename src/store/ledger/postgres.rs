//! The SQL statements of management on PostgreSQL.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Executor, PgConnection, Row,
    postgres::{PgArguments, PgRow},
};

use super::{
    backend::{BATCH, KeyFilter, LedgerBackend, StoredKey, TxMode},
    types::{Actor, AuditEntry, KeyDetails, NewKey, ReplicaStatus, Trust, TrustRef},
};
use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Fingerprint, KeyId, TrustId},
    store::{
        error::StoreError,
        names::SchemaName,
        postgres::{
            blocked::{self, LOCK_TIMEOUT},
            code, connect_within, describe, in_schema,
        },
        reads::postgres::micros,
        rows,
        schema::{self, postgres},
        url::StoreUrl,
    },
};

/// One connection to a PostgreSQL database, and the schema of our tables.
pub(crate) struct PostgresTables {
    connection: PgConnection,
    /// The schema of our tables.
    schema: SchemaName,
    /// The database, for a second connection that looks up which processes block this one.
    address: StoreUrl,
    /// The id of the server process that runs the current transaction.
    pid: Option<i32>,
    /// A description of the processes that blocked the last slow statement.
    blockers: Option<String>,
}

/// Connects to the database and checks that it has our tables.
pub(crate) async fn open(
    address: &StoreUrl,
    schema: &SchemaName,
    connect_timeout: Duration,
) -> Result<PostgresTables, StoreError> {
    let mut connection = connect_within(address, connect_timeout).await?;
    let tables = postgres::tables(&mut connection, schema).await?;
    schema::check(tables, &describe(address, schema))?;
    Ok(PostgresTables { connection, schema: schema.clone(), address: address.clone(), pid: None, blockers: None })
}

type Prepared<'q> = sqlx::query::Query<'q, sqlx::Postgres, PgArguments>;

impl PostgresTables {
    /// Creates a statement for our schema. It is not a named prepared statement, because a pooler may run the next
    /// transaction on a different server connection.
    fn query<'q>(&self, sql: &str) -> Prepared<'q> {
        sqlx::query(in_schema(sql, &self.schema)).persistent(false)
    }

    async fn rows(&mut self, query: Prepared<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        let Self { connection, address, pid, blockers, .. } = self;
        blocked::with_blockers(address, *pid, blockers, connection.fetch_all(query)).await
    }

    async fn one(&mut self, query: Prepared<'_>) -> Result<PgRow, sqlx::Error> {
        self.rows(query).await?.pop().ok_or(sqlx::Error::RowNotFound)
    }

    async fn change(&mut self, query: Prepared<'_>) -> Result<u64, sqlx::Error> {
        let Self { connection, address, pid, blockers, .. } = self;
        Ok(blocked::with_blockers(address, *pid, blockers, connection.execute(query)).await?.rows_affected())
    }
}

#[async_trait]
impl LedgerBackend for PostgresTables {
    async fn begin(&mut self, mode: TxMode) -> Result<(), sqlx::Error> {
        let level = match mode {
            TxMode::Read => "REPEATABLE READ READ ONLY",
            TxMode::Change => "READ COMMITTED",
        };
        let begin = format!(
            "BEGIN ISOLATION LEVEL {level}; SET LOCAL lock_timeout = {}; SELECT pg_backend_pid()",
            LOCK_TIMEOUT.as_millis()
        );
        (self.pid, self.blockers) = (None, None);
        let row = sqlx::raw_sql(AssertSqlSafe(begin)).fetch_one(&mut self.connection).await?;
        self.pid = row.try_get(0)?;
        Ok(())
    }

    async fn commit(&mut self) -> Result<(), sqlx::Error> {
        // The trigger `trustgate_stamp` runs here. It assigns versions one transaction at a time, so this commit may
        // wait.
        let Self { connection, address, pid, blockers, .. } = self;
        let commit = connection.execute(sqlx::raw_sql("COMMIT"));
        blocked::with_blockers(address, *pid, blockers, commit).await.map(drop)
    }

    async fn rollback(&mut self) -> Result<(), sqlx::Error> {
        self.connection.execute(sqlx::raw_sql("ROLLBACK")).await.map(drop)
    }

    async fn now(&mut self) -> Result<i64, sqlx::Error> {
        let query = self.query(&format!("SELECT {}", micros("clock_timestamp()")));
        self.one(query).await?.try_get(0)
    }

    async fn lock_trust(&mut self, which: &TrustRef) -> Result<(), sqlx::Error> {
        let query = match which {
            TrustRef::Id(id) => self.query("SELECT FROM {s}.trust WHERE id = $1 FOR UPDATE").bind(id.0),
            TrustRef::Name(name) => self.query("SELECT FROM {s}.trust WHERE name = $1 FOR UPDATE").bind(name.clone()),
        };
        self.change(query).await.map(drop)
    }

    async fn trusts(&mut self, which: Option<&TrustRef>) -> Result<Vec<Trust>, sqlx::Error> {
        let select = |condition: &str| {
            format!(
                "SELECT t.id::text, t.name, t.enabled::int::bigint, {created},
                    (SELECT count(*) FROM {{s}}.api_key k WHERE k.trust_id = t.id)
                 FROM {{s}}.trust t WHERE {condition} ORDER BY t.name",
                created = micros("t.created_at"),
            )
        };
        let query = match which {
            None => self.query(&select("true")),
            Some(TrustRef::Id(id)) => self.query(&select("t.id = $1")).bind(id.0),
            Some(TrustRef::Name(name)) => self.query(&select("t.name = $1")).bind(name.clone()),
        };
        self.rows(query).await?.iter().map(rows::trust).collect()
    }

    async fn insert_trust(&mut self, id: TrustId, name: &str) -> Result<bool, sqlx::Error> {
        let sql = "INSERT INTO {s}.trust (id, name) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
        let query = self.query(sql).bind(id.0).bind(name.to_owned());
        Ok(self.change(query).await? == 1)
    }

    async fn set_enabled(&mut self, id: TrustId, enabled: bool) -> Result<(), sqlx::Error> {
        let query = self.query("UPDATE {s}.trust SET enabled = $2 WHERE id = $1").bind(id.0).bind(enabled);
        self.change(query).await.map(drop)
    }

    async fn delete_trust(&mut self, id: TrustId) -> Result<(), sqlx::Error> {
        let query = self.query("DELETE FROM {s}.trust WHERE id = $1").bind(id.0);
        self.change(query).await.map(drop)
    }

    async fn delete_keys(&mut self, trust: TrustId) -> Result<(), sqlx::Error> {
        let query = self.query("DELETE FROM {s}.api_key WHERE trust_id = $1").bind(trust.0);
        self.change(query).await.map(drop)
    }

    async fn keys(&mut self, which: KeyFilter<'_>) -> Result<Vec<KeyDetails>, sqlx::Error> {
        let select = |condition: &str| select_keys("", condition, "k.created_at DESC, k.id");
        let query = match which {
            KeyFilter::All => self.query(&select("true")),
            KeyFilter::Of(trust) => self.query(&select("k.trust_id = $1")).bind(trust.0),
            KeyFilter::Id(id) => self.query(&select("k.id = $1")).bind(id.0),
            KeyFilter::Digests(digests) => {
                let digests: Vec<Vec<u8>> = digests.all().map(|digest| digest.as_bytes().to_vec()).collect();
                self.query(&select("k.digest = ANY($1)")).bind(digests)
            }
        };
        self.rows(query).await?.iter().map(rows::key).collect()
    }

    async fn stored_keys(&mut self, after: Option<KeyId>) -> Result<Vec<StoredKey>, sqlx::Error> {
        let sql = select_keys(", encode(k.digest, 'hex')", "$1 IS NULL OR k.id > $1", &format!("k.id LIMIT {BATCH}"));
        let query = self.query(&sql).bind(after.map(|id| id.0));
        self.rows(query).await?.iter().map(rows::stored_key).collect()
    }

    async fn put_trusts(&mut self, trusts: &[Trust]) -> Result<(), sqlx::Error> {
        let sql = "INSERT INTO {s}.trust (id, name, enabled, created_at)
             SELECT n.id, n.name, n.enabled, to_timestamp(0) + n.created_at * interval '1 microsecond'
             FROM unnest($1::uuid[], $2::text[], $3::bool[], $4::int8[]) AS n (id, name, enabled, created_at)";
        let query = self
            .query(sql)
            .bind(column(trusts, |trust| trust.id.0))
            .bind(column(trusts, |trust| trust.name.clone()))
            .bind(column(trusts, |trust| trust.enabled))
            .bind(column(trusts, |trust| trust.created_at.micros()));
        self.change(query).await.map(drop)
    }

    async fn put_keys(&mut self, keys: &[StoredKey]) -> Result<(), sqlx::Error> {
        let query = self
            .query(include_str!("postgres/put_keys.sql"))
            .bind(column(keys, |stored| stored.key.id.0))
            .bind(column(keys, |stored| stored.key.trust_id.0))
            .bind(column(keys, |stored| stored.digest.as_bytes().to_vec()))
            .bind(column(keys, |stored| stored.key.scheme.number()))
            .bind(column(keys, |stored| stored.key.hint.clone()))
            .bind(column(keys, |stored| stored.key.name.clone()))
            .bind(column(keys, |stored| rows::json_list(&stored.key.scopes)))
            .bind(column(keys, |stored| rows::json_list(&rows::networks(&stored.key.allowed_cidrs))))
            .bind(column(keys, |stored| stored.key.created_at.micros()))
            .bind(column(keys, |stored| stored.key.not_before.map(DatabaseTime::micros)))
            .bind(column(keys, |stored| stored.key.expires_at.map(DatabaseTime::micros)))
            .bind(column(keys, |stored| stored.key.revoked_at.map(DatabaseTime::micros)))
            .bind(column(keys, |stored| stored.key.pepper.map(bytes)));
        self.change(query).await.map(drop)
    }

    async fn insert_keys(&mut self, trust: TrustId, keys: &[NewKey]) -> Result<u64, sqlx::Error> {
        // One statement inserts all keys: each column is passed as an array, and a list inside a row as JSON.
        let query = self
            .query(include_str!("postgres/insert_keys.sql"))
            .bind(trust.0)
            .bind(column(keys, |key| key.id.0))
            .bind(column(keys, |key| key.digest.as_bytes().to_vec()))
            .bind(column(keys, |key| key.made.scheme().number()))
            .bind(column(keys, |key| key.hint.clone()))
            .bind(column(keys, |key| key.name.clone()))
            .bind(column(keys, |key| rows::json_list(&key.scopes)))
            .bind(column(keys, |key| rows::json_list(&rows::networks(&key.allowed_cidrs))))
            .bind(column(keys, |key| key.not_before.map(DatabaseTime::micros)))
            .bind(column(keys, |key| key.expires_in.map(rows::micros)))
            .bind(column(keys, |key| key.made.fingerprint().map(bytes)));
        self.change(query).await
    }

    async fn stored_digests(&mut self, digests: &[ApiKeyDigest]) -> Result<Vec<ApiKeyDigest>, sqlx::Error> {
        let query = self.query("SELECT encode(digest, 'hex') FROM {s}.api_key WHERE digest = ANY ($1)");
        let digests: Vec<_> = digests.iter().map(|digest| digest.as_bytes().to_vec()).collect();
        let query = query.bind(digests);
        rows::digests(&self.rows(query).await?)
    }

    async fn revoke_key(&mut self, id: KeyId) -> Result<bool, sqlx::Error> {
        let sql = "UPDATE {s}.api_key SET revoked_at = clock_timestamp() WHERE id = $1 AND revoked_at IS NULL";
        let query = self.query(sql).bind(id.0);
        Ok(self.change(query).await? == 1)
    }

    async fn change_everything(&mut self) -> Result<(), sqlx::Error> {
        let query = self.query("SELECT {s}.everything()");
        self.change(query).await.map(drop)
    }

    async fn hold_pepper(&mut self, pepper: Option<Fingerprint>) -> Result<Option<Fingerprint>, sqlx::Error> {
        let query = self.query("SELECT {s}.hold_pepper($1)").bind(pepper.map(bytes));
        Ok(rows::fingerprint(self.one(query).await?.try_get(0)?)?)
    }

    async fn use_pepper(&mut self, pepper: Fingerprint) -> Result<Option<Fingerprint>, sqlx::Error> {
        let query = self.query("SELECT {s}.use_pepper($1)").bind(bytes(pepper));
        Ok(rows::fingerprint(self.one(query).await?.try_get(0)?)?)
    }

    async fn newest(&mut self) -> Result<i64, sqlx::Error> {
        let query = self.query("SELECT max(version) FROM {s}.version");
        self.one(query).await?.try_get(0)
    }

    async fn replicas(&mut self) -> Result<Vec<ReplicaStatus>, sqlx::Error> {
        let sql = format!(
            "SELECT id::text, name, applied, {seen}, {until} FROM {{s}}.replica
             WHERE until > clock_timestamp() ORDER BY name, id",
            seen = micros("seen_at"),
            until = micros("until"),
        );
        let query = self.query(&sql);
        self.rows(query).await?.iter().map(rows::replica).collect()
    }

    async fn insert_audit(&mut self, actor: &Actor, entry: &AuditEntry) -> Result<(), sqlx::Error> {
        let sql = "INSERT INTO {s}.audit (actor, action, object, before, after)
             VALUES ($1, $2, $3, $4::text::jsonb, $5::text::jsonb)";
        let query = self
            .query(sql)
            .bind(actor.0.clone())
            .bind(entry.action)
            .bind(entry.object.clone())
            .bind(entry.before.as_ref().map(ToString::to_string))
            .bind(entry.after.as_ref().map(ToString::to_string));
        self.change(query).await.map(drop)
    }

    fn explain(&self, error: sqlx::Error) -> StoreError {
        // 55P03 (lock_not_available): `lock_timeout` has passed.
        if code(&error).as_deref() != Some("55P03") {
            return error.into();
        }
        let blockers = self.blockers.as_deref().filter(|blockers| !blockers.is_empty());
        StoreError::Blocked {
            waited: LOCK_TIMEOUT,
            blockers: blockers.unwrap_or("an unknown process (it has exited, or could not be looked up)").to_owned(),
        }
    }
}

fn bytes(fingerprint: Fingerprint) -> Vec<u8> {
    fingerprint.0.to_vec()
}

fn column<T, V>(rows: &[T], value: impl Fn(&T) -> V) -> Vec<V> {
    rows.iter().map(value).collect()
}

/// Returns a query for the columns that `rows::key` reads, followed by those in `more`.
fn select_keys(more: &str, condition: &str, order: &str) -> String {
    format!(
        "SELECT k.id::text, t.id::text, t.name, t.enabled::int::bigint, k.hint, k.scheme::bigint, k.name,
            array_to_json(k.scopes)::text, array_to_json(k.allowed_cidrs)::text,
            {created}, {not_before}, {expires_at}, {revoked_at}, encode(k.pepper_fingerprint, 'hex'){more}
         FROM {{s}}.api_key k JOIN {{s}}.trust t ON t.id = k.trust_id WHERE {condition} ORDER BY {order}",
        created = micros("k.created_at"),
        not_before = micros("k.not_before"),
        expires_at = micros("k.expires_at"),
        revoked_at = micros("k.revoked_at"),
    )
}
