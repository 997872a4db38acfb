//! The way from one replica to the database: slow, cut, refused, or to a standby, as chance has it.

use std::{
    future::pending,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::{Instant, sleep};
use trustgate::{
    base::{
        clock::{Clock, DatabaseTime, Moment},
        fault::{Fault, Tier},
    },
    record::{Digests, Fingerprint, KeyId, Record, Version, Versioned},
    store::{Heartbeat, Lookup, Missing, PollError, Polled, Source, StoreError, Tended},
};
use uuid::Uuid;

use crate::{chance::Chance, database::Database};

/// What a way is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Fine,
    /// Up to half a second, each way.
    Slow,
    /// Up to a twentieth of a second, each way.
    Lagging,
    /// There at once, and back as late as a poll allows.
    LateBack,
    /// Nothing arrives, or nothing comes back.
    Cut,
    /// Every attempt fails at once.
    Refused,
    /// It leads to a server that only follows.
    Standby,
}

/// The ways of one replica.
pub struct Network {
    database: Arc<Database>,
    clock: Arc<dyn Clock>,
    chance: Chance,
    way: Mutex<(Way, Instant)>,
}

impl Network {
    pub fn new(database: Arc<Database>, clock: Arc<dyn Clock>, chance: &Chance) -> Self {
        // Long ago: nothing was ever wrong with it.
        let way = Mutex::new((Way::Fine, Instant::now()));
        Self { database, clock, chance: chance.fork(), way }
    }

    /// From now on it is like this.
    pub fn set(&self, way: Way) {
        *self.way.lock().unwrap_or_else(PoisonError::into_inner) = (way, Instant::now());
    }

    /// What it is like, and since when.
    pub fn way(&self) -> (Way, Instant) {
        *self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One way: there, or back.
    async fn go(&self, back: bool) -> Result<(), Fault> {
        match self.way().0 {
            Way::LateBack if back => sleep(self.chance.micros(180_000..245_000)).await,
            Way::Fine | Way::Standby | Way::LateBack => {
                let most = if self.chance.one_in(20) { 20_000 } else { 1_000 };
                sleep(self.chance.micros(0..most)).await;
            }
            Way::Lagging => sleep(self.chance.micros(0..50_000)).await,
            Way::Slow => sleep(self.chance.micros(0..500_000)).await,
            Way::Cut => return pending().await,
            Way::Refused => return Err(refused("connection refused")),
        }
        // Cut meanwhile.
        if self.way().0 == Way::Cut { pending().await } else { Ok(()) }
    }

    /// Has `answer` given by the database: told when the statement began, by its clock, and when it was sent, by ours.
    async fn ask<T>(&self, answer: impl FnOnce(&Database, DatabaseTime, Moment) -> T) -> Result<T, Fault> {
        let sent_at = self.clock.now();
        self.go(false).await?;
        if self.way().0 == Way::Standby {
            return Err(refused("this is a standby"));
        }
        let began = self.database.time();
        sleep(self.chance.micros(0..500)).await;
        let answer = answer(&self.database, began, sent_at);
        self.go(true).await?;
        Ok(answer)
    }
}

fn refused(why: &'static str) -> Fault {
    Fault::unreachable(Tier::Store, io::Error::other(why))
}

#[async_trait]
impl Lookup for Network {
    async fn find(&self, digests: &Digests) -> Result<Versioned<Option<Record>>, Fault> {
        self.ask(|database, began, sent_at| database.find(digests, began, sent_at)).await
    }

    async fn find_by_id(&self, key: KeyId) -> Result<Versioned<Option<Record>>, Fault> {
        self.ask(|database, began, sent_at| database.find_by_id(key, began, sent_at)).await
    }

    async fn poll(&self, since: Option<Version>) -> Result<Polled, PollError> {
        let polled = self.ask(|database, began, sent_at| database.poll(since, began, sent_at)).await;
        match self.way().0 {
            Way::Standby => Err(PollError::Unusable("this is a standby".into())),
            _ => polled.map_err(PollError::NoAnswer),
        }
    }

    async fn listen(&self, changed: &(dyn Fn() + Send + Sync)) -> Fault {
        changed();
        while !self.chance.one_in(30) {
            self.database.committed().await;
            if self.go(true).await.is_err() {
                break;
            }
            if !self.chance.one_in(3) {
                changed();
            }
        }
        refused("the connection for hints broke")
    }

    async fn report(&self, _: &Heartbeat) -> Result<(), Fault> {
        self.ask(|_, _, _| ()).await
    }

    async fn restore_watch(&self) -> Result<(), Fault> {
        self.ask(|database, _, _| database.restore_watch()).await
    }

    async fn renew_incarnation(&self, lost: Uuid) -> Result<(), Fault> {
        self.ask(|database, _, _| database.renew_incarnation(lost)).await
    }

    async fn tend_peppers(&self, _: &[Fingerprint]) -> Result<Tended, Fault> {
        Ok(Tended::default())
    }

    async fn prune(&self) -> Result<bool, Fault> {
        Ok(false) // chance decides that
    }

    async fn redis_mac_key(&self) -> Result<Option<[u8; 32]>, Fault> {
        self.ask(|_, _, _| Some([7; 32])).await
    }
}

#[async_trait]
impl Source for Network {
    async fn prepare(&self, _: Missing) -> Result<(), StoreError> {
        Ok(self.ask(|_, _, _| ()).await?)
    }

    fn run_reads_on(&self, _: tokio::runtime::Handle) {}

    async fn close(&self) {}
}

/// A boot clock that runs a little fast or slow.
pub struct DriftingClock {
    began: Instant,
    /// What it shows at the beginning.
    from: Moment,
    /// Nanoseconds that it shows for a million of them.
    rate: u64,
}

/// By how much a boot clock may be wrong.
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
