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
    metrics::{IntGauge, Opts, Registry, register},
    record::{Fingerprint, StoredPeppers},
    store::lookup::OTHER_KEYS_MAX,
};

/// Whether the peppers of this server fit the database. False until a poll has compared them.
#[derive(Debug)]
pub struct PepperState {
    fits: AtomicBool,
    changes: watch::Sender<bool>,
}

impl Default for PepperState {
    fn default() -> Self {
        Self { fits: AtomicBool::new(false), changes: watch::Sender::new(false) }
    }
}

impl PepperState {
    /// Whether they fit. For checks: reads one byte.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.fits.load(Ordering::Relaxed)
    }

    /// The same for whoever waits for a change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Sets it. Returns whether it is another one than before.
    pub(super) fn set(&self, fits: bool) -> bool {
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
    /// What they look like from outside.
    pub metrics: PepperMetrics,
}

/// What the peppers look like from outside.
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

/// What was logged last, so that each thing is logged once.
#[derive(Default)]
pub(super) struct Compared {
    stored: Mutex<Option<StoredPeppers>>,
}

/// Fingerprints for a log line.
fn listed(fingerprints: impl IntoIterator<Item = Fingerprint>) -> String {
    let listed: Vec<_> = fingerprints.into_iter().map(|fingerprint| fingerprint.to_string()).collect();
    if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
}

impl Peppers {
    /// Compares them with what a poll found.
    pub(super) fn compare(&self, stored: StoredPeppers, compared: &Compared, state: &PepperState) {
        let mut last = compared.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if last.replace(stored) == Some(stored) {
            return;
        }
        let fits = stored.fit(&self.known);
        self.metrics.fits.set(fits.into());
        let changed = state.set(fits);
        if !fits {
            tracing::error!(
                configured = listed(self.known.iter().copied()),
                recorded = listed(stored.current),
                "not ready: this server does not have the pepper that keys of this database are made under (fingerprints): \
                 set credential.pepper_file, or credential.previous_pepper_files, and restart"
            );
        } else if changed && stored.current.is_some() {
            tracing::info!(
                recorded = listed(stored.current),
                "this server has the pepper of the database (fingerprint)"
            );
        }
    }

    /// Takes in how many active keys are under other peppers.
    pub(super) fn count_others(&self, count: u64) {
        let count = i64::try_from(count).unwrap_or(i64::MAX); // at most 10 000
        let before = self.metrics.other_keys.get();
        self.metrics.other_keys.set(count);
        if before == 0 && count > 0 {
            tracing::warn!(
                count,
                configured = listed(self.known.iter().copied()),
                "active keys were made under a pepper that this server does not have, and are rejected here; \
                 `trustgate key list --pepper unknown` lists them"
            );
        } else if before > 0 && count == 0 {
            tracing::info!("no active key is left that was made under a pepper that this server does not have");
        }
    }

    /// Compares what the files hold now with what they held at the start, and with what the database names.
    pub(super) fn compare_files(&self, read: io::Result<Vec<Fingerprint>>, compared: &Compared, last: &mut FileState) {
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
            FileState::Same => tracing::info!("the pepper files hold what this server uses"),
            FileState::Unreadable => {
                tracing::error!(problem, "the pepper files cannot be read any longer: a restart would fail");
            }
            FileState::Other(found) if stored.fit(found) => tracing::warn!(
                configured,
                found = listed(found.iter().copied()),
                "the pepper files were changed: this server uses what it read at its start until it is restarted (fingerprints)"
            ),
            FileState::Other(found) => tracing::error!(
                configured,
                found = listed(found.iter().copied()),
                recorded = listed(stored.current),
                "the pepper files were changed, and do not hold the pepper of this database: this server uses what it read at \
                 its start, and would not be ready after a restart (fingerprints)"
            ),
        }
    }
}

/// What the pepper files hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FileState {
    /// What they held at the start.
    Same,
    /// Other peppers.
    Other(Vec<Fingerprint>),
    /// Nothing that can be read.
    Unreadable,
}
