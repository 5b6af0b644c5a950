//! What an operator asked for, checked.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::ids::is_name;
use pageport_proto::v1::OpenPointRequest;

use super::DrillError;

/// How long an export lasts that says nothing of it.
pub const DEFAULT_TIME: Duration = Duration::from_secs(24 * 3600);
/// The shortest time that can be asked for.
pub const SHORTEST_TIME: Duration = Duration::from_secs(1);
/// The longest.
pub const LONGEST_TIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Open this point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The VM.
    pub vm: VmId,
    /// What the exports' names begin with.
    pub name: String,
    /// The point's number.
    pub point: u64,
    /// It ends after this at the latest.
    pub lasts: Duration,
    /// Where it listens besides its socket.
    pub listen: Option<SocketAddr>,
}

impl Order {
    /// Checks a request; `allowed` are the addresses besides the loopback on which exports may listen.
    ///
    /// # Errors
    /// [`DrillError::Request`], [`DrillError::Address`].
    pub fn parse(request: OpenPointRequest, allowed: &[IpAddr]) -> Result<Self, DrillError> {
        let OpenPointRequest { vm_id, vm_name, number, duration_ms, listen } = request;
        let wrong = |what: String| DrillError::Request { what };
        let vm = vm_id.parse().map_err(|error| wrong(format!("{error}")))?;
        if !is_name(&vm_name) {
            return Err(wrong("the vm's name, with which the exports' names begin, is no name".to_owned()));
        }
        if number == 0 {
            return Err(wrong("recovery points are numbered from 1".to_owned()));
        }
        let lasts = if duration_ms == 0 { DEFAULT_TIME } else { Duration::from_millis(duration_ms) };
        if !(SHORTEST_TIME..=LONGEST_TIME).contains(&lasts) {
            let days = LONGEST_TIME.as_secs() / (24 * 3600);
            return Err(wrong(format!(
                "a recovery point cannot be open for {} ms: give 1 s to {days} days",
                lasts.as_millis()
            )));
        }
        let listen = if listen.is_empty() { None } else { Some(address(&listen, allowed)?) };
        Ok(Self { vm, name: vm_name, point: number, lasts, listen })
    }
}

fn address(text: &str, allowed: &[IpAddr]) -> Result<SocketAddr, DrillError> {
    let address: SocketAddr = text.parse().map_err(|_| DrillError::Request {
        what: "the address to listen at is none: give IP:PORT, like 127.0.0.1:10809".to_owned(),
    })?;
    let ip = address.ip();
    if ip.is_loopback() || allowed.contains(&ip) { Ok(address) } else { Err(DrillError::Address { address: ip }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> OpenPointRequest {
        OpenPointRequest {
            vm_id: VmId::generate().to_string(),
            vm_name: "web".to_owned(),
            number: 41,
            ..OpenPointRequest::default()
        }
    }

    #[test]
    fn an_order_lasts_a_day_and_listens_nowhere_but_at_its_socket_unless_it_says_otherwise() {
        let order = Order::parse(request(), &[]).unwrap();
        assert_eq!((order.point, order.lasts, order.listen), (41, DEFAULT_TIME, None));
        let asked = OpenPointRequest { duration_ms: 7_200_000, listen: "[::1]:0".to_owned(), ..request() };
        let order = Order::parse(asked, &[]).unwrap();
        assert_eq!((order.lasts.as_secs(), order.listen), (7200, "[::1]:0".parse().ok()));
    }

    #[test]
    fn only_named_addresses_listen_beyond_the_loopback() {
        let at = |listen: &str| OpenPointRequest { listen: listen.to_owned(), ..request() };
        for listen in ["0.0.0.0:10809", "192.0.2.7:10809", "[::]:10809"] {
            let refused = Order::parse(at(listen), &["192.0.2.8".parse().unwrap()]);
            assert!(matches!(refused, Err(DrillError::Address { .. })), "{listen}: {refused:?}");
        }
        Order::parse(at("192.0.2.7:10809"), &["192.0.2.7".parse().unwrap()]).unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        let day_ms = 24 * 3_600_000;
        let wrong = [
            OpenPointRequest { vm_id: "x".into(), ..request() },
            OpenPointRequest { vm_name: "../x".into(), ..request() },
            OpenPointRequest { number: 0, ..request() },
            OpenPointRequest { duration_ms: 999, ..request() },
            OpenPointRequest { duration_ms: 7 * day_ms + 1, ..request() },
            OpenPointRequest { listen: "10809".into(), ..request() },
            OpenPointRequest { listen: "localhost:10809".into(), ..request() },
        ];
        for wrong in wrong {
            let refused = Order::parse(wrong.clone(), &[]);
            assert!(matches!(refused, Err(DrillError::Request { .. })), "{wrong:?}: {refused:?}");
        }
    }
}
