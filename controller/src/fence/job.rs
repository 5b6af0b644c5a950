//! [`Job`]: one fence, from the hold to the end, within one term of this leader.
//!
//! | step | if it fails |
//! |---|---|
//! | read the state after a quorum round | nothing has happened |
//! | hold every VM that the worker may hold | another fence of it is under way |
//! | run the agent | all are let go; nothing has changed |
//! | propose a takeover for each, in the same term | a refusal is told with the VM; what is unknown is proposed again |
//! | let go of each whose outcome is certain | |
//!
//! Guarantees: as those of [`super`]. A term that ends in between ends the job ([`Phase::Void`]): the holds ended with it,
//! and the agent's word is not used. Progress is published as it is made; whoever watches may come and go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_ownership::Epoch;
use pageport_proto::{RequestId, VmId, WorkerName};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::agent::{self, Action, AgentError};
use super::config::Agent;
use super::plan::{Concerned, Heir, plan, proof};
use crate::api::{clip, unix_ms};
use crate::consensus::{Consensus, ConsensusError};
use crate::link::leases::Leases;
use crate::link::observation::Hub;
use crate::model::{Command, Order, Rejection, State, takeover};

/// Pause before a takeover whose outcome is unknown is proposed again.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Why a VM is left alone that this fence could not hold.
const NOT_HELD: &str = "another fence holds it, or it came here after this one began: fence again";
/// Longest record of what was seen, in characters.
const MAX_SEEN_CHARS: usize = 2000;

/// Why a host is turned off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    /// An operator ordered it.
    Ordered {
        /// Who.
        by: String,
        /// Why.
        reason: String,
    },
    /// Its worker says nothing.
    Silent {
        /// For how long.
        since: Duration,
    },
}

/// How far a fence is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The agent runs.
    Agent,
    /// The host is off.
    Takeover,
    /// Over.
    Done,
    /// Over; nothing was changed.
    Failed {
        /// Why.
        problem: String,
    },
    /// The leader has changed. What the agent did counts for nothing.
    Void,
}

impl Phase {
    /// Nothing more comes.
    pub fn is_over(&self) -> bool {
        match self {
            Self::Agent | Self::Takeover => false,
            Self::Done | Self::Failed { .. } | Self::Void => true,
        }
    }
}

/// What became of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fate {
    /// Its name.
    pub name: String,
    /// Where it goes, or why nowhere.
    pub heir: Result<Heir, String>,
    /// It has another owner.
    pub taken_over: bool,
}

/// All of how far a fence is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The worker.
    pub worker: WorkerName,
    /// Its agent.
    pub agent: String,
    /// How far.
    pub phase: Phase,
    /// What the agent printed.
    pub output: String,
    /// The VMs that the worker may hold.
    pub vms: BTreeMap<VmId, Fate>,
}

/// Why a fence came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Another leader, or none.
    #[error("the leader has changed")]
    Void,
    /// No state to decide on.
    #[error(transparent)]
    Consensus(ConsensusError),
    /// The controllers do not know it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The host may run.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl From<ConsensusError> for JobError {
    fn from(error: ConsensusError) -> Self {
        match error {
            ConsensusError::NotLeader => Self::Void,
            other => Self::Consensus(other),
        }
    }
}

/// What fences work with.
#[derive(Debug, Clone)]
pub struct Tools {
    /// To read and to propose.
    pub consensus: Consensus,
    /// What workers say.
    pub hub: Hub,
    /// To hold VMs.
    pub leases: Arc<Leases>,
}

impl Tools {
    fn leads_in(&self, term: u64) -> bool {
        let status = self.consensus.status();
        status.serving && status.term == term
    }
}

/// One fence.
#[derive(Debug)]
pub struct Job {
    tools: Tools,
    agent: Agent,
    worker: WorkerName,
    ground: Ground,
    progress: watch::Sender<Progress>,
}

/// What is remembered of a fence.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The request that began it.
    pub request: RequestId,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
}

impl Job {
    /// Of this worker, by this agent.
    pub fn new(tools: Tools, agent: Agent, worker: WorkerName, ground: Ground) -> (Self, watch::Receiver<Progress>) {
        let first = Progress {
            worker: worker.clone(),
            agent: agent.name.clone(),
            phase: Phase::Agent,
            output: String::new(),
            vms: BTreeMap::new(),
        };
        let (progress, watched) = watch::channel(first);
        (Self { tools, agent, worker, ground, progress }, watched)
    }

    /// Carries it out.
    pub async fn run(self) {
        tracing::warn!(worker = %self.worker, agent = self.agent.name, ground = ?self.ground, "fencing a host");
        let end = match self.fence().await {
            Ok(()) => Phase::Done,
            Err(JobError::Void) => Phase::Void,
            Err(error @ (JobError::Consensus(_) | JobError::Rejected(_) | JobError::Agent(_))) => {
                Phase::Failed { problem: error.to_string() }
            }
        };
        tracing::warn!(worker = %self.worker, agent = self.agent.name, ?end, "fencing ended");
        self.progress.send_modify(|progress| progress.phase = end);
    }

