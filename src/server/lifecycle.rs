//! Where this server is in its life.

use tokio::sync::watch;

/// The phases of a server's life, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Listening, but the database has not answered yet: not ready.
    Start,
    /// Ready.
    Serve,
    /// Told to stop: not ready, still serving, so that Envoys turn away first.
    Drain,
    /// No longer accepting; calls in flight end.
    Stop,
}

impl Phase {
    /// The word for `/readyz` and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "starting",
            Self::Serve => "ready",
            Self::Drain => "draining",
            Self::Stop => "stopping",
        }
    }
}

/// The phase, for whoever sets it and whoever watches it. It only moves forward.
#[derive(Clone)]
pub struct Life(watch::Sender<Phase>);

impl Default for Life {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Start))
    }
}

impl Life {
    /// The present phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Moves on to `phase`, unless it is past already.
    pub fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// To be told of every change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }
}

/// Whether to serve on for a moment, not ready, before anything closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// For `limits.drain_delay`: Envoys need that long to turn away.
    Full,
    /// Not at all: somebody is waiting at a terminal.
    None,
}
