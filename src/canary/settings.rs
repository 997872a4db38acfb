//! The settings of the canary.

use std::{
    fmt,
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::base::settings::{RawValue, Setting};

crate::settings! {
    /// The canary, a separate process (`trustgate canary`) that tests revocation on running replicas.
    pub struct CanarySettings in "canary" {
        /// The gRPC listeners to test: one address or a list. If `HOST:PORT` has a host name, the canary tests each
        /// address that DNS returns for the name, at most 64. For a headless Kubernetes service, these are all of its
        /// pods. `unix:///PATH` is a Unix socket.
        targets: Vec<Target> = "127.0.0.1:50051",
        /// The time between the end of one round and the start of the next, varied by up to 10 %. At least 1 s. Each
        /// round writes four audit entries.
        interval: Duration = "1m",
        /// Addresses on which the canary serves its metrics: one address or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:9181",
        /// PEM file with the certificate authorities that issued the servers' certificates. If set, the canary connects
        /// to TCP targets over TLS. The canary reads the file in each round.
        tls_ca_file: Option<PathBuf> = "",
        /// The name that the servers' certificates must contain. Unset: the host of the target.
        tls_server_name: Option<String> = "",
        /// PEM file with the canary's certificate, for servers that require one (`grpc.tls_client_ca_file`). Requires
        /// `tls_ca_file` and `tls_key_file`. The canary reads the file in each round.
        tls_certificate_file: Option<PathBuf> = "",
        /// PEM file with the private key of the certificate. The canary reads the file in each round.
        tls_key_file: Option<PathBuf> = "",
    }
}

/// A gRPC listener to test, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A host name or IP address, with its port.
    Tcp(String, u16),
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
}

impl Setting for Target {
    const EXPECTED: &'static str =
        "a host with its port, such as \"127.0.0.1:50051\" or \"trustgate:50051\", or \"unix:///PATH\"";

    fn read(written: &RawValue) -> Option<Self> {
        let RawValue::One(text) = written else { return None };
        if let Some(path) = text.strip_prefix("unix://") {
            return (path.starts_with('/') && path.len() > 1).then(|| Self::Unix(path.into()));
        }
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port > 0)?;
        let is_ipv6 = || host.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok();
        let is_name =
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
        (is_name || is_ipv6().is_some()).then(|| Self::Tcp(host.to_owned(), port))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_host_with_a_port_or_a_unix_socket() {
        let read = |text: &str| Target::read(&RawValue::One(text.to_owned()));
        for valid in ["127.0.0.1:50051", "[::1]:50051", "trustgate.example:1", "unix:///run/trustgate.sock"] {
            assert_eq!(read(valid).map(|target| target.to_string()).as_deref(), Some(valid));
        }
        for invalid in
            ["127.0.0.1", ":50051", "::1:50051", "host:0", "host:65536", "unix://", "unix://run", "a b:1", ""]
        {
            assert_eq!(read(invalid), None, "{invalid}");
        }
    }
}
