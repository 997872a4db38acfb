//! A small, bounded pool of connections for the reads that checks make. It fails fast and does not reuse a connection
//! whose state is unknown.
//!
//! A read waits for a connection, but a separate task of the pool opens the connection. So a connect that takes longer
//! than the read's deadline can still succeed, and a later read uses the connection. A read whose future is dropped
//! while its query runs closes the connection, because its late answer could be taken for the answer to the next read.
//! The pool does not log addresses.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, sync::oneshot, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::base::fault::{Fault, Tier};

/// Connects to one kind of database and runs queries on it.
pub trait Connect: Send + Sync + 'static {
    /// An open connection.
    type Connection: Send + 'static;
    /// A statement with its values.
    type Query: Send + Sync;
    /// One row of an answer.
    type Row: Send;
    /// Opens a connection. Reads secrets from their files, so that each connect uses their current content.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, sqlx::Error>> + Send;
    /// Sends one query and reads its whole answer.
    fn run(
        &self,
        connection: &mut Self::Connection,
        query: &Self::Query,
    ) -> impl Future<Output = Result<Vec<Self::Row>, sqlx::Error>> + Send;
    /// Closes a connection gracefully. Dropping a connection closes it without notifying the server.
    fn close(connection: Self::Connection) -> impl Future<Output = ()> + Send;
    /// Returns true if `error` means that the connection to the server is lost, so that the query may succeed on a new
    /// connection.
    fn lost(error: &sqlx::Error) -> bool;
}

/// The limits of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// The maximum number of connections: idle, in use and being opened.
    pub connections_max: usize,
    /// The maximum number of reads that may wait for a connection.
    pub waiting_max: usize,
    /// The maximum time that connecting may take.
    pub connect_timeout: Duration,
}

/// Why a read has no answer. Can be cloned, because all reads that waited for the same connect get the same error.
#[derive(Clone, Debug)]
pub enum PoolError {
    /// The database or the network failed.
    Sql(Arc<sqlx::Error>),
    /// Connecting took longer than this limit.
    Connect(Duration),
    /// [`PoolLimits::waiting_max`] reads are already waiting.
    Full,
    /// The pool was closed.
    Closed,
}

impl From<PoolError> for Fault {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Sql(source) => Self::Unreachable { tier: Tier::Store, source },
            PoolError::Connect(limit) => Self::Timeout { tier: Tier::Store, limit },
            PoolError::Full => Self::Overloaded { limit: "store.reads_max" },
            PoolError::Closed => Self::Ended,
        }
    }
}

/// Opens connections when reads need them, at most [`PoolLimits::connections_max`].
#[derive(Debug)]
pub struct Pool<C: Connect>(Arc<Shared<C>>);

