//! Certificates for the TLS servers and clients of the tests.

use std::{path::Path, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// Creates a directory with a CA certificate (`ca.pem`) and two certificates that the CA signed: one for servers on
/// this machine (`server.pem`, `server.key`) and one for clients (`client.pem`, `client.key`).
pub fn certificates() -> Arc<TempDir> {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Give the CA a separate name. Otherwise, the subject and the issuer of the other certificates would have the same
    // default name, and OpenSSL would treat those certificates as self-signed.
    ca.distinguished_name.push(DnType::CommonName, "the tests' authority");
    let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
    let issuer = Issuer::new(ca, ca_key);
    let dir = tempfile::tempdir().expect("a directory");
    let write =
        |name: &str, text: String| std::fs::write(Path::new(dir.path()).join(name), text).expect("a writable file");
    write("ca.pem", ca_certificate.pem());
    for (role, names) in [("server", vec!["localhost".to_owned(), "127.0.0.1".to_owned()]), ("client", Vec::new())] {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(names).expect("names");
        write(&format!("{role}.pem"), params.signed_by(&key, &issuer).expect("a certificate").pem());
        write(&format!("{role}.key"), key.serialize_pem());
    }
    Arc::new(dir)
}
