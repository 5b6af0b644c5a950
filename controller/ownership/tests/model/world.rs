//! [`World`]: one state of the model. Durable, dying with the worker, dying with the host: each field says which.
//!
//! Time is relative: every clock reads a constant ([`HOST_NOW`], [`World::leader_now`]) and a tick moves the past back,
//! through the leases' own `rebased`. What is too far back to matter is normalised, so that the space is finite.

use std::collections::BTreeSet;

use pageport_ownership::{
    Effect, Epoch, Event, Evidence, Fact, Generation, Guest, LeaseTable, Message, Nonce, Owner, Ownership, Policy,
    Proof, Record, Recover, Standing, Volatile, WorkerLease, emits,
};

use crate::config::{Config, LEASE};

/// The one nonce: the answers to all questions but the newest have been dropped, as they would change nothing.
pub const NONCE: Nonce = Nonce(1);
/// What every host's clock reads.
pub const HOST_NOW: u64 = LEASE;

/// Is a host there?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Life {
    /// Yes. That its worker is slow, or stopped, is always possible.
    Up,
    /// Its power is off; it can boot.
    Off,
    /// It never comes back.
    Lost,
}

/// What the driver has still to do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Due {
    /// An effect.
    Effect(Effect),
    /// The permission to resume was there; the command is on its way to the hypervisor.
    Cont,
    /// The permission to boot was there; the hypervisor is being started.
    Start,
    /// Naive designs: a record that is written too late.
    Write(Record),
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    /// On disk.
    pub record: Record,
    /// On disk: whose the newest epoch in the record is.
    pub whose: Option<usize>,
    /// On disk: the generation of controllers that it hears.
    pub joined: Generation,
    /// Naive design: what a crash brings back.
    pub shadow: Option<Record>,
    /// Which store it has.
    pub store: u8,
    /// Power.
    pub life: Life,
    /// Dies with the worker, but for the guest, which dies with the host.
    pub volatile: Volatile,
    /// Dies with the worker.
    pub due: Vec<Due>,
    /// The answer that is on its way; dies with the worker.
    pub reply: Option<Event>,
    /// Dies with the worker.
    pub lease: WorkerLease,
    /// Naive design: an answer about the lease is on its way, with the epoch that it covers; dies with the worker.
    pub lease_reply: Option<Epoch>,
    /// The keeper's deadline; dies with the guest.
    pub deadline: Option<u64>,
    /// The keeper is stopped; dies with the guest.
    pub keeper_stopped: bool,
    /// The VM has run elsewhere since this guest was stopped or loaded.
    pub behind: bool,
    /// So far: of the worker, the host, the hypervisor, the keeper.
    pub faults: [u8; 4],
}

/// What may arrive, from now on, any number of times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Said {
    /// Worker to worker.
    Peer(usize, Message),
    /// Worker to worker: the end of the memory, to the hypervisor that waits for it. Lost with that one.
    LastPages(usize, Epoch),
    /// Worker to controllers.
    Fact(usize, Fact),
    /// Controllers to worker.
    Order(usize, Generation, Event),
    /// Naive designs: an answer that counts whenever it comes.
    Reply(usize, Event),
}

/// The controllers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Brain {
    /// They know.
    Knows(Ownership<usize>),
    /// They were restored.
    Recovers(Recover<usize>),
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// The two hosts.
    pub hosts: [Host; 2],
    /// In the replicated log.
    pub brain: Brain,
    /// In the replicated log.
    pub generation: Generation,
    /// In the leader's memory.
    pub leases: LeaseTable<usize, ()>,
    /// In the replicated log: the stores that the workers had when the move was ordered.
    pub stores: [u8; 2],
    /// A failover that is being replicated.
    pub proposal: Option<(usize, Proof<usize>)>,
    /// The network.
    pub said: BTreeSet<Said>,
    /// The link between the workers is cut.
    pub cut: bool,
    /// So far: moves, failovers, elections, restores, lost hosts, lost stores.
    pub spent: [u8; 6],
    /// Somebody resumed an older memory after the VM had run on elsewhere, without a failover or a lost store.
    pub went_back: bool,
}

