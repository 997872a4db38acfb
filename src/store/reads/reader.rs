//! Reads for checks and the poll task, over either database: a pool of connections for reads and a separate connection
//! for polls.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use uuid::Uuid;

use super::{
    lookup::{Heartbeat, Lookup, Missing, PollError, Polled, Source, Tended},
    pool::{Connect, Pool, PoolError, PoolLimits},
};
use crate::{
    base::{
        clock::{Clock, Moment},
        fault::{Fault, Tier},
        saturate::Saturate as _,
    },
    record::{ApiKeyDigest, Digests, Fingerprint, KeyId, Record, Version, Versioned, bytes_from_hex},
    store::{
        error::StoreError,
        rows::{self, Corrupt, ReadRow, RowExt},
        schema,
        settings::StoreSettings,
    },
};

/// The statements of one kind of database. Reads for decisions return the columns of [`ReadRow`].
pub(crate) trait Dialect: Connect<Row: RowExt> {
    /// Returns the query for the record stored under one of `digests`.
    fn find(&self, digests: &Digests) -> Self::Query;
    /// Returns the query for the record of a key.
    fn find_by_id(&self, key: KeyId) -> Self::Query;
    /// Returns the query for the versions from `since` on and their changes, in the columns of [`rows::polled`]. The
    /// first column is `echo`.
    fn poll(&self, since: Option<Version>, echo: i64) -> Self::Query;
    /// Returns true if a failed poll counts as an answer: the server is up, but is a standby, or our tables or the
    /// rights to them are missing.
    fn answered(error: &sqlx::Error) -> bool;
    /// Returns true if all connections of this process must be closed before a new one can see the current database.
    fn is_replaced(_error: &sqlx::Error) -> bool {
        false
    }
    /// See [`Lookup::listen`].
    fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> impl Future<Output = sqlx::Error> + Send;
    /// Returns the statements on our tables; `None` if changes are not tracked.
    fn ours(&self) -> Option<OwnTableQueries<Self::Query>>;
    /// Returns the statement that records the pepper of each key. `current` is the server's current pepper. Callers use
    /// this only for keys in our own tables.
    fn record_peppers(&self, proven: &[(KeyId, Fingerprint)], current: Fingerprint) -> Self::Query;
    /// Formats a fingerprint as an SQL literal.
    fn fingerprint_literal(fingerprint: Fingerprint) -> String;
    /// Returns the query for the number of active keys whose recorded pepper satisfies one of `conditions`, at most
    /// [`super::lookup::OTHER_KEYS_MAX`]. The query reads no more rows than this limit for each condition.
    fn count_keys(&self, conditions: &[String]) -> Self::Query;
    /// Returns the statement that records a heartbeat.
    fn report(&self, heartbeat: &Heartbeat) -> Self::Query;
    /// Like [`Lookup::restore_watch`], on a separate connection.
    fn restore_watch(&self) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    /// Like [`Lookup::renew_incarnation`], on a separate connection.
    fn renew_incarnation(&self, lost: Uuid) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    /// Returns true if the keys are in our own tables.
    fn has_own_keys(&self) -> bool;
    /// Creates and migrates an embedded database, as `missing` allows. Does nothing for a database server.
    fn prepare(&self, missing: Missing) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Finishes work on the database after all connections have been closed.
    fn finish(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
    /// Describes the database, for messages.
    fn backend(&self) -> String;
    /// Returns true if `error` means that a table or the schema does not exist.
    fn is_missing(error: &sqlx::Error) -> bool;
}

/// Statements on our tables.
pub(crate) struct OwnTableQueries<Q> {
    /// Reads the columns `version` and `compatible_from` of the table `schema`, newest first.
    pub(crate) schema: Q,
    /// Reads the Redis MAC key in hexadecimal.
    pub(crate) redis_mac_key: Q,
    /// See [`Lookup::prune`].
    pub(crate) prune: Q,
    /// Returns 1 if there are more versions to delete, else 0 or no row.
    pub(crate) is_more: Q,
}

/// [`Lookup`] over either database.
pub(crate) struct StoreReader<D: Dialect> {
    dialect: Arc<D>,
    reads: Pool<D>,
    /// One connection, used only for polls, so that polls and reads do not wait for each other.
    poll: Pool<D>,
    /// The number of polls sent so far, from which each poll gets its `echo`.
    polls: AtomicI64,
    /// When [`Self::reconnect`] last closed the connections.
    reconnected: Mutex<Option<Moment>>,
    /// Keys without a recorded pepper, each with the position of its digest in [`Digests::all`].
    proven: Mutex<Vec<(KeyId, usize)>>,
    clock: Arc<dyn Clock>,
}

/// The minimum time between two reconnects to a server whose answers to polls are unusable.
const RECONNECT_WAIT: Duration = Duration::from_secs(1);

impl<D: Dialect> StoreReader<D> {
    /// Creates a reader. Does not connect yet.
    pub(crate) fn new(dialect: D, settings: &StoreSettings, clock: Arc<dyn Clock>) -> Self {
        let dialect = Arc::new(dialect);
        let limits = PoolLimits {
            connections_max: settings.connections_max.saturate(),
            waiting_max: settings.reads_max.saturate(),
            connect_timeout: settings.connect_timeout,
        };
        let poll = PoolLimits { connections_max: 1, waiting_max: 1, ..limits };
        Self {
            reads: Pool::new("reads", Arc::clone(&dialect), limits),
            poll: Pool::new("poll", Arc::clone(&dialect), poll),
            polls: AtomicI64::new(0),
            reconnected: Mutex::default(),
            proven: Mutex::default(),
            dialect,
            clock,
        }
    }

