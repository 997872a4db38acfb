//! The management API's place. This release has none.
//!
//! Never listens.

use std::net::SocketAddr;

crate::settings! {
    /// The management API. This release has none: leave it unset.
    pub struct ApiSettings in "api" {
        /// Address and port. Setting it is refused in this release.
        listen: Vec<SocketAddr> = "",
    }
}
