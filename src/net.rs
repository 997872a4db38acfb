//! Connections: accepting them, what each may hold and for how long, and how they end.
//!
//! Never looks into a message.

use std::{net::SocketAddr, time::Duration};

use crate::units::ByteSize;

crate::settings! {
    /// Where Envoy connects to.
    pub struct GrpcSettings in "grpc" {
        /// Address and port; one or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:50051",
    }
}

crate::settings! {
    /// What connections and messages may take, so that no client can exhaust the server.
    pub struct LimitsSettings in "limits" {
        /// Checks that one connection may have under way.
        streams_per_connection: u32 = "1024",
        /// The longest message that is parsed; a longer one is denied with 431. At most 4MiB.
        message_size: ByteSize = "256KiB",
        /// Memory for messages under way, over all connections.
        messages_in_flight_size: ByteSize = "64MiB",
        /// Checks under way, over all connections; more are faults at once.
        checks_in_flight: u32 = "16384",
        /// Connections at one time.
        connections_max: u32 = "4096",
        /// How long a new connection may take until it speaks HTTP/2.
        preface_timeout: Duration = "2s",
        /// How often a connection is asked for a sign of life.
        keepalive_interval: Duration = "20s",
        /// How long that sign may take.
        keepalive_timeout: Duration = "5s",
        /// How old a connection may get before its client is asked to open another, so that new replicas get their
        /// share; 20 % more or less.
        connection_age: Duration = "30m",
        /// How long to go on serving after SIGTERM, while load balancers notice that this replica is not ready.
        drain_delay: Duration = "5s",
        /// How long checks under way may take after that.
        drain_grace: Duration = "20s",
    }
}
