//! Checks that are sent when they are due, however long the answers to earlier ones take, and what they came to.

use std::{collections::HashSet, time::Duration};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    grpc::{CheckClient, Verdict},
    machine,
};

/// One check.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Which of the keys it carried.
    pub key: usize,
    /// Just before it was sent.
    pub began: Instant,
    /// When its answer was there.
    pub answered: Instant,
    /// The answer, or why there was none.
    pub verdict: Result<Verdict, String>,
}

impl Probe {
    /// Whether it was granted, whatever trust it was taken for.
    pub fn is_grant(&self) -> bool {
        self.status() == Some(200)
    }

    /// Whether the answer says that the gate could not decide.
    pub fn is_fault(&self) -> bool {
        self.verdict.as_ref().is_ok_and(|verdict| verdict.status == 503 && verdict.reason.as_deref() == Some("fault"))
    }

    /// Whether it is a fault that the machine may be to blame for. A denial never is, nor a grant.
    pub fn is_excused(&self) -> bool {
        self.is_fault() && machine::was_disturbed(self.began, self.answered)
    }

    /// What the client would see, where there was an answer.
    pub fn status(&self) -> Option<u16> {
        self.verdict.as_ref().ok().map(|verdict| verdict.status)
    }
}

/// Checks that are being sent.
pub struct Probing {
    enough: CancellationToken,
    /// How many keys were asked for, and how many of them were granted so far.
    keys: usize,
    granted: watch::Receiver<usize>,
    sending: JoinHandle<Vec<Probe>>,
}

impl Probing {
    /// Asks `client` `per_second` times a second, for each of `keys` in turn, on a route with these context extensions.
    pub fn start(
        client: &CheckClient,
        per_second: u32,
        keys: Vec<String>,
        extensions: &'static [(&str, &str)],
    ) -> Self {
        let (enough, client) = (CancellationToken::new(), client.clone());
        let (grants, granted) = watch::channel(0);
        let (step, count) = (Duration::from_secs(1) / per_second, keys.len());
        let sending = tokio::spawn(send(client, step, keys, extensions, (enough.clone(), grants)));
        Self { enough, keys: count, granted, sending }
    }

    /// Waits until each of the keys was granted.
    ///
    /// # Panics
    /// If one is not for very long.
    pub async fn until_granted(&mut self) {
        let all = self.keys;
        let granted = tokio::time::timeout(Duration::from_secs(30), self.granted.wait_for(|granted| *granted == all));
        granted.await.expect("they are granted soon").expect("checks are being sent");
    }

    /// Sends no more and waits for the answers; what everything came to, in the order in which it was answered.
    pub async fn stop(self) -> Vec<Probe> {
        self.enough.cancel();
        self.sending.await.expect("no panic")
    }
}

async fn send(
    client: CheckClient,
    step: Duration,
    keys: Vec<String>,
    extensions: &'static [(&str, &str)],
    (enough, grants): (CancellationToken, watch::Sender<usize>),
) -> Vec<Probe> {
    let (mut due, mut number) = (Instant::now(), 0);
    let (mut sent, mut done, mut granted) = (JoinSet::new(), Vec::new(), HashSet::new());
    while enough.run_until_cancelled(sleep_until(due)).await.is_some() {
        let (client, key, text) = (client.clone(), number % keys.len(), keys[number % keys.len()].clone());
        sent.spawn(async move {
            let began = Instant::now();
            let verdict = client.check_with(&text, extensions).await.map_err(|status| status.to_string());
            Probe { key, began, answered: Instant::now(), verdict }
        });
        number += 1;
        due += step;
        while let Some(probe) = sent.try_join_next() {
            let probe = probe.expect("no panic");
            if probe.is_grant() && granted.insert(probe.key) {
                grants.send_replace(granted.len());
            }
            done.push(probe);
        }
    }
    while let Some(probe) = sent.join_next().await {
        done.push(probe.expect("no panic"));
    }
    done
}

/// When the last check that was granted began.
pub fn last_grant<'p>(probes: impl IntoIterator<Item = &'p Probe>) -> Option<Instant> {
    probes.into_iter().filter(|probe| probe.is_grant()).map(|probe| probe.began).max()
}

/// How long after `event` the last check that was granted began, without the time that the machine stood still
/// meanwhile; 0 where none did.
pub fn granted_after<'p>(event: Instant, probes: impl IntoIterator<Item = &'p Probe>) -> Duration {
    let late = last_grant(probes)
        .map(|began| began.saturating_duration_since(event).saturating_sub(machine::stood_still(event, began)));
    late.unwrap_or_default()
}
