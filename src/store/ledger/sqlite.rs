//! The SQL statements of management on SQLite.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Executor, Row, Sqlite, SqliteConnection, sqlite::SqliteArguments};

use super::{
    backend::{BATCH, KeyFilter, LedgerBackend, StoredKey, TxMode},
    types::{Actor, AuditEntry, KeyDetails, NewKey, ReplicaStatus, Trust, TrustRef},
};
use crate::{
    base::clock::DatabaseTime,
    record::{ApiKeyDigest, Fingerprint, KeyId, TrustId},
    store::{
        change_log,
        error::StoreError,
        reads::lookup::Missing,
        rows, schema,
        sqlite::{Access, HOLD_PEPPER, NOW, connect, file, has_log},
        url::describe_sqlite,
    },
};

/// One connection to an SQLite file with our tables.
pub(crate) struct SqliteTables {
    connection: SqliteConnection,
    path: PathBuf,
    files: file::OpenFiles,
}

/// Opens the database at `path`, which must exist and contain our tables.
pub(crate) async fn open(path: &Path) -> Result<SqliteTables, StoreError> {
    file::prepare(path, Missing::Refuse)?;
    let mut files = file::OpenFiles::before_connect(path).map_err(sqlx::Error::Io)?;
    let mut connection = connect(path, Access::Write).await?;
    schema::check(schema::sqlite::tables(&mut connection).await?, &describe_sqlite(path))?;
    let has_log = has_log(&mut connection).await?;
    files.after_first_read(path, has_log).map_err(sqlx::Error::Io)?;
    Ok(SqliteTables { connection, path: path.to_owned(), files })
}

type Prepared<'q> = sqlx::query::Query<'q, Sqlite, SqliteArguments>;

impl SqliteTables {
    async fn change(&mut self, query: Prepared<'_>) -> Result<u64, sqlx::Error> {
        Ok(self.connection.execute(query).await?.rows_affected())
    }
}

#[async_trait]
impl LedgerBackend for SqliteTables {
    async fn begin(&mut self, mode: TxMode) -> Result<(), sqlx::Error> {
        let begin = match mode {
            TxMode::Read => "BEGIN",
            // Taking the write lock at the start keeps other connections from writing between our reads and our writes.
            TxMode::Change => "BEGIN IMMEDIATE",
        };
        self.connection.execute(begin).await.map(drop)
    }

    async fn commit(&mut self) -> Result<(), sqlx::Error> {
        // If another file has replaced the database at this path, a commit to the old file would be lost, but we would
        // report success.
        self.files.verify(&self.path)?;
        self.connection.execute("COMMIT").await.map(drop)
    }

