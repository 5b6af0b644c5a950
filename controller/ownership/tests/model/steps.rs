//! [`Step`]: everything that can happen, and what it makes of a [`World`]. The model that stateright and [`crate::reach`] run.

use pageport_ownership::{
    Epoch, Event, Evidence, Generation, Guest, LeaseTable, Message, Ownership, Policy, Proof, Record, Recover,
    Recovered, Report, needs_grant,
};
use stateright::{Model, Property};

use crate::config::{Config, LEASE, Naive};
use crate::world::{Brain, HOST_NOW, Life, NONCE, Said, World};

/// Something happens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    /// A message arrives.
    Arrive(Said),
    /// A worker does what is due.
    CarryOut(usize),
    /// The source's guest is stopped, its last page sent.
    Pause(usize),
    /// The destination has the whole image.
    ImageCompletes(usize),
    /// The source gives up.
    GiveUp(usize),
    /// The destination gives up, before it has the image.
    Refuse(usize),
    /// A worker asks, and the controllers answer; the answer is on its way.
    Ask(usize),
    /// It arrives.
    Answer(usize),
    /// A worker asks for a lease, and the leader grants it. That the answer comes late is as if the worker looked late.
    AskLease(usize),
    /// Naive: an answer that counts whenever it comes.
    LeaseArrives(usize),
    /// A worker looks whether its lease is valid.
    LookAtLease(usize),
    /// The keeper ends the guest.
    Fence(usize),
    /// Time passes: so much on the leader's clock, one on every worker's.
    Tick(u64),
    /// The leader proposes to fail over to this host.
    Propose(usize),
    /// The proposal is committed.
    Commit,
    /// A host that was off boots.
    Boot(usize),
    /// A worker joins the new generation of controllers.
    Join(usize),
    /// The restored controllers have heard enough.
    Recovered,
    /// An operator orders a move.
    Order,
    /// Fault: a worker dies and is started again.
    CrashWorker(usize),
    /// Fault: a hypervisor dies.
    CrashQemu(usize),
    /// Fault: the power of a host goes.
    CrashHost(usize),
    /// Fault: and never comes back.
    LoseHost(usize),
    /// Fault: a keeper is stopped.
    StopKeeper(usize),
    /// Fault: the link between the workers is cut.
    Cut,
    /// Fault: the leader changes.
    Elect,
    /// Fault: the controllers are restored from a backup.
    Restore,
    /// Naive: the controllers decide a cancel.
    ControllersCancel,
}

impl Step {
    /// Is it a fault, or does it need an operator? Neither is what a VM's coming back may depend on.
    pub fn is_fault(&self, config: &Config) -> bool {
        match self {
            Self::CrashWorker(_)
            | Self::CrashQemu(_)
            | Self::CrashHost(_)
            | Self::LoseHost(_)
            | Self::StopKeeper(_)
            | Self::Cut
            | Self::Elect
            | Self::Restore
            | Self::ControllersCancel
            | Self::Order => true,
            Self::Propose(_) => config.policy == Policy::KeepRunning,
            _ => false,
        }
    }
}

impl Model for Config {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::start(self)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        for said in &world.said {
            let peers = matches!(said, Said::Peer(..) | Said::LastPages(..));
            let (Said::Peer(to, _) | Said::LastPages(to, _) | Said::Order(to, ..) | Said::Reply(to, _)) = said else {
                steps.push(Step::Arrive(*said));
                continue;
            };
            if world.hosts[*to].idle() && !matches!(said, Said::LastPages(..)) && !(peers && world.cut) {
                steps.push(Step::Arrive(*said));
            }
        }
        for worker in 0..2 {
            self.host_steps(world, worker, steps);
            self.host_faults(world, worker, steps);
        }
        self.time(world, steps);
        self.controllers(world, steps);
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let mut world = before.clone();
        world.take(self, step);
        world.speak(self);
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one runs", |_, world: &World| world.running() <= 1),
            Property::always("no memory comes back after a newer one ran", |_, world: &World| !world.went_back),
            Property::sometimes("the vm runs elsewhere", |_, world: &World| world.hosts[1].runs() && world.well()),
        ]
    }
}

