//! One simulated run: three complete replicas, one database and one Redis server, with random events. Time is simulated
//! and everything runs on one thread, so the same seed gives the same run.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::Message as _;
use tokio::{
    runtime::{Builder, Handle},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use trustgate::testing::{
    base::metrics::{self, Registry},
    config::{self, Config, Purpose},
    ext_authz::{check::Checker, credential::Hasher, response::Reply},
    freshness::ReplicaState,
    record::Version,
    server::replica::{Replica, ReplicaDeps, Tasks},
};
use uuid::Uuid;

use crate::{
    chance::Chance,
    database::{Database, Event, KEYS, TRUSTS, key},
    network::{Condition, DriftingClock, Network},
    redis::{HANGS_MAX, Redis},
    support::grpc::{Verdict, request, verdict},
};

const REPLICAS: usize = 3;
/// The duration of a run, without pauses.
const LENGTH: Duration = Duration::from_secs(6);
/// The duration of the lease: the default of `freshness.lease`.
const LEASE: Duration = Duration::from_secs(1);
/// The maximum time that a replica's lease may remain stale after its network has recovered. A connection attempt may
/// take two seconds, and the lease can be stale for up to two lease durations after the last unanswered poll.
const UNREACHED: Duration = Duration::from_millis(4_200);
/// The maximum time from the start of a check to its grant: the default of `decision.deadline`.
const DEADLINE: Duration = Duration::from_millis(150);

/// The parameters of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    /// True if keys change but nothing fails.
    pub calm: bool,
    pub events: EventLog,
}

/// The log of the events of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventLog {
    Off,
    /// Events are collected in the outcome.
    Collected,
    /// Events are printed to standard output as they happen.
    Printed,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The number of checks by result, and of events that the metrics count.
    pub counts: BTreeMap<&'static str, u64>,
    /// Descriptions of the wrong answers.
    pub wrong: Vec<String>,
    /// The events, if the log is [`EventLog::Collected`].
    pub events: Vec<String>,
}

/// Runs the simulation once.
pub fn run(plan: Plan) -> Outcome {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let world = Arc::new(World::new(plan));
        for number in 0..REPLICAS {
            world.start(number);
        }
        let mut actors = JoinSet::new();
        actors.spawn(Arc::clone(&world).change());
        actors.spawn(Arc::clone(&world).disturb());
        for number in 0..REPLICAS {
            actors.spawn(Arc::clone(&world).send_checks(number));
        }
        while let Some(ended) = actors.join_next().await {
            ended.expect("no panic in an actor");
        }
        let mut checks = std::mem::take(&mut *lock(&world.checks));
        while let Some(ended) = checks.join_next().await {
            ended.expect("no panic in a check");
        }
        std::mem::take(&mut *lock(&world.outcome))
    })
}

struct World {
    plan: Plan,
    began: Instant,
    chance: Chance,
    config: Config,
    /// How long checks may still rely on a stale lease while polls get no answer (`freshness.stale_if_unconfirmed`).
    stale: Duration,
    database: Arc<Database>,
    redis: Redis,
    slots: [Mutex<Slot>; REPLICAS],
    /// No change is committed before this moment.
    quiet_until: Mutex<Instant>,
    /// The total time for which the process that runs the replicas was paused.
    paused: Mutex<Duration>,
    checks: Mutex<JoinSet<()>>,
    outcome: Mutex<Outcome>,
}

/// A replica, and the conditions of its network since the start of the run.
#[derive(Default)]
struct Slot {
    running: Option<Running>,
    conditions: Vec<(Instant, Condition)>,
}

