//! The phases of the server from start to shutdown.

use tokio::sync::watch;

/// The phases of the server, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Listening, but the database has not answered yet: not ready.
    Start,
    /// Ready.
    Serve,
    /// Shutting down: not ready but still serving, so that Envoy sends new calls elsewhere.
    Drain,
    /// No longer accepting connections; calls in flight finish.
    Stop,
}

impl Phase {
    /// Returns the name of the phase for `/readyz`.
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

/// The current phase, which several tasks share. The phase only moves forward.
#[derive(Clone)]
pub(crate) struct Life(watch::Sender<Phase>);

impl Default for Life {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Start))
    }
}

impl Life {
    /// Returns the current phase.
    #[must_use]
    pub(crate) fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Advances to `phase`, unless the server has already reached that phase.
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

/// How long the server reports not ready but still serves new calls, before the shutdown closes the listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// For `limits.drain_delay`, so that Envoy can notice that the server is not ready and send new calls elsewhere.
    Full,
    /// No delay, because an operator waits at a terminal or a server task has failed.
    None,
}
