//! The links of all directed pairs of sites, each with its counters. Pure: time is passed in, a packet is anything.
//!
//! Pairs without a link carry nothing and count nothing.

use std::time::Duration;

use super::config::LinkConfig;
use super::flow::{Class, Counters, Meter};
use super::link::{Fate, Link, Shape};

/// Two sites by their position: from, to.
pub type Pair = (usize, usize);

#[derive(Debug)]
struct Line<P> {
    pair: Pair,
    link: Link<P>,
    meter: Meter,
}

/// All links.
#[derive(Debug)]
pub struct Lines<P> {
    sites: Vec<String>,
    lines: Vec<Line<P>>,
}

/// A pair of sites without a link.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("find link: there is none from {from} to {to}")]
pub struct NoSuchLink {
    /// Source site.
    pub from: String,
    /// Destination site.
    pub to: String,
}

impl<P> Lines<P> {
    /// The links between `sites`; one that names another site is left out. What is lost follows from the seed.
    #[must_use]
    pub fn new(sites: Vec<String>, links: &[LinkConfig], seed: u64) -> Self {
        let index = |name: &str| sites.iter().position(|site| site == name);
        let line = |(seed, link): (u64, &LinkConfig)| {
            let pair = (index(&link.from)?, index(&link.to)?);
            Some(Line { pair, link: Link::new(link.shape, seed), meter: Meter::default() })
        };
        let lines = (seed..=u64::MAX).zip(links).filter_map(line).collect();
        Self { sites, lines }
    }

    /// Takes in a packet of `size` bytes. One that is not carried is handed back with the reason.
    ///
    /// # Errors
    /// The fate of a packet that will not come out.
    pub fn offer(&mut self, now: Duration, pair: Pair, class: Class, size: usize, packet: P) -> Result<(), (Fate, P)> {
        let Some(line) = self.lines.iter_mut().find(|line| line.pair == pair) else { return Err((Fate::Cut, packet)) };
        let offered = line.link.offer(now, size, packet);
        line.meter.count(class, size, offered.as_ref().map_or_else(|(fate, _)| *fate, |()| Fate::Carried));
        offered
    }

    /// Whether a packet of `size` bytes would be taken in now.
    #[must_use]
    pub fn has_room(&self, now: Duration, pair: Pair, size: usize) -> bool {
        let line = self.lines.iter().find(|line| line.pair == pair);
        line.is_some_and(|line| !line.link.is_cut() && line.link.has_room(now, size))
    }

    /// The next packet that has arrived by `now`, and its way.
    pub fn pop_due(&mut self, now: Duration) -> Option<(Pair, P)> {
        self.lines.iter_mut().find_map(|line| line.link.pop_due(now).map(|packet| (line.pair, packet)))
    }

    /// When the next packet arrives anywhere.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.lines.iter().filter_map(|line| line.link.next_due()).min()
    }

    /// Changes a link from now on.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_shape(&mut self, from: &str, to: &str, shape: Shape) -> Result<(), NoSuchLink> {
        self.find(from, to).map(|line| line.link.set_shape(shape))
    }

    /// Cuts a link; hands back what was under way, which is lost.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn cut(&mut self, from: &str, to: &str) -> Result<Vec<P>, NoSuchLink> {
        self.find(from, to).map(|line| line.link.cut().collect())
    }

    /// Joins a link again.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn heal(&mut self, from: &str, to: &str) -> Result<(), NoSuchLink> {
        self.find(from, to).map(|line| line.link.heal())
    }

    fn find(&mut self, from: &str, to: &str) -> Result<&mut Line<P>, NoSuchLink> {
        let sites = &self.sites;
        self.lines
            .iter_mut()
            .find(|line| sites[line.pair.0] == from && sites[line.pair.1] == to)
            .ok_or_else(|| NoSuchLink { from: from.to_owned(), to: to.to_owned() })
    }

    /// What every direction has carried so far.
    #[must_use]
    pub fn counters(&self) -> Vec<Counters> {
        self.lines.iter().map(|line| line.meter.read(&self.sites[line.pair.0], &self.sites[line.pair.1])).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { rate_bps: 8_000_000, one_way_delay_ms: 10, loss: 0.0, queue_bytes: Some(2000) };
    const CLASS: Class = Class::Underlay { protocol: 17, port: 1 };

    #[test]
    fn packets_go_their_way_and_links_are_steered_by_name() {
        let link = LinkConfig { from: "a".into(), to: "b".into(), shape: SHAPE };
        let mut lines = Lines::new(vec!["a".into(), "b".into()], &[link], 1);
        let now = Duration::ZERO;
        lines.offer(now, (0, 1), CLASS, 1000, 'x').unwrap();
        assert!(lines.has_room(now, (0, 1), 1000) && !lines.has_room(now, (0, 1), 1001));
        assert_eq!(lines.offer(now, (1, 0), CLASS, 1000, 'y'), Err((Fate::Cut, 'y')));
        assert_eq!(lines.next_due(), Some(Duration::from_millis(11)));
        assert_eq!(lines.pop_due(Duration::from_millis(11)), Some(((0, 1), 'x')));
        lines.offer(now, (0, 1), CLASS, 1000, 'z').unwrap();
        assert_eq!(lines.cut("a", "b"), Ok(vec!['z']));
        assert!(!lines.has_room(now, (0, 1), 1));
        lines.heal("a", "b").unwrap();
        assert!(lines.has_room(now, (0, 1), 1));
        assert_eq!(lines.cut("a", "x"), Err(NoSuchLink { from: "a".into(), to: "x".into() }));
        assert_eq!(lines.counters()[0].total.bytes, 2000);
    }
}
