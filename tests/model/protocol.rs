//! Models the freshness protocol as steps between states, including the events that can occur between these steps.
//!
//! The model has one replica and one digest. Time can pass between any two steps. The database commits, fails over with
//! or without data loss, and prunes old versions. Redis needs no state in the model, because it may answer with any
//! value that any replica ever read, or with nothing. These answers include values that other replicas wrote late,
//! twice or not at all, and old values that an attacker restored. A replica can poll at any time, so notifications need
//! no step. Values with a wrong MAC are not modelled, because replicas ignore them.

use std::fmt;

/// The duration of a lease, in moments, the unit of time in this model.
const LEASE: u8 = 1;
/// The maximum number of versions in one run, including the versions in a lost branch.
const VERSIONS_MAX: usize = 5;
/// The maximum number of loads that a check waits for.
const ATTEMPTS: u8 = 2;

/// A rule of the protocol. A test breaks each rule, to show that the rule is necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A poll raises stripes and floors before it renews the lease.
    StripesBeforeLease,
    /// A poll raises stripes and floors before it advances to the new version.
    StripesBeforeVersion,
    /// A check loads the lease before it looks at a value.
    LeaseBeforeValue,
    /// A lease begins at the moment at which the poll was sent, not when the answer arrives.
    LeaseFromSending,
    /// A notification only triggers a poll. It does not change the replica state.
    NotificationsCarryNoData,
    /// A value has the version of the statement that read it, not the version that the replica has applied.
    VersionOfItsRead,
    /// A load reads the value and its version with one statement.
    OneStatement,
    /// An answer from a standby does not renew the lease.
    PrimaryOnly,
    /// A poll compares the nonce of the applied version with the database, even if there is no new version.
    NonceOfApplied,
    /// A check may use a value only if the replica knows the nonce of the value's version.
    NonceOfValue,
    /// The first poll of a new replica state applies the recent changes.
    StartFromChanges,
    /// If a poll cannot list all new versions, all earlier values are out of date.
    FloorAfterALongPoll,
    /// Each check that waited for a load decides for itself whether it may use the loaded value.
    LoadsAreChecked,
    /// Without a fresh lease, a check may use only a read that was sent after the check began.
    OwnReadWithoutLease,
    /// A check with the read policy `live` may use only a read that was sent after the check began.
    OwnReadWhenLive,
    /// A change to a trust makes the records of the trust's keys out of date.
    TrustChangesReachRecords,
    /// Like records, negative entries have a floor. Entries that were read at a version below the floor are out of
    /// date.
    NegativeEntriesHaveAFloor,
}

impl Rule {
    pub const ALL: [Self; 17] = [
        Self::StripesBeforeLease,
        Self::StripesBeforeVersion,
        Self::LeaseBeforeValue,
        Self::LeaseFromSending,
        Self::NotificationsCarryNoData,
        Self::VersionOfItsRead,
        Self::OneStatement,
        Self::PrimaryOnly,
        Self::NonceOfApplied,
        Self::NonceOfValue,
        Self::StartFromChanges,
        Self::FloorAfterALongPoll,
        Self::LoadsAreChecked,
        Self::OwnReadWithoutLease,
        Self::OwnReadWhenLive,
        Self::TrustChangesReachRecords,
        Self::NegativeEntriesHaveAFloor,
    ];
}

/// A change to commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    Revoke,
    Unrevoke,
    Delete,
    /// A new key gets the digest.
    Insert,
    DisableTrust,
    EnableTrust,
    /// Like `Insert`, with so many keys that the change log has one entry for all negative entries.
    BulkInsert,
    /// A change to another object.
    Other,
}

/// The events that can happen in a scenario, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub name: &'static str,
    /// True if the digest initially belongs to a good key; false if it belongs to no key.
    pub begins_good: bool,
    pub changes: &'static [Change],
    pub commits: u8,
    /// The last moment of a run.
    pub moments: u8,
    pub failovers: u8,
    pub crashes: u8,
    pub prunes: u8,
    /// The maximum number of versions that a poll lists.
    pub listed: usize,
    /// True if checks may have the read policy `live`.
    pub live: bool,
}

