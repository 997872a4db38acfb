//! An open-loop load generator: requests leave when they are due, however long the answers to earlier ones take.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    http::{self, Connection, Trouble},
    machine,
};

/// One request.
#[derive(Clone, Debug)]
pub struct KeyCase {
    /// The key it carries.
    pub key: String,
    /// What it must come to: `Some` trust for a grant, `None` for a 401.
    pub owner: Option<String>,
}

/// What a request came to.
#[derive(Clone, Debug)]
pub struct Hit {
    /// When it was due, since the start.
    pub due: Duration,
    /// The same moment.
    pub at: Instant,
    /// From when it was due until its answer was there: what a client would have waited, queueing included.
    pub took: Duration,
    /// What was fired.
    pub case: KeyCase,
    /// The status and the trust the application saw; or what went wrong on the way to Envoy.
    pub answer: Result<(u16, Option<String>), String>,
}

impl Hit {
    /// Whether the answer is the one that belongs to the key.
    pub fn is_right(&self) -> bool {
        let wanted = if self.case.owner.is_some() { 200 } else { 401 };
        self.answer == Ok((wanted, self.case.owner.clone()))
    }

    /// Whether the answer says that the gate could not decide.
    pub fn is_fault(&self) -> bool {
        self.answer == Ok((503, None))
    }
}

/// Fires at `server` for `length`, `per_second` requests each second; `aim` makes the next one, by when it is due.
pub async fn fire(
    server: SocketAddr,
    per_second: u32,
    length: Duration,
    mut aim: impl FnMut(Duration) -> KeyCase,
) -> Vec<Hit> {
    let idle = Arc::new(Mutex::new(Vec::new()));
    let (start, step) = (Instant::now(), Duration::from_secs(1) / per_second);
    let (mut due, mut cases, mut hits) = (Duration::ZERO, JoinSet::new(), Vec::new());
    while due < length {
        sleep_until(start + due).await;
        cases.spawn(shoot(server, Arc::clone(&idle), start, due, aim(due)));
        due += step;
        while let Some(hit) = cases.try_join_next() {
            hits.push(hit.expect("no panic"));
        }
    }
    hits.extend(cases.join_all().await);
    hits
}

async fn shoot(
    server: SocketAddr,
    idle: Arc<Mutex<Vec<Connection>>>,
    start: Instant,
    due: Duration,
    case: KeyCase,
) -> Hit {
    let answer = answer(server, &idle, &case.key).await.map_err(|error| format!("{error:?}"));
    let at = start + due;
    Hit { due, at, took: at.elapsed(), case, answer }
}

async fn answer(
    server: SocketAddr,
    idle: &Mutex<Vec<Connection>>,
    key: &str,
) -> Result<(u16, Option<String>), Trouble> {
    let mut connection = match idle_connection(idle).await {
        Some(connection) => connection,
        None => http::connect(server).await?,
    };
    let answer = http::ask(&mut connection, "/load", &[("x-api-key", key)]).await?;
    idle.lock().expect("no panic").push(connection);
    let seen = (answer.status == 200).then(|| answer.saw("x-trust-id")).flatten();
    Ok((answer.status, seen))
}

/// An idle connection that is still open, if there is one; no request is ever sent twice.
async fn idle_connection(idle: &Mutex<Vec<Connection>>) -> Option<Connection> {
    loop {
        let mut connection = idle.lock().expect("no panic").pop()?;
        if connection.ready().await.is_ok() {
            return Some(connection);
        }
    }
}

/// That every request came to what belongs to its key. One that the machine stood still for may have come to nothing; one
/// that came to something wrong never has an excuse.
///
/// # Panics
/// If one did not, with some of them; if more than a tenth came to nothing because the machine stood still.
#[track_caller]
pub fn all_right<'h>(hits: impl Iterator<Item = &'h Hit>) {
    let hits: Vec<_> = hits.collect();
    let is_excused = |hit: &&&Hit| hit.is_fault() && machine::was_disturbed(hit.at, hit.at + hit.took);
    let (excused, wrong): (Vec<&&Hit>, Vec<_>) = hits.iter().filter(|hit| !hit.is_right()).partition(is_excused);
    assert!(wrong.is_empty(), "{} wrong, among them {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    assert!(excused.len() * 10 <= hits.len(), "the machine stood still: {} of {} faults", excused.len(), hits.len());
}

/// The figures of some requests, for the test's output.
pub fn figures<'h>(name: &str, hits: impl Iterator<Item = &'h Hit>) {
    let mut took: Vec<_> = hits.map(|hit| hit.took).collect();
    took.sort();
    quantiles(name, &took);
}

/// The figures of some times, the shortest first.
///
/// # Panics
/// If there are none.
pub fn quantiles(name: &str, took: &[Duration]) {
    let at = |share: usize| took[(took.len() * share / 1000).min(took.len() - 1)];
    let (count, median, most, nearly_all, all) = (took.len(), at(500), at(990), at(999), at(1000));
    println!("{name}: {count}, median {median:?}, 99 % {most:?}, 99.9 % {nearly_all:?}, all {all:?}");
}
