//! The simulated database with its change log: the true state of each key, and the answers to the reads and polls of a
//! replica.
//!
//! The database can fail over, lose committed versions and prune old versions, and its triggers can be dropped. Each
//! answer shows one state that the database had at some moment.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use trustgate::testing::{
    base::clock::{DatabaseTime, Moment},
    record::{
        ApiKeyDigest, Change, ChangeKind, Digests, KeyId, Lineage, Nonce, Record, StoredPeppers, TrustId, Version,
        Versioned,
    },
    store::Polled,
};
use uuid::Uuid;

use crate::chance::Chance;

/// The number of keys that the checks use. A key need not have a row.
pub const KEYS: usize = 6;
/// The number of trusts; key `k` belongs to trust `k % TRUSTS`.
pub const TRUSTS: usize = 2;
/// The maximum number of rows that a poll returns, versions and changes together.
const POLL_ROWS_MAX: usize = 16;
/// The maximum number of changes of one kind in a version that have separate entries in the change log. If there are
/// more, the change log has one entry for the whole kind.
const ENTRIES_MAX: usize = 4;

const KINDS: [ChangeKind; 4] = [ChangeKind::Keys, ChangeKind::Trusts, ChangeKind::Absences, ChangeKind::Gone];

/// Returns true if `change` concerns a single object of this kind.
const fn is_of(change: &Change, kind: ChangeKind) -> bool {
    matches!(
        (change, kind),
        (Change::Key(_), ChangeKind::Keys)
            | (Change::Trust(_), ChangeKind::Trusts)
            | (Change::Absent(_), ChangeKind::Absences)
            | (Change::Gone(_), ChangeKind::Gone)
    )
}

pub fn key(number: usize) -> String {
    format!("simulated-key-number-{number}")
}

/// A change to commit.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    Revoke(usize),
    Restore(usize),
    Delete(usize),
    Issue(usize),
    /// Changes the digest in the first key's row to the digest of the second key, which has no row.
    Rename(usize, usize),
    SetTrust(usize, bool),
    Truncate,
    /// Issues all keys in one version.
    IssueAll,
    /// Marks everything as changed, like the command `cache clear`.
    Everything,
    /// A change to an object that no check uses.
    Other,
}

/// The content of the tables.
#[derive(Clone, Default)]
struct Tables {
    keys: [Option<Row>; KEYS],
    disabled: [bool; TRUSTS],
}

#[derive(Clone, Copy)]
struct Row {
    id: KeyId,
    trust: usize,
    revoked: Option<DatabaseTime>,
}

/// A committed version.
struct Stamp {
    version: Version,
    nonce: Nonce,
    at: DatabaseTime,
    committed: Instant,
    changes: Vec<Change>,
    after: Tables,
}

pub struct Database {
    digests: [ApiKeyDigest; KEYS],
    began: Instant,
    chance: Chance,
    state: Mutex<State>,
    commits: Notify,
}

struct State {
    lineage: Lineage,
    /// All versions that no failover has lost, oldest first. There is always at least one.
    stamps: VecDeque<Stamp>,
    /// The oldest version that was not pruned. Polls do not list earlier versions.
    oldest: Version,
    tables: Tables,
    /// True if the triggers record changes.
    triggers_intact: bool,
    /// For each key, the moments at which the key became good and bad, alternately. Every key is bad at the start. A
    /// key is good if it has a row that is not revoked and belongs to an enabled trust.
    truth: [Vec<Instant>; KEYS],
    /// For each key, true if the triggers have ever recorded that the key was revoked, deleted or renamed.
    gone: [bool; KEYS],
    /// For each key, true if a failover has lost a version that revoked, deleted or renamed the key.
    forgotten: [bool; KEYS],
    /// The time of the last failover, if there was one.
    failed_over: Option<Instant>,
    /// True if any poll omitted changes, or replaced the changes of negative entries with one entry for all of them.
    withheld: bool,
}

