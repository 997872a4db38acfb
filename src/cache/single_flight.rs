//! Single flight: concurrent callers that need the same key share one load. The load continues when the caller that
//! started it leaves.
//!
//! This module does not depend on the cache: the caller passes the load, and the work that follows once the waiters
//! have their result.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{runtime::Handle, sync::SetOnce};
use tokio_util::task::TaskTracker;

use crate::base::fault::Fault;

/// The maximum number of tasks at one time over all keys. A task is a load and the work that follows it. Beyond the
/// limit, a caller gets a fault at once, because waiting would only use up its deadline.
const TASKS_MAX: usize = 4_096;

/// The result of one load, shared by its waiters. They wake in the order in which they arrived.
type ResultSlot<V> = Arc<SetOnce<Result<V, Fault>>>;
type InFlight<K, V> = Arc<Mutex<HashMap<K, ResultSlot<V>>>>;

/// The loads that are in flight, run on the I/O runtime. Callers may be on any runtime.
pub(crate) struct SingleFlight<K, V> {
    io: Handle,
    tasks: TaskTracker,
    in_flight: InFlight<K, V>,
}

/// How a caller got its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joined {
    /// From a load that this caller started.
    Own,
    /// From a load that was in flight before, or from the cache.
    Other,
}

impl<K, V> SingleFlight<K, V>
where
    K: Copy + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Creates an instance without loads. Loads run on `io`.
    pub(crate) fn new(io: Handle) -> Self {
        Self { io, tasks: TaskTracker::new(), in_flight: Arc::default() }
    }

    /// Waits for the load of `key` that is in flight, or starts one.
    ///
    /// `cached` runs right before a load starts, because another load may have ended since the caller looked into its
    /// cache. `start` is called only if this caller starts the load. It returns the load, and the work that follows
    /// once the waiters have their value.
    ///
    /// # Errors
    /// The [`Fault`] of the load, shared by all its waiters; [`Fault::Overloaded`] beyond the limit of tasks.
    ///
    /// # Cancel safety
    /// Safe: the load continues and its value reaches the other waiters.
    pub(crate) async fn join_or_start<L, F, P>(
        &self,
        key: K,
        cached: impl FnOnce() -> Option<V>,
        start: impl FnOnce() -> (L, F),
    ) -> (Result<V, Fault>, Joined)
    where
        L: Future<Output = Result<V, Fault>> + Send + 'static,
        F: FnOnce(V) -> P + Send + 'static,
        P: Future<Output = ()> + Send + 'static,
    {
        let (slot, joined) = {
            let mut in_flight = lock(&self.in_flight);
            if let Some(slot) = in_flight.get(&key) {
                (Arc::clone(slot), Joined::Other)
            } else if let Some(value) = cached() {
                return (Ok(value), Joined::Other);
            } else if self.tasks.len() >= TASKS_MAX {
                return (Err(Fault::Overloaded { limit: "loads in flight" }), Joined::Own);
            } else {
                let slot = ResultSlot::<V>::default();
                in_flight.insert(key, Arc::clone(&slot));
                let guard = InFlightGuard {
                    key,
                    in_flight: Arc::clone(&self.in_flight),
                    slot: Arc::clone(&slot),
                    outcome: Err(Fault::Ended),
                };
                // Release the lock before the spawn: a runtime that is shutting down drops the task at once on this
                // thread, and the drop of `guard` takes the lock.
                drop(in_flight);
                let (load, publish) = start();
                self.spawn(guard, load, publish);
                (slot, Joined::Own)
            }
        };
        (slot.wait().await.clone(), joined)
    }

    fn spawn<L, P>(&self, mut guard: InFlightGuard<K, V>, load: L, publish: impl FnOnce(V) -> P + Send + 'static)
    where
        L: Future<Output = Result<V, Fault>> + Send + 'static,
        P: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn_on(
            async move {
                guard.outcome = load.await;
                let outcome = guard.outcome.clone();
                drop(guard);
                if let Ok(value) = outcome {
                    publish(value).await;
                }
            },
            &self.io,
        );
    }

    /// The number of tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until all tasks have ended.
    pub(crate) async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Removes a load from the map when it ends, and passes its outcome to the waiters. The outcome is [`Fault::Ended`] if
/// the load panicked or its runtime shut down.
struct InFlightGuard<K: Eq + Hash, V> {
    key: K,
    in_flight: InFlight<K, V>,
    slot: ResultSlot<V>,
    outcome: Result<V, Fault>,
}

impl<K: Eq + Hash, V> Drop for InFlightGuard<K, V> {
    fn drop(&mut self) {
        lock(&self.in_flight).remove(&self.key);
        // Only this guard sets the slot, so it is still empty.
        let _ = self.slot.set(std::mem::replace(&mut self.outcome, Err(Fault::Ended)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each insertion and removal is one call, so a panic elsewhere leaves the map intact.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    #[test]
    fn a_load_on_a_runtime_that_has_ended_fails_and_does_not_hang() {
        let (done, is_done) = mpsc::channel();
        // On another thread, because a deadlock would block it forever.
        thread::spawn(move || {
            let ended = Runtime::new().unwrap();
            let io = ended.handle().clone();
            ended.shutdown_background();
            let loads = SingleFlight::<u8, u8>::new(io);
            let joining = loads.join_or_start(1, || None, || (async { Ok(1) }, |_| async {}));
            let (outcome, _) = Builder::new_current_thread().build().unwrap().block_on(joining);
            done.send(matches!(outcome, Err(Fault::Ended))).unwrap();
        });
        assert_eq!(is_done.recv_timeout(Duration::from_secs(30)), Ok(true));
    }
}
