//! The lab's certificates: one authority, an identity per daemon and one for the operator.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// PEM files of one identity.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The identity's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The generator refused.
    #[error("issue certificate for {name}")]
    Issue {
        /// For whom.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A file cannot be written.
    #[error("write {path}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An authority that issues identities into a folder.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    /// Makes a new authority whose certificate is `ca.pem` in `folder`.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn create(folder: &Path) -> Result<Self, TlsError> {
        let issue = |source| TlsError::Issue { name: "the authority".into(), source };
        let mut params = CertificateParams::new(Vec::new()).map_err(issue)?;
        params.distinguished_name.push(DnType::CommonName, "Pageport lab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(issue)?).map_err(issue)?;
        fs::create_dir_all(folder).map_err(|source| TlsError::Write { path: folder.to_owned(), source })?;
        write(&folder.join("ca.pem"), &issuer.pem(), 0o644)?;
        Ok(Self { issuer, folder: folder.to_owned() })
    }

    /// Issues an identity with one DNS name, for servers and clients alike; files are called after `name`.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn issue(&self, name: &str, dns_name: &str) -> Result<Identity, TlsError> {
        let issue = |source| TlsError::Issue { name: name.to_owned(), source };
        let mut params = CertificateParams::new(vec![dns_name.to_owned()]).map_err(issue)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key_pair = KeyPair::generate().map_err(issue)?;
        let certificate = params.signed_by(&key_pair, &self.issuer).map_err(issue)?;
        let file = |end: &str| self.folder.join(format!("{name}{end}"));
        let identity = Identity { ca: self.folder.join("ca.pem"), cert: file(".pem"), key: file(".key") };
        write(&identity.cert, &certificate.pem(), 0o644)?;
        write(&identity.key, &key_pair.serialize_pem(), 0o600)?;
        Ok(identity)
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_pem_files_and_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path()).unwrap();
        let identity = authority.issue("worker-a", "worker-a.worker.pageport").unwrap();
        for path in [&identity.ca, &identity.cert] {
            assert!(fs::read_to_string(path).unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
        }
        assert!(fs::read_to_string(&identity.key).unwrap().contains("PRIVATE KEY"));
        assert_eq!(fs::metadata(&identity.key).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
