//! Serves health checks (`grpc.health.v1`): reads the message within limits, then lets tonic's service answer.

use std::{future::poll_fn, net::IpAddr, time::Duration};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Full};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower_service::Service as _;

use super::{
    answer::{CallAnswer, UNAVAILABLE, answer},
    body::{BodyError, MessageReader},
    rpc::Rpc,
    service::Service,
};
use crate::ext_authz::{decision::DenyReason, framing::frame_bytes};

/// Maximum size of a request message, in bytes. The message contains only the name of a service.
const MESSAGE_BYTES_MAX: u64 = 512;
impl Service {
    /// Serves one health check or watch. A watch lasts until the peer ends it or `drain` is cancelled.
    pub(crate) async fn check_health(
        &self,
        rpc: Rpc,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        peer: Option<IpAddr>,
        drain: CancellationToken,
    ) {
        let (method, path) = (request.method().clone(), request.uri().clone());
        let headers = request.headers().clone();
        let mut reader = MessageReader::new(request, MESSAGE_BYTES_MAX);
        let read = timeout(self.limits.preface_timeout, poll_fn(|cx| reader.poll(cx))).await;
        let answer = |respond, found| answer(respond, found, &self.unread);
        let message = match read {
            Ok(Ok(message)) => message,
            Ok(Err(BodyError::Gone)) => return,
            Ok(Err(BodyError::Denied(DenyReason::TooLarge))) => {
                return answer(respond, CallAnswer::Status(StatusCode::PAYLOAD_TOO_LARGE));
            }
            Ok(Err(_)) => return answer(respond, self.not_grpc(StatusCode::BAD_REQUEST, peer)),
            Err(_) => return answer(respond, CallAnswer::Status(StatusCode::REQUEST_TIMEOUT)),
        };
        let mut call = Request::new(Full::new(frame_bytes(&message)));
        (*call.method_mut(), *call.uri_mut(), *call.headers_mut()) = (method, path, headers);
        // `poll_ready` is not needed: tonic's health service is always ready and answers without waiting.
        let Ok(response) = self.health.routes.clone().call(call).await;
        let (head, body) = response.into_parts();
        let ends = body.is_end_stream();
        let Ok(mut stream) = respond.send_response(Response::from_parts(head, ()), ends) else { return };
        if ends {
            return;
        }
        // A watch has no timeout: the client decides when to end it. The answer to a check has a timeout, so that a
        // client that does not read the answer cannot occupy a permit indefinitely.
        let limit = if rpc == Rpc::HealthWatch { Duration::MAX } else { self.limits.preface_timeout };
        match timeout(limit, send(&mut stream, body, &drain)).await {
            // `Gone` needs no reset: the peer has reset the stream or disconnected, or the server is draining.
            Ok(Sent::Whole | Sent::Gone) => {}
            Ok(Sent::Broken) => stream.send_reset(Reason::INTERNAL_ERROR),
            Err(_) => stream.send_reset(Reason::CANCEL),
        }
    }
}

enum Sent {
    Whole,
    Gone,
    Broken,
}

async fn send(stream: &mut SendStream<Bytes>, mut body: Body, drain: &CancellationToken) -> Sent {
    loop {
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            () = drain.cancelled() => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert("grpc-status", UNAVAILABLE);
                return if stream.send_trailers(trailers).is_ok() { Sent::Whole } else { Sent::Gone };
            }
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return Sent::Gone,
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return Sent::Broken,
            None => return if stream.send_data(Bytes::new(), true).is_ok() { Sent::Whole } else { Sent::Gone },
        };
        match frame.into_data() {
            Ok(data) => {
                // Send only what the peer's window allows, so that h2 queues nothing.
                stream.reserve_capacity(data.len());
                while stream.capacity() < data.len() {
                    let capacity = tokio::select! {
                        capacity = poll_fn(|cx| stream.poll_capacity(cx)) => capacity,
                        () = drain.cancelled() => return Sent::Gone,
                    };
                    match capacity {
                        Some(Ok(_)) => {}
                        Some(Err(_)) | None => return Sent::Gone,
                    }
                }
                if stream.send_data(data, false).is_err() {
                    return Sent::Gone;
                }
            }
            Err(frame) => {
                let Ok(trailers) = frame.into_trailers() else { continue };
                return if stream.send_trailers(trailers).is_ok() { Sent::Whole } else { Sent::Gone };
            }
        }
    }
}