impl Config {
    fn host_steps(&self, world: &World, worker: usize, steps: &mut Vec<Step>) {
        let host = &world.hosts[worker];
        if self.policy == Policy::SelfFence && world.can_fence(self, worker) {
            steps.push(Step::Fence(worker));
        }
        if host.life == Life::Off {
            steps.push(Step::Boot(worker));
        }
        if host.life != Life::Up {
            return;
        }
        if !host.due.is_empty() {
            steps.push(Step::CarryOut(worker));
            return;
        }
        if let Record::Prepared { .. } = host.record {
            steps.push(Step::GiveUp(worker));
            if host.runs() {
                steps.push(Step::Pause(worker));
            }
        } else if world.said.iter().any(|said| matches!(said, Said::Order(to, _, Event::Authorise(_)) if *to == worker))
        {
            steps.push(Step::GiveUp(worker));
        }
        if let Some(epoch) = host.volatile.authorised {
            if !world.cut
                && host.volatile.guest == Guest::Absent
                && world.said.contains(&Said::LastPages(worker, epoch))
            {
                steps.push(Step::ImageCompletes(worker));
            }
            // Once it has vouched for the image it waits.
            if host.volatile.guest == Guest::Absent {
                steps.push(Step::Refuse(worker));
            }
        }
        if host.reply.is_some() {
            steps.push(Step::Answer(worker));
        }
        if host.joined == world.generation {
            if world.answer_for(self, worker).is_some() {
                steps.push(Step::Ask(worker));
            }
            if self.policy == Policy::SelfFence && self.covers(world, worker).is_some() {
                steps.push(Step::AskLease(worker));
            }
        } else {
            steps.push(Step::Join(worker));
        }
        if host.lease_reply.is_some() {
            steps.push(Step::LeaseArrives(worker));
        }
        if self.policy == Policy::SelfFence {
            steps.push(Step::LookAtLease(worker));
        }
    }

    fn covers(&self, world: &World, worker: usize) -> Option<Epoch> {
        let register = world.register()?;
        match self.naive {
            Some(Naive::NoHold) => register.holds_under(&worker),
            _ => world.leases.covers(&(), register, &worker),
        }
    }

    fn host_faults(&self, world: &World, worker: usize, steps: &mut Vec<Step>) {
        let host = &world.hosts[worker];
        if host.life != Life::Up {
            return;
        }
        let [worker_crashes, host_crashes, qemu_crashes, keeper_stops] = host.faults;
        let guest = host.volatile.guest != Guest::Absent;
        for (possible, step) in [
            (worker_crashes < self.worker_crashes, Step::CrashWorker(worker)),
            (host_crashes < self.host_crashes, Step::CrashHost(worker)),
            (qemu_crashes < self.qemu_crashes && guest, Step::CrashQemu(worker)),
            (keeper_stops < self.keeper_stops && guest && host.deadline.is_some(), Step::StopKeeper(worker)),
            (world.spent[4] < self.losses, Step::LoseHost(worker)),
        ] {
            if possible {
                steps.push(step);
            }
        }
    }

    fn time(&self, world: &World, steps: &mut Vec<Step>) {
        if self.policy == Policy::SelfFence && (0..2).all(|worker| !world.fence_is_due(self, worker)) {
            steps.extend((1..=u64::from(self.drift)).map(Step::Tick));
        }
    }

    fn controllers(&self, world: &World, steps: &mut Vec<Step>) {
        let [moves, failovers, elections, restores, _] = world.spent;
        if !world.cut && self.cuts > 0 {
            steps.push(Step::Cut);
        }
        if elections < self.elections {
            steps.push(Step::Elect);
        }
        if restores < self.restores {
            steps.push(Step::Restore);
        }
        if world.proposal.is_some() {
            steps.push(Step::Commit);
        }
        match &world.brain {
            Brain::Knows(register) => {
                if moves < self.moves && matches!(register, Ownership::Owned { .. }) && world.well() {
                    steps.push(Step::Order);
                }
                if failovers < self.failovers && world.proposal.is_none() {
                    for target in (0..2).filter(|target| world.hosts[*target].life != Life::Lost) {
                        steps.push(Step::Propose(target));
                    }
                }
                if self.is(Naive::ControllersCancel) && matches!(register, Ownership::Migrating { .. }) {
                    steps.push(Step::ControllersCancel);
                }
            }
            Brain::Recovers(_) => steps.push(Step::Recovered),
        }
    }
}

