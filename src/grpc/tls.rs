//! TLS on the gRPC listener: our certificate, and the authorities whose clients may call, read once at start.
//!
//! Never speaks anything but HTTP/2 (ALPN `h2`), and never without encryption where a certificate is configured.

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

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {path}: {problem}", path = path.display())]
pub struct TlsError {
    setting: &'static str,
    path: PathBuf,
    problem: String,
}

/// Makes one provider of cryptography that of every TLS connection of this process, unless it has one already.
pub fn install_provider() {
    let _ = ring::default_provider().install_default();
}

/// What accepts TLS connections as `settings` say; `None` where they name no certificate.
///
/// # Errors
/// [`TlsError`], with the setting and the file, where one cannot be read or does not fit.
pub fn acceptor(settings: &GrpcSettings) -> Result<Option<TlsAcceptor>, TlsError> {
    let (Some(certificate), Some(key)) = (&settings.tls_certificate_file, &settings.tls_key_file) else {
        return Ok(None); // one without the other was refused with the configuration
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
    // The text of an error here says what is wrong with the form of the file, never what stands in it.
    let failed = |problem: String| TlsError { setting: "grpc.tls_key_file", path: key.clone(), problem };
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(error.to_string()))?;
    let mut config = builder.with_single_cert(certificates, private).map_err(|error| failed(error.to_string()))?;
    // A peer that offers only HTTP/1 must get an HTTP error, which a failed handshake would not be: see `http1`.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

fn read_certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |problem: String| TlsError { setting, path: path.to_owned(), problem };
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| failed(error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed("there is no certificate in it".to_owned()));
    }
    Ok(certificates)
}

/// The name of the examination of our certificate.
pub const EXAMINATION: &str = "tls";

/// Loads what `settings` name, for `doctor`, and looks when the first certificate ends; `now` is by this machine's
/// clock.
#[must_use]
pub fn diagnose(settings: &GrpcSettings, now: DatabaseTime) -> Diagnosis {
    const SETTING: &[&str] = &["grpc.tls_certificate_file"];
    let Some(path) = &settings.tls_certificate_file else {
        return Diagnosis::skipped(
            EXAMINATION,
            "grpc.tls_certificate_file is not set: the listener speaks without TLS",
        );
    };
    if let Err(error) = acceptor(settings) {
        let remedy = "put a PEM file there that this user may read, with the certificate that belongs to the key";
        return Diagnosis::failed(EXAMINATION, error.to_string(), remedy).about(&[
            "grpc.tls_certificate_file",
            "grpc.tls_key_file",
            "grpc.tls_client_ca_file",
        ]);
    }
    let certificates = read_certificates("grpc.tls_certificate_file", path).unwrap_or_default();
    let Some((begins, ends)) = validity(&certificates, now) else {
        return Diagnosis::ok(EXAMINATION, "certificate and key fit; until when it is valid cannot be told");
    };
    let renew = "renew the certificate, and restart `serve`: it is read at start";
    if let Some(begins) = begins {
        let remedy = "use it from then on, or set this machine's clock";
        return Diagnosis::failed(EXAMINATION, format!("the certificate is valid only from {begins} on"), remedy)
            .about(SETTING);
    }
    if ends <= now {
        return Diagnosis::failed(EXAMINATION, format!("the certificate expired at {ends}"), renew).about(SETTING);
    }
    let days = ends.since(now).as_secs() / DAY.as_secs();
    let found = format!("certificate and key fit, valid until {ends}, for {days} days");
    if ends.since(now) < RENEWED_BEFORE {
        Diagnosis::warning(EXAMINATION, found, renew).about(SETTING)
    } else {
        Diagnosis::ok(EXAMINATION, found)
    }
}

const DAY: Duration = Duration::from_hours(24);
/// How long before its end whoever renews certificates has usually done it.
const RENEWED_BEFORE: Duration = Duration::from_hours(30 * 24);

/// When the last of `certificates` begins, if that is yet to come, and when the first of them ends. Told by the reasons
/// for which they are refused: before anything else their time is looked at.
fn validity(certificates: &[CertificateDer<'_>], now: DatabaseTime) -> Option<(Option<DatabaseTime>, DatabaseTime)> {
    let seconds = |seconds: u64| i64::try_from(seconds).ok()?.checked_mul(1_000_000).map(DatabaseTime::from_micros);
    let now = Duration::from_micros(u64::try_from(now.micros()).ok()?);
    let (mut begins, mut ends) = (None, None);
    for certificate in certificates {
        if let Some(CertificateError::NotValidYetContext { not_before, .. }) = refused(certificate, now) {
            begins = begins.max(seconds(not_before.as_secs()));
        }
        if let Some(CertificateError::ExpiredContext { not_after, .. }) = refused(certificate, Duration::MAX) {
            let end = seconds(not_after.as_secs())?;
            ends = Some(ends.map_or(end, |earlier: DatabaseTime| earlier.min(end)));
        }
    }
    Some((begins, ends?))
}

/// Why nobody would take `certificate` at a time, given as what passed since 1970.
fn refused(certificate: &CertificateDer<'_>, at: Duration) -> Option<CertificateError> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let (nobody, at) = (RootCertStore::empty(), UnixTime::since_unix_epoch(at));
    match verify_server_cert_signed_by_trust_anchor(&parsed, &nobody, &[], at, algorithms) {
        Err(Error::InvalidCertificate(error)) => Some(error),
        _ => None,
    }
}
