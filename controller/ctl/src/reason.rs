//! Why a controller or worker could not be reached, in an operator's words.
//!
//! | what the libraries say | what the operator reads |
//! |---|---|
//! | connection refused, timed out, unreachable | the same, without the layers around it |
//! | the peer's certificate does not verify | which of its properties, and the option to look at |
//! | a TLS alert from the peer | that it does not take *our* certificate |
//!
//! Pure: looks at an error and its sources, no further.

use std::error::Error;
use std::io;

use rustls::{CertificateError, Error as TlsError};

/// How rustls words an alert.
const ALERT: &str = "received fatal alert: ";

/// Is it worth asking again soon?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The peer may be restarting or electing a leader.
    Transient,
    /// Asking again changes nothing until somebody mends something.
    Permanent,
}

/// Why a peer could not be talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// In an operator's words.
    pub text: String,
    /// Is it worth asking again?
    pub class: Class,
}

impl Reason {
    fn permanent(text: impl Into<String>) -> Self {
        Self { text: text.into(), class: Class::Permanent }
    }

    fn transient(text: impl Into<String>) -> Self {
        Self { text: text.into(), class: Class::Transient }
    }
}

/// Explains a failed connection or call by the most telling error in its chain.
pub fn explain(error: &(dyn Error + 'static)) -> Reason {
    let mut deepest = error.to_string();
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(reason) = error.downcast_ref::<TlsError>().map(tls) {
            return reason;
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            // A wrapped error is not among its wrapper's sources: it takes the wrapper's place.
            if let Some(inner) = io.get_ref() {
                next = Some(inner);
                continue;
            }
            if let Some(reason) = system(io) {
                return reason;
            }
        }
        deepest = error.to_string();
        next = error.source();
    }
    // Once a connection is up, h2 keeps only the text of what ended it.
    match deepest.split_once(ALERT) {
        Some((_, description)) => alert(description),
        None => Reason::transient(deepest),
    }
}

fn system(error: &io::Error) -> Option<Reason> {
    let text = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "connection lost",
        io::ErrorKind::TimedOut => "timed out",
        io::ErrorKind::HostUnreachable => "host unreachable",
        io::ErrorKind::NetworkUnreachable => "network unreachable",
        _ => return None,
    };
    Some(Reason::transient(text))
}

fn tls(error: &TlsError) -> Reason {
    match error {
        TlsError::InvalidCertificate(certificate) => Reason::permanent(match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is not from our authority (check --ca)".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet (check the clocks)".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate carries another name (is this the right address?)".to_owned()
            }
            other => format!("its certificate is refused: {other}"),
        }),
        TlsError::AlertReceived(description) => alert(&format!("{description:?}")),
        TlsError::InvalidMessage(_) => Reason::permanent("it does not speak TLS (is this the right port?)"),
        other => Reason::permanent(format!("TLS failed: {other}")),
    }
}

/// What a peer's TLS alert means for us.
fn alert(description: &str) -> Reason {
    Reason::permanent(match description {
        "CertificateRequired" => "it demands a client certificate (check --cert and --key)".to_owned(),
        "UnknownCA" | "BadCertificate" | "CertificateUnknown" | "DecryptError" | "CertificateExpired"
        | "AccessDenied" => {
            format!("it does not take our certificate: {description} (check --cert and --key)")
        }
        other => format!("it refused the connection: {other}"),
    })
}

#[cfg(test)]
mod tests {
    use rustls::AlertDescription;

    use super::*;

    fn wrapped(error: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
        io::Error::other(io::Error::other(error))
    }

    #[test]
    fn the_telling_error_is_found_below_its_wrappers() {
        let cases: [(io::Error, &str, Class); 7] = [
            (wrapped(io::Error::from(io::ErrorKind::ConnectionRefused)), "connection refused", Class::Transient),
            (
                wrapped(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)),
                "not from our authority",
                Class::Permanent,
            ),
            (
                wrapped(TlsError::InvalidCertificate(CertificateError::NotValidForName)),
                "another name",
                Class::Permanent,
            ),
            (
                wrapped(TlsError::AlertReceived(AlertDescription::CertificateRequired)),
                "demands a client certificate",
                Class::Permanent,
            ),
            (wrapped(TlsError::AlertReceived(AlertDescription::UnknownCA)), "does not take our", Class::Permanent),
            (
                wrapped(TlsError::AlertReceived(AlertDescription::UnknownCA).to_string()),
                "does not take our certificate: UnknownCA",
                Class::Permanent,
            ),
            (wrapped("strange"), "strange", Class::Transient),
        ];
        for (error, part, class) in cases {
            let reason = explain(&error);
            assert!(reason.text.contains(part), "{part}: {reason:?}");
            assert_eq!(reason.class, class, "{part}");
        }
    }
}