    async fn rollback(&mut self) -> Result<(), sqlx::Error> {
        match self.connection.execute("ROLLBACK").await {
            // SQLite rolls back automatically after some errors, and after a failed BEGIN there is no transaction.
            Err(sqlx::Error::Database(error)) if error.message().contains("no transaction is active") => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    async fn now(&mut self) -> Result<i64, sqlx::Error> {
        self.connection.fetch_one(sqlx::query(AssertSqlSafe(format!("SELECT {NOW}")))).await?.try_get(0)
    }

    async fn lock_trust(&mut self, _which: &TrustRef) -> Result<(), sqlx::Error> {
        Ok(()) // `BEGIN IMMEDIATE` has locked the whole database
    }

    async fn trusts(&mut self, which: Option<&TrustRef>) -> Result<Vec<Trust>, sqlx::Error> {
        let (condition, value) = match which {
            None => ("? = ''", String::new()),
            Some(TrustRef::Id(id)) => ("t.id = ?", id.to_string()),
            Some(TrustRef::Name(name)) => ("t.name = ?", name.clone()),
        };
        let sql = format!(
            "SELECT t.id, t.name, t.enabled, t.created_at, (SELECT count(*) FROM api_key k WHERE k.trust_id = t.id)
             FROM trust t WHERE {condition} ORDER BY t.name"
        );
        let found = self.connection.fetch_all(sqlx::query(AssertSqlSafe(sql)).bind(value)).await?;
        found.iter().map(rows::trust).collect()
    }

    async fn insert_trust(&mut self, id: TrustId, name: &str) -> Result<bool, sqlx::Error> {
        let sql =
            format!("INSERT INTO trust (id, name, created_at) VALUES (?, ?, {NOW}) ON CONFLICT (name) DO NOTHING");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(id.to_string()).bind(name.to_owned());
        Ok(self.change(query).await? == 1)
    }

    async fn set_enabled(&mut self, id: TrustId, enabled: bool) -> Result<(), sqlx::Error> {
        let query = sqlx::query("UPDATE trust SET enabled = ? WHERE id = ?").bind(enabled).bind(id.to_string());
        self.change(query).await.map(drop)
    }

    async fn delete_trust(&mut self, id: TrustId) -> Result<(), sqlx::Error> {
        self.change(sqlx::query("DELETE FROM trust WHERE id = ?").bind(id.to_string())).await.map(drop)
    }

    async fn delete_keys(&mut self, trust: TrustId) -> Result<(), sqlx::Error> {
        self.change(sqlx::query("DELETE FROM api_key WHERE trust_id = ?").bind(trust.to_string())).await.map(drop)
    }

    async fn keys(&mut self, which: KeyFilter<'_>) -> Result<Vec<KeyDetails>, sqlx::Error> {
        let (condition, values) = match which {
            KeyFilter::All => ("true".to_owned(), vec![]),
            KeyFilter::Of(trust) => ("k.trust_id = ?".to_owned(), vec![trust.to_string()]),
            KeyFilter::Id(id) => ("k.id = ?".to_owned(), vec![id.to_string()]),
            KeyFilter::Digests(digests) => {
                let marks = vec!["unhex(?)"; digests.all().count()].join(", ");
                (format!("k.digest IN ({marks})"), digests.all().map(ApiKeyDigest::to_hex).collect())
            }
        };
        let sql = select_keys("", &condition, "k.created_at DESC, k.id");
        let query = values.into_iter().fold(sqlx::query(AssertSqlSafe(sql)), Prepared::bind);
        self.connection.fetch_all(query).await?.iter().map(rows::key).collect()
    }

    async fn stored_keys(&mut self, after: Option<KeyId>) -> Result<Vec<StoredKey>, sqlx::Error> {
        let sql = select_keys(", hex(k.digest)", "k.id > ?", &format!("k.id LIMIT {BATCH}"));
        let after = after.map_or_else(String::new, |id| id.to_string());
        let query = sqlx::query(AssertSqlSafe(sql)).bind(after);
        self.connection.fetch_all(query).await?.iter().map(rows::stored_key).collect()
    }

    async fn put_trusts(&mut self, trusts: &[Trust]) -> Result<(), sqlx::Error> {
        for trust in trusts {
            let query = sqlx::query("INSERT INTO trust (id, name, enabled, created_at) VALUES (?, ?, ?, ?)")
                .bind(trust.id.to_string())
                .bind(trust.name.clone())
                .bind(trust.enabled)
                .bind(trust.created_at.micros());
            self.change(query).await?;
        }
        Ok(())
    }

    async fn put_keys(&mut self, keys: &[StoredKey]) -> Result<(), sqlx::Error> {
        let sql = "INSERT INTO api_key (id, trust_id, digest, scheme, hint, name, scopes, allowed_cidrs, created_at,
                not_before, expires_at, revoked_at, pepper_fingerprint)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
        for StoredKey { key, digest } in keys {
            let query = sqlx::query(sql)
                .bind(key.id.to_string())
                .bind(key.trust_id.to_string())
                .bind(digest.as_bytes().to_vec())
                .bind(key.scheme.number())
                .bind(key.hint.clone())
                .bind(key.name.clone())
                .bind(rows::json_list(&key.scopes))
                .bind(rows::json_list(&rows::networks(&key.allowed_cidrs)))
                .bind(key.created_at.micros())
                .bind(key.not_before.map(DatabaseTime::micros))
                .bind(key.expires_at.map(DatabaseTime::micros))
                .bind(key.revoked_at.map(DatabaseTime::micros))
                .bind(key.pepper.map(bytes));
            self.change(query).await?;
        }
        Ok(())
    }

    async fn stored_digests(&mut self, digests: &[ApiKeyDigest]) -> Result<Vec<ApiKeyDigest>, sqlx::Error> {
        let hex: Vec<_> = digests.iter().map(ApiKeyDigest::to_hex).collect();
        let sql = "SELECT lower(hex(digest)) FROM api_key WHERE digest IN (SELECT unhex(value) FROM json_each(?))";
        rows::digests(&self.connection.fetch_all(sqlx::query(sql).bind(rows::json_list(&hex))).await?)
    }

    async fn insert_keys(&mut self, trust: TrustId, keys: &[NewKey]) -> Result<u64, sqlx::Error> {
        let sql = format!(
            "INSERT INTO api_key (id, trust_id, digest, scheme, hint, name, scopes, allowed_cidrs, not_before,
                expires_at, pepper_fingerprint, created_at)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, {NOW} + ?, ?, {NOW}) ON CONFLICT (digest) DO NOTHING"
        );
        let mut stored = 0;
        for key in keys {
            let query = sqlx::query(AssertSqlSafe(sql.clone()))
                .bind(key.id.to_string())
                .bind(trust.to_string())
                .bind(key.digest.as_bytes().to_vec())
                .bind(key.made.scheme().number())
                .bind(key.hint.clone())
                .bind(key.name.clone())
                .bind(rows::json_list(&key.scopes))
                .bind(rows::json_list(&rows::networks(&key.allowed_cidrs)))
                .bind(key.not_before.map(DatabaseTime::micros))
                .bind(key.expires_in.map(rows::micros))
                .bind(key.made.fingerprint().map(bytes));
            stored += self.change(query).await?;
        }
        Ok(stored)
    }

    async fn revoke_key(&mut self, id: KeyId) -> Result<bool, sqlx::Error> {
        let sql = format!("UPDATE api_key SET revoked_at = {NOW} WHERE id = ? AND revoked_at IS NULL");
        Ok(self.change(sqlx::query(AssertSqlSafe(sql)).bind(id.to_string())).await? == 1)
    }

    async fn change_everything(&mut self) -> Result<(), sqlx::Error> {
        change_log::sqlite::everything(&mut self.connection).await
    }

    async fn hold_pepper(&mut self, pepper: Option<Fingerprint>) -> Result<Option<Fingerprint>, sqlx::Error> {
        if let Some(pepper) = pepper {
            self.change(sqlx::query(HOLD_PEPPER).bind(None::<String>).bind(pepper.to_string())).await?;
        }
        let found = self.connection.fetch_one("SELECT nullif(hex(pepper_fingerprint), '') FROM meta").await?;
        Ok(rows::fingerprint(found.try_get(0)?)?)
    }

    async fn use_pepper(&mut self, pepper: Fingerprint) -> Result<Option<Fingerprint>, sqlx::Error> {
        let before = self.hold_pepper(None).await?;
        if before.is_none() {
            self.hold_pepper(Some(pepper)).await?;
        }
        let sql = "UPDATE meta SET previous_pepper_fingerprint = pepper_fingerprint, pepper_fingerprint = ?1
             WHERE pepper_fingerprint <> ?1";
        self.change(sqlx::query(sql).bind(bytes(pepper))).await?;
        Ok(before)
    }

    async fn newest(&mut self) -> Result<i64, sqlx::Error> {
        self.connection.fetch_one("SELECT max(version) FROM version").await?.try_get(0)
    }

    async fn replicas(&mut self) -> Result<Vec<ReplicaStatus>, sqlx::Error> {
        let sql = format!("SELECT id, name, applied, seen_at, until FROM replica WHERE until > {NOW} ORDER BY id");
        self.connection.fetch_all(sqlx::query(AssertSqlSafe(sql))).await?.iter().map(rows::replica).collect()
    }

    async fn insert_audit(&mut self, actor: &Actor, entry: &AuditEntry) -> Result<(), sqlx::Error> {
        let sql = format!("INSERT INTO audit (at, actor, action, object, before, after) VALUES ({NOW}, ?, ?, ?, ?, ?)");
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(actor.0.clone())
            .bind(entry.action)
            .bind(entry.object.clone())
            .bind(entry.before.as_ref().map(ToString::to_string))
            .bind(entry.after.as_ref().map(ToString::to_string));
        self.change(query).await.map(drop)
    }
}

fn bytes(fingerprint: Fingerprint) -> Vec<u8> {
    fingerprint.0.to_vec()
}

/// Returns a query for the columns that `rows::key` reads, followed by those in `more`.
fn select_keys(more: &str, condition: &str, order: &str) -> String {
    format!(
        "SELECT k.id, t.id, t.name, t.enabled, k.hint, k.scheme, k.name, k.scopes, k.allowed_cidrs, k.created_at,
            k.not_before, k.expires_at, k.revoked_at, nullif(hex(k.pepper_fingerprint), ''){more}
         FROM api_key k JOIN trust t ON t.id = k.trust_id WHERE {condition} ORDER BY {order}"
    )
}
