//! A small pool of connections for the reads of checks: bounded, quick to fail, and never handing on a connection in an
//! unknown state.
//!
//! A read waits for a connection; connecting itself happens in a task of the pool's own, so that a connect that takes
//! longer than a read's deadline still ends well and a later read finds it. A read whose future is dropped closes its
//! connection: a late answer must never be taken for the next read's. Never logs where it connects to.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, sync::oneshot, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::base::fault::{Fault, Tier};

/// How one kind of database is connected to and asked.
pub trait Connect: Send + Sync + 'static {
    /// An open connection.
    type Connection: Send + 'static;
    /// A statement with its values.
    type Query: Send + Sync;
    /// One row of an answer.
    type Row: Send;
    /// Opens a connection. Secrets in files are read here, so each connect sees their present content.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, sqlx::Error>> + Send;
    /// Sends one query and takes its whole answer.
    fn run(
        &self,
        connection: &mut Self::Connection,
        query: &Self::Query,
    ) -> impl Future<Output = Result<Vec<Self::Row>, sqlx::Error>> + Send;
    /// Says goodbye. Merely dropping a connection closes it as well.
    fn close(connection: Self::Connection) -> impl Future<Output = ()> + Send;
    /// Whether `error` means that the server behind the connection went away, so that another connection may do better.
    fn lost(error: &sqlx::Error) -> bool;
}

/// What a pool may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections, at most: idle, in use, or being made.
    pub connections_max: usize,
    /// Reads that may wait for a connection.
    pub waiting_max: usize,
    /// How long connecting may take.
    pub connect_timeout: Duration,
}

/// Why a read has no answer. Shared by everybody who waited for the same connect.
#[derive(Clone, Debug)]
pub enum PoolError {
    /// The database, or the way to it, failed.
    Sql(Arc<sqlx::Error>),
    /// Connecting took longer than this.
    Connect(Duration),
    /// Too many reads wait already.
    Full,
    /// The pool was closed.
    Closed,
}

impl From<PoolError> for Fault {
    fn from(trouble: PoolError) -> Self {
        match trouble {
            PoolError::Sql(source) => Self::Unreachable { tier: Tier::Store, source },
            PoolError::Connect(limit) => Self::Timeout { tier: Tier::Store, limit },
            PoolError::Full => Self::Overloaded { limit: "store.reads_max" },
            PoolError::Closed => Self::Ended,
        }
    }
}

/// At most `connections_max` connections, made when they are needed.
#[derive(Debug)]
pub struct Pool<C: Connect>(Arc<Shared<C>>);

impl<C: Connect> Pool<C> {
    /// A pool without any connection yet. `name` stands in the log.
    #[must_use]
    pub fn new(name: &'static str, connect: Arc<C>, limits: Limits) -> Self {
        Self(Arc::new(Shared {
            name,
            connect,
            limits,
            state: Mutex::new(State::new()),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Runs `query` on a connection and returns its rows. The caller sets the deadline by dropping the future.
    ///
    /// # Errors
    /// [`PoolError`]; a connect that is refused fails at once.
    ///
    /// # Cancel safety
    /// A dropped read closes the connection it used, and gives back one that it was only about to use.
    pub async fn read(&self, query: &C::Query) -> Result<Vec<C::Row>, PoolError> {
        let pooled = self.0.acquire().await?;
        let reused = pooled.reused;
        match pooled.run(query).await {
            // Most likely the server was restarted while the connection lay idle; then the other idle ones are as dead.
            Err(PoolError::Sql(error)) if reused && C::lost(&error) => {
                self.0.forget();
                self.0.acquire().await?.run(query).await
            }
            outcome => outcome,
        }
    }

    /// Makes connections on `runtime` from now on, wherever reads are sent from.
    pub fn run_on(&self, runtime: Handle) {
        self.0.lock().runtime = Some(runtime);
    }

    /// Ends every connection and task. Reads that wait, and reads that come later, fail with [`PoolError::Closed`].
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
        let goodbyes = async {
            for connection in idle {
                C::close(connection).await;
            }
        };
        // Whoever does not take a goodbye in time loses the connection without one.
        let _ = timeout(GOODBYE, goodbyes).await;
    }

    /// Closes every idle connection, and each one in use as soon as it comes back.
    pub fn forget(&self) {
        self.0.forget();
    }

    /// Connections there are at this moment, being made included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.lock().open
    }
}

impl<C: Connect> Drop for Pool<C> {
    fn drop(&mut self) {
        // A pool that is dropped without `close` must not leave a connect behind.
        self.0.stop.cancel();
    }
}

/// How long all connections together may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Shared<C: Connect> {
    name: &'static str,
    connect: Arc<C>,
    limits: Limits,
    state: Mutex<State<C>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

type Waiter<C> = oneshot::Sender<Result<PooledConn<C>, PoolError>>;

struct State<C: Connect> {
    /// Good connections nobody uses, the last used one last. Not empty only while nobody waits.
    idle: Vec<C::Connection>,
    /// Connections there are: idle, in use, and being made.
    open: usize,
    /// Those being made.
    connecting: usize,
    /// Reads that wait for a connection, the oldest first.
    waiting: VecDeque<Waiter<C>>,
    /// Connections of an earlier generation are closed when they come back.
    generation: u64,
    /// Where connects run: what [`Pool::run_on`] says, else where the first read that waited was sent from.
    runtime: Option<Handle>,
    /// Whether the last connect went well; for the log.
    up: Option<bool>,
    closed: bool,
}

impl<C: Connect> std::fmt::Debug for State<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { idle, open, connecting, waiting, .. } = self;
        write!(f, "{open} connections, {} idle, {connecting} being made, {} reads wait", idle.len(), waiting.len())
    }
}

