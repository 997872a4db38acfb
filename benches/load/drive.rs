//! The run: one thread, all connections, checks as they are due, until the time is over and all are answered.
//!
//! Closed loop: as many checks are always in flight as were asked for; how long they take decides how many there are. Open
//! loop: they leave when they are due, however long earlier ones take, and their time counts from when they were due, so
//! that a server that stalls is not spared the checks that would have come meanwhile.

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

/// How long answers may take once nothing more is sent.
const REST_MAX: Duration = Duration::from_secs(5);
/// How often a run that waits looks at the time.
const LOOK: Duration = Duration::from_millis(50);

/// What a run is to be.
pub(crate) struct Plan {
    pub(crate) address: Address,
    pub(crate) tls: Option<Tls>,
    pub(crate) connections: usize,
    /// Checks a second; `None`: as many as come back.
    pub(crate) rate: Option<f64>,
    /// How long to send before anything is counted.
    pub(crate) warm_up: Duration,
    /// How long to send after that.
    pub(crate) length: Duration,
    /// Checks that are sent, at most.
    pub(crate) requests: u64,
    /// Looks for answers all the time instead of sleeping until they come.
    pub(crate) spins: bool,
}

/// A connection and what goes over it.
struct Link<S> {
    wire: Wire,
    session: S,
    input: Input,
    output: Vec<u8>,
    /// The system takes no more until the socket can be written to again.
    is_full: bool,
}

/// A run under way.
struct Run<'p, S, F> {
    plan: &'p Plan,
    make: F,
    keys: Keys,
    tally: Tally,
    links: Vec<Link<S>>,
    start: Instant,
    sent: u64,
    are_out: bool,
    /// Where the next check goes first.
    turn: usize,
    /// Checks that a server did not look at.
    again: VecDeque<Ticket>,
    ended: Vec<Ended>,
}

/// Runs `plan` with connections that `make` makes; returns what came of it and how many seconds were measured.
///
/// # Errors
/// When the server cannot be reached, or does not keep to the protocol.
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
    // Where the checks end before the time does, the last answer ends the run.
    let stopped = if run.are_out { run.start.elapsed() } else { stopped };
    let measured = stopped.min(plan.warm_up + plan.length).saturating_sub(plan.warm_up);
    Ok((run.tally, measured.as_secs_f64()))
}

impl<S: Session, F: Fn() -> S> Run<'_, S, F> {
    /// A new connection, as far as the server having said what it takes.
    fn connect(&self) -> io::Result<Link<S>> {
        let wire = Wire::connect(&self.plan.address, self.plan.tls.as_ref())?;
        let mut link = Link { wire, session: (self.make)(), input: Input::new(), output: Vec::new(), is_full: false };
        link.session.begin(&mut link.output);
        let (began, mut ended) = (Instant::now(), Vec::new());
        link.flush()?;
        while !link.session.is_ready() {
            wait(&mut [PollFd::new(&link.wire, PollFlags::IN)], Some(LOOK))?;
            if link.receive(&self.keys, &mut ended)? || began.elapsed() > START_MAX {
                return Err(io::Error::other("the server did not begin to speak HTTP/2"));
            }
            link.flush()?;
        }
        Ok(link)
    }

    /// Sends until it is enough; returns when that was.
    fn send_all(&mut self) -> io::Result<Duration> {
        let end = self.plan.warm_up + self.plan.length;
        loop {
            let now = self.start.elapsed();
            if now >= end || self.are_out {
                return Ok(now);
            }
            match self.plan.rate {
                Some(rate) => self.send_due(now, rate),
                None => self.send_as_many_as_go(now),
            }
            self.flush()?;
            let until_next = self.plan.rate.map(|rate| due(self.sent, rate).saturating_sub(self.start.elapsed()));
            let has_room = self.links.iter().any(|link| link.session.has_room());
            let limit = until_next.filter(|_| has_room).unwrap_or(LOOK);
            self.look(if self.plan.spins { Duration::ZERO } else { limit.min(end.saturating_sub(now)) })?;
        }
    }

    /// Takes what comes after the last check was sent.
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
            self.look(LOOK)?;
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

    fn send_as_many_as_go(&mut self, now: Duration) {
        self.send_again();
        while self.send_one(nanos(now)) {}
    }

    fn send_again(&mut self) {
        while let Some(place) = self.room() {
            let Some(ticket) = self.again.pop_front() else { return };
            self.links[place].send(ticket, &mut self.keys);
        }
    }

    /// Whether there was room for it, and a key.
    fn send_one(&mut self, due: u64) -> bool {
        let Some(place) = self.room() else { return false };
        let key = if self.sent < self.plan.requests { self.keys.next() } else { None };
        let Some(key) = key else {
            self.are_out = true;
            return false;
        };
        self.links[place].send(Ticket { due, key }, &mut self.keys);
        self.sent += 1;
        true
    }

    /// The next connection with room, in turn.
    fn room(&mut self) -> Option<usize> {
        let count = self.links.len();
        let found = (self.turn..self.turn + count).map(|place| place % count);
        let found = found.into_iter().find(|place| self.links[*place].session.has_room())?;
        self.turn = found + 1;
        Some(found)
    }

    fn flush(&mut self) -> io::Result<()> {
        for link in self.links.iter_mut().filter(|link| !link.is_full) {
            link.flush()?;
        }
        Ok(())
    }

    /// Waits until something comes, at most that long, and takes it.
    fn look(&mut self, limit: Duration) -> io::Result<()> {
        let flags = |link: &Link<S>| if link.is_full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut polled: Vec<_> = self.links.iter().map(|link| PollFd::new(&link.wire, flags(link))).collect();
        wait(&mut polled, Some(limit))?;
        let found: Vec<_> = polled.iter().map(PollFd::revents).collect();
        drop(polled);
        for (place, found) in found.into_iter().enumerate().filter(|(_, found)| !found.is_empty()) {
            let link = &mut self.links[place];
            link.is_full &= !found.contains(PollFlags::OUT);
            let is_over = if found == PollFlags::OUT { false } else { link.receive(&self.keys, &mut self.ended)? };
            if is_over {
                link.session.abandon(&mut self.ended);
            }
            link.flush()?;
            let is_done = link.session.is_done();
            self.count();
            if is_done {
                self.links[place] = self.connect()?;
            }
        }
        Ok(())
    }

    /// Counts what ended. All of it was there before the clock is looked at.
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
                Ended::NotLookedAt(ticket) => self.again.push_back(ticket),
            }
        }
    }
}

impl<S: Session> Link<S> {
    fn send(&mut self, ticket: Ticket, keys: &mut Keys) {
        self.session.send(ticket, keys, &mut self.output);
    }

    /// Takes what has come; whether that was the last.
    fn receive(&mut self, keys: &Keys, ended: &mut Vec<Ended>) -> io::Result<bool> {
        // A connection that was reset has ended like any other: what it owed is counted.
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
            // What is read next says the same.
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

/// When the check after `sent` others is due.
#[expect(clippy::cast_precision_loss, reason = "nobody waits for 2^53 checks")]
fn due(sent: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(sent as f64 / rate)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
