//! Examines the embedded database for `doctor`.
//!
//! The examinations do not create the database file, and change nothing in it.

use std::{fs, os::unix::fs::MetadataExt};

use sqlx::{Connection, Row};

use super::{
    diagnosis::{Diagnosis, DiagnosisState, milliseconds},
    session::{
        ADDRESS, ALTERED, CLOCK, CONNECTION, Examination, Kind, MANAGEMENT, NOTIFICATIONS, RIGHTS, Report, SERVER,
        Session, TablesState, Trouble, URL, WATCH, within,
    },
};
use crate::store::{
    StoreError,
    change_log::{problem::TrackingProblem, sqlite},
    reads::{lookup::Missing, sqlite::Sqlite},
    sqlite::{Access, connect, file},
};

/// Examines the database file at the path in `sqlite`, and our tables in that file.
pub(crate) async fn run(sqlite: Sqlite, examination: Examination<'_>, report: &mut Report) {
    for (name, because) in [
        (RIGHTS, "SQLite has no roles"),
        (MANAGEMENT, "SQLite has no roles"),
        (CLOCK, "SQLite uses this machine's clock"),
        (NOTIFICATIONS, "SQLite sends no notifications of changes by other processes: polls detect such changes"),
    ] {
        report.add(Diagnosis::skipped(name, because));
    }
    let address = address(&sqlite);
    let exists = sqlite.path.exists() && !matches!(address.state, DiagnosisState::Failed);
    report.add(address);
    if !exists {
        return;
    }
    let mut session = match Session::open(&sqlite, examination).await {
        Ok(session) => session,
        Err(trouble) => {
            let remedy = "check that the file is a database, and that this user may read and write it and its \
                          directory";
            let found = format!("{}: {trouble}", sqlite.path.display());
            return report.add(Diagnosis::failed(CONNECTION, found, remedy).about(URL));
        }
    };
    let took = milliseconds(session.connected_after);
    report.add(Diagnosis::ok(CONNECTION, format!("opened in {took}")));
    let (server, problem) = match within(examination.settings.connect_timeout, inspect(&sqlite)).await {
        Ok((version, journal, problem)) => {
            let found = format!("SQLite {version}, journal_mode {journal}");
            let server = if journal == "wal" || sqlite.preset.is_some() {
                Diagnosis::ok(SERVER, found)
            } else {
                let remedy = "run `trustgate migrate`, which turns on the write-ahead log, so that readers do not wait \
                              for writers";
                Diagnosis::warning(SERVER, found, remedy)
            };
            (server, Ok(problem))
        }
        Err(trouble) => {
            let remedy = "check that the file is a database and is intact; if not, restore a backup";
            (Diagnosis::failed(SERVER, trouble.to_string(), remedy).about(URL), Err(trouble))
        }
    };
    report.add(server);
    let tables = session.diagnose(Kind::Embedded, report).await;
    session.close().await;
    if sqlite.preset.is_some() {
        report.add(Diagnosis::skipped(WATCH, "store.preset is set: changes to that table are not recorded"));
    } else if let TablesState::Fit { triggers_intact: Some(triggers_intact) } = tables {
        report.add(watch(triggers_intact, problem));
    }
}

/// Diagnoses the path, the permissions and the owner of the database file.
fn address(sqlite: &Sqlite) -> Diagnosis {
    let path = &sqlite.path;
    match file::prepare(path, Missing::Refuse) {
        Ok(()) => {}
        Err(StoreError::NoDatabase { .. }) if sqlite.preset.is_none() => {
            let found = format!("no database at {}", path.display());
            let remedy = "for a new database, no action is needed: `serve` creates it; otherwise correct the path";
            return Diagnosis::warning(ADDRESS, found, remedy).about(URL);
        }
        Err(error) => return unusable(error.to_string()),
    }
    match fs::metadata(path) {
        Err(error) => unusable(format!("{}: {error}", path.display())),
        Ok(found) => {
            let (mode, owner) = (found.mode() & 0o777, found.uid());
            let text = format!("{}, on a local disk, mode {mode:o}, owned by user {owner}", path.display());
            let user = rustix::process::geteuid().as_raw();
            if mode & 0o077 != 0 {
                let remedy = format!("other users may read the database file: run `chmod 600 {}`", path.display());
                Diagnosis::warning(ADDRESS, text, remedy).about(URL)
            } else if owner != user {
                let remedy = format!("run `serve` as the owner of the file; the current user is {user}");
                Diagnosis::warning(ADDRESS, text, remedy).about(URL)
            } else {
                Diagnosis::ok(ADDRESS, text)
            }
        }
    }
}

fn unusable(found: String) -> Diagnosis {
    Diagnosis::failed(ADDRESS, found, "put the database on a local disk, where this user may write it").about(URL)
}

/// Reads the SQLite version, the journal mode, and the problem that prevents changes from being recorded, if any.
async fn inspect(sqlite: &Sqlite) -> Result<(String, String, Option<TrackingProblem>), sqlx::Error> {
    let mut connection = connect(&sqlite.path, Access::Read).await?;
    let version = sqlx::raw_sql("SELECT sqlite_version()").fetch_one(&mut connection).await?.try_get(0)?;
    let journal = sqlx::raw_sql("PRAGMA journal_mode").fetch_one(&mut connection).await?.try_get(0)?;
    let problem = if sqlite.preset.is_some() { None } else { sqlite::problem(&mut connection).await? };
    connection.close().await?;
    Ok((version, journal, problem))
}

/// Diagnoses whether every change is recorded.
fn watch(triggers_intact: bool, problem: Result<Option<TrackingProblem>, Trouble>) -> Diagnosis {
    match (problem, triggers_intact) {
        (Ok(Some(problem)), _) => {
            let remedy = "run `trustgate migrate`, which restores the triggers: until then replicas do not rely on \
                          cached data";
            Diagnosis::failed(WATCH, problem.to_string(), remedy)
        }
        (Ok(None), true) => {
            Diagnosis::ok(WATCH, "every change is recorded: no trigger has been altered since it was created")
        }
        (Ok(None), false) => Diagnosis::ok(WATCH, ALTERED),
        (Err(trouble), _) => Diagnosis::failed(WATCH, trouble.to_string(), "see database_server"),
    }
}
