//! One controller: the product's node, and around it the tasks of the daemon in the same order of steps.
//!
//! | task | in the daemon |
//! |---|---|
//! | `core` | `consensus::core` |
//! | `drive` | `link::driver` |
//! | `serve` | `link::service`: questions and streams of workers; the clients' API |

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use pageport_controller::consensus::ConsensusError;
use pageport_controller::consensus::membership::Membership;
use pageport_controller::consensus::node::{ELECTION_TICKS, Node, NodeConfig, Outlet, TICK};
use pageport_controller::consensus::storage::LogStorage;
use pageport_controller::consensus::{Input, PROPOSE_WITHIN, READ_WITHIN, Status};
use pageport_controller::link::answers;
use pageport_controller::link::assignment::{Say, Telling, assignment};
use pageport_controller::link::failover::{Failovers, Proposed};
use pageport_controller::link::leases::Leases;
use pageport_controller::link::observation::{Observations, Observed};
use pageport_controller::link::reconcile::{Now, reconcile};
use pageport_controller::link::service::IDLE;
use pageport_controller::model::command::{ClientOrder, Outcome};
use pageport_controller::model::{Command, Order, State};
use pageport_ownership::LeaseTerms;
use pageport_proto::v1;
use pageport_proto::{RequestId, StoreId, VmId, WorkerName};
use prost_011::Message as _;
use raft::eraftpb::Message;
use tokio::sync::{mpsc, oneshot};

use crate::calls::{Answer, Arriving, Call, Question};
use crate::disk::{Failure, SimDisk};
use crate::executor::{ProcessId, Signal};
use crate::hypervisor::FENCE_LATENCY_MS;
use crate::invariant::Fact;
use crate::network::{End, Endpoint};
use crate::world::{Clock, Flaw, World};

/// What workers count.
pub const LEASE_MS: u64 = 3000;
/// Clocks run apart by so much at most.
pub const DRIFT_PPM: u32 = 20_000;
const SNAPSHOT_EVERY: u64 = 40;
const KEEP_ENTRIES: u64 = 10;
const HEARTBEAT: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A controller's machine.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct Machine {
    world: Rc<World>,
    /// Its number in raft; its endpoint is one less.
    pub id: u64,
    first: Membership,
    /// Its clock.
    pub clock: Clock,
    disk: SimDisk,
    process: Cell<Option<ProcessId>>,
    inbox: RefCell<Option<mpsc::UnboundedSender<Arriving>>>,
    member: RefCell<Option<Rc<Member>>>,
    peers: RefCell<Vec<Rc<Machine>>>,
}

impl Machine {
    /// One that was never started.
    pub fn new(world: &Rc<World>, id: u64, first: Membership, clock: Clock) -> Rc<Self> {
        let disk = if world.flaw == Flaw::LazyLog { SimDisk::lying() } else { SimDisk::default() };
        Rc::new(Self {
            world: world.clone(),
            id,
            first,
            clock,
            disk,
            process: Cell::default(),
            inbox: RefCell::default(),
            member: RefCell::default(),
            peers: RefCell::default(),
        })
    }

    /// Whom it talks to.
    pub fn meet(&self, peers: Vec<Rc<Self>>) {
        *self.peers.borrow_mut() = peers;
    }

    /// Forgets them, so that nothing holds itself.
    pub fn part(&self) {
        self.peers.take();
        self.member.take();
        self.inbox.take();
    }

    /// Where it is on the network.
    pub fn endpoint(&self) -> Endpoint {
        (self.id - 1) as Endpoint
    }

    /// The process, if it is up.
    pub fn process(&self) -> Option<ProcessId> {
        self.process.get()
    }

    /// Goes down at a write that is to come.
    pub fn fail_at(&self, failure: Failure) {
        self.disk.fail_at(failure);
    }

    /// Something comes in.
    pub fn arrive(&self, arriving: Arriving) {
        if let Some(inbox) = self.inbox.borrow().as_ref() {
            // Who has just ended takes nothing.
            let _ = inbox.send(arriving);
        }
    }

    /// The state, if it leads.
    pub fn leads(&self) -> Option<Arc<State>> {
        let member = self.member.borrow();
        let member = member.as_ref()?;
        let node = member.node.borrow();
        node.status().serving.then(|| node.state().clone())
    }

    /// Ends it at once.
    pub fn kill(&self) {
        if let Some(process) = self.process.take() {
            self.inbox.take();
            self.member.take();
            self.world.executor.kill(process);
            self.disk.power_lost();
        }
    }

