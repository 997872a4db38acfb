//! What tests share: real servers, private to the test and gone with it, and waiting without sleeping blindly.

// Each test binary uses a part of it; what is measured is shown.
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

/// Asks `question` until it says yes, at most `limit` long.
///
/// # Panics
/// If it still says no by then, naming `what`.
pub async fn eventually<F: Future<Output = bool>>(what: &str, limit: Duration, mut question: impl FnMut() -> F) {
    let asked = tokio::time::timeout(limit, async {
        while !question().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(asked.await.is_ok(), "not within {limit:?}: {what}");
}

/// Held by tests that measure time: no other test that waits for its turn runs meanwhile, and the machine is watched.
pub struct Alone(machine::Watch, RwLockWriteGuard<'static, ()>);

/// Waits until no other test runs, and the machine is calm.
pub async fn exclusive() -> Alone {
    let turn = TURN.write().await;
    machine::is_calm().await;
    Alone(machine::Watch::start(), turn)
}

/// Held by every other test of a binary in which some measure time.
pub async fn shared() -> RwLockReadGuard<'static, ()> {
    TURN.read().await
}

static TURN: RwLock<()> = RwLock::const_new(());
