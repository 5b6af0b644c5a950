//! Who is at the other end: the name in the client's certificate, for services that are not for everyone.
//!
//! The transport has already checked that the certificate is of our authority. Here: raft is for controllers, and a
//! worker speaks for itself alone. What operators and automation may do comes with roles.

use rustls::client::verify_server_name;
use rustls::pki_types::ServerName;
use rustls::server::ParsedCertificate;
use tonic::{Request, Status};

/// Refuses unless the client's certificate carries this DNS name.
///
/// # Errors
/// `PERMISSION_DENIED`.
pub fn require<T>(request: &Request<T>, name: &str) -> Result<(), Status> {
    let certificates = request.peer_certs();
    let first = certificates.as_ref().and_then(|chain| chain.first());
    let carries = |name: &ServerName<'_>| {
        let parsed = first.and_then(|certificate| ParsedCertificate::try_from(certificate).ok());
        parsed.is_some_and(|parsed| verify_server_name(&parsed, name).is_ok())
    };
    match ServerName::try_from(name) {
        Ok(expected) if carries(&expected) => Ok(()),
        _ => Err(Status::permission_denied(format!(
            "this is for \"{name}\" alone, and the client's certificate does not carry that name"
        ))),
    }
}
