//! Generates the load: one thread sends checks over all connections until the time is over, and then waits for the
//! remaining answers.
//!
//! In a closed loop, a fixed number of checks is in flight: after each answer, the next check is sent. In an open loop,
//! each check is sent when it is due, without waiting for earlier answers. The time of a check counts from its due
//! time, so the times include the delays of checks that become due while the server stalls.

use std::{
    collections::VecDeque,
    io,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    figures::Tally,
    keys::Keys,
    session::{Ended, Session, Ticket},
    wire::{Address, Input, START_MAX, Tls, Wire},
};

/// How long to wait for the remaining answers after the last check was sent.
const REST_MAX: Duration = Duration::from_secs(5);
/// The maximum time to wait for an answer before the loop checks the clock again.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// The parameters of a run.
pub(crate) struct Plan {
    pub(crate) address: Address,
    pub(crate) tls: Option<Tls>,
    pub(crate) connections: usize,
    /// Checks per second in an open loop; `None` for a closed loop.
    pub(crate) rate: Option<f64>,
    /// How long to send checks before the measurement.
    pub(crate) warm_up: Duration,
    /// How long to send checks during the measurement.
    pub(crate) length: Duration,
    /// The maximum number of checks to send.
    pub(crate) requests: u64,
    /// True to poll for answers continuously instead of sleeping until they arrive.
    pub(crate) spins: bool,
}

/// A connection with its protocol session and buffers.
struct Link<S> {
    wire: Wire,
    session: S,
    input: Input,
    output: Vec<u8>,
    /// True if the kernel accepts no more bytes for now: wait until the socket is writable.
    is_full: bool,
}

/// The state of a run.
struct Run<'p, S, F> {
    plan: &'p Plan,
    make: F,
    keys: Keys,
    tally: Tally,
    links: Vec<Link<S>>,
    start: Instant,
    sent: u64,
    /// True if there are no more checks to send.
    are_out: bool,
    /// The index of the connection to try first for the next check.
    turn: usize,
    /// Checks to send again because the server did not process them.
    again: VecDeque<Ticket>,
    ended: Vec<Ended>,
}

/// Runs `plan`; `make` creates the session of each connection. Returns the results and the length of the measurement in
/// seconds.
///
/// # Errors
/// If the server cannot be reached, or violates the protocol.
pub(crate) fn run<S: Session>(plan: &Plan, keys: Keys, make: impl Fn() -> S) -> io::Result<(Tally, f64)> {
    let links = Vec::with_capacity(plan.connections);
    let (tally, again, ended) = (Tally::default(), VecDeque::new(), Vec::new());
    let start = Instant::now();
    let mut run = Run { plan, make, keys, tally, links, start, sent: 0, are_out: false, turn: 0, again, ended };
    for _ in 0..plan.connections {
        let link = run.connect()?;
        run.links.push(link);
    }
    run.start = Instant::now();
    let stopped = run.send_all()?;
    run.wait_for_rest()?;
    // If all checks were sent before the time was over, the measurement ends with the last answer.
    let stopped = if run.are_out { run.start.elapsed() } else { stopped };
    let measured = stopped.min(plan.warm_up + plan.length).saturating_sub(plan.warm_up);
    Ok((run.tally, measured.as_secs_f64()))
}

