//! Single flight: however many callers wait for one key, one load goes, and it goes on when the first of them leaves.
//!
//! Never caches: what a flight found is in L1 before it lands, if the poll has confirmed its version by then.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{runtime::Handle, sync::SetOnce};
use tokio_util::task::TaskTracker;

use super::{Loaded, Shared, cacheable::Cacheable};
use crate::base::fault::Fault;

/// Loads that may be in the air at one time, over all keys. Beyond it a caller gets a fault: waiting would only make
/// its own deadline pass. Enough for 40 000 cold keys a second at 100 ms each.
const IN_FLIGHT_MAX: usize = 4_096;

/// What a flight comes to. Those who wait for it go on in the order in which they came.
type ResultSlot<K> = Arc<SetOnce<Result<Loaded<K>, Fault>>>;
type InFlight<K> = Arc<Mutex<HashMap<(<K as Cacheable>::Key, LoadPath), ResultSlot<K>>>>;

/// Where a flight looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadPath {
    /// In L2, then in the store.
    Tiers,
    /// In the store alone.
    Store,
}

/// The flights of one kind, on the I/O runtime. Callers may be on any runtime.
pub struct SingleFlight<K: Cacheable> {
    io: Handle,
    tasks: TaskTracker,
    in_flight: InFlight<K>,
}

impl<K: Cacheable> SingleFlight<K> {
    /// No flights yet; they will run on `io`.
    pub fn new(io: Handle) -> Self {
        Self { io, tasks: TaskTracker::new(), in_flight: Arc::default() }
    }

    /// Waits for the flight of `query`, beginning it if there is none, and says whether it was in the air before. One that
    /// is joined after the end of another began after that.
    pub(super) async fn join(
        &self,
        shared: &Arc<Shared<K>>,
        query: K::Query,
        path: LoadPath,
    ) -> (Result<Loaded<K>, Fault>, bool) {
        let (slot, joined) = match self.join_or_start(shared, query, path) {
            Ok(JoinOutcome::Cached(loaded)) => return (Ok(loaded), true),
            Ok(JoinOutcome::Started(slot)) => (slot, false),
            Ok(JoinOutcome::Joined(slot)) => (slot, true),
            Err(fault) => return (Err(fault), false),
        };
        (slot.wait().await.clone(), joined)
    }

    /// Flights that have not ended.
    pub fn in_flight(&self) -> usize {
        self.tasks.len()
    }

    /// Waits for the end of every flight.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn join_or_start(&self, shared: &Arc<Shared<K>>, query: K::Query, path: LoadPath) -> Result<JoinOutcome<K>, Fault> {
        let name = (K::key(&query), path);
        let mut in_flight = lock(&self.in_flight);
        if let Some(slot) = in_flight.get(&name) {
            return Ok(JoinOutcome::Joined(Arc::clone(slot)));
        }
        if path == LoadPath::Tiers {
            // A flight may have landed between the caller's look into L1 and now.
            let (view, now) = (shared.replica_state.load(), shared.clock.now());
            if let Some(entry) = shared.l1.get(&name.0).filter(|entry| entry.is_current(&view, now)) {
                return Ok(JoinOutcome::Cached(Loaded { entry, read: None }));
            }
        }
        if self.tasks.len() >= IN_FLIGHT_MAX {
            return Err(Fault::Overloaded { limit: "loads in the air" });
        }
        let slot = ResultSlot::<K>::default();
        in_flight.insert(name, Arc::clone(&slot));
        let mut guard = InFlightGuard {
            name,
            in_flight: Arc::clone(&self.in_flight),
            slot: Arc::clone(&slot),
            outcome: Err(Fault::Ended),
        };
        // A runtime that shuts down drops the task at once, on this thread, and the drop of `guard` takes the lock.
        drop(in_flight);
        let shared = Arc::clone(shared);
        self.tasks.spawn_on(
            async move {
                guard.outcome = shared.load(&query, path).await;
                let outcome = guard.outcome.clone();
                drop(guard);
                if let Ok(loaded) = outcome {
                    shared.publish(&query, loaded).await;
                }
            },
            &self.io,
        );
        Ok(JoinOutcome::Started(slot))
    }
}

enum JoinOutcome<K: Cacheable> {
    Cached(Loaded<K>),
    Joined(ResultSlot<K>),
    Started(ResultSlot<K>),
}

/// Takes the flight off the list when it ends, and says what it came to: [`Fault::Ended`] where it panicked, or the
/// runtime is going down.
struct InFlightGuard<K: Cacheable> {
    name: (K::Key, LoadPath),
    in_flight: InFlight<K>,
    slot: ResultSlot<K>,
    outcome: Result<Loaded<K>, Fault>,
}

impl<K: Cacheable> Drop for InFlightGuard<K> {
    fn drop(&mut self) {
        lock(&self.in_flight).remove(&self.name);
        // Nobody else sets it.
        let _ = self.slot.set(std::mem::replace(&mut self.outcome, Err(Fault::Ended)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Insertions and removals are whole at every moment, whoever panicked elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
