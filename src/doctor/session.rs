//! One connection to the database for `doctor`, and the questions that both kinds of database are asked.
//!
//! Asks what `serve` asks, and changes nothing. Every wait has an end.

use std::{future::Future, time::Duration};

use tokio::time::timeout;

use super::diagnosis::{Diagnosis, State, Times, complete, milliseconds};
use crate::{
    base::clock::{Clock, DatabaseTime, Moment, wall_time},
    record::{ApiKeyDigest, Digests, Fingerprint, StoredPeppers, Version, bytes_from_hex},
    store::{
        Polled, StoreSettings,
        reads::reader::{Dialect, newest_tables},
        rows::{self, RowExt as _},
        schema,
        url::Env,
    },
};

/// The examinations of the database, in order.
pub const NAMES: &[&str] =
    &[ADDRESS, CONNECTION, SERVER, TABLES, RIGHTS, MANAGEMENT, WATCH, POLLS, PEPPER, READS, CLOCK, HINTS];

pub(crate) const ADDRESS: &str = "database_address";
pub(crate) const CONNECTION: &str = "database_connection";
pub(crate) const SERVER: &str = "database_server";
pub(crate) const TABLES: &str = "database_tables";
pub(crate) const RIGHTS: &str = "database_rights";
pub(crate) const MANAGEMENT: &str = "management_rights";
pub(crate) const WATCH: &str = "database_watch";
pub(crate) const POLLS: &str = "database_polls";
pub(crate) const PEPPER: &str = "database_pepper";
pub(crate) const READS: &str = "database_reads";
pub(crate) const CLOCK: &str = "database_clock";
pub(crate) const HINTS: &str = "database_hints";

/// All triggers are right, and nobody has made sure of that since the last alteration.
pub(crate) const ALTERED: &str = "every change is named: all triggers are as they were made. Tables, triggers or rights were \
    altered since a replica made sure of that: the next poll of one does";

/// The settings that hold the URL of `serve`.
pub(crate) const URL: &[&str] = &["store.url", "store.url_file"];
/// How often what is measured is done.
const ROUNDS: i64 = 20;
/// Measuring ends after so long: whatever is that slow is known by then.
const PATIENCE: Duration = Duration::from_secs(5);
/// A clock that is further off misleads whoever compares logs.
const OFFSET_MAX: Duration = Duration::from_secs(1);

/// What other sections say about the use of the database.
#[derive(Clone, Copy, Debug)]
pub struct Use<'a> {
    /// The fingerprints of the peppers, the current one first; `None`: they cannot be read.
    pub peppers: Option<&'a [Fingerprint]>,
    /// `freshness.poll_timeout`.
    pub poll_timeout: Duration,
    /// `freshness.hints`.
    pub hints: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct Examined {
    /// One for each of [`NAMES`].
    pub diagnoses: Vec<Diagnosis>,
    /// Whether the key of the Redis MAC can be had from the database; else why not.
    pub redis_mac_key: Result<(), String>,
}

/// What an examination goes by.
#[derive(Clone, Copy)]
pub(crate) struct Examination<'a> {
    pub(crate) settings: &'a StoreSettings,
    pub(crate) usage: Use<'a>,
    pub(crate) env: Env<'a>,
    pub(crate) clock: &'a dyn Clock,
}

/// What was found so far.
#[derive(Default)]
pub(crate) struct Report {
    diagnoses: Vec<Diagnosis>,
    redis_mac_key: Option<Result<(), String>>,
}

impl Report {
    pub(crate) fn add(&mut self, diagnosis: Diagnosis) {
        self.diagnoses.push(diagnosis);
    }

    /// What was not examined, could not be because of the first that failed.
    pub(crate) fn examined(self) -> Examined {
        let Self { diagnoses, redis_mac_key } = self;
        let is = |state| move |diagnosis: &&Diagnosis| diagnosis.state == state;
        let failed = diagnoses.iter().find(is(State::Failed));
        let because =
            failed.or_else(|| diagnoses.iter().rfind(is(State::Warning))).map_or_else(String::new, because_of);
        Examined {
            diagnoses: complete(NAMES, diagnoses, &because),
            redis_mac_key: redis_mac_key.unwrap_or(Err(because)),
        }
    }
}

