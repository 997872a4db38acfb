//! The operating system signals that the server handles.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::lifecycle::Delay;

/// Receives signals. Once a value of this type has been created, the signals no longer end the process by default.
pub(crate) struct SystemSignals {
    terminate: Signal,
    quit: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl SystemSignals {
    /// Registers the signal handlers.
    ///
    /// # Errors
    /// The operating system's error.
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

    /// Waits for a signal that asks the server to stop, and returns the shutdown delay. Logs and ignores SIGHUP,
    /// SIGUSR1 and SIGUSR2: log rotation, `systemctl reload` and closed terminals send these signals, which by default
    /// would end the process without a drain.
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
                "signal ignored: trustgate reloads nothing on this signal; send SIGTERM to stop the process"
            );
        }
    }
}
