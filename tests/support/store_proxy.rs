//! A server inside the test process, with a proxy between the server and its store. The proxy counts the reads
//! of keys, and can delay these reads or make them panic.

use std::{
    ffi::OsString,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use tokio::sync::watch;
use trustgate::testing::{
    base::fault::Fault,
    config::{self, Purpose},
    record::{Digests, Fingerprint, KeyId, Record, Version, Versioned},
    server::{AppBuilder, Running},
    store::{Heartbeat, Lookup, Missing, PollError, Polled, Source, StoreError, Tended},
};
use uuid::Uuid;

use super::server::TestConfig;

/// A proxy in front of a store. All its gates are open at first.
pub struct StoreProxy {
    inner: Arc<dyn Source>,
    finds: AtomicUsize,
    before_find: Gate,
    after_find: Gate,
    after_poll: Gate,
    panics: AtomicBool,
}

/// A point at which callers wait while the gate is closed.
pub struct Gate {
    open: watch::Sender<bool>,
    waiting: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: watch::Sender::new(true), waiting: AtomicUsize::new(0) }
    }
}

impl Gate {
    /// Closes the gate, so that from now on callers wait.
    pub fn close(&self) {
        self.open.send_replace(false);
    }

    /// Opens the gate: waiting callers continue, and later callers do not wait.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Returns the number of waiting callers.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    async fn pass(&self) {
        let _waiter = Waiter::at(&self.waiting);
        self.open.subscribe().wait_for(|open| *open).await.expect("the gate owns the sender");
    }
}

/// Counts a caller as waiting until this value is dropped, which also happens if the caller is cancelled.
struct Waiter<'g>(&'g AtomicUsize);

impl<'g> Waiter<'g> {
    fn at(gate: &'g AtomicUsize) -> Self {
        gate.fetch_add(1, Ordering::SeqCst);
        Self(gate)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl StoreProxy {
    /// Starts a server with the settings of `test_config` and a proxy in front of its store. `prepare` can change the
    /// proxy before the server starts.
    pub async fn start(test_config: &TestConfig, prepare: impl FnOnce(&Self)) -> (Running, Arc<Self>) {
        let variables = test_config.variables();
        let environment = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let config = config::load(None, environment, Purpose::Serve).expect("valid settings");
        let variable = |name: &str| variables.iter().find(|(set, _)| set == name).map(|(_, value)| value.clone());
        let mut created = None;
        let builder = AppBuilder::new(config, &variable).expect("valid settings").wrap_store(|inner| {
            let proxy = Arc::new(Self {
                inner,
                finds: AtomicUsize::new(0),
                before_find: Gate::default(),
                after_find: Gate::default(),
                after_poll: Gate::default(),
                panics: AtomicBool::new(false),
            });
            prepare(&proxy);
            created = Some(Arc::clone(&proxy));
            proxy
        });
        (builder.start().await.expect("a server that starts"), created.expect("a proxy from `wrap_store`"))
    }

    /// Returns the number of key reads, by digest or by id, that have started.
    pub fn finds(&self) -> usize {
        self.finds.load(Ordering::SeqCst)
    }

    /// Returns the gate at which callers wait before the proxy reads a key.
    pub const fn before_find(&self) -> &Gate {
        &self.before_find
    }

    /// Returns the gate at which callers wait after the proxy has read a key, before they get the result.
    pub const fn after_find(&self) -> &Gate {
        &self.after_find
    }

    /// Returns the gate at which callers wait after a poll, before they get the result.
    pub const fn after_poll(&self) -> &Gate {
        &self.after_poll
    }

    /// Sets whether key reads panic after they have passed [`Self::before_find`].
    pub fn set_panics(&self, panics: bool) {
        self.panics.store(panics, Ordering::SeqCst);
    }

    async fn enter(&self) {
        self.finds.fetch_add(1, Ordering::SeqCst);
        self.before_find.pass().await;
        assert!(!self.panics.load(Ordering::SeqCst), "a test asked for this panic");
    }
}

#[async_trait]
impl Lookup for StoreProxy {
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault> {
        self.enter().await;
        let found = self.inner.find(digests).await;
        self.after_find.pass().await;
        found
    }

    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault> {
        self.enter().await;
        let found = self.inner.find_by_id(key).await;
        self.after_find.pass().await;
        found
    }

    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError> {
        let polled = self.inner.poll(since).await;
        self.after_poll.pass().await;
        polled
    }

    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault {
        self.inner.listen(changed).await
    }

    async fn report(&self, heartbeat: &Heartbeat) -> Result<(), Fault> {
        self.inner.report(heartbeat).await
    }

    async fn restore_watch(&self) -> Result<(), Fault> {
        self.inner.restore_watch().await
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault> {
        self.inner.renew_incarnation(lost).await
    }

    async fn tend_peppers(&self, known: &[Fingerprint]) -> Result<Tended, Fault> {
        self.inner.tend_peppers(known).await
    }

    async fn prune(&self) -> Result<bool, Fault> {
        self.inner.prune().await
    }

    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault> {
        self.inner.redis_mac_key().await
    }
}

#[async_trait]
impl Source for StoreProxy {
    async fn prepare(&self, missing: Missing) -> Result<(), StoreError> {
        self.inner.prepare(missing).await
    }

    fn run_reads_on(&self, runtime: tokio::runtime::Handle) {
        self.inner.run_reads_on(runtime);
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