/// A scenario, and the rule that is broken in it, if any.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub bounds: Bounds,
    pub broken: Option<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    id: u8,
    revoked: bool,
}

/// The database rows that determine the decision about the digest: the key and its trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Content {
    key: Option<Key>,
    trust_enabled: bool,
}

impl Content {
    fn is_good(self) -> bool {
        self.trust_enabled && self.key.is_some_and(|key| !key.revoked)
    }
}

/// The objects that a version changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Changed {
    key: Option<u8>,
    trust: bool,
    negative: bool,
    every_negative: bool,
}

/// A committed version. Its index in [`State::versions`] is its nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Version {
    number: u8,
    changed_objects: Changed,
    content: Content,
    /// The lineages that contain this version, one bit each.
    lineages: u8,
}

/// The nonces of the versions of a lineage, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Branch {
    lineage: u8,
    nonces: [u8; VERSIONS_MAX],
    /// The index of the oldest version that was not pruned.
    oldest: u8,
    len: u8,
}

impl Branch {
    fn newest(self) -> u8 {
        self.nonces[usize::from(self.len) - 1]
    }

    fn kept(&self) -> &[u8] {
        &self.nonces[usize::from(self.oldest)..usize::from(self.len)]
    }

    fn truncate(&mut self, len: u8) {
        self.nonces[usize::from(len)..].fill(0);
        self.len = len;
    }
}

/// A value with the version at which it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Value {
    content: Content,
    as_of: u8, // nonce
    lineage: u8,
}

/// The replica state. `applied` is a nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct View {
    epoch: u8,
    begun: bool,
    lineage: u8,
    applied: u8,
    /// The known nonces, one bit each.
    known: u8,
    records_from: u8,
    negatives_from: u8,
    keys: [u8; VERSIONS_MAX],
    trust: u8,
    negative: u8,
    /// The moment at which the lease began, plus one, or 0 if there is no lease.
    lease: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Poll {
    Idle,
    Sent {
        at: u8,
    },
    Answered {
        at: u8,
        answer: Branch,
    },
    /// The replica has interpreted the answer and has completed `done` of the three steps that apply it. `after` is the
    /// version that was applied before. `jumps` means that all earlier values are out of date. `begins` means that this
    /// is the first poll of a new replica state.
    Applying {
        lease_from: u8,
        answer: Branch,
        done: u8,
        after: u8,
        jumps: bool,
        begins: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Load {
    None,
    FoundInRedis {
        value: Value,
    },
    /// `tiers` means that the load is for checks with a fresh lease, which may use the caches. `own` means that the
    /// load was sent after the check began.
    Sent {
        tiers: bool,
        own: bool,
    },
    /// The load has read the rows but not yet their version. This happens only if [`Rule::OneStatement`] is broken.
    HalfRead {
        tiers: bool,
        own: bool,
        content: Content,
    },
    Read {
        tiers: bool,
        own: bool,
        value: Value,
    },
    /// The load has completed with a version that is newer than the applied version. The value is inserted after a
    /// poll.
    Ahead {
        value: Value,
    },
}

/// A check that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Question {
    at: u8,
    epoch: u8,
    fresh: bool,
    live: bool,
    attempt: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Check {
    None,
    Begun(Question),
    /// The check has read L1 but not yet the lease. This happens only if [`Rule::LeaseBeforeValue`] is broken.
    ReadL1(Question, Option<Content>),
    /// The check waits for a load.
    Waits(Question),
    /// The load has completed. `entered` is the epoch of the replica state in which the value was inserted into L1.
    Loaded {
        question: Question,
        value: Value,
        entered: Option<u8>,
        own: bool,
    },
}

/// The state of the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: u8,
    /// The moments at which the key was good in the database, one bit each.
    good: u8,
    /// The moments at which the key was not good in the database, one bit each.
    bad: u8,
    versions: [Option<Version>; VERSIONS_MAX],
    database: Branch,
    failovers: u8,
    crashes: u8,
    prunes: u8,
    view: View,
    /// The previous replica state, until the check that began in it is decided.
    former: View,
    /// The cache entry, and the epoch of the replica state in which the entry was inserted.
    l1: Option<(Value, u8)>,
    poll: Poll,
    load: Load,
    check: Check,
}

/// A step of the model, as it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    TimePasses,
    Commit(Change),
    Failover { keeps: u8, new_lineage: bool },
    Prune,
    Crash,
    NotificationIsApplied,
    PollIsSent,
    PollIsAnswered,
    PollIsAnsweredByAStandby { has: u8 },
    PollIsDropped,
    PollFindsLostHistory,
    PollRaisesStripes,
    PollAdvances,
    PollRenewsTheLease,
    LoadFindsInRedis { nonce: u8 },
    LoadIsSent,
    LoadReadsTheRow,
    LoadReads,
    LoadCompletes,
    LoadIsInsertedLater,
    LoadIsDropped,
    CheckBegins { live: bool },
    CheckReadsL1,
    CheckReadsTheLease,
    CheckRefusesTheValue,
    CheckWaitsForAPoll,
    CheckDecides { grants: bool },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A step and its result: the next state, or the decision of a check, which ends the path.
pub enum Next {
    State(Step, State),
    Decided(Step, Result<(), Wrong>),
}

/// The answer was not correct at any moment within the allowed time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Provenance {
    Known,
    Ahead,
    Foreign,
}

