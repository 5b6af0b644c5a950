//! [`Leases`]: the leases that this node has granted as the leader, and which VMs it is failing over.
//!
//! ```text
//!   RenewLease ──▶ quorum round ──▶ grant ──▶ (lease, VMs it covers) ──▶ worker ──▶ its keepers
//!   failover: hold the VM ──▶ surely out? ──▶ propose ──▶ definite answer ──▶ let go
//!   fence:    hold the VMs ──▶ agent      ──▶ propose ──▶ definite answer ──▶ let go
//! ```
//! One [`LeaseTable`] for each term in which this node leads: a new one counts every lease as just granted. The argument why this
//! is safe stands in [`pageport_ownership::lease`].
//!
//! Guarantees: a grant and a hold exclude each other; nothing of an earlier term is used in a later one. Kept in memory only:
//! a lost table costs one lease of waiting.
//!
//! A failover and a fence hold a VM apart from each other, so that neither lets go of what the other relies on. Both may
//! propose a takeover: the second to be applied is refused, since its proof is about an epoch that has passed.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageport_ownership::{Epoch, LeaseTable, LeaseTerms, Proof};
use pageport_proto::{VmId, WorkerName};
use tokio::time::Instant;

use crate::model::State;
use crate::model::state::{Life, Vm};

/// What one worker is granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// How long, from when the worker asked.
    pub lease_ms: u64,
    /// For which VMs, and under which epoch each.
    pub vms: Vec<(VmId, Epoch)>,
}

/// Leases granted by this node.
#[derive(Debug)]
pub struct Leases {
    terms: LeaseTerms,
    zero: Instant,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    term: u64,
    table: LeaseTable<WorkerName, VmId>,
    /// Held by fences.
    fenced: BTreeSet<VmId>,
}

impl Book {
    fn held(&self, vm: &VmId) -> bool {
        self.table.held(vm) || self.fenced.contains(vm)
    }
}

impl Leases {
    /// Nothing granted yet; moments are counted from `now`.
    pub fn new(terms: LeaseTerms, now: Instant) -> Self {
        let table = LeaseTable::new(0, terms);
        Self { terms, zero: now, book: Mutex::new(Book { term: 0, table, fenced: BTreeSet::new() }) }
    }

    /// When a lease is surely out that anybody has granted just now on these terms.
    pub fn surely_out_after(&self) -> Duration {
        Duration::from_millis(self.terms.controller_lease_ms())
    }

