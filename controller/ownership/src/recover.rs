//! [`Recover`]: who owns a VM after the controllers were restored from a backup.
//!
//! The backup is older than what was done since, so it decides nothing: the workers' records do. Until every worker that could
//! hold the VM has *joined* the new generation (reported, and become deaf to controllers of older ones: [`Generation`]), or
//! was declared dead by a recorded override, nothing is granted and nothing authorised.
//!
//! | newest record | and | becomes |
//! |---|---|---|
//! | `Own{own}` | nobody has seen a newer epoch | `Owned` under `own` |
//! | `Own{own}` | someone has | `Owned` by the same worker, a new epoch |
//! | `Released{e}` | its destination has seen `e` or newer: it will never acquire | `Owned` by the source, a new epoch |
//! | `Released{e}` | its destination has not | `Migrating`, released: the controllers relay |
//! | none of these | the newest tombstone names an owner | `Owned` by that one, a new epoch |
//! | none of these | nobody names an owner | unknown: an operator decides |
//!
//! Guarantees: the result does not depend on the order of reports; new epochs are of the new generation, so that they are newer
//! than anything that the lost controllers can have granted. A move before its commit point is revoked by joining
//! ([`crate::Event::Join`]). It does not know which workers exist: the caller names those of the backup, and the records name others.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::controller::Ownership;
use crate::epoch::Epoch;
use crate::record::Record;

/// How often controllers were restored. A worker keeps the newest one that it has joined, durably.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Generation(pub u16);

impl Generation {
    /// Does a worker that has joined this generation listen to a controller of that one?
    pub fn hears(self, controller: Self) -> bool {
        controller >= self
    }

    /// Older than every epoch of this generation, newer than all before.
    pub fn floor(self) -> Epoch {
        Epoch::new(self.0, 0)
    }
}

/// What a worker says of a VM when it joins, and from then on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Report<W> {
    /// Its record.
    pub record: Record,
    /// Whose the newest epoch in the record is, as far as was stored with it: the destination of a release, the owner that a
    /// tombstone spoke of.
    pub whose: Option<W>,
}

/// One VM while the controllers are finding out.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Recover<W: Ord> {
    generation: Generation,
    awaited: BTreeSet<W>,
    dead: BTreeSet<W>,
    reports: BTreeMap<W, Report<W>>,
}

/// How far that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered<W> {
    /// These have not joined.
    Waiting {
        /// Who.
        missing: Vec<W>,
    },
    /// Everyone has joined, and nobody knows who owned it.
    Unknown,
    /// This is who owns it.
    Known(Ownership<W>),
}

impl<W: Ord + Clone> Recover<W> {
    /// Of a new generation; `workers`: all that the backup knows.
    pub fn new(generation: Generation, workers: impl IntoIterator<Item = W>) -> Self {
        let awaited = workers.into_iter().collect();
        Self { generation, awaited, dead: BTreeSet::new(), reports: BTreeMap::new() }
    }

    /// A worker that has joined this generation says what it has. The last word counts.
    pub fn joined(&mut self, worker: W, report: Report<W>) {
        self.awaited.extend(report.whose.clone());
        self.awaited.insert(worker.clone());
        self.reports.insert(worker, report);
    }

    /// A recorded override: this worker is not coming back with the VM.
    pub fn declared_dead(&mut self, worker: W) {
        self.dead.insert(worker);
    }

    /// What this worker has said, if it has joined.
    pub fn said(&self, worker: &W) -> Option<&Report<W>> {
        self.reports.get(worker)
    }

    /// Everyone has joined, and no record speaks of an owner: nobody has ever had it, or those who had are declared dead. The backup's
    /// owner gets it, under a new epoch; [`None`]: a release speaks of a destination that may yet acquire it.
    pub fn never_held(&self, owner: &W) -> Option<Ownership<W>> {
        let released = |report: &Report<W>| matches!(report.record, Record::Released { .. });
        match self.outcome() {
            Recovered::Unknown if !self.reports.values().any(released) => match self.new_epoch(owner) {
                Recovered::Known(ownership) => Some(ownership),
                Recovered::Waiting { .. } | Recovered::Unknown => None,
            },
            Recovered::Unknown | Recovered::Waiting { .. } | Recovered::Known(_) => None,
        }
    }

    /// Who owns the VM, if that is known.
    pub fn outcome(&self) -> Recovered<W> {
        let known = |worker: &&W| self.reports.contains_key(worker) || self.dead.contains(worker);
        let missing: Vec<W> = self.awaited.iter().filter(|worker| !known(worker)).cloned().collect();
        if !missing.is_empty() {
            return Recovered::Waiting { missing };
        }
        let holder = self.reports.iter().filter_map(|(worker, report)| Some((report.record.owned()?, worker))).max();
        let releaser = self.reports.iter().filter_map(|(worker, report)| match report.record {
            Record::Released { epoch } => Some((epoch, worker, &report.whose)),
            Record::Replica { .. } | Record::Own { .. } | Record::Prepared { .. } => None,
        });
        match (holder, releaser.max()) {
            (Some((own, owner)), released) if released.is_none_or(|(epoch, ..)| own >= epoch) => self.held(owner, own),
            (_, Some((epoch, from, to))) => self.released(from, to.as_ref(), epoch),
            _ => self.tombstoned(),
        }
    }

    fn new_epoch(&self, owner: &W) -> Recovered<W> {
        let own = self.newest().next();
        Recovered::Known(Ownership::Owned { owner: owner.clone(), own, last: own, image: None, confirmed: false })
    }

    /// Nothing older than this is given any more.
    fn newest(&self) -> Epoch {
        let seen = self.reports.values().map(|report| report.record.seen());
        seen.fold(self.generation.floor(), Epoch::max)
    }