impl Database {
    pub fn new(chance: &Chance, digest: impl Fn(&str) -> ApiKeyDigest) -> Self {
        let began = Instant::now();
        let lineage = Lineage { incarnation: Uuid::from_bytes(chance.bytes()), system: 1, timeline: 1 };
        let first = Stamp {
            version: Version(1),
            nonce: Nonce(chance.bytes()),
            at: DatabaseTime::from_micros(0),
            committed: began,
            changes: vec![Change::Everything],
            after: Tables::default(),
        };
        let state = State {
            lineage,
            stamps: [first].into(),
            oldest: Version(1),
            tables: Tables::default(),
            triggers_intact: true,
            truth: Default::default(),
            gone: [false; KEYS],
            forgotten: [false; KEYS],
            failed_over: None,
            withheld: false,
        };
        Self {
            digests: std::array::from_fn(|number| digest(&key(number))),
            began,
            chance: chance.fork(),
            state: Mutex::new(state),
            commits: Notify::new(),
        }
    }

    /// Returns the time on the database's clock.
    pub fn time(&self) -> DatabaseTime {
        let micros = u64::try_from(self.began.elapsed().as_micros()).expect("a short run");
        DatabaseTime::from_micros(micros.cast_signed())
    }

    /// Waits for the next commit.
    pub async fn committed(&self) {
        self.commits.notified().await;
    }

    // === commits ===

    /// Commits `event` if it changes anything. If `recorded` is false, the triggers have been dropped and do not record
    /// the change.
    pub fn commit(&self, event: Event, recorded: bool) {
        let mut state = self.lock();
        let Some(changes) = self.apply(&mut state.tables, event) else { return };
        if recorded {
            self.stamp(&mut state, changes);
        } else {
            state.triggers_intact = false;
        }
        self.note_truth(&mut state);
    }

    /// Replaces the database server with one that lacks the last `lost` versions. If `copied` is true, the new server
    /// is a copy that keeps the lineage of the old server, so only the versions and their nonces reveal the loss.
    pub fn fail_over(&self, lost: usize, copied: bool) {
        let mut state = self.lock();
        for _ in 0..lost.min(state.stamps.len() - 1) {
            let stamp = state.stamps.pop_back().expect("counted");
            for change in stamp.changes {
                if let Change::Gone(digest) = change {
                    state.forgotten[self.number(&digest)] = true;
                }
            }
        }
        state.failed_over = Some(Instant::now());
        // Restore the state after the newest remaining version. The failover thereby also loses later changes that the
        // triggers did not record.
        state.tables = state.stamps.back().expect("at least one version").after.clone();
        state.oldest = state.oldest.min(state.stamps.back().expect("at least one version").version);
        if !copied {
            state.lineage.timeline += 1;
        }
        self.note_truth(&mut state);
    }

    /// Prunes all but the last few versions.
    pub fn prune(&self) {
        let mut state = self.lock();
        let kept = self.chance.number(1..4).min(state.stamps.len());
        state.oldest = state.oldest.max(state.stamps[state.stamps.len() - kept].version);
    }

    fn apply(&self, tables: &mut Tables, event: Event) -> Option<Vec<Change>> {
        let absent = |number: usize| Change::Absent(self.digests[number]);
        let gone = |number: usize| Change::Gone(self.digests[number]);
        Some(match event {
            Event::Revoke(number) => {
                let row = tables.keys[number].as_mut().filter(|row| row.revoked.is_none())?;
                row.revoked = Some(self.time());
                vec![Change::Key(row.id), absent(number), gone(number)]
            }
            Event::Restore(number) => {
                let row = tables.keys[number].as_mut().filter(|row| row.revoked.is_some())?;
                row.revoked = None;
                vec![Change::Key(row.id), absent(number)]
            }
            Event::Delete(number) => {
                let row = tables.keys[number].take()?;
                vec![Change::Key(row.id), gone(number)]
            }
            Event::Issue(number) => {
                self.issue(tables, number).then_some(())?;
                vec![absent(number)]
            }
            Event::Rename(from, to) => {
                if from == to || tables.keys[to].is_some() {
                    return None;
                }
                let row = tables.keys[from].take()?;
                tables.keys[to] = Some(row);
                vec![Change::Key(row.id), absent(to), gone(from)]
            }
            Event::SetTrust(trust, enabled) => {
                if tables.disabled[trust] != enabled {
                    return None;
                }
                tables.disabled[trust] = !enabled;
                vec![Change::Trust(trust_id(trust))]
            }
            Event::Truncate => {
                tables.keys = [None; KEYS];
                vec![Change::Whole(ChangeKind::Keys), Change::Whole(ChangeKind::Trusts)]
            }
            Event::IssueAll => {
                let issued = (0..KEYS).filter(|number| self.issue(tables, *number)).count();
                match issued {
                    0 => return None,
                    1..=ENTRIES_MAX => (0..KEYS).map(absent).collect(),
                    _ => vec![Change::Whole(ChangeKind::Absences)],
                }
            }
            Event::Everything => vec![Change::Everything],
            Event::Other => vec![Change::Key(KeyId(Uuid::from_bytes(self.chance.bytes())))],
        })
    }

