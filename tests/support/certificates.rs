//! Certificates that the tests' servers and clients show each other.

use std::{path::Path, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// A directory with a certificate authority (`ca.pem`), and certificates that it signed: one for this machine
/// (`server.pem`, `server.key`) and one for a client (`client.pem`, `client.key`).
pub fn certificates() -> Arc<TempDir> {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a certificate whose issuer has its own name for one that signed itself.
    ca.distinguished_name.push(DnType::CommonName, "the tests' authority");
    let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
    let issuer = Issuer::new(ca, ca_key);
    let dir = tempfile::tempdir().expect("a directory");
    let write =
        |name: &str, text: String| std::fs::write(Path::new(dir.path()).join(name), text).expect("our directory");
    write("ca.pem", ca_certificate.pem());
    for (who, names) in [("server", vec!["localhost".to_owned(), "127.0.0.1".to_owned()]), ("client", Vec::new())] {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(names).expect("names");
        write(&format!("{who}.pem"), params.signed_by(&key, &issuer).expect("a certificate").pem());
        write(&format!("{who}.key"), key.serialize_pem());
    }
    Arc::new(dir)
}