impl World {
    fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// Returns the initial state: a replica that has not polled yet.
    pub fn start(&self) -> State {
        let key = self.bounds.begins_good.then_some(Key { id: 0, revoked: false });
        let content = Content { key, trust_enabled: true };
        let mut versions = [None; VERSIONS_MAX];
        versions[0] = Some(Version { number: 1, changed_objects: Changed::default(), content, lineages: 1 });
        let mut state = State {
            now: 0,
            good: 0,
            bad: 0,
            versions,
            database: Branch { lineage: 0, nonces: [0; VERSIONS_MAX], oldest: 0, len: 1 },
            failovers: 0,
            crashes: 0,
            prunes: 0,
            view: View::default(),
            former: View::default(),
            l1: None,
            poll: Poll::Idle,
            load: Load::None,
            check: Check::None,
        };
        state.record_truth();
        state
    }

    /// Calls `next` with each possible next step.
    pub fn steps(&self, state: &State, mut next: impl FnMut(Next)) {
        self.world(state, &mut next);
        self.poll(state, &mut next);
        self.load(state, &mut next);
        self.check(state, &mut next);
    }

    fn world(&self, state: &State, next: &mut impl FnMut(Next)) {
        let Bounds { changes, commits, moments, failovers, crashes, prunes, .. } = self.bounds;
        let mut go = |step, change: &dyn Fn(&mut State)| {
            let mut after = *state;
            change(&mut after);
            after.record_truth();
            next(Next::State(step, after));
        };
        if state.now < moments {
            go(Step::TimePasses, &|after| after.now += 1);
        }
        let committed = state.versions.iter().flatten().count();
        if committed <= usize::from(commits) {
            for change in changes {
                if let Some((content, changed_objects)) = state.effect_of(*change) {
                    go(Step::Commit(*change), &|after| after.commit(content, changed_objects));
                }
            }
        }
        if state.failovers < failovers {
            for keeps in state.database.oldest + 1..=state.database.len {
                for new_lineage in [false, true] {
                    if keeps == state.database.len && !new_lineage {
                        continue; // nothing would change
                    }
                    go(Step::Failover { keeps, new_lineage }, &|after| after.fail_over(keeps, new_lineage));
                }
            }
        }
        if state.prunes < prunes && state.database.oldest + 1 < state.database.len {
            go(Step::Prune, &|after| {
                after.database.oldest += 1;
                after.prunes += 1;
            });
        }
        if state.crashes < crashes {
            go(Step::Crash, &|after| {
                let epoch = after.view.epoch + 1;
                (after.view, after.former) = (View { epoch, ..View::default() }, View::default());
                (after.l1, after.poll, after.load, after.check) = (None, Poll::Idle, Load::None, Check::None);
                after.crashes += 1;
            });
        }
    }

