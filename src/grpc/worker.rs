//! The workers that serve connections. Each worker is a thread with a single-threaded runtime, so that a check that
//! hits in L1 neither waits for another thread nor wakes another thread.
//!
//! A worker sends no requests to Redis or the database. A check that needs Redis or the database waits for the I/O
//! runtime; meanwhile, the worker serves its other connections.

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

/// All workers. Dropping this value ends their threads and closes the connections that they still serve.
pub(crate) struct Workers {
    workers: Vec<Worker>,
    end: CancellationToken,
}

struct Worker {
    handle: Handle,
    load: Arc<WorkerLoad>,
    thread: Option<JoinHandle<()>>,
}

/// The load of a worker: the numbers of its open streams and connections.
#[derive(Default)]
pub(crate) struct WorkerLoad {
    streams: AtomicUsize,
    connections: AtomicUsize,
}

impl Workers {
    /// Starts `count` workers.
    ///
    /// # Errors
    /// If the operating system cannot create a thread or a file descriptor.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let mut started = Self { workers: Vec::new(), end: CancellationToken::new() };
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let (handle, end) = (runtime.handle().clone(), started.end.clone());
            let thread = thread::Builder::new().name(format!("worker-{number}"));
            let thread = thread.spawn(move || runtime.block_on(end.cancelled()))?;
            started.workers.push(Worker { handle, load: Arc::default(), thread: Some(thread) });
        }
        Ok(started)
    }

    /// Returns the runtimes of the workers, for the readiness probe.
    #[must_use]
    pub(crate) fn handles(&self) -> Vec<Handle> {
        self.workers.iter().map(|worker| worker.handle.clone()).collect()
    }

    /// Serves a connection, in `tasks`, on the worker with the fewest open streams. Only streams whose calls are
    /// waiting are counted, because other calls are answered as soon as they arrive. Among workers with equally few
    /// streams, the worker with the fewest connections is chosen, because idle connections may become busy.
    pub(crate) fn serve<F: Future<Output = ()> + Send + 'static>(
        &self,
        tasks: &TaskTracker,
        connection: impl FnOnce(Arc<WorkerLoad>) -> F,
    ) {
        let weight = |worker: &&Worker| {
            let load = &worker.load;
            (load.streams.load(Ordering::Relaxed), load.connections.load(Ordering::Relaxed))
        };
        // The list is not empty: the server starts at least one worker.
        let Some(worker) = self.workers.iter().min_by_key(weight) else { return };
        worker.load.connections.fetch_add(1, Ordering::Relaxed);
        let open = Open { load: Arc::clone(&worker.load), of: |load| &load.connections };
        let serving = connection(Arc::clone(&worker.load));
        tasks.spawn_on(
            async move {
                serving.await;
                drop(open);
            },
            &worker.handle,
        );
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end.cancel();
        for worker in &mut self.workers {
            // Ignore a panic in the thread: its message has already been printed.
            let _ = worker.thread.take().map(JoinHandle::join);
        }
    }
}

impl WorkerLoad {
    /// Counts a stream as open until the returned guard is dropped.
    pub(crate) fn stream(self: &Arc<Self>) -> Open {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Open { load: Arc::clone(self), of: |load| &load.streams }
    }
}

/// Counts a stream or a connection as open until this guard is dropped.
pub(crate) struct Open {
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
    async fn a_new_connection_goes_to_the_worker_with_the_fewest_streams() {
        let (workers, tasks) = (Workers::start(3).unwrap(), TaskTracker::new());
        // Opens `count` connections with one stream each. Returns the names of the threads that serve them, and
        // senders: dropping a sender ends its connection.
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
        assert_eq!(places, ["worker-0", "worker-1", "worker-2"]);
        ends.extend(serve(3).await.1);
        // End both connections of `worker-0`. The next two connections go to that worker.
        drop((ends.remove(0), ends.remove(2)));
        while tasks.len() > 4 {
            tokio::task::yield_now().await;
        }
        let (places, _ends) = serve(2).await;
        assert_eq!(places, ["worker-0", "worker-0"]);
    }
}
