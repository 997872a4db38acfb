//! The protocol of freshness as steps between states, and everything that may happen in between.
//!
//! One replica, one digest, and around it a world that does its worst: time passes between any two steps, the database
//! commits, fails over with or without a loss, loses its old versions; Redis answers with anything that any replica ever
//! read, or with nothing. So Redis holds no state of its own here: whatever other replicas wrote there, late, twice or
//! never, and whatever somebody put back, is among those answers. A poll may be asked for at any time, so hints need no
//! step. Values with a wrong code of authentication are not modelled: they are not read.

use std::fmt;

/// For how many moments a lease lasts.
const LEASE: u8 = 1;
/// Versions of one run, those of a lost branch included.
const VERSIONS_MAX: usize = 5;
/// Loads that a check waits for.
const ATTEMPTS: u8 = 2;

/// A rule of the protocol that can be broken, to see that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A poll raises what makes values out of date before it renews the lease.
    StripesBeforeLease,
    /// A poll raises it before it moves on to the new version.
    StripesBeforeVersion,
    /// A check looks at the lease before it looks at a value.
    LeaseBeforeValue,
    /// The lease begins when the poll was sent.
    LeaseFromSending,
    /// What a hint says is not applied.
    HintsSayNothing,
    /// A value is dated by the statement that read it.
    DatedByItsRead,
    /// Value and version come from one statement.
    OneStatement,
    /// A standby confirms nothing.
    PrimaryOnly,
    /// The version that was applied must be there with its nonce, also when nothing is new.
    NonceOfApplied,
    /// A value counts only if the nonce of its version is known.
    NonceOfValue,
    /// A view begins with what was changed of late.
    StartFromChanges,
    /// What a poll could not list is out of date as a whole.
    AllOfALongPoll,
    /// What a load brings is judged by each check that waited for it.
    LoadsAreJudged,
    /// Without a lease only a read decides that was sent after the check began.
    OwnReadWithoutLease,
    /// The same for a check that wants the live row.
    OwnReadWhenLive,
    /// A change of a trust makes the records of its keys out of date.
    TrustsAreNamed,
    /// An absence has a floor like a record.
    AbsencesHaveAFloor,
}

impl Rule {
    pub const ALL: [Self; 17] = [
        Self::StripesBeforeLease,
        Self::StripesBeforeVersion,
        Self::LeaseBeforeValue,
        Self::LeaseFromSending,
        Self::HintsSayNothing,
        Self::DatedByItsRead,
        Self::OneStatement,
        Self::PrimaryOnly,
        Self::NonceOfApplied,
        Self::NonceOfValue,
        Self::StartFromChanges,
        Self::AllOfALongPoll,
        Self::LoadsAreJudged,
        Self::OwnReadWithoutLease,
        Self::OwnReadWhenLive,
        Self::TrustsAreNamed,
        Self::AbsencesHaveAFloor,
    ];
}

/// A change that somebody commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    Revoke,
    Unrevoke,
    Delete,
    /// The digest becomes that of a new key.
    Insert,
    DisableTrust,
    EnableTrust,
    /// As `Insert`, among so many that absences are named as a whole.
    BulkInsert,
    /// Of something else.
    Other,
}

/// What may happen, how often.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub name: &'static str,
    /// Whether the digest is that of a good key at first, or of none.
    pub begins_good: bool,
    pub changes: &'static [Change],
    pub commits: u8,
    /// The last moment.
    pub moments: u8,
    pub failovers: u8,
    pub crashes: u8,
    pub prunes: u8,
    /// Versions that a poll lists, at most.
    pub listed: usize,
    pub live: bool,
}

/// Which rule is broken, if one is.
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

/// What the database holds of the digest.
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

/// What a version names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Named {
    key: Option<u8>,
    trust: bool,
    absence: bool,
    every_absence: bool,
}

/// A version that was committed. Its place in the list of all is its nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Version {
    number: u8,
    named: Named,
    content: Content,
    /// The lineages that it is part of, a bit each.
    lineages: u8,
}