struct Running {
    checker: Arc<Checker>,
    replica_state: Arc<ReplicaState>,
    network: Arc<Network>,
    registry: Registry,
    /// Dropping the tasks ends all of them at once, like a crash.
    _tasks: Tasks,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn new(plan: Plan) -> Self {
        let chance = Chance::of(plan.seed);
        let stale = chance.one_of(&[Duration::ZERO, Duration::from_secs(2), Duration::from_secs(20)]);
        let notifications = if chance.one_in(3) { "false" } else { "true" };
        let set = [
            ("FRESHNESS__STALE_IF_UNCONFIRMED", format!("{}s", stale.as_secs())),
            ("FRESHNESS__NOTIFICATIONS", notifications.to_owned()),
            ("CACHE__SIZE", "1MiB".to_owned()),
            ("CACHE__NEGATIVE_SIZE", "1MiB".to_owned()),
        ];
        let set = set.map(|(name, value)| (OsString::from(format!("TRUSTGATE__{name}")), OsString::from(value)));
        let config = config::load(None, set, Purpose::Serve).expect("good settings");
        let hasher = Hasher::new(None, &[]);
        let database = Arc::new(Database::new(&chance, |key| hasher.current(key.as_bytes())));
        let redis = Redis::new(&chance);
        let (slots, outcome, began) = (Default::default(), Mutex::default(), Instant::now());
        let quiet_until = Mutex::new(began);
        Self {
            plan,
            began,
            chance,
            config,
            stale,
            database,
            redis,
            slots,
            quiet_until,
            paused: Mutex::default(),
            checks: Mutex::default(),
            outcome,
        }
    }

    /// Starts replica `number`. A running replica with this number crashes.
    fn start(&self, number: usize) {
        let mut slot = lock(&self.slots[number]);
        let clock = Arc::new(DriftingClock::new(&self.chance));
        let network = Arc::new(Network::new(Arc::clone(&self.database), Arc::clone(&clock) as _, &self.chance));
        network.set(slot.conditions.last().map_or(Condition::Fine, |(_, condition)| *condition));
        let deps = ReplicaDeps {
            source: Arc::clone(&network) as _,
            place: "simulated".to_owned(),
            redis: Some(Arc::new(self.redis.clone())),
            clock,
            id: Uuid::from_bytes(self.chance.bytes()),
            name: format!("replica-{number}"),
            io: Handle::current(),
            poll: Handle::current(),
            stop: CancellationToken::new(),
        };
        let registry = metrics::registry("simulated", "none").expect("a registry");
        let mut tasks = Tasks::default();
        let replica = Replica::start(&self.config, deps, &registry, &mut tasks).expect("a replica that starts");
        if let Some(before) = slot.running.take() {
            self.count_metrics(&before);
        }
        let Replica { checker, replica_state, .. } = replica;
        slot.running = Some(Running { checker, replica_state, network, registry, _tasks: tasks });
    }

    fn is_running(&self) -> bool {
        self.began.elapsed() < LENGTH + *lock(&self.paused)
    }

    fn log(&self, event: impl FnOnce() -> String) {
        if self.plan.events == EventLog::Off {
            return;
        }
        let line = format!("{:9.4} s  {}", self.began.elapsed().as_secs_f64(), event());
        match self.plan.events {
            EventLog::Printed => println!("{line}"),
            EventLog::Off | EventLog::Collected => lock(&self.outcome).events.push(line),
        }
    }

    fn count(&self, what: &'static str, times: u64) {
        *lock(&self.outcome).counts.entry(what).or_default() += times;
    }

    /// Adds to the outcome the events that a replica's metrics have counted.
    fn count_metrics(&self, running: &Running) {
        for family in running.registry.gather() {
            for metric in family.get_metric() {
                let label =
                    |name: &str| metric.get_label().iter().find(|label| label.name() == name).map(|l| l.value());
                let what = match (family.name(), label("tier"), label("outcome")) {
                    ("trustgate_cache_lookups_total", Some("l2"), Some("hit")) => "found in Redis",
                    ("trustgate_cache_lookups_total", Some("l2"), Some("refused")) => "refused from Redis",
                    ("trustgate_cache_lookups_total", Some("l1"), Some("refused")) => "refused in L1",
                    ("trustgate_stale_grants_total", ..) => "granted while stale",
                    ("trustgate_lost_history_total", ..) => "lost histories found",
                    ("trustgate_polls_total", _, Some("ok")) => "polls confirmed",
                    ("trustgate_polls_total", _, Some("unanswered")) => "polls unanswered",
                    ("trustgate_polls_total", _, Some("unusable")) => "polls unusable",
                    _ => continue,
                };
                self.count(what, metric.get_counter().get_value() as u64);
            }
        }
    }

    // === actors ===

