//! Exports the items that tests and benchmarks use, under the paths of the modules that define them. All other items
//! are private to this crate, so the compiler reports unused code.

#![allow(missing_docs)] // each item is documented where it is defined

pub mod base {
    pub mod clock {
        pub use crate::base::clock::{Clock, DatabaseTime, Moment, SystemClock};
    }
    pub mod fault {
        pub use crate::base::fault::{Fault, Tier};
    }
    pub mod metrics {
        pub use crate::base::metrics::{registry, text};
        pub use prometheus::{IntGauge, Registry};
    }
    pub mod secret {
        pub use crate::base::secret::Secret;
    }
    pub mod settings {
        pub use crate::base::settings::{RawValue, Reader, Section, Setting};
    }
    pub mod telemetry {
        pub use crate::base::telemetry::start;
    }
    pub mod units {
        pub use crate::base::units::ByteSize;
    }
}
pub mod cache {
    pub use crate::cache::CacheSettings;
    pub mod api_key {
        pub use crate::cache::api_key::ApiKey;
    }
    pub mod l1 {
        pub use crate::cache::l1::{Entry, L1, Lifetime};
    }
    pub mod l2 {
        pub use crate::cache::l2::{L2, L2Lookup};
        pub use crate::redis::sealed::MacKey;
    }
}
pub mod canary {
    pub mod metrics {
        pub use crate::canary::metrics::CanaryMetrics;
    }
    pub mod settings {
        pub use crate::canary::settings::CanarySettings;
    }
}
pub mod config {
    pub use crate::config::{Config, Purpose, SECTIONS, load};
}
pub mod ext_authz {
    pub mod check {
        pub use crate::ext_authz::check::{Checker, Progress};
    }
    pub mod credential {
        pub use crate::ext_authz::credential::{CredentialSettings, Hasher, Source};
        pub mod extract {
            pub use crate::ext_authz::credential::extract::extract;
        }
        pub mod format {
            pub use crate::ext_authz::credential::format::generate;
        }
    }
    pub mod decision {
        pub use crate::ext_authz::decision::{Basis, Decision, DenyReason, decide};
    }
    pub mod framing {
        pub use crate::ext_authz::framing::{CHECK_PATH, SERVICE, frame, frame_bytes};
    }
    pub mod identity {
        pub use crate::ext_authz::identity::{HEADERS, TRUST_ID};
    }
    pub mod request {
        pub use crate::ext_authz::request::View;
    }
    pub mod response {
        pub use crate::ext_authz::response::{OnFault, Replies, Reply};
    }
    pub mod route {
        pub use crate::ext_authz::route::Demands;
    }
}
pub mod freshness {
    pub use crate::freshness::replica_state::ReplicaState;
    pub mod deny_list {
        pub use crate::freshness::deny_list::{DenyList, DenyMetrics};
        pub mod entries {
            pub use crate::freshness::deny_list::entries::Denied;
        }
        pub mod redis {
            pub use crate::freshness::deny_list::redis::{ENTRIES_MAX, SharedList};
        }
    }
}
pub mod manage {
    pub use crate::manage::Manager;
    pub mod import {
        pub use crate::manage::import::LineForm;
    }
    pub mod keys {
        pub use crate::manage::keys::Wanted;
    }
}
pub mod record {
    pub use crate::record::{
        ApiKeyDigest, Change, ChangeKind, Digests, Fingerprint, KeyId, Lineage, Made, Nonce, Record, StoredPeppers,
        TrustId, Version, Versioned,
    };
}
pub mod redis {
    pub use crate::redis::{
        client::{Redis, RedisMetrics},
        connection::{Link, RedisConnection},
        notifications::listen,
        settings::RedisSettings,
    };
}
pub mod server {
    pub use crate::server::{AppBuilder, Running, lifecycle::Delay};
    pub mod replica {
        pub use crate::server::replica::{Replica, ReplicaDeps, Tasks};
    }
}
pub mod store {
    pub use crate::store::{
        error::StoreError,
        ledger::{Ledger, types::Actor},
        names::TableName,
        open::{describe, grants, migrate, new_incarnation, open_ledger, open_lookup},
        reads::lookup::{Heartbeat, Lookup, Missing, PollError, Polled, Source, Tended},
        settings::{Preset, StoreSettings},
        url::Env,
    };
    pub mod ledger {
        pub use crate::store::ledger::types::{KeyDetails, NewKey, TrustRef};
    }
    pub mod reads {
        pub mod pool {
            pub use crate::store::reads::pool::{Connect, Pool, PoolError, PoolLimits};
        }
    }
}
