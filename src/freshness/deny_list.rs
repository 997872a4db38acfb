//! The deny list: keys, trusts and digests that checks deny, even if the database contains a valid record. The deny
//! list also works while the database is down.
//!
//! The deny list can only deny requests; it cannot grant them. Its sources are a file and a hash in Redis. If a source
//! cannot be read, the entries that were read from it before stay in force.

pub(crate) mod entries;
pub(crate) mod file;
pub(crate) mod redis;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::{
    entries::{Denied, Entries},
    file::{Look, Watched},
    redis::{Memory, SharedList},
};
use crate::{
    base::{
        clock::DatabaseTime,
        metrics::{IntGauge, IntGaugeVec, Opts, Registry, register},
        saturate::Saturate as _,
    },
    record::{ApiKeyDigest, Record},
};

pub(crate) use self::file::check_file;

/// The interval at which the server looks for changes to the file. A change takes effect after at most two reads (see
/// [`mod@file`]), well within the documented second.
const FILE_INTERVAL: Duration = Duration::from_millis(200);
/// The interval at which the server reads the list in Redis.
const SHARED_INTERVAL: Duration = Duration::from_millis(500);
/// The interval at which the server tests whether the MAC key is known. After that, the server reads the list in Redis.
/// The test does no I/O.
const MAC_KEY_INTERVAL: Duration = Duration::from_millis(50);

/// A source of deny list entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListSource {
    File,
    Redis,
}

/// The entries from each source.
#[derive(Clone, Debug, Default)]
struct Lists([Arc<Entries>; 2]);

/// The metrics of the deny list.
#[derive(Clone)]
pub struct DenyMetrics {
    entries: [IntGauge; 2],
    stale: [IntGauge; 2],
}

impl DenyMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// Returns the error of [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let entries = Opts::new("trustgate_deny_entries", "Entries of the deny list, by source (file, redis).");
        let stale = Opts::new(
            "trustgate_deny_stale",
            "1 while a source of the deny list (file, redis) cannot be read completely, otherwise 0. Entries that were \
             read before stay in force.",
        );
        let gauges = |opts| -> prometheus::Result<[IntGauge; 2]> {
            let gauges = register(registry, IntGaugeVec::new(opts, &["source"]))?;
            Ok(["file", "redis"].map(|source| gauges.with_label_values(&[source])))
        };
        Ok(Self { entries: gauges(entries)?, stale: gauges(stale)? })
    }
}

/// The deny list that checks use, and the state of its sources.
pub struct DenyList {
    /// False while both lists are empty, so that checks can skip the lookup.
    any: AtomicBool,
    lists: ArcSwap<Lists>,
    /// Locked while `lists` and `any` are updated together.
    changing: Mutex<()>,
    /// For each source, the problem that was logged last.
    logged: Mutex<[Option<String>; 2]>,
    file: Option<PathBuf>,
    metrics: DenyMetrics,
}

impl DenyList {
    /// Creates the deny list and reads `file`. Skips lines that cannot be read, and logs the first of them.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, which is a configuration error at startup.
    pub fn open(file: Option<PathBuf>, metrics: DenyMetrics) -> io::Result<Self> {
        let list = Self {
            any: AtomicBool::new(false),
            lists: ArcSwap::from_pointee(Lists::default()),
            changing: Mutex::default(),
            logged: Mutex::default(),
            file,
            metrics,
        };
        if let Some(path) = &list.file {
            let reading = file::read(path)?;
            list.put(ListSource::File, reading.entries);
            list.log_problem(ListSource::File, reading.problem.map(|problem| problem.to_string()));
        }
        Ok(list)
    }