    fn poll(&self, state: &State, next: &mut impl FnMut(Next)) {
        let mut go = |step, poll| next(Next::State(step, State { poll, ..*state }));
        match state.poll {
            Poll::Idle => {
                go(Step::PollIsSent, Poll::Sent { at: state.now });
                if !self.keeps(Rule::NotificationsCarryNoData)
                    && state.view.begun
                    && state.view.lineage == state.database.lineage
                {
                    let mut after = *state;
                    after.view.advance(state.database, state.database.kept());
                    next(Next::State(Step::NotificationIsApplied, after));
                }
            }
            Poll::Sent { at } => {
                go(Step::PollIsAnswered, Poll::Answered { at, answer: state.database });
                go(Step::PollIsDropped, Poll::Idle);
                if !self.keeps(Rule::PrimaryOnly) {
                    for has in state.database.oldest + 1..state.database.len {
                        let mut answer = state.database;
                        answer.truncate(has);
                        go(Step::PollIsAnsweredByAStandby { has }, Poll::Answered { at, answer });
                    }
                }
            }
            Poll::Answered { at, answer } => {
                let lease_from = if self.keeps(Rule::LeaseFromSending) { at } else { state.now };
                match self.interpret(state, answer) {
                    None => {
                        let mut after = State { poll: Poll::Idle, ..*state };
                        after.former = View { lease: 0, ..state.view };
                        after.view = View { epoch: state.view.epoch + 1, ..View::default() };
                        after.drop_unused_view();
                        next(Next::State(Step::PollFindsLostHistory, after));
                    }
                    Some(jumps) => {
                        let (begins, after) = (!state.view.begun, state.view.number_applied(state));
                        let applying = Poll::Applying { lease_from, answer, done: 0, after, jumps, begins };
                        let now = State { poll: applying, ..*state };
                        self.apply(&now, next);
                    }
                }
            }
            Poll::Applying { .. } => {
                // The code does not drop a poll at this point, but the model allows it.
                go(Step::PollIsDropped, Poll::Idle);
                self.apply(state, next);
            }
        }
    }

    /// Interprets an answer. Returns `None` if the database has lost history, so that a new replica state must begin.
    /// Otherwise returns true if all earlier values are out of date.
    fn interpret(&self, state: &State, answer: Branch) -> Option<bool> {
        let view = &state.view;
        if !view.begun {
            return Some(false);
        }
        let number = |nonce: u8| state.version(nonce).number;
        let applied = number(view.applied);
        let newest = number(answer.newest());
        if answer.lineage != view.lineage || newest < applied {
            return None;
        }
        let listed = self.listed(state, answer, applied);
        let is_complete = listed.last() == Some(&answer.newest()) || newest == applied;
        let is_followed = is_complete || !self.keeps(Rule::FloorAfterALongPoll);
        match answer.kept().iter().find(|nonce| number(**nonce) == applied) {
            _ if !self.keeps(Rule::NonceOfApplied) && newest == applied => Some(false),
            Some(nonce) if *nonce != view.applied => None,
            Some(_) => Some(!is_followed),
            None if number(answer.kept()[0]) > applied => Some(true),
            None => None,
        }
    }

