//! What can be found out about the embedded database, for `doctor`.
//!
//! Never makes the file, and changes nothing in it.

use std::{fs, os::unix::fs::MetadataExt};

use sqlx::{Connection, Row};

use super::{
    diagnosis::{Diagnosis, State, milliseconds},
    session::{
        ADDRESS, ALTERED, CLOCK, CONNECTION, Examination, HINTS, Kind, MANAGEMENT, RIGHTS, Report, SERVER, Session,
        Tables, Trouble, URL, WATCH, within,
    },
};
use crate::store::{
    StoreError,
    change_log::sqlite,
    reads::{lookup::Missing, sqlite::Sqlite},
    sqlite::{Access, connect, file},
};

/// Examines the file that `sqlite` names, and our tables in it.
pub(crate) async fn run(sqlite: Sqlite, examination: Examination<'_>, report: &mut Report) {
    for (name, because) in [
        (RIGHTS, "an SQLite file knows no roles"),
        (MANAGEMENT, "an SQLite file knows no roles"),
        (CLOCK, "the clock of an SQLite database is this machine's"),
        (HINTS, "SQLite tells nobody of another process's changes: every poll asks"),
    ] {
        report.add(Diagnosis::skipped(name, because));
    }
    let address = address(&sqlite);
    let is_there = sqlite.path.exists() && !matches!(address.state, State::Failed);
    report.add(address);
    if !is_there {
        return;
    }
    let mut session = match Session::open(&sqlite, examination).await {
        Ok(session) => session,
        Err(trouble) => {
            let remedy = "is it a database, and may this user read and write it and its directory?";
            let found = format!("{}: {trouble}", sqlite.path.display());
            return report.add(Diagnosis::failed(CONNECTION, found, remedy).about(URL));
        }
    };
    let took = milliseconds(session.connected_after);
    report.add(Diagnosis::ok(CONNECTION, format!("opened after {took}")));
    let (server, problem) = match within(examination.settings.connect_timeout, look(&sqlite)).await {
        Ok((version, journal, problem)) => {
            let found = format!("SQLite {version}, journal_mode {journal}");
            let server = if journal == "wal" || sqlite.preset.is_some() {
                Diagnosis::ok(SERVER, found)
            } else {
                let remedy = "run `trustgate migrate`: with the write-ahead log readers never wait for a writer";
                Diagnosis::warning(SERVER, found, remedy)
            };
            (server, Ok(problem))
        }
        Err(trouble) => {
            let remedy = "is it a database, and is it whole? Else put back a backup";
            (Diagnosis::failed(SERVER, trouble.to_string(), remedy).about(URL), Err(trouble))
        }
    };
    report.add(server);
    let tables = session.diagnose(Kind::Embedded, report).await;
    session.close().await;
    if sqlite.preset.is_some() {
        report.add(Diagnosis::skipped(WATCH, "store.preset is set: nobody names changes there"));
    } else if let Tables::Fit { triggers_intact: Some(triggers_intact) } = tables {
        report.add(naming(triggers_intact, problem));
    }
}

/// Where the file lies, who may read it, and whose it is.
fn address(sqlite: &Sqlite) -> Diagnosis {
    let path = &sqlite.path;
    match file::prepare(path, Missing::Refuse) {
        Ok(()) => {}
        Err(StoreError::NoDatabase { .. }) if sqlite.preset.is_none() => {
            let found = format!("no database at {}", path.display());
            let remedy = "nothing, if this is a new one: `serve` makes it. Else correct the path";
            return Diagnosis::warning(ADDRESS, found, remedy).about(URL);
        }
        Err(error) => return unusable(error.to_string()),
    }
    match fs::metadata(path) {
        Err(error) => unusable(format!("{}: {error}", path.display())),
        Ok(found) => {
            let (mode, owner) = (found.mode() & 0o777, found.uid());
            let text = format!("{}, on a local disk, mode {mode:o}, of user {owner}", path.display());
            let user = rustix::process::geteuid().as_raw();
            if mode & 0o077 != 0 {
                Diagnosis::warning(ADDRESS, text, format!("others may read it: chmod 600 {}", path.display()))
                    .about(URL)
            } else if owner != user {
                let remedy = format!("run `serve` as the owner of the file; this is user {user}");
                Diagnosis::warning(ADDRESS, text, remedy).about(URL)
            } else {
                Diagnosis::ok(ADDRESS, text)
            }
        }
    }
}

fn unusable(found: String) -> Diagnosis {
    Diagnosis::failed(ADDRESS, found, "put the database on a local disk, where this user may write to it").about(URL)
}

/// Version, journal, and what keeps changes from being named.
async fn look(sqlite: &Sqlite) -> Result<(String, String, Option<String>), sqlx::Error> {
    let mut connection = connect(&sqlite.path, Access::Read).await?;
    let version = sqlx::raw_sql("SELECT sqlite_version()").fetch_one(&mut connection).await?.try_get(0)?;
    let journal = sqlx::raw_sql("PRAGMA journal_mode").fetch_one(&mut connection).await?.try_get(0)?;
    let problem = if sqlite.preset.is_some() { None } else { sqlite::problem(&mut connection).await? };
    connection.close().await?;
    Ok((version, journal, problem))
}

fn naming(triggers_intact: bool, problem: Result<Option<String>, Trouble>) -> Diagnosis {
    match (problem, triggers_intact) {
        (Ok(Some(problem)), _) => {
            let remedy = "run `trustgate migrate`, which puts back what is missing: until then no replica relies on \
                          what it holds";
            Diagnosis::failed(WATCH, problem, remedy)
        }
        (Ok(None), true) => Diagnosis::ok(WATCH, "every change is named: all triggers are as they were made"),
        (Ok(None), false) => Diagnosis::ok(WATCH, ALTERED),
        (Err(trouble), _) => Diagnosis::failed(WATCH, trouble.to_string(), "see database_server"),
    }
}
