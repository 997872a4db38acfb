//! Handles one call: reads its message, gets the decision and sends the answer.
//!
//! If L1 has a usable entry, the connection's task answers the check directly: the task neither spawns another task nor
//! waits.

use std::{
    future::{Future, poll_fn},
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Request, StatusCode};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    answer::{CallAnswer, answer, answer_unless_reset, send},
    body::{BodyError, MessageReader},
    refused::Reason,
    rpc::Rpc,
    service::Service,
    worker::WorkerLoad,
};
use crate::ext_authz::{
    check::{Progress, Waiting},
    response::Reply,
};

/// Serves the calls of one connection.
pub(crate) struct Calls {
    service: Arc<Service>,
    peer: Option<IpAddr>,
    tasks: TaskTracker,
    load: Arc<WorkerLoad>,
    drain: CancellationToken,
}

impl Calls {
    /// Creates the handler for calls from `peer`. Checks that cannot be answered at once run in `tasks` and count in
    /// `load`. Health watches end when `drain` is cancelled.
    pub(crate) const fn new(
        service: Arc<Service>,
        peer: Option<IpAddr>,
        tasks: TaskTracker,
        load: Arc<WorkerLoad>,
        drain: CancellationToken,
    ) -> Self {
        Self { service, peer, tasks, load, drain }
    }

    /// Answers a call at once, or spawns a task that answers it.
    pub(crate) fn serve(&self, cx: &mut Context<'_>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        match Rpc::of(&request) {
            Ok(Rpc::Check) => self.check(cx, request, respond),
            Ok(rpc @ (Rpc::HealthCheck | Rpc::HealthWatch)) => {
                let (service, peer, drain) = (Arc::clone(&self.service), self.peer, self.drain.clone());
                let Some(permit) = service.health.admit(rpc) else {
                    return answer(respond, CallAnswer::Status(StatusCode::SERVICE_UNAVAILABLE), &self.service.unread);
                };
                // Health calls do not count in `load`: a watch stays open for hours but causes almost no work.
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
                    return answer(respond, CallAnswer::Status(StatusCode::SERVICE_UNAVAILABLE), &service.unread);
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
                    let work = async move { CallAnswer::Reply(service.finish(message, waiting, permit).await) };
                    answer_unless_reset(respond, work, &unread).await;
                });
            }
        }
    }

    fn spawn(&self, call: impl Future<Output = ()> + Send + 'static) {
        let open = self.load.stream();
        // The task runs on the connection's worker, because this method is called on that worker.
        self.tasks.spawn(async move {
            call.await;
            drop(open);
        });
    }
}

impl Service {
    /// Reads the remaining bytes of an incomplete message and decides the check. `unfinished` is the permit for the
    /// incomplete message.
    async fn read(
        &self,
        mut reader: MessageReader,
        unfinished: OwnedSemaphorePermit,
        peer: Option<IpAddr>,
    ) -> CallAnswer {
        let mut reserved = self.budget.reserve_nothing();
        let read = poll_fn(|cx| {
            let message = reader.poll(cx);
            if reserved.grow_to(reader.bytes()) {
                return message;
            }
            Poll::Ready(Err(BodyError::NoRoom { is_whole: matches!(message, Poll::Ready(Ok(_))) }))
        });
        let message = match timeout(self.limits.preface_timeout, read).await {
            Ok(Ok(message)) => message,
            Ok(Err(error)) => return self.refuse(error, &reader, peer),
            Err(_) => {
                self.checker.late(self.limits.preface_timeout);
                return CallAnswer::Status(StatusCode::REQUEST_TIMEOUT);
            }
        };
        drop(unfinished);
        CallAnswer::Reply(match self.checker.try_decide(&message) {
            Progress::Done(reply) => reply,
            Progress::Pending(waiting) => match self.checks.try_acquire() {
                // Box the future, so that the call's task stays small while the message is incomplete.
                Ok(_permit) => Box::pin(self.checker.finish(&message, waiting)).await,
                Err(_) => self.checker.shed("limits.checks_in_flight"),
            },
        })
    }

    /// Finishes a pending check while holding `_permit`. First reserves memory for the message: `Calls::check` reserved
    /// none, because the message was complete at once.
    async fn finish(&self, message: Bytes, waiting: Waiting, _permit: OwnedSemaphorePermit) -> Reply {
        let Some(_reserved) = self.budget.reserve(message.len()) else { return self.over_budget() };
        self.checker.finish(&message, waiting).await
    }

    fn over_budget(&self) -> Reply {
        self.checker.shed("limits.messages_in_flight_size")
    }

    fn refuse(&self, error: BodyError, reader: &MessageReader, peer: Option<IpAddr>) -> CallAnswer {
        match error {
            BodyError::Denied(reason) => CallAnswer::Reply(self.checker.refuse(reason)),
            BodyError::Compressed => CallAnswer::Reply(self.checker.compressed(reader.encoding())),
            BodyError::NoRoom { is_whole: true } => CallAnswer::Reply(self.over_budget()),
            BodyError::NoRoom { is_whole: false } => {
                self.over_budget(); // counts and logs the fault
                CallAnswer::Status(StatusCode::SERVICE_UNAVAILABLE)
            }
            BodyError::Incomplete => self.not_grpc(StatusCode::BAD_REQUEST, peer),
            BodyError::Gone => {
                self.checker.abandoned();
                CallAnswer::Nothing
            }
        }
    }

    /// Counts and logs a request that does not call a gRPC method of this server. Returns an answer with `status`.
    pub(crate) fn not_grpc(&self, status: StatusCode, peer: Option<IpAddr>) -> CallAnswer {
        self.refuse_peer(Reason::NotGrpc, peer, format_args!("answered with HTTP {status}"));
        CallAnswer::Status(status)
    }
}
