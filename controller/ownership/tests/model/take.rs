//! [`World::take`]: what a step makes of a world. The register, the leases and the recovery are the crate's own.

use pageport_ownership::{
    Event, Evidence, Generation, Guest, LeaseTable, Message, Ownership, Policy, Proof, Record, Recover, Recovered,
    Report, needs_grant,
};

use crate::config::{Config, LEASE, Naive};
use crate::steps::Step;
use crate::world::{Brain, HOST_NOW, Life, NONCE, Said, World, confirmed_first};

impl World {
    /// Takes a step that is possible.
    pub fn take(&mut self, config: &Config, step: Step) {
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
                    && let Some(next) = config.order(register)
                {
                    *register = next;
                    self.stores = [0, 1].map(|worker: usize| self.hosts[worker].store);
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
            Step::LoseStore(worker) => {
                self.spent[5] += 1;
                let host = &mut self.hosts[worker];
                (host.record, host.whose, host.joined) = (Record::UNKNOWN, None, Generation(0));
                host.store += 1;
                host.forget(config.policy);
                self.handle(config, worker, Event::StoreLost(self.hosts[worker].volatile.guest));
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
                    let register = Ownership::Owned { owner: from, own, last: epoch, image: None, confirmed: false };
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
    pub fn answer_for(&self, config: &Config, worker: usize) -> Option<Event> {
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
        // The store was lost before this move was ordered, or it was not.
        let forgot = host.store != self.stores[worker] && !config.is(Naive::AuthorisesTheForgetful);
        let free = !forgot && host.volatile.guest == Guest::Absent && host.volatile.authorised != Some(epoch);
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
            self.brain = Brain::Knows(confirmed_first());
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
