//! Why a request could not be decided. A fault is never the caller's doing, and "no such key" is not one.
//!
//! Never picks an answer: `wire::response` alone says what a fault looks like to Envoy.

use std::{error::Error, sync::Arc, time::Duration};

/// Where a record can be found.
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
    /// The word for labels and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::L1 => "l1",
            Self::L2 => "l2",
            Self::Store => "store",
        }
    }
}

/// The error beneath a fault. Shared, since everybody who waited for the same read gets the same fault.
pub type Source = Arc<dyn Error + Send + Sync>;

/// Why a lookup could not be answered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// A tier took too long.
    #[error("{} gave no answer within {limit:?}", tier.as_str())]
    Timeout {
        /// Which tier.
        tier: Tier,
        /// How long it was given.
        limit: Duration,
    },
    /// A tier failed or cannot be reached.
    #[error("{} cannot be used: {source}", tier.as_str())]
    Unreachable {
        /// Which tier.
        tier: Tier,
        /// What it said.
        source: Source,
    },
    /// A tier failed so often that it is left alone for a moment.
    #[error("{} failed repeatedly and is given a pause", tier.as_str())]
    Paused {
        /// Which tier.
        tier: Tier,
    },
    /// A tier holds something that is not a record.
    #[error("{} holds a record that cannot be read: {problem}", tier.as_str())]
    Corrupt {
        /// Which tier.
        tier: Tier,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More is going on than the limits allow.
    #[error("over the limit of {limit}")]
    Overloaded {
        /// The setting or constant that was exceeded.
        limit: &'static str,
    },
    /// The whole check took longer than `decision.deadline`.
    #[error("the check was not decided within {limit:?}")]
    Late {
        /// The deadline.
        limit: Duration,
    },
    /// What was read could not be confirmed: it kept changing under the reader.
    #[error("what was read could not be confirmed")]
    Unconfirmed,
    /// A context extension of the route names trustgate, and this server does not understand it.
    #[error("the route's context extension {name:?} with the value {value:?} cannot be understood: {problem}")]
    Route {
        /// The name of the context extension, cut to [`quoted`]'s length.
        name: Box<str>,
        /// Its value, cut likewise.
        value: Box<str>,
        /// What is expected instead.
        problem: &'static str,
    },
    /// The caller compressed its message. This server offers no compression, so it cannot read the message.
    #[error(
        "the check message is compressed with {encoding:?}, which is not supported: turn off compression for the \
         ext_authz gRPC service"
    )]
    Compressed {
        /// The header `grpc-encoding`, cut to [`quoted`]'s length.
        encoding: Box<str>,
    },
    /// The key was not found, and this server is not known to have the recorded pepper.
    #[error(
        "pepper mismatch: the key was not found, and this server has not been confirmed to have the pepper recorded in the database"
    )]
    Pepper,
    /// A part of this server ended before its time.
    #[error("a task ended before it answered")]
    Ended,
}

/// The sort of a fault, as the metric `trustgate_checks_total` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// The database, or a record in it, could not be used.
    Store,
    /// The circuit breaker of the database is open.
    Breaker,
    /// The configuration of the proxy cannot be understood: a context extension, or a compressed message.
    Route,
    /// A limit of this server is reached.
    Overload,
    /// The check took longer than its deadline.
    Deadline,
    /// This server lacks a secret that it needs to judge the credential.
    Keys,
}

impl FaultReason {
    /// Every reason, in the order of the enum.
    pub const ALL: [Self; 6] = [Self::Store, Self::Breaker, Self::Route, Self::Overload, Self::Deadline, Self::Keys];

    /// The value of the label.
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

/// Text from a request, cut to 128 bytes, for a log line that prints it escaped (`{:?}`).
#[must_use]
pub fn quoted(text: &[u8]) -> Box<str> {
    String::from_utf8_lossy(&text[..text.len().min(128)]).into()
}

impl Fault {
    /// A tier failed with `source`.
    pub fn unreachable(tier: Tier, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Unreachable { tier, source: Arc::new(source) }
    }

    /// The sort of this fault.
    #[must_use]
    pub const fn reason(&self) -> FaultReason {
        match self {
            Self::Timeout { .. }
            | Self::Unreachable { .. }
            | Self::Corrupt { .. }
            | Self::Unconfirmed
            | Self::Ended => FaultReason::Store,
            Self::Paused { .. } => FaultReason::Breaker,
            Self::Route { .. } | Self::Compressed { .. } => FaultReason::Route,
            Self::Overloaded { .. } => FaultReason::Overload,
            Self::Late { .. } => FaultReason::Deadline,
            Self::Pepper => FaultReason::Keys,
        }
    }

    /// Whether the tier itself is to blame, so that its breaker should hear of it.
    #[must_use]
    pub const fn blames_tier(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unreachable { .. })
    }

    /// Whether the tier has answered all the same: one odd row is no reason to leave all others alone.
    #[must_use]
    pub const fn is_answer(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
    }
}
