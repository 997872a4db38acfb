//! The database connection that `doctor` uses, and the examinations that SQLite and PostgreSQL share.
//!
//! The examinations send the queries that `serve` sends, and change nothing. Each wait has a timeout.

use std::{future::Future, time::Duration};

use tokio::time::timeout;

use super::diagnosis::{Diagnosis, DiagnosisState, Times, complete, milliseconds};
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
pub(crate) const NAMES: &[&str] =
    &[ADDRESS, CONNECTION, SERVER, TABLES, RIGHTS, MANAGEMENT, WATCH, POLLS, PEPPER, READS, CLOCK, NOTIFICATIONS];

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
pub(crate) const NOTIFICATIONS: &str = "database_notifications";

/// All triggers are intact, but no replica has verified them since tables, triggers or rights were altered.
pub(crate) const ALTERED: &str = "every change is recorded: each trigger has its original definition. Tables, triggers \
    or rights were altered after a replica last verified the triggers; a replica's next poll verifies them again";

/// The settings for the database URL that `serve` uses.
pub(crate) const URL: &[&str] = &["store.url", "store.url_file"];
/// The number of requests in a measurement.
const ROUNDS: i64 = 20;
/// After this time, a measurement sends no further request, because the result for such a slow database is clear.
const MEASUREMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum clock offset that causes no warning. A larger offset misleads operators who compare logs.
const OFFSET_MAX: Duration = Duration::from_secs(1);

/// The settings from other sections that concern the database.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use<'a> {
    /// The fingerprints of the peppers, the current one first; `None` if the peppers cannot be read.
    pub peppers: Option<&'a [Fingerprint]>,
    /// `freshness.poll_timeout`.
    pub poll_timeout: Duration,
    /// `freshness.notifications`.
    pub notifications: bool,
}

/// The results of the database examinations.
#[derive(Debug)]
pub(crate) struct Examined {
    /// One diagnosis for each name in [`NAMES`].
    pub diagnoses: Vec<Diagnosis>,
    /// `Ok` if the database has the MAC key for Redis values; otherwise the reason why the key is unavailable.
    pub redis_mac_key: Result<(), String>,
}

/// The inputs of the database examinations.
#[derive(Clone, Copy)]
pub(crate) struct Examination<'a> {
    pub(crate) settings: &'a StoreSettings,
    pub(crate) usage: Use<'a>,
    pub(crate) env: Env<'a>,
    pub(crate) clock: &'a dyn Clock,
}

/// The diagnoses so far.
#[derive(Default)]
pub(crate) struct Report {
    diagnoses: Vec<Diagnosis>,
    redis_mac_key: Option<Result<(), String>>,
}

impl Report {
    pub(crate) fn add(&mut self, diagnosis: Diagnosis) {
        self.diagnoses.push(diagnosis);
    }

    /// Completes the report. The first failure or, without a failure, the last warning is the reason why the missing
    /// examinations were skipped.
    pub(crate) fn examined(self) -> Examined {
        let Self { diagnoses, redis_mac_key } = self;
        let is = |state| move |diagnosis: &&Diagnosis| diagnosis.state == state;
        let failed = diagnoses.iter().find(is(DiagnosisState::Failed));
        let because =
            failed.or_else(|| diagnoses.iter().rfind(is(DiagnosisState::Warning))).map_or_else(String::new, because_of);
        Examined {
            diagnoses: complete(NAMES, diagnoses, &because),
            redis_mac_key: redis_mac_key.unwrap_or(Err(because)),
        }
    }
}

