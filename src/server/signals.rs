//! The signals of the operating system that a server reacts to.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::lifecycle::Delay;

/// Receives signals. Once it exists, none of these signals ends the process by default.
pub(crate) struct SystemSignals {
    terminate: Signal,
    quit: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl SystemSignals {
    /// Registers the handlers of the signals.
    ///
    /// # Errors
    /// The error of the operating system.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Returns once a signal asks the server to stop. SIGHUP, SIGUSR1 and SIGUSR2 are logged and ignored: log rotation,
    /// `systemctl reload` and closed terminals send them, and by default they would end the process without a drain.
    ///
    /// # Cancel safety
    /// Safe: no signal is lost.
    pub(crate) async fn stop(&mut self) -> Delay {
        loop {
            let ignored = tokio::select! {
                _ = self.terminate.recv() => return Delay::Full,
                _ = self.quit.recv() => return Delay::Full,
                _ = self.interrupt.recv() => return Delay::None,
                _ = self.hangup.recv() => "SIGHUP",
                _ = self.user1.recv() => "SIGUSR1",
                _ = self.user2.recv() => "SIGUSR2",
            };
            tracing::info!(
                signal = ignored,
                "signal ignored: it does not reload anything; send SIGTERM to stop the server"
            );
        }
    }
}
