//! What an examination of the surroundings came to, as data: `doctor` shows it. And how a name is looked up, which every
//! examination of a server begins with.
//!
//! Never shows anything itself, and holds no secret: its texts name places, roles and figures.

use std::{net::IpAddr, time::Duration};

use tokio::{net::lookup_host, time::timeout};

/// How an examination ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is as it should be.
    Ok,
    /// It works, and may not always, or not as well as it could.
    Warning,
    /// Something that is needed does not work.
    Failed,
    /// It was not examined, for the reason that is given.
    Skipped,
}

impl State {
    /// The word for people and programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// One examination and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The name of the examination.
    pub name: &'static str,
    /// How it ended.
    pub state: State,
    /// What was found, with figures.
    pub found: String,
    /// What to do about it, where it is not as it should be.
    pub remedy: Option<String>,
    /// The settings that led there, each as `section.name`.
    pub settings: &'static [&'static str],
}

impl Diagnosis {
    /// All is well.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), remedy: None, settings: &[] }
    }

    /// It works, but.
    pub fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Warning, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// It does not work.
    pub fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Failed, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// It was not examined, `because`.
    pub fn skipped(name: &'static str, because: impl Into<String>) -> Self {
        Self { state: State::Skipped, ..Self::ok(name, because) }
    }

    /// The same, with the settings that led there.
    #[must_use]
    pub const fn about(mut self, settings: &'static [&'static str]) -> Self {
        self.settings = settings;
        self
    }
}

/// One finding for each of `names`, in that order: what is not among `diagnoses` was skipped, `because`.
#[must_use]
pub fn complete(names: &[&'static str], mut diagnoses: Vec<Diagnosis>, because: &str) -> Vec<Diagnosis> {
    let mut one = |name: &&'static str| {
        let at = diagnoses.iter().position(|diagnosis| diagnosis.name == *name);
        at.map_or_else(|| Diagnosis::skipped(name, because), |at| diagnoses.swap_remove(at))
    };
    names.iter().map(&mut one).collect()
}

/// How long the same thing took, several times in a row.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Of these.
    #[must_use]
    pub fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// The one in the middle.
    #[must_use]
    pub fn median(&self) -> Duration {
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    /// The longest.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    /// All of it in words, beside what it may take at most.
    #[must_use]
    pub fn beside(&self, limit: Duration) -> String {
        let (median, longest) = (milliseconds(self.median()), milliseconds(self.longest()));
        format!("{} in a row: median {median}, longest {longest}, of {limit:?}", self.0.len())
    }
}

/// A duration as people compare it: `0.4 ms`.
#[must_use]
pub fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// A host and its addresses, unless its name is one: `db.example.org is 192.0.2.1, 192.0.2.2`.
#[must_use]
pub fn located(host: &str, addresses: &[IpAddr]) -> String {
    match addresses {
        [address] if address.to_string() == host => host.to_owned(),
        _ => format!("{host} is {}", addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// The addresses behind the name of a host: one at the least.
///
/// # Errors
/// In words: there are none, or nobody says so within `limit`.
pub async fn resolve((host, port): (&str, u16), limit: Duration) -> Result<Vec<IpAddr>, String> {
    // As in a URL: `[::1]`.
    let host = host.trim_matches(['[', ']']);
    let mut addresses: Vec<_> = match timeout(limit, lookup_host((host, port))).await {
        Ok(Ok(addresses)) => addresses.map(|address| address.ip()).collect(),
        Ok(Err(error)) => return Err(format!("{host}: {error}")),
        Err(_) => return Err(format!("{host}: its name was not resolved within {limit:?}")),
    };
    addresses.dedup();
    if addresses.is_empty() { Err(format!("{host}: no address")) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_finding_in_order_and_what_is_missing_was_skipped() {
        let diagnoses = vec![Diagnosis::ok("c", "3"), Diagnosis::failed("a", "1", "do")];
        let all = complete(&["a", "b", "c"], diagnoses, "nobody looked");
        let words: Vec<_> = all.iter().map(|one| (one.name, one.state.as_str(), one.found.as_str())).collect();
        assert_eq!(words, [("a", "failed", "1"), ("b", "skipped", "nobody looked"), ("c", "ok", "3")]);
    }

    #[test]
    fn times_are_told_by_their_middle_and_their_end() {
        let times = Times::new([9, 1, 2].map(Duration::from_millis).to_vec());
        assert_eq!(times.beside(Duration::from_millis(250)), "3 in a row: median 2.0 ms, longest 9.0 ms, of 250ms");
        assert_eq!(Times::default().longest(), Duration::ZERO);
    }

    #[test]
    fn a_host_is_told_with_what_its_name_leads_to() {
        let addresses = ["192.0.2.1", "::1"].map(|text| text.parse().unwrap());
        assert_eq!(located("db", &addresses), "db is 192.0.2.1, ::1");
        assert_eq!(located("192.0.2.1", &addresses[..1]), "192.0.2.1");
    }

    #[tokio::test]
    async fn a_host_that_is_an_address_needs_nobody_to_resolve_it() {
        for host in ["127.0.0.1", "::1", "[::1]"] {
            let addresses = resolve((host, 1), Duration::from_mins(1)).await.unwrap();
            assert!(addresses.iter().all(IpAddr::is_loopback) && addresses.len() == 1, "{addresses:?}");
        }
    }
}
