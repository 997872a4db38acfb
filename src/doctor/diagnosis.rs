//! The results of the `doctor` examinations, and helpers for examinations: measured durations and name resolution.
//!
//! The results contain addresses, roles and measurements, but no secrets.

use std::{net::IpAddr, time::Duration};

use tokio::{net::lookup_host, time::timeout};

/// The possible outcomes of an examination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiagnosisState {
    /// Everything examined works.
    Ok,
    /// Everything examined works, but the operator should change something.
    Warning,
    /// Something that is needed does not work.
    Failed,
    /// The examination was skipped. [`Diagnosis::found`] contains the reason.
    Skipped,
}

impl DiagnosisState {
    /// Returns the state as a word for the output.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// The result of one examination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Diagnosis {
    /// The name of the examination.
    pub name: &'static str,
    /// The outcome of the examination.
    pub state: DiagnosisState,
    /// The facts that the examination found, as human-readable text.
    pub found: String,
    /// The action that the operator should take; `None` if no action is needed.
    pub remedy: Option<String>,
    /// The settings that may have caused the problem, each as `section.name`.
    pub settings: &'static [&'static str],
}

impl Diagnosis {
    /// Creates a diagnosis with the state [`DiagnosisState::Ok`].
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: DiagnosisState::Ok, found: found.into(), remedy: None, settings: &[] }
    }

    /// Creates a diagnosis of a problem that does not stop the server.
    pub(crate) fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Warning, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// Creates a diagnosis of a failure: something that the server needs does not work.
    pub(crate) fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Failed, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// Creates a diagnosis for an examination that was skipped for the reason `because`.
    pub(crate) fn skipped(name: &'static str, because: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Skipped, ..Self::ok(name, because) }
    }

    /// Sets the settings that may have caused the problem.
    #[must_use]
    pub(crate) const fn about(mut self, settings: &'static [&'static str]) -> Self {
        self.settings = settings;
        self
    }
}

/// Returns one diagnosis for each name in `names`, in that order. If `diagnoses` has none for a name, reports that
/// examination as skipped for the reason `because`.
#[must_use]
pub(crate) fn complete(names: &[&'static str], mut diagnoses: Vec<Diagnosis>, because: &str) -> Vec<Diagnosis> {
    let mut one = |name: &&'static str| {
        let at = diagnoses.iter().position(|diagnosis| diagnosis.name == *name);
        at.map_or_else(|| Diagnosis::skipped(name, because), |at| diagnoses.swap_remove(at))
    };
    names.iter().map(&mut one).collect()
}

/// The durations of repeated requests, sorted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times(Vec<Duration>);

impl Times {
    /// Creates a sorted list from `times`, which may have any order.
    #[must_use]
    pub(crate) fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    #[must_use]
    pub(crate) fn median(&self) -> Duration {
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    #[must_use]
    pub(crate) fn longest(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    /// Formats a summary, together with the timeout `limit` of one request.
    #[must_use]
    pub(crate) fn beside(&self, limit: Duration) -> String {
        let (median, longest) = (milliseconds(self.median()), milliseconds(self.longest()));
        format!("{} measured: median {median}, longest {longest}, limit {limit:?}", self.0.len())
    }
}

/// Formats a duration in milliseconds, with its unit: `0.4 ms`.
#[must_use]
pub(crate) fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// Formats a host and its addresses: `db.example.org resolves to 192.0.2.1, 192.0.2.2`. If `host` is an address,
/// returns only that address.
#[must_use]
pub(crate) fn located(host: &str, addresses: &[IpAddr]) -> String {
    match addresses {
        [address] if address.to_string() == host => host.to_owned(),
        _ => format!("{host} resolves to {}", addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// Resolves a host name. Returns at least one address.
///
/// # Errors
/// A description of the problem: the name has no address, or could not be resolved within `limit`.
pub(crate) async fn resolve((host, port): (&str, u16), limit: Duration) -> Result<Vec<IpAddr>, String> {
    // In a URL, brackets surround an IPv6 address: `[::1]`.
    let host = host.trim_matches(['[', ']']);
    let mut addresses: Vec<_> = match timeout(limit, lookup_host((host, port))).await {
        Ok(Ok(addresses)) => addresses.map(|address| address.ip()).collect(),
        Ok(Err(error)) => return Err(format!("{host}: {error}")),
        Err(_) => return Err(format!("{host}: name not resolved within {limit:?}")),
    };
    addresses.dedup();
    if addresses.is_empty() { Err(format!("{host}: no address")) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_examinations_are_reported_as_skipped_in_the_given_order() {
        let diagnoses = vec![Diagnosis::ok("c", "3"), Diagnosis::failed("a", "1", "do")];
        let all = complete(&["a", "b", "c"], diagnoses, "not examined");
        let words: Vec<_> = all.iter().map(|one| (one.name, one.state.as_str(), one.found.as_str())).collect();
        assert_eq!(words, [("a", "failed", "1"), ("b", "skipped", "not examined"), ("c", "ok", "3")]);
    }

    #[test]
    fn summary_of_times_shows_the_median_and_the_longest() {
        let times = Times::new([9, 1, 2].map(Duration::from_millis).to_vec());
        assert_eq!(times.beside(Duration::from_millis(250)), "3 measured: median 2.0 ms, longest 9.0 ms, limit 250ms");
        assert_eq!(Times::default().longest(), Duration::ZERO);
    }

    #[test]
    fn a_host_is_shown_with_its_addresses() {
        let addresses = ["192.0.2.1", "::1"].map(|text| text.parse().unwrap());
        assert_eq!(located("db", &addresses), "db resolves to 192.0.2.1, ::1");
        assert_eq!(located("192.0.2.1", &addresses[..1]), "192.0.2.1");
    }

    #[tokio::test]
    async fn an_address_resolves_to_itself() {
        for host in ["127.0.0.1", "::1", "[::1]"] {
            let addresses = resolve((host, 1), Duration::from_mins(1)).await.unwrap();
            assert!(addresses.iter().all(IpAddr::is_loopback) && addresses.len() == 1, "{addresses:?}");
        }
    }
}