    fn issue(&self, tables: &mut Tables, number: usize) -> bool {
        let is_new = tables.keys[number].is_none();
        if is_new {
            let id = KeyId(Uuid::from_bytes(self.chance.bytes()));
            tables.keys[number] = Some(Row { id, trust: number % TRUSTS, revoked: None });
        }
        is_new
    }

    fn stamp(&self, state: &mut State, changes: Vec<Change>) {
        for change in &changes {
            if let Change::Gone(digest) = change {
                state.gone[self.number(digest)] = true;
            }
        }
        let version = Version(state.stamps.back().expect("at least one version").version.0 + 1);
        let (nonce, at, after) = (Nonce(self.chance.bytes()), self.time(), state.tables.clone());
        state.stamps.push_back(Stamp { version, nonce, at, committed: Instant::now(), changes, after });
        self.commits.notify_waiters();
    }

    // === the true state of the keys ===

    fn note_truth(&self, state: &mut State) {
        for number in 0..KEYS {
            let row = state.tables.keys[number];
            let good = row.is_some_and(|row| row.revoked.is_none() && !state.tables.disabled[row.trust]);
            let was_good = state.truth[number].len() % 2 == 1;
            if good != was_good {
                state.truth[number].push(Instant::now());
            }
        }
    }

    /// Returns true if key `number` was good (or bad, if `good` is false) at some moment between `from` and `to`.
    pub fn was(&self, number: usize, good: bool, from: Instant, to: Instant) -> bool {
        let state = self.lock();
        let turns = &state.truth[number];
        // The key was bad before turn 0 and good after it, and every later turn changes this again. Check the state at
        // `from` and at each turn until `to`.
        let before = turns.iter().take_while(|turn| **turn <= from).count();
        let until = turns.iter().take_while(|turn| **turn <= to).count();
        let is_turn_at_from = turns.iter().any(|turn| *turn == from);
        (before % 2 == 1) == good || until > before || is_turn_at_from
    }

    /// Returns true if a replica may deny key `number` even while the key is good. This is the case if the replica may
    /// have applied a revocation that a failover then lost. It is also the case if the replica may have applied a
    /// revocation and cannot know that the key is good again: either it is disconnected (`is_cut`), or a poll after a
    /// failover did not list every change.
    pub fn is_remembered(&self, number: usize, is_cut: bool) -> bool {
        let state = self.lock();
        state.forgotten[number] || (state.gone[number] && (is_cut || (state.failed_over.is_some() && state.withheld)))
    }

    /// Returns when `version` was committed, or `None` if there was a failover within the last `period`.
    pub fn committed_at(&self, version: Version, period: Duration) -> Option<Instant> {
        let state = self.lock();
        if state.failed_over.is_some_and(|at| at.elapsed() < period) {
            return None;
        }
        state.stamps.iter().find(|stamp| stamp.version == version).map(|stamp| stamp.committed)
    }

    /// Returns the times at which key `number` changed between good and bad, relative to the start of the run.
    pub fn turns(&self, number: usize) -> Vec<Duration> {
        self.lock().truth[number].iter().map(|turn| *turn - self.began).collect()
    }

    // === answers to a replica ===

    /// Finds the key with one of `digests`.
    pub fn find(&self, digests: &Digests, read_at: DatabaseTime, sent_at: Moment) -> Versioned<Option<Record>> {
        let state = self.lock();
        let found = (0..KEYS).find(|number| digests.contains(&self.digests[*number]));
        let record = found.and_then(|number| self.record(&state, number));
        state.versioned(record, read_at, sent_at)
    }

