//! TLS on the gRPC listener: our certificate, and the authorities whose clients may call, read once at start.
//!
//! Never speaks anything but HTTP/2 (ALPN `h2`), and never without encryption where a certificate is configured.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

use super::GrpcSettings;

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {path}: {problem}", path = path.display())]
pub struct TlsError {
    setting: &'static str,
    path: PathBuf,
    problem: String,
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
    config.alpn_protocols = vec![b"h2".to_vec()];
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
