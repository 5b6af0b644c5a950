//! For this crate's unit tests: an authority that issues worker certificates.

use pageport_common::tls::{Identity, TlsPaths, worker_name};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// A certificate authority made for one test.
pub(crate) struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("key");
        let certificate = params.self_signed(&key).expect("authority");
        std::fs::write(folder.path().join("ca.pem"), certificate.pem()).expect("write");
        Self { folder, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn worker(&self, name: &str) -> Identity {
        let mut params = CertificateParams::new(vec![worker_name(name)]).expect("parameters");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        let paths = TlsPaths {
            ca: self.folder.path().join("ca.pem"),
            cert: self.folder.path().join(format!("{name}.pem")),
            key: self.folder.path().join(format!("{name}.key")),
        };
        std::fs::write(&paths.cert, certificate.pem()).expect("write");
        std::fs::write(&paths.key, key.serialize_pem()).expect("write");
        Identity::load(&paths).expect("identity")
    }
}