impl Host {
    fn new(record: Record, guest: Guest, policy: Policy) -> Self {
        Self {
            record,
            whose: None,
            joined: Generation(0),
            shadow: None,
            store: 0,
            life: Life::Up,
            volatile: Volatile { guest, standing: Standing::of(policy, None), ..Volatile::default() },
            due: vec![],
            reply: None,
            lease: WorkerLease::default(),
            lease_reply: None,
            deadline: None,
            keeper_stopped: false,
            behind: false,
            faults: [0; 4],
        }
    }

    /// Its guest runs.
    pub fn runs(&self) -> bool {
        self.volatile.guest == Guest::Running
    }

    /// The worker can take a step: it is there, and the step before is done.
    pub fn idle(&self) -> bool {
        self.life == Life::Up && self.due.is_empty()
    }

    /// What is lost with a worker is lost.
    pub fn forget(&mut self, policy: Policy) {
        if let Some(record) = self.shadow.take() {
            self.record = record;
        }
        let guest = self.volatile.guest;
        self.volatile = Volatile { guest, standing: Standing::of(policy, None), ..Volatile::default() };
        self.due.clear();
        self.reply = None;
        self.lease = WorkerLease::default();
        self.lease_reply = None;
        self.normalise();
    }

    /// The hypervisor is gone, and its keeper with it.
    pub fn end_guest(&mut self) {
        self.deadline = None;
        self.keeper_stopped = false;
        self.behind = false;
    }

    /// One tick of this host's clock.
    pub fn tick(&mut self) {
        self.lease = self.lease.rebased(1);
        self.deadline = self.deadline.map(|until| until.saturating_sub(1));
        self.normalise();
    }

    /// What can change nothing any more is as if it had never been.
    pub fn normalise(&mut self) {
        if self.lease.valid_at(HOST_NOW).is_none() {
            self.lease = WorkerLease::default();
        }
        if self.volatile.standing != Standing::KeepRunning {
            // The driver looks before each step.
            self.volatile.standing = Standing::of(Policy::SelfFence, self.lease.valid_at(HOST_NOW));
        }
        if self.volatile.guest == Guest::Absent && self.due.is_empty() {
            self.deadline = None;
        }
        if matches!(self.volatile.guest, Guest::Absent | Guest::Running) {
            self.behind = false;
        }
    }
}

/// A VM whose first owner has it.
pub fn confirmed_first() -> Ownership<usize> {
    let first = Ownership::first(0);
    let (worker, own) = first.owner();
    first.step(&Evidence { worker: *worker, fact: Fact::Acquired(own) }).unwrap()
}

impl World {
    /// The VM runs at the first host, and has a replica at the second.
    pub fn start(config: &Config) -> Self {
        let one = Epoch::ZERO.next();
        let mut owner = Host::new(Record::Own { own: one, seen: one }, Guest::Running, config.policy);
        let other = Host::new(Record::UNKNOWN, Guest::Absent, config.policy);
        let now = config.terms().controller_lease_ms() + 1;
        let mut leases = LeaseTable::new(0, config.terms());
        if config.policy == Policy::SelfFence {
            owner.lease.asked(NONCE, HOST_NOW);
            assert!(owner.lease.granted(NONCE, one, LEASE));
            leases.granted(0, now);
            owner.deadline = Some(HOST_NOW + LEASE);
            owner.volatile.standing = Standing::Leased(one);
        }
        let mut world = Self {
            hosts: [owner, other],
            brain: Brain::Knows(confirmed_first()),
            generation: Generation(0),
            leases,
            stores: [0; 2],
            proposal: None,
            said: BTreeSet::new(),
            cut: false,
            spent: [0; 6],
            went_back: false,
        };
        world.speak(config);
        world
    }

    /// What the leader's clock reads.
    pub fn leader_now(&self) -> u64 {
        self.leases.terms().controller_lease_ms() + 1
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.hosts.iter().filter(|host| host.runs()).count()
    }

    /// The register, unless it is being recovered.
    pub fn register(&self) -> Option<&Ownership<usize>> {
        match &self.brain {
            Brain::Knows(register) => Some(register),
            Brain::Recovers(_) => None,
        }
    }

    /// The VM runs where the controllers say, and no move is under way.
    pub fn well(&self) -> bool {
        match self.register() {
            Some(Ownership::Owned { owner, own, .. }) => {
                let host = &self.hosts[*owner];
                host.runs() && host.record.owned() == Some(*own)
            }
            Some(Ownership::Migrating { .. }) | None => false,
        }
    }