    async fn ask(&self, query: &D::Query) -> Result<Vec<ReadRow>, Fault> {
        let rows = self.reads.read(query).await?;
        rows.iter()
            .map(ReadRow::of)
            .collect::<Result<_, _>>()
            .map_err(|_| Corrupt("a column has the wrong type").into())
    }

    /// Closes all connections, so that new connections go to the server to which the URL now leads. Otherwise,
    /// connections to a server that has become a standby or read-only would stay open as long as that server runs. Does
    /// this at most once in [`RECONNECT_WAIT`].
    fn reconnect(&self) {
        let now = self.clock.now();
        let mut last = self.reconnected.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| now.since(last) >= RECONNECT_WAIT) {
            *last = Some(now);
            self.poll.forget();
            self.reads.forget();
        }
    }

    /// Queues the keys whose pepper this read proved, if the database does not record it yet.
    fn note_proven(&self, rows: &[ReadRow], digests: &Digests) {
        for row in rows {
            if let Some(stored) = row.unrecorded()
                && let Some(position) = digests.all().position(|digest| digest.matches(&stored))
                && let Some(id) = row.key_id()
            {
                let mut proven = self.proven.lock().unwrap_or_else(PoisonError::into_inner);
                // If the queue is full, the key is dropped: a later read proves it again.
                if proven.len() < PROVEN_MAX && proven.iter().all(|(known, _)| *known != id) {
                    proven.push((id, position));
                }
            }
        }
    }

    /// Checks that this release can use the tables.
    async fn check_schema(&self, query: &D::Query) -> Result<(), StoreError> {
        let place = self.dialect.backend();
        let tables = match self.reads.read(query).await {
            Ok(rows) => newest_tables(&rows)?,
            Err(PoolError::Sql(error)) if D::is_missing(&error) => None,
            Err(error) => return Err(Fault::from(error).into()),
        };
        schema::check(tables, &place)
    }
}

/// The maximum number of keys whose pepper one statement records.
const PROVEN_MAX: usize = 500;

/// Returns SQL conditions for the fingerprints that are not among `known`. Exactly one condition is true for each such
/// fingerprint. The conditions are ranges, so that the database finds the few matching rows through an index and does
/// not read the other rows.
fn others(known: &[Fingerprint], literal: fn(Fingerprint) -> String) -> Vec<String> {
    let mut known = known.to_vec();
    known.sort_unstable();
    known.dedup();
    let behind = known.iter().map(|one| format!("pepper_fingerprint > {}", literal(*one)));
    let before = known.iter().map(|one| format!("pepper_fingerprint < {}", literal(*one)));
    let (first, last) = ("pepper_fingerprint IS NOT NULL".to_owned(), "true".to_owned());
    std::iter::once(first)
        .chain(behind)
        .zip(before.chain([last]))
        .map(|(behind, before)| format!("{behind} AND {before}"))
        .collect()
}

/// Converts the answer to [`OwnTableQueries::schema`]; `None` if there are no tables.
pub(crate) fn newest_tables(rows: &[impl RowExt]) -> Result<Option<schema::TableVersion>, sqlx::Error> {
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(schema::TableVersion { version: row.number(0)?, compatible_from: row.number(1)? }))
}

#[async_trait]
impl<D: Dialect> Lookup for StoreReader<D> {
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault> {
        let sent_at = self.clock.now();
        let rows = self.ask(&self.dialect.find(digests)).await?;
        self.note_proven(&rows, digests);
        Ok(rows::by_digests(rows, digests, sent_at)?)
    }

    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault> {
        let sent_at = self.clock.now();
        let rows = self.ask(&self.dialect.find_by_id(key)).await?;
        Ok(rows::by_id(rows, sent_at)?)
    }

    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError> {
        let echo = self.polls.fetch_add(1, Ordering::Relaxed);
        let sent_at = self.clock.now();
        match self.poll.read(&self.dialect.poll(since, echo)).await {
            Ok(rows) => {
                let polled = rows::polled(&rows, echo, sent_at);
                if matches!(polled, Err(PollError::Unusable(_))) {
                    self.reconnect();
                }
                polled
            }
            Err(PoolError::Sql(error)) if D::answered(&error) => {
                if D::is_replaced(&error) {
                    self.poll.forget();
                    self.reads.forget();
                }
                Err(PollError::Unusable(error.to_string().into()))
            }
            Err(error) => Err(PollError::NoAnswer(error.into())),
        }
    }

    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault {
        Fault::unreachable(Tier::Store, self.dialect.listen(changed).await)
    }

