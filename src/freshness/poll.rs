//! The poll: asks the store for its newest version, again and again, and tells the view.
//!
//! Never touches a cache, and never ends because the store failed.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Applied, View};
use crate::{
    fault::{Fault, Tier},
    metrics::{IntGauge, Opts, Registry, register},
    record::Version,
    store::{Lookup, PollError, SignOfLife},
};

/// A sign of life for whoever waits for replicas, at least this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Whether the store answers, for metrics and `/readyz`.
#[derive(Clone)]
pub struct PollMetrics {
    store_up: IntGauge,
    applied_version: IntGauge,
}

impl PollMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        Ok(Self {
            store_up: gauge("trustgate_store_up", "1 while the database answers the poll, else 0.")?,
            applied_version: gauge(
                "trustgate_applied_version",
                "The newest version of the store that is applied here.",
            )?,
        })
    }

    /// Whether the last poll was answered.
    #[must_use]
    pub fn is_store_up(&self) -> bool {
        self.store_up.get() == 1
    }
}

/// Polls `store` every `interval` until `stop`, giving each poll `limit` (connecting included).
///
/// # Cancel safety
/// Applying an answer is never interrupted: it does not wait.
pub async fn run(
    store: Arc<dyn Lookup>,
    view: Arc<View>,
    metrics: PollMetrics,
    (interval, limit): (Duration, Duration),
    stop: CancellationToken,
) {
    let replica = Uuid::new_v4();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let report_every = (REPORT_INTERVAL.as_millis() / interval.as_millis().max(1)).max(1);
    let (mut up, mut until_report, mut known) = (None, 0, false);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if !known {
            // Before it relies on what it reads: whoever clears the caches must not overlook a replica that is starting
            // or was cut off.
            known = matches!(timeout(limit, store.report(&sign(replica, view.applied()))).await, Ok(Ok(())));
        }
        let late = Err(PollError::NoAnswer(Fault::Timeout { tier: Tier::Store, limit }));
        let answer = timeout(limit, store.poll(None)).await.unwrap_or(late).map(|polled| polled.newest);
        match answer {
            Ok(newest) => {
                let applied = view.apply(&newest);
                log(applied, newest.as_of.0);
                if applied != Applied::Nothing {
                    until_report = 0;
                }
                metrics.applied_version.set(newest.as_of.0.cast_signed());
                if up.replace(true) != Some(true) {
                    tracing::info!("the database answers");
                }
                metrics.store_up.set(1);
                if until_report == 0 {
                    let reported = timeout(limit, store.report(&sign(replica, newest.as_of))).await;
                    until_report = if matches!(reported, Ok(Ok(()))) { report_every } else { 1 };
                }
                until_report -= 1;
            }
            Err(fault) => {
                known = false;
                if up.replace(false) != Some(false) {
                    tracing::warn!(%fault, "the database does not answer; trying again every {interval:?}");
                }
                metrics.store_up.set(0);
            }
        }
    }
}

fn sign(replica: Uuid, applied: Version) -> SignOfLife {
    SignOfLife { replica, name: String::new(), applied, lasts: Duration::from_secs(30) }
}

fn log(applied: Applied, version: u64) {
    match applied {
        Applied::Nothing => {}
        Applied::First => tracing::info!(version, "the database has confirmed its history"),
        Applied::Cleared => tracing::info!(version, "everything cached before is no longer used"),
        Applied::LostHistory => {
            tracing::error!(version, "the database has lost history (restored or failed over?); the caches start anew");
        }
    }
}
