//! HTTP/1.1 for tests: a client, and an upstream application that answers each request with the path and the headers
//! that it received.

use std::{
    collections::BTreeMap,
    error::Error,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router, extract::Request, serve::ListenerExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

/// One connection to a server.
pub type Connection = http1::SendRequest<Full<Bytes>>;

/// An HTTP response.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// The values by lower-case header name. Values of headers with the same name are joined with commas.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    /// Returns the value of a header that the [`application`] received. Returns `None` if the application did not
    /// receive the header, and also if the response is not from the application.
    pub fn saw_or_none(&self, header: &str) -> Option<String> {
        let seen: Value = serde_json::from_str(&self.body).ok()?;
        seen["headers"][header].as_str().map(str::to_owned)
    }

    /// Returns the value of a header that the [`application`] received, or `None` if the application did not receive
    /// it.
    ///
    /// # Panics
    /// If the response is not from the application.
    pub fn saw(&self, header: &str) -> Option<String> {
        let seen = serde_json::from_str::<Value>(&self.body);
        let seen = seen.unwrap_or_else(|_| panic!("not a response from the application: {self:?}"));
        seen["headers"][header].as_str().map(str::to_owned)
    }
}

/// A connection error or a request error.
pub type HttpError = Box<dyn Error + Send + Sync>;

/// Connects to `server`.
pub async fn connect(server: SocketAddr) -> Result<Connection, HttpError> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // The task ends when `sender` is dropped. Requests on `sender` return connection errors.
    tokio::spawn(connection);
    Ok(sender)
}

/// Sends a GET request for `path` on a connection that is ready for a request.
pub async fn ask(connection: &mut Connection, path: &str, headers: &[(&str, &str)]) -> Result<Answer, HttpError> {
    let mut request = hyper::Request::get(path).header("host", "service.example");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(connection, request.body(Full::default()).expect("a request")).await
}

/// Sends `request` on a connection that is ready for a request.
pub async fn send(connection: &mut Connection, request: hyper::Request<Full<Bytes>>) -> Result<Answer, HttpError> {
    let answer = connection.send_request(request).await?;
    let (head, body) = answer.into_parts();
    let mut joined = BTreeMap::<String, String>::new();
    for (name, value) in &head.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        joined
            .entry(name.as_str().to_owned())
            .and_modify(|before| *before = format!("{before},{value}"))
            .or_insert_with(|| value.clone().into_owned());
    }
    let body = String::from_utf8_lossy(&body.collect().await?.to_bytes()).into_owned();
    Ok(Answer { status: head.status.as_u16(), headers: joined, body })
}

/// Sends a GET request for `path` on a new connection.
///
/// # Panics
/// If the server sends no response.
pub async fn get(server: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut connection = connect(server).await.unwrap_or_else(|error| panic!("{server}: {error}"));
    ask(&mut connection, path, headers).await.unwrap_or_else(|error| panic!("{server}{path}: {error}"))
}

/// Like [`get`], but returns `None` if the server sends no response, for example because no server listens.
pub async fn try_get(server: SocketAddr, path: &str) -> Option<Answer> {
    ask(&mut connect(server).await.ok()?, path, &[]).await.ok()
}

/// Starts an application that answers each request with the request's path and headers, as JSON, and returns its
/// address. The application ends with the test.
pub async fn application() -> SocketAddr {
    counting_application().await.0
}

/// Like [`application`], but also returns a counter of the requests that have reached the application.
pub async fn counting_application() -> (SocketAddr, Arc<AtomicUsize>) {
    let reached = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&reached);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let routes = Router::new().fallback(move |request| {
        counter.fetch_add(1, Ordering::Relaxed);
        async move { echo(&request) }
    });
    tokio::spawn(axum::serve(listener, routes).into_future());
    (address, reached)
}

fn echo(request: &Request) -> String {
    let mut headers = BTreeMap::<&str, String>::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes());
        headers
            .entry(name.as_str())
            .and_modify(|before| *before = format!("{before},{value}"))
            .or_insert_with(|| value.clone().into_owned());
    }
    json!({"path": request.uri().to_string(), "headers": headers}).to_string()
}