/// Versions by nonce, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Branch {
    lineage: u8,
    nonces: [u8; VERSIONS_MAX],
    /// Those before were pruned.
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

/// A value and its date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Value {
    content: Content,
    as_of: u8, // nonce
    lineage: u8,
}

/// What a replica knows; `applied` is a nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct View {
    epoch: u8,
    begun: bool,
    lineage: u8,
    applied: u8,
    /// Nonces, a bit each.
    known: u8,
    records_from: u8,
    absences_from: u8,
    keys: [u8; VERSIONS_MAX],
    trust: u8,
    absence: u8,
    /// When the lease began, plus one.
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
    /// `done` of three steps. What the answer means was decided before the first.
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
    /// `own`: since the check began.
    Sent {
        tiers: bool,
        own: bool,
    },
    /// Where value and version are not read at once.
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
    /// It has landed, ahead of what was applied.
    Settling {
        value: Value,
    },
}

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
    /// Where the value is looked at before the lease: whether it may be used.
    Looked(Question, Option<Content>),
    Waits(Question),
    Landed {
        question: Question,
        value: Value,
        entered: Option<u8>,
        own: bool,
    },
}

/// Everything at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: u8,
    /// In which moments the key was good, and bad, in the database: a bit each.
    good: u8,
    bad: u8,
    versions: [Option<Version>; VERSIONS_MAX],
    database: Branch,
    failovers: u8,
    crashes: u8,
    prunes: u8,
    view: View,
    former: View,
    l1: Option<(Value, u8)>,
    poll: Poll,
    load: Load,
    check: Check,
}

/// What happened, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    AMomentPasses,
    Commit(Change),
    Failover { keeps: u8, new_lineage: bool },
    Prune,
    Crash,
    HintIsApplied,
    PollIsSent,
    PollIsAnswered,
    PollIsAnsweredByAStandby { has: u8 },
    PollIsDropped,
    PollFindsAnotherHistory,
    PollRaisesStripes,
    PollMovesOn,
    PollRenewsTheLease,
    LoadFindsInRedis { nonce: u8 },
    LoadIsSent,
    LoadReadsTheRow,
    LoadReads,
    LoadLands,
    LoadIsKeptLater,
    LoadIsGivenUp,
    CheckBegins { live: bool },
    CheckLooks,
    CheckLooksAtTheLease,
    CheckRefuses,
    CheckWaitsForAPoll,
    CheckDecides { grants: bool },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A step and where it leads; where the check was decided, rightly or not, there is nothing more to lead to.
pub enum Next {
    State(Step, State),
    Decided(Step, Result<(), Wrong>),
}

/// An answer that no moment of the time allowed bears out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Known,
    Ahead,
    Foreign,
}

impl World {
    fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// Where everything begins: a replica that has not polled.
    pub fn start(&self) -> State {
        let key = self.bounds.begins_good.then_some(Key { id: 0, revoked: false });
        let content = Content { key, trust_enabled: true };
        let mut versions = [None; VERSIONS_MAX];
        versions[0] = Some(Version { number: 1, named: Named::default(), content, lineages: 1 });
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
        state.note();
        state
    }