impl<C: Connect> State<C> {
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
    fn lock(&self) -> MutexGuard<'_, State<C>> {
        // Nothing under the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn acquire(self: &Arc<Self>) -> Result<PooledConn<C>, PoolError> {
        let turn = {
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
            let (waiter, turn) = oneshot::channel();
            state.waiting.push_back(waiter);
            let runtime = state.runtime.get_or_insert_with(Handle::current).clone();
            let connects = self.wanted_connects(&mut state);
            drop(state);
            self.spawn(connects, &runtime);
            turn
        };
        // A waiter is dropped without a word only by `close`.
        turn.await.unwrap_or(Err(PoolError::Closed))
    }

    /// A connect for each waiting read that has none on its way, as far as the limit allows.
    fn wanted_connects(self: &Arc<Self>, state: &mut State<C>) -> Vec<Pending<C>> {
        let wanted = state.waiting.iter().filter(|waiter| !waiter.is_closed()).count();
        let mut connects = Vec::new();
        while !state.closed && state.open < self.limits.connections_max && state.connecting < wanted {
            state.open += 1;
            state.connecting += 1;
            connects.push(Pending { shared: Arc::clone(self), outcome: None });
        }
        connects
    }

    /// Starts connects. Without the lock: a runtime that shuts down drops a task at once, on this thread, and the drop of a connect
    /// takes the lock.
    fn spawn(&self, connects: Vec<Pending<C>>, runtime: &Handle) {
        for pending in connects {
            self.tasks.spawn_on(pending.connect(), runtime);
        }
    }

    /// A connect ended.
    fn on_connect_done(self: &Arc<Self>, outcome: Result<C::Connection, PoolError>) {
        let mut state = self.lock();
        state.connecting -= 1;
        self.log_change(&mut state, outcome.as_ref().map(drop));
        match outcome {
            Ok(connection) => {
                let generation = state.generation;
                self.hand_to_waiter(state, connection, generation, false);
            }
            Err(trouble) => {
                state.open -= 1;
                // With other connections in use or being made, those serve whoever waits.
                if state.open == 0 {
                    for waiter in state.waiting.drain(..) {
                        // A read that gave up does not need to know.
                        let _ = waiter.send(Err(trouble.clone()));
                    }
                }
            }
        }
    }

    /// Gives a good connection to whoever waits longest, or lays it aside.
    fn hand_to_waiter(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State<C>>,
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

    /// Closes a connection and lets its place be taken.
    fn discard(self: &Arc<Self>, connection: C::Connection) {
        drop(connection); // before it stops counting, so that there never are too many
        let mut state = self.lock();
        state.open -= 1;
        let (connects, runtime) = (self.wanted_connects(&mut state), state.runtime.clone());
        drop(state);
        // There is one as soon as any read has waited.
        if let Some(runtime) = runtime {
            self.spawn(connects, &runtime);
        }
    }

    /// As [`Pool::forget`].
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

    fn log_change(&self, state: &mut State<C>, outcome: Result<(), &PoolError>) {
        if state.closed || state.up.replace(outcome.is_ok()) == Some(outcome.is_ok()) {
            return;
        }
        let pool = self.name;
        match outcome {
            Ok(()) => tracing::info!(pool, "connected to the database"),
            Err(PoolError::Sql(error)) => tracing::warn!(pool, %error, "cannot connect to the database"),
            Err(PoolError::Connect(limit)) => {
                tracing::warn!(pool, ?limit, "cannot connect to the database: no answer in time");
            }
            Err(PoolError::Full | PoolError::Closed) => {}
        }
    }
}

/// A connect under way. However it ends, also by a panic or with the runtime, the pool hears of it.
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

/// The right to use one connection. Dropped while a query runs, it closes the connection; otherwise it gives it back.
struct PooledConn<C: Connect> {
    shared: Arc<Shared<C>>,
    connection: Option<C::Connection>,
    generation: u64,
    /// Whether the connection served reads before.
    reused: bool,
    /// A query was sent and its answer not taken.
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
            // After any error the connection is closed: a standby, a revoked right or a lost server is left behind.
            Err(error) => {
                self.reused = false; // it answered: this says nothing of the idle ones
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
            // No answer in time on a connection that worked before: the way to the server may be gone without a word,
            // and then every idle connection would cost one more read its deadline.
            self.shared.discard_idle();
        }
    }
}