impl<C: Connect> Pool<C> {
    /// Creates a pool without connections. `name` identifies the pool in the log.
    #[must_use]
    pub fn new(name: &'static str, connect: Arc<C>, limits: PoolLimits) -> Self {
        Self(Arc::new(Shared {
            name,
            connect,
            limits,
            state: Mutex::new(PoolState::new()),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Runs `query` on a connection and returns its rows. The caller sets the deadline by dropping the future.
    ///
    /// # Errors
    /// [`PoolError`]. If the server refuses the connection, the read fails at once.
    ///
    /// # Cancel safety
    /// Safe: if the query was sent, dropping the future closes the connection; otherwise the connection returns to the
    /// pool.
    pub async fn read(&self, query: &C::Query) -> Result<Vec<C::Row>, PoolError> {
        let pooled = self.0.acquire().await?;
        let reused = pooled.reused;
        match pooled.run(query).await {
            // The server was probably restarted while this connection was idle. The other idle connections are then
            // dead, so close them all and try once more.
            Err(PoolError::Sql(error)) if reused && C::lost(&error) => {
                self.0.forget();
                self.0.acquire().await?.run(query).await
            }
            outcome => outcome,
        }
    }

    /// Opens connections on `runtime` from now on, regardless of the runtime that a read is sent from.
    pub fn run_on(&self, runtime: Handle) {
        self.0.lock().runtime = Some(runtime);
    }

    /// Closes all connections and ends all tasks. Waiting and later reads fail with [`PoolError::Closed`].
    pub async fn close(&self) {
        let idle = {
            let mut state = self.0.lock();
            state.closed = true;
            state.waiting.clear();
            state.open -= state.idle.len();
            std::mem::take(&mut state.idle)
        };
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
        let close_idle = async {
            for connection in idle {
                C::close(connection).await;
            }
        };
        // On a timeout, dropping the remaining connections closes them without notifying the server.
        let _ = timeout(CLOSE_TIMEOUT, close_idle).await;
    }

    /// Closes the idle connections, and each connection in use as soon as its read returns it.
    pub fn forget(&self) {
        self.0.forget();
    }
}

impl<C: Connect> Drop for Pool<C> {
    fn drop(&mut self) {
        // Ends connects that are in flight if the pool is dropped without `close`.
        self.0.stop.cancel();
    }
}

/// The maximum total time for closing all connections gracefully.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Shared<C: Connect> {
    name: &'static str,
    connect: Arc<C>,
    limits: PoolLimits,
    state: Mutex<PoolState<C>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

type Waiter<C> = oneshot::Sender<Result<PooledConn<C>, PoolError>>;

struct PoolState<C: Connect> {
    /// Usable connections that no read uses, the most recently used one last. Empty while a read waits.
    idle: Vec<C::Connection>,
    /// Number of connections: idle, in use and being opened.
    open: usize,
    /// Number of connections being opened.
    connecting: usize,
    /// Reads that wait for a connection, the oldest first.
    waiting: VecDeque<Waiter<C>>,
    /// Increases when all connections must be replaced. A connection of an earlier generation is closed when its read
    /// returns it.
    generation: u64,
    /// The runtime that opens connections: the runtime passed to [`Pool::run_on`], else the runtime of the first read
    /// that waited.
    runtime: Option<Handle>,
    /// True if the last connect succeeded. The pool logs a result only if it differs from this one.
    up: Option<bool>,
    closed: bool,
}

impl<C: Connect> std::fmt::Debug for PoolState<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { idle, open, connecting, waiting, .. } = self;
        write!(f, "{open} connections, {} idle, {connecting} being opened, {} reads waiting", idle.len(), waiting.len())
    }
}

impl<C: Connect> PoolState<C> {
    const fn new() -> Self {
        Self {
            idle: Vec::new(),
            open: 0,
            connecting: 0,
            waiting: VecDeque::new(),
            generation: 0,
            runtime: None,
            up: None,
            closed: false,
        }
    }
}

// === impl Shared ===

impl<C: Connect> Shared<C> {
    fn lock(&self) -> MutexGuard<'_, PoolState<C>> {
        // No code that holds the lock can panic in the middle of a change, so the state is consistent even if the lock
        // is poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn acquire(self: &Arc<Self>) -> Result<PooledConn<C>, PoolError> {
        let receiver = {
            let mut state = self.lock();
            if state.closed {
                return Err(PoolError::Closed);
            }
            if let Some(connection) = state.idle.pop() {
                return Ok(PooledConn::new(self, connection, state.generation, true));
            }
            state.waiting.retain(|waiter| !waiter.is_closed());
            if state.waiting.len() >= self.limits.waiting_max {
                return Err(PoolError::Full);
            }
            let (waiter, receiver) = oneshot::channel();
            state.waiting.push_back(waiter);
            let runtime = state.runtime.get_or_insert_with(Handle::current).clone();
            let connects = self.wanted_connects(&mut state);
            drop(state);
            self.spawn(connects, &runtime);
            receiver
        };
        // Only `close` drops a waiter without sending a result.
        receiver.await.unwrap_or(Err(PoolError::Closed))
    }

    /// Creates a connect for each waiting read that has none in flight, up to the limit of connections.
    fn wanted_connects(self: &Arc<Self>, state: &mut PoolState<C>) -> Vec<Pending<C>> {
        let wanted = state.waiting.iter().filter(|waiter| !waiter.is_closed()).count();
        let mut connects = Vec::new();
        while !state.closed && state.open < self.limits.connections_max && state.connecting < wanted {
            state.open += 1;
            state.connecting += 1;
            connects.push(Pending { shared: Arc::clone(self), outcome: None });
        }
        connects
    }

    /// Starts connects. The caller must have released the lock: a runtime that is shutting down drops the task at once,
    /// on this thread, and the drop of a [`Pending`] takes the lock.
    fn spawn(&self, connects: Vec<Pending<C>>, runtime: &Handle) {
        for pending in connects {
            self.tasks.spawn_on(pending.connect(), runtime);
        }
    }

    /// Handles the outcome of a connect. A new connection goes to a waiting read. If the connect failed and there are
    /// no other connections, all waiting reads get the error.
    fn on_connect_done(self: &Arc<Self>, outcome: Result<C::Connection, PoolError>) {
        let mut state = self.lock();
        state.connecting -= 1;
        self.log_change(&mut state, outcome.as_ref().map(drop));
        match outcome {
            Ok(connection) => {
                let generation = state.generation;
                self.hand_to_waiter(state, connection, generation, false);
            }
            Err(error) => {
                state.open -= 1;
                // If there are other connections, in use or being opened, the waiting reads get those.
                if state.open == 0 {
                    for waiter in state.waiting.drain(..) {
                        // Sending fails if the read was cancelled.
                        let _ = waiter.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    /// Gives a usable connection to the read that has waited longest, or adds it to the idle connections.
    fn hand_to_waiter(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, PoolState<C>>,
        connection: C::Connection,
        generation: u64,
        reused: bool,
    ) {
        if state.closed || generation != state.generation {
            drop(state);
            return self.discard(connection);
        }
        let mut pooled = PooledConn::new(self, connection, generation, reused);
        while let Some(waiter) = state.waiting.pop_front() {
            match waiter.send(Ok(pooled)) {
                Err(Ok(unwanted)) => pooled = unwanted,
                Ok(()) | Err(Err(_)) => return,
            }
        }
        state.idle.extend(pooled.connection.take());
    }

    /// Closes a connection, and opens another if a read waits for one.
    fn discard(self: &Arc<Self>, connection: C::Connection) {
        drop(connection); // before the count is reduced, so that the limit is not exceeded
        let mut state = self.lock();
        state.open -= 1;
        let (connects, runtime) = (self.wanted_connects(&mut state), state.runtime.clone());
        drop(state);
        // The first read that waits for a connection sets the runtime. If the runtime is unset, no read is waiting, so
        // there is nothing to connect for.
        if let Some(runtime) = runtime {
            self.spawn(connects, &runtime);
        }
    }

    /// See [`Pool::forget`].
    fn forget(self: &Arc<Self>) {
        self.lock().generation += 1;
        self.discard_idle();
    }

    fn discard_idle(self: &Arc<Self>) {
        let idle = std::mem::take(&mut self.lock().idle);
        for connection in idle {
            self.discard(connection);
        }
    }

    fn log_change(&self, state: &mut PoolState<C>, outcome: Result<(), &PoolError>) {
        if state.closed || state.up.replace(outcome.is_ok()) == Some(outcome.is_ok()) {
            return;
        }
        let pool = self.name;
        match outcome {
            Ok(()) => tracing::info!(pool, "database connected"),
            Err(PoolError::Sql(error)) => tracing::warn!(pool, %error, "database connect failed"),
            Err(PoolError::Connect(limit)) => {
                tracing::warn!(pool, ?limit, "database connect failed: no answer within store.connect_timeout");
            }
            Err(PoolError::Full | PoolError::Closed) => {}
        }
    }
}

/// A connect in flight. Dropping this value reports the outcome to the pool, even after a panic or when the runtime
/// shuts down.
struct Pending<C: Connect> {
    shared: Arc<Shared<C>>,
    outcome: Option<Result<C::Connection, PoolError>>,
}

impl<C: Connect> Pending<C> {
    async fn connect(mut self) {
        let limit = self.shared.limits.connect_timeout;
        let connect = Arc::clone(&self.shared.connect);
        self.outcome = tokio::select! {
            () = self.shared.stop.cancelled() => None,
            outcome = timeout(limit, connect.connect()) => Some(match outcome {
                Ok(Ok(connection)) => Ok(connection),
                Ok(Err(error)) => Err(PoolError::Sql(Arc::new(error))),
                Err(_) => Err(PoolError::Connect(limit)),
            }),
        };
    }
}

impl<C: Connect> Drop for Pending<C> {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or(Err(PoolError::Closed));
        self.shared.on_connect_done(outcome);
    }
}

/// Exclusive use of one connection. Dropping it while a query runs closes the connection; otherwise the connection
/// returns to the pool.
struct PooledConn<C: Connect> {
    shared: Arc<Shared<C>>,
    connection: Option<C::Connection>,
    generation: u64,
    /// True if the connection has served a read before.
    reused: bool,
    /// True if a query was sent and its answer was not read to the end.
    dirty: bool,
}

impl<C: Connect> PooledConn<C> {
    fn new(shared: &Arc<Shared<C>>, connection: C::Connection, generation: u64, reused: bool) -> Self {
        Self { shared: Arc::clone(shared), connection: Some(connection), generation, reused, dirty: false }
    }

    async fn run(mut self, query: &C::Query) -> Result<Vec<C::Row>, PoolError> {
        let Some(connection) = &mut self.connection else { return Err(PoolError::Closed) };
        self.dirty = true;
        match self.shared.connect.run(connection, query).await {
            Ok(rows) => {
                self.dirty = false;
                self.reused = true;
                Ok(rows)
            }
            // The connection stays dirty after an error, so it is closed. Otherwise the next read could fail for the
            // same reason: a standby, a missing right or a dead server.
            Err(error) => {
                self.reused = false; // the error came in time, so keep the idle connections
                Err(PoolError::Sql(Arc::new(error)))
            }
        }
    }
}

impl<C: Connect> Drop for PooledConn<C> {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if !self.dirty {
            return self.shared.hand_to_waiter(self.shared.lock(), connection, self.generation, self.reused);
        }
        self.shared.discard(connection);
        if self.reused {
            // The read got no answer in time on a connection that worked before. The network may be losing packets
            // silently; each idle connection would then make another read miss its deadline.
            self.shared.discard_idle();
        }
    }
}
