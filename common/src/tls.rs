//! One identity per process, mutual TLS everywhere between daemons and tools.
//!
//! Certificates carry fixed DNS names by role instead of addresses, so that an address may change without a new
//! certificate: every controller is [`CONTROLLER_NAME`], a worker is [`worker_name`]. A client dials an address and
//! verifies the role's name.
//!
//! Does not issue certificates and does not decide what a peer may do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use serde::Deserialize;
use tonic::transport::{Certificate, ClientTlsConfig, Identity as TonicIdentity, ServerTlsConfig};
use webpki::{EndEntityCert, KeyUsage};

/// DNS name in every controller's certificate.
pub const CONTROLLER_NAME: &str = "controller.pageport";

/// DNS name in operators' certificates, alone or behind a name of their own (`alice.operator.pageport`).
pub const OPERATOR_NAME: &str = "operator.pageport";

/// DNS name in the certificate of a worker.
pub fn worker_name(worker: &str) -> String {
    format!("{worker}.worker.pageport")
}

/// When a certificate ends, in seconds since 1970; [`None`]: it is none, or has not begun by then.
///
/// `webpki` says so only of one that it finds to have ended, which at the end of time is every one.
pub fn certificate_ends(certificate: &CertificateDer<'_>) -> Option<i64> {
    let end_of_time = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    match parsed.verify_for_usage(&[], &[], &[], end_of_time, KeyUsage::client_auth(), None, None) {
        Err(webpki::Error::CertExpired { not_after, .. }) => i64::try_from(not_after.as_secs()).ok(),
        _ => None,
    }
}

/// `[tls]`: PEM files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// Certificate of the authority that signed every node's certificate.
    pub ca: PathBuf,
    /// This node's certificate chain.
    pub cert: PathBuf,
    /// This node's private key.
    pub key: PathBuf,
}

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("read the TLS {what} {}: check the [tls] section", path.display())]
    Read {
        /// `ca`, `cert` or `key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A file holds no PEM of the kind expected.
    #[error("parse the TLS {what} {}: a PEM file is expected", path.display())]
    Parse {
        /// `ca`, `cert` or `key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// Certificate and key do not fit together, or the authority cannot be used.
    #[error("use the TLS identity of {}", path.display())]
    Unusable {
        /// The certificate.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// No client verifier can be made from the authority.
    #[error("use the TLS authority {}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::client::VerifierBuilderError,
    },
}

/// This process's certificate, key and authority, read once.
#[derive(Debug, Clone)]
pub struct Identity {
    paths: TlsPaths,
    ca_pem: Vec<u8>,
    cert_pem: Vec<u8>,
    key_pem: Vec<u8>,
}

impl Identity {
    /// Reads the three files, and checks that they are PEM and fit together. Installs the process's crypto provider.
    ///
    /// # Errors
    /// [`TlsError`] names the file that is wrong.
    pub fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        // A second call finds the provider already installed, which is what is wanted.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let read = |what, path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::Read { what, path: path.to_owned(), source })
        };
        let identity = Self {
            ca_pem: read("ca", &paths.ca)?,
            cert_pem: read("cert", &paths.cert)?,
            key_pem: read("key", &paths.key)?,
            paths: paths.clone(),
        };
        identity.rustls_client(&[])?;
        Ok(identity)
    }

    /// For a tonic server that demands client certificates.
    pub fn tonic_server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(TonicIdentity::from_pem(&self.cert_pem, &self.key_pem))
            .client_ca_root(Certificate::from_pem(&self.ca_pem))
    }

    /// For a tonic client that dials a server of this name.
    pub fn tonic_client(&self, server_name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(TonicIdentity::from_pem(&self.cert_pem, &self.key_pem))
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .domain_name(server_name)
    }

    /// For a QUIC server that demands client certificates.
    ///
    /// # Errors
    /// [`TlsError`] when certificate, key or authority cannot be used.
    pub fn rustls_server(&self, alpn: &[&[u8]]) -> Result<rustls::ServerConfig, TlsError> {
        let verifier = WebPkiClientVerifier::builder(Arc::new(self.roots()?))
            .build()
            .map_err(|source| TlsError::Authority { path: self.paths.ca.clone(), source })?;
        let (chain, key) = self.chain_and_key()?;
        let mut config = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|source| self.unusable(source))?;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }

    /// For a QUIC client.
    ///
    /// # Errors
    /// [`TlsError`] when certificate, key or authority cannot be used.
    pub fn rustls_client(&self, alpn: &[&[u8]]) -> Result<rustls::ClientConfig, TlsError> {
        let (chain, key) = self.chain_and_key()?;
        let mut config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key)
            .map_err(|source| self.unusable(source))?;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }

    /// When its certificate ends: see [`certificate_ends`].
    pub fn ends(&self) -> Option<i64> {
        let chain = self.certificates("cert", &self.paths.cert, &self.cert_pem).ok()?;
        certificate_ends(chain.first()?)
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates("ca", &self.paths.ca, &self.ca_pem)? {
            roots.add(certificate).map_err(|source| self.unusable(source))?;
        }
        Ok(roots)
    }

    fn chain_and_key(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let chain = self.certificates("cert", &self.paths.cert, &self.cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key_pem).map_err(|source| TlsError::Parse {
            what: "key",
            path: self.paths.key.clone(),
            source,
        })?;
        Ok((chain, key))
    }

    fn certificates(
        &self,
        what: &'static str,
        path: &Path,
        pem: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let parse = |source| TlsError::Parse { what, path: path.to_owned(), source };
        let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(parse)?;
        if found.is_empty() { Err(parse(rustls_pki_types::pem::Error::NoItemsFound)) } else { Ok(found) }
    }

    fn unusable(&self, source: rustls::Error) -> TlsError {
        TlsError::Unusable { path: self.paths.cert.clone(), source }
    }
}
