//! One run: three replicas as they are, one database, one Redis, and what chance does to them. Time is simulated, all of it
//! happens on one thread, and the same seed gives the same run.

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
use trustgate::{
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
    network::{DriftingClock, Network, Way},
    redis::{HANGS_MAX, Redis},
    support::grpc::{Verdict, request, verdict},
};

const REPLICAS: usize = 3;
/// For how long a run goes on.
const LENGTH: Duration = Duration::from_secs(6);
/// L: as it comes.
const LEASE: Duration = Duration::from_secs(1);
/// For how long after its way is fine again a replica may not know it: connecting gets two seconds, and a poll without an
/// answer speaks for two leases.
const UNREACHED: Duration = Duration::from_millis(4_200);
/// How long a check may take from its start to a grant: `decision.deadline`, as it comes.
const DEADLINE: Duration = Duration::from_millis(150);

/// What kind of run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    /// Whether keys change but nothing fails.
    pub calm: bool,
    pub story: Story,
}

/// Whether what happens is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Story {
    Untold,
    /// In the outcome.
    Kept,
    /// As it happens.
    Shown,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Checks, by what they came to.
    pub counts: BTreeMap<&'static str, u64>,
    /// Answers that break the promise, in words.
    pub wrong: Vec<String>,
    /// What happened, where that was to be kept.
    pub story: Vec<String>,
}

/// Goes through one run.
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
            actors.spawn(Arc::clone(&world).ask(number));
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
    /// S: for how long it stays in force while polls get no answer.
    stale: Duration,
    database: Arc<Database>,
    redis: Redis,
    places: [Mutex<Place>; REPLICAS],
    /// Nothing is committed before.
    quiet_until: Mutex<Instant>,
    /// For how long the machine of the replicas stood still, in all.
    paused: Mutex<Duration>,
    checks: Mutex<JoinSet<()>>,
    outcome: Mutex<Outcome>,
}

/// Where a replica runs, and its ways to the database since the beginning.
#[derive(Default)]
struct Place {
    running: Option<Running>,
    ways: Vec<(Instant, Way)>,
}

struct Running {
    checker: Arc<Checker>,
    replica_state: Arc<ReplicaState>,
    network: Arc<Network>,
    registry: Registry,
    /// Dropped, all of them end at once: a crash.
    _tasks: Tasks,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn new(plan: Plan) -> Self {
        let chance = Chance::of(plan.seed);
        let stale = chance.one_of(&[Duration::ZERO, Duration::from_secs(2), Duration::from_secs(20)]);
        let hints = if chance.one_in(3) { "false" } else { "true" };
        let set = [
            ("FRESHNESS__STALE_IF_UNCONFIRMED", format!("{}s", stale.as_secs())),
            ("FRESHNESS__HINTS", hints.to_owned()),
            ("CACHE__SIZE", "1MiB".to_owned()),
            ("CACHE__ABSENCES_SIZE", "1MiB".to_owned()),
        ];
        let set = set.map(|(name, value)| (OsString::from(format!("TRUSTGATE__{name}")), OsString::from(value)));
        let config = config::load(None, set, Purpose::Serve).expect("good settings");
        let hasher = Hasher::new(None, &[]);
        let database = Arc::new(Database::new(&chance, |key| hasher.current(key.as_bytes())));
        let redis = Redis::new(&chance);
        let (places, outcome, began) = (Default::default(), Mutex::default(), Instant::now());
        let quiet_until = Mutex::new(began);
        Self {
            plan,
            began,
            chance,
            config,
            stale,
            database,
            redis,
            places,
            quiet_until,
            paused: Mutex::default(),
            checks: Mutex::default(),
            outcome,
        }
    }

