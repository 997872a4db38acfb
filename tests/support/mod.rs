//! What tests share: real servers, private to the test and gone with it, and waiting without sleeping blindly.

pub mod postgres;
pub mod process;

use std::{future::Future, time::Duration};

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
