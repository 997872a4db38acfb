//! What tests share: real servers, private to the test and gone with it, and waiting without sleeping blindly.

// Each test binary uses a part of it.
#![allow(dead_code)]

pub mod envoy;
pub mod grpc;
pub mod http;
pub mod load;
pub mod postgres;
pub mod process;
pub mod redis;
pub mod server;

use std::{future::Future, time::Duration};

use tokio::sync::{Mutex, MutexGuard};

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

/// Held by a test for as long as it runs: tests that measure time or load the machine go one after the other.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}
