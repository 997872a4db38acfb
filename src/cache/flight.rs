//! Single flight: however many callers wait for one key, one load goes, and it goes on when the first of them leaves.
//!
//! Never caches: what a flight found is in L1 before it lands.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
};
use tokio_util::task::TaskTracker;

use super::{Shared, kind::Kind, l1::Held};
use crate::fault::{Fault, Tier};

/// Loads that may be in the air at one time, over all keys. Beyond it a caller gets a fault: waiting would only make
/// its own deadline pass. Enough for 40 000 cold keys a second at 100 ms each.
const FLIGHTS_MAX: usize = 4_096;

type Landing<K> = Option<Result<Arc<Held<K>>, Fault>>;
type InTheAir<K> = Arc<Mutex<HashMap<<K as Kind>::Key, watch::Receiver<Landing<K>>>>>;

/// The flights of one kind, on the I/O runtime. Callers may be on any runtime.
pub struct Flights<K: Kind> {
    io: Handle,
    tasks: TaskTracker,
    in_the_air: InTheAir<K>,
}

impl<K: Kind> Flights<K> {
    /// No flights yet; they will run on `io`.
    pub fn new(io: Handle) -> Self {
        Self { io, tasks: TaskTracker::new(), in_the_air: Arc::default() }
    }

    /// Waits for the flight of `query`, beginning it if there is none.
    pub(super) async fn join(&self, shared: &Arc<Shared<K>>, query: K::Query) -> Result<Arc<Held<K>>, Fault> {
        let mut landing = match self.board(shared, query)? {
            Boarding::Arrived(held) => return Ok(held),
            Boarding::Waiting(landing) => landing,
        };
        // A sender that is gone without an answer: the task panicked, or the runtime is going down.
        let landed = landing.wait_for(Option::is_some).await.map_err(|_| Fault::Ended)?;
        landed.clone().unwrap_or(Err(Fault::Ended))
    }

    /// Runs `load` on the I/O runtime to its end, whether or not the caller stays.
    pub(super) async fn run(
        &self,
        load: impl Future<Output = Result<Arc<Held<K>>, Fault>> + Send + 'static,
    ) -> Result<Arc<Held<K>>, Fault> {
        if self.tasks.len() >= FLIGHTS_MAX {
            return Err(Fault::Overloaded { limit: "loads in the air" });
        }
        let (answer, answered) = oneshot::channel();
        self.tasks.spawn_on(
            async move {
                // The caller may be gone; then nobody needs the answer.
                let _ = answer.send(load.await);
            },
            &self.io,
        );
        answered.await.unwrap_or(Err(Fault::Ended))
    }

    /// Flights and reads that have not ended.
    pub fn in_the_air(&self) -> usize {
        self.tasks.len()
    }

    /// Waits for the end of every flight.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn board(&self, shared: &Arc<Shared<K>>, query: K::Query) -> Result<Boarding<K>, Fault> {
        let key = K::key(&query);
        let mut in_the_air = lock(&self.in_the_air);
        if let Some(landing) = in_the_air.get(&key) {
            return Ok(Boarding::Waiting(landing.clone()));
        }
        // A flight may have landed between the caller's look into L1 and now.
        if let Some(held) = shared.l1.get(&key).filter(|held| held.is_usable(&shared.view, shared.clock.now())) {
            return Ok(Boarding::Arrived(held));
        }
        if self.tasks.len() >= FLIGHTS_MAX {
            return Err(Fault::Overloaded { limit: "loads in the air" });
        }
        let (landed, landing) = watch::channel(None);
        in_the_air.insert(key, landing.clone());
        let seat = Seat { key, in_the_air: Arc::clone(&self.in_the_air) };
        let shared = Arc::clone(shared);
        self.tasks.spawn_on(
            async move {
                let outcome = shared.load(&query).await;
                drop(seat);
                landed.send_replace(Some(outcome.clone().map(|(held, _)| held)));
                if let Ok((held, Tier::Store)) = outcome {
                    shared.share(&held).await;
                }
            },
            &self.io,
        );
        Ok(Boarding::Waiting(landing))
    }
}

enum Boarding<K: Kind> {
    Arrived(Arc<Held<K>>),
    Waiting(watch::Receiver<Landing<K>>),
}

/// Takes the flight off the list when it ends, also by panic.
struct Seat<K: Kind> {
    key: K::Key,
    in_the_air: InTheAir<K>,
}

impl<K: Kind> Drop for Seat<K> {
    fn drop(&mut self) {
        lock(&self.in_the_air).remove(&self.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Insertions and removals are whole at every moment, whoever panicked elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