    /// Commits random changes.
    async fn change(self: Arc<Self>) {
        let chance = self.chance.fork();
        for number in 0..KEYS {
            if chance.one_in(2) {
                self.database.commit(Event::Issue(number), true);
            }
        }
        while self.is_running() {
            sleep(chance.micros(1_000..200_000)).await;
            let quiet_until = *lock(&self.quiet_until);
            sleep_until(quiet_until).await;
            let (number, other) = (chance.number(0..KEYS), chance.number(0..KEYS));
            let mut event = match chance.number(0..40) {
                0..10 => Event::Revoke(number),
                10..17 => Event::Restore(number),
                17..21 => Event::Delete(number),
                21..29 => Event::Issue(number),
                29..31 => Event::Rename(number, other),
                31..33 => Event::SetTrust(number % TRUSTS, false),
                33..36 => Event::SetTrust(number % TRUSTS, true),
                36 => Event::IssueAll,
                37 => Event::Everything,
                38 if chance.one_in(3) => Event::Truncate,
                _ => Event::Other,
            };
            if !self.plan.calm && chance.one_in(8) {
                // Revoke the key while many checks wait for a single read of the key.
                let replica = chance.number(0..REPLICAS);
                event = Event::Revoke(number);
                let good = [Event::Issue(number), Event::Restore(number), Event::SetTrust(number % TRUSTS, true)];
                for event in good.into_iter().chain([Event::Everything]) {
                    self.database.commit(event, true);
                }
                self.set_condition_for(&[replica], Condition::Lagging, Duration::from_millis(200));
                sleep(chance.micros(1_000..30_000)).await;
                for _ in 0..30 {
                    self.check_after(replica, number, Demand::Lease, chance.micros(0..100_000));
                }
                sleep(chance.micros(1_000..50_000)).await;
            }
            // Sometimes commit more versions at once than a poll lists.
            let times = if chance.one_in(15) { 20 } else { 1 };
            for _ in 1..times {
                self.database.commit(Event::Other, true);
            }
            let recorded = self.plan.calm || !chance.one_in(40);
            self.log(|| format!("{event:?}{}", if recorded { "" } else { ", not recorded: a trigger was dropped" }));
            self.database.commit(event, recorded);
        }
    }

    /// Causes random failures.
    async fn disturb(self: Arc<Self>) {
        let chance = self.chance.fork();
        while !self.plan.calm && self.is_running() {
            sleep(chance.micros(10_000..800_000)).await;
            let number = chance.number(0..REPLICAS);
            match chance.number(0..19) {
                0..4 => {
                    use Condition::{Cut, Lagging, Refused, Slow, Standby};
                    let condition = chance.one_of(&[Lagging, Slow, Cut, Refused, Standby]);
                    self.set_condition_for(&[number], condition, chance.micros(10_000..4_000_000));
                }
                14..16 => {
                    // Cut the network after a late answer, so that no other answer arrives for a while.
                    self.set_condition_for(&[number], Condition::LateBack, Duration::from_secs(3));
                    sleep(chance.micros(300_000..800_000)).await;
                    self.set_condition_for(&[number], Condition::Cut, chance.micros(1_000_000..3_000_000));
                }
                17.. => {
                    // Sometimes cut the network first, so that the pause begins shortly after a poll has timed out.
                    if chance.one_in(2) {
                        self.set_condition_for(&[number], Condition::Cut, chance.micros(500_000..1_500_000));
                        sleep(chance.micros(500_000..1_600_000)).await;
                    }
                    self.pause(chance.micros(100_000..9_000_000), &chance).await;
                }
                16 => {
                    let lost = chance.number(1..4);
                    self.log(|| format!("database restored to {lost} versions earlier; all replicas restart"));
                    self.database.fail_over(lost, true);
                    for _ in 0..chance.number(0..4) {
                        self.database.commit(Event::Revoke(chance.number(0..KEYS)), true);
                    }
                    for number in 0..REPLICAS {
                        self.start(number);
                    }
                }
                4 => {
                    use Condition::{Cut, Lagging, Refused, Slow};
                    let condition = chance.one_of(&[Lagging, Slow, Cut, Refused]);
                    self.set_condition_for(&[0, 1, 2], condition, chance.micros(10_000..2_000_000));
                }
                5..8 => {
                    let (lost, copied) = (chance.number(0..4), chance.one_in(3));
                    self.log(|| format!("failover, {lost} versions lost{}", if copied { ", to a copy" } else { "" }));
                    self.database.fail_over(lost, copied);
                    if copied && chance.one_in(2) {
                        // Commit as many versions as were lost, and then none for a while, so that only the nonces
                        // reveal the loss.
                        for _ in 0..lost {
                            self.database.commit(Event::Other, true);
                        }
                        *lock(&self.quiet_until) = Instant::now() + Duration::from_millis(2_500);
                    }
                }
                8 => {
                    self.log(|| "old versions are pruned".to_owned());
                    self.database.prune();
                }
                9 => {
                    self.log(|| format!("replica {number} crashes and restarts"));
                    self.start(number);
                }
                10 => {
                    let until = Instant::now() + chance.micros(1_000..HANGS_MAX.as_micros() as u64);
                    self.log(|| "Redis hangs".to_owned());
                    self.redis.hang_until(until);
                }
                11 => {
                    self.log(|| "Redis is down for a moment, and empty".to_owned());
                    self.redis.set_refuses(true);
                    self.redis.empty();
                    sleep(chance.micros(1_000..1_500_000)).await;
                    self.redis.set_refuses(false);
                }
                12 => {
                    self.log(|| "old values are restored in Redis".to_owned());
                    self.redis.replay();
                }
                _ => {
                    self.log(|| "values in Redis are forged".to_owned());
                    self.redis.forge();
                }
            }
        }
    }

