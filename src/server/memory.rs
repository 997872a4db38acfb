//! Returns freed memory to the operating system after many connections have closed.

use std::{sync::Arc, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::error::AppError;
use crate::grpc::Service;

/// Minimum time between two trims.
const INTERVAL: Duration = Duration::from_secs(10);
/// Minimum number of closed connections between two trims. A trim locks the allocator, which delays cache misses that
/// allocate memory.
const CONNECTIONS_MIN: u64 = 16;

/// Trims the heap whenever enough connections have closed, until `stop` is cancelled.
pub(crate) async fn give_back(service: Arc<Service>, stop: CancellationToken) -> Result<(), AppError> {
    let giving = async {
        let mut seen = 0;
        loop {
            sleep(INTERVAL).await;
            let closed = service.connections_closed();
            if closed - seen >= CONNECTIONS_MIN {
                seen = closed;
                // `trim` does not panic, so the result needs no handling.
                let _ = spawn_blocking(trustgate_heap::trim).await;
            }
        }
    };
    stop.run_until_cancelled(giving).await;
    Ok(())
}