impl<S: Session, F: Fn() -> S> Run<'_, S, F> {
    /// Connects, and waits until the session is ready: over HTTP/2, until the server has sent its settings.
    fn connect(&self) -> io::Result<Link<S>> {
        let wire = Wire::connect(&self.plan.address, self.plan.tls.as_ref())?;
        let mut link = Link { wire, session: (self.make)(), input: Input::new(), output: Vec::new(), is_full: false };
        link.session.begin(&mut link.output);
        let (began, mut ended) = (Instant::now(), Vec::new());
        link.flush()?;
        while !link.session.is_ready() {
            wait(&mut [PollFd::new(&link.wire, PollFlags::IN)], Some(WAIT_MAX))?;
            if link.receive(&self.keys, &mut ended)? || began.elapsed() > START_MAX {
                return Err(io::Error::other("connection not ready: the server did not send its HTTP/2 settings"));
            }
            link.flush()?;
        }
        Ok(link)
    }

    /// Sends checks until the time is over or there are no more checks; returns the time since the start.
    fn send_all(&mut self) -> io::Result<Duration> {
        let end = self.plan.warm_up + self.plan.length;
        loop {
            let now = self.start.elapsed();
            if now >= end || self.are_out {
                return Ok(now);
            }
            match self.plan.rate {
                Some(rate) => self.send_due(now, rate),
                None => self.send_while_room(now),
            }
            self.flush()?;
            let until_next = self.plan.rate.map(|rate| due(self.sent, rate).saturating_sub(self.start.elapsed()));
            let has_room = self.links.iter().any(|link| link.session.has_room());
            let limit = until_next.filter(|_| has_room).unwrap_or(WAIT_MAX);
            self.receive(if self.plan.spins { Duration::ZERO } else { limit.min(end.saturating_sub(now)) })?;
        }
    }

    /// Waits for the remaining answers after the last check was sent.
    fn wait_for_rest(&mut self) -> io::Result<()> {
        let stopped = Instant::now();
        let in_flight = |links: &[Link<S>]| links.iter().map(|link| link.session.in_flight()).sum::<usize>();
        while in_flight(&self.links) + self.again.len() > 0 {
            if stopped.elapsed() > REST_MAX {
                let missing = in_flight(&self.links) + self.again.len();
                self.tally.add_errors("no answer within 5 s", missing as u64);
                return Ok(());
            }
            self.send_again();
            self.flush()?;
            self.receive(WAIT_MAX)?;
        }
        Ok(())
    }

    fn send_due(&mut self, now: Duration, rate: f64) {
        self.send_again();
        loop {
            let due = due(self.sent, rate);
            if due > now || !self.send_one(nanos(due)) {
                return;
            }
        }
    }

    fn send_while_room(&mut self, now: Duration) {
        self.send_again();
        while self.send_one(nanos(now)) {}
    }

    fn send_again(&mut self) {
        while let Some(index) = self.room() {
            let Some(ticket) = self.again.pop_front() else { return };
            self.links[index].send(ticket, &mut self.keys);
        }
    }

    /// Sends one check if a connection has room and a key is left; returns true if a check was sent.
    fn send_one(&mut self, due: u64) -> bool {
        let Some(index) = self.room() else { return false };
        let key = if self.sent < self.plan.requests { self.keys.next() } else { None };
        let Some(key) = key else {
            self.are_out = true;
            return false;
        };
        self.links[index].send(Ticket { due, key }, &mut self.keys);
        self.sent += 1;
        true
    }

    /// Returns the index of the next connection with room, in round-robin order.
    fn room(&mut self) -> Option<usize> {
        let count = self.links.len();
        let found = (self.turn..self.turn + count).map(|index| index % count);
        let found = found.into_iter().find(|index| self.links[*index].session.has_room())?;
        self.turn = found + 1;
        Some(found)
    }

    fn flush(&mut self) -> io::Result<()> {
        for link in self.links.iter_mut().filter(|link| !link.is_full) {
            link.flush()?;
        }
        Ok(())
    }

    /// Waits for at most `limit` until bytes arrive, and processes them. Replaces connections that the server has
    /// closed.
    fn receive(&mut self, limit: Duration) -> io::Result<()> {
        let flags = |link: &Link<S>| if link.is_full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut polled: Vec<_> = self.links.iter().map(|link| PollFd::new(&link.wire, flags(link))).collect();
        wait(&mut polled, Some(limit))?;
        let found: Vec<_> = polled.iter().map(PollFd::revents).collect();
        drop(polled);
        for (index, found) in found.into_iter().enumerate().filter(|(_, found)| !found.is_empty()) {
            let link = &mut self.links[index];
            link.is_full &= !found.contains(PollFlags::OUT);
            let is_over = if found == PollFlags::OUT { false } else { link.receive(&self.keys, &mut self.ended)? };
            if is_over {
                link.session.abandon(&mut self.ended);
            }
            link.flush()?;
            let is_done = link.session.is_done();
            self.count();
            if is_done {
                self.links[index] = self.connect()?;
            }
        }
        Ok(())
    }

    /// Counts the checks that have ended. The time of their answers is the time at which this function reads the clock.
    fn count(&mut self) {
        let now = self.start.elapsed();
        let is_measured = now >= self.plan.warm_up && now < self.plan.warm_up + self.plan.length;
        for ended in self.ended.drain(..) {
            match ended {
                Ended::Answered(ticket, outcome) => {
                    self.tally.add(outcome);
                    if is_measured {
                        self.tally.add_measured(nanos(now).saturating_sub(ticket.due));
                    }
                }
                Ended::NotProcessed(ticket) => self.again.push_back(ticket),
            }
        }
    }
}

impl<S: Session> Link<S> {
    fn send(&mut self, ticket: Ticket, keys: &mut Keys) {
        self.session.send(ticket, keys, &mut self.output);
    }

    /// Processes the bytes that have arrived; returns true if the server has closed the connection.
    fn receive(&mut self, keys: &Keys, ended: &mut Vec<Ended>) -> io::Result<bool> {
        // Treat a reset like a normal end of the connection: the missing answers are counted as errors.
        let is_over = self.wire.read(&mut self.input).or_else(|error| match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => Ok(true),
            _ => Err(error),
        })?;
        let used = self.session.receive(self.input.bytes(), keys, &mut self.output, ended).map_err(io::Error::other)?;
        self.input.used(used);
        Ok(is_over)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.wire.write(&mut self.output) {
            Ok(is_all) => self.is_full = !is_all,
            // Ignore the error here, because the next read also returns it.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn wait(polled: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<()> {
    let limit = limit.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(polled, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Returns the due time of a check, counted from the start, if `sent` checks are sent before it.
#[expect(clippy::cast_precision_loss, reason = "a run has far fewer than 2^53 checks")]
fn due(sent: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(sent as f64 / rate)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