    /// Pauses the process that runs the replicas and the checks. Revokes a key at the beginning of the pause.
    async fn pause(&self, length: Duration, chance: &Chance) {
        let number = chance.number(0..KEYS);
        self.log(|| format!("all replicas are paused for {length:?}, and key {number} is revoked"));
        self.database.commit(Event::Revoke(number), true);
        *lock(&self.paused) += length;
        tokio::time::advance(length).await;
    }

    fn set_condition_for(self: &Arc<Self>, replicas: &[usize], condition: Condition, length: Duration) {
        self.log(|| format!("network of {replicas:?} to the database: {condition:?} for {length:?}"));
        for number in replicas.iter().copied() {
            self.set_condition(number, condition);
            let world = Arc::clone(self);
            tokio::spawn(async move {
                sleep(length).await;
                world.set_condition(number, Condition::Fine);
            });
        }
    }

    fn set_condition(&self, number: usize, condition: Condition) {
        let mut slot = lock(&self.slots[number]);
        slot.conditions.push((Instant::now(), condition));
        slot.running.as_ref().expect("a running replica").network.set(condition);
    }

    /// Sends checks to replica `number`: some one after another, some at the same time.
    async fn send_checks(self: Arc<Self>, number: usize) {
        let chance = self.chance.fork();
        let mut due = Instant::now();
        while self.is_running() {
            due += chance.micros(100..25_000);
            sleep_until(due).await;
            let freshness = match chance.number(0..20) {
                0 => Demand::Live,
                1 => Demand::Strict,
                _ => Demand::Lease,
            };
            // Use some keys more often than other keys.
            let key = chance.number(0..KEYS).min(chance.number(0..KEYS));
            let times = if chance.one_in(40) { 10 } else { 1 };
            for _ in 0..times {
                self.check_after(number, key, freshness, chance.micros(0..times * 5_000 - 4_999));
            }
        }
        self.count_metrics(lock(&self.slots[number]).running.as_ref().expect("a running replica"));
    }

    /// Sends a check of key `number` to `replica` after `wait`.
    fn check_after(self: &Arc<Self>, replica: usize, number: usize, demand: Demand, wait: Duration) {
        let world = Arc::clone(self);
        lock(&self.checks).spawn(async move {
            sleep(wait).await;
            world.check(replica, number, demand).await;
        });
    }

    async fn check(self: Arc<Self>, replica: usize, number: usize, demand: Demand) {
        let (checker, applied) = {
            let slot = lock(&self.slots[replica]);
            let running = slot.running.as_ref().expect("a running replica");
            (Arc::clone(&running.checker), running.replica_state.load().applied())
        };
        let message = request(&key(number), demand.extensions()).encode_to_vec();
        let began = Instant::now();
        let reply = checker.check(&message).await;
        let Reply::Message(frame) = reply else { panic!("a gRPC error, although `decision.on_fault` is `deny`") };
        // Skip the five bytes of the gRPC frame header.
        let answer = envoy_types::pb::envoy::service::auth::v3::CheckResponse::decode(&frame[5..]).expect("an answer");
        self.judge(&Check {
            replica,
            number,
            demand,
            applied,
            began,
            decided: Instant::now(),
            verdict: verdict(&answer),
        });
    }

