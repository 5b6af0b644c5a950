//! [`plan`]: for each queued move, whether it begins now, waits and why, or is given up.
//!
//! ```text
//!   by rank:  gates (deadline, predecessors, pause, window, workers, memory, anti-affinity) ─▶ room (workers, link) ─▶ admit
//! ```
//! A move that waits at a gate holds nobody up. One that waits for room keeps its turn: whoever ranks below it does not take
//! that slot first. One that has waited long enough ([`OVERDUE_POINTS`]) keeps its turn at all slots that it needs.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use pageport_proto::{MigrationId, SiteName, VmId, WorkerName};

use super::fleet::{Fleet, Guest, Nic, Predecessor, Queued};
use super::wait::{GivenUp, Resource, SameAddress, Wait};

/// The highest priority.
pub const MAX_PRIORITY: u8 = 100;
/// The priority of a move that names none.
pub const DEFAULT_PRIORITY: u8 = 50;
/// So long a move waits for one more point.
pub const AGEING_MS: i64 = 60_000;
/// So long before its deadline a move becomes urgent.
pub const URGENT_MS: i64 = 15 * 60_000;
/// What urgency is worth.
pub const URGENT_POINTS: i64 = 50;
/// More than any move has when it is ordered.
pub const OVERDUE_POINTS: i64 = MAX_PRIORITY as i64 + URGENT_POINTS + 1;

/// What becomes of a queued move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It begins.
    Admit,
    /// It stays queued.
    Wait(Wait),
    /// It will not be made.
    GiveUp(GivenUp),
}

/// Its place among the others: the least is the first.
type Rank = (Reverse<i64>, i64, i64, MigrationId);

/// Decides for every queued move, at this time.
pub fn plan(fleet: &Fleet, now_unix_ms: i64) -> BTreeMap<MigrationId, Decision> {
    let mut ranked: Vec<(Rank, &Queued)> =
        fleet.queued.iter().map(|(id, queued)| (rank(*id, queued, now_unix_ms), queued)).collect();
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    let mut book = Book::of(fleet);
    let decided = ranked
        .into_iter()
        .map(|((Reverse(points), .., id), queued)| (id, book.decide(queued, points >= OVERDUE_POINTS, now_unix_ms)));
    decided.collect()
}

fn rank(id: MigrationId, queued: &Queued, now_unix_ms: i64) -> Rank {
    let waited = now_unix_ms.saturating_sub(queued.ordered_unix_ms).max(0) / AGEING_MS;
    let deadline = queued.deadline_unix_ms.unwrap_or(i64::MAX);
    let urgent = deadline.saturating_sub(now_unix_ms) <= URGENT_MS;
    let points = i64::from(queued.priority) + waited + if urgent { URGENT_POINTS } else { 0 };
    (Reverse(points), deadline, queued.ordered_unix_ms, id)
}

/// What a move needs, once it is known where it goes.
struct Way<'a> {
    guest: &'a Guest,
    from: &'a WorkerName,
    to: &'a WorkerName,
    link: (SiteName, SiteName),
}

impl Way<'_> {
    fn resources(&self) -> [Resource; 3] {
        let (from, to) = self.link.clone();
        [Resource::Link(from, to), Resource::Worker(self.from.clone()), Resource::Worker(self.to.clone())]
    }
}

/// What is taken, by what runs and by what has been admitted so far.
pub(super) struct Book<'a> {
    fleet: &'a Fleet,
    taken: BTreeMap<Resource, u32>,
    /// Whose turn it is at what is kept for it.
    kept: BTreeMap<Resource, String>,
    memory_bytes: BTreeMap<WorkerName, u64>,
    groups: BTreeMap<(WorkerName, String), BTreeSet<VmId>>,
    /// Only of those that more than one guest has.
    nics: BTreeMap<(SiteName, Nic), BTreeSet<VmId>>,
    moving: BTreeSet<VmId>,
}

