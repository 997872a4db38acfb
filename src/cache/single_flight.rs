//! Single flight: concurrent callers that need the same key share one load. The load continues even if the caller that
//! started it is cancelled.
//!
//! This module does not depend on the cache: the caller passes the load, and the work to do after the waiters have
//! received the result.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{runtime::Handle, sync::SetOnce};
use tokio_util::task::TaskTracker;

use crate::base::fault::Fault;

/// The maximum number of loads in flight, over all keys. Beyond this limit, a caller gets a fault immediately, because
/// waiting would only use up the caller's deadline.
const LOADS_MAX: usize = 4_096;
/// The maximum number of tasks that publish values or load them. If this limit is exceeded when a load ends, the loaded
/// value is not published: the waiters have the value, and the next check of the key loads it again. Publishing can
/// take as long as a lease, so tasks that publish do not count as loads: they must not turn checks into faults.
const TASKS_MAX: usize = 2 * LOADS_MAX;

/// The result of one load, shared by its waiters. The waiters wake in the order of their arrival.
type ResultSlot<V> = Arc<SetOnce<Result<V, Fault>>>;
type InFlight<K, V> = Arc<Mutex<HashMap<K, ResultSlot<V>>>>;

/// The loads that are in flight. Loads run on the I/O runtime; callers may run on any runtime.
pub(crate) struct SingleFlight<K, V> {
    io: Handle,
    tasks: TaskTracker,
    in_flight: InFlight<K, V>,
}

/// The source of a caller's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joined {
    /// A load that this caller started, or the limit on loads, which prevented a load.
    Own,
    /// A load that was already in flight, or the cache.
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

    /// Joins the load for `key` that is in flight, or starts a load, and waits for the result.
    ///
    /// `cached` runs right before a load would start, because another load may have ended since the caller looked in
    /// the cache. `start` is called only if this caller starts the load. It returns the load, and the work to do after
    /// the waiters have received their value.
    ///
    /// # Errors
    /// Returns the [`Fault`] of the load, which all waiters share, or [`Fault::Overloaded`] if there are already
    /// [`LOADS_MAX`] loads in flight.
    ///
    /// # Cancel safety
    /// Safe: the load continues, and the other waiters receive its value.
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
            } else if in_flight.len() >= LOADS_MAX {
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
                // Release the lock before the spawn: a runtime that is shutting down drops the task immediately on this
                // thread, and dropping `guard` takes the lock.
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
        let tasks = self.tasks.clone();
        self.tasks.spawn_on(
            async move {
                guard.outcome = load.await;
                let outcome = guard.outcome.clone();
                drop(guard);
                if let Ok(value) = outcome
                    && tasks.len() <= TASKS_MAX
                {
                    publish(value).await;
                }
            },
            &self.io,
        );
    }

    /// Returns the number of tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until all tasks have ended.
    pub(crate) async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Removes a load from the map when the load ends, and passes its outcome to the waiters. The outcome is
/// [`Fault::Ended`] if the load panicked or its runtime shut down.
struct InFlightGuard<K: Eq + Hash, V> {
    key: K,
    in_flight: InFlight<K, V>,
    slot: ResultSlot<V>,
    outcome: Result<V, Fault>,
}

impl<K: Eq + Hash, V> Drop for InFlightGuard<K, V> {
    fn drop(&mut self) {
        lock(&self.in_flight).remove(&self.key);
        // The slot is still empty, because only this guard sets it.
        let _ = self.slot.set(std::mem::replace(&mut self.outcome, Err(Fault::Ended)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each insertion and removal is one call, so a panic between calls leaves the map consistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        thread,
        time::Duration,
    };

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    #[tokio::test]
    async fn values_waiting_to_be_published_are_bounded_and_do_not_block_loads() {
        let loads = SingleFlight::<usize, usize>::new(Handle::current());
        let published = Arc::new(AtomicUsize::new(0));
        for key in 0..TASKS_MAX + 10 {
            let published = Arc::clone(&published);
            let publish = move |_| async move {
                published.fetch_add(1, Ordering::Relaxed);
                pending::<()>().await;
            };
            let (outcome, _) = loads.join_or_start(key, || None, || (async move { Ok(key) }, publish)).await;
            assert!(matches!(outcome, Ok(value) if value == key), "{key}: {outcome:?}");
        }
        assert_eq!(published.load(Ordering::Relaxed), TASKS_MAX);
    }

    #[test]
    fn load_on_a_runtime_that_has_shut_down_fails_without_hanging() {
        let (done, is_done) = mpsc::channel();
        // Run the load on another thread, because a deadlock would block this test forever.
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