    /// Starts it, if it is down.
    pub fn start(self: &Rc<Self>) {
        if self.process.get().is_some() {
            return;
        }
        let world = &self.world;
        world.tell(&Fact::Restarted { node: self.id });
        let Ok((storage, state)) = LogStorage::open_on(self.disk.clone(), self.first.clone(), store_of(self.id)) else {
            return self.come_back();
        };
        let config = NodeConfig { id: self.id, snapshot_every: SNAPSHOT_EVERY, keep_entries: KEEP_ENTRIES };
        let Ok(node) = Node::new(&config, storage, state, Outbox::default()) else { return self.come_back() };
        let (inbox, arriving) = mpsc::unbounded_channel();
        let process = world.executor.process();
        let lease_ms = if world.flaw == Flaw::ShortLease { LEASE_MS / 3 } else { LEASE_MS };
        let terms = LeaseTerms::new(lease_ms, DRIFT_PPM, FENCE_LATENCY_MS);
        let Ok(terms) = terms else { return };
        let (inputs, taken) = mpsc::unbounded_channel();
        let member = Rc::new(Member {
            world: world.clone(),
            machine: self.clone(),
            process,
            node: RefCell::new(node),
            inputs,
            changed: Signal::default(),
            observations: RefCell::default(),
            reported: Signal::default(),
            leases: Leases::new(terms, self.clock.instant(world)),
        });
        self.process.set(Some(process));
        *self.inbox.borrow_mut() = Some(inbox);
        *self.member.borrow_mut() = Some(member.clone());
        world.executor.spawn(process, member.clone().core(taken));
        world.executor.spawn(process, member.clone().drive());
        world.executor.spawn(process, member.serve(arriving));
    }

    /// It could not be opened, since the machine went down again meanwhile: once more.
    fn come_back(self: &Rc<Self>) {
        self.disk.power_lost();
        let machine = self.clone();
        self.world.executor.at(self.world.executor.now_us() + 1_000_000, move || machine.start());
    }

    /// Its disk failed: the process ends, and is started again.
    fn crash(self: &Rc<Self>) {
        self.world.tell(&Fact::Fault { what: &format!("controller {} goes down at a write", self.id) });
        self.kill();
        let machine = self.clone();
        let back_us = self.world.executor.now_us() + self.world.between(300_000, 4_000_000);
        self.world.executor.at(back_us, move || machine.start());
    }
}

/// The same in each run.
pub fn store_of(node: u64) -> StoreId {
    let text = format!("00000000-0000-7000-8000-{node:012x}");
    text.parse().unwrap_or_else(|_| StoreId::generate())
}

/// What the node has said.
#[derive(Default)]
struct Outbox {
    messages: Vec<Message>,
    changed: bool,
}

impl Outlet for Outbox {
    fn send(&mut self, messages: Vec<Message>) {
        self.messages.extend(messages);
    }

    fn publish(&mut self, _state: &Arc<State>) {
        self.changed = true;
    }

    /// Messages find their way by number.
    fn regroup(&mut self, _membership: &Arc<Membership>) {}
}

/// One process.
struct Member {
    world: Rc<World>,
    machine: Rc<Machine>,
    process: ProcessId,
    node: RefCell<Node<SimDisk, Outbox>>,
    inputs: mpsc::UnboundedSender<Input>,
    /// State or status.
    changed: Signal,
    observations: RefCell<Observations>,
    reported: Signal,
    leases: Leases,
}

impl Member {
    fn status(&self) -> Status {
        self.node.borrow().status()
    }

    fn state(&self) -> Arc<State> {
        self.node.borrow().state().clone()
    }

    fn clock(&self) -> Clock {
        self.machine.clock
    }

    fn unix_ms(&self) -> i64 {
        (self.clock().us(&self.world) / 1000) as i64
    }

    async fn core(self: Rc<Self>, mut inputs: mpsc::UnboundedReceiver<Input>) {
        let mut before = Status::default();
        let mut election_ticks = self.draw_election_ticks();
        loop {
            let tick = self.clock().sleep(&self.world, TICK);
            let mut tick = std::pin::pin!(tick);
            loop {
                let ticked = tokio::select! {
                    biased;
                    () = &mut tick => true,
                    input = inputs.recv() => {
                        let Some(input) = input else { return };
                        self.node.borrow_mut().take(input);
                        while let Ok(input) = inputs.try_recv() {
                            self.node.borrow_mut().take(input);
                        }
                        false
                    }
                };
                if ticked {
                    self.node.borrow_mut().tick();
                }
                self.node.borrow_mut().set_election_ticks(election_ticks);
                let settled = self.node.borrow_mut().settle();
                self.node.borrow_mut().set_election_ticks(election_ticks);
                let changed = self.send_out();
                if settled.is_err() {
                    self.machine.crash();
                    return std::future::pending().await;
                }
                let now = self.status();
                if now.term != before.term || now.leader != before.leader {
                    election_ticks = self.draw_election_ticks();
                }
                self.tell(before, now, changed);
                if changed || now != before {
                    before = now;
                    self.changed.raise();
                }
                if ticked {
                    break;
                }
            }
        }
    }