impl<'a> Book<'a> {
    pub(super) fn of(fleet: &'a Fleet) -> Self {
        let mut book = Self {
            fleet,
            taken: BTreeMap::new(),
            kept: BTreeMap::new(),
            memory_bytes: BTreeMap::new(),
            groups: BTreeMap::new(),
            nics: BTreeMap::new(),
            moving: BTreeSet::new(),
        };
        for (id, guest) in &fleet.guests {
            book.settle(*id, guest, &guest.worker);
        }
        for running in fleet.running.values() {
            book.moving.insert(running.vm);
            let (Some(from), Some(to)) = (fleet.hosts.get(&running.from), fleet.hosts.get(&running.to)) else {
                continue;
            };
            book.take(&Resource::Link(from.site.clone(), to.site.clone()));
            book.take(&Resource::Worker(running.from.clone()));
            book.take(&Resource::Worker(running.to.clone()));
            if let Some(guest) = fleet.guests.get(&running.vm) {
                // It is at one end of the move, whichever its owner is now, and may be at the other.
                let other = if guest.worker == running.to { &running.from } else { &running.to };
                book.settle(running.vm, guest, other);
            }
        }
        book
    }

    /// The guest has, or will have, a place there.
    pub(super) fn settle(&mut self, id: VmId, guest: &Guest, worker: &WorkerName) {
        *self.memory_bytes.entry(worker.clone()).or_default() += guest.memory_bytes;
        for group in &guest.apart {
            self.groups.entry((worker.clone(), group.clone())).or_default().insert(id);
        }
        let Some(host) = self.fleet.hosts.get(worker) else { return };
        for nic in &guest.shared {
            self.nics.entry((host.site.clone(), nic.clone())).or_default().insert(id);
        }
    }

    fn take(&mut self, resource: &Resource) {
        *self.taken.entry(resource.clone()).or_default() += 1;
    }

    fn decide(&mut self, queued: &Queued, overdue: bool, now_unix_ms: i64) -> Decision {
        if let Some(gone) = self.gone(queued) {
            return Decision::GiveUp(gone);
        }
        let verdict = self.gates(queued, now_unix_ms).and_then(|way| self.room(&way).map(|()| way));
        if queued.deadline_unix_ms.is_some_and(|deadline| now_unix_ms >= deadline) {
            return Decision::GiveUp(GivenUp::Deadline { waited: verdict.err().map(Box::new) });
        }
        match verdict {
            Ok(way) => {
                for resource in way.resources() {
                    self.take(&resource);
                }
                self.settle(queued.vm, way.guest, way.to);
                self.moving.insert(queued.vm);
                Decision::Admit
            }
            Err(wait) => {
                self.keep_turn(queued, &wait, overdue, now_unix_ms);
                Decision::Wait(wait)
            }
        }
    }

    fn gone(&self, queued: &Queued) -> Option<GivenUp> {
        let failed = queued.after.iter().find(|(_, predecessor)| **predecessor == Predecessor::Failed);
        if let Some((id, _)) = failed {
            return Some(GivenUp::Predecessor { id: *id });
        }
        let known = self.fleet.guests.contains_key(&queued.vm) || self.fleet.resting.contains(&queued.vm);
        (!known).then_some(GivenUp::Gone)
    }