    async fn fence(&self) -> Result<(), JobError> {
        let (state, term) = self.read().await?;
        let unknown = || Rejection::WorkerUnknown { worker: self.worker.clone() };
        let site = state.site_of(&self.worker).cloned().ok_or_else(unknown)?;
        let concerned = self.plan(&state);
        let mut holds = Holds { tools: &self.tools, term, vms: BTreeMap::new() };
        for vm in &concerned {
            holds.take(vm.vm, vm.last);
        }
        self.show(&concerned, |vm| holds.vms.contains_key(&vm));
        if !self.tools.leads_in(term) {
            return Err(JobError::Void);
        }
        let output = agent::run(&self.agent, Action::Off, &self.worker, &site).await?;
        if !self.tools.leads_in(term) {
            return Err(JobError::Void);
        }
        let seen = clip(&self.seen(&output), MAX_SEEN_CHARS);
        self.progress.send_modify(|progress| (progress.phase, progress.output) = (Phase::Takeover, output));
        // The agent took its time: whoever was to have a VM may be gone, and another one there.
        let concerned = self.plan(&self.tools.consensus.applied());
        self.show(&concerned, |vm| holds.vms.contains_key(&vm));
        for vm in concerned {
            let (Some(last), Ok(heir)) = (holds.vms.get(&vm.vm).copied(), vm.heir) else { continue };
            let proof = proof(&self.worker, last, &self.agent.name);
            let ordered_by = match &self.ground {
                Ground::Ordered { by, .. } => Some(by.clone()),
                Ground::Silent { .. } => None,
            };
            let Heir { site, worker, point } = heir;
            let seen = seen.clone();
            let order = takeover::Order { vm: vm.vm, site, worker, last, proof, seen, ordered_by, point };
            holds.proposed(vm.vm);
            let fate = self.take_over(order, term).await?;
            self.progress.send_modify(|progress| {
                if let Some(shown) = progress.vms.get_mut(&vm.vm) {
                    match fate {
                        Ok(()) => shown.taken_over = true,
                        Err(why) => shown.heir = Err(why),
                    }
                }
            });
        }
        Ok(())
    }

    /// The state after a quorum round, and the term in which this node led all through it.
    async fn read(&self) -> Result<(Arc<State>, u64), JobError> {
        let term = self.tools.consensus.status().term;
        let state = self.tools.consensus.read().await?;
        if self.tools.leads_in(term) { Ok((state, term)) } else { Err(JobError::Void) }
    }

    fn plan(&self, state: &State) -> Vec<Concerned> {
        plan(state, &self.tools.hub.now(), &self.worker, Instant::now())
    }

    fn show(&self, concerned: &[Concerned], held: impl Fn(VmId) -> bool) {
        let fate = |vm: &Concerned| Fate {
            name: vm.name.clone(),
            heir: if held(vm.vm) { vm.heir.clone() } else { Err(NOT_HELD.to_owned()) },
            taken_over: false,
        };
        let vms = concerned.iter().map(|vm| (vm.vm, fate(vm))).collect();
        self.progress.send_modify(|progress| progress.vms = vms);
    }

    /// Proposes until the outcome is certain. A refusal is one.
    async fn take_over(&self, order: takeover::Order, term: u64) -> Result<Result<(), String>, JobError> {
        let id = order.vm;
        let command = Command { now_unix_ms: unix_ms(), order: Order::TakeOver(order) };
        loop {
            let fate = match self.tools.consensus.propose_in_term(&command, term).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(rejection)) => Err(rejection.to_string()),
                Err(ConsensusError::Unknown | ConsensusError::NoQuorum) => {
                    if !self.tools.leads_in(term) {
                        return Err(JobError::Void);
                    }
                    sleep(AGAIN_AFTER).await;
                    continue;
                }
                Err(ConsensusError::NotLeader | ConsensusError::Stopped) => return Err(JobError::Void),
                Err(error @ (ConsensusError::TooLarge { .. } | ConsensusError::Encode(_))) => Err(error.to_string()),
            };
            self.tools.leases.let_go_of_fenced(term, id, Instant::now());
            return Ok(fate);
        }
    }

    /// For the record.
    fn seen(&self, output: &str) -> String {
        let ground = match &self.ground {
            Ground::Ordered { reason, .. } => reason.clone(),
            Ground::Silent { since } => {
                format!("worker \"{}\" had been silent for {} s", self.worker, since.as_secs())
            }
        };
        if output.is_empty() { ground } else { format!("{ground}; the agent said: {output}") }
    }
}

/// VMs that are held and were not proposed yet. Lets go of them when it is dropped.
struct Holds<'a> {
    tools: &'a Tools,
    term: u64,
    vms: BTreeMap<VmId, Epoch>,
}

impl Holds<'_> {
    fn take(&mut self, vm: VmId, last: Epoch) {
        if self.tools.leases.hold_for_fence(self.term, vm, Instant::now()) {
            self.vms.insert(vm, last);
        }
    }

    /// From now on it is let go only when it is known what became of the takeover.
    fn proposed(&mut self, vm: VmId) {
        self.vms.remove(&vm);
    }
}

impl Drop for Holds<'_> {
    fn drop(&mut self) {
        for vm in self.vms.keys() {
            self.tools.leases.let_go_of_fenced(self.term, *vm, Instant::now());
        }
    }
}
