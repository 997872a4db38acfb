//! The configuration section of the management API, which this release does not have. No code listens on the addresses
//! in this section.

use std::net::SocketAddr;

crate::settings! {
    /// The management API. This release has no management API: leave this section unset.
    pub struct ApiSettings in "api" {
        /// The address and port to listen on. In this release, setting it is a configuration error.
        listen: Vec<SocketAddr> = "",
    }
}
