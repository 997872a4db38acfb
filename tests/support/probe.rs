//! Sends checks at a fixed rate, without waiting for earlier answers, and records the results.

use std::{collections::HashSet, time::Duration};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    grpc::{CheckClient, Verdict},
    machine::Sample,
};

/// One check and its result.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The index of the key that was checked.
    pub key: usize,
    /// The moment just before the check was sent.
    pub began: Instant,
    /// The moment at which the answer arrived.
    pub answered: Instant,
    /// The answer, or the error if there was no answer.
    pub verdict: Result<Verdict, String>,
}

impl Probe {
    /// Returns true if the key was granted, for any trust.
    pub fn is_grant(&self) -> bool {
        self.status() == Some(200)
    }

    /// Returns true if the answer is a fault, which means that trustgate could not decide.
    pub fn is_fault(&self) -> bool {
        self.verdict.as_ref().is_ok_and(|verdict| verdict.status == 503 && verdict.reason.as_deref() == Some("fault"))
    }

    /// Returns this probe as a sample whose period is the duration of the check.
    pub fn sample(&self) -> Sample<&Self> {
        Sample::new(self.began, self.answered, self)
    }

    /// Returns the status that the client would receive; `None` if there was no answer.
    pub fn status(&self) -> Option<u16> {
        self.verdict.as_ref().ok().map(|verdict| verdict.status)
    }
}

/// A running series of checks.
pub struct Probing {
    stop: CancellationToken,
    /// The number of keys.
    keys: usize,
    /// The number of keys that were granted at least once.
    granted: watch::Receiver<usize>,
    sending: JoinHandle<Vec<Probe>>,
}

impl Probing {
    /// Starts to send `per_second` checks per second through `client`, with each of `keys` in turn, on a route with the
    /// context extensions `extensions`.
    pub fn start(
        client: &CheckClient,
        per_second: u32,
        keys: Vec<String>,
        extensions: &'static [(&str, &str)],
    ) -> Self {
        let (stop, client) = (CancellationToken::new(), client.clone());
        let (counter, granted) = watch::channel(0);
        let (interval, count) = (Duration::from_secs(1) / per_second, keys.len());
        let sending = tokio::spawn(send(client, interval, keys, extensions, (stop.clone(), counter)));
        Self { stop, keys: count, granted, sending }
    }

    /// Waits until each of the keys has been granted at least once.
    ///
    /// # Panics
    /// If a key is not granted within 30 s.
    pub async fn until_granted(&mut self) {
        let all = self.keys;
        let granted = tokio::time::timeout(Duration::from_secs(30), self.granted.wait_for(|granted| *granted == all));
        granted.await.expect("all keys granted within 30 s").expect("checks are being sent");
    }

    /// Stops sending and waits for the remaining answers. Returns all probes, in the order in which their answers
    /// arrived.
    pub async fn stop(self) -> Vec<Probe> {
        self.stop.cancel();
        self.sending.await.expect("no panic")
    }
}

async fn send(
    client: CheckClient,
    interval: Duration,
    keys: Vec<String>,
    extensions: &'static [(&str, &str)],
    (stop, counter): (CancellationToken, watch::Sender<usize>),
) -> Vec<Probe> {
    let (mut due, mut number) = (Instant::now(), 0);
    let (mut sent, mut done, mut granted) = (JoinSet::new(), Vec::new(), HashSet::new());
    while stop.run_until_cancelled(sleep_until(due)).await.is_some() {
        let (client, key, text) = (client.clone(), number % keys.len(), keys[number % keys.len()].clone());
        sent.spawn(async move {
            let began = Instant::now();
            let verdict = client.check_with(&text, extensions).await.map_err(|status| status.to_string());
            Probe { key, began, answered: Instant::now(), verdict }
        });
        number += 1;
        due += interval;
        while let Some(probe) = sent.try_join_next() {
            let probe = probe.expect("no panic");
            if probe.is_grant() && granted.insert(probe.key) {
                counter.send_replace(granted.len());
            }
            done.push(probe);
        }
    }
    while let Some(probe) = sent.join_next().await {
        done.push(probe.expect("no panic"));
    }
    done
}

/// Returns when the last granted check began; `None` if no check was granted.
pub fn last_grant<'p>(probes: impl IntoIterator<Item = &'p Probe>) -> Option<Instant> {
    probes.into_iter().filter(|probe| probe.is_grant()).map(|probe| probe.began).max()
}

/// Returns the time from `event` to the start of the last granted check; zero if no check that began after `event` was
/// granted.
pub fn granted_after<'p>(event: Instant, probes: impl IntoIterator<Item = &'p Probe>) -> Duration {
    last_grant(probes).map(|began| began.saturating_duration_since(event)).unwrap_or_default()
}

/// Returns the result of [`granted_after`] as a sample. The period of the sample ends at the start of the first check
/// after the last grant. A pause of the machine within that period delays the denial, or leaves a gap in the checks
/// that can hide a later grant.
pub fn sample_of_grants<'p>(event: Instant, probes: impl IntoIterator<Item = &'p Probe> + Clone) -> Sample<Duration> {
    let late = granted_after(event, probes.clone());
    let later = probes.into_iter().map(|probe| probe.began).filter(|began| *began > event + late);
    Sample::new(event, later.min().unwrap_or(event + late), late)
}
