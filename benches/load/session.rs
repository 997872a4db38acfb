//! The interface between the load loop and a protocol. A session accepts requests and received bytes, and produces
//! bytes to send and the outcomes of requests.

use crate::{keys::Keys, message::Outcome};

/// One check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// When the check was due, in nanoseconds since the start. The time of the check counts from this moment.
    pub(crate) due: u64,
    /// The index of the key in [`Keys`].
    pub(crate) key: u32,
}

/// How a check ended.
pub(crate) enum Ended {
    /// The server answered, or the answer can no longer arrive.
    Answered(Ticket, Outcome),
    /// The server is closing the connection and did not process the check: send the check on another connection.
    NotProcessed(Ticket),
}

/// The client side of a protocol on one connection. A session does not access the socket.
pub(crate) trait Session {
    /// Appends the first bytes to send.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// True if requests can be sent: over HTTP/2, after the server has sent its settings.
    fn is_ready(&self) -> bool;
    /// True if another request can be sent now.
    fn has_room(&self) -> bool;
    /// Returns the number of requests without an answer.
    fn in_flight(&self) -> usize;
    /// True if the connection accepts no more requests and all requests are answered, so that it can be replaced.
    fn is_done(&self) -> bool;
    /// Appends a request to `out`. May only be called if [`Self::has_room`] is true.
    fn send(&mut self, ticket: Ticket, keys: &mut Keys, out: &mut Vec<u8>);
    /// Processes the complete messages in `input`; returns the number of bytes processed. The next call receives the
    /// remaining bytes again, together with the bytes that arrived after them.
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