    /// What has nothing to do with other moves' turns.
    fn gates<'q>(&self, queued: &'q Queued, now_unix_ms: i64) -> Result<Way<'q>, Wait>
    where
        'a: 'q,
    {
        if queued.paused {
            return Err(Wait::Paused);
        }
        for (id, predecessor) in &queued.after {
            if let Predecessor::Pending { vm } = predecessor {
                return Err(Wait::After { id: *id, vm: vm.clone() });
            }
        }
        if let Some(window) = queued.window.filter(|window| !window.is_open(now_unix_ms)) {
            return Err(Wait::Window { window });
        }
        let to = queued.to.as_ref().map_err(|why| Wait::NotMovable { why: why.clone() })?;
        let not_movable = |why: &str| Wait::NotMovable { why: why.to_owned() };
        let guest = self.fleet.guests.get(&queued.vm).ok_or_else(|| not_movable("it does not run"))?;
        if self.moving.contains(&queued.vm) {
            return Err(not_movable("another migration of it is under way"));
        }
        self.place(queued.vm, guest, to)?;
        let site = |worker: &WorkerName| self.fleet.hosts.get(worker).map(|host| host.site.clone());
        let link = site(&guest.worker).zip(site(to)).ok_or_else(|| not_movable("its worker is unknown"))?;
        Ok(Way { guest, from: &guest.worker, to, link })
    }

    /// Could the guest go there, were there no other moves?
    pub(super) fn place(&self, id: VmId, guest: &Guest, to: &WorkerName) -> Result<(), Wait> {
        for worker in [&guest.worker, to] {
            if !self.fleet.hosts.get(worker).is_some_and(|host| host.connected) {
                return Err(Wait::WorkerAway { worker: worker.clone() });
            }
        }
        let Some(target) = self.fleet.hosts.get(to) else { return Err(Wait::WorkerAway { worker: to.clone() }) };
        if target.drained {
            return Err(Wait::Drained { worker: to.clone() });
        }
        if guest.fences_itself && !target.guarded {
            return Err(Wait::NotGuarded { worker: to.clone() });
        }
        let free_bytes = self.free_bytes(to);
        if free_bytes < guest.memory_bytes {
            return Err(Wait::NoMemory { worker: to.clone(), needs_bytes: guest.memory_bytes, free_bytes });
        }
        for group in &guest.apart {
            let there = self.groups.get(&(to.clone(), group.clone()));
            if let Some(other) = there.into_iter().flatten().find(|other| **other != id) {
                let vm = self.fleet.guests.get(other).map(|other| other.name.clone()).unwrap_or_default();
                return Err(Wait::Apart { worker: to.clone(), group: group.clone(), vm });
            }
        }
        for nic in &guest.shared {
            let there = self.nics.get(&(target.site.clone(), nic.clone()));
            if let Some(other) = there.into_iter().flatten().find(|other| **other != id) {
                let vm = self.fleet.guests.get(other).map(|other| other.name.clone()).unwrap_or_default();
                let Nic { bridge, mac } = nic.clone();
                return Err(Wait::SameAddress(SameAddress { vm, site: target.site.clone(), mac, bridge }));
            }
        }
        Ok(())
    }

    /// Memory of a host that no VM has; without bound where it is not known how much there is.
    pub(super) fn free_bytes(&self, worker: &WorkerName) -> u64 {
        let total = self.fleet.hosts.get(worker).map_or(0, |host| host.memory_bytes);
        if total == 0 {
            return u64::MAX;
        }
        let usable = u128::from(total) * u128::from(self.fleet.limits.memory_percent) / 100;
        let taken = self.memory_bytes.get(worker).copied().unwrap_or_default();
        u64::try_from(usable).unwrap_or(u64::MAX).saturating_sub(taken)
    }

    /// Whose turn is it, and is there a slot?
    fn room(&self, way: &Way<'_>) -> Result<(), Wait> {
        let [link, from, to] = way.resources();
        for (resource, worker) in [(&from, way.from), (&to, way.to)] {
            let limit = self.fleet.limits.per_worker;
            if self.taken(resource) >= limit {
                return Err(Wait::WorkerBusy { worker: worker.clone(), limit });
            }
        }
        let (from_site, to_site) = way.link.clone();
        let running = self.taken(&link);
        let limit = self.fleet.line_migrations(&from_site, &to_site);
        if running >= limit {
            return Err(Wait::LinkBusy { from: from_site, to: to_site, limit });
        }
        let line = self.fleet.line(&from_site, &to_site);
        if !line.has_bandwidth(running) {
            return Err(Wait::LinkFull { from: from_site, to: to_site, running, budget_bps: line.budget_bps });
        }
        for resource in [link, from, to] {
            if let Some(vm) = self.kept.get(&resource) {
                return Err(Wait::Behind { vm: vm.clone(), resource });
            }
        }
        Ok(())
    }

    fn taken(&self, resource: &Resource) -> u32 {
        self.taken.get(resource).copied().unwrap_or_default()
    }

    /// Nobody who ranks below takes what this one waits for.
    fn keep_turn(&mut self, queued: &Queued, wait: &Wait, overdue: bool, now_unix_ms: i64) {
        let for_what = match wait {
            Wait::WorkerBusy { worker, .. } => Resource::Worker(worker.clone()),
            Wait::LinkBusy { from, to, .. } | Wait::LinkFull { from, to, .. } => {
                Resource::Link(from.clone(), to.clone())
            }
            Wait::Behind { resource, .. } => resource.clone(),
            Wait::Paused
            | Wait::After { .. }
            | Wait::Window { .. }
            | Wait::NotMovable { .. }
            | Wait::WorkerAway { .. }
            | Wait::NotGuarded { .. }
            | Wait::Drained { .. }
            | Wait::NoMemory { .. }
            | Wait::Apart { .. }
            | Wait::SameAddress(_) => return,
        };
        let Ok(way) = self.gates(queued, now_unix_ms) else { return };
        let (name, all) = (way.guest.name.clone(), way.resources());
        let keeps = all.into_iter().filter(|resource| overdue || *resource == for_what);
        for resource in keeps {
            self.kept.entry(resource).or_insert_with(|| name.clone());
        }
    }
}
