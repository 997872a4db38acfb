//! Whether this server has the pepper that the keys of the database are made under.
//!
//! With another pepper it would find no key and reject every client. So it is not ready then, and an unknown key is a fault.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;

use crate::{
    base::metrics::{IntGauge, Opts, Registry, register},
    record::{Fingerprint, StoredPeppers},
    store::reads::lookup::OTHER_KEYS_MAX,
};

/// Whether the peppers of this server fit the database. False until a poll has compared them.
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
    /// Whether they fit: this server is ready only then.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.fits.load(Ordering::Relaxed)
    }

    /// Whether a key that is not found is unknown, and not perhaps one that was issued under a pepper that is missing here. For
    /// checks: reads one byte.
    #[must_use]
    pub fn identifies_all(&self) -> bool {
        self.identifies_all.load(Ordering::Relaxed)
    }

    /// Returns a receiver that is notified when [`Self::fits`] changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Sets both. Returns whether [`Self::fits`] changed.
    pub(crate) fn set(&self, fits: bool, identifies_all: bool) -> bool {
        self.identifies_all.store(identifies_all, Ordering::Relaxed);
        self.fits.store(fits, Ordering::Relaxed);
        self.changes.send_if_modified(|before| std::mem::replace(before, fits) != fits)
    }
}

/// Reads the peppers from their files again.
pub type Reread = Arc<dyn Fn() -> io::Result<Vec<Fingerprint>> + Send + Sync>;

/// The peppers of this server.
pub struct Peppers {
    /// Their fingerprints, the current one first, in the order of the digests.
    pub known: Vec<Fingerprint>,
    /// `None` where no pepper is in a file.
    pub reread: Option<Reread>,
    /// Their metrics.
    pub metrics: PepperMetrics,
}

/// Metrics of the peppers.
#[derive(Clone)]
pub struct PepperMetrics {
    fits: IntGauge,
    other_keys: IntGauge,
}

impl PepperMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// As [`register`].
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help: String| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        let fits = "1 while this server has the pepper that keys of the database are made under, else 0.";
        let other_keys = format!(
            "Active keys that were made under a pepper that this server does not have, {OTHER_KEYS_MAX} at most."
        );
        Ok(Self {
            fits: gauge("trustgate_pepper_fits", fits.to_owned())?,
            other_keys: gauge("trustgate_other_pepper_keys", other_keys)?,
        })
    }
}

/// The last recorded peppers, shared by the poll and the file watch, so that each change is logged once.
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
    /// Compares them with what a poll found.
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
                "pepper mismatch: this server does not have the pepper recorded in the database, so it is not ready; set \
                 credential.pepper_file or credential.previous_pepper_files and restart. If a command recorded a wrong pepper, run \
                 `trustgate pepper use` with the right one"
            );
        } else if changed && stored.current.is_some() {
            tracing::info!(
                recorded = listed(stored.current),
                "pepper matches: this server has the pepper recorded in the database"
            );
        }
    }

    /// Takes in how many active keys are under other peppers.
    pub(crate) fn count_others(&self, count: u64) {
        let count = i64::try_from(count).unwrap_or(i64::MAX); // at most 10 000
        let before = self.metrics.other_keys.get();
        self.metrics.other_keys.set(count);
        if before == 0 && count > 0 {
            tracing::warn!(
                count,
                configured = listed(self.known.iter().copied()),
                "unknown pepper: active keys were issued under a pepper that this server does not have, so it cannot grant them; list \
                 them with `trustgate key list --pepper unknown`"
            );
        } else if before > 0 && count == 0 {
            tracing::info!("unknown pepper: no such active keys are left");
        }
    }

    /// Compares what the files hold now with what they held at the start, and with what the database names.
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
                tracing::error!(problem, "pepper files unreadable: a restart would fail");
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
                "pepper files changed: they no longer contain the pepper recorded in the database, so this server would not be ready \
                 after a restart"
            ),
        }
    }
}

/// What the pepper files hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FileState {
    /// What they held at the start.
    Same,
    /// Other peppers.
    Other(Vec<Fingerprint>),
    /// Nothing that can be read.
    Unreadable,
}
