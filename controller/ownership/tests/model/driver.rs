//! What a worker's driver does with the rules: one step, its effects one by one, and the faults of a host.
//!
//! The rules themselves are [`pageport_ownership::worker_step`] and [`pageport_ownership::Durable`]. What is here is the
//! contract of a driver (persist, then effects, then speak; a resume is several steps), and the switches of [`Naive`].

use pageport_ownership::{Durable, Effect, Event, Guest, Licence, Message, Policy, Record, Standing, worker_step};

use crate::config::{Config, LATENCY, LEASE, Naive};
use crate::world::{Due, HOST_NOW, Life, NONCE, Said, World};

impl World {
    /// One event at one worker: the record is written, the effects are due.
    pub fn handle(&mut self, config: &Config, worker: usize, event: Event) {
        let event = match event {
            Event::Release(_) if config.is(Naive::ResumeWithoutLease) => {
                self.hosts[worker].volatile.standing = Standing::KeepRunning;
                event
            }
            event => event,
        };
        let host = &mut self.hosts[worker];
        let before = host.record;
        let mut step = worker_step(&before, &host.volatile, event);
        let mut due: Vec<Due> = step.effects.iter().copied().map(Due::Effect).collect();
        match (config.naive, event, step.record) {
            (Some(Naive::NoRefused), Event::Release(_) | Event::Refuse(_), Some(Record::Replica { .. })) => return,
            (Some(Naive::RevokeInMemory), Event::Cancel(_) | Event::Refused(_), Some(_)) => host.shadow = Some(before),
            (Some(Naive::ResumeBeforeAcquire), Event::Release(_), Some(record @ Record::Own { .. })) => {
                due.push(Due::Write(record));
                step.record = None;
            }
            (Some(Naive::ReleaseBeforeRecord), Event::Ready(epoch), Some(record)) => {
                self.said.insert(Said::Peer(1 - worker, Message::Release(epoch)));
                due.push(Due::Write(record));
                step.record = None;
            }
            (_, _, Some(_)) => host.shadow = None,
            (_, _, None) => {}
        }
        if config.is(Naive::RecordStarts)
            && event == Event::Restarted(Guest::Absent)
            && matches!(before, Record::Own { .. })
        {
            due.push(Due::Effect(Effect::Boot));
        }
        if let Some(record) = step.record {
            assert!(record.seen() >= before.seen(), "{before:?} then {record:?} on {event:?}");
            let other = matches!(event, Event::Owned { .. } | Event::Acquired(_) | Event::Ready(_));
            host.whose = if other { Some(1 - worker) } else { None };
            host.record = record;
        }
        host.volatile = step.volatile;
        if host.volatile.authorised.is_none() || host.volatile.guest != Guest::Absent {
            self.said.retain(|said| !matches!(said, Said::LastPages(to, _) if *to == worker));
        }
        let host = &mut self.hosts[worker];
        host.due.extend(due);
        host.normalise();
    }

    /// Carries out what has been due longest.
    pub fn carry_out(&mut self, config: &Config, worker: usize) {
        match self.hosts[worker].due.remove(0) {
            Due::Effect(Effect::Arm) => self.arm(worker),
            Due::Effect(Effect::Disarm) => self.hosts[worker].deadline = None,
            Due::Effect(Effect::Resume) if self.permitted(config, worker) => {
                self.hosts[worker].due.insert(0, Due::Cont);
            }
            Due::Effect(Effect::Boot) if self.permitted(config, worker) => {
                self.hosts[worker].due.insert(0, Due::Start);
            }
            Due::Effect(Effect::Resume | Effect::Boot) => {}
            Due::Cont if self.hosts[worker].volatile.guest != Guest::Absent => self.set_running(config, worker),
            Due::Start if self.hosts[worker].volatile.guest == Guest::Absent => {
                self.hosts[worker].behind = false;
                if config.policy == Policy::SelfFence && !config.is(Naive::BootsRunning) {
                    // Started stopped: time has passed since the permission.
                    self.hosts[worker].volatile.guest = Guest::Paused;
                    self.hosts[worker].due.splice(0..0, [Effect::Arm, Effect::Resume].map(Due::Effect));
                } else {
                    self.set_running(config, worker);
                }
            }
            Due::Cont | Due::Start => {}
            Due::Effect(Effect::Pause) => self.hosts[worker].volatile.guest = Guest::Paused,
            Due::Effect(Effect::KillGuest | Effect::DropImage) => self.guest_gone(config, worker),
            // The image comes over the link: `Step::ImageCompletes`.
            Due::Effect(Effect::LoadImage(_)) => {}
            Due::Write(record) => self.hosts[worker].record = record,
        }
        self.hosts[worker].normalise();
    }