    /// Returns the versions after `after` that a poll lists: oldest first, and at most as many as the bounds allow.
    fn listed(&self, state: &State, answer: Branch, after: u8) -> Vec<u8> {
        let new = answer.kept().iter().copied().filter(|nonce| state.version(*nonce).number > after);
        new.take(self.bounds.listed).collect()
    }

    fn apply(&self, state: &State, next: &mut impl FnMut(Next)) {
        let Poll::Applying { lease_from, answer, done, after: from, jumps, begins } = state.poll else { return };
        let order = match self.broken {
            Some(Rule::StripesBeforeLease) => [Step::PollRenewsTheLease, Step::PollRaisesStripes, Step::PollAdvances],
            Some(Rule::StripesBeforeVersion) => [Step::PollAdvances, Step::PollRaisesStripes, Step::PollRenewsTheLease],
            _ => [Step::PollRaisesStripes, Step::PollAdvances, Step::PollRenewsTheLease],
        };
        let step = order[usize::from(done)];
        let mut after = *state;
        after.poll = match state.poll {
            Poll::Applying { done: 0 | 1, .. } => {
                Poll::Applying { lease_from, answer, done: done + 1, after: from, jumps, begins }
            }
            _ => Poll::Idle,
        };
        let listed = self.listed(state, answer, from);
        match step {
            Step::PollRaisesStripes if begins && !self.keeps(Rule::StartFromChanges) => {}
            Step::PollRaisesStripes => {
                let newest = state.version(answer.newest()).number;
                let is_complete = listed.last() == Some(&answer.newest());
                if jumps || begins {
                    let floor = if begins && is_complete { state.version(listed[0]).number } else { newest };
                    after.view.records_from = after.view.records_from.max(floor);
                    if self.keeps(Rule::NegativeEntriesHaveAFloor) {
                        after.view.negatives_from = after.view.negatives_from.max(floor);
                    }
                }
                for nonce in &listed {
                    self.raise(&mut after.view, state.version(*nonce));
                }
            }
            Step::PollAdvances => after.view.advance(answer, &listed),
            _ => after.view.lease = after.view.lease.max(lease_from + 1),
        }
        next(Next::State(step, after));
    }

    fn raise(&self, view: &mut View, version: &Version) {
        let Version { number, changed_objects, .. } = *version;
        if let Some(id) = changed_objects.key {
            view.keys[usize::from(id)] = view.keys[usize::from(id)].max(number);
        }
        if changed_objects.trust && self.keeps(Rule::TrustChangesReachRecords) {
            view.trust = view.trust.max(number);
        }
        if changed_objects.negative {
            view.negative = view.negative.max(number);
        }
        if changed_objects.every_negative && self.keeps(Rule::NegativeEntriesHaveAFloor) {
            view.negatives_from = view.negatives_from.max(number);
        }
    }

