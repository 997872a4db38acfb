//! What the sender needs of a protocol: when it takes another request, its bytes, and what came of those before.

use crate::{keys::Keys, message::Outcome};

/// One check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// When it was due, in nanoseconds since the start: from then on its time counts.
    pub(crate) due: u64,
    /// The number of its key.
    pub(crate) key: u32,
}

/// How a check ended.
pub(crate) enum Ended {
    /// With this.
    Answered(Ticket, Outcome),
    /// The server left before it looked at it: to be sent on another connection.
    NotLookedAt(Ticket),
}

/// One connection's side of a protocol. Never reads or writes a socket itself.
pub(crate) trait Session {
    /// What is sent first.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// Whether the server has said what it takes.
    fn is_ready(&self) -> bool;
    /// Whether another request may be sent now.
    fn has_room(&self) -> bool;
    /// Requests without an answer.
    fn in_flight(&self) -> usize;
    /// Whether the connection takes no more requests and owes no answer: time for another.
    fn is_done(&self) -> bool;
    /// Puts a request into `out`. Only after [`Self::has_room`] said yes.
    fn send(&mut self, ticket: Ticket, keys: &mut Keys, out: &mut Vec<u8>);
    /// Reads what came, and says how much of it was understood; the rest comes again with what follows.
    ///
    /// # Errors
    /// Why the connection cannot go on.
    fn receive(
        &mut self,
        input: &[u8],
        keys: &Keys,
        out: &mut Vec<u8>,
        ended: &mut Vec<Ended>,
    ) -> Result<usize, String>;
    /// The connection is gone.
    fn abandon(&mut self, ended: &mut Vec<Ended>);
}
