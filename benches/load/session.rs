//! The interface between the sender and a protocol: room for requests, bytes to send, and outcomes of earlier requests.

use crate::{keys::Keys, message::Outcome};

/// One check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// When it was due, in nanoseconds since the start. Its time counts from then on.
    pub(crate) due: u64,
    /// The index of its key.
    pub(crate) key: u32,
}

/// How a check ended.
pub(crate) enum Ended {
    /// The server answered, or the answer cannot arrive any more.
    Answered(Ticket, Outcome),
    /// The server closes the connection and did not process the check: send it on another connection.
    NotProcessed(Ticket),
}

/// The client side of a protocol on one connection. It does not read or write the socket.
pub(crate) trait Session {
    /// Appends the first bytes to send.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// True if requests can be sent: over HTTP/2, after the server has sent its settings.
    fn is_ready(&self) -> bool;
    /// True if another request can be sent now.
    fn has_room(&self) -> bool;
    /// The number of requests without an answer.
    fn in_flight(&self) -> usize;
    /// True if the connection accepts no more requests and all requests are answered, so that it can be replaced.
    fn is_done(&self) -> bool;
    /// Appends a request to `out`. May only be called if [`Self::has_room`] is true.
    fn send(&mut self, ticket: Ticket, keys: &mut Keys, out: &mut Vec<u8>);
    /// Processes the complete messages in `input`; returns the number of bytes processed. The next call gets the rest
    /// again, with the bytes that follow.
    ///
    /// # Errors
    /// If the server violates the protocol.
    fn receive(
        &mut self,
        input: &[u8],
        keys: &Keys,
        out: &mut Vec<u8>,
        ended: &mut Vec<Ended>,
    ) -> Result<usize, String>;
    /// Ends all requests that have no answer, because the connection has ended.
    fn abandon(&mut self, ended: &mut Vec<Ended>);
}
