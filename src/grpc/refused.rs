//! Counts peers that are refused because they do not speak gRPC as the listener expects, and logs them at a limited
//! rate.
//!
//! A connection that sends no bytes (a TCP health probe, for example) is neither counted nor logged. Port scans that
//! send bytes are counted as `unrecognized`, but not logged.

use std::{fmt::Display, net::IpAddr, time::Duration};

use crate::base::{
    clock::Clock,
    log_limit::LogLimit,
    metrics::{IntCounter, IntCounterVec, Opts, Registry, register},
};

/// Minimum time between two log lines with the same reason.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Why a peer was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The peer spoke HTTP/1.
    Http1,
    /// The peer spoke TLS to a listener without TLS, did not speak TLS to a listener with TLS, or failed the TLS
    /// handshake.
    Tls,
    /// The peer presented no valid certificate from an authority in `grpc.tls_client_ca_file`.
    NoClientCertificate,
    /// An HTTP/2 request did not call a gRPC method of this server.
    NotGrpc,
    /// The first bytes were neither HTTP nor TLS.
    Unrecognized,
}

impl Reason {
    const ALL: [Self; 5] = [Self::Http1, Self::Tls, Self::NoClientCertificate, Self::NotGrpc, Self::Unrecognized];

    /// Returns the value of the label `reason`.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Tls => "tls",
            Self::NoClientCertificate => "no_client_certificate",
            Self::NotGrpc => "not_grpc",
            Self::Unrecognized => "unrecognized",
        }
    }

    /// Returns the cause and the remedy for the log; `None` if refusals for this reason are not logged.
    const fn remedy(self) -> Option<&'static str> {
        match self {
            Self::Http1 => Some(
                "the peer speaks HTTP/1, but this listener serves gRPC over HTTP/2; in Envoy, use grpc_service (not \
                 http_service) and set http2_protocol_options on the cluster",
            ),
            Self::Tls => Some(
                "the peer's TLS does not match this listener; compare the transport_socket of Envoy's cluster with \
                 grpc.tls_certificate_file",
            ),
            Self::NoClientCertificate => {
                Some("the peer has no valid client certificate from an authority in grpc.tls_client_ca_file")
            }
            Self::NotGrpc => Some(
                "the peer sent HTTP requests that are not gRPC calls; in Envoy, use grpc_service (not http_service) \
                 for this listener",
            ),
            // Not logged, because port scanners send such bytes.
            Self::Unrecognized => None,
        }
    }
}

/// Counts and logs refused peers.
pub(crate) struct RefusedPeers {
    counters: [IntCounter; Reason::ALL.len()],
    log: [LogLimit; Reason::ALL.len()],
}

impl RefusedPeers {
    /// Registers the counter in `registry`.
    ///
    /// # Errors
    /// If `registry` already has a metric with this name.
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let opts = Opts::new(
            "trustgate_grpc_refused_total",
            "Connections and requests that the gRPC listeners refused because the peer did not speak gRPC as expected, \
             by reason.",
        );
        let counters = register(registry, IntCounterVec::new(opts, &["reason"]))?;
        Ok(Self {
            counters: Reason::ALL.map(|reason| counters.with_label_values(&[reason.as_str()])),
            log: [const { LogLimit::every(LOG_INTERVAL) }; Reason::ALL.len()],
        })
    }

    /// Counts a refused peer and logs it at a limited rate. `detail` appears only in the log.
    pub(crate) fn note(&self, reason: Reason, peer: Option<IpAddr>, detail: impl Display, clock: &dyn Clock) {
        self.counters[reason as usize].inc();
        let Some(remedy) = reason.remedy() else { return };
        if let Some(suppressed) = self.log[reason as usize].permit(clock.now()) {
            let peer = peer.map(tracing::field::display);
            tracing::warn!(reason = reason.as_str(), peer, %detail, suppressed, "peer refused: {remedy}");
        }
    }
}
