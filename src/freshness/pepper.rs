//! Compares the peppers of this server with those recorded in the database, under which the digests of keys were made.
//!
//! With a wrong pepper, a server would not find any key and would reject every client. So it is not ready, and it
//! answers a check of an unknown key with a fault.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;

use crate::{
    base::{
        metrics::{IntGauge, Opts, Registry, register},
        saturate::Saturate as _,
    },
    record::{Fingerprint, StoredPeppers},
    store::reads::lookup::OTHER_KEYS_MAX,
};

/// The result of comparing this server's peppers with the recorded ones. Both flags are false until the first poll.
#[derive(Debug)]
pub struct PepperState {
    fits: AtomicBool,
    identifies_all: AtomicBool,
    changes: watch::Sender<bool>,
}

impl Default for PepperState {
    fn default() -> Self {
        Self { fits: AtomicBool::default(), identifies_all: AtomicBool::default(), changes: watch::Sender::new(false) }
    }
}

impl PepperState {
    /// True if this server has a recorded pepper, or none is recorded. The server is ready only then.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.fits.load(Ordering::Relaxed)
    }

    /// True if a key that is not found can be denied as unknown. False if it may have been issued under the current
    /// pepper, which this server does not have. Cheap enough for each check: it reads one byte.
    #[must_use]
    pub fn identifies_all(&self) -> bool {
        self.identifies_all.load(Ordering::Relaxed)
    }

    /// Returns a receiver that is notified when [`Self::fits`] changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Sets both flags. Returns true if [`Self::fits`] changed.
    pub(crate) fn set(&self, fits: bool, identifies_all: bool) -> bool {
        self.identifies_all.store(identifies_all, Ordering::Relaxed);
        self.fits.store(fits, Ordering::Relaxed);
        self.changes.send_if_modified(|before| std::mem::replace(before, fits) != fits)
    }
}

/// Reads the peppers from their files again.
pub(crate) type Reread = Arc<dyn Fn() -> io::Result<Vec<Fingerprint>> + Send + Sync>;

/// The peppers of this server, and how to check them.
pub(crate) struct Peppers {
    /// The fingerprints, the current one first, in the order of [`Digests::all`](crate::record::Digests::all).
    pub known: Vec<Fingerprint>,
    /// Reads the pepper files again; `None` if no pepper comes from a file.
    pub reread: Option<Reread>,
    /// The metrics.
    pub metrics: PepperMetrics,
}

/// Metrics of the peppers.
#[derive(Clone)]
pub(crate) struct PepperMetrics {
    fits: IntGauge,
    other_keys: IntGauge,
}

impl PepperMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help: String| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        let fits = "1 if this server has the recorded pepper or the one before it, or none is recorded; else 0.";
        let other_keys = format!(
            "Active keys issued under a pepper that this server does not have, counted up to {OTHER_KEYS_MAX}."
        );
        Ok(Self {
            fits: gauge("trustgate_pepper_fits", fits.to_owned())?,
            other_keys: gauge("trustgate_other_pepper_keys", other_keys)?,
        })
    }
}

/// The last recorded peppers that a poll returned. The poll task and the check of the pepper files share them, so that
/// each change is logged once.
#[derive(Default)]
pub(crate) struct Compared {
    stored: Mutex<Option<StoredPeppers>>,
}

/// Fingerprints for a log line.
fn listed(fingerprints: impl IntoIterator<Item = Fingerprint>) -> String {
    let listed: Vec<_> = fingerprints.into_iter().map(|fingerprint| fingerprint.to_string()).collect();
    if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
}

impl Peppers {
    /// Compares them with the recorded peppers that a poll returned, and logs changes.
    pub(crate) fn compare(&self, stored: StoredPeppers, compared: &Compared, state: &PepperState) {
        let mut last = compared.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if last.replace(stored) == Some(stored) {
            return;
        }
        let fits = stored.fit(&self.known);
        self.metrics.fits.set(fits.into());
        let changed = state.set(fits, stored.identify_all(&self.known));
        if !fits {
            tracing::error!(
                configured = listed(self.known.iter().copied()),
                recorded = listed(stored.current),
                "pepper mismatch: this server does not have the pepper recorded in the database, so it is not ready; \
                 set credential.pepper_file or credential.previous_pepper_files and restart. If a command recorded a \
                 wrong pepper, run `trustgate pepper use` with the right one"
            );
        } else if changed && stored.current.is_some() {
            tracing::info!(
                recorded = listed(stored.current),
                "pepper matches: this server has the pepper recorded in the database"
            );
        }
    }

    /// Exposes the number of active keys under other peppers, and logs when it becomes or stops being zero.
    pub(crate) fn count_others(&self, count: u64) {
        let count = count.saturate(); // at most 10 000
        let before = self.metrics.other_keys.get();
        self.metrics.other_keys.set(count);
        if before == 0 && count > 0 {
            tracing::warn!(
                count,
                configured = listed(self.known.iter().copied()),
                "unknown pepper: active keys were issued under a pepper that this server does not have, so it cannot \
                 grant them; list them with `trustgate key list --pepper unknown`"
            );
        } else if before > 0 && count == 0 {
            tracing::info!("unknown pepper: no such active keys are left");
        }
    }

    /// Compares the current content of the pepper files with that at startup and with the recorded peppers, and logs
    /// changes.
    pub(crate) fn compare_files(&self, read: io::Result<Vec<Fingerprint>>, compared: &Compared, last: &mut FileState) {
        let stored = compared.stored.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default();
        let (state, problem) = match read {
            Ok(found) if found == self.known => (FileState::Same, String::new()),
            Ok(found) => (FileState::Other(found), String::new()),
            Err(error) => (FileState::Unreadable, error.to_string()),
        };
        if *last == state {
            return;
        }
        *last = state;
        let configured = listed(self.known.iter().copied());
        match last {
            FileState::Same => tracing::info!("pepper files restored: they match what this server loaded"),
            FileState::Unreadable => {
                tracing::error!(problem, "pepper files unreadable: a restart would fail; restore the files");
            }
            FileState::Other(found) if stored.fit(found) => tracing::warn!(
                configured,
                found = listed(found.iter().copied()),
                "pepper files changed: this server keeps the peppers it loaded at startup until it restarts"
            ),
            FileState::Other(found) => tracing::error!(
                configured,
                found = listed(found.iter().copied()),
                recorded = listed(stored.current),
                "pepper files changed: they no longer contain the pepper recorded in the database, so this server \
                 would not be ready after a restart"
            ),
        }
    }
}

/// The content of the pepper files.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FileState {
    /// The same peppers as at startup.
    Same,
    /// Other peppers.
    Other(Vec<Fingerprint>),
    /// A file cannot be read.
    Unreadable,
}