    fn seen_elsewhere(&self, than: &W) -> Epoch {
        let others = self.reports.iter().filter(|(worker, _)| *worker != than);
        others.map(|(_, report)| report.record.seen()).max().unwrap_or_default()
    }

    fn held(&self, owner: &W, own: Epoch) -> Recovered<W> {
        if self.seen_elsewhere(owner) > own {
            return self.new_epoch(owner);
        }
        Recovered::Known(Ownership::Owned {
            owner: owner.clone(),
            own,
            last: self.newest(),
            image: None,
            confirmed: false,
        })
    }

    fn released(&self, from: &W, to: Option<&W>, epoch: Epoch) -> Recovered<W> {
        let can_acquire = |worker: &&W| {
            *worker != from && self.reports.get(worker).is_some_and(|report| report.record.seen() < epoch)
        };
        let mut destinations = match to {
            Some(to) => vec![to],
            None => self.reports.keys().collect(),
        };
        destinations.retain(can_acquire);
        match destinations[..] {
            [] => self.new_epoch(from),
            [to] => Recovered::Known(Ownership::Migrating {
                from: from.clone(),
                to: to.clone(),
                own: Epoch::ZERO,
                epoch,
                released: true,
                refused: false,
                floor: self.newest(),
            }),
            _ => Recovered::Unknown,
        }
    }

    fn tombstoned(&self) -> Recovered<W> {
        let told = self.reports.values().filter_map(|report| Some((report.record.seen(), report.whose.as_ref()?)));
        match told.max().map(|(_, owner)| owner).filter(|owner| !self.dead.contains(owner)) {
            Some(owner) => self.new_epoch(owner),
            None => Recovered::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e(n: u64) -> Epoch {
        Epoch::from_raw(n)
    }

    fn outcome(reports: &[(char, Record, Option<char>)]) -> Recovered<char> {
        let mut recover = Recover::new(Generation(1), ['a', 'b']);
        for (worker, record, whose) in reports {
            recover.joined(*worker, Report { record: *record, whose: *whose });
        }
        recover.outcome()
    }

    fn owned(owner: char, own: Epoch, last: Epoch) -> Recovered<char> {
        Recovered::Known(Ownership::Owned { owner, own, last, image: None, confirmed: false })
    }

    #[test]
    fn each_row_of_the_table() {
        let own = |own, seen| Record::Own { own: e(own), seen: e(seen) };
        let replica = |seen| Record::Replica { seen: e(seen), refused: None };
        let released = Record::Released { epoch: e(2) };
        let (floor, new) = (Epoch::new(1, 0), Epoch::new(1, 1));
        assert_eq!(outcome(&[('a', own(1, 1), None)]), Recovered::Waiting { missing: vec!['b'] });
        assert_eq!(outcome(&[('a', own(1, 2), None), ('b', replica(0), None)]), owned('a', e(1), floor));
        assert_eq!(outcome(&[('a', own(1, 1), None), ('b', own(2, 2), None)]), owned('b', e(2), floor));
        assert_eq!(outcome(&[('a', own(1, 1), None), ('b', replica(2), Some('a'))]), owned('a', new, new));
        assert_eq!(outcome(&[('a', released, Some('b')), ('b', replica(2), None)]), owned('a', new, new));
        assert_eq!(outcome(&[('a', released, Some('b')), ('b', own(2, 2), None)]), owned('b', e(2), floor));
        let relay = outcome(&[('a', released, Some('b')), ('b', replica(1), None)]);
        let Recovered::Known(state @ Ownership::Migrating { from: 'a', to: 'b', released: true, .. }) = relay else {
            panic!("{relay:?}")
        };
        assert_eq!((state.last(), state.in_doubt()), (floor, true));
        assert_eq!(outcome(&[('a', replica(2), Some('b')), ('b', replica(1), Some('a'))]), owned('b', new, new));
        assert_eq!(outcome(&[('a', replica(0), None), ('b', replica(0), None)]), Recovered::Unknown);
    }

    #[test]
    fn a_vm_that_nobody_has_had_is_its_owner_s_and_one_that_was_released_is_not() {
        let mut recover = Recover::new(Generation(1), ['a', 'b', 'c']);
        assert_eq!(recover.never_held(&'a'), None, "not everyone has joined");
        for worker in ['a', 'b', 'c'] {
            recover.joined(worker, Report { record: Record::UNKNOWN, whose: None });
        }
        let new = Epoch::new(1, 1);
        assert_eq!(recover.never_held(&'a').map(Recovered::Known), Some(owned('a', new, new)));
        recover.joined('b', Report { record: Record::Released { epoch: e(2) }, whose: None });
        assert_eq!((recover.outcome(), recover.never_held(&'a')), (Recovered::Unknown, None), "a or c may acquire it");
    }

    #[test]
    fn a_worker_that_only_a_record_names_is_waited_for() {
        let released = Record::Released { epoch: e(2) };
        let mut recover = Recover::new(Generation(1), ['a', 'b']);
        recover.joined('a', Report { record: released, whose: Some('c') });
        recover.joined('b', Report { record: Record::UNKNOWN, whose: None });
        assert_eq!(recover.outcome(), Recovered::Waiting { missing: vec!['c'] });
        recover.declared_dead('c');
        assert_eq!(recover.outcome(), owned('a', Epoch::new(1, 1), Epoch::new(1, 1)));
    }

    #[test]
    fn who_has_joined_is_deaf_to_older_controllers() {
        assert!(Generation(1).hears(Generation(1)) && Generation(1).hears(Generation(2)));
        assert!(!Generation(1).hears(Generation(0)));
    }
}