    fn draw_election_ticks(&self) -> usize {
        self.world.between(ELECTION_TICKS as u64, 2 * ELECTION_TICKS as u64 - 1) as usize
    }

    fn tell(&self, before: Status, now: Status, changed: bool) {
        let node = self.machine.id;
        if now.serving && (!before.serving || before.term != now.term) {
            self.world.tell(&Fact::Leads { node, term: now.term });
        }
        for index in before.committed + 1..=now.committed {
            let key = [b"log/".as_slice(), &index.to_be_bytes()].concat();
            if let Some(entry) = self.machine.disk.peek(&key) {
                self.world.tell(&Fact::Committed { node, index, entry: &entry });
            }
        }
        if changed {
            self.world.tell(&Fact::Applied { node, state: &self.state() });
        }
    }

    fn send_out(&self) -> bool {
        let outbox = std::mem::take(self.node.borrow_mut().outlet());
        for message in outbox.messages {
            let peer = self.machine.peers.borrow().iter().find(|peer| peer.id == message.to).cloned();
            let Some(peer) = peer else { continue };
            let snapshot = !message.get_snapshot().data.is_empty();
            let bytes = message.encode_to_vec();
            let (from, to) = (self.machine.endpoint(), peer.endpoint());
            let delivered = !self.world.network.is_cut(from, to);
            self.world.datagram(from, to, move || peer.arrive(Arriving::Raft(bytes.clone())));
            if snapshot {
                use pageport_controller::consensus::Delivered;
                let delivered = if delivered { Delivered::Yes } else { Delivered::No };
                // The core runs: its inbox is open.
                let _ = self.inputs.send(Input::SnapshotSent { peer: message.to, delivered });
            }
        }
        outbox.changed
    }

    async fn propose(&self, command: &Command, term: Option<u64>) -> Result<Outcome, ConsensusError> {
        let command = serde_json::to_vec(command).map_err(ConsensusError::Encode)?;
        let (answer, answered) = oneshot::channel();
        self.inputs.send(Input::Propose { command, term, answer }).map_err(|_| ConsensusError::Stopped)?;
        tokio::select! {
            biased;
            outcome = answered => outcome.unwrap_or(Err(ConsensusError::Unknown)),
            () = self.clock().sleep(&self.world, PROPOSE_WITHIN) => Err(ConsensusError::Unknown),
        }
    }

    /// The state after a quorum round, and the term in which this node led all through it; [`None`]: it does not lead.
    async fn read(&self) -> Option<(Arc<State>, u64)> {
        let before = self.status();
        let (answer, answered) = oneshot::channel();
        self.inputs.send(Input::Read { answer }).ok()?;
        let state = tokio::select! {
            biased;
            state = answered => state.ok()?.ok()?,
            () = self.clock().sleep(&self.world, READ_WITHIN) => return None,
        };
        let now = self.status();
        (before.serving && now.serving && before.term == now.term).then_some((state, now.term))
    }

    async fn drive(self: Rc<Self>) {
        let mut takeovers = Failovers::default();
        loop {
            let seen = (self.changed.version(), self.reported.version());
            if self.status().serving {
                let instant = self.clock().instant(&self.world);
                let older_leases_out = self.leases.surely_out_after();
                let now = Now { instant, unix_ms: self.unix_ms(), older_leases_out };
                let orders = reconcile(&self.state(), &self.observations.borrow(), now);
                for order in orders {
                    let command = Command { now_unix_ms: self.unix_ms(), order };
                    // What could not be recorded is found again.
                    let _ = self.propose(&command, None).await;
                }
                self.take_over(&mut takeovers).await;
            }
            tokio::select! {
                biased;
                () = self.changed.changed_since(seen.0) => {}
                () = self.reported.changed_since(seen.1) => {}
                () = self.clock().sleep(&self.world, LOOK_EVERY) => {}
            }
        }
    }

