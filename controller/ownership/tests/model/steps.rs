//! [`Step`]: everything that can happen, and when it can. What comes of it is [`crate::take`]. The model that stateright and
//! [`crate::reach`] run.

use pageport_ownership::{Epoch, Event, Guest, Ownership, Policy, Record};
use stateright::{Model, Property};

use crate::config::{Config, Naive};
use crate::world::{Brain, Life, Said, World};

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
    /// Fault: a worker dies, loses its store, and is started again.
    LoseStore(usize),
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
            | Self::LoseStore(_)
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

    /// Under which epoch the leader would grant this worker a lease now.
    pub fn covers(&self, world: &World, worker: usize) -> Option<Epoch> {
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
            (world.spent[5] < self.store_losses, Step::LoseStore(worker)),
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
        let [moves, failovers, elections, restores, ..] = world.spent;
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
                if moves < self.moves && self.order(register).is_some() {
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