    /// Finds the key with this id.
    pub fn find_by_id(&self, id: KeyId, read_at: DatabaseTime, sent_at: Moment) -> Versioned<Option<Record>> {
        let state = self.lock();
        let found = (0..KEYS).find(|number| state.tables.keys[*number].is_some_and(|row| row.id == id));
        let record = found.and_then(|number| self.record(&state, number));
        state.versioned(record, read_at, sent_at)
    }

    /// Returns the answer to a poll that asks for `since` and all later versions.
    pub fn poll(&self, since: Option<Version>, read_at: DatabaseTime, sent_at: Moment) -> Polled {
        let mut state = self.lock();
        let shown = state.stamps.iter().filter(|stamp| stamp.version >= state.oldest);
        let first = since.unwrap_or(state.oldest);
        let versions = shown.clone().filter(|stamp| stamp.version >= first).map(|stamp| (stamp.version, stamp.nonce));
        let mut versions: Vec<_> = versions.collect();
        let new = shown.clone().filter(|stamp| since.is_none_or(|since| stamp.version > since));
        let changes = new.flat_map(|stamp| stamp.changes.iter().map(|change| (stamp.version, change.clone())));
        let mut changes: Vec<_> = changes.collect();
        versions.truncate(POLL_ROWS_MAX + 1);
        let newest = state.stamps.back().expect("at least one version").version;
        let mut counts: Vec<_> =
            KINDS.into_iter().map(|kind| (changes.iter().filter(|c| is_of(&c.1, kind)).count(), kind)).collect();
        counts.sort_by_key(|(count, _)| *count);
        let mut room = POLL_ROWS_MAX.saturating_sub(versions.len() + KINDS.len());
        for (count, kind) in counts {
            if count <= room {
                room -= count;
            } else {
                // There is no room for these changes, so list a single change to the whole kind instead.
                changes.retain(|(_, change)| !is_of(change, kind));
                changes.push((newest, Change::Whole(kind)));
            }
        }
        let complete = versions.len() + changes.len() <= POLL_ROWS_MAX;
        versions.truncate(POLL_ROWS_MAX);
        changes.truncate(POLL_ROWS_MAX - versions.len());
        state.withheld |= !complete || changes.iter().any(|(_, change)| *change == Change::Whole(ChangeKind::Absences));
        let newest = state.stamps.back().expect("at least one version");
        Polled {
            newest: state.versioned((), read_at, sent_at),
            stamped_at: newest.at,
            oldest: state.oldest,
            triggers_intact: state.triggers_intact,
            versions,
            changes,
            complete,
            peppers: StoredPeppers::default(),
        }
    }

    /// Restores the triggers if they were dropped, and commits a version that marks everything as changed.
    pub fn restore_watch(&self) {
        let mut state = self.lock();
        if !state.triggers_intact {
            state.triggers_intact = true;
            self.stamp(&mut state, vec![Change::Everything]);
        }
    }

    /// Commits a new incarnation if the current one is `lost`.
    pub fn renew_incarnation(&self, lost: Uuid) {
        let mut state = self.lock();
        if state.lineage.incarnation == lost {
            state.lineage.incarnation = Uuid::from_bytes(self.chance.bytes());
            self.stamp(&mut state, vec![Change::Everything]);
        }
    }

    fn record(&self, state: &State, number: usize) -> Option<Record> {
        state.tables.keys[number].map(|row| Record {
            key_id: row.id,
            trust_id: trust_id(row.trust),
            trust_enabled: !state.tables.disabled[row.trust],
            digest: self.digests[number],
            scopes: [].into(),
            allowed_cidrs: [].into(),
            not_before: None,
            expires_at: None,
            revoked_at: row.revoked,
        })
    }

    fn number(&self, digest: &ApiKeyDigest) -> usize {
        self.digests.iter().position(|known| known == digest).expect("the digest of one of the keys")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn versioned<T>(&self, value: T, read_at: DatabaseTime, sent_at: Moment) -> Versioned<T> {
        let newest = self.stamps.back().expect("at least one version");
        Versioned { value, as_of: newest.version, nonce: newest.nonce, lineage: self.lineage, read_at, sent_at }
    }
}

fn trust_id(trust: usize) -> TrustId {
    TrustId(Uuid::from_u128(0x7000 + trust as u128))
}