    async fn take_over(&self, takeovers: &mut Failovers) {
        let now = || self.clock().instant(&self.world);
        let term = self.status().term;
        let due = takeovers.due(&self.leases, term, &self.state(), &self.observations.borrow(), now());
        for order in due {
            let command = Command { now_unix_ms: self.unix_ms(), order: Order::TakeOver(order.clone()) };
            let proposed = match self.propose(&command, Some(term)).await {
                Err(ConsensusError::Unknown | ConsensusError::Stopped) => Proposed::Unknown,
                Ok(_) | Err(_) => Proposed::Certain,
            };
            takeovers.settled(&self.leases, order, proposed, now());
        }
    }

    async fn serve(self: Rc<Self>, mut arriving: mpsc::UnboundedReceiver<Arriving>) {
        while let Some(arrived) = arriving.recv().await {
            match arrived {
                // The core runs as long as this does.
                Arriving::Raft(message) => drop(self.inputs.send(Input::Step { message, store: None })),
                Arriving::Call(call) => self.world.executor.spawn(self.process, self.clone().answer(*call)),
            }
        }
    }

    async fn answer(self: Rc<Self>, call: Call) {
        let answer = match call.question {
            Question::Client(request, order) => self.client(request, order).await,
            Question::Link(worker, end) => {
                if self.status().serving {
                    (call.reply)(Answer::Linked);
                    return self.session(worker, end).await;
                }
                None
            }
            question => self.question(question).await,
        };
        (call.reply)(answer.unwrap_or_else(|| Answer::NotLeader(self.status().leader)));
    }

    async fn client(&self, request: RequestId, order: ClientOrder) -> Option<Answer> {
        if !self.status().serving {
            return None;
        }
        let command = Command { now_unix_ms: self.unix_ms(), order: Order::Client { request, order } };
        match self.propose(&command, None).await {
            Ok(outcome) => Some(Answer::Outcome(outcome)),
            Err(ConsensusError::NotLeader) => None,
            Err(_) => Some(Answer::Unknown),
        }
    }

    async fn question(&self, question: Question) -> Option<Answer> {
        let (state, term) = self.read().await?;
        let now = self.clock().instant(&self.world);
        match question {
            Question::Authorise(request) => {
                let (worker, vm) = named(&request.worker, &request.vm_id)?;
                Some(Answer::Authorised(Box::new(answers::authorisation(&state, &worker, vm, &request))))
            }
            Question::Grant(request) => {
                let (worker, vm) = named(&request.worker, &request.vm_id)?;
                Some(Answer::Granted(answers::grant(&self.leases, term, &state, &worker, vm, &request, now)))
            }
            Question::Lease(request) => {
                let worker = request.worker.parse().ok()?;
                answers::lease(&self.leases, term, &state, &worker, &request, now).map(Answer::Leased)
            }
            Question::State => Some(Answer::State(state)),
            Question::Link(..) | Question::Client(..) => None,
        }
    }

    async fn session(&self, worker: WorkerName, mut end: End<v1::WorkerAssignment, v1::WorkerReport>) {
        let mut telling = Telling::new(self.clock().us(&self.world));
        let mut last_report = self.clock().instant(&self.world);
        let mut say = Say::Always;
        loop {
            let seen = self.changed.version();
            if !self.status().serving {
                return;
            }
            let wanted = assignment(&self.state(), &worker);
            if let Some(next) = telling.next(wanted, self.status().term, say)
                && end.send(next.clone())
            {
                telling.sent(next);
            }
            say = tokio::select! {
                biased;
                report = end.recv() => {
                    let Some(report) = report else { return };
                    last_report = self.clock().instant(&self.world);
                    self.observe(&worker, report, &telling);
                    Say::News
                }
                () = self.changed.changed_since(seen) => Say::News,
                () = self.clock().sleep(&self.world, HEARTBEAT) => Say::Always,
            };
            if self.clock().instant(&self.world) - last_report > IDLE {
                return;
            }
        }
    }

    fn observe(&self, worker: &WorkerName, report: v1::WorkerReport, telling: &Telling) {
        let assigned = telling.told(report.assignment_seq);
        let at = self.clock().instant(&self.world);
        let observed = Observed { report: Arc::new(report), at, at_unix_ms: self.unix_ms(), assigned };
        self.observations.borrow_mut().put(worker.clone(), observed);
        self.reported.raise();
    }
}

fn named(worker: &str, vm: &str) -> Option<(WorkerName, VmId)> {
    Some((worker.parse().ok()?, vm.parse().ok()?))
}