impl World {
    fn take(&mut self, config: &Config, step: Step) {
        match step {
            Step::Arrive(said) => self.arrive(config, said),
            Step::CarryOut(worker) => self.carry_out(config, worker),
            Step::Pause(worker) => {
                self.handle(config, worker, Event::Paused);
                if let Record::Prepared { epoch, .. } = self.hosts[worker].record
                    && self.hosts[1 - worker].volatile.authorised == Some(epoch)
                {
                    self.said.insert(Said::LastPages(1 - worker, epoch));
                }
            }
            Step::ImageCompletes(worker) => {
                if let Some(epoch) = self.hosts[worker].volatile.authorised {
                    self.handle(config, worker, Event::Loaded(epoch));
                    // The source has run on since it sent its last page.
                    self.hosts[worker].behind = self.hosts[1 - worker].runs();
                }
            }
            Step::GiveUp(worker) => {
                let ordered = self.said.iter().find_map(|said| match said {
                    Said::Order(to, _, Event::Authorise(epoch)) if *to == worker => Some(*epoch),
                    _ => None,
                });
                let epoch = match self.hosts[worker].record {
                    Record::Prepared { epoch, .. } => Some(epoch),
                    _ => ordered,
                };
                if let Some(epoch) = epoch {
                    self.handle(config, worker, Event::Cancel(epoch));
                }
            }
            Step::Refuse(worker) => {
                if let Some(epoch) = self.hosts[worker].volatile.authorised {
                    self.handle(config, worker, Event::Refuse(epoch));
                }
            }
            Step::Ask(worker) => self.ask(config, worker),
            Step::Answer(worker) => {
                if let Some(event) = self.hosts[worker].reply.take() {
                    self.handle(config, worker, event);
                }
            }
            Step::AskLease(worker) => {
                let Some(covered) = config.covers(self, worker) else { return };
                let own = match self.hosts[worker].record.owned() {
                    Some(recorded) if config.is(Naive::LeaseForAnyEpoch) => recorded,
                    _ => covered,
                };
                self.leases.granted(worker, self.leader_now());
                let host = &mut self.hosts[worker];
                if config.is(Naive::LeaseFromAnswer) {
                    host.lease_reply = Some(own);
                } else {
                    host.lease.asked(NONCE, HOST_NOW);
                    assert!(host.lease.granted(NONCE, own, LEASE));
                    host.normalise();
                }
            }
            Step::LeaseArrives(worker) => self.lease_arrives(config, worker),
            Step::LookAtLease(worker) => self.look_at_lease(config, worker),
            Step::Fence(worker) | Step::CrashQemu(worker) => {
                self.hosts[worker].faults[2] += u8::from(matches!(step, Step::CrashQemu(_)));
                self.guest_gone(config, worker);
            }
            Step::Tick(by) => {
                self.leases = self.leases.rebased(by);
                self.hosts.iter_mut().for_each(|host| host.tick());
            }
            Step::Propose(target) => self.propose(config, target),
            Step::Commit => self.commit(config),
            Step::Boot(worker) => {
                self.hosts[worker].life = Life::Up;
                self.handle(config, worker, Event::Restarted(Guest::Absent));
            }
            Step::Join(worker) => self.join(config, worker),
            Step::Recovered => {
                if let Brain::Recovers(recover) = &self.brain
                    && let Recovered::Known(register) = recover.outcome()
                {
                    self.brain = Brain::Knows(register);
                }
            }
            Step::Order => {
                if let Brain::Knows(register) = &mut self.brain
                    && let Some(next) = register.order(1 - *register.owner().0)
                {
                    *register = next;
                    self.spent[0] += 1;
                }
            }
            Step::CrashWorker(worker) => {
                self.hosts[worker].faults[0] += 1;
                self.restart_worker(config, worker);
            }
            Step::CrashHost(worker) => {
                self.hosts[worker].faults[1] += 1;
                self.power_off(config, worker, Life::Off);
            }
            Step::LoseHost(worker) => {
                self.spent[4] += 1;
                self.power_off(config, worker, Life::Lost);
            }
            Step::StopKeeper(worker) => {
                self.hosts[worker].faults[3] += 1;
                self.hosts[worker].keeper_stopped = true;
            }
            Step::Cut => self.cut = true,
            Step::Elect => {
                self.spent[2] += 1;
                self.new_leader(config);
            }
            Step::Restore => self.restore(config),
            Step::ControllersCancel => {
                if let Brain::Knows(Ownership::Migrating { from, own, epoch, .. }) = self.brain {
                    let register = Ownership::Owned { owner: from, own, last: epoch, image: None };
                    self.brain = Brain::Knows(register);
                }
            }
        }
    }

