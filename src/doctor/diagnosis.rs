//! The results of `doctor`'s examinations as data, and helpers for examining a server: durations and name resolution.
//!
//! The texts contain addresses, roles and figures, but no secrets.

use std::{net::IpAddr, time::Duration};

use tokio::{net::lookup_host, time::timeout};

/// The outcome of an examination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiagnosisState {
    /// Everything examined works.
    Ok,
    /// Everything examined works, but the operator should change something.
    Warning,
    /// Something that is needed does not work.
    Failed,
    /// The examination was skipped, for the given reason.
    Skipped,
}

impl DiagnosisState {
    /// The word in the output.
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
    /// How it ended.
    pub state: DiagnosisState,
    /// The facts found, with figures.
    pub found: String,
    /// The action to take; `None` if none is needed.
    pub remedy: Option<String>,
    /// The settings concerned, each as `section.name`.
    pub settings: &'static [&'static str],
}

impl Diagnosis {
    /// Everything examined works.
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: DiagnosisState::Ok, found: found.into(), remedy: None, settings: &[] }
    }

    /// A problem that does not stop the server.
    pub(crate) fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Warning, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// Something that the server needs does not work.
    pub(crate) fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Failed, remedy: Some(remedy.into()), ..Self::ok(name, found) }
    }

    /// The examination was skipped, for the reason `because`.
    pub(crate) fn skipped(name: &'static str, because: impl Into<String>) -> Self {
        Self { state: DiagnosisState::Skipped, ..Self::ok(name, because) }
    }

    /// Adds the settings concerned.
    #[must_use]
    pub(crate) const fn about(mut self, settings: &'static [&'static str]) -> Self {
        self.settings = settings;
        self
    }
}

/// Returns one diagnosis for each of `names`, in that order. Examinations that are not in `diagnoses` were skipped, for
/// the reason `because`.
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
    /// These durations, in any order.
    #[must_use]
    pub(crate) fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// The median duration.
    #[must_use]
    pub(crate) fn median(&self) -> Duration {
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    /// The longest duration.
    #[must_use]
    pub(crate) fn longest(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    /// A summary in words, with the `limit` of one request.
    #[must_use]
    pub(crate) fn beside(&self, limit: Duration) -> String {
        let (median, longest) = (milliseconds(self.median()), milliseconds(self.longest()));
        format!("{} measured: median {median}, longest {longest}, limit {limit:?}", self.0.len())
    }
}

/// A duration in milliseconds, for people: `0.4 ms`.
#[must_use]
pub(crate) fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// A host and its addresses, or only the address if `host` is one: `db.example.org resolves to 192.0.2.1, 192.0.2.2`.
#[must_use]
pub(crate) fn located(host: &str, addresses: &[IpAddr]) -> String {
    match addresses {
        [address] if address.to_string() == host => host.to_owned(),
        _ => format!("{host} resolves to {}", addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// Resolves the name of a host to its addresses, of which there is at least one.
///
/// # Errors
/// A text: the name has no address, or was not resolved within `limit`.
pub(crate) async fn resolve((host, port): (&str, u16), limit: Duration) -> Result<Vec<IpAddr>, String> {
    // A URL has brackets around an IPv6 address: `[::1]`.
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
    fn missing_examinations_are_skipped_and_names_keep_their_order() {
        let diagnoses = vec![Diagnosis::ok("c", "3"), Diagnosis::failed("a", "1", "do")];
        let all = complete(&["a", "b", "c"], diagnoses, "not examined");
        let words: Vec<_> = all.iter().map(|one| (one.name, one.state.as_str(), one.found.as_str())).collect();
        assert_eq!(words, [("a", "failed", "1"), ("b", "skipped", "not examined"), ("c", "ok", "3")]);
    }

    #[test]
    fn times_are_summarised_by_median_and_longest() {
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
