//! The runtimes that the server owns besides the one that accepts connections, and their priorities.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of its own threads. Ends without waiting when dropped, also inside another runtime.
pub(crate) struct OwnedRuntime(Option<Runtime>);

/// Who goes first where the processors do not suffice for all threads.
#[derive(Clone, Copy)]
pub(crate) enum Priority {
    /// As every program.
    Normal,
    /// After the others.
    Low,
}

/// How much lower: half the weight of a thread as every program has it (sched(7), "The nice value"). With much less, what
/// shares the processors with a server and not its control group starves its reads until they are too late.
const LOW: i32 = 3;

impl Priority {
    /// Takes effect for the calling thread. One that cannot be had is not worth ending for.
    fn take(self) {
        // On Linux alone it is a thread's own; elsewhere it would be that of the whole process.
        if let (Self::Low, true) = (self, cfg!(target_os = "linux")) {
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
        // Present until `drop`.
        self.0.as_ref().map_or_else(
            || unreachable!("the runtime is there until it is dropped"),
            |runtime| runtime.handle().clone(),
        )
    }
}

impl Drop for OwnedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