    /// Starts replica `number`; one that runs there crashes.
    fn start(&self, number: usize) {
        let mut place = lock(&self.places[number]);
        let clock = Arc::new(DriftingClock::new(&self.chance));
        let network = Arc::new(Network::new(Arc::clone(&self.database), Arc::clone(&clock) as _, &self.chance));
        network.set(place.ways.last().map_or(Way::Fine, |(_, way)| *way));
        let around = ReplicaDeps {
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
        let replica = Replica::start(&self.config, around, &registry, &mut tasks).expect("it starts");
        if let Some(before) = place.running.take() {
            self.keep_metrics(&before);
        }
        place.running = Some(Running {
            checker: replica.checker,
            replica_state: replica.replica_state,
            network,
            registry,
            _tasks: tasks,
        });
    }

    fn goes_on(&self) -> bool {
        self.began.elapsed() < LENGTH + *lock(&self.paused)
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.plan.story == Story::Untold {
            return;
        }
        let line = format!("{:9.4} s  {}", self.began.elapsed().as_secs_f64(), what());
        match self.plan.story {
            Story::Shown => println!("{line}"),
            Story::Untold | Story::Kept => lock(&self.outcome).story.push(line),
        }
    }

    fn count(&self, what: &'static str, times: u64) {
        *lock(&self.outcome).counts.entry(what).or_default() += times;
    }

    /// What the metrics of a replica say of the ways its answers took.
    fn keep_metrics(&self, running: &Running) {
        for family in running.registry.gather() {
            for metric in family.get_metric() {
                let label =
                    |name: &str| metric.get_label().iter().find(|label| label.name() == name).map(|l| l.value());
                let what = match (family.name(), label("tier"), label("outcome")) {
                    ("trustgate_cache_lookups_total", Some("l2"), Some("hit")) => "found in Redis",
                    ("trustgate_cache_lookups_total", Some("l2"), Some("refused")) => "refused from Redis",
                    ("trustgate_cache_lookups_total", Some("l1"), Some("refused")) => "refused in L1",
                    ("trustgate_stale_grants_total", ..) => "granted while unconfirmed",
                    ("trustgate_lost_history_total", ..) => "histories found lost",
                    ("trustgate_polls_total", _, Some("ok")) => "polls confirmed",
                    ("trustgate_polls_total", _, Some("unanswered")) => "polls unanswered",
                    ("trustgate_polls_total", _, Some("unusable")) => "polls unusable",
                    _ => continue,
                };
                self.count(what, metric.get_counter().get_value() as u64);
            }
        }
    }

    // === who acts ===

    /// Commits one thing after the other.
    async fn change(self: Arc<Self>) {
        let chance = self.chance.fork();
        for number in 0..KEYS {
            if chance.one_in(2) {
                self.database.commit(Event::Issue(number), true);
            }
        }
        while self.goes_on() {
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
                // A key is revoked while many wait for one read of it.
                let replica = chance.number(0..REPLICAS);
                event = Event::Revoke(number);
                let good = [Event::Issue(number), Event::Restore(number), Event::SetTrust(number % TRUSTS, true)];
                for event in good.into_iter().chain([Event::Everything]) {
                    self.database.commit(event, true);
                }
                self.set_way(&[replica], Way::Lagging, Duration::from_millis(200));
                sleep(chance.micros(1_000..30_000)).await;
                for _ in 0..30 {
                    self.check_after(replica, number, Demand::Lease, chance.micros(0..100_000));
                }
                sleep(chance.micros(1_000..50_000)).await;
            }
            // Several at once, now and then: more than a poll takes.
            let times = if chance.one_in(15) { 20 } else { 1 };
            for _ in 1..times {
                self.database.commit(Event::Other, true);
            }
            let named = self.plan.calm || !chance.one_in(40);
            self.tell(|| format!("{event:?}{}", if named { "" } else { ", unnamed: a trigger was dropped" }));
            self.database.commit(event, named);
        }
    }

