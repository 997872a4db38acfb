//! TLS for the gRPC listener: the server's certificate, and the authorities for client certificates.
//!
//! The server reads the files once, at startup. If a certificate is configured, `stream` refuses TCP peers without TLS.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    CertificateError, Error, RootCertStore, ServerConfig,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{ParsedCertificate, WebPkiClientVerifier},
};
use tokio_rustls::TlsAcceptor;

use super::settings::GrpcSettings;
use crate::{base::clock::DatabaseTime, doctor::diagnosis::Diagnosis};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {path}: {problem}", path = path.display())]
pub struct TlsError {
    setting: &'static str,
    path: PathBuf,
    problem: String,
}

/// Installs `ring` as the cryptography provider of this process, unless a provider is already installed.
pub(crate) fn install_provider() {
    let _ = ring::default_provider().install_default();
}

/// Creates the TLS acceptor from `settings`; returns `None` if no certificate is configured.
///
/// # Errors
/// [`TlsError`], with the setting and the file, if a file cannot be read or the key does not match the certificate.
pub(crate) fn acceptor(settings: &GrpcSettings) -> Result<Option<TlsAcceptor>, TlsError> {
    let (Some(certificate), Some(key)) = (&settings.tls_certificate_file, &settings.tls_key_file) else {
        return Ok(None); // loading refuses a configuration with only one of the two
    };
    let certificates = read_certificates("grpc.tls_certificate_file", certificate)?;
    let builder = ServerConfig::builder();
    let builder = match &settings.tls_client_ca_file {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let failed = |problem: String| TlsError { setting: "grpc.tls_client_ca_file", path: path.clone(), problem };
            let mut roots = RootCertStore::empty();
            for authority in read_certificates("grpc.tls_client_ca_file", path)? {
                roots.add(authority).map_err(|error| failed(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| failed(error.to_string()))?)
        }
    };
    // These errors describe the format of the file, not its content, so they do not reveal the key.
    let failed = |problem: String| TlsError { setting: "grpc.tls_key_file", path: key.clone(), problem };
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(error.to_string()))?;
    let mut config = builder.with_single_cert(certificates, private).map_err(|error| failed(error.to_string()))?;
    // Also offer HTTP/1.1: a peer that supports only HTTP/1 must get an HTTP error, not a failed handshake. See
    // `http1`.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

fn read_certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |problem: String| TlsError { setting, path: path.to_owned(), problem };
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| failed(error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed("the file contains no certificate".to_owned()));
    }
    Ok(certificates)
}

/// The name of this examination in the output of `doctor`.
pub(crate) const EXAMINATION: &str = "tls";

/// Examines for `doctor` whether the configured TLS files are usable and when the certificates expire. `now` is the
/// time according to this machine's clock.
#[must_use]
pub(crate) fn diagnose(settings: &GrpcSettings, now: DatabaseTime) -> Diagnosis {
    const SETTING: &[&str] = &["grpc.tls_certificate_file"];
    let Some(path) = &settings.tls_certificate_file else {
        return Diagnosis::skipped(EXAMINATION, "grpc.tls_certificate_file is not set: the listener does not use TLS");
    };
    if let Err(error) = acceptor(settings) {
        let remedy = "provide PEM files that this user may read, with a certificate that matches the key";
        return Diagnosis::failed(EXAMINATION, error.to_string(), remedy).about(&[
            "grpc.tls_certificate_file",
            "grpc.tls_key_file",
            "grpc.tls_client_ca_file",
        ]);
    }
    let certificates = read_certificates("grpc.tls_certificate_file", path).unwrap_or_default();
    let Some((begins, ends)) = validity(&certificates, now) else {
        return Diagnosis::ok(EXAMINATION, "certificate and key match; the certificate's expiry date is unknown");
    };
    let renew = "renew the certificate and restart `serve`, which reads the file once, at startup";
    if let Some(begins) = begins {
        let remedy = "wait until then, use a different certificate, or correct this machine's clock";
        return Diagnosis::failed(EXAMINATION, format!("the certificate is valid only from {begins}"), remedy)
            .about(SETTING);
    }
    if ends <= now {
        return Diagnosis::failed(EXAMINATION, format!("the certificate expired at {ends}"), renew).about(SETTING);
    }
    let days = ends.since(now).as_secs() / DAY.as_secs();
    let found = format!("certificate and key match; valid until {ends}, for {days} days");
    if ends.since(now) < RENEWAL_MARGIN {
        Diagnosis::warning(EXAMINATION, found, renew).about(SETTING)
    } else {
        Diagnosis::ok(EXAMINATION, found)
    }
}

const DAY: Duration = Duration::from_hours(24);
/// `doctor` warns if the certificate expires within this time. Certificates are usually renewed earlier, so the warning
/// may mean that the renewal failed.
const RENEWAL_MARGIN: Duration = Duration::from_hours(30 * 24);

/// Returns the latest `notBefore` time of `certificates`, if it is in the future, and their earliest `notAfter` time.
/// rustls exposes these times only in verification errors. Verification checks the times first, so no root certificates
/// are needed.
fn validity(certificates: &[CertificateDer<'_>], now: DatabaseTime) -> Option<(Option<DatabaseTime>, DatabaseTime)> {
    let seconds = |seconds: u64| i64::try_from(seconds).ok()?.checked_mul(1_000_000).map(DatabaseTime::from_micros);
    let now = Duration::from_micros(u64::try_from(now.micros()).ok()?);
    let (mut begins, mut ends) = (None, None);
    for certificate in certificates {
        if let Some(CertificateError::NotValidYetContext { not_before, .. }) = rejection(certificate, now) {
            begins = begins.max(seconds(not_before.as_secs()));
        }
        if let Some(CertificateError::ExpiredContext { not_after, .. }) = rejection(certificate, Duration::MAX) {
            let end = seconds(not_after.as_secs())?;
            ends = Some(ends.map_or(end, |earlier: DatabaseTime| earlier.min(end)));
        }
    }
    Some((begins, ends?))
}

/// Returns the error from verifying `certificate` at `at`, a duration since the Unix epoch.
fn rejection(certificate: &CertificateDer<'_>, at: Duration) -> Option<CertificateError> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let (no_roots, at) = (RootCertStore::empty(), UnixTime::since_unix_epoch(at));
    match verify_server_cert_signed_by_trust_anchor(&parsed, &no_roots, &[], at, algorithms) {
        Err(Error::InvalidCertificate(error)) => Some(error),
        _ => None,
    }
}