    fn load(&self, state: &State, next: &mut impl FnMut(Next)) {
        let mut go = |step, load| next(Next::State(step, State { load, ..*state }));
        let newest = |content| Value { content, as_of: state.database.newest(), lineage: state.database.lineage };
        let in_database = state.version(state.database.newest()).content;
        match state.load {
            // The load is for the check of this model, or for a check by another caller.
            Load::None => {
                let own = state.check != Check::None;
                for (nonce, version) in (0..).zip(state.versions.iter().flatten()) {
                    let lineages = (0..=state.database.lineage).filter(|lineage| version.lineages >> lineage & 1 == 1);
                    // Negative entries are not stored in Redis.
                    for lineage in lineages.filter(|_| version.content.key.is_some()) {
                        let value = Value { content: version.content, as_of: nonce, lineage };
                        go(Step::LoadFindsInRedis { nonce }, Load::FoundInRedis { value });
                    }
                }
                go(Step::LoadIsSent, Load::Sent { tiers: true, own });
                if matches!(state.check, Check::Waits(question) if !question.fresh) || self.bounds.live {
                    go(Step::LoadIsSent, Load::Sent { tiers: false, own });
                }
            }
            Load::FoundInRedis { value } => {
                let mut after = *state;
                let entered = self.insert_if_known(&mut after, value);
                if entered && Self::covers(state, &state.view, value) {
                    after.load = Load::None;
                    self.complete_load(after, (true, false), value, true, next);
                } else {
                    let own = state.check != Check::None;
                    after.load = Load::Sent { tiers: true, own };
                    next(Next::State(Step::LoadIsSent, after));
                }
            }
            Load::Sent { tiers, own } => {
                if self.keeps(Rule::OneStatement) {
                    go(Step::LoadReads, Load::Read { tiers, own, value: newest(in_database) });
                } else {
                    go(Step::LoadReadsTheRow, Load::HalfRead { tiers, own, content: in_database });
                }
            }
            Load::HalfRead { tiers, own, content } => {
                go(Step::LoadReads, Load::Read { tiers, own, value: newest(content) });
            }
            Load::Read { tiers, own, mut value } => {
                if !self.keeps(Rule::VersionOfItsRead) && state.view.begun {
                    (value.as_of, value.lineage) = (state.view.applied, state.view.lineage);
                }
                let mut after = *state;
                let entered = self.insert_if_known(&mut after, value);
                let is_ahead = self.provenance(state, &state.view, value) == Provenance::Ahead;
                after.load = if is_ahead { Load::Ahead { value } } else { Load::None };
                self.complete_load(after, (tiers, own), value, entered, next);
            }
            Load::Ahead { value } => {
                go(Step::LoadIsDropped, Load::None);
                let mut after = State { load: Load::None, ..*state };
                if state.view.is_fresh(state.now) && self.insert_if_known(&mut after, value) {
                    next(Next::State(Step::LoadIsInsertedLater, after));
                }
            }
        }
    }

    /// Inserts a value into L1 if the version of the value is known. Returns true if the value was inserted.
    fn insert_if_known(&self, state: &mut State, value: Value) -> bool {
        let is_known = self.provenance(state, &state.view, value) == Provenance::Known;
        if is_known {
            state.l1 = Some((value, state.view.epoch));
        }
        is_known
    }

    /// Completes a load. If the check waits for a load of this kind, the check gets the value.
    fn complete_load(
        &self,
        mut state: State,
        (tiers, own): (bool, bool),
        value: Value,
        entered: bool,
        next: &mut impl FnMut(Next),
    ) {
        match state.check {
            Check::Waits(question) if question.fresh == tiers => {
                let entered = entered.then_some(state.view.epoch);
                state.check = Check::Loaded { question, value, entered, own };
                // Continue the check at once instead of adding a step. A delay could only make the check refuse a value
                // that it would use now, so it could not lead to a wrong answer.
                self.check(&state, next);
            }
            _ => next(Next::State(Step::LoadCompletes, state)),
        }
    }