    // === verdict ===

    /// Checks an answer: a grant or a denial must have been correct at some moment within the revocation bound.
    fn judge(&self, check: &Check) {
        let Check { replica, number, demand, applied, began, decided, ref verdict } = *check;
        let is_at_once = began == decided;
        let what = match (verdict.status, verdict.reason.as_deref()) {
            (200, _) if is_at_once => "granted at once",
            (200, _) => "granted after a read",
            (401, Some("unknown" | "revoked" | "trust_disabled")) if is_at_once => "denied at once",
            (401, Some("unknown" | "revoked" | "trust_disabled")) => "denied after a read",
            (503, _) => "faults",
            _ => return self.wrong(check, "an unexpected answer"),
        };
        self.count(what, 1);
        self.log(|| {
            format!("replica {replica}: key {number}, {demand:?}: {what}, {:?} after its start", decided - began)
        });
        if verdict.status == 503 {
            if self.plan.calm && self.began.elapsed() > LEASE {
                self.wrong(check, "a fault while nothing failed");
            }
            return;
        }
        let is_cut = self.was_cut(replica, began);
        let stale = if is_cut { self.stale } else { Duration::ZERO };
        // The boot clocks run up to 1 % fast or slow.
        let bound = match demand {
            Demand::Lease => (LEASE + stale).mul_f64(1.02),
            Demand::Strict => LEASE.mul_f64(1.02),
            Demand::Live => Duration::ZERO,
        };
        // The replica must not answer from a state before the version that it has applied.
        let known_since = self.database.committed_at(applied, 2 * (LEASE + self.stale));
        let known_since = known_since.map_or(self.began, |committed| committed + Duration::from_nanos(1));
        let from = began.checked_sub(bound).unwrap_or(began).max(known_since).max(self.began);
        let good = verdict.status == 200;
        if good && decided - began > DEADLINE.mul_f64(1.02) {
            self.wrong(check, "granted after the check's deadline");
        }
        let is_remembered = !good && self.database.is_remembered(number, is_cut);
        if !is_remembered && !self.database.was(number, good, from, decided) {
            self.wrong(check, "the answer was not correct at any moment within the allowed time");
        }
    }

    /// Returns true if this replica could not reach the database at some time shortly before `began`, so that polls may
    /// have got no answer.
    fn was_cut(&self, replica: usize, began: Instant) -> bool {
        let slot = lock(&self.slots[replica]);
        let since = began.checked_sub(UNREACHED).unwrap_or(self.began);
        let last = slot.conditions.last();
        last.is_some_and(|(at, condition)| *condition != Condition::Fine || *at >= since)
    }

    fn wrong(&self, check: &Check, why: &str) {
        let Check { replica, number, demand, began, decided, verdict, .. } = check;
        let seconds = |at: Instant| (at - self.began).as_secs_f64();
        let mut description = String::new();
        // Writing into a String cannot fail.
        let _ = write!(
            description,
            "seed {}: replica {replica}, key {number}, {demand:?}: {verdict:?} from {:.4} s to {:.4} s: {why}; the key \
             became good and bad, in turn, at {:?}",
            self.plan.seed,
            seconds(*began),
            seconds(*decided),
            self.database.turns(*number),
        );
        self.log(|| format!("WRONG: {description}"));
        lock(&self.outcome).wrong.push(description);
    }
}

struct Check {
    replica: usize,
    number: usize,
    demand: Demand,
    /// The version that the replica had applied when the check began.
    applied: Version,
    began: Instant,
    decided: Instant,
    verdict: Verdict,
}

/// The read policy that the route demands.
#[derive(Clone, Copy, Debug)]
enum Demand {
    Lease,
    Strict,
    Live,
}

impl Demand {
    const fn extensions(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Lease => &[],
            Self::Strict => &[("trustgate.freshness", "strict")],
            Self::Live => &[("trustgate.freshness", "live")],
        }
    }
}
