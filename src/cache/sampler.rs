//! The sampler: compares cached records with their rows in the database, and counts the records that differ without a
//! recorded change that explains the difference.
//!
//! While the server runs, the sampler detects changes that are missing from the change log. It adds no cache entries
//! and does not influence the decision of any check, except that later checks load a differing record again. The
//! sampler is off unless `freshness.sample_interval` is set.

use std::{panic::resume_unwind, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    cacheable::Cacheable,
    l1::{Entry, L1},
    loader::{Loader, Seen},
    metrics::Comparison,
};
use crate::{
    base::jitter::Jitter,
    freshness::{
        ReplicaView,
        history::Provenance,
        lease::{LeaseState, stripe},
    },
    record::Versioned,
};

/// The maximum number of records to examine for one comparison. Records in L1 that are out of date are skipped.
const TRIED_MAX: usize = 64;

/// A cached record and its cache key.
type CachedRecord<K> = (<K as Cacheable>::Key, Arc<Entry<K>>);

/// Compares cached records with the database, one record per `interval`, until `stop` is cancelled. Walks over all
/// records in an order that differs between processes, and then starts again.
pub(crate) async fn sample<K: Cacheable>(
    loader: &Arc<Loader<K>>,
    interval: Duration,
    mut jitter: Jitter,
    stop: CancellationToken,
) {
    // moka's iterator cannot move between threads, so the walk runs on a dedicated thread and blocks that thread.
    let (found, mut records) = mpsc::channel(1);
    let walked = Arc::clone(loader);
    let walk = spawn_blocking(move || walk(&walked.l1, &found));
    let sampling = async {
        loop {
            sleep(jitter.around(interval)).await;
            let view = Arc::clone(&loader.replica_state.load());
            if view.lease_state(loader.clock.now()) != LeaseState::Fresh {
                continue; // polls are not succeeding, so no poll could confirm the version of a read
            }
            match next(loader, &mut records, &view).await {
                Next::Record((key, entry)) => compare(loader, &view, &key, &entry).await,
                Next::None => {}
                Next::Ended => return,
            }
        }
    };
    stop.run_until_cancelled(sampling).await;
    drop(records); // ends the walk
    if let Err(Ok(panic)) = walk.await.map_err(tokio::task::JoinError::try_into_panic) {
        resume_unwind(panic);
    }
}

/// Sends all records of `l1` and then `None`, and repeats this until the receiver is dropped.
fn walk<K: Cacheable>(l1: &L1<K>, found: &mpsc::Sender<Option<CachedRecord<K>>>) {
    loop {
        for record in l1.records().map(Some).chain([None]) {
            if found.blocking_send(record).is_err() {
                return;
            }
        }
    }
}

/// The next record to compare.
enum Next<K: Cacheable> {
    Record(CachedRecord<K>),
    /// No usable record was found.
    None,
    /// The walk has ended unexpectedly.
    Ended,
}

/// Returns the next record that a check could use. Examines at most [`TRIED_MAX`] records.
async fn next<K: Cacheable>(
    loader: &Loader<K>,
    records: &mut mpsc::Receiver<Option<CachedRecord<K>>>,
    view: &ReplicaView,
) -> Next<K> {
    let mut ends = 0;
    for _ in 0..TRIED_MAX {
        match records.recv().await {
            Some(Some((key, entry))) if entry.is_current(view, loader.clock.now()) => {
                return Next::Record((key, entry));
            }
            Some(Some(_)) => {}
            Some(None) if ends == 0 => ends = 1,
            Some(None) => break,
            None => return Next::Ended,
        }
    }
    Next::None
}

/// Compares `entry`, which a check could use in `view`, with its row in the database.
async fn compare<K: Cacheable>(loader: &Loader<K>, view: &ReplicaView, key: &K::Key, entry: &Entry<K>) {
    let Some(record) = entry.value() else { return };
    let comparison = match loader.read(Seen::Good, K::load_again(&*loader.store, record)).await {
        Ok(live) => {
            if view.provenance(&live) == Provenance::Ahead {
                let lease = loader.replica_state.limits().lease;
                let _ = timeout(lease, loader.replica_state.reached(view, live.as_of)).await;
            }
            let comparison = judge(entry, view, &live);
            if comparison == Comparison::Different {
                discard(loader, view, key, record, &live).await;
            }
            comparison
        }
        Err(_) => Comparison::Error, // `read` has counted the failure
    };
    loader.metrics.samples.of(comparison).inc();
}

/// Logs that `record` differs from its row, and ensures that checks no longer use this record or other entries made
/// from the same rows.
async fn discard<K: Cacheable>(
    loader: &Loader<K>,
    view: &ReplicaView,
    key: &K::Key,
    record: &K::Value,
    live: &Versioned<Option<K::Value>>,
) {
    let ids: Vec<String> = K::objects(record).map(|id| id.to_string()).collect();
    tracing::error!(
        kind = K::NAME,
        ids = ids.join(", "),
        version = live.as_of.0,
        "sample differs: a cached record does not match the database, and no recorded change explains the difference. \
         The next check loads the record again. Other entries may be affected: run `trustgate cache clear`"
    );
    view.lease().refuse(live.as_of, K::objects(record).map(|id| stripe(id.as_bytes())));
    // If the change was committed without a new version, an outdated value in Redis still has the current version, and
    // checks would use that value again. So delete the value from Redis.
    if let Some(l2) = &loader.l2 {
        l2.forget(key).await;
    }
    loader.l1.forget(key);
}

