//! Who is at the other end: the name in the client's certificate, for services that are not for everyone.
//!
//! The transport has already checked that the certificate is of our authority. Here: raft is for controllers, a worker
//! speaks for itself alone, and what is dangerous needs an operator's own certificate. A controller that passes a request
//! on says whose it is ([`CALLER_KEY`]); nobody else is believed. What else operators and automation may do comes with
//! roles.

use axum::http::Extensions;
use pageport_common::tls::{CONTROLLER_NAME, OPERATOR_NAME};
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Request, Status};
use webpki::EndEntityCert;

/// Metadata key under which a controller that passes a request on names its caller.
pub const CALLER_KEY: &str = "pageport-caller";

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

/// The name in the certificate of whoever sent this; [`None`] without a certificate.
pub fn name_of(extensions: &Extensions) -> Option<String> {
    let certificates = extensions.get::<TlsConnectInfo<TcpConnectInfo>>()?.peer_certs()?;
    first_name(certificates.first()?)
}

fn first_name(certificate: &CertificateDer<'_>) -> Option<String> {
    EndEntityCert::try_from(certificate).ok()?.valid_dns_names().next().map(str::to_owned)
}

/// The operator who asks, directly or through another controller.
///
/// # Errors
/// `PERMISSION_DENIED` for anyone else.
pub fn operator<T>(request: &Request<T>) -> Result<String, Status> {
    let direct = request.peer_certs().and_then(|chain| first_name(chain.first()?));
    let caller = match direct {
        Some(name) if name == CONTROLLER_NAME => {
            let passed_on = request.metadata().get(CALLER_KEY).and_then(|name| name.to_str().ok());
            passed_on.map(str::to_owned)
        }
        other => other,
    };
    let is_operator = |name: &String| {
        let rest = name.strip_suffix(OPERATOR_NAME);
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    caller.filter(is_operator).ok_or_else(|| {
        Status::permission_denied(format!(
            "this needs an operator's certificate (a name that ends in \"{OPERATOR_NAME}\"): use pageportctl"
        ))
    })
}
