//! Sends requests over HTTP/1.1, to measure a server behind Envoy. Like most clients, sends one request at a time on
//! each connection.
//!
//! Status 200 is a grant, 401 and 403 are denials, and 503 is a fault. An answer without `content-length` makes the run
//! fail.

use std::rc::Rc;

use crate::{
    keys::Keys,
    message::{KEY_BYTES, Outcome, PLACEHOLDER},
    session::{Ended, Session, Ticket},
};

/// A request as bytes.
pub(crate) struct Request {
    bytes: Vec<u8>,
    /// The position of the key in the bytes, if the request contains a key.
    key_at: Option<usize>,
}

impl Request {
    /// Creates a GET request for `path`.
    pub(crate) fn of(path: &str, with_key: bool) -> Self {
        let mut bytes = format!("GET {path} HTTP/1.1\r\nhost: service.example\r\nuser-agent: load\r\naccept: */*\r\n");
        let key_at = with_key.then(|| {
            bytes.push_str("x-api-key: ");
            let key_at = bytes.len();
            bytes.push_str(&String::from_utf8_lossy(PLACEHOLDER));
            bytes.push_str("\r\n");
            key_at
        });
        bytes.push_str("\r\n");
        Self { bytes: bytes.into_bytes(), key_at }
    }
}

/// The client side of an HTTP/1.1 connection.
pub(crate) struct Http1 {
    request: Rc<Request>,
    waiting: Option<Ticket>,
    is_leaving: bool,
}

impl Http1 {
    /// Creates a connection that sends `request`.
    pub(crate) const fn new(request: Rc<Request>) -> Self {
        Self { request, waiting: None, is_leaving: false }
    }
}

impl Session for Http1 {
    fn begin(&mut self, _: &mut Vec<u8>) {}

    fn is_ready(&self) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        self.waiting.is_none() && !self.is_leaving
    }

    fn in_flight(&self) -> usize {
        usize::from(self.waiting.is_some())
    }

    fn is_done(&self) -> bool {
        self.is_leaving && self.waiting.is_none()
    }

    fn send(&mut self, ticket: Ticket, keys: &mut Keys, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.request.bytes);
        if let Some(key_at) = self.request.key_at {
            keys.put(ticket.key, &mut out[start + key_at..start + key_at + KEY_BYTES]);
        }
        self.waiting = Some(ticket);
    }

    fn receive(&mut self, input: &[u8], _: &Keys, _: &mut Vec<u8>, ended: &mut Vec<Ended>) -> Result<usize, String> {
        let Some(head_bytes) = input.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4) else {
            return Ok(0);
        };
        let head = std::str::from_utf8(&input[..head_bytes]).map_err(|_| "answer with a head that is not UTF-8")?;
        let status = head.get(9..12).unwrap_or_default();
        let length = header(head, "content-length").and_then(|length| length.parse::<usize>().ok());
        let whole = head_bytes + length.ok_or("answer without content-length")?;
        if input.len() < whole {
            return Ok(0);
        }
        let outcome = match status {
            "200" => Outcome::Grant,
            "401" | "403" => Outcome::Denial,
            "503" => Outcome::Fault,
            _ => Outcome::Wrong("HTTP status other than 200, 401, 403 and 503"),
        };
        let ticket = self.waiting.take().ok_or("answer without a request")?;
        ended.push(Ended::Answered(ticket, outcome));
        self.is_leaving = header(head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        Ok(whole)
    }

    fn abandon(&mut self, ended: &mut Vec<Ended>) {
        self.is_leaving = true;
        let why = Outcome::Wrong("connection ended before the answer");
        ended.extend(self.waiting.take().map(|ticket| Ended::Answered(ticket, why)));
    }
}

fn header<'h>(head: &'h str, wanted: &str) -> Option<&'h str> {
    let mut headers = head.lines().filter_map(|line| line.split_once(':'));
    headers.find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim())
}