    fn check(&self, state: &State, next: &mut impl FnMut(Next)) {
        let mut go = |step, check| next(Next::State(step, State { check, ..*state }));
        match state.check {
            Check::None => {
                for live in [false, true] {
                    // A check that begins earlier may use any state since the start of the run, so its answer cannot be
                    // wrong.
                    let first = if live { 1 } else { LEASE + 1 };
                    if live && !self.bounds.live || state.now < first {
                        continue;
                    }
                    let fresh = !live && state.view.is_fresh(state.now);
                    let question = Question { at: state.now, epoch: state.view.epoch, fresh, live, attempt: 0 };
                    let mut after = State { check: Check::Begun(question), ..*state };
                    // A load in flight was sent before this check began.
                    match &mut after.load {
                        Load::Sent { own, .. } | Load::HalfRead { own, .. } | Load::Read { own, .. } => *own = false,
                        _ => {}
                    }
                    next(Next::State(Step::CheckBegins { live }, after));
                }
            }
            Check::Begun(question) => {
                let in_l1 = state.l1.filter(|(value, epoch)| {
                    *epoch == question.epoch && Self::covers(state, state.view_of(question.epoch), *value)
                });
                if !self.keeps(Rule::LeaseBeforeValue) && !question.live {
                    return go(Step::CheckReadsL1, Check::ReadL1(question, in_l1.map(|(value, _)| value.content)));
                }
                match in_l1 {
                    Some((value, _)) if question.fresh => next(state.decide(question, value.content)),
                    _ => go(Step::CheckReadsL1, Check::Waits(question)),
                }
            }
            Check::ReadL1(question, found) => {
                let fresh = state.view.epoch == question.epoch && state.view.is_fresh(question.at);
                match found {
                    Some(content) if fresh => next(state.decide(question, content)),
                    _ => go(Step::CheckReadsTheLease, Check::Waits(Question { fresh, ..question })),
                }
            }
            Check::Waits(_) => {} // until a load completes
            Check::Loaded { question, value, entered, own } => {
                let view = state.view_of(question.epoch);
                let is_entered = entered == Some(question.epoch);
                let provenance = if is_entered { Provenance::Known } else { self.provenance(state, view, value) };
                let is_covered = Self::covers(state, view, value);
                let own = own
                    || !self.keeps(Rule::OwnReadWithoutLease) && !question.fresh && !question.live
                    || !self.keeps(Rule::OwnReadWhenLive) && question.live;
                let may_be_used = match (question.fresh, provenance) {
                    (true, Provenance::Known) => is_covered,
                    (false, Provenance::Known) => own && is_covered,
                    (_, Provenance::Ahead | Provenance::Foreign) => own,
                };
                if may_be_used || question.fresh && !self.keeps(Rule::LoadsAreChecked) {
                    return next(state.decide(question, value.content));
                }
                if question.fresh && provenance == Provenance::Ahead {
                    go(Step::CheckWaitsForAPoll, state.check);
                }
                if question.attempt + 1 < ATTEMPTS {
                    let again = Question { attempt: question.attempt + 1, ..question };
                    go(Step::CheckRefusesTheValue, Check::Waits(again));
                }
            }
        }
    }

    fn provenance(&self, state: &State, view: &View, value: Value) -> Provenance {
        if !view.begun || value.lineage != view.lineage {
            return Provenance::Foreign;
        }
        let number = |nonce| state.version(nonce).number;
        if number(value.as_of) > number(view.applied) {
            return Provenance::Ahead;
        }
        let is_known = view.known >> value.as_of & 1 == 1 || !self.keeps(Rule::NonceOfValue);
        if is_known { Provenance::Known } else { Provenance::Foreign }
    }

    fn covers(state: &State, view: &View, value: Value) -> bool {
        let as_of = state.version(value.as_of).number;
        match value.content.key {
            Some(Key { id, .. }) => {
                as_of >= view.records_from && as_of >= view.keys[usize::from(id)] && as_of >= view.trust
            }
            None => as_of >= view.negatives_from && as_of >= view.negative,
        }
    }
}

impl View {
    fn is_fresh(&self, now: u8) -> bool {
        self.lease > 0 && now.saturating_sub(self.lease - 1) <= LEASE
    }

    fn number_applied(&self, state: &State) -> u8 {
        if self.begun { state.version(self.applied).number } else { 0 }
    }

    fn advance(&mut self, answer: Branch, listed: &[u8]) {
        (self.begun, self.lineage, self.applied) = (true, answer.lineage, answer.newest());
        for nonce in listed.iter().chain([&answer.newest()]) {
            self.known |= 1 << nonce;
        }
    }
}

impl State {
    fn version(&self, nonce: u8) -> &Version {
        // A nonce is the index of a committed version.
        self.versions[usize::from(nonce)].as_ref().unwrap()
    }

    fn view_of(&self, epoch: u8) -> &View {
        if self.view.epoch == epoch { &self.view } else { &self.former }
    }