    /// Everything that anyone says in this state joins what may arrive; what can change nothing any more leaves it.
    pub fn speak(&mut self, config: &Config) {
        for (worker, host) in self.hosts.iter().enumerate().filter(|(_, host)| host.life == Life::Up) {
            let messages = emits(&host.record, &host.volatile);
            self.said.extend(messages.iter().map(|message| Said::Peer(1 - worker, *message)));
            if host.joined == self.generation {
                let facts = pageport_ownership::controller::facts(&host.record);
                self.said.extend(facts.into_iter().map(|fact| Said::Fact(worker, fact)));
            }
        }
        if let Brain::Knows(register) = &self.brain {
            let register = register.clone();
            self.say_orders(&register, config);
        }
        if self.spent[5] == config.store_losses {
            // No record forgets from here on.
            let (hosts, brain) = (&self.hosts, &self.brain);
            self.said.retain(|said| alive(said, hosts, brain));
        }
    }

    fn say_orders(&mut self, register: &Ownership<usize>, config: &Config) {
        let generation = self.generation;
        let mut say = |worker, event| {
            self.said.insert(Said::Order(worker, generation, event));
        };
        let (owner, own) = register.owner();
        for worker in 0..2 {
            say(worker, Event::Owned { epoch: own, owner: if *owner == worker { Owner::Me } else { Owner::Other } });
        }
        let Ownership::Migrating { from, to, epoch, released, refused, .. } = *register else { return };
        say(from, Event::Authorise(epoch));
        if !config.is(crate::config::Naive::NoRelay) {
            if released {
                say(to, Event::Release(epoch));
            }
            if refused {
                say(from, Event::Refused(epoch));
            }
        }
        if config.is(crate::config::Naive::PlainAuthorisation) {
            say(to, Event::AuthReply { nonce: NONCE, epoch });
        }
    }
}

/// Can this message still change something, now or later? (`seen` never falls; the table tests show it.)
fn alive(said: &Said, hosts: &[Host; 2], brain: &Brain) -> bool {
    let prepared_or_new = |record: &Record, epoch| match *record {
        Record::Prepared { epoch: prepared, .. } => prepared <= epoch,
        _ => record.seen() < epoch,
    };
    let released_or_new = |record: &Record, epoch| match *record {
        Record::Released { epoch: released } => released <= epoch,
        _ => record.seen() < epoch,
    };
    match *said {
        Said::Peer(to, message) => {
            let record = &hosts[to].record;
            match message {
                Message::Ready(epoch) | Message::Refused(epoch) => prepared_or_new(record, epoch),
                Message::Release(epoch) | Message::Revoked(epoch) => record.seen() < epoch,
                Message::Acquired(epoch) => released_or_new(record, epoch),
            }
        }
        Said::LastPages(to, epoch) => hosts[to].record.seen() < epoch,
        Said::Fact(_, fact) => {
            let (Fact::Revoked(epoch) | Fact::Released(epoch) | Fact::Refused(epoch) | Fact::Acquired(epoch)) = fact;
            match brain {
                Brain::Knows(Ownership::Owned { own, confirmed: false, .. }) if fact == Fact::Acquired(*own) => true,
                Brain::Knows(Ownership::Owned { last, .. }) => epoch > *last,
                Brain::Knows(Ownership::Migrating { epoch: current, .. }) => epoch >= *current,
                Brain::Recovers(_) => false,
            }
        }
        Said::Order(to, generation, event) => {
            let record = &hosts[to].record;
            let matters = match event {
                Event::Refused(epoch) => prepared_or_new(record, epoch),
                Event::Owned { epoch, owner: Owner::Other } => match *record {
                    Record::Replica { seen, .. } => seen < epoch,
                    Record::Own { own, .. } | Record::Prepared { own, .. } => own < epoch,
                    Record::Released { epoch: released } => released <= epoch,
                },
                Event::Authorise(epoch)
                | Event::Release(epoch)
                | Event::AuthReply { epoch, .. }
                | Event::Owned { epoch, .. } => record.seen() < epoch,
                _ => true,
            };
            matters && hosts[to].joined.hears(generation)
        }
        Said::Reply(..) => true,
    }
}
