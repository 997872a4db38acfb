//! The reads of checks, over either database: a pool for them, and one connection beside it that watches.
//!
//! Never writes anything but this replica's own sign of life.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{
    Lookup, StoreSettings,
    ledger::LedgerError,
    lookup::{Missing, Source},
    pool::{Connect, Limits, Pool, Trouble},
    rows::{self, Corrupt, Plain, Read},
    schema,
};
use crate::{
    clock::Clock,
    fault::Fault,
    record::{ApiKeyDigest, Dated, Digests, KeyId, Record, Version, bytes_from_hex},
};

/// One database's side of the reads: what to send. Reads for decisions return the columns of [`Read`].
pub(crate) trait Dialect: Connect<Row: Plain> {
    /// The record under one of `digests`.
    fn find(&self, digests: &Digests) -> Self::Query;
    /// The record of a key.
    fn find_by_id(&self, key: KeyId) -> Self::Query;
    /// The date alone.
    fn newest(&self) -> Self::Query;
    /// What only our own tables have; `None` on somebody else's.
    fn ours(&self) -> Option<Ours<Self::Query>>;
    /// The sign of life of this replica.
    fn report(&self, replica: Uuid, applied: Version) -> Self::Query;
    /// Makes the database and brings it up to date, where this kind of database is made by who uses it.
    fn prepare(&self, missing: Missing) -> impl Future<Output = Result<(), LedgerError>> + Send;
    /// Where the database is, for messages.
    fn place(&self) -> String;
    /// Whether `error` says that a table, or the schema, is not there.
    fn is_missing(error: &sqlx::Error) -> bool;
}

/// Statements on our own tables.
pub(crate) struct Ours<Q> {
    /// Version and compatible-from of the tables, newest first.
    pub(crate) schema: Q,
    /// The Redis MAC key in hexadecimal.
    pub(crate) redis_mac_key: Q,
}

/// [`Lookup`] over either database.
pub(crate) struct Reader<D: Dialect> {
    dialect: Arc<D>,
    reads: Pool<D>,
    watch: Pool<D>,
    clock: Arc<dyn Clock>,
}

impl<D: Dialect> Reader<D> {
    /// Connects to nothing yet.
    pub(crate) fn new(dialect: D, settings: &StoreSettings, clock: Arc<dyn Clock>) -> Self {
        let dialect = Arc::new(dialect);
        let limits = Limits {
            connections_max: usize::try_from(settings.connections_max).unwrap_or(usize::MAX),
            waiting_max: usize::try_from(settings.reads_max).unwrap_or(usize::MAX),
            connect_timeout: settings.connect_timeout,
        };
        // The sign of life, a look at the newest version, and a retry of each: never more than a few at a time.
        let watch = Limits { connections_max: 1, waiting_max: WATCHERS_MAX, ..limits };
        Self {
            reads: Pool::new("reads", Arc::clone(&dialect), limits),
            watch: Pool::new("watch", Arc::clone(&dialect), watch),
            dialect,
            clock,
        }
    }

    async fn ask(pool: &Pool<D>, query: &D::Query) -> Result<Vec<Read>, Fault> {
        let rows = pool.read(query).await?;
        rows.iter().map(Read::of).collect::<Result<_, _>>().map_err(|_| Corrupt("a column has another type").into())
    }

    /// The version of the tables, and whether it fits.
    async fn check_schema(&self, query: &D::Query) -> Result<(), LedgerError> {
        let place = self.dialect.place();
        let tables = match self.watch.read(query).await {
            Ok(rows) => match rows.first() {
                None => None,
                Some(row) => Some(schema::Tables { version: row.number(0)?, compatible_from: row.number(1)? }),
            },
            Err(Trouble::Sql(error)) if D::is_missing(&error) => None,
            Err(trouble) => return Err(Fault::from(trouble).into()),
        };
        schema::check(tables, &place)
    }
}

#[async_trait]
impl<D: Dialect> Lookup for Reader<D> {
    async fn find(&self, digests: &Digests) -> Result<Dated<Option<Record>>, Fault> {
        let sent_at = self.clock.now();
        let rows = Self::ask(&self.reads, &self.dialect.find(digests)).await?;
        Ok(rows::by_digests(rows, digests, sent_at)?)
    }

    async fn find_by_id(&self, key: KeyId) -> Result<Dated<Option<Record>>, Fault> {
        let sent_at = self.clock.now();
        let rows = Self::ask(&self.reads, &self.dialect.find_by_id(key)).await?;
        Ok(rows::by_id(rows, sent_at)?)
    }

    async fn newest(&self) -> Result<Dated<()>, Fault> {
        let sent_at = self.clock.now();
        let rows = Self::ask(&self.watch, &self.dialect.newest()).await?;
        Ok(rows::date(&rows, sent_at)?)
    }

    async fn report(&self, replica: Uuid, applied: Version) -> Result<(), Fault> {
        if self.dialect.ours().is_some() {
            self.watch.read(&self.dialect.report(replica, applied)).await?;
        }
        Ok(())
    }

    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault> {
        let Some(ours) = self.dialect.ours() else { return Ok(None) };
        let rows = self.watch.read(&ours.redis_mac_key).await?;
        let hex = rows.first().map(|row| row.text(0)).transpose();
        let key = hex.ok().flatten().and_then(|hex| bytes_from_hex(&hex));
        key.map(Some).ok_or_else(|| Corrupt("the setting redis_mac_key is missing or not 32 bytes").into())
    }
}

#[async_trait]
impl<D: Dialect> Source for Reader<D> {
    async fn prepare(&self, missing: Missing) -> Result<(), LedgerError> {
        self.dialect.prepare(missing).await?;
        if let Some(ours) = self.dialect.ours() {
            self.check_schema(&ours.schema).await?;
        }
        // Every read once, so that a missing column or right is found now and not by a request.
        let nobody = Digests { current: ApiKeyDigest::from_bytes([0; 32]), older: Vec::new() };
        self.find(&nobody).await?;
        self.find_by_id(KeyId(Uuid::nil())).await?;
        self.newest().await?;
        Ok(())
    }

    async fn close(&self) {
        self.reads.close().await;
        self.watch.close().await;
    }
}

/// Calls that may wait for the one connection that watches.
const WATCHERS_MAX: usize = 8;