/// That something could not be examined because of what was found before.
fn because_of(diagnosis: &Diagnosis) -> String {
    format!("because of {}", diagnosis.name)
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The database, or the way to it, says.
    #[error("{}", words(.0))]
    Sql(#[from] sqlx::Error),
    /// It says nothing.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// An answer to an earlier question may still come.
    #[error("the connection was given up when an answer did not come in time")]
    Gone,
}

/// What an error says, without the words before it that everybody knows.
fn words(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

/// A connection to be asked one thing after another.
pub(crate) struct Session<'a, D: Dialect> {
    pub(crate) dialect: &'a D,
    connection: Option<D::Connection>,
    examination: Examination<'a>,
    /// How long connecting took.
    pub(crate) connected_after: Duration,
}

impl<'a, D: Dialect> Session<'a, D> {
    pub(crate) async fn open(dialect: &'a D, examination: Examination<'a>) -> Result<Self, Trouble> {
        let began = examination.clock.now();
        let connection = within(examination.settings.connect_timeout, dialect.connect()).await?;
        let connected_after = examination.clock.now().since(began);
        Ok(Self { dialect, connection: Some(connection), examination, connected_after })
    }

    pub(crate) async fn ask(&mut self, query: &D::Query) -> Result<Vec<D::Row>, Trouble> {
        let connection = self.connection.as_mut().ok_or(Trouble::Gone)?;
        // Longer than `serve` waits, so that what is too slow can be told from what never answers.
        let answer = within(self.examination.settings.connect_timeout, self.dialect.run(connection, query)).await;
        if matches!(answer, Err(Trouble::Late(_))) {
            self.connection = None;
        }
        answer
    }

    pub(crate) async fn close(self) {
        if let Some(connection) = self.connection {
            // It is gone either way.
            let _ = timeout(GOODBYE, D::close(connection)).await;
        }
    }

    /// What any database is asked about our tables, or about somebody else's.
    pub(crate) async fn diagnose(&mut self, kind: Kind, report: &mut Report) -> Tables {
        if let Some(ours) = self.dialect.ours() {
            let tables = match self.ask(&ours.schema).await {
                Ok(rows) => newest_tables(&rows).map_err(Trouble::from),
                Err(Trouble::Sql(error)) if D::is_missing(&error) => Ok(None),
                Err(trouble) => Err(trouble),
            };
            let closed = tables.is_err();
            let diagnosis = self.tables(kind, tables);
            let fits = diagnosis.state == State::Ok;
            report.add(diagnosis);
            if closed {
                return Tables::Closed;
            }
            if !fits {
                return Tables::Unfit;
            }
        }
        report.redis_mac_key = Some(self.redis_mac_key().await);
        let triggers_intact = self.polls(kind, report).await;
        let reads = self.reads().await;
        report.add(reads);
        Tables::Fit { triggers_intact }
    }

    /// Whether our tables are there and of a fitting version.
    fn tables(&self, kind: Kind, found: Result<Option<schema::Tables>, Trouble>) -> Diagnosis {
        let place = self.dialect.backend();
        let found = match found {
            Ok(found) => found,
            Err(trouble) => {
                let remedy = "let the role of `serve` read them, see database_rights";
                return Diagnosis::failed(TABLES, format!("{place}: {trouble}"), remedy).about(URL);
            }
        };
        let version = found.map_or(0, |tables| tables.version);
        match (schema::check(found, &place), kind) {
            (Ok(()), _) => Diagnosis::ok(TABLES, format!("version {version}; this release makes {}", schema::VERSION)),
            (Err(problem), Kind::Embedded) if version < schema::VERSION => {
                Diagnosis::warning(TABLES, problem.to_string(), "nothing: `serve` does that when it starts")
            }
            (Err(problem), _) => {
                let newer = version > schema::VERSION;
                let remedy = if newer { "start a newer trustgate" } else { "run `trustgate migrate`" };
                Diagnosis::failed(TABLES, problem.to_string(), remedy).about(URL)
            }
        }
    }

    async fn redis_mac_key(&mut self) -> Result<(), String> {
        let ours = self.dialect.ours().ok_or("these tables hold none")?;
        let rows = self.ask(&ours.redis_mac_key).await.map_err(|trouble| trouble.to_string())?;
        let key = rows.first().and_then(|row| bytes_from_hex::<32>(&row.text(0).ok()?));
        key.map(drop).ok_or_else(|| "the setting redis_mac_key is missing or not 32 bytes".to_owned())
    }

    /// Polls as a replica does, first as one that begins.
    async fn polls(&mut self, kind: Kind, report: &mut Report) -> Option<bool> {
        const SETTING: &[&str] = &["freshness.poll_timeout"];
        let limit = self.examination.usage.poll_timeout;
        let mut samples = Vec::new();
        let mut last = None;
        let began = self.examination.clock.now();
        for echo in 0..=ROUNDS {
            if echo > 1 && self.examination.clock.now().since(began) > PATIENCE {
                break;
            }
            let since = last.as_ref().map(|polled: &Polled| polled.newest.as_of);
            match self.poll(since, echo).await {
                Ok((polled, sample)) => {
                    last = Some(polled);
                    samples.push(sample);
                }
                Err(problem) => {
                    let remedy = "`serve` confirms nothing while this is so: see the findings above this one";
                    report.add(Diagnosis::failed(POLLS, problem, remedy).about(SETTING));
                    return last.map(|polled| polled.triggers_intact);
                }
            }
        }
        // The first reads a quarter of an hour of history, once in the life of a replica.
        let times = Times::new(samples.iter().skip(1).map(Sample::took).collect());
        let remedy = "bring `serve` nearer to its database, find out what holds the database up, or raise \
                      freshness.poll_timeout (freshness.lease must hold twice as much)";
        report.add(judged(POLLS, &times, limit, remedy).about(SETTING));
        report.diagnoses.extend(last.as_ref().map(|polled| self.pepper(polled.peppers)));
        if matches!(kind, Kind::Server) {
            report.diagnoses.extend(samples.iter().min_by_key(|sample| sample.took()).map(|sample| self.clock(sample)));
        }
        last.map(|polled| polled.triggers_intact)
    }

    /// Whether `serve` would have the pepper of the keys.
    fn pepper(&self, stored: StoredPeppers) -> Diagnosis {
        const SETTINGS: &[&str] = &["credential.pepper_file", "credential.previous_pepper_files"];
        let Some(known) = self.examination.usage.peppers else {
            return Diagnosis::skipped(PEPPER, "because the configured peppers cannot be read");
        };
        let Some(recorded) = stored.current else {
            return Diagnosis::ok(PEPPER, "no pepper is recorded yet: the first issued or imported key records it");
        };
        if !stored.fit(known) {
            let configured: Vec<_> = known.iter().map(ToString::to_string).collect();
            let configured = if configured.is_empty() { "none".to_owned() } else { configured.join(", ") };
            let found = format!("the database records the pepper {recorded}, but this configuration has {configured}");
            let remedy = "set credential.pepper_file to that pepper: `serve` is not ready without it";
            return Diagnosis::failed(PEPPER, found, remedy).about(SETTINGS);
        }
        if known.first() == Some(&recorded) {
            return Diagnosis::ok(PEPPER, format!("keys are made under the current pepper ({recorded})"));
        }
        let found =
            format!("keys are made under the pepper {recorded}, which is not the current one of this configuration");
        let remedy = "once every server has the new pepper, run `trustgate pepper use` with it; until then no key can be issued \
                      with this configuration";
        Diagnosis::warning(PEPPER, found, remedy).about(SETTINGS)
    }

    async fn poll(&mut self, since: Option<Version>, echo: i64) -> Result<(Polled, Sample), String> {
        let query = self.dialect.poll(since, echo);
        let sent_at = self.examination.clock.now();
        let rows = self.ask(&query).await.map_err(|trouble| trouble.to_string())?;
        let answered_at = self.examination.clock.now();
        let polled = rows::polled(&rows, echo, sent_at).map_err(|problem| problem.to_string())?;
        let shown = polled.newest.read_at;
        Ok((polled, Sample { sent_at, answered_at, shown }))
    }

    /// Reads of keys that nobody has.
    async fn reads(&mut self) -> Diagnosis {
        const SETTING: &[&str] = &["store.read_timeout"];
        let mut times = Vec::new();
        let began = self.examination.clock.now();
        for round in 0..ROUNDS {
            if round > 0 && self.examination.clock.now().since(began) > PATIENCE {
                break;
            }
            let digest = match schema::random::<32>() {
                Ok(bytes) => ApiKeyDigest::from_bytes(bytes),
                Err(error) => return Diagnosis::failed(READS, error.to_string(), "start it where there is randomness"),
            };
            let query = self.dialect.find(&Digests { current: digest, older: Vec::new() });
            let sent_at = self.examination.clock.now();
            if let Err(trouble) = self.ask(&query).await {
                let remedy =
                    "no key that is not cached can be checked while this is so: see the findings above this one";
                return Diagnosis::failed(READS, trouble.to_string(), remedy).about(SETTING);
            }
            times.push(self.examination.clock.now().since(sent_at));
        }
        let remedy = "bring `serve` nearer to its database, find out what holds the database up, or raise \
                      store.read_timeout (and decision.deadline with it)";
        judged(READS, &Times::new(times), self.examination.settings.read_timeout, remedy).about(SETTING)
    }

    /// The database's clock beside ours, by the poll whose moment is known best.
    fn clock(&self, sample: &Sample) -> Diagnosis {
        let half = sample.took() / 2;
        let here = wall_time(self.examination.clock, sample.sent_at.after(half));
        let (ahead, behind) = (sample.shown.since(here), here.since(sample.shown));
        let (offset, word) = if ahead > behind { (ahead, "ahead of") } else { (behind, "behind") };
        let found = format!(
            "the database's clock is {} {word} this machine's, to {} more or less",
            milliseconds(offset),
            milliseconds(half)
        );
        if offset <= OFFSET_MAX + half {
            return Diagnosis::ok(CLOCK, found);
        }
        let remedy = "set both clocks by NTP: nothing is decided by this machine's, but its log does not fit to the \
                      database's times (audit, expiry)";
        Diagnosis::warning(CLOCK, found, remedy)
    }
}

/// What is known of the tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tables {
    /// They can be read.
    Fit {
        /// Whether changes are named, if a poll says so.
        triggers_intact: Option<bool>,
    },
    /// They are missing, or of another version.
    Unfit,
    /// They cannot be read.
    Closed,
}

