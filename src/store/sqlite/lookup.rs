//! The reads of checks on SQLite.

use std::path::PathBuf;

use sqlx::{AssertSqlSafe, Connection, SqliteConnection, sqlite::SqliteRow};
use uuid::Uuid;

use super::{
    super::{
        LedgerError, Preset,
        lookup::{Missing, SignOfLife},
        place::describe_sqlite,
        pool::Connect,
        reader::{Dialect, Ours},
    },
    NOW, connect, file, is_missing, migrate,
};
use crate::record::{Digests, KeyId, Version};

/// One SQLite file and whose tables it holds.
#[derive(Clone, Debug)]
pub(crate) struct Sqlite {
    /// The file.
    pub(crate) path: PathBuf,
    /// Somebody else's table, if it is one.
    pub(crate) preset: Option<Preset>,
}

/// A connection and the file it was made to. SQLite would go on reading a file that was removed or replaced, and see no
/// change made in the new one.
pub(crate) struct Opened {
    connection: SqliteConnection,
    file: file::Identity,
}

/// A statement and its values.
pub(crate) struct Query {
    sql: String,
    values: Vec<Value>,
}

enum Value {
    Text(String),
    Bytes(Vec<u8>),
    Number(i64),
}

impl Query {
    fn new(sql: impl Into<String>, values: impl IntoIterator<Item = Value>) -> Self {
        Self { sql: sql.into(), values: values.into_iter().collect() }
    }
}

impl Connect for Sqlite {
    type Connection = Opened;
    type Query = Query;
    type Row = SqliteRow;

    async fn connect(&self) -> Result<Opened, sqlx::Error> {
        let file = file::identity(&self.path)?;
        Ok(Opened { connection: connect(&self.path).await?, file })
    }

    async fn run(&self, opened: &mut Opened, query: &Query) -> Result<Vec<SqliteRow>, sqlx::Error> {
        if file::identity(&self.path)? != opened.file {
            return Err(sqlx::Error::Io(std::io::Error::other("the database was replaced by another file")));
        }
        // Made of this module's constants and placeholders alone.
        let mut bound = sqlx::query(AssertSqlSafe(query.sql.clone()));
        for value in &query.values {
            bound = match value {
                Value::Text(text) => bound.bind(text.as_str()),
                Value::Bytes(bytes) => bound.bind(bytes.as_slice()),
                Value::Number(number) => bound.bind(*number),
            };
        }
        // To its end: an unfinished SELECT would pin the snapshot.
        bound.fetch_all(&mut opened.connection).await
    }

    async fn close(opened: Opened) {
        // It is gone either way.
        let _ = opened.connection.close().await;
    }

    fn lost(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::WorkerCrashed | sqlx::Error::Io(_))
    }
}

impl Dialect for Sqlite {
    fn find(&self, digests: &Digests) -> Query {
        let marks = vec!["?"; digests.all().count()].join(", ");
        match self.preset {
            None => Query::new(
                own(&format!("k.digest IN ({marks})")),
                digests.all().map(|digest| Value::Bytes(digest.as_bytes().to_vec())),
            ),
            Some(Preset::TrustTable) => Query::new(
                trust_table(&format!("t.api_key_hash IN ({marks})")),
                digests.all().map(|digest| Value::Text(digest.to_hex())),
            ),
        }
    }

    fn find_by_id(&self, key: KeyId) -> Query {
        match self.preset {
            None => Query::new(own("k.id = ?"), [Value::Text(key.to_string())]),
            // Ids in somebody else's table may be written in any of the usual ways.
            Some(Preset::TrustTable) => {
                let (hyphens, simple) = (key.0.hyphenated().to_string(), key.0.simple().to_string());
                let forms = [hyphens.to_uppercase(), simple.to_uppercase(), hyphens, simple];
                Query::new(trust_table("t.id IN (?, ?, ?, ?)"), forms.map(Value::Text))
            }
        }
    }

    fn poll(&self, _since: Option<Version>, _echo: i64) -> Query {
        todo!()
    }

    fn answered(_error: &sqlx::Error) -> bool {
        todo!()
    }

    async fn listen(&self, _changed: &(dyn Fn() + Send + Sync)) -> sqlx::Error {
        todo!()
    }

    async fn restore_watch(&self) -> Result<(), sqlx::Error> {
        todo!()
    }

    async fn renew_incarnation(&self, _lost: Uuid) -> Result<(), sqlx::Error> {
        todo!()
    }

    fn ours(&self) -> Option<Ours<Query>> {
        self.preset.is_none().then(|| Ours {
            schema: Query::new(migrate::SCHEMA, []),
            redis_mac_key: Query::new("SELECT hex(value) FROM setting WHERE name = 'redis_mac_key'", []),
            prune: todo!(),
        })
    }

    fn report(&self, _sign: &SignOfLife) -> Query {
        todo!()
    }

    async fn prepare(&self, missing: Missing) -> Result<(), LedgerError> {
        // Somebody else's table is never made.
        let missing = if self.preset.is_some() { Missing::Refuse } else { missing };
        file::prepare(&self.path, missing)?;
        if missing == Missing::Create {
            migrate::run(&self.path).await?;
        }
        Ok(())
    }

    fn place(&self) -> String {
        describe_sqlite(&self.path)
    }

    fn is_missing(error: &sqlx::Error) -> bool {
        is_missing(error)
    }
}

/// The newest version and, where `condition` holds, a key with its trust: one statement, so one snapshot.
fn own(condition: &str) -> String {
    format!(
        "SELECT v.version, hex(v.nonce), m.incarnation, 0, 0, {NOW},
            k.id, t.id, t.enabled, hex(k.digest), k.scheme, k.scopes, k.allowed_cidrs,
            k.not_before, k.expires_at, k.revoked_at
         FROM (SELECT version, nonce FROM version ORDER BY version DESC LIMIT 1) v
         CROSS JOIN meta m
         LEFT JOIN (api_key k JOIN trust t ON t.id = k.trust_id) ON {condition}"
    )
}

/// The same columns from a table `trust(id, api_key_hash)`. It has no versions: everything is dated with number 0.
fn trust_table(condition: &str) -> String {
    format!(
        "SELECT 0, '00000000000000000000000000000000', '00000000-0000-0000-0000-000000000000', 0, 0, {NOW},
            t.id, t.id, 1, t.api_key_hash, 0, '[]', '[]', NULL, NULL, NULL
         FROM (SELECT 1) v
         LEFT JOIN trust t ON t.api_key_hash IS NOT NULL AND {condition}"
    )
}