    /// Is the guest to be set running with the driver's permission, at this moment?
    fn permitted(&self, config: &Config, worker: usize) -> bool {
        let host = &self.hosts[worker];
        if config.is(Naive::ResumeBeforeAcquire) || config.is(Naive::RecordStarts) {
            return true;
        }
        // A naive destination took itself for one that needs no lease.
        let policy = match host.volatile.standing {
            Standing::KeepRunning => Policy::KeepRunning,
            Standing::Leased(_) | Standing::Unleased => config.policy,
        };
        let durable = Durable::persist(host.record, |_| Ok::<(), ()>(())).unwrap();
        let Some(permission) =
            Licence::of(policy, host.lease.valid_at(HOST_NOW)).and_then(|licence| durable.may_run(licence))
        else {
            return false;
        };
        // Whatever may run under a lease is armed, with that lease or the one before.
        assert_eq!(permission.deadline_ms().is_some(), policy == Policy::SelfFence);
        assert!(policy == Policy::KeepRunning || host.deadline.is_some(), "set running unarmed: {host:?}");
        true
    }

    fn arm(&mut self, worker: usize) {
        let host = &mut self.hosts[worker];
        if let Some(lease) = host.lease.valid_at(HOST_NOW) {
            host.deadline = Some(lease.until_ms());
        } else {
            // No lease, no permission: what was to follow does not.
            host.due.clear();
        }
    }

    fn set_running(&mut self, config: &Config, worker: usize) {
        if self.hosts[worker].behind && self.spent[1] == 0 {
            self.went_back = true;
        }
        // The hypervisor does what it is told, whatever the record says.
        self.hosts[worker].volatile.guest = Guest::Running;
        let other = &mut self.hosts[1 - worker];
        other.behind = matches!(other.volatile.guest, Guest::Paused | Guest::Loaded(_));
        self.handle(config, worker, Event::Resumed);
    }

    /// The hypervisor ends; a worker that is there notices.
    pub fn guest_gone(&mut self, config: &Config, worker: usize) {
        self.hosts[worker].end_guest();
        if self.hosts[worker].life == Life::Up {
            self.handle(config, worker, Event::QemuGone);
        } else {
            self.hosts[worker].volatile.guest = Guest::Absent;
        }
    }

    /// The worker dies and is started again: what it finds is still there.
    pub fn restart_worker(&mut self, config: &Config, worker: usize) {
        self.hosts[worker].forget(config.policy);
        self.handle(config, worker, Event::Restarted(self.hosts[worker].volatile.guest));
    }

    /// The power goes.
    pub fn power_off(&mut self, config: &Config, worker: usize, life: Life) {
        let host = &mut self.hosts[worker];
        host.life = life;
        host.volatile.guest = Guest::Absent;
        host.end_guest();
        host.forget(config.policy);
    }

    /// The worker looks at its lease, and tells the rules.
    pub fn look_at_lease(&mut self, config: &Config, worker: usize) {
        let standing = Standing::of(config.policy, self.hosts[worker].lease.valid_at(HOST_NOW));
        self.handle(config, worker, Event::Standing(standing));
    }

    /// Naive design: the answer about the lease arrives, however late, and the lease begins.
    pub fn lease_arrives(&mut self, config: &Config, worker: usize) {
        let host = &mut self.hosts[worker];
        if let Some(own) = host.lease_reply.take() {
            host.lease.asked(NONCE, HOST_NOW);
            assert!(host.lease.granted(NONCE, own, LEASE));
            self.look_at_lease(config, worker);
        }
    }

    /// Must a guest have been ended before this host's clock goes on?
    pub fn fence_is_due(&self, config: &Config, worker: usize) -> bool {
        let host = &self.hosts[worker];
        let unguarded = config.is(Naive::KeeperUnguarded) && host.keeper_stopped;
        let overdue = host.deadline.is_some_and(|until| HOST_NOW + 1 > until + LATENCY);
        overdue && self.can_fence(config, worker) && !unguarded && !config.is(Naive::WorkerEnforces)
    }

    /// Would the keeper (or, when it is stopped, its guard) end this guest now?
    pub fn can_fence(&self, config: &Config, worker: usize) -> bool {
        let host = &self.hosts[worker];
        let spared = config.is(Naive::DeadlineSparesPaused) && !host.runs();
        let stopped = config.is(Naive::KeeperUnguarded) && host.keeper_stopped;
        let past = host.deadline.is_some_and(|until| HOST_NOW >= until);
        past && host.volatile.guest != Guest::Absent && !spared && !stopped
    }
}
