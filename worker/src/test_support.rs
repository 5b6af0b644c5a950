//! For this crate's unit tests: an authority that issues worker certificates, two workers that are connected, and block devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_common::tls::{Identity, TlsPaths, worker_name};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::transport::{PeerConnection, PeerEndpoint};

/// Two workers' endpoints on the loopback, and what connects the first to the second.
pub(crate) struct ConnectedPair {
    /// As the first sees it.
    pub(crate) source: PeerConnection,
    /// As the second sees it.
    pub(crate) destination: PeerConnection,
    _endpoints: [PeerEndpoint; 2],
}

impl ConnectedPair {
    pub(crate) async fn new() -> Self {
        let authority = Authority::new();
        let loopback = "127.0.0.1:0".parse().expect("address");
        let server = PeerEndpoint::bind(loopback, &authority.worker("worker-b")).expect("server");
        let client = PeerEndpoint::bind(loopback, &authority.worker("worker-a")).expect("client");
        let address = server.local_address().expect("address").to_string();
        let (source, destination) = tokio::join!(client.connect("worker-b", &address), server.accept());
        let (source, destination) = (source.expect("connect"), destination.expect("accept"));
        Self { source, destination, _endpoints: [server, client] }
    }
}

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

/// A block device that is freed when it is dropped.
pub(crate) struct LoopDevice {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    /// One of zeros; [`None`], and a word about it: this system gives none.
    #[allow(clippy::print_stderr)]
    pub(crate) fn new(size_bytes: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(size_bytes).expect("size");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output();
        match made.ok().filter(|output| output.status.success()) {
            Some(output) => {
                let path = String::from_utf8_lossy(&output.stdout).trim().into();
                Some(Self { path, _file: file })
            }
            None => {
                eprintln!("skipped: loop devices need root and losetup");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let freed = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(freed.is_ok_and(|status| status.success()), "free {}", self.path.display());
    }
}
