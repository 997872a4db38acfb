//! One call: a message in, a decision, an answer out.
//!
//! A check that is answered out of this process is answered where it was read, without a task, a lock or a wait.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Service,
    body::{Reading, Refused},
    core::Load,
    other,
};
use crate::{
    check::{Begun, Waiting},
    wire::{grpc::CHECK_PATH, response::Reply},
};

/// The status of gRPC for what may be tried elsewhere, or again.
pub(super) const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// Serves the calls of one connection.
pub(super) struct Calls {
    service: Arc<Service>,
    tasks: TaskTracker,
    load: Arc<Load>,
    drain: CancellationToken,
}

impl Calls {
    /// Calls that wait do so in `tasks` and are counted in `load`. Those that would never end do at `drain`.
    pub(super) const fn new(
        service: Arc<Service>,
        tasks: TaskTracker,
        load: Arc<Load>,
        drain: CancellationToken,
    ) -> Self {
        Self { service, tasks, load, drain }
    }

    /// Answers a call, or lets it go on in a task.
    pub(super) fn serve(&self, cx: &mut Context<'_>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        if request.uri().path() != CHECK_PATH {
            let (routes, limit) = (self.service.others.clone(), self.service.limits.preface_timeout);
            return self.spawn(other::serve(routes, request, respond, limit, self.drain.clone()));
        }
        let mut reading = Reading::new(request.into_body(), &self.service.limits);
        let service = Arc::clone(&self.service);
        let message = match reading.poll(cx) {
            Poll::Ready(Ok(message)) => message,
            Poll::Ready(Err(refused)) => return answer(respond, service.refuse(&refused)),
            Poll::Pending => return self.spawn(unless_reset(respond, async move { service.read(reading).await })),
        };
        match self.service.checker.begin(&message) {
            Begun::Answered(reply) => answer(respond, reply),
            Begun::Waits(waiting) => {
                self.spawn(unless_reset(respond, async move { service.go_on(message, waiting).await }));
            }
        }
    }

    fn spawn(&self, call: impl Future<Output = ()> + Send + 'static) {
        let open = self.load.stream();
        // On the core of the connection: this is called there.
        self.tasks.spawn(async move {
            call.await;
            drop(open);
        });
    }
}

impl Service {
    /// Reads the rest of a message and decides it. Whatever the bytes are, the answer is a `CheckResponse`.
    async fn read(&self, mut reading: Reading) -> Reply {
        let mut held = self.room.hold_nothing();
        let read = poll_fn(|cx| {
            let message = reading.poll(cx);
            if held.grow_to(reading.bytes()) { message } else { Poll::Ready(Err(Refused::NoRoom)) }
        });
        let message = match timeout(self.limits.preface_timeout, read).await {
            Ok(Ok(message)) => message,
            Ok(Err(refused)) => return self.refuse(&refused),
            // It came late, or this process did not run: nothing is known of what it says.
            Err(_) => return self.checker.late(self.limits.preface_timeout),
        };
        match self.checker.begin(&message) {
            Begun::Answered(reply) => reply,
            Begun::Waits(waiting) => self.wait(&message, waiting).await,
        }
    }

    /// Lets a check whose message was not counted yet wait.
    async fn go_on(&self, message: Bytes, waiting: Waiting) -> Reply {
        let Some(_held) = self.room.hold(message.len()) else { return self.refuse(&Refused::NoRoom) };
        self.wait(&message, waiting).await
    }

    async fn wait(&self, message: &[u8], waiting: Waiting) -> Reply {
        let Ok(_permit) = self.checks.try_acquire() else { return self.checker.shed("limits.checks_in_flight") };
        self.checker.go_on(message, waiting).await
    }

    fn refuse(&self, refused: &Refused) -> Reply {
        match refused {
            Refused::Denied(reason) => self.checker.refuse(*reason),
            Refused::NoRoom => self.checker.shed("limits.messages_in_flight_size"),
        }
    }
}

/// Answers with what `work` comes to. Where the peer resets the stream before, nobody waits for it any more.
async fn unless_reset(mut respond: SendResponse<Bytes>, work: impl Future<Output = Reply>) {
    let reply = tokio::select! {
        reply = work => reply,
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    answer(respond, reply);
}

/// Sends `reply`. What cannot be sent has nobody left to read it.
fn answer(mut respond: SendResponse<Bytes>, reply: Reply) {
    let mut response = Response::new(());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    match reply {
        Reply::Message(message) => {
            let Ok(mut stream) = respond.send_response(response, false) else { return };
            if stream.send_data(message, false).is_ok() {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                let _ = stream.send_trailers(trailers);
            }
        }
        // Trailers-Only: the status stands in the headers and nothing follows.
        Reply::Unavailable => {
            let headers = response.headers_mut();
            headers.insert("grpc-status", UNAVAILABLE);
            headers.insert("grpc-message", HeaderValue::from_static("the request could not be decided"));
            let _ = respond.send_response(response, true);
        }
    }
}
