//! Sends Check calls over HTTP/2 (RFC 9113) with prepared frames: the bytes that Envoy sends, at a fraction of the
//! cost.
//!
//! The client obeys the flow-control windows and the stream limit of the server. It sends a call again only if the
//! server reported, in a GOAWAY frame, that the call was not processed.

use std::{collections::VecDeque, rc::Rc};

use crate::{
    hpack::Decoder,
    keys::Keys,
    message::{self, KEY_BYTES, Outcome, Template},
    session::{Ended, Session, Ticket},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_BYTES: usize = 9;
/// The initial flow-control window of both sides, in bytes (section 6.5.2).
const FIRST_WINDOW: i64 = 65_535;
/// The flow-control windows of this client, in bytes. Envoy uses this size by default. The windows are so large that
/// the server does not have to wait before it sends an answer.
const OUR_WINDOW: u32 = 256 << 20;
/// After this stream number, the client opens a new connection. The maximum of HTTP/2 is 2^31 - 1.
const LAST_STREAM: u32 = 1 << 30;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// Flag of DATA and HEADERS frames: the sender sends no further frames on the stream.
const END_STREAM: u8 = 1;
/// Flag of SETTINGS and PING frames: the frame is an acknowledgement.
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// The first header block that Envoy 1.40 sends on a connection.
const FIRST_BLOCK: &[u8] = include_bytes!("../check_headers_first.bin");
/// Each later header block, which refers to entries in the dynamic table of the connection.
const LATER_BLOCK: &[u8] = include_bytes!("../check_headers_later.bin");
/// The byte positions of `:scheme` in these two blocks.
const SCHEME_AT: [usize; 2] = [42, 35];
/// `:scheme: http` (appendix A of RFC 7541).
const HTTP: u8 = 0x86;
/// `:scheme: https` (appendix A of RFC 7541).
const HTTPS: u8 = 0x87;
/// The size of the dynamic table that these blocks need, in bytes (section 4.1 of RFC 7541).
const TABLE_BYTES: u32 = 373;

/// A call as bytes, for the first call of a connection and for each later call. Before a call is sent, the stream
/// number and the key are written into the bytes.
pub(crate) struct Call {
    first: Shape,
    later: Shape,
}

struct Shape {
    bytes: Vec<u8>,
    data_at: usize,
    key_at: usize,
    window: i64,
}

impl Call {
    /// Creates a Check call with the message of `template`.
    pub(crate) fn of(template: &Template, is_tls: bool) -> Self {
        let shape = |block: &[u8], scheme_at: usize| {
            let mut block = block.to_vec();
            debug_assert_eq!(block[scheme_at], HTTP);
            block[scheme_at] = if is_tls { HTTPS } else { HTTP };
            let mut bytes = Vec::new();
            put_frame(&mut bytes, HEADERS, END_HEADERS, 0, &block);
            let data_at = bytes.len();
            put_frame(&mut bytes, DATA, END_STREAM, 0, &template.framed);
            let (key_at, window) = (data_at + FRAME_BYTES + template.key_at, template.framed.len() as u64);
            Shape { bytes, data_at, key_at, window: window.cast_signed() }
        };
        Self { first: shape(FIRST_BLOCK, SCHEME_AT[0]), later: shape(LATER_BLOCK, SCHEME_AT[1]) }
    }
}

fn put_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or_else(|_| unreachable!("our frames are short"));
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// The client side of an HTTP/2 connection.
pub(crate) struct Grpc {
    call: Rc<Call>,
    decoder: Decoder,
    streams_max: usize,
    next_stream: u32,
    /// The calls since the oldest open call, in the order of their stream numbers; `None` for a call that has ended.
    calls: VecDeque<Option<Open>>,
    in_flight: usize,
    /// The number of bytes that the server still accepts on the connection.
    window: i64,
    /// The number of bytes that the server accepts on a new stream.
    stream_window: i64,
    /// The number of bytes that were received since the last `WINDOW_UPDATE`.
    received: u32,
    is_ready: bool,
    /// True if no more calls may be sent on this connection.
    is_leaving: bool,
}

struct Open {
    ticket: Ticket,
    status: Option<u16>,
    outcome: Option<Outcome>,
    /// The part of the message that has arrived, if the message consists of several frames.
    part: Vec<u8>,
}

impl Grpc {
    /// Creates a connection with at most `streams_max` calls in flight.
    pub(crate) fn new(call: Rc<Call>, streams_max: usize) -> Self {
        Self {
            call,
            decoder: Decoder::default(),
            streams_max,
            next_stream: 1,
            calls: VecDeque::new(),
            in_flight: 0,
            window: FIRST_WINDOW,
            stream_window: FIRST_WINDOW,
            received: 0,
            is_ready: false,
            is_leaving: false,
        }
    }

    fn index_of(&self, stream: u32) -> Option<usize> {
        let oldest = self.next_stream - 2 * u32::try_from(self.calls.len()).ok()?;
        Some((stream.checked_sub(oldest)? / 2) as usize)
    }

    fn open(&mut self, stream: u32) -> Option<&mut Open> {
        let index = self.index_of(stream)?;
        self.calls.get_mut(index)?.as_mut()
    }

    fn take(&mut self, stream: u32) -> Option<Open> {
        let index = self.index_of(stream)?;
        let open = self.calls.get_mut(index)?.take()?;
        self.in_flight -= 1;
        while let Some(None) = self.calls.front() {
            self.calls.pop_front();
        }
        Some(open)
    }

    fn data(
        &mut self,
        frame: &Frame<'_>,
        keys: &Keys,
        out: &mut Vec<u8>,
        ended: &mut Vec<Ended>,
    ) -> Result<(), String> {
        self.received += u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
        if self.received > OUR_WINDOW / 4 {
            put_frame(out, WINDOW_UPDATE, 0, 0, &self.received.to_be_bytes());
            self.received = 0;
        }
        let payload = frame.content().ok_or("DATA frame with more padding than payload")?;
        let Some(open) = self.open(frame.stream) else { return Ok(()) };
        let trust = keys.trust(open.ticket.key);
        if open.part.is_empty() && is_whole(payload) {
            open.outcome = Some(message::read(payload, trust));
        } else if !payload.is_empty() {
            open.part.extend_from_slice(payload);
            if is_whole(&open.part) {
                open.outcome = Some(message::read(&open.part, trust));
            }
        }
        if frame.flags & END_STREAM != 0 {
            self.end(frame.stream, Outcome::Wrong("answer without a gRPC status"), ended);
        }
        Ok(())
    }

    fn headers(&mut self, frame: &Frame<'_>, ended: &mut Vec<Ended>) -> Result<(), String> {
        let mut block = frame.content().ok_or("HEADERS frame with more padding than payload")?;
        if frame.kind == HEADERS && frame.flags & PRIORITY != 0 {
            block = block.get(5..).ok_or("HEADERS frame without its priority fields")?;
        }
        if frame.flags & END_HEADERS == 0 || frame.kind == CONTINUATION {
            // In a block of several frames, only the first frame would have END_STREAM. No server answers checks with
            // 16 KiB of headers, so this client does not support such blocks.
            return Err("header block in several frames: not supported".to_owned());
        }
        let statuses = self.decoder.read(block).ok_or("invalid header block")?;
        let is_end = frame.flags & END_STREAM != 0;
        let Some(open) = self.open(frame.stream) else { return Ok(()) };
        open.status = open.status.or(statuses.status);
        if is_end {
            let outcome = match (open.status, statuses.grpc_status, open.outcome) {
                (Some(200), Some(0), Some(outcome)) => outcome,
                (Some(200), Some(0), None) => Outcome::Wrong("answer without a message or an error"),
                // UNAVAILABLE means that the server cannot decide.
                (Some(200), Some(14), None) => Outcome::Fault,
                (Some(200), ..) => Outcome::Wrong("gRPC error"),
                _ => Outcome::Wrong("HTTP status other than 200"),
            };
            self.end(frame.stream, outcome, ended);
        }
        Ok(())
    }

    fn end(&mut self, stream: u32, outcome: Outcome, ended: &mut Vec<Ended>) {
        if let Some(open) = self.take(stream) {
            ended.push(Ended::Answered(open.ticket, outcome));
        }
    }

    fn settings(&mut self, payload: &[u8]) -> Result<(), String> {
        for setting in payload.chunks_exact(6) {
            let [high, low, value @ ..] = setting else { continue };
            let value = u32::from_be_bytes(value.try_into().map_err(|_| "invalid SETTINGS frame")?);
            match u16::from_be_bytes([*high, *low]) {
                1 if value < TABLE_BYTES => {
                    return Err("SETTINGS_HEADER_TABLE_SIZE is too small for the prepared header blocks".to_owned());
                }
                3 => self.streams_max = self.streams_max.min(value as usize),
                4 => self.stream_window = i64::from(value),
                _ => {}
            }
        }
        if self.stream_window < self.call.later.window || self.streams_max == 0 {
            return Err("server settings too small for one call: stream window or number of streams".to_owned());
        }
        self.is_ready = true;
        Ok(())
    }

    fn leave(&mut self, payload: &[u8], ended: &mut Vec<Ended>) -> Result<(), String> {
        let (last, _) = payload.split_first_chunk::<4>().ok_or("GOAWAY frame without the last stream")?;
        let last = u32::from_be_bytes(*last) & 0x7fff_ffff;
        self.is_leaving = true;
        for stream in (1..self.next_stream).step_by(2).filter(|stream| *stream > last) {
            if let Some(open) = self.take(stream) {
                ended.push(Ended::NotProcessed(open.ticket));
            }
        }
        Ok(())
    }
}

/// True if `bytes` consist of exactly one complete gRPC message with its prefix.
fn is_whole(bytes: &[u8]) -> bool {
    matches!(bytes, [_, a, b, c, d, message @ ..] if u32::from_be_bytes([*a, *b, *c, *d]) as usize == message.len())
}

impl Session for Grpc {
    fn begin(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(PREFACE);
        let settings: Vec<u8> = [(2_u16, 0_u32), (4, OUR_WINDOW)] // 2: SETTINGS_ENABLE_PUSH
            .iter()
            .flat_map(|(number, value)| number.to_be_bytes().into_iter().chain(value.to_be_bytes()))
            .collect();
        put_frame(out, SETTINGS, 0, 0, &settings);
        let more = OUR_WINDOW - u32::try_from(FIRST_WINDOW).unwrap_or(0);
        put_frame(out, WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
    }

    fn is_ready(&self) -> bool {
        self.is_ready
    }

    fn has_room(&self) -> bool {
        self.is_ready && !self.is_leaving && self.in_flight < self.streams_max && self.window >= self.call.later.window
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn is_done(&self) -> bool {
        self.is_leaving && self.in_flight == 0
    }

    fn send(&mut self, ticket: Ticket, keys: &mut Keys, out: &mut Vec<u8>) {
        let stream = self.next_stream;
        let shape = if stream == 1 { &self.call.first } else { &self.call.later };
        let start = out.len();
        out.extend_from_slice(&shape.bytes);
        let call = &mut out[start..];
        for frame_at in [0, shape.data_at] {
            call[frame_at + 5..frame_at + FRAME_BYTES].copy_from_slice(&stream.to_be_bytes());
        }
        keys.put(ticket.key, &mut call[shape.key_at..shape.key_at + KEY_BYTES]);
        self.window -= shape.window;
        self.next_stream += 2;
        self.is_leaving |= self.next_stream > LAST_STREAM;
        self.calls.push_back(Some(Open { ticket, status: None, outcome: None, part: Vec::new() }));
        self.in_flight += 1;
    }

    fn receive(
        &mut self,
        input: &[u8],
        keys: &Keys,
        out: &mut Vec<u8>,
        ended: &mut Vec<Ended>,
    ) -> Result<usize, String> {
        let mut rest = input;
        while let Some((frame, after)) = Frame::split(rest) {
            rest = after;
            match frame.kind {
                DATA => self.data(&frame, keys, out, ended)?,
                HEADERS | CONTINUATION => self.headers(&frame, ended)?,
                RST_STREAM => self.end(frame.stream, Outcome::Wrong("stream reset"), ended),
                SETTINGS if frame.flags & ACK == 0 => {
                    self.settings(frame.payload)?;
                    put_frame(out, SETTINGS, ACK, 0, &[]);
                }
                PING if frame.flags & ACK == 0 => put_frame(out, PING, ACK, 0, frame.payload),
                GOAWAY => self.leave(frame.payload, ended)?,
                WINDOW_UPDATE if frame.stream == 0 => {
                    let more = frame.payload.try_into().map(u32::from_be_bytes);
                    self.window += i64::from(more.map_err(|_| "WINDOW_UPDATE frame without its increment")?);
                }
                _ => {}
            }
        }
        Ok(input.len() - rest.len())
    }

    fn abandon(&mut self, ended: &mut Vec<Ended>) {
        self.is_leaving = true;
        self.in_flight = 0;
        let why = Outcome::Wrong("connection ended before the answer");
        ended.extend(self.calls.drain(..).flatten().map(|open| Ended::Answered(open.ticket, why)));
    }
}

struct Frame<'i> {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: &'i [u8],
}

impl<'i> Frame<'i> {
    /// Returns the first frame of `input` and the bytes after this frame; `None` if the frame is incomplete.
    fn split(input: &'i [u8]) -> Option<(Self, &'i [u8])> {
        let (head, rest) = input.split_first_chunk::<FRAME_BYTES>()?;
        let [a, b, c, kind, flags, stream @ ..] = *head;
        let (payload, rest) = rest.split_at_checked(u32::from_be_bytes([0, a, b, c]) as usize)?;
        Some((Self { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff, payload }, rest))
    }

    /// Returns the payload without its padding; `None` if the padding is invalid.
    fn content(&self) -> Option<&'i [u8]> {
        if self.flags & PADDED == 0 || self.kind == CONTINUATION {
            return Some(self.payload);
        }
        let (padding, content) = self.payload.split_first()?;
        content.get(..content.len().checked_sub(usize::from(*padding))?)
    }
}
