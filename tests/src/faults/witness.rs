//! Who executed: what was seen of the guest's heartbeats, and what follows from it. Pure.
//!
//! The guest numbers its heartbeats in its memory, so a copy of it sends the same numbers. They are seen at the network
//! device of each QEMU before any link, so a cut hides none, and QEMU is asked nothing. From that:
//!
//! | seen | means |
//! |---|---|
//! | a number of one boot twice | two copies executed from the same state, at the same time or one after the other |
//! | the numbers of one boot go from source to destination and back | the same, or it went back without saying so |
//! | a number below one seen earlier, at the same place | its memory went back |
//! | an older boot after a newer one | two guests on one disk |
//!
//! A copy that executed for less than one period of the heartbeat is not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use pageport_guest::heartbeat::Heartbeat;

/// One heartbeat, where and when it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The site whose QEMU sent it.
    pub site: &'static str,
    /// When it was read.
    pub at: Instant,
    /// What it said.
    pub heartbeat: Heartbeat,
}

/// What must not be, in one sentence each; empty when all is well. The VM was at `source` at first, and perhaps moved to another site.
#[must_use]
pub fn contradictions(sightings: &[Sighting], source: &str) -> Vec<String> {
    let mut boots: BTreeMap<&str, Vec<&Sighting>> = BTreeMap::new();
    for sighting in sightings {
        boots.entry(&sighting.heartbeat.boot_id).or_default().push(sighting);
    }
    let mut found: Vec<String> = boots.values().filter_map(|of_boot| contradiction_of_boot(of_boot, source)).collect();
    found.extend(overlap_of_boots(&boots));
    found
}

fn contradiction_of_boot(sightings: &[&Sighting], source: &str) -> Option<String> {
    let mut last_at: BTreeMap<&str, u64> = BTreeMap::new();
    let mut seen: BTreeMap<u64, &str> = BTreeMap::new();
    for Sighting { site, heartbeat, .. } in sightings {
        let number = heartbeat.number;
        if let Some(other) = seen.insert(number, site) {
            return Some(format!("heartbeat {number} was sent at {other} and again at {site}"));
        }
        if let Some(last) = last_at.insert(site, number).filter(|last| *last > number) {
            return Some(format!("heartbeat {number} at {site} came after {last}"));
        }
    }
    let mut way: Vec<&str> = seen.values().copied().collect();
    way.dedup();
    let places: BTreeSet<&str> = way.iter().copied().collect();
    if way.len() > places.len() || (way.len() == 2 && way[0] != source) || way.len() > 2 {
        return Some(format!("one boot executed at {} in this order", way.join(", ")));
    }
    None
}

/// Boots in the order of their first heartbeat: none may beat after the next has begun.
fn overlap_of_boots(boots: &BTreeMap<&str, Vec<&Sighting>>) -> Option<String> {
    let mut spans: Vec<_> = boots.values().filter_map(|of_boot| Some((of_boot.first()?, of_boot.last()?))).collect();
    spans.sort_by_key(|(first, _)| first.at);
    spans.windows(2).find(|pair| pair[0].1.at > pair[1].0.at).map(|pair| {
        format!("an older boot still executed at {} when a newer one had begun at {}", pair[0].1.site, pair[1].0.site)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// `a3` is heartbeat 3 of the first boot at a, `b'0` the first of another boot at b.
    fn seen(words: &str) -> Vec<Sighting> {
        let now = Instant::now();
        let sighting = |(n, word): (u64, &str)| {
            let site = if word.starts_with('a') { "a" } else { "b" };
            let (boot_id, digits) = word[1..].strip_prefix('\'').map_or(("x", &word[1..]), |digits| ("y", digits));
            let heartbeat = Heartbeat { boot_id: boot_id.into(), number: digits.parse().unwrap_or_default() };
            Sighting { site, at: now + Duration::from_millis(n), heartbeat }
        };
        (0..).zip(words.split(' ')).map(sighting).collect()
    }

    #[test]
    fn one_guest_that_stays_moves_or_boots_again_is_no_contradiction() {
        for words in ["a1 a2 a3", "a1 a3 b4 b7", "b4 a1 a3 b7", "a1 a2 a'0 a'1", "a1 b2 b'0 b'1"] {
            assert_eq!(contradictions(&seen(words), "a"), Vec::<String>::new(), "{words}");
        }
    }

    #[test]
    fn copies_and_steps_back_are_found() {
        for words in ["a1 a2 b2 b3", "a1 b2 a3", "b1 b2 a3", "a5 a4", "a1 a2 b3 a2", "a1 a'0 a2", "a1 b'0 a2", "a1 a1"]
        {
            assert_eq!(contradictions(&seen(words), "a").len(), 1, "{words}");
        }
    }
}
