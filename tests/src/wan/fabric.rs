//! All links and the switch together: a packet in at a site comes out at another. Pure: no devices, time is passed in.
//!
//! ```text
//! ingress(now, site, plane, bytes) ─▶ route (subnet | switch) ─▶ Link per directed pair ─▶ pop_due(now) ─▶ (site, packet)
//! ```
//! Both planes of a directed pair share one queue, so the guests' segment competes with the underlay as on a real line.
//! Buffers are reused: at a steady rate nothing is allocated.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::config::{SiteConfig, WanConfig};
use super::flow::{Class, parse_ipv4};
use super::lines::Lines;
use super::switch::{Route, Switch};

/// Buffers that are kept for reuse.
const MAX_POOLED: usize = 8192;

/// Which of a site's devices a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Between hosts.
    Underlay,
    /// Between guests.
    Segment,
}

/// A packet under way.
#[derive(Debug)]
pub struct Packet {
    /// The device to write it to.
    pub plane: Plane,
    /// The IP packet or Ethernet frame.
    pub bytes: Vec<u8>,
}

/// The emulated network.
#[derive(Debug)]
pub struct Fabric {
    sites: Vec<SiteConfig>,
    lines: Lines<Packet>,
    switch: Switch,
    pool: Vec<Vec<u8>>,
}

impl Fabric {
    /// The network that `config` describes; pairs of sites without a link do not reach each other.
    #[must_use]
    pub fn new(config: &WanConfig) -> Self {
        let names = config.sites.iter().map(|site| site.name.clone()).collect();
        let lines = Lines::new(names, &config.links, config.seed);
        Self { sites: config.sites.clone(), lines, switch: Switch::default(), pool: Vec::new() }
    }

    /// Takes in what a site's device sent.
    pub fn ingress(&mut self, now: Duration, from: usize, plane: Plane, bytes: &[u8]) {
        match plane {
            Plane::Underlay => {
                let Some((address, class)) = parse_ipv4(bytes) else { return };
                if let Some(to) = self.site_of(address) {
                    self.send(now, (from, to), plane, class, bytes);
                }
            }
            Plane::Segment => match self.switch.route(from, bytes) {
                Route::To(to) => self.send(now, (from, to), plane, Class::Segment, bytes),
                Route::Flood => {
                    for to in (0..self.sites.len()).filter(|to| *to != from) {
                        self.send(now, (from, to), plane, Class::Segment, bytes);
                    }
                }
                Route::Stay => {}
            },
        }
    }

    fn site_of(&self, address: Ipv4Addr) -> Option<usize> {
        self.sites.iter().position(|site| site.subnet.contains(address))
    }

    fn send(&mut self, now: Duration, pair: (usize, usize), plane: Plane, class: Class, bytes: &[u8]) {
        let mut buffer = self.pool.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        let packet = Packet { plane, bytes: buffer };
        if let Err((_, packet)) = self.lines.offer(now, pair, class, bytes.len(), packet) {
            self.recycle(packet);
        }
    }

    /// The next packet that has arrived by `now`, and the site that it arrived at. Hand it to [`Fabric::recycle`] after use.
    pub fn pop_due(&mut self, now: Duration) -> Option<(usize, Packet)> {
        self.lines.pop_due(now).map(|((_, to), packet)| (to, packet))
    }

    /// When the next packet arrives anywhere.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.lines.next_due()
    }

    /// Takes a delivered packet's buffer back.
    pub fn recycle(&mut self, packet: Packet) {
        if self.pool.len() < MAX_POOLED {
            self.pool.push(packet.bytes);
        }
    }

    /// The links, to be steered and read.
    pub fn lines(&mut self) -> &mut Lines<Packet> {
        &mut self.lines
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::link::Shape;
    use super::*;

    const SHAPE: Shape = Shape { rate_bps: 8_000_000, one_way_delay_ms: 10, loss: 0.0, queue_bytes: None };
    const LATER: Duration = Duration::from_secs(1);

    fn fabric() -> Fabric {
        Fabric::new(&WanConfig::mesh(["a", "b", "c"], SHAPE, "/nowhere".into()))
    }

    fn ip_to(last_two: [u8; 2]) -> Vec<u8> {
        vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 1, 1, 10, 77, last_two[0], last_two[1]]
    }

    #[test]
    fn packets_reach_the_site_of_their_subnet() {
        let mut fabric = fabric();
        fabric.ingress(Duration::ZERO, 0, Plane::Underlay, &ip_to([3, 1]));
        fabric.ingress(Duration::ZERO, 0, Plane::Underlay, &ip_to([9, 1]));
        assert_eq!(fabric.next_due(), Some(Duration::from_micros(10_020)));
        let (site, packet) = fabric.pop_due(LATER).unwrap();
        assert_eq!((site, packet.plane, packet.bytes), (2, Plane::Underlay, ip_to([3, 1])));
        assert!(fabric.pop_due(LATER).is_none());
    }

    #[test]
    fn a_flooded_frame_reaches_every_other_site_once() {
        let mut fabric = fabric();
        fabric.ingress(Duration::ZERO, 1, Plane::Segment, &[0xff; 60]);
        let mut sites: Vec<_> = std::iter::from_fn(|| fabric.pop_due(LATER)).map(|(site, _)| site).collect();
        sites.sort_unstable();
        assert_eq!(sites, [0, 2]);
    }

    #[test]
    fn the_planes_share_the_line_and_a_cut_stops_both() {
        let mut fabric = fabric();
        fabric.ingress(Duration::ZERO, 0, Plane::Segment, &[0xff; 1000]);
        fabric.ingress(Duration::ZERO, 0, Plane::Underlay, &ip_to([2, 1]));
        assert!(fabric.pop_due(Duration::from_micros(11_000)).is_some());
        fabric.lines().cut("a", "b").unwrap();
        fabric.ingress(LATER, 0, Plane::Underlay, &ip_to([2, 1]));
        let counters = fabric.lines().counters();
        let a_b = counters.iter().find(|c| c.from == "a" && c.to == "b").unwrap();
        assert_eq!((a_b.total.packets, a_b.segment.packets, a_b.cut.packets), (2, 1, 1));
    }
}