/// Formats the reason to skip an examination because of an earlier diagnosis.
fn because_of(diagnosis: &Diagnosis) -> String {
    format!("because of {}", diagnosis.name)
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The database or the connection reported an error.
    #[error("{}", message(.0))]
    Sql(#[from] sqlx::Error),
    /// The database did not answer within the timeout.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// The connection was closed, because the answer to an earlier query may still arrive.
    #[error("connection closed: an earlier query was not answered in time")]
    Gone,
}

/// Returns the message of an error, without the prefix that sqlx adds to database messages.
fn message(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

/// A connection that sends one query after another.
pub(crate) struct Session<'a, D: Dialect> {
    pub(crate) dialect: &'a D,
    connection: Option<D::Connection>,
    examination: Examination<'a>,
    /// The time that connecting took.
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
        // Wait longer than `serve` does, to distinguish a slow answer from a missing answer.
        let answer = within(self.examination.settings.connect_timeout, self.dialect.run(connection, query)).await;
        if matches!(answer, Err(Trouble::Late(_))) {
            self.connection = None;
        }
        answer
    }

    pub(crate) async fn close(self) {
        if let Some(connection) = self.connection {
            // Ignore errors: the connection is not used any more.
            let _ = timeout(CLOSE_TIMEOUT, D::close(connection)).await;
        }
    }

    /// Runs the table examinations that SQLite and PostgreSQL share, on our own tables or on the existing table.
    pub(crate) async fn diagnose(&mut self, kind: Kind, report: &mut Report) -> TablesState {
        if let Some(ours) = self.dialect.ours() {
            let tables = match self.ask(&ours.schema).await {
                Ok(rows) => newest_tables(&rows).map_err(Trouble::from),
                Err(Trouble::Sql(error)) if D::is_missing(&error) => Ok(None),
                Err(trouble) => Err(trouble),
            };
            let closed = tables.is_err();
            let diagnosis = self.tables(kind, tables);
            let fits = diagnosis.state == DiagnosisState::Ok;
            report.add(diagnosis);
            if closed {
                return TablesState::Closed;
            }
            if !fits {
                return TablesState::Unfit;
            }
        }
        report.redis_mac_key = Some(self.redis_mac_key().await);
        let triggers_intact = self.polls(kind, report).await;
        let reads = self.reads().await;
        report.add(reads);
        TablesState::Fit { triggers_intact }
    }

    /// Diagnoses whether our tables exist and have a compatible version.
    fn tables(&self, kind: Kind, found: Result<Option<schema::TableVersion>, Trouble>) -> Diagnosis {
        let place = self.dialect.backend();
        let found = match found {
            Ok(found) => found,
            Err(trouble) => {
                let remedy = "let the role that `serve` connects as read the tables; see database_rights";
                return Diagnosis::failed(TABLES, format!("{place}: {trouble}"), remedy).about(URL);
            }
        };
        let version = found.map_or(0, |tables| tables.version);
        match (schema::check(found, &place), kind) {
            (Ok(()), _) => {
                Diagnosis::ok(TABLES, format!("version {version}; this release creates version {}", schema::VERSION))
            }
            (Err(problem), Kind::Embedded) if version < schema::VERSION => {
                let remedy = "no action needed: `serve` creates or upgrades the tables when it starts";
                Diagnosis::warning(TABLES, problem.to_string(), remedy)
            }
            (Err(problem), _) => {
                let newer = version > schema::VERSION;
                let remedy = if newer { "start a newer trustgate" } else { "run `trustgate migrate`" };
                Diagnosis::failed(TABLES, problem.to_string(), remedy).about(URL)
            }
        }
    }

    async fn redis_mac_key(&mut self) -> Result<(), String> {
        let ours = self.dialect.ours().ok_or("these tables have no MAC key")?;
        let rows = self.ask(&ours.redis_mac_key).await.map_err(|trouble| trouble.to_string())?;
        let key = rows.first().and_then(|row| bytes_from_hex::<32>(&row.text(0).ok()?));
        key.map(drop).ok_or_else(|| "the setting redis_mac_key is missing or not 32 bytes".to_owned())
    }

    /// Polls as a replica does: the first poll like a replica that starts, the other polls like a replica that follows
    /// the change log. Returns `triggers_intact` from the last answered poll; `None` if no poll was answered.
    async fn polls(&mut self, kind: Kind, report: &mut Report) -> Option<bool> {
        const SETTING: &[&str] = &["freshness.poll_timeout"];
        let limit = self.examination.usage.poll_timeout;
        let mut samples = Vec::new();
        let mut last = None;
        let began = self.examination.clock.now();
        for echo in 0..=ROUNDS {
            if echo > 1 && self.examination.clock.now().since(began) > MEASUREMENT_TIMEOUT {
                break;
            }
            let since = last.as_ref().map(|polled: &Polled| polled.newest.as_of);
            match self.poll(since, echo).await {
                Ok((polled, sample)) => {
                    last = Some(polled);
                    samples.push(sample);
                }
                Err(problem) => {
                    let remedy = "`serve` is not ready until polls work: see the failed examinations above this one";
                    report.add(Diagnosis::failed(POLLS, problem, remedy).about(SETTING));
                    return last.map(|polled| polled.triggers_intact);
                }
            }
        }
        // Leave out the first poll, which reads the changes of the last 15 minutes: a replica does this only at
        // startup.
        let times = Times::new(samples.iter().skip(1).map(Sample::took).collect());
        let remedy = "run `serve` closer to its database, find out why the database is slow, or raise \
                      freshness.poll_timeout (and freshness.lease, which must be longer than twice that)";
        report.add(judged(POLLS, &times, limit, remedy).about(SETTING));
        report.diagnoses.extend(last.as_ref().map(|polled| self.pepper(polled.peppers)));
        if matches!(kind, Kind::Server) {
            report.diagnoses.extend(samples.iter().min_by_key(|sample| sample.took()).map(|sample| self.clock(sample)));
        }
        last.map(|polled| polled.triggers_intact)
    }

    /// Diagnoses whether `serve` has the pepper that the database records.
    fn pepper(&self, stored: StoredPeppers) -> Diagnosis {
        const SETTINGS: &[&str] = &["credential.pepper_file", "credential.previous_pepper_files"];
        let Some(known) = self.examination.usage.peppers else {
            return Diagnosis::skipped(PEPPER, "the configured peppers cannot be read");
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
            return Diagnosis::ok(PEPPER, format!("new keys are hashed with the current pepper ({recorded})"));
        }
        let found = format!("new keys are hashed with {recorded}, which is not this configuration's current pepper");
        let remedy = "once every server has the new pepper, run `trustgate pepper use` with it; until then no key can \
                      be issued with this configuration";
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

    /// Measures reads of random digests, which belong to no key.
    async fn reads(&mut self) -> Diagnosis {
        const SETTING: &[&str] = &["store.read_timeout"];
        let mut times = Vec::new();
        let began = self.examination.clock.now();
        for round in 0..ROUNDS {
            if round > 0 && self.examination.clock.now().since(began) > MEASUREMENT_TIMEOUT {
                break;
            }
            let digest = match schema::random::<32>() {
                Ok(bytes) => ApiKeyDigest::from_bytes(bytes),
                Err(error) => {
                    let remedy = "run `doctor` on a system with a source of random numbers";
                    return Diagnosis::failed(READS, error.to_string(), remedy);
                }
            };
            let query = self.dialect.find(&Digests { current: digest, older: Vec::new() });
            let sent_at = self.examination.clock.now();
            if let Err(trouble) = self.ask(&query).await {
                let remedy =
                    "keys that are not cached cannot be checked until reads work: see the failed examinations above";
                return Diagnosis::failed(READS, trouble.to_string(), remedy).about(SETTING);
            }
            times.push(self.examination.clock.now().since(sent_at));
        }
        let remedy = "run `serve` closer to its database, find out why the database is slow, or raise \
                      store.read_timeout (and decision.deadline with it)";
        judged(READS, &Times::new(times), self.examination.settings.read_timeout, remedy).about(SETTING)
    }

    /// Compares the database's clock with this machine's clock. `sample` is the fastest poll, which gives the
    /// most precise result.
    fn clock(&self, sample: &Sample) -> Diagnosis {
        let half = sample.took() / 2;
        let here = wall_time(self.examination.clock, sample.sent_at.after(half));
        let (ahead, behind) = (sample.shown.since(here), here.since(sample.shown));
        let (offset, word) = if ahead > behind { (ahead, "ahead of") } else { (behind, "behind") };
        let found = format!(
            "the database's clock is {} {word} this machine's, give or take {}",
            milliseconds(offset),
            milliseconds(half)
        );
        if offset <= OFFSET_MAX + half {
            return Diagnosis::ok(CLOCK, found);
        }
        let remedy = "synchronise both clocks by NTP: no decision depends on this machine's clock, but the times in \
                      this machine's logs do not match those in the database (audit, expiry)";
        Diagnosis::warning(CLOCK, found, remedy)
    }
}

/// The result of the examination of the tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TablesState {
    /// The tables can be read.
    Fit {
        /// True if the last poll confirms that every change is recorded; `None` if no poll was answered.
        triggers_intact: Option<bool>,
    },
    /// The tables are missing, or have an incompatible version.
    Unfit,
    /// The tables cannot be read.
    Closed,
}

/// The kind of the database.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// SQLite, which uses the clock of this machine. `serve` creates and upgrades the tables.
    Embedded,
    /// PostgreSQL, which may use the clock of another machine. `trustgate migrate` creates and upgrades the tables.
    Server,
}

/// The moments at which a poll was sent and answered, and the time that the database's clock showed in between.
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

/// Diagnoses measured times. The diagnosis is failed if the longest time reaches `limit`, and a warning if it exceeds a
/// quarter of `limit`.
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

/// Timeout for closing a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_measured_time_determines_the_state_of_the_diagnosis() {
        let limit = Duration::from_millis(100);
        for (longest, state) in [
            (25, DiagnosisState::Ok),
            (26, DiagnosisState::Warning),
            (99, DiagnosisState::Warning),
            (100, DiagnosisState::Failed),
        ] {
            let times = Times::new(vec![Duration::from_millis(1), Duration::from_millis(longest)]);
            assert_eq!(judged(POLLS, &times, limit, "").state, state, "{longest} ms");
        }
    }
}
