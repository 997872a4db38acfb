//! Faults: the reasons why trustgate could not decide a request. "No such key" is a denial, not a fault.
//!
//! `ext_authz::response` chooses the answer that Envoy receives for a fault.

use std::{error::Error, sync::Arc, time::Duration};

/// A place from which a record can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The cache in this process.
    L1,
    /// Redis.
    L2,
    /// The database.
    Store,
}

impl Tier {
    /// Returns the name of the tier for metric labels and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::L1 => "l1",
            Self::L2 => "l2",
            Self::Store => "store",
        }
    }
}

/// The cause of a fault. It is shared, because all waiters on one load receive the same fault.
pub(crate) type Cause = Arc<dyn Error + Send + Sync>;

/// Why trustgate could not decide a request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// A tier did not answer in time.
    #[error("{} timeout: no answer within {limit:?}", tier.as_str())]
    Timeout {
        /// The affected tier.
        tier: Tier,
        /// The timeout that the tier exceeded.
        limit: Duration,
    },
    /// A tier failed or cannot be reached.
    #[error("{} failed: {source}", tier.as_str())]
    Unreachable {
        /// The affected tier.
        tier: Tier,
        /// The underlying error.
        source: Cause,
    },
    /// The circuit breaker of a tier is open.
    #[error("{} circuit breaker open: the tier failed repeatedly", tier.as_str())]
    Paused {
        /// The affected tier.
        tier: Tier,
    },
    /// A tier returned data that is not a valid record.
    #[error("{} record invalid: {problem}", tier.as_str())]
    Corrupt {
        /// The affected tier.
        tier: Tier,
        /// The problem with the data.
        problem: &'static str,
    },
    /// The check would exceed one of this server's limits.
    #[error("overload: limit exceeded ({limit})")]
    Overloaded {
        /// The setting or constant that was exceeded.
        limit: &'static str,
    },
    /// The whole check took longer than `decision.deadline`, or its message did not arrive in time.
    #[error("deadline exceeded: the check was not decided within {limit:?}")]
    Late {
        /// The deadline.
        limit: Duration,
    },
    /// Each loaded value was out of date by the time it arrived.
    #[error("record not confirmed: the record kept changing while it was read")]
    Unconfirmed,
    /// The database's clock is not known yet, so this server cannot decide whether a key has expired.
    #[error("database clock unknown: the database has not answered yet")]
    ClockUnknown,
    /// The route has a trustgate context extension that this server does not understand.
    #[error("route invalid: cannot use the context extension {name:?} with the value {value:?}: {problem}")]
    Route {
        /// The name of the context extension, truncated by [`quoted`].
        name: Box<str>,
        /// The value of the context extension, truncated by [`quoted`].
        value: Box<str>,
        /// The expected form of the value.
        problem: &'static str,
    },
    /// The caller compressed its message. This server offers no compression, so it cannot read the message.
    #[error(
        "the check message is compressed with {encoding:?}, which is not supported: turn off compression for the \
         ext_authz gRPC service"
    )]
    Compressed {
        /// The header `grpc-encoding`, truncated by [`quoted`].
        encoding: Box<str>,
    },
    /// The key was not found, and this server is not confirmed to have the pepper that the database records.
    #[error(
        "pepper mismatch: the key was not found, and this server is not confirmed to have the pepper recorded in the \
         database"
    )]
    Pepper,
    /// The task that loads the record panicked or was shut down.
    #[error("load aborted: the load task ended without a result")]
    Ended,
}

/// The kind of fault: the `reason` label of the metric `trustgate_checks_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// The database, or a record in it, could not be used.
    Store,
    /// The database's circuit breaker is open.
    Breaker,
    /// The proxy's configuration is wrong: an invalid context extension, or a compressed message.
    Route,
    /// The check would exceed one of this server's limits.
    Overload,
    /// The check took longer than its deadline.
    Deadline,
    /// This server may lack the pepper that it needs to find the key.
    Keys,
}

impl FaultReason {
    /// All reasons, in the order of the enum.
    pub const ALL: [Self; 6] = [Self::Store, Self::Breaker, Self::Route, Self::Overload, Self::Deadline, Self::Keys];

    /// Returns the value of the label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Breaker => "breaker",
            Self::Route => "route",
            Self::Overload => "overload",
            Self::Deadline => "deadline",
            Self::Keys => "keys",
        }
    }
}

/// Truncates text from a request to 128 bytes, for a log line that prints the text escaped (`{:?}`).
#[must_use]
pub(crate) fn quoted(text: &[u8]) -> Box<str> {
    String::from_utf8_lossy(&text[..text.len().min(128)]).into()
}

impl Fault {
    /// Creates the fault for a `tier` that failed with `source`.
    pub fn unreachable(tier: Tier, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Unreachable { tier, source: Arc::new(source) }
    }

    /// Returns the kind of this fault.
    #[must_use]
    pub const fn reason(&self) -> FaultReason {
        match self {
            Self::Timeout { .. }
            | Self::Unreachable { .. }
            | Self::Corrupt { .. }
            | Self::Unconfirmed
            | Self::ClockUnknown
            | Self::Ended => FaultReason::Store,
            Self::Paused { .. } => FaultReason::Breaker,
            Self::Route { .. } | Self::Compressed { .. } => FaultReason::Route,
            Self::Overloaded { .. } => FaultReason::Overload,
            Self::Late { .. } => FaultReason::Deadline,
            Self::Pepper => FaultReason::Keys,
        }
    }

    /// Returns true if the tier itself failed, so that its circuit breaker must count the fault.
    #[must_use]
    pub const fn blames_tier(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unreachable { .. })
    }

    /// Returns true if the tier answered, but with invalid data. One invalid row must not open the circuit breaker for
    /// all other rows.
    #[must_use]
    pub const fn is_answer(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
    }
}
