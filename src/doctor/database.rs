//! Examines the database for `doctor`. Returns one diagnosis for each name in [`NAMES`].

pub(crate) use super::session::NAMES;
use super::{
    diagnosis::Diagnosis,
    session::{ADDRESS, Examination, Examined, Report, URL, Use},
};
use crate::{
    base::clock::Clock,
    store::{
        StoreSettings,
        existing_table::ExistingTable,
        reads::{postgres::Postgres, sqlite::Sqlite},
        url::{Backend, Env, Role, StoreUrl},
    },
};

/// Examines the database that `serve` would use.
pub(crate) async fn diagnose(settings: &StoreSettings, usage: Use<'_>, env: Env<'_>, clock: &dyn Clock) -> Examined {
    let address = StoreUrl::of(settings, Role::Serve);
    let examination = Examination { settings, usage, env, clock };
    let place = address.backend(env).and_then(|place| match place {
        Backend::Postgres => address.postgres().map(|_| Backend::Postgres),
        sqlite @ Backend::Sqlite(_) => Ok(sqlite),
    });
    let mut report = Report::default();
    match place {
        Ok(Backend::Sqlite(path)) => {
            let sqlite = Sqlite::new(path, settings.preset);
            super::sqlite::run(sqlite, examination, &mut report).await;
        }
        Ok(Backend::Postgres) => {
            // This timeout is longer than the timeout that `serve` uses, so that slow queries are measured and not
            // cancelled.
            let statement_timeout = settings.connect_timeout;
            let (schema, existing) = (settings.schema.clone(), ExistingTable::of(settings));
            let postgres = Postgres { address, schema, existing, statement_timeout };
            super::postgres::run(postgres, examination, &mut report).await;
        }
        Err(error) => report.add(Diagnosis::failed(ADDRESS, error.to_string(), "correct the setting").about(URL)),
    }
    report.examined()
}