/// Compares `entry` with `live`, the result of reading its row again. Takes into account the changes that were applied
/// in `view` up to the version of that read.
fn judge<K: Cacheable>(entry: &Entry<K>, view: &ReplicaView, live: &Versioned<Option<K::Value>>) -> Comparison {
    if view.provenance(live) != Provenance::Known || live.as_of < entry.as_of() {
        return Comparison::Error;
    }
    // At this point, the version of `live` has been applied, so `view` contains all changes up to that version.
    if !entry.is_covered(view) {
        return Comparison::Changed;
    }
    if live.value.as_ref() == entry.value() { Comparison::Same } else { Comparison::Different }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        base::clock::{DatabaseTime, Moment},
        cache::{CacheSettings, api_key::ApiKey, l1::Lifetime},
        freshness::{ReplicaState, lease::LeaseLimits, replica_state::ChangeLog},
        record::{ApiKeyDigest, Change, Digests, KeyId, Lineage, Nonce, Record, StoredPeppers, TrustId, Version},
        store::Polled,
    };

    const LIMITS: LeaseLimits = LeaseLimits { lease: Duration::from_secs(1), stale: Duration::ZERO };

    fn digests(key: u8) -> Digests {
        Digests { current: ApiKeyDigest::from_bytes([key; 32]), older: Vec::new() }
    }

    fn record(key: u8) -> Record {
        Record {
            key_id: KeyId(Uuid::from_u128(key.into())),
            trust_id: TrustId(Uuid::from_u128(99)),
            trust_enabled: true,
            digest: digests(key).current,
            scopes: [].into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        }
    }

    fn versioned<T>(value: T, version: u64) -> Versioned<T> {
        Versioned {
            value,
            as_of: Version(version),
            nonce: Nonce([u8::try_from(version).unwrap(); 16]),
            lineage: Lineage { system: 1, ..Lineage::default() },
            read_at: DatabaseTime::from_micros(0),
            sent_at: Moment::from_nanos(0),
        }
    }

    fn polled(versions: std::ops::RangeInclusive<u64>, changes: &[(u64, Change)]) -> Polled {
        Polled {
            newest: versioned((), *versions.end()),
            stamped_at: DatabaseTime::from_micros(0),
            oldest: Version(1),
            triggers_intact: true,
            versions: versions.map(|version| (Version(version), versioned((), version).nonce)).collect(),
            changes: changes.iter().map(|(version, change)| (Version(*version), change.clone())).collect(),
            complete: true,
            peppers: StoredPeppers::default(),
        }
    }

    fn entry(key: u8, version: u64, view: &ReplicaView) -> Entry<ApiKey> {
        let lifetime = Lifetime { born: Moment::from_nanos(0), lasts: Duration::from_mins(1) };
        Entry::new(&digests(key), Some(record(key)), Version(version), lifetime, Some(view.epoch()))
    }

    #[test]
    fn differing_row_counts_as_different_only_without_an_applied_change() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(5..=5, &[]), ChangeLog::Present);
        replica_state.apply(&polled(5..=7, &[(6, Change::Key(KeyId(Uuid::from_u128(1))))]), ChangeLog::Present);
        let view = replica_state.load();
        let revoked = |key| Some(Record { revoked_at: Some(DatabaseTime::from_micros(1)), ..record(key) });
        for (key, live, want) in [
            (2, versioned(Some(record(2)), 7), Comparison::Same),
            (2, versioned(revoked(2), 7), Comparison::Different),
            (2, versioned(revoked(2), 5), Comparison::Different),
            (2, versioned(None, 7), Comparison::Different),
            (1, versioned(revoked(1), 7), Comparison::Changed),
            (1, versioned(Some(record(1)), 7), Comparison::Changed),
            (2, versioned(revoked(2), 8), Comparison::Error),
            (2, versioned(revoked(2), 4), Comparison::Error),
            (2, Versioned { nonce: Nonce([0; 16]), ..versioned(revoked(2), 7) }, Comparison::Error),
        ] {
            assert_eq!(judge(&entry(key, 5, &view), &view, &live), want, "{live:?}");
        }
        assert_eq!(judge(&entry(2, 7, &view), &view, &versioned(revoked(2), 6)), Comparison::Error, "read before");
    }

    #[test]
    fn walk_sends_each_record_and_starts_again() {
        let replica_state = ReplicaState::new(LIMITS);
        let l1 = Arc::new(L1::<ApiKey>::new(CacheSettings::default().size, CacheSettings::default().negative_size));
        let keys = 1..=9_u8;
        for key in keys.clone() {
            l1.put(digests(key).current, Arc::new(entry(key, 5, &replica_state.load())));
        }
        let (found, mut records) = mpsc::channel(1);
        let walked = std::thread::spawn({
            let l1 = Arc::clone(&l1);
            move || walk(&l1, &found)
        });
        for _ in 0..2 {
            let pass = std::iter::from_fn(|| records.blocking_recv().unwrap());
            let mut pass: Vec<_> = pass.map(|(key, _)| key.as_bytes()[0]).collect();
            pass.sort_unstable();
            assert_eq!(pass, keys.clone().collect::<Vec<_>>());
        }
        drop(records);
        walked.join().unwrap();
    }
}
