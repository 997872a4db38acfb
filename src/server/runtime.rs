//! The runtimes for I/O, the poll and the admin listeners, and the priorities of their threads.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime with its own threads. Dropping it does not wait for its tasks, so it may be dropped inside another
/// runtime.
pub(crate) struct OwnedRuntime(Option<Runtime>);

/// The scheduling priority of a runtime's threads.
#[derive(Clone, Copy)]
pub(crate) enum Priority {
    /// The default priority.
    Normal,
    /// Lower than the default: other threads run first if there are too few processors.
    Low,
}

/// The nice value for [`Priority::Low`]. It gives a thread half of the default weight (sched(7), "The nice value").
/// With a much lower weight, programs outside the server's control group could delay the server's reads until the reads
/// time out.
const LOW: i32 = 3;

impl Priority {
    /// Applies the priority to the calling thread. Ignores a failure: the server also works with the default priority.
    fn take(self) {
        if matches!(self, Self::Low) {
            // Linux sets the priority of the calling thread only (setpriority(2), "C library/kernel differences").
            let _ = rustix::process::setpriority_process(None, LOW);
        }
    }
}

impl OwnedRuntime {
    pub(crate) fn start(name: &str, threads: usize, priority: Priority) -> io::Result<Self> {
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .on_thread_start(move || priority.take())
            .enable_all()
            .build()
            .map(|runtime| Self(Some(runtime)))
    }

    pub(crate) fn handle(&self) -> Handle {
        // The runtime is present until `drop` takes it.
        self.0
            .as_ref()
            .map_or_else(|| unreachable!("the runtime exists until it is dropped"), |runtime| runtime.handle().clone())
    }
}

impl Drop for OwnedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