    fn ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.zero).as_millis() as u64
    }

    /// The table of this term; [`None`]: a later term has begun, and what belongs to this one is void.
    fn book(&self, term: u64, now: Instant) -> Option<MutexGuard<'_, Book>> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        if term > book.term {
            *book = Book { term, table: LeaseTable::new(self.ms(now), self.terms), fenced: BTreeSet::new() };
        }
        (book.term == term).then_some(book)
    }

    /// Grants a worker its lease. `state` comes from a quorum round of this term that began after the worker's question.
    /// [`None`]: the term is over.
    pub fn grant(&self, term: u64, state: &State, worker: &WorkerName, now: Instant) -> Option<Grant> {
        let mut book = self.book(term, now)?;
        let defined = state.vms.iter().filter(|(_, vm)| vm.life == Life::Defined);
        let covered = |(id, vm): (&VmId, &Vm)| Some((*id, book.table.covers(id, &vm.ownership, worker)?));
        let vms = defined.filter(|(id, _)| !book.fenced.contains(id)).filter_map(covered).collect();
        book.table.granted(worker.clone(), self.ms(now));
        Some(Grant { lease_ms: self.terms.lease_ms(), vms })
    }

    /// May this VM be granted to anybody: is it not being failed over?
    pub fn grantable(&self, term: u64, vm: VmId, now: Instant) -> bool {
        self.book(term, now).is_some_and(|book| !book.held(&vm))
    }

    /// Holds the VM if no possible holder but `heir` can still have a valid lease, and hands out the proof. Propose the failover in
    /// this term, and [`Leases::let_go`] once its outcome is certain.
    pub fn hold_if_out(
        &self,
        term: u64,
        id: VmId,
        vm: &Vm,
        heir: &WorkerName,
        now: Instant,
    ) -> Option<Proof<WorkerName>> {
        let mut book = self.book(term, now)?;
        book.table.begin_failover(id);
        let proof = book.table.leases_out(&id, &vm.ownership, heir, self.ms(now));
        if proof.is_none() {
            book.table.end_failover(&id);
        }
        proof
    }

    /// Holds a VM for a fence. Call it **before** the agent; [`Leases::let_go_of_fenced`] once the outcome is certain. False:
    /// the term is over, or another fence holds the VM.
    pub fn hold_for_fence(&self, term: u64, id: VmId, now: Instant) -> bool {
        self.book(term, now).is_some_and(|mut book| book.fenced.insert(id))
    }

    /// The takeover on a fence agent's word was applied or refused, or was never proposed.
    pub fn let_go_of_fenced(&self, term: u64, id: VmId, now: Instant) {
        if let Some(mut book) = self.book(term, now) {
            book.fenced.remove(&id);
        }
    }

    /// The failover was applied or refused.
    pub fn let_go(&self, term: u64, id: VmId, now: Instant) {
        if let Some(mut book) = self.book(term, now) {
            book.table.end_failover(&id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use pageport_ownership::{Ownership, Policy};
    use pageport_proto::v1;

    use super::*;
    use crate::model::Spec;
    use crate::model::spec::tests::sample;
    use crate::model::state::Power;

    fn self_fencing(worker: &WorkerName) -> Vm {
        let spec = v1::VmSpec { on_isolation: v1::IsolationPolicy::SelfFence.into(), ..sample("web") };
        let spec = Spec::try_from(spec).unwrap();
        assert_eq!(spec.on_isolation, Policy::SelfFence);
        Vm::new(spec, Ownership::first(worker.clone()), Power::Run)
    }

    struct Story {
        leases: Leases,
        zero: Instant,
        worker: WorkerName,
        heir: WorkerName,
        id: VmId,
        vm: Vm,
    }

    impl Story {
        fn new() -> Self {
            let worker: WorkerName = "worker-a".parse().unwrap();
            let leases = Leases::new(LeaseTerms::new(1000, 0, 100).unwrap(), Instant::now());
            let (zero, vm) = (leases.zero, self_fencing(&worker));
            Self { leases, zero, vm, worker, heir: "worker-b".parse().unwrap(), id: VmId::generate() }
        }

        fn at(&self, ms: u64) -> Instant {
            self.zero + Duration::from_millis(ms)
        }

        fn granted(&self, at_ms: u64) -> Vec<(VmId, Epoch)> {
            let state = State { vms: [(self.id, self.vm.clone())].into(), ..State::default() };
            self.leases.grant(7, &state, &self.worker, self.at(at_ms)).unwrap().vms
        }

        fn hold(&self, term: u64, at_ms: u64) -> Option<Proof<WorkerName>> {
            self.leases.hold_if_out(term, self.id, &self.vm, &self.heir, self.at(at_ms))
        }
    }

    #[test]
    fn a_hold_comes_after_the_lease_and_shuts_grants_out_until_it_is_let_go() {
        let story = Story::new();
        let covered = [(story.id, story.vm.ownership.last())];
        assert_eq!(story.granted(5000), covered);
        assert_eq!(story.hold(7, 6100), None);
        assert!(story.leases.grantable(7, story.id, story.at(6100)), "a hold that did not come about leaves nothing");
        let proof = Proof::LeasesOut { workers: vec![story.worker.clone()], last: story.vm.ownership.last() };
        assert_eq!(story.hold(7, 6101), Some(proof));
        assert!(!story.leases.grantable(7, story.id, story.at(6101)));
        assert!(story.granted(6101).is_empty());
        story.leases.let_go(7, story.id, story.at(6102));
        assert_eq!(story.granted(6102), covered);
    }

    #[test]
    fn a_fence_shuts_grants_out_and_neither_it_nor_a_failover_lets_go_of_the_other() {
        let story = Story::new();
        assert!(story.leases.hold_for_fence(7, story.id, story.at(0)));
        assert!(!story.leases.hold_for_fence(7, story.id, story.at(0)), "one fence at a time");
        assert!(!story.leases.grantable(7, story.id, story.at(0)) && story.granted(0).is_empty());
        assert!(story.hold(7, 1_101).is_some(), "leases that are out need not wait for the agent");
        story.leases.let_go(7, story.id, story.at(1_102));
        assert!(!story.leases.grantable(7, story.id, story.at(1_102)), "the fence holds it still");
        assert!(story.hold(7, 1_103).is_some());
        story.leases.let_go_of_fenced(7, story.id, story.at(1_103));
        assert!(!story.leases.grantable(7, story.id, story.at(1_103)), "the failover holds it still");
        story.leases.let_go(7, story.id, story.at(1_104));
        assert!(story.leases.grantable(7, story.id, story.at(1_104)));
        assert!(story.leases.hold_for_fence(7, story.id, story.at(1_105)));
        assert!(story.leases.grantable(8, story.id, story.at(1_106)), "a later term knows of no fence");
        assert!(!story.leases.hold_for_fence(7, story.id, story.at(1_106)), "and the term before has no say");
    }

    #[test]
    fn a_new_term_waits_out_the_leases_of_the_one_before() {
        let story = Story::new();
        assert_eq!(story.hold(8, 60_000), None);
        assert_eq!(story.hold(8, 61_100), None);
        assert!(story.hold(8, 61_101).is_some());
    }

    #[test]
    fn what_belongs_to_an_earlier_term_is_void_and_takes_nothing_from_the_later_one() {
        let story = Story::new();
        assert_eq!(story.hold(8, 0), None);
        assert!(story.hold(8, 1_101).is_some());
        assert_eq!(story.leases.grant(7, &State::default(), &story.worker, story.at(1_102)), None);
        assert!(!story.leases.grantable(7, story.id, story.at(1_102)));
        story.leases.let_go(7, story.id, story.at(1_102));
        assert!(!story.leases.grantable(8, story.id, story.at(1_102)), "the hold of term 8 stands");
    }
}
