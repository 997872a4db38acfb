//! Gives memory back to the operating system after many connections have ended.

use std::{sync::Arc, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::error::AppError;
use crate::grpc::Service;

/// Minimum time between two trims.
const INTERVAL: Duration = Duration::from_secs(10);
/// Trim only after this many connections have ended. A trim locks the allocator, which delays cache misses that allocate.
const CONNECTIONS_MIN: u64 = 16;

/// Runs until `stop`.
pub(crate) async fn give_back(service: Arc<Service>, stop: CancellationToken) -> Result<(), AppError> {
    let giving = async {
        let mut seen = 0;
        loop {
            sleep(INTERVAL).await;
            let closed = service.connections_closed();
            if closed - seen >= CONNECTIONS_MIN {
                seen = closed;
                // It cannot fail, and does not panic.
                let _ = spawn_blocking(trustgate_heap::trim).await;
            }
        }
    };
    stop.run_until_cancelled(giving).await;
    Ok(())
}