    /// Every step that can be next.
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
            after.note();
            next(Next::State(step, after));
        };
        if state.now < moments {
            go(Step::AMomentPasses, &|after| after.now += 1);
        }
        let committed = state.versions.iter().flatten().count();
        if committed <= usize::from(commits) {
            for change in changes {
                if let Some((content, named)) = state.changed(*change) {
                    go(Step::Commit(*change), &|after| after.commit(content, named));
                }
            }
        }
        if state.failovers < failovers {
            for keeps in state.database.oldest + 1..=state.database.len {
                for new_lineage in [false, true] {
                    if keeps == state.database.len && !new_lineage {
                        continue; // nothing happened
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
                if !self.keeps(Rule::HintsSayNothing)
                    && state.view.begun
                    && state.view.lineage == state.database.lineage
                {
                    let mut after = *state;
                    after.view.move_on(state.database, state.database.kept());
                    next(Next::State(Step::HintIsApplied, after));
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
                match self.judge(state, answer) {
                    None => {
                        let mut after = State { poll: Poll::Idle, ..*state };
                        after.former = View { lease: 0, ..state.view };
                        after.view = View { epoch: state.view.epoch + 1, ..View::default() };
                        after.forget();
                        next(Next::State(Step::PollFindsAnotherHistory, after));
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
                // Applying is never cancelled; that it could be costs nothing.
                go(Step::PollIsDropped, Poll::Idle);
                self.apply(state, next);
            }
        }
    }

    /// What an answer means: `None`: another history; else whether everything before it is out of date.
    fn judge(&self, state: &State, answer: Branch) -> Option<bool> {
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
        let is_followed = is_complete || !self.keeps(Rule::AllOfALongPoll);
        match answer.kept().iter().find(|nonce| number(**nonce) == applied) {
            _ if !self.keeps(Rule::NonceOfApplied) && newest == applied => Some(false),
            Some(nonce) if *nonce != view.applied => None,
            Some(_) => Some(!is_followed),
            None if number(answer.kept()[0]) > applied => Some(true),
            None => None,
        }
    }

    /// The versions that a poll lists: those after `after`, the oldest first, as many as there is room for.
    fn listed(&self, state: &State, answer: Branch, after: u8) -> Vec<u8> {
        let new = answer.kept().iter().copied().filter(|nonce| state.version(*nonce).number > after);
        new.take(self.bounds.listed).collect()
    }

    fn apply(&self, state: &State, next: &mut impl FnMut(Next)) {
        let Poll::Applying { lease_from, answer, done, after: from, jumps, begins } = state.poll else { return };
        let order = match self.broken {
            Some(Rule::StripesBeforeLease) => [Step::PollRenewsTheLease, Step::PollRaisesStripes, Step::PollMovesOn],
            Some(Rule::StripesBeforeVersion) => [Step::PollMovesOn, Step::PollRaisesStripes, Step::PollRenewsTheLease],
            _ => [Step::PollRaisesStripes, Step::PollMovesOn, Step::PollRenewsTheLease],
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
                    if self.keeps(Rule::AbsencesHaveAFloor) {
                        after.view.absences_from = after.view.absences_from.max(floor);
                    }
                }
                for nonce in &listed {
                    self.raise(&mut after.view, state.version(*nonce));
                }
            }
            Step::PollMovesOn => after.view.move_on(answer, &listed),
            _ => after.view.lease = after.view.lease.max(lease_from + 1),
        }
        next(Next::State(step, after));
    }

    fn raise(&self, view: &mut View, version: &Version) {
        let Version { number, named, .. } = *version;
        if let Some(id) = named.key {
            view.keys[usize::from(id)] = view.keys[usize::from(id)].max(number);
        }
        if named.trust && self.keeps(Rule::TrustsAreNamed) {
            view.trust = view.trust.max(number);
        }
        if named.absence {
            view.absence = view.absence.max(number);
        }
        if named.every_absence && self.keeps(Rule::AbsencesHaveAFloor) {
            view.absences_from = view.absences_from.max(number);
        }
    }

    fn load(&self, state: &State, next: &mut impl FnMut(Next)) {
        let mut go = |step, load| next(Next::State(step, State { load, ..*state }));
        let newest = |content| Value { content, as_of: state.database.newest(), lineage: state.database.lineage };
        let in_database = state.version(state.database.newest()).content;
        match state.load {
            // For somebody else's check, or that of ours.
            Load::None => {
                let own = state.check != Check::None;
                for (nonce, version) in (0..).zip(state.versions.iter().flatten()) {
                    let lineages = (0..=state.database.lineage).filter(|lineage| version.lineages >> lineage & 1 == 1);
                    // Absences never go to Redis.
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
                let entered = self.keep(&mut after, value);
                if entered && Self::covers(state, &state.view, value) {
                    after.load = Load::None;
                    self.land(after, (true, false), value, true, next);
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
                if !self.keeps(Rule::DatedByItsRead) && state.view.begun {
                    (value.as_of, value.lineage) = (state.view.applied, state.view.lineage);
                }
                let mut after = *state;
                let entered = self.keep(&mut after, value);
                let is_ahead = self.place(state, &state.view, value) == Place::Ahead;
                after.load = if is_ahead { Load::Settling { value } } else { Load::None };
                self.land(after, (tiers, own), value, entered, next);
            }
            Load::Settling { value } => {
                go(Step::LoadIsGivenUp, Load::None);
                let mut after = State { load: Load::None, ..*state };
                if state.view.is_fresh(state.now) && self.keep(&mut after, value) {
                    next(Next::State(Step::LoadIsKeptLater, after));
                }
            }
        }
    }

    /// Puts a value into L1 if its version is known; says whether it did.
    fn keep(&self, state: &mut State, value: Value) -> bool {
        let is_known = self.place(state, &state.view, value) == Place::Known;
        if is_known {
            state.l1 = Some((value, state.view.epoch));
        }
        is_known
    }

    /// Tells the check that waits for such a load.
    fn land(
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
                state.check = Check::Landed { question, value, entered, own };
                // At once: all that a pause could bring makes it refuse what it would use.
                self.check(&state, next);
            }
            _ => next(Next::State(Step::LoadLands, state)),
        }
    }

    fn check(&self, state: &State, next: &mut impl FnMut(Next)) {
        let mut go = |step, check| next(Next::State(step, State { check, ..*state }));
        match state.check {
            Check::None => {
                for live in [false, true] {
                    // Earlier ones are answered with what was so at some moment since the start: that is never wrong.
                    let first = if live { 1 } else { LEASE + 1 };
                    if live && !self.bounds.live || state.now < first {
                        continue;
                    }
                    let fresh = !live && state.view.is_fresh(state.now);
                    let question = Question { at: state.now, epoch: state.view.epoch, fresh, live, attempt: 0 };
                    let mut after = State { check: Check::Begun(question), ..*state };
                    // What is in the air was sent before.
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
                    return go(Step::CheckLooks, Check::Looked(question, in_l1.map(|(value, _)| value.content)));
                }
                match in_l1 {
                    Some((value, _)) if question.fresh => next(state.decide(question, value.content)),
                    _ => go(Step::CheckLooks, Check::Waits(question)),
                }
            }
            Check::Looked(question, found) => {
                let fresh = state.view.epoch == question.epoch && state.view.is_fresh(question.at);
                match found {
                    Some(content) if fresh => next(state.decide(question, content)),
                    _ => go(Step::CheckLooksAtTheLease, Check::Waits(Question { fresh, ..question })),
                }
            }
            Check::Waits(_) => {} // until a load lands
            Check::Landed { question, value, entered, own } => {
                let view = state.view_of(question.epoch);
                let place = if entered == Some(question.epoch) { Place::Known } else { self.place(state, view, value) };
                let is_covered = Self::covers(state, view, value);
                let own = own
                    || !self.keeps(Rule::OwnReadWithoutLease) && !question.fresh && !question.live
                    || !self.keeps(Rule::OwnReadWhenLive) && question.live;
                let may_be_used = match (question.fresh, place) {
                    (true, Place::Known) => is_covered,
                    (false, Place::Known) => own && is_covered,
                    (_, Place::Ahead | Place::Foreign) => own,
                };
                if may_be_used || question.fresh && !self.keeps(Rule::LoadsAreJudged) {
                    return next(state.decide(question, value.content));
                }
                if question.fresh && place == Place::Ahead {
                    go(Step::CheckWaitsForAPoll, state.check);
                }
                if question.attempt + 1 < ATTEMPTS {
                    let again = Question { attempt: question.attempt + 1, ..question };
                    go(Step::CheckRefuses, Check::Waits(again));
                }
            }
        }
    }

    fn place(&self, state: &State, view: &View, value: Value) -> Place {
        if !view.begun || value.lineage != view.lineage {
            return Place::Foreign;
        }
        let number = |nonce| state.version(nonce).number;
        if number(value.as_of) > number(view.applied) {
            return Place::Ahead;
        }
        let is_known = view.known >> value.as_of & 1 == 1 || !self.keeps(Rule::NonceOfValue);
        if is_known { Place::Known } else { Place::Foreign }
    }

    fn covers(state: &State, view: &View, value: Value) -> bool {
        let as_of = state.version(value.as_of).number;
        match value.content.key {
            Some(Key { id, .. }) => {
                as_of >= view.records_from && as_of >= view.keys[usize::from(id)] && as_of >= view.trust
            }
            None => as_of >= view.absences_from && as_of >= view.absence,
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

    fn move_on(&mut self, answer: Branch, listed: &[u8]) {
        (self.begun, self.lineage, self.applied) = (true, answer.lineage, answer.newest());
        for nonce in listed.iter().chain([&answer.newest()]) {
            self.known |= 1 << nonce;
        }
    }
}

impl State {
    fn version(&self, nonce: u8) -> &Version {
        // Nonces are places of versions that were committed.
        self.versions[usize::from(nonce)].as_ref().unwrap()
    }

    fn view_of(&self, epoch: u8) -> &View {
        if self.view.epoch == epoch { &self.view } else { &self.former }
    }

    /// Forgets a former view that no check began in.
    fn forget(&mut self) {
        let of_former = match self.check {
            Check::None => false,
            Check::Begun(question)
            | Check::Looked(question, _)
            | Check::Waits(question)
            | Check::Landed { question, .. } => question.epoch != self.view.epoch,
        };
        if !of_former {
            self.former = View::default();
        }
    }

    /// Notes whether the key is good now.
    fn note(&mut self) {
        let is_good = self.version(self.database.newest()).content.is_good();
        *(if is_good { &mut self.good } else { &mut self.bad }) |= 1 << self.now;
    }

    fn changed(&self, change: Change) -> Option<(Content, Named)> {
        let content = self.version(self.database.newest()).content;
        let Content { key, trust_enabled } = content;
        let of_key = |id| Named { key: Some(id), ..Named::default() };
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
                (Content { key, ..content }, Named { absence: !whole, every_absence: whole, ..Named::default() })
            }
            (Change::DisableTrust, _) if trust_enabled => {
                (Content { trust_enabled: false, ..content }, Named { trust: true, ..Named::default() })
            }
            (Change::EnableTrust, _) if !trust_enabled => {
                (Content { trust_enabled: true, ..content }, Named { trust: true, ..Named::default() })
            }
            (Change::Other, _) => (content, Named::default()),
            _ => return None,
        })
    }

    fn commit(&mut self, content: Content, named: Named) {
        let number = self.version(self.database.newest()).number + 1;
        let nonce = self.versions.iter().flatten().count();
        let lineages = 1 << self.database.lineage;
        self.versions[nonce] = Some(Version { number, named, content, lineages });
        self.database.nonces[usize::from(self.database.len)] = u8::try_from(nonce).unwrap();
        self.database.len += 1;
    }

    fn fail_over(&mut self, keeps: u8, new_lineage: bool) {
        self.failovers += 1;
        self.database.truncate(keeps);
        if new_lineage {
            self.database.lineage += 1;
            for place in 0..usize::from(keeps) {
                let nonce = usize::from(self.database.nonces[place]);
                if let Some(version) = &mut self.versions[nonce] {
                    version.lineages |= 1 << self.database.lineage;
                }
            }
        }
    }

    /// The check is answered. What it says must have been so at some moment from a lease before it began until now; for a
    /// check that wants the live row, since it began.
    fn decide(&self, question: Question, content: Content) -> Next {
        let earliest = if question.live { question.at } else { question.at.saturating_sub(LEASE) };
        let (grants, until_now) = (content.is_good(), (2_u8 << self.now).wrapping_sub(1));
        let allowed = until_now & !((1_u8 << earliest) - 1);
        let was_so = if grants { self.good } else { self.bad };
        let outcome = if was_so & allowed == 0 { Err(Wrong) } else { Ok(()) };
        Next::Decided(Step::CheckDecides { grants }, outcome)
    }
}
