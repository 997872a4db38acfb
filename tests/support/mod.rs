//! Code that the test binaries share: private servers that stop with their test, and functions that wait for a
//! condition instead of sleeping for a fixed time.

// Each test binary uses only a part of this module, and tests print their measurements.
#![allow(dead_code, clippy::print_stdout)]

pub mod certificates;
pub mod connection;
pub mod envoy;
pub mod forward;
pub mod grpc;
pub mod http;
pub mod load;
pub mod machine;
pub mod pgbouncer;
pub mod postgres;
pub mod probe;
pub mod process;
pub mod redis;
pub mod server;
pub mod store_proxy;

use std::{future::Future, time::Duration};

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Calls `condition` every 10 ms until it returns true, for at most `limit`.
///
/// # Panics
/// If `condition` does not return true within `limit`; the message contains `what`.
pub async fn eventually<F: Future<Output = bool>>(what: &str, limit: Duration, mut condition: impl FnMut() -> F) {
    let waiting = tokio::time::timeout(limit, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waiting.await.is_ok(), "not within {limit:?}: {what}");
}

/// The turn of a test that measures time. Until this value is dropped, tests that call [`shared`] or [`exclusive`]
/// wait, and a [`machine::Watch`] records disturbances of the machine.
pub struct ExclusiveTurn(machine::Watch, RwLockWriteGuard<'static, ()>);

/// Waits until no other test has a turn and the machine is undisturbed, then returns an exclusive turn.
pub async fn exclusive() -> ExclusiveTurn {
    let turn = TURN.write().await;
    machine::until_undisturbed().await;
    ExclusiveTurn(machine::Watch::start(), turn)
}

/// Waits until no test has an exclusive turn, then returns a shared turn. A test that measures no time takes a shared
/// turn, and runs concurrently with other such tests.
pub async fn shared() -> RwLockReadGuard<'static, ()> {
    TURN.read().await
}

static TURN: RwLock<()> = RwLock::const_new(());