    /// Returns true if the list denies a key at `now`. `lookup` is the digest by which the check looked up the key, and
    /// `record` is the record that the check found. Costs one atomic load while the list is empty.
    #[must_use]
    pub fn denies(&self, lookup: &ApiKeyDigest, record: &Record, now: DatabaseTime) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let lists = self.lists.load();
        let objects = [
            Denied::Key(record.key_id),
            Denied::Trust(record.trust_id),
            Denied::Digest(*lookup),
            Denied::Digest(record.digest),
        ];
        lists.0.iter().filter(|entries| !entries.is_empty()).any(|entries| {
            objects.iter().any(|object| entries.get(object).is_some_and(|end| end.is_none_or(|end| now < end)))
        })
    }

    /// Applies changes to the sources until `stop` is cancelled. New entries in the file take effect after at most 200
    /// ms, removals from the file after at most 400 ms, and changes in Redis after at most 500 ms, plus the duration of
    /// the reads. `now` returns the database's time, or `None` while the time is unknown.
    ///
    /// # Cancel safety
    /// Safe: the entries that were read last stay in force.
    pub async fn run(
        &self,
        shared: Option<SharedList>,
        now: impl Fn() -> Option<DatabaseTime> + Send + Sync,
        stop: CancellationToken,
    ) {
        let file = async {
            match &self.file {
                Some(path) => self.watch_file(path.clone()).await,
                None => std::future::pending().await,
            }
        };
        let redis = async {
            match shared {
                Some(shared) => self.poll_shared(&shared, &now).await,
                None => std::future::pending().await,
            }
        };
        stop.run_until_cancelled(async {
            // Neither future ends before the runtime shuts down.
            tokio::select! {
                biased;
                () = file => {}
                () = redis => {}
            }
        })
        .await;
    }

    async fn watch_file(&self, path: PathBuf) {
        let mut watched = Watched::new(path, self.lists.load().of(ListSource::File));
        let mut ticks = interval(FILE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A read can block for a long time on a network file system.
            let looking = tokio::task::spawn_blocking(move || (watched.look(), watched));
            let (look, after) = match looking.await {
                Ok(looked) => looked,
                // Propagate the panic, which ends this task. The server then logs the name of the task and stops.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return, // the runtime is shutting down
            };
            watched = after;
            match look {
                Look::Same => {}
                Look::Read { in_force, problem } => {
                    self.put(ListSource::File, in_force);
                    self.log_problem(ListSource::File, problem);
                }
                Look::Failed(problem) => self.log_problem(ListSource::File, Some(problem)),
            }
        }
    }

    async fn poll_shared(&self, shared: &SharedList, now: &(impl Fn() -> Option<DatabaseTime> + Send + Sync)) {
        while !shared.has_mac_key() {
            tokio::time::sleep(MAC_KEY_INTERVAL).await;
        }
        let mut memory = Memory::default();
        let mut ticks = interval(SHARED_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match shared.read().await {
                Ok(found) => {
                    let problem = found.problem();
                    self.put(ListSource::Redis, memory.merge(found, now()));
                    self.log_problem(ListSource::Redis, problem);
                }
                Err(error) => self.log_problem(ListSource::Redis, Some(error.to_string())),
            }
        }
    }

    fn put(&self, source: ListSource, entries: Entries) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.metrics.entries[source as usize].set(entries.len().saturate());
        let mut lists = Lists::clone(&self.lists.load());
        lists.0[source as usize] = Arc::new(entries);
        let any = lists.0.iter().any(|entries| !entries.is_empty());
        self.lists.store(Arc::new(lists));
        // Store `any` after the lists, so that a check that sees the new `any` also sees the new lists.
        self.any.store(any, Ordering::Release);
    }

    /// Sets the metric for a source. Logs the source's problem when the problem changes, and logs when the problem is
    /// resolved.
    fn log_problem(&self, source: ListSource, problem: Option<String>) {
        self.metrics.stale[source as usize].set(i64::from(problem.is_some()));
        let logged = &mut self.logged.lock().unwrap_or_else(PoisonError::into_inner)[source as usize];
        if problem == *logged {
            return;
        }
        let name = match (source, &self.file) {
            (ListSource::File, Some(path)) => format!("freshness.deny_file {}", path.display()),
            _ => "Redis".to_owned(),
        };
        if let Some(problem) = &problem {
            tracing::error!(
                problem,
                "deny list not fully loaded from {name}; entries that were read before stay in force"
            );
        } else {
            tracing::info!("deny list fully loaded again from {name}");
        }
        *logged = problem;
    }
}