    /// Lets things fail.
    async fn disturb(self: Arc<Self>) {
        let chance = self.chance.fork();
        while !self.plan.calm && self.goes_on() {
            sleep(chance.micros(10_000..800_000)).await;
            let number = chance.number(0..REPLICAS);
            match chance.number(0..19) {
                0..4 => {
                    let way = chance.one_of(&[Way::Lagging, Way::Slow, Way::Cut, Way::Refused, Way::Standby]);
                    self.set_way(&[number], way, chance.micros(10_000..4_000_000));
                }
                14..16 => {
                    // What came back late is the last for a while.
                    self.set_way(&[number], Way::LateBack, Duration::from_secs(3));
                    sleep(chance.micros(300_000..800_000)).await;
                    self.set_way(&[number], Way::Cut, chance.micros(1_000_000..3_000_000));
                }
                17.. => {
                    // A poll has just been given up, perhaps, and the way is fine again.
                    if chance.one_in(2) {
                        self.set_way(&[number], Way::Cut, chance.micros(500_000..1_500_000));
                        sleep(chance.micros(500_000..1_600_000)).await;
                    }
                    self.pause(chance.micros(100_000..9_000_000), &chance).await;
                }
                16 => {
                    let lost = chance.number(1..4);
                    self.tell(|| format!("all is put back to a copy, {lost} versions ago, and begins anew"));
                    self.database.fail_over(lost, true);
                    for _ in 0..chance.number(0..4) {
                        self.database.commit(Event::Revoke(chance.number(0..KEYS)), true);
                    }
                    for number in 0..REPLICAS {
                        self.start(number);
                    }
                }
                4 => {
                    let way = chance.one_of(&[Way::Lagging, Way::Slow, Way::Cut, Way::Refused]);
                    self.set_way(&[0, 1, 2], way, chance.micros(10_000..2_000_000));
                }
                5..8 => {
                    let (lost, copied) = (chance.number(0..4), chance.one_in(3));
                    self.tell(|| format!("failover, {lost} versions lost{}", if copied { ", to a copy" } else { "" }));
                    self.database.fail_over(lost, copied);
                    if copied && chance.one_in(2) {
                        // As many versions as were lost, and none for a while: nothing but their nonces is new.
                        for _ in 0..lost {
                            self.database.commit(Event::Other, true);
                        }
                        *lock(&self.quiet_until) = Instant::now() + Duration::from_millis(2_500);
                    }
                }
                8 => {
                    self.tell(|| "old versions are deleted".to_owned());
                    self.database.prune();
                }
                9 => {
                    self.tell(|| format!("replica {number} crashes and starts"));
                    self.start(number);
                }
                10 => {
                    let until = Instant::now() + chance.micros(1_000..HANGS_MAX.as_micros() as u64);
                    self.tell(|| "Redis hangs".to_owned());
                    self.redis.hang_until(until);
                }
                11 => {
                    self.tell(|| "Redis is down for a moment, and empty".to_owned());
                    self.redis.set_refuses(true);
                    self.redis.empty();
                    sleep(chance.micros(1_000..1_500_000)).await;
                    self.redis.set_refuses(false);
                }
                12 => {
                    self.tell(|| "somebody puts old values back into Redis".to_owned());
                    self.redis.replay();
                }
                _ => {
                    self.tell(|| "somebody forges values in Redis".to_owned());
                    self.redis.forge();
                }
            }
        }
    }

    /// Stops the replicas, and with them whoever asks, while others commit.
    async fn pause(&self, length: Duration, chance: &Chance) {
        let number = chance.number(0..KEYS);
        self.tell(|| format!("all replicas stand still for {length:?}, and key {number} is revoked"));
        self.database.commit(Event::Revoke(number), true);
        *lock(&self.paused) += length;
        tokio::time::advance(length).await;
    }

    fn set_way(self: &Arc<Self>, replicas: &[usize], way: Way, length: Duration) {
        self.tell(|| format!("way of {replicas:?} to the database: {way:?} for {length:?}"));
        for number in replicas.iter().copied() {
            self.note_way(number, way);
            let world = Arc::clone(self);
            tokio::spawn(async move {
                sleep(length).await;
                world.note_way(number, Way::Fine);
            });
        }
    }

    fn note_way(&self, number: usize, way: Way) {
        let mut place = lock(&self.places[number]);
        place.ways.push((Instant::now(), way));
        place.running.as_ref().expect("one always runs").network.set(way);
    }

    /// Asks replica `number`, a check after the other and some at the same time.
    async fn ask(self: Arc<Self>, number: usize) {
        let chance = self.chance.fork();
        let mut due = Instant::now();
        while self.goes_on() {
            due += chance.micros(100..25_000);
            sleep_until(due).await;
            let freshness = match chance.number(0..20) {
                0 => Demand::Live,
                1 => Demand::Strict,
                _ => Demand::Lease,
            };
            // Some are asked for more often than others.
            let key = chance.number(0..KEYS).min(chance.number(0..KEYS));
            let times = if chance.one_in(40) { 10 } else { 1 };
            for _ in 0..times {
                self.check_after(number, key, freshness, chance.micros(0..times * 5_000 - 4_999));
            }
        }
        self.keep_metrics(lock(&self.places[number]).running.as_ref().expect("one always runs"));
    }

