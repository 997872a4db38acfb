//! The cores that serve connections: a thread each, with a runtime of its own, so that a check that is answered out of
//! this process never waits for another thread and never wakes one.
//!
//! Never asks Redis or the database: a core waits for what the I/O runtime brings, and serves others meanwhile.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use tokio::runtime::{Builder, Handle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// All of them. Dropped, they end with what they still serve.
pub struct Workers {
    workers: Vec<Core>,
    end: CancellationToken,
}

struct Core {
    handle: Handle,
    load: Arc<WorkerLoad>,
    thread: Option<JoinHandle<()>>,
}

/// What a core has to do.
#[derive(Default)]
pub struct WorkerLoad {
    streams: AtomicUsize,
    connections: AtomicUsize,
}

impl Workers {
    /// `count` of them.
    ///
    /// # Errors
    /// When the operating system gives no more threads or descriptors.
    pub fn start(count: usize) -> io::Result<Self> {
        let mut started = Self { workers: Vec::new(), end: CancellationToken::new() };
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let (handle, end) = (runtime.handle().clone(), started.end.clone());
            let thread = thread::Builder::new().name(format!("core-{number}"));
            let thread = thread.spawn(move || runtime.block_on(end.cancelled()))?;
            started.workers.push(Core { handle, load: Arc::default(), thread: Some(thread) });
        }
        Ok(started)
    }

    /// The runtimes, to be asked whether they answer.
    #[must_use]
    pub fn handles(&self) -> Vec<Handle> {
        self.workers.iter().map(|core| core.handle.clone()).collect()
    }

    /// Serves a connection, in `tasks`, on the core that has the fewest open streams (those that wait: others are answered as
    /// they come); where several have, on the one of them with the fewest connections, since those that are idle now will not
    /// stay so.
    pub fn serve<F: Future<Output = ()> + Send + 'static>(
        &self,
        tasks: &TaskTracker,
        connection: impl FnOnce(Arc<WorkerLoad>) -> F,
    ) {
        let weight =
            |core: &&Core| (core.load.streams.load(Ordering::Relaxed), core.load.connections.load(Ordering::Relaxed));
        // There is at least one.
        let Some(core) = self.workers.iter().min_by_key(weight) else { return };
        core.load.connections.fetch_add(1, Ordering::Relaxed);
        let open = Open { load: Arc::clone(&core.load), of: |load| &load.connections };
        let serving = connection(Arc::clone(&core.load));
        tasks.spawn_on(
            async move {
                serving.await;
                drop(open);
            },
            &core.handle,
        );
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end.cancel();
        for core in &mut self.workers {
            // One that panicked ended as well; its panic was shown.
            let _ = core.thread.take().map(JoinHandle::join);
        }
    }
}

impl WorkerLoad {
    /// Counts a stream until the answer is dropped.
    pub fn stream(self: &Arc<Self>) -> Open {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Open { load: Arc::clone(self), of: |load| &load.streams }
    }
}

/// Something that is open on a core, counted until it is dropped.
pub struct Open {
    load: Arc<WorkerLoad>,
    of: fn(&WorkerLoad) -> &AtomicUsize,
}

impl Drop for Open {
    fn drop(&mut self) {
        (self.of)(&self.load).fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn connections_go_where_the_fewest_streams_are_open() {
        let (workers, tasks) = (Workers::start(3).unwrap(), TaskTracker::new());
        // Connections with one open stream each: where they were served, and what ends them.
        let serve = async |count: usize| {
            let (mut places, mut ends) = (Vec::new(), Vec::new());
            for _ in 0..count {
                let ((place, answered), (end, left)) = (oneshot::channel(), oneshot::channel::<()>());
                workers.serve(&tasks, |load| async move {
                    let stream = load.stream();
                    place.send(thread::current().name().unwrap().to_owned()).unwrap();
                    let _ = left.await;
                    drop(stream);
                });
                places.push(answered.await.unwrap());
                ends.push(end);
            }
            (places, ends)
        };
        let (mut places, mut ends) = serve(3).await;
        places.sort();
        assert_eq!(places, ["core-0", "core-1", "core-2"]);
        ends.extend(serve(3).await.1);
        // Two end on one core: whoever comes next goes there.
        drop((ends.remove(0), ends.remove(2)));
        while tasks.len() > 4 {
            tokio::task::yield_now().await;
        }
        let (places, _ends) = serve(2).await;
        assert_eq!(places, ["core-0", "core-0"]);
    }
}
