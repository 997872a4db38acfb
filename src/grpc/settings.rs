//! The settings of the gRPC listener, and its limits.

use std::{path::PathBuf, time::Duration};

use super::listener::{ListenAddress, SocketMode, SocketOwner};
use crate::base::units::ByteSize;

crate::settings! {
    /// The listener that Envoy connects to.
    pub struct GrpcSettings in "grpc" {
        /// Addresses to listen on: one address or a list. `unix:///PATH` is a Unix socket, for an Envoy on the same
        /// machine.
        listen: Vec<ListenAddress> = "127.0.0.1:50051",
        /// Permission bits of a Unix socket, which determine which users may connect.
        socket_mode: SocketMode = "0660",
        /// Owner of a Unix socket: a numeric user id, or a user id and a group id (`101:101`). Unset: the user that
        /// runs the server.
        socket_owner: Option<SocketOwner> = "",
        /// PEM file with the server's certificate, followed by any intermediate certificates. If set, the TCP addresses
        /// in `listen` accept only TLS (1.2 or 1.3). Requires `tls_key_file`. The server reads the file once, at
        /// startup.
        tls_certificate_file: Option<PathBuf> = "",
        /// PEM file with the private key of the certificate. The server reads the file once, at startup.
        tls_key_file: Option<PathBuf> = "",
        /// PEM file with certificate authorities. If set, TCP clients must present a certificate that one of these
        /// authorities issued (mTLS). The server reads the file once, at startup.
        tls_client_ca_file: Option<PathBuf> = "",
    }
}

crate::settings! {
    /// Limits and timeouts for connections and calls, and the durations of a graceful shutdown.
    pub struct LimitsSettings in "limits" {
        /// Maximum number of calls in flight on one connection; Envoy opens another connection if it needs more. Each
        /// call takes about 1 KiB, which the connection keeps until it closes.
        streams_per_connection: u32 = "64",
        /// Maximum size of a `CheckRequest`. trustgate denies a larger request with 431 without decoding it. Envoy
        /// limits the headers of a request to 60 KiB unless configured otherwise.
        message_size: ByteSize = "256KiB",
        /// Maximum total size, over all connections, of incomplete messages and of the messages of checks that wait for
        /// Redis or the database. A check that would exceed this size is answered as a fault.
        messages_in_flight_size: ByteSize = "64MiB",
        /// Maximum number of checks that wait for Redis or the database, over all connections. If the maximum is
        /// reached, a check that would have to wait is answered as a fault at once.
        checks_in_flight: u32 = "16384",
        /// Maximum number of open connections; further connections wait in the kernel's queue. The server allows fewer
        /// if its file descriptor limit (`RLIMIT_NOFILE`) is too low; it reserves some descriptors for the database,
        /// Redis and files.
        connections_max: u32 = "4096",
        /// Timeout for the TLS handshake, for the HTTP/2 preface, and for the arrival of one complete message.
        preface_timeout: Duration = "2s",
        /// Interval between the HTTP/2 pings that check whether the peer is still reachable.
        keepalive_interval: Duration = "20s",
        /// The maximum time that the peer may take to answer a ping. If the peer takes longer, the server closes the
        /// connection.
        keepalive_timeout: Duration = "5s",
        /// Age at which the server gracefully closes a connection, varied by up to 20 %. Envoy then opens a new
        /// connection, which may go to a replica that was added in the meantime.
        connection_age: Duration = "30m",
        /// The time that the server continues to serve after SIGTERM while it reports not ready, so that Envoy sends
        /// new calls to other replicas before this replica stops accepting connections.
        drain_delay: Duration = "5s",
        /// Grace period after `drain_delay`, and at `connection_age`: how long the server waits for calls in flight
        /// before it closes their connections.
        drain_grace: Duration = "20s",
    }
}