    fn arrive(&mut self, config: &Config, said: Said) {
        match said {
            Said::Peer(to, message) => {
                let event = match message {
                    Message::Ready(epoch) => Event::Ready(epoch),
                    Message::Release(epoch) => Event::Release(epoch),
                    Message::Revoked(epoch) => Event::Revoked(epoch),
                    Message::Refused(epoch) => Event::Refused(epoch),
                    Message::Acquired(epoch) => Event::Acquired(epoch),
                };
                self.handle(config, to, event);
            }
            Said::Fact(worker, fact) => {
                if let Brain::Knows(register) = &mut self.brain
                    && let Some(next) = register.step(&Evidence { worker, fact })
                {
                    *register = next;
                }
            }
            Said::Order(to, _, event) | Said::Reply(to, event) => {
                if matches!(event, Event::AuthReply { .. } | Event::Grant { .. } | Event::Inherit { .. }) {
                    // Naive designs: it counts although nobody has asked.
                    self.hosts[to].volatile.question = Some(NONCE);
                }
                self.handle(config, to, event);
            }
            Said::LastPages(..) => {}
        }
    }

    /// What the controllers would answer this worker now, if it had reason to ask.
    fn answer_for(&self, config: &Config, worker: usize) -> Option<Event> {
        let host = &self.hosts[worker];
        let register = self.register()?;
        let held = self.leases.held(&()) && !config.is(Naive::NoHold);
        let own = register.grantable(&worker).filter(|_| !held);
        if let Some(own) = own
            && needs_grant(&host.record, &host.volatile, true, Some(own))
        {
            return Some(match register.inherits(&worker) {
                Some(image) => Event::Inherit { nonce: NONCE, own, image },
                None => Event::Grant { nonce: NONCE, own },
            });
        }
        let epoch = register.authorised(&worker).filter(|epoch| !held && *epoch > host.record.seen())?;
        let free = host.volatile.guest == Guest::Absent && host.volatile.authorised != Some(epoch);
        free.then_some(Event::AuthReply { nonce: NONCE, epoch })
    }

    fn ask(&mut self, config: &Config, worker: usize) {
        let Some(answer) = self.answer_for(config, worker) else { return };
        if config.is(Naive::NoNonce) {
            self.said.insert(Said::Reply(worker, answer));
            return;
        }
        self.handle(config, worker, Event::Asked(NONCE));
        self.hosts[worker].reply = Some(answer);
    }

    fn propose(&mut self, config: &Config, target: usize) {
        let Some(register) = self.register() else { return };
        let mut leases = self.leases.clone();
        leases.begin_failover(());
        let proof = match config.policy {
            Policy::SelfFence => leases.leases_out(&(), register, &target, self.leader_now()),
            // An agent's word, or an override that is true: the hosts are off, and boot only after that.
            Policy::KeepRunning => {
                let others = register.possible_holders().into_iter().copied().filter(|it| *it != target);
                let workers: Vec<usize> = others.collect();
                let off = workers.iter().all(|worker| self.hosts[*worker].life != Life::Up);
                off.then(|| Proof::Fenced { workers, last: register.last(), agent: "power".to_owned() })
            }
        };
        if let Some(proof) = proof
            && register.fail_over(target, config.policy, &proof).is_ok()
        {
            self.leases = leases;
            self.proposal = Some((target, proof));
            self.spent[1] += 1;
        }
    }

    fn commit(&mut self, config: &Config) {
        let (Some((target, proof)), Some(register)) = (self.proposal.take(), self.register()) else { return };
        if let Ok(next) = register.fail_over(target, config.policy, &proof) {
            self.brain = Brain::Knows(next);
        }
        self.leases.end_failover(&());
    }

    fn new_leader(&mut self, config: &Config) {
        let since = if config.is(Naive::NoWait) { 0 } else { self.leader_now() };
        self.leases = LeaseTable::new(since, config.terms());
        self.proposal = None;
    }

    fn restore(&mut self, config: &Config) {
        self.spent[3] += 1;
        self.new_leader(config);
        if config.is(Naive::BelieveBackup) {
            // Made when the VM was defined.
            self.brain = Brain::Knows(Ownership::first(0));
            return;
        }
        self.generation = Generation(self.generation.0 + 1);
        self.brain = Brain::Recovers(Recover::new(self.generation, [0, 1]));
    }

    fn join(&mut self, config: &Config, worker: usize) {
        self.hosts[worker].joined = self.generation;
        self.hosts[worker].reply = None;
        self.hosts[worker].volatile.question = None;
        self.handle(config, worker, Event::Join);
        let host = &self.hosts[worker];
        let report = Report { record: host.record, whose: host.whose };
        if let Brain::Recovers(recover) = &mut self.brain {
            recover.joined(worker, report);
        }
    }
}
