//! The phases of the server's life, from its start to its shutdown.

use tokio::sync::watch;

/// The phases of a server's life, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Listening, but the database has not answered yet: not ready.
    Start,
    /// Ready.
    Serve,
    /// Shutting down: not ready but still serving, so that Envoy sends new calls elsewhere.
    Drain,
    /// No longer accepting; calls in flight finish.
    Stop,
}

impl Phase {
    /// The word for `/readyz` and logs.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "starting",
            Self::Serve => "ready",
            Self::Drain => "draining",
            Self::Stop => "stopping",
        }
    }
}

/// The current phase, shared between the tasks that set it and those that watch it. It only moves forward.
#[derive(Clone)]
pub(crate) struct Life(watch::Sender<Phase>);

impl Default for Life {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Start))
    }
}

impl Life {
    /// The current phase.
    #[must_use]
    pub(crate) fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Advances to `phase`, unless the server has reached it already.
    pub(crate) fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// Returns a receiver that is notified when the phase changes.
    #[must_use]
    pub(crate) fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }
}

/// The time that the server continues to serve, not ready, before the shutdown closes anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// For `limits.drain_delay`, in which Envoy finds out and sends new calls elsewhere.
    Full,
    /// Not at all: an operator waits at a terminal, or a task of the server has failed.
    None,
}
