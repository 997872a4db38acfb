//! An open-loop load generator: it sends each request when the request is due, without waiting for earlier answers.

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
    http::{self, Connection, HttpError},
    machine::{Sample, keep_undisturbed},
};

/// A key, and the expected answer to a request with this key.
#[derive(Clone, Debug)]
pub struct KeyCase {
    /// The key to send.
    pub key: String,
    /// The expected answer: a grant for this trust, or a 401 if `None`.
    pub trust_id: Option<String>,
}

/// The result of one request.
#[derive(Clone, Debug)]
pub struct LoadResult {
    /// The due time of the request, counted from the start of the load.
    pub due: Duration,
    /// The due time of the request as an [`Instant`].
    pub at: Instant,
    /// The time from the due time to the answer: how long a client would have waited, including queueing.
    pub took: Duration,
    /// The key that was sent, and the expected answer.
    pub case: KeyCase,
    /// The status and the trust id that the application received, or the error from the connection to Envoy.
    pub answer: Result<(u16, Option<String>), String>,
}

impl LoadResult {
    /// Returns true if the answer is the expected one.
    pub fn is_expected(&self) -> bool {
        let wanted = if self.case.trust_id.is_some() { 200 } else { 401 };
        self.answer == Ok((wanted, self.case.trust_id.clone()))
    }

    /// Returns true if the answer is a fault, which means that trustgate could not decide.
    pub fn is_fault(&self) -> bool {
        self.answer == Ok((503, None))
    }
}

/// Sends `per_second` requests per second to `server` for `length`. For each request, `next_case` takes the due time
/// and returns the key to send.
pub async fn send_requests(
    server: SocketAddr,
    per_second: u32,
    length: Duration,
    mut next_case: impl FnMut(Duration) -> KeyCase,
) -> Vec<LoadResult> {
    let idle = Arc::new(Mutex::new(Vec::new()));
    let (start, step) = (Instant::now(), Duration::from_secs(1) / per_second);
    let (mut due, mut requests, mut results) = (Duration::ZERO, JoinSet::new(), Vec::new());
    while due < length {
        sleep_until(start + due).await;
        requests.spawn(send_one(server, Arc::clone(&idle), start, due, next_case(due)));
        due += step;
        while let Some(result) = requests.try_join_next() {
            results.push(result.expect("no panic"));
        }
    }
    results.extend(requests.join_all().await);
    results
}

async fn send_one(
    server: SocketAddr,
    idle: Arc<Mutex<Vec<Connection>>>,
    start: Instant,
    due: Duration,
    case: KeyCase,
) -> LoadResult {
    let answer = answer(server, &idle, &case.key).await.map_err(|error| format!("{error:?}"));
    let at = start + due;
    LoadResult { due, at, took: at.elapsed(), case, answer }
}

async fn answer(
    server: SocketAddr,
    idle: &Mutex<Vec<Connection>>,
    key: &str,
) -> Result<(u16, Option<String>), HttpError> {
    let mut connection = match idle_connection(idle).await {
        Some(connection) => connection,
        None => http::connect(server).await?,
    };
    let answer = http::ask(&mut connection, "/load", &[("x-api-key", key)]).await?;
    idle.lock().expect("no panic").push(connection);
    let seen = (answer.status == 200).then(|| answer.saw("x-trust-id")).flatten();
    Ok((answer.status, seen))
}

/// Takes an idle connection that is still open; returns `None` if there is none. The load generator does not repeat a
/// failed request, so it must not use a connection that the server has closed.
async fn idle_connection(idle: &Mutex<Vec<Connection>>) -> Option<Connection> {
    loop {
        let mut connection = idle.lock().expect("no panic").pop()?;
        if connection.ready().await.is_ok() {
            return Some(connection);
        }
    }
}

/// Asserts that each answer is the expected one. A fault is excused if the machine was disturbed during the request; a
/// wrong grant or denial is not.
///
/// # Panics
/// If an answer is wrong; the message contains up to five wrong answers. Also if more than a tenth of the answers are
/// excused.
#[track_caller]
pub fn assert_expected<'h>(results: impl Iterator<Item = &'h LoadResult>) {
    let samples = results.map(|result| Sample::new(result.at, result.at + result.took, result));
    let kept = keep_undisturbed("answers", samples, |result| result.is_fault());
    let wrong: Vec<_> = kept.into_iter().filter(|result| !result.is_expected()).collect();
    assert!(wrong.is_empty(), "{} wrong answers, for example {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
}

/// Prints quantiles of the times that the requests took.
pub fn print_times<'h>(name: &str, results: impl Iterator<Item = &'h LoadResult>) {
    let mut took: Vec<_> = results.map(|result| result.took).collect();
    took.sort();
    print_quantiles(name, &took);
}

/// Prints quantiles of `took`, which must be sorted in ascending order.
///
/// # Panics
/// If `took` is empty.
pub fn print_quantiles(name: &str, took: &[Duration]) {
    let at = |share: usize| took[(took.len() * share / 1000).min(took.len() - 1)];
    let (count, median, most, nearly_all, all) = (took.len(), at(500), at(990), at(999), at(1000));
    println!("{name}: {count}, median {median:?}, 99 % {most:?}, 99.9 % {nearly_all:?}, all {all:?}");
}
