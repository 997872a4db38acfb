//! The sampler: compares records that are held with their rows in the database, and counts those that differ although no
//! change named them.
//!
//! A proof while the server runs that no change goes unnoticed. Never fills a cache and never decides a check; what it
//! finds to differ is read again from then on. Off unless `freshness.sample_interval` is set.

use std::{panic::resume_unwind, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Cache, Shared,
    cacheable::Cacheable,
    l1::{Entry, L1},
};
use crate::{
    base::{
        jitter::Jitter,
        metrics::{IntCounter, IntCounterVec, Opts, Registry, register},
    },
    freshness::{
        ReplicaView,
        history::Provenance,
        lease::{LeaseState, stripe},
    },
    record::Versioned,
};

/// Records looked at for one that can be compared, at most: what waits for its turn may be out of date by then.
const LOOKED_AT_MAX: usize = 64;

/// What a comparison came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The row is as it is held.
    Same,
    /// A change named it meanwhile: it would not be used any more either.
    Changed,
    /// The row is another one, or gone, and no change has said so.
    Different,
    /// There is nothing to compare with: no answer, or one of a version that was not confirmed.
    Error,
}

/// A record that is held.
type Record<K> = (<K as Cacheable>::Key, Arc<Entry<K>>);

impl<K: Cacheable> Cache<K> {
    /// Compares one record after the other, each `interval` after the one before, until `stop`.
    ///
    /// Goes through all that are held, in an order that is another one in each process, and then again.
    pub async fn sample(&self, interval: Duration, mut jitter: Jitter, stop: CancellationToken) {
        let shared = &*self.shared;
        // How far the walk has come cannot be handed from thread to thread: it has one of its own, and waits there.
        let (found, mut records) = mpsc::channel(1);
        let walked = Arc::clone(&self.shared);
        let walk = spawn_blocking(move || walk(&walked.l1, &found));
        let sampling = async {
            loop {
                sleep(jitter.around(interval)).await;
                let view = Arc::clone(&shared.replica_state.load());
                if view.lease_state(shared.clock.now()) != LeaseState::Fresh {
                    continue; // nothing is relied on without asking
                }
                match shared.next(&mut records, &view).await {
                    Next::Record((key, entry)) => shared.compare(&view, &key, &entry).await,
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
}

/// Hands out all records of `l1`, and nothing after the last, again and again until nobody wants them.
fn walk<K: Cacheable>(l1: &L1<K>, found: &mpsc::Sender<Option<Record<K>>>) {
    loop {
        for record in l1.records().map(Some).chain([None]) {
            if found.blocking_send(record).is_err() {
                return;
            }
        }
    }
}

/// What is to be compared next.
enum Next<K: Cacheable> {
    Record(Record<K>),
    /// Nothing: none is held that could be used.
    None,
    /// The walk is over before its time.
    Ended,
}

impl<K: Cacheable> Shared<K> {
    /// The next record that a check would use.
    async fn next(&self, records: &mut mpsc::Receiver<Option<Record<K>>>, view: &ReplicaView) -> Next<K> {
        let mut ends = 0;
        for _ in 0..LOOKED_AT_MAX {
            match records.recv().await {
                Some(Some((key, entry))) if entry.is_current(view, self.clock.now()) => return Next::Record((key, entry)),
                Some(Some(_)) => {}
                Some(None) if ends == 0 => ends = 1,
                Some(None) => break,
                None => return Next::Ended,
            }
        }
        Next::None
    }

    /// Compares `entry`, which a check would use under `view`, with its row.
    async fn compare(&self, view: &ReplicaView, key: &K::Key, entry: &Entry<K>) {
        let Some(record) = entry.value() else { return };
        let outcome = match self.read(true, K::load_again(&*self.store, record)).await {
            Ok(live) => {
                if view.provenance(&live) == Provenance::Ahead {
                    let _ = timeout(self.replica_state.limits().lease, self.replica_state.reached(view, live.as_of)).await;
                }
                let outcome = judge(entry, view, &live);
                if outcome == Outcome::Different {
                    self.refuse(view, key, record, &live).await;
                }
                outcome
            }
            Err(_) => Outcome::Error, // the tier has counted it, and told if that is news
        };
        self.metrics.samples.of(outcome).inc();
    }

    /// Lets nobody here use what is held of `record` any more, nor what else is made of the same rows.
    async fn refuse(&self, view: &ReplicaView, key: &K::Key, record: &K::Value, live: &Versioned<Option<K::Value>>) {
        let ids: Vec<String> = K::objects(record).map(|id| id.to_string()).collect();
        tracing::error!(
            kind = K::NAME,
            ids = ids.join(", "),
            version = live.as_of.0,
            "a change went unnoticed: what is held differs from the database, and no change has named it; it is read again"
        );
        view.lease().refuse(live.as_of, K::objects(record).map(|id| stripe(id.as_bytes())));
        // Where not even a version was drawn, what was read before has the same date.
        if let Some(l2) = &self.l2 {
            l2.forget(key).await;
        }
        self.l1.forget(key);
    }
}

/// What `live`, a read of the row that `entry` is made of, says of it. Whatever was applied under `view` up to the version of
/// that read counts.
fn judge<K: Cacheable>(entry: &Entry<K>, view: &ReplicaView, live: &Versioned<Option<K::Value>>) -> Outcome {
    if view.provenance(live) != Provenance::Known || live.as_of < entry.as_of() {
        return Outcome::Error;
    }
    // After the version was seen to be applied: what it named is out of date by then.
    if !entry.is_covered(view) {
        return Outcome::Changed;
    }
    if live.value.as_ref() == entry.value() { Outcome::Same } else { Outcome::Different }
}

/// Comparisons by what they came to.
pub(crate) struct Samples {
    same: IntCounter,
    changed: IntCounter,
    different: IntCounter,
    error: IntCounter,
}

impl Samples {
    pub(crate) fn register<K: Cacheable>(registry: &Registry) -> prometheus::Result<Self> {
        let opts = Opts::new(
            "trustgate_samples_total",
            "Held records compared with the database, by kind and outcome: same, changed (a change named it meanwhile), \
             different (none did: a change went unnoticed) or error (nothing to compare with).",
        );
        let samples = register(registry, IntCounterVec::new(opts, &["kind", "outcome"]))?;
        let count = |outcome| samples.with_label_values(&[K::NAME, outcome]);
        Ok(Self {
            same: count("same"),
            changed: count("changed"),
            different: count("different"),
            error: count("error"),
        })
    }

    const fn of(&self, outcome: Outcome) -> &IntCounter {
        match outcome {
            Outcome::Same => &self.same,
            Outcome::Changed => &self.changed,
            Outcome::Different => &self.different,
            Outcome::Error => &self.error,
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        base::clock::{DatabaseTime, Moment},
        cache::{CacheSettings, api_key::ApiKey, l1::Lifetime},
        freshness::{ReplicaState, lease::Limits},
        record::{ApiKeyDigest, Change, Digests, KeyId, Lineage, Nonce, Record, StoredPeppers, TrustId, Version},
        store::Polled,
    };

    const LIMITS: Limits = Limits { lease: Duration::from_secs(1), stale: Duration::ZERO };

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
    fn a_row_that_differs_is_a_mistake_only_if_no_change_has_named_it() {
        let replica_state = ReplicaState::new(LIMITS);
        replica_state.apply(&polled(5..=5, &[]), true);
        replica_state.apply(&polled(5..=7, &[(6, Change::Key(KeyId(Uuid::from_u128(1))))]), true);
        let view = replica_state.load();
        let revoked = |key| Some(Record { revoked_at: Some(DatabaseTime::from_micros(1)), ..record(key) });
        for (key, live, want) in [
            (2, versioned(Some(record(2)), 7), Outcome::Same),
            (2, versioned(revoked(2), 7), Outcome::Different),
            (2, versioned(revoked(2), 5), Outcome::Different),
            (2, versioned(None, 7), Outcome::Different),
            (1, versioned(revoked(1), 7), Outcome::Changed),
            (1, versioned(Some(record(1)), 7), Outcome::Changed),
            (2, versioned(revoked(2), 8), Outcome::Error),
            (2, versioned(revoked(2), 4), Outcome::Error),
            (2, Versioned { nonce: Nonce([0; 16]), ..versioned(revoked(2), 7) }, Outcome::Error),
        ] {
            assert_eq!(judge(&entry(key, 5, &view), &view, &live), want, "{live:?}");
        }
        assert_eq!(judge(&entry(2, 7, &view), &view, &versioned(revoked(2), 6)), Outcome::Error, "read before");
    }

    #[test]
    fn a_walk_hands_out_every_record_and_begins_again() {
        let replica_state = ReplicaState::new(LIMITS);
        let l1 = Arc::new(L1::<ApiKey>::new(&CacheSettings::default()));
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
