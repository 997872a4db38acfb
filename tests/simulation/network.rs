//! The simulated network between one replica and the database, with random delays and failures.

use std::{
    future::pending,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::{Instant, sleep};
use trustgate::testing::{
    base::{
        clock::{Clock, DatabaseTime, Moment},
        fault::{Fault, Tier},
    },
    record::{Digests, Fingerprint, KeyId, Record, Version, Versioned},
    store::{Heartbeat, Lookup, Missing, PollError, Polled, Source, StoreError, Tended},
};
use uuid::Uuid;

use crate::{chance::Chance, database::Database};

/// The condition of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Delays are short.
    Fine,
    /// Delays of up to half a second in each direction.
    Slow,
    /// Delays of up to a twentieth of a second in each direction.
    Lagging,
    /// Requests arrive soon, but answers arrive just before a poll times out.
    LateBack,
    /// Requests and answers are lost.
    Cut,
    /// Each request fails at once.
    Refused,
    /// The connection leads to a standby.
    Standby,
}

/// The network of one replica.
pub struct Network {
    database: Arc<Database>,
    clock: Arc<dyn Clock>,
    chance: Chance,
    condition: Mutex<(Condition, Instant)>,
}

impl Network {
    pub fn new(database: Arc<Database>, clock: Arc<dyn Clock>, chance: &Chance) -> Self {
        let condition = Mutex::new((Condition::Fine, Instant::now()));
        Self { database, clock, chance: chance.fork(), condition }
    }

    pub fn set(&self, condition: Condition) {
        *self.condition.lock().unwrap_or_else(PoisonError::into_inner) = (condition, Instant::now());
    }

    /// Returns the condition and the time at which it was set.
    pub fn condition(&self) -> (Condition, Instant) {
        *self.condition.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers one message: a request, or an answer if `is_answer`.
    async fn deliver(&self, is_answer: bool) -> Result<(), Fault> {
        match self.condition().0 {
            Condition::LateBack if is_answer => sleep(self.chance.micros(180_000..245_000)).await,
            Condition::Fine | Condition::Standby | Condition::LateBack => {
                let most = if self.chance.one_in(20) { 20_000 } else { 1_000 };
                sleep(self.chance.micros(0..most)).await;
            }
            Condition::Lagging => sleep(self.chance.micros(0..50_000)).await,
            Condition::Slow => sleep(self.chance.micros(0..500_000)).await,
            Condition::Cut => return pending().await,
            Condition::Refused => return Err(refused("connection refused")),
        }
        // The network may have been cut during the delay.
        if self.condition().0 == Condition::Cut { pending().await } else { Ok(()) }
    }

    /// Runs one statement. `answer` receives the database, the start of the statement on the database's clock, and the
    /// moment on the replica's clock at which the replica sent the statement.
    async fn query<T>(&self, answer: impl FnOnce(&Database, DatabaseTime, Moment) -> T) -> Result<T, Fault> {
        let sent_at = self.clock.now();
        self.deliver(false).await?;
        if self.condition().0 == Condition::Standby {
            return Err(refused("this is a standby"));
        }
        let began = self.database.time();
        sleep(self.chance.micros(0..500)).await;
        let answer = answer(&self.database, began, sent_at);
        self.deliver(true).await?;
        Ok(answer)
    }
}

fn refused(why: &'static str) -> Fault {
    Fault::unreachable(Tier::Store, io::Error::other(why))
}

#[async_trait]
impl Lookup for Network {
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault> {
        self.query(|database, began, sent_at| database.find(digests, began, sent_at)).await
    }

    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault> {
        self.query(|database, began, sent_at| database.find_by_id(key, began, sent_at)).await
    }

    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError> {
        let polled = self.query(|database, began, sent_at| database.poll(since, began, sent_at)).await;
        match self.condition().0 {
            Condition::Standby => Err(PollError::Unusable("this is a standby".into())),
            _ => polled.map_err(PollError::NoAnswer),
        }
    }

    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault {
        changed();
        while !self.chance.one_in(30) {
            self.database.committed().await;
            if self.deliver(true).await.is_err() {
                break;
            }
            if !self.chance.one_in(3) {
                changed();
            }
        }
        refused("the connection for notifications broke")
    }

    async fn report(&self, _: &Heartbeat) -> Result<(), Fault> {
        self.query(|_, _, _| ()).await
    }

    async fn restore_watch(&self) -> Result<(), Fault> {
        self.query(|database, _, _| database.restore_watch()).await
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault> {
        self.query(|database, _, _| database.renew_incarnation(lost)).await
    }

    async fn tend_peppers(&self, _: &[Fingerprint]) -> Result<Tended, Fault> {
        Ok(Tended::default())
    }

    async fn prune(&self) -> Result<bool, Fault> {
        Ok(false) // the simulation prunes at random times instead
    }

    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault> {
        self.query(|_, _, _| Some([7; 32])).await
    }
}

#[async_trait]
impl Source for Network {
    async fn prepare(&self, _: Missing) -> Result<(), StoreError> {
        Ok(self.query(|_, _, _| ()).await?)
    }

    fn run_reads_on(&self, _: tokio::runtime::Handle) {}

    async fn close(&self) {}
}

/// A boot clock that runs slightly fast or slow.
pub struct DriftingClock {
    began: Instant,
    /// The time that the clock shows when it is created.
    from: Moment,
    /// The nanoseconds by which the clock advances per million nanoseconds of simulated time.
    rate: u64,
}

/// The maximum error of a boot clock, in nanoseconds per million nanoseconds.
const DRIFT_MAX: usize = 10_000;

impl DriftingClock {
    pub fn new(chance: &Chance) -> Self {
        let rate = 1_000_000 - DRIFT_MAX + chance.number(0..2 * DRIFT_MAX);
        let from = Moment::from_nanos(0).after(chance.micros(1_000_000..1_000_000_000));
        Self { began: Instant::now(), from, rate: rate as u64 }
    }
}

impl Clock for DriftingClock {
    fn now(&self) -> Moment {
        let micros = u64::try_from(self.began.elapsed().as_micros()).expect("a short run");
        self.from.after(Duration::from_nanos(micros * self.rate / 1_000))
    }

    fn wall_offset(&self) -> i64 {
        0
    }
}