    /// Asks `replica` for key `number` after `wait`.
    fn check_after(self: &Arc<Self>, replica: usize, number: usize, demand: Demand, wait: Duration) {
        let world = Arc::clone(self);
        lock(&self.checks).spawn(async move {
            sleep(wait).await;
            world.check(replica, number, demand).await;
        });
    }

    async fn check(self: Arc<Self>, replica: usize, number: usize, demand: Demand) {
        let (checker, applied) = {
            let place = lock(&self.places[replica]);
            let running = place.running.as_ref().expect("one always runs");
            (Arc::clone(&running.checker), running.replica_state.load().applied())
        };
        let message = request(&key(number), demand.extensions()).encode_to_vec();
        let began = Instant::now();
        let reply = checker.check(&message).await;
        let Reply::Message(frame) = reply else { panic!("nobody asked for gRPC errors") };
        // Without the frame's own five bytes.
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

    // === the rule ===

    /// A grant must have been right at some moment not longer ago than promised, and so must a denial.
    fn judge(&self, check: &Check) {
        let Check { replica, number, demand, applied, began, decided, ref verdict } = *check;
        let is_at_once = began == decided;
        let what = match (verdict.status, verdict.reason.as_deref()) {
            (200, _) if is_at_once => "granted at once",
            (200, _) => "granted after a read",
            (401, Some("unknown" | "revoked" | "trust_disabled")) if is_at_once => "denied at once",
            (401, Some("unknown" | "revoked" | "trust_disabled")) => "denied after a read",
            (503, _) => "faults",
            _ => return self.wrong(check, "an answer that nothing here can come to"),
        };
        self.count(what, 1);
        self.tell(|| {
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
        // Boot clocks are true to a hundredth.
        let bound = match demand {
            Demand::Lease => (LEASE + stale).mul_f64(1.02),
            Demand::Strict => LEASE.mul_f64(1.02),
            Demand::Live => Duration::ZERO,
        };
        // What the replica had been told of counts at once: what was so after that commit, not before it.
        let told = self.database.committed_at(applied, 2 * (LEASE + self.stale));
        let told = told.map_or(self.began, |committed| committed + Duration::from_nanos(1));
        let from = began.checked_sub(bound).unwrap_or(began).max(told).max(self.began);
        let good = verdict.status == 200;
        if good && decided - began > DEADLINE.mul_f64(1.02) {
            self.wrong(check, "granted later than a check may be decided");
        }
        let is_remembered = !good && self.database.is_remembered(number, is_cut);
        if !is_remembered && !self.database.was(number, good, from, decided) {
            self.wrong(check, "so it was at no moment of the time allowed");
        }
    }

    /// Whether this replica could not reach the database of late, so that polls may have gone unanswered.
    fn was_cut(&self, replica: usize, began: Instant) -> bool {
        let place = lock(&self.places[replica]);
        let since = began.checked_sub(UNREACHED).unwrap_or(self.began);
        let last = place.ways.last();
        last.is_some_and(|(at, way)| *way != Way::Fine || *at >= since)
    }

    fn wrong(&self, check: &Check, why: &str) {
        let Check { replica, number, demand, began, decided, verdict, .. } = check;
        let seconds = |at: Instant| (at - self.began).as_secs_f64();
        let mut told = String::new();
        // Writing into a String never fails.
        let _ = write!(
            told,
            "seed {}: replica {replica}, key {number}, {demand:?}: {verdict:?} from {:.4} s to {:.4} s: {why}; it became \
             good, then bad, in turn at {:?}",
            self.plan.seed,
            seconds(*began),
            seconds(*decided),
            self.database.turns(*number),
        );
        self.tell(|| format!("WRONG: {told}"));
        lock(&self.outcome).wrong.push(told);
    }
}

struct Check {
    replica: usize,
    number: usize,
    demand: Demand,
    /// The version that the replica had applied when it began.
    applied: Version,
    began: Instant,
    decided: Instant,
    verdict: Verdict,
}

/// How fresh a route wants it.
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
