//! Compares this server's peppers with the peppers recorded in the database, which were used to compute the key
//! digests.
//!
//! With a wrong pepper, a server would not find any key and would reject every client. So a server with a wrong pepper
//! is not ready, and it answers a check of an unknown key with a fault, not with a denial.

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

/// The result of comparing this server's peppers with the recorded peppers. Both flags are false until the first poll.
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
    /// Returns true if this server has a recorded pepper, or if no pepper is recorded. Otherwise the server is not
    /// ready.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.fits.load(Ordering::Relaxed)
    }

    /// Returns true if this server may deny a key as unknown when it does not find the key. Returns false if the key
    /// may have been hashed with the current pepper and this server does not have that pepper. Loads one atomic flag,
    /// so each check can call this.
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

/// A function that reads the pepper files again and returns the fingerprints of the peppers.
pub(crate) type Reread = Arc<dyn Fn() -> io::Result<Vec<Fingerprint>> + Send + Sync>;

/// This server's peppers, and the function that reads the pepper files again.
pub(crate) struct Peppers {
    /// The fingerprints of the peppers, the current pepper first, in the order of
    /// [`Digests::all`](crate::record::Digests::all).
    pub known: Vec<Fingerprint>,
    /// Reads the pepper files again; `None` if no pepper comes from a file.
    pub reread: Option<Reread>,
    pub metrics: PepperMetrics,
}

/// The metrics of the peppers.
#[derive(Clone)]
pub(crate) struct PepperMetrics {
    fits: IntGauge,
    other_keys: IntGauge,
}

impl PepperMetrics {
    /// Declares the metrics.
    ///
    /// # Errors
    /// Returns the error of [`register`].
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name, help: String| register(registry, IntGauge::with_opts(Opts::new(name, help)));
        let fits = "1 if this server has the recorded pepper or the previous one, or none is recorded; otherwise 0.";
        let other_keys = format!(
            "Active keys that were hashed with a pepper that this server lacks, counted up to {OTHER_KEYS_MAX}."
        );
        Ok(Self {
            fits: gauge("trustgate_pepper_fits", fits.to_owned())?,
            other_keys: gauge("trustgate_other_pepper_keys", other_keys)?,
        })
    }
}

/// The recorded peppers that the last poll returned. [`Peppers::compare`] does nothing until they change, so that each
/// change is logged once. [`Peppers::compare_files`] compares the pepper files with them.
#[derive(Default)]
pub(crate) struct Compared {
    stored: Mutex<Option<StoredPeppers>>,
}

/// Formats fingerprints for a log line.
fn listed(fingerprints: impl IntoIterator<Item = Fingerprint>) -> String {
    let listed: Vec<_> = fingerprints.into_iter().map(|fingerprint| fingerprint.to_string()).collect();
    if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
}

impl Peppers {
    /// Compares this server's peppers with `stored`, the recorded peppers that a poll returned, and logs changes.
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
                 set credential.pepper_file or credential.previous_pepper_files, and restart. If a command recorded \
                 the wrong pepper, run `trustgate pepper use` with the right pepper"
            );
        } else if changed && stored.current.is_some() {
            tracing::info!(
                recorded = listed(stored.current),
                "pepper matches: this server has the current or the previous pepper recorded in the database"
            );
        }
    }

    /// Sets the metric that counts active keys hashed with unknown peppers. Logs when the count rises above zero and
    /// when it returns to zero.
    pub(crate) fn count_others(&self, count: u64) {
        let count = count.saturate(); // at most `OTHER_KEYS_MAX`
        let before = self.metrics.other_keys.get();
        self.metrics.other_keys.set(count);
        if before == 0 && count > 0 {
            tracing::warn!(
                count,
                configured = listed(self.known.iter().copied()),
                "unknown pepper: active keys were hashed with a pepper that this server does not have, so it cannot \
                 grant them; list them with `trustgate key list --pepper unknown`"
            );
        } else if before > 0 && count == 0 {
            tracing::info!("unknown pepper resolved: this server now has the peppers of all active keys");
        }
    }

    /// Compares the peppers in the files with those loaded at startup and with the recorded peppers, and logs changes.
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
            FileState::Same => tracing::info!("pepper files restored: they match the peppers loaded at startup"),
            FileState::Unreadable => {
                tracing::error!(problem, "pepper files unreadable: a restart would fail; restore the files");
            }
            FileState::Other(found) if stored.fit(found) => tracing::warn!(
                configured,
                found = listed(found.iter().copied()),
                "pepper files changed: until it restarts, this server uses the peppers that it loaded at startup"
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
    /// Different peppers from those at startup.
    Other(Vec<Fingerprint>),
    /// A file cannot be read.
    Unreadable,
}
