//! The admin listener: metrics and probes.
//!
//! Never lists or changes anything.

use std::net::SocketAddr;

crate::settings! {
    /// Metrics and probes, over HTTP: `/metrics`, `/livez`, `/readyz`.
    pub struct AdminSettings in "admin" {
        /// Address and port; one or a list.
        listen: Vec<SocketAddr> = "127.0.0.1:9180",
    }
}