impl Lists {
    fn of(&self, source: ListSource) -> Arc<Entries> {
        Arc::clone(&self.0[source as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use uuid::Uuid;

    use super::*;
    use crate::base::clock::{Clock as _, SystemClock};
    use crate::record::{KeyId, TrustId};

    const NOW: DatabaseTime = DatabaseTime::from_micros(1_000_000);

    fn record() -> Record {
        Record {
            key_id: KeyId(Uuid::from_u128(1)),
            trust_id: TrustId(Uuid::from_u128(2)),
            trust_enabled: true,
            digest: ApiKeyDigest::from_bytes([3; 32]),
            scopes: [].into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        }
    }

    fn list(file: Option<PathBuf>) -> DenyList {
        DenyList::open(file, DenyMetrics::register(&Registry::new()).unwrap()).unwrap()
    }

    fn denies(list: &DenyList) -> bool {
        list.denies(&ApiKeyDigest::from_bytes([4; 32]), &record(), NOW)
    }

    #[test]
    fn entry_denies_by_key_trust_or_digest_until_it_expires() {
        let at = |micros| Some(DatabaseTime::from_micros(micros));
        let digest = |byte| Denied::Digest(ApiKeyDigest::from_bytes([byte; 32]));
        let (key, trust) =
            (|id| Denied::Key(KeyId(Uuid::from_u128(id))), |id| Denied::Trust(TrustId(Uuid::from_u128(id))));
        for (name, denied, until, want) in [
            ("key", key(1), None, true),
            ("trust", trust(2), None, true),
            ("stored digest", digest(3), None, true),
            ("digest it was looked up by", digest(4), None, true),
            ("just before the end", key(1), at(1_000_001), true),
            ("at the end", key(1), at(1_000_000), false),
            ("another key", key(2), None, false),
            ("another trust", trust(1), None, false),
            ("another digest", digest(5), None, false),
        ] {
            for source in [ListSource::File, ListSource::Redis] {
                let list = list(None);
                assert!(!denies(&list));
                list.put(source, [(denied, until)].into());
                assert_eq!(denies(&list), want, "{name}");
                assert_eq!(list.metrics.entries[source as usize].get(), 1);
                list.put(source, Entries::new());
                assert!(!denies(&list) && !list.any.load(Ordering::Relaxed));
            }
        }
    }

    /// Waits until `condition` is true, and returns how long that took.
    async fn until(condition: impl Fn() -> bool) -> Duration {
        let start = SystemClock.now();
        while !condition() {
            assert!(SystemClock.now().since(start) < Duration::from_secs(30), "timeout");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        SystemClock.now().since(start)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn file_changes_take_effect_within_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny");
        fs::write(&path, format!("{}\nnonsense", Denied::Key(record().key_id).line())).unwrap();
        let list = Arc::new(list(Some(path.clone())));
        assert!(denies(&list), "read when the list is opened");
        let stale = &list.metrics.stale[0];
        assert_eq!(stale.get(), 1);

        let stop = CancellationToken::new();
        // The database's clock stays unknown in this test, because entries from the file do not need it.
        let running = {
            let (list, stop) = (Arc::clone(&list), stop.clone());
            async move { list.run(None, || None, stop).await }
        };
        let running = tokio::spawn(running);
        fs::write(&path, "").unwrap();
        assert!(until(|| !denies(&list)).await < Duration::from_secs(1));
        assert!(until(|| stale.get() == 0).await < Duration::from_secs(1));
        fs::write(&path, Denied::Trust(record().trust_id).line()).unwrap();
        assert!(until(|| denies(&list)).await < Duration::from_secs(1));
        fs::remove_file(&path).unwrap();
        until(|| stale.get() == 1).await;
        assert!(denies(&list), "a missing file removes no entry");
        stop.cancel();
        running.await.unwrap();
    }

    #[test]
    fn missing_file_is_an_error_at_startup() {
        let missing = Some(PathBuf::from("/nowhere/deny"));
        let opened = DenyList::open(missing, DenyMetrics::register(&Registry::new()).unwrap());
        assert!(opened.is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
    }
}
