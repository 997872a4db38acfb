//! Finds the database sessions that block a management statement.
//!
//! Reports their server processes and states, but not their statements, which may contain confidential values.

use std::{convert::Infallible, future::pending, time::Duration};

use sqlx::{Connection, Row};
use tokio::time::sleep;

use super::connect_within;
use crate::store::url::StoreUrl;

/// The time that a statement may take before this module looks for the sessions that block it. The rest of
/// [`LOCK_TIMEOUT`] is left for that search.
const SEARCH_DELAY: Duration = Duration::from_secs(1);
/// The maximum time that a management statement waits for a lock. While it waits, later statements queue behind it.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs `work` on the connection whose server process is `pid`. If it takes longer than [`SEARCH_DELAY`], describes the
/// sessions that block it in `found`.
pub(crate) async fn with_blockers<T>(
    address: &StoreUrl,
    pid: Option<i32>,
    found: &mut Option<String>,
    work: impl Future<Output = T>,
) -> T {
    let look = async {
        sleep(SEARCH_DELAY).await;
        if let Some(pid) = pid {
            *found = blockers(address, pid).await.ok();
        }
        pending::<Infallible>().await
    };
    tokio::select! {
        biased;
        outcome = work => outcome,
        never = look => match never {},
    }
}

async fn blockers(address: &StoreUrl, pid: i32) -> Result<String, sqlx::Error> {
    let mut connection = connect_within(address, SEARCH_DELAY).await?;
    let sql = "SELECT b.pid, a.application_name, a.state, extract(epoch FROM clock_timestamp() - a.xact_start)::bigint
         FROM unnest(pg_blocking_pids($1)) AS b (pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid";
    let rows = sqlx::query(sql).persistent(false).bind(pid).fetch_all(&mut connection).await?;
    connection.close().await?;
    let blockers = rows.iter().map(|row| {
        let (name, state): (Option<String>, Option<String>) = (row.try_get(1)?, row.try_get(2)?);
        let mut words = format!("process {}", row.try_get::<i32, _>(0)?);
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            words.extend([" of ", &format!("{name:?}")]);
        }
        if let Some(state) = state {
            words.extend([", ", &state]);
        }
        if let Some(seconds) = row.try_get::<Option<i64>, _>(3)? {
            words.extend([", in a transaction for ", &seconds.to_string(), " s"]);
        }
        Ok(words)
    });
    Ok(blockers.collect::<Result<Vec<_>, sqlx::Error>>()?.join("; "))
}
