//! What kind of traffic a packet is, and how many bytes of each kind a link carried. Pure.
//!
//! | plane | class |
//! |---|---|
//! | underlay (TUN, IPv4) | protocol and the smaller of its two ports: the service's, since clients use ephemeral ports |
//! | stretched segment (TAP, Ethernet) | one class |
//!
//! Fragments after the first and protocols without ports have port 0. Only traffic between hosts of the lab is seen here, so
//! what does not parse is counted as protocol 0 and not refused.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::link::Fate;

/// IPv4's number for TCP.
pub const TCP: u8 = 6;
/// IPv4's number for UDP.
pub const UDP: u8 = 17;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The guests' stretched Ethernet segment.
    Segment,
    /// Traffic between the sites' hosts.
    Underlay {
        /// IPv4 protocol number.
        protocol: u8,
        /// The smaller port.
        port: u16,
    },
}

/// The destination and class of an IPv4 packet; none when it is not IPv4.
#[must_use]
pub fn parse_ipv4(packet: &[u8]) -> Option<(Ipv4Addr, Class)> {
    let header: &[u8; 20] = packet.first_chunk()?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    let protocol = header[9];
    let first_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let payload = usize::from(header[0] & 0x0f) * 4;
    let ports: Option<&[u8; 4]> = packet.get(payload..).and_then(<[u8]>::first_chunk);
    let port = match (protocol, ports) {
        (TCP | UDP, Some(p)) if first_fragment => {
            u16::from_be_bytes([p[0], p[1]]).min(u16::from_be_bytes([p[2], p[3]]))
        }
        _ => 0,
    };
    Some((destination, Class::Underlay { protocol, port }))
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Packets.
    pub packets: u64,
    /// Bytes as read from the device (IP packets on the underlay, Ethernet frames on the segment).
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, size: usize) {
        self.packets += 1;
        self.bytes += size as u64;
    }
}

/// One row of the underlay's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCount {
    /// IPv4 protocol number.
    pub protocol: u8,
    /// The service's port.
    pub port: u16,
    /// What was carried.
    #[serde(flatten)]
    pub amount: Amount,
}

/// What one direction of a link has carried and dropped since the emulator started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Source site.
    pub from: String,
    /// Destination site.
    pub to: String,
    /// Everything that went onto the wire, randomly lost packets included.
    pub total: Amount,
    /// Of these, the stretched segment's.
    pub segment: Amount,
    /// Of these, the underlay's by service.
    pub flows: Vec<FlowCount>,
    /// Lost on the wire.
    pub lost: Amount,
    /// Found the queue full.
    pub queue_full: Amount,
    /// Found the link cut.
    pub cut: Amount,
}

impl Counters {
    /// Bytes that the underlay carried for one service.
    #[must_use]
    pub fn service_bytes(&self, protocol: u8, port: u16) -> u64 {
        self.flows.iter().filter(|f| f.protocol == protocol && f.port == port).map(|f| f.amount.bytes).sum()
    }
}

/// Counts as packets pass.
#[derive(Debug, Default)]
pub struct Meter {
    total: Amount,
    segment: Amount,
    flows: BTreeMap<(u8, u16), Amount>,
    lost: Amount,
    queue_full: Amount,
    cut: Amount,
}

impl Meter {
    /// Counts one offered packet.
    pub fn count(&mut self, class: Class, size: usize, fate: Fate) {
        match fate {
            Fate::QueueFull => return self.queue_full.add(size),
            Fate::Cut => return self.cut.add(size),
            Fate::Lost => self.lost.add(size),
            Fate::Carried => {}
        }
        self.total.add(size);
        match class {
            Class::Segment => self.segment.add(size),
            Class::Underlay { protocol, port } => self.flows.entry((protocol, port)).or_default().add(size),
        }
    }

    /// The figures so far.
    #[must_use]
    pub fn read(&self, from: &str, to: &str) -> Counters {
        Counters {
            from: from.to_owned(),
            to: to.to_owned(),
            total: self.total,
            segment: self.segment,
            flows: self.flows.iter().map(|(&(protocol, port), &amount)| FlowCount { protocol, port, amount }).collect(),
            lost: self.lost,
            queue_full: self.queue_full,
            cut: self.cut,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn packet(protocol: u8, from: u16, to: u16, fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 77, 1, 1, 10, 77, 2, 1];
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet.extend(from.to_be_bytes());
        packet.extend(to.to_be_bytes());
        packet
    }

    #[test]
    fn both_directions_of_a_flow_have_the_class_of_its_service() {
        let expected = (Ipv4Addr::new(10, 77, 2, 1), Class::Underlay { protocol: TCP, port: 4444 });
        assert_eq!(parse_ipv4(&packet(TCP, 40_000, 4444, 0)), Some(expected));
        assert_eq!(parse_ipv4(&packet(TCP, 4444, 40_000, 0)), Some(expected));
    }

    #[test]
    fn what_has_no_ports_has_port_zero() {
        for odd in [packet(1, 9, 9, 0), packet(UDP, 9, 9, 100), packet(TCP, 9, 9, 0)[..20].to_vec()] {
            let (_, class) = parse_ipv4(&odd).unwrap();
            assert!(matches!(class, Class::Underlay { port: 0, .. }), "{class:?}");
        }
        assert_eq!(parse_ipv4(&[0x60; 40]), None);
        assert_eq!(parse_ipv4(&[0x45; 19]), None);
    }

    #[test]
    fn the_meter_keeps_services_segment_and_drops_apart() {
        let mut meter = Meter::default();
        let flow = Class::Underlay { protocol: UDP, port: 7501 };
        meter.count(flow, 100, Fate::Carried);
        meter.count(flow, 10, Fate::Lost);
        meter.count(flow, 1, Fate::QueueFull);
        meter.count(Class::Segment, 1000, Fate::Carried);
        let counters = meter.read("a", "b");
        assert_eq!(counters.total, Amount { packets: 3, bytes: 1110 });
        assert_eq!(counters.service_bytes(UDP, 7501), 110);
        assert_eq!(counters.segment.bytes, 1000);
        assert_eq!((counters.lost.bytes, counters.queue_full.bytes, counters.cut.bytes), (10, 1, 0));
    }
}