    /// Drops the previous replica state if the check did not begin in it.
    fn drop_unused_view(&mut self) {
        let of_former = match self.check {
            Check::None => false,
            Check::Begun(question)
            | Check::ReadL1(question, _)
            | Check::Waits(question)
            | Check::Loaded { question, .. } => question.epoch != self.view.epoch,
        };
        if !of_former {
            self.former = View::default();
        }
    }

    /// Records whether the key is good now.
    fn record_truth(&mut self) {
        let is_good = self.version(self.database.newest()).content.is_good();
        *(if is_good { &mut self.good } else { &mut self.bad }) |= 1 << self.now;
    }

    /// Returns the rows after `change` and the objects that it changes, or `None` if the change is not possible now.
    fn effect_of(&self, change: Change) -> Option<(Content, Changed)> {
        let content = self.version(self.database.newest()).content;
        let Content { key, trust_enabled } = content;
        let of_key = |id| Changed { key: Some(id), ..Changed::default() };
        let next_id = || {
            let ids = self.versions.iter().flatten().filter_map(|version| version.content.key);
            ids.map(|key| key.id + 1).max().unwrap_or(0)
        };
        Some(match (change, key) {
            (Change::Revoke, Some(Key { id, revoked: false })) => {
                (Content { key: Some(Key { id, revoked: true }), ..content }, of_key(id))
            }
            (Change::Unrevoke, Some(Key { id, revoked: true })) => {
                (Content { key: Some(Key { id, revoked: false }), ..content }, of_key(id))
            }
            (Change::Delete, Some(Key { id, .. })) => (Content { key: None, ..content }, of_key(id)),
            (Change::Insert | Change::BulkInsert, None) => {
                let key = Some(Key { id: next_id(), revoked: false });
                let whole = change == Change::BulkInsert;
                (Content { key, ..content }, Changed { negative: !whole, every_negative: whole, ..Changed::default() })
            }
            (Change::DisableTrust, _) if trust_enabled => {
                (Content { trust_enabled: false, ..content }, Changed { trust: true, ..Changed::default() })
            }
            (Change::EnableTrust, _) if !trust_enabled => {
                (Content { trust_enabled: true, ..content }, Changed { trust: true, ..Changed::default() })
            }
            (Change::Other, _) => (content, Changed::default()),
            _ => return None,
        })
    }

    fn commit(&mut self, content: Content, changed_objects: Changed) {
        let number = self.version(self.database.newest()).number + 1;
        let nonce = self.versions.iter().flatten().count();
        let lineages = 1 << self.database.lineage;
        self.versions[nonce] = Some(Version { number, changed_objects, content, lineages });
        self.database.nonces[usize::from(self.database.len)] = u8::try_from(nonce).unwrap();
        self.database.len += 1;
    }

    fn fail_over(&mut self, keeps: u8, new_lineage: bool) {
        self.failovers += 1;
        self.database.truncate(keeps);
        if new_lineage {
            self.database.lineage += 1;
            for index in 0..usize::from(keeps) {
                let nonce = usize::from(self.database.nonces[index]);
                if let Some(version) = &mut self.versions[nonce] {
                    version.lineages |= 1 << self.database.lineage;
                }
            }
        }
    }

    /// Decides the check. The answer must have been correct at some moment between one lease before the start of the
    /// check and now. With the read policy `live`, that period begins when the check starts.
    fn decide(&self, question: Question, content: Content) -> Next {
        let earliest = if question.live { question.at } else { question.at.saturating_sub(LEASE) };
        let (grants, until_now) = (content.is_good(), (2_u8 << self.now).wrapping_sub(1));
        let allowed = until_now & !((1_u8 << earliest) - 1);
        let was_true = if grants { self.good } else { self.bad };
        let outcome = if was_true & allowed == 0 { Err(Wrong) } else { Ok(()) };
        Next::Decided(Step::CheckDecides { grants }, outcome)
    }
}
