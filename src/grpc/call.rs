//! One call: a message in, a decision, an answer out.
//!
//! A check that L1 can answer is answered where it was read, without a task, a lock or a wait.

use std::{
    future::{Future, poll_fn},
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason as ResetReason, RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Service,
    body::{BodyError, MessageReader},
    refused::Reason,
    rpc::Rpc,
    worker::WorkerLoad,
};
use crate::ext_authz::{
    check::{Progress, Waiting},
    response::Reply,
};

/// The status of gRPC for what may be tried elsewhere, or again.
pub(crate) const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// Serves the calls of one connection.
pub(crate) struct Calls {
    service: Arc<Service>,
    peer: Option<IpAddr>,
    tasks: TaskTracker,
    load: Arc<WorkerLoad>,
    drain: CancellationToken,
}

impl Calls {
    /// Serves calls from `peer`. Checks that cannot be answered at once run in `tasks` and count in `load`. Health watches end at
    /// `drain`.
    pub(crate) const fn new(
        service: Arc<Service>,
        peer: Option<IpAddr>,
        tasks: TaskTracker,
        load: Arc<WorkerLoad>,
        drain: CancellationToken,
    ) -> Self {
        Self { service, peer, tasks, load, drain }
    }

    /// Answers a call at once, or spawns a task that does.
    pub(crate) fn serve(&self, cx: &mut Context<'_>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        match Rpc::of(&request) {
            Ok(Rpc::Check) => self.check(cx, request, respond),
            Ok(rpc @ (Rpc::HealthCheck | Rpc::HealthWatch)) => {
                let (service, peer, drain) = (Arc::clone(&self.service), self.peer, self.drain.clone());
                let Some(permit) = service.health.admit(rpc) else {
                    return answer(respond, Answer::Status(StatusCode::SERVICE_UNAVAILABLE), &self.service.unread);
                };
                // Not counted in `load`: a watch is open for hours and does nothing.
                self.tasks.spawn(async move {
                    service.check_health(rpc, request, respond, peer, drain).await;
                    drop(permit);
                });
            }
            Err(status) => answer(respond, self.service.not_grpc(status, self.peer), &self.service.unread),
        }
    }

    fn check(&self, cx: &mut Context<'_>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let service = &self.service;
        let mut reader = MessageReader::new(request, service.limits.message_size.bytes());
        let message = match reader.poll(cx) {
            Poll::Ready(Ok(message)) => message,
            Poll::Ready(Err(error)) => {
                return answer(respond, service.refuse(error, &reader, self.peer), &service.unread);
            }
            Poll::Pending => {
                let Ok(permit) = Arc::clone(&service.unfinished).try_acquire_owned() else {
                    service.checker.shed("unfinished messages");
                    return answer(respond, Answer::Status(StatusCode::SERVICE_UNAVAILABLE), &service.unread);
                };
                let (service, peer) = (Arc::clone(service), self.peer);
                return self.spawn(async move {
                    let unread = Arc::clone(&service.unread);
                    let work = async move { service.read(reader, permit, peer).await };
                    answer_unless_reset(respond, work, &unread).await;
                });
            }
        };
        match service.checker.try_decide(&message) {
            Progress::Done(reply) => send(respond, reply, &service.unread),
            Progress::Pending(waiting) => {
                let Ok(permit) = Arc::clone(&service.checks).try_acquire_owned() else {
                    return send(respond, service.checker.shed("limits.checks_in_flight"), &service.unread);
                };
                let service = Arc::clone(service);
                self.spawn(async move {
                    let unread = Arc::clone(&service.unread);
                    let work = async move { Answer::Reply(service.finish(message, waiting, permit).await) };
                    answer_unless_reset(respond, work, &unread).await;
                });
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

/// What a caller gets.
pub(crate) enum Answer {
    /// The answer of a check: HTTP 200 and gRPC.
    Reply(Reply),
    /// An HTTP error: no whole gRPC call has arrived, and 200 would be a grant to an HTTP caller.
    Status(StatusCode),
    /// Nothing: the caller has left.
    Nothing,
}

impl Service {
    /// Reads the rest of a message, which `unfinished` permits, and decides it.
    async fn read(&self, mut reader: MessageReader, unfinished: OwnedSemaphorePermit, peer: Option<IpAddr>) -> Answer {
        let mut held = self.budget.reserve_nothing();
        let read = poll_fn(|cx| {
            let message = reader.poll(cx);
            if held.grow_to(reader.bytes()) {
                return message;
            }
            Poll::Ready(Err(BodyError::NoRoom { is_whole: matches!(message, Poll::Ready(Ok(_))) }))
        });
        let message = match timeout(self.limits.preface_timeout, read).await {
            Ok(Ok(message)) => message,
            Ok(Err(error)) => return self.refuse(error, &reader, peer),
            Err(_) => {
                self.checker.late(self.limits.preface_timeout);
                return Answer::Status(StatusCode::REQUEST_TIMEOUT);
            }
        };
        drop(unfinished);
        Answer::Reply(match self.checker.try_decide(&message) {
            Progress::Done(reply) => reply,
            Progress::Pending(waiting) => match self.checks.try_acquire() {
                // On the heap, so that the task of a call whose message has not arrived stays small.
                Ok(_permit) => Box::pin(self.checker.finish(&message, waiting)).await,
                Err(_) => self.checker.shed("limits.checks_in_flight"),
            },
        })
    }

    /// Decides a check that has to wait, which `_permit` allows. Its message was not counted yet.
    async fn finish(&self, message: Bytes, waiting: Waiting, _permit: OwnedSemaphorePermit) -> Reply {
        let Some(_held) = self.budget.reserve(message.len()) else { return self.over_budget() };
        self.checker.finish(&message, waiting).await
    }

    fn over_budget(&self) -> Reply {
        self.checker.shed("limits.messages_in_flight_size")
    }

    fn refuse(&self, error: BodyError, reader: &MessageReader, peer: Option<IpAddr>) -> Answer {
        match error {
            BodyError::Denied(reason) => Answer::Reply(self.checker.refuse(reason)),
            BodyError::Compressed => Answer::Reply(self.checker.compressed(reader.encoding())),
            BodyError::NoRoom { is_whole: true } => Answer::Reply(self.over_budget()),
            BodyError::NoRoom { is_whole: false } => {
                self.over_budget(); // counted and logged
                Answer::Status(StatusCode::SERVICE_UNAVAILABLE)
            }
            BodyError::Incomplete => self.not_grpc(StatusCode::BAD_REQUEST, peer),
            BodyError::Gone => {
                self.checker.abandoned();
                Answer::Nothing
            }
        }
    }

    /// Counts a request that is not a gRPC call of a method that this server has.
    pub(crate) fn not_grpc(&self, status: StatusCode, peer: Option<IpAddr>) -> Answer {
        self.refuse_peer(Reason::NotGrpc, peer, format_args!("answered with HTTP {status}"));
        Answer::Status(status)
    }
}

/// Sends what `work` returns, unless the peer resets the stream before.
async fn answer_unless_reset(
    mut respond: SendResponse<Bytes>,
    work: impl Future<Output = Answer>,
    unread: &Arc<Semaphore>,
) {
    let found = tokio::select! {
        biased; // `work` reads the body and counts a caller that left
        answer = work => answer,
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    answer(respond, found, unread);
}

/// Sends `answer`. A failure to send is ignored: the peer has left. `unread`: permits for answers that the peer does not read.
pub(crate) fn answer(mut respond: SendResponse<Bytes>, answer: Answer, unread: &Arc<Semaphore>) {
    match answer {
        Answer::Reply(reply) => send(respond, reply, unread),
        Answer::Status(status) => {
            let mut response = Response::new(());
            *response.status_mut() = status;
            if status == StatusCode::METHOD_NOT_ALLOWED {
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
            }
            let _ = respond.send_response(response, true);
        }
        Answer::Nothing => {}
    }
}

/// An answer that waits until the peer opens its flow-control window. The message is copied: a slice would keep the larger shared buffer
/// allocated for as long as the peer does not read.
struct Unread {
    message: Box<[u8]>,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.message
    }
}

/// Sends `reply`. If the peer's flow-control window is too small, h2 queues the answer. If `UNREAD_MAX` answers are queued already, resets
/// the stream.
fn send(mut respond: SendResponse<Bytes>, reply: Reply, unread: &Arc<Semaphore>) {
    let mut response = Response::new(());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    match reply {
        Reply::Message(message) => {
            let Ok(mut stream) = respond.send_response(response, false) else { return };
            stream.reserve_capacity(message.len());
            let message = if stream.capacity() >= message.len() {
                message
            } else if let Ok(permit) = Arc::clone(unread).try_acquire_owned() {
                Bytes::from_owner(Unread { message: message.as_ref().into(), _permit: permit })
            } else {
                return stream.send_reset(ResetReason::ENHANCE_YOUR_CALM);
            };
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