    async fn report(&self, heartbeat: &Heartbeat) -> Result<(), Fault> {
        if self.dialect.ours().is_some() {
            self.reads.read(&self.dialect.report(heartbeat)).await?;
        }
        Ok(())
    }

    async fn restore_watch(&self) -> Result<(), Fault> {
        if self.dialect.ours().is_none() {
            return Ok(());
        }
        self.dialect.restore_watch().await.map_err(|error| Fault::unreachable(Tier::Store, error))
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault> {
        if self.dialect.ours().is_none() {
            return Ok(());
        }
        self.dialect.renew_incarnation(lost).await.map_err(|error| Fault::unreachable(Tier::Store, error))
    }

    async fn prune(&self) -> Result<bool, Fault> {
        let Some(ours) = self.dialect.ours() else { return Ok(false) };
        self.reads.read(&ours.prune).await?;
        let rows = self.reads.read(&ours.is_more).await?;
        let is_more = rows.first().map_or(Ok(0), |row| row.number(0));
        Ok(is_more.map_err(|_| Corrupt("the age of a version is not a number"))? != 0)
    }

    async fn tend_peppers(&self, known: &[Fingerprint]) -> Result<Tended, Fault> {
        if !self.dialect.has_own_keys() {
            return Ok(Tended::default());
        }
        let proven = std::mem::take(&mut *self.proven.lock().unwrap_or_else(PoisonError::into_inner));
        let prints: Vec<_> = proven.iter().filter_map(|(id, position)| Some((*id, *known.get(*position)?))).collect();
        let unrecorded = match known.first() {
            Some(current) if !prints.is_empty() => {
                self.reads.read(&self.dialect.record_peppers(&prints, *current)).await.err().map(Fault::from)
            }
            _ => None,
        };
        if unrecorded.is_some() {
            // Keep these keys for the next call. This drops keys that reads queued during the failed call; later reads
            // prove those keys again.
            *self.proven.lock().unwrap_or_else(PoisonError::into_inner) = proven;
        }
        let conditions = others(known, D::fingerprint_literal);
        let rows = self.reads.read(&self.dialect.count_keys(&conditions)).await?;
        let count = rows.first().map_or(Ok(0), |row| row.number(0));
        let others = count.map_err(|_| Corrupt("the count of keys is not a number"))?.unsigned_abs();
        Ok(Tended { others, unrecorded })
    }

    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault> {
        let Some(ours) = self.dialect.ours() else { return Ok(None) };
        let rows = self.reads.read(&ours.redis_mac_key).await?;
        let hex = rows.first().map(|row| row.text(0)).transpose();
        let key = hex.ok().flatten().and_then(|hex| bytes_from_hex(&hex));
        key.map(Some).ok_or_else(|| Corrupt("the setting redis_mac_key is missing or not 32 bytes").into())
    }
}

#[async_trait]
impl<D: Dialect> Source for StoreReader<D> {
    async fn prepare(&self, missing: Missing) -> Result<(), StoreError> {
        self.dialect.prepare(missing).await?;
        if let Some(ours) = self.dialect.ours() {
            self.check_schema(&ours.schema).await?;
        }
        // Run each kind of read once, so that a missing column or right is found now and not by a request.
        let no_key = Digests { current: ApiKeyDigest::from_bytes([0; 32]), older: Vec::new() };
        self.find(&no_key).await?;
        self.find_by_id(KeyId(Uuid::nil())).await?;
        match self.poll(None).await {
            Ok(_) => Ok(()),
            Err(PollError::NoAnswer(fault)) => Err(fault.into()),
            Err(PollError::Unusable(problem)) => {
                Err(StoreError::Schema(format!("{}: {problem}", self.dialect.backend())))
            }
        }
    }

    fn run_reads_on(&self, runtime: tokio::runtime::Handle) {
        self.reads.run_on(runtime);
    }

    async fn close(&self) {
        self.reads.close().await;
        self.poll.close().await;
        self.dialect.finish().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unknown_pepper_is_in_exactly_one_range() {
        let print = |number| Fingerprint([number; 8]);
        let literal = |fingerprint: Fingerprint| fingerprint.0[0].to_string();
        assert_eq!(others(&[], literal), ["pepper_fingerprint IS NOT NULL AND true"]);
        assert_eq!(
            others(&[print(7), print(3), print(7)], literal),
            [
                "pepper_fingerprint IS NOT NULL AND pepper_fingerprint < 3",
                "pepper_fingerprint > 3 AND pepper_fingerprint < 7",
                "pepper_fingerprint > 7 AND true",
            ]
        );
    }
}