/// Kinds of databases.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// On this machine, by its clock; `serve` makes the tables and brings them up to date.
    Embedded,
    /// Anywhere, with a clock of its own; `migrate` makes the tables.
    Server,
}

/// When a poll was sent and answered, and what the database's clock showed meanwhile.
struct Sample {
    sent_at: Moment,
    answered_at: Moment,
    shown: DatabaseTime,
}

impl Sample {
    fn took(&self) -> Duration {
        self.answered_at.since(self.sent_at)
    }
}

/// What took these times, and fails where one took longer than `limit`.
fn judged(name: &'static str, times: &Times, limit: Duration, remedy: &str) -> Diagnosis {
    let found = times.beside(limit);
    if times.longest() >= limit {
        Diagnosis::failed(name, found, remedy)
    } else if times.longest() > limit / 4 {
        Diagnosis::warning(name, found, remedy)
    } else {
        Diagnosis::ok(name, found)
    }
}

pub(crate) async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Trouble> {
    timeout(limit, work).await.map_err(|_| Trouble::Late(limit))?.map_err(Trouble::Sql)
}

/// How long a connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_is_judged_by_its_longest() {
        let limit = Duration::from_millis(100);
        for (longest, state) in [(25, State::Ok), (26, State::Warning), (99, State::Warning), (100, State::Failed)] {
            let times = Times::new(vec![Duration::from_millis(1), Duration::from_millis(longest)]);
            assert_eq!(judged(POLLS, &times, limit, "").state, state, "{longest} ms");
        }
    }
}
