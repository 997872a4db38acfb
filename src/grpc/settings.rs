//! The settings of the gRPC listener, and its limits.

use std::{path::PathBuf, time::Duration};

use super::listener::{ListenAddress, SocketMode, SocketOwner};
use crate::base::units::ByteSize;

crate::settings! {
    /// The listener that Envoy calls.
    pub struct GrpcSettings in "grpc" {
        /// Where to listen: one address or a list. `unix:///PATH` is a Unix socket, for an Envoy on the same machine.
        listen: Vec<ListenAddress> = "127.0.0.1:50051",
        /// The permission bits of a Unix socket: who may call.
        socket_mode: SocketMode = "0660",
        /// Who owns a Unix socket: the number of a user, or of a user and a group (`101:101`). Unset: whoever runs this
        /// server.
        socket_owner: Option<SocketOwner> = "",
        /// A PEM file with our certificate and those between it and its authority. Set: every TCP address in `listen` speaks
        /// TLS (1.2 or 1.3) alone. Read at start.
        tls_certificate_file: Option<PathBuf> = "",
        /// A PEM file with the key of that certificate. Read at start.
        tls_key_file: Option<PathBuf> = "",
        /// A PEM file with certificate authorities. Set: only who shows a certificate of theirs may call (mTLS). Read at
        /// start.
        tls_client_ca_file: Option<PathBuf> = "",
    }
}

crate::settings! {
    /// Bounds. Everything that waits, queues or grows does so within one of them.
    pub struct LimitsSettings in "limits" {
        /// Calls at one time on one connection; Envoy opens another connection where it needs more. A connection takes about 1 KiB for
        /// each, until it ends.
        streams_per_connection: u32 = "64",
        /// A larger `CheckRequest` is denied with 431, unread. Envoy's headers are at most 60 KiB unless configured.
        message_size: ByteSize = "256KiB",
        /// Messages held at one time, over all connections, for checks that wait or are not read to their end.
        messages_in_flight_size: ByteSize = "64MiB",
        /// Checks that wait at one time, over all connections; beyond it they are answered as faults at once.
        checks_in_flight: u32 = "16384",
        /// Connections at one time; further ones wait in the kernel's queue. Fewer where this process may have fewer
        /// descriptors (`RLIMIT_NOFILE`), of which it keeps some for everything else.
        connections_max: u32 = "4096",
        /// How long a client may take for what comes first: the TLS handshake, the connection preface, and the whole of one
        /// message.
        preface_timeout: Duration = "2s",
        /// How often an idle connection is asked whether it is still there.
        keepalive_interval: Duration = "20s",
        /// How long it has for the answer.
        keepalive_timeout: Duration = "5s",
        /// How old a connection gets, +-20 %, before Envoy is told to open another: how a scale-out is found.
        connection_age: Duration = "30m",
        /// How long to serve on after SIGTERM while not ready, so that Envoys have turned away before we stop accepting.
        drain_delay: Duration = "5s",
        /// How long calls in flight then have to end.
        drain_grace: Duration = "20s",
    }
}
