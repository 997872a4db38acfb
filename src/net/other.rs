//! Every call that is no Check: health checks, and what nobody serves. Handed to tonic's routes, body for body.
//!
//! Never reads or keeps a message.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body as TonicBody, service::Routes};
use tower_service::Service as _;

use super::call::UNAVAILABLE;

/// Serves one call, for as long as the peer wants its answers, or until `drain` where they would never end. Its message has
/// `limit` to come, as that of a check has.
pub(super) async fn serve(
    mut routes: Routes,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    limit: Duration,
    drain: CancellationToken,
) {
    let response = tokio::select! {
        response = timeout(limit, routes.call(request.map(Received))) => response,
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    let Ok(Ok(response)) = response else { return respond.send_reset(Reason::CANCEL) };
    let (head, body) = response.into_parts();
    let ends = body.is_end_stream();
    let Ok(mut stream) = respond.send_response(Response::from_parts(head, ()), ends) else { return };
    if ends {
        return;
    }
    match send(&mut stream, body, &drain).await {
        // A peer that is gone reads nothing.
        Sent::Whole | Sent::Gone => {}
        Sent::Broken => stream.send_reset(Reason::INTERNAL_ERROR),
    }
}

enum Sent {
    Whole,
    Gone,
    Broken,
}

async fn send(stream: &mut SendStream<Bytes>, mut body: TonicBody, drain: &CancellationToken) -> Sent {
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
                // As much as the peer takes: nothing piles up here.
                stream.reserve_capacity(data.len());
                while stream.capacity() < data.len() {
                    match poll_fn(|cx| stream.poll_capacity(cx)).await {
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

/// The body of a request.
struct Received(RecvStream);

impl Body for Received {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let body = &mut self.get_mut().0;
        if let Some(data) = ready!(body.poll_data(cx)) {
            return Poll::Ready(Some(data.and_then(|data| {
                body.flow_control().release_capacity(data.len())?;
                Ok(Frame::data(data))
            })));
        }
        let trailers = ready!(body.poll_trailers(cx));
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::trailers)).transpose())
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}
