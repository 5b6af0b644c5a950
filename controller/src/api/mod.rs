//! What clients see: the gRPC services, on any node.
//!
//! ```text
//!   request ──▶ forward (to the leader, if that is another node) ──▶ service ──▶ quorum read / propose ──▶ view
//! ```
//! | module | what |
//! |---|---|
//! | [`fleet`], [`replication`], [`migration`], [`cluster`], [`membership`] | the services |
//! | [`disks`] | orders about disks |
//! | [`adopt`] | VMs that a restore has left out |
//! | [`quote`] | forecasts, which workers make while their caller waits |
//! | [`restore`] | a new cluster from a backup, of a controller that has no data |
//! | [`preflight`] | what would hinder a move, as the controllers and both workers see it |
//! | [`schedule`] | what the scheduler is told, and how drains stand |
//! | [`fence`] | the order to turn a worker's host off, as a stream |
//! | [`view`], [`lag`] | state and observations into API messages: pure |
//! | [`watch`] | streams of views |
//! | [`error`] | every failure's gRPC code, in one place |
//! | [`forward`] | requests on their way to the leader |
//!
//! Guarantees: a read sees every answered command; a client's request id takes effect once; whatever goes wrong names
//! its subject and what to do.

pub mod adopt;
pub mod changes;
pub mod cluster;
pub mod disks;
pub mod error;
pub mod fence;
pub mod fleet;
pub mod forward;
pub mod lag;
pub mod membership;
pub mod migration;
pub mod preflight;
pub mod quote;
pub mod replication;
pub mod restore;
pub mod schedule;
pub mod view;
pub mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use pageport_ownership::Policy;
use pageport_proto::v1::{self, VmState};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};
use tokio::time::Instant;

use crate::consensus::Consensus;
use crate::fence::Desk;
use crate::link::assignment::parties;
use crate::link::fleet::decisions;
use crate::link::observation::{Hub, Observations, record_of};
use crate::model::command::ClientOrder;
use crate::model::migration::Phase;
use crate::model::state::Vm;
use crate::model::{Answer, Command, Migration, Order, Rejection, Spec, State, apply};
use crate::scheduler::Decision;
use error::ApiError;
use view::View;

/// Longest text of a client that an error repeats, in characters.
const MAX_ECHO_CHARS: usize = 100;

/// Longest reason of an operator that is kept, in characters.
const MAX_REASON_CHARS: usize = 1000;

/// Milliseconds since 1970.
pub fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// What every service needs.
#[derive(Debug, Clone)]
pub struct Api {
    consensus: Consensus,
    hub: Hub,
    desk: Desk,
}

/// State and observations at one moment.
#[derive(Debug, Clone)]
pub struct Moment {
    /// What is committed.
    pub state: Arc<State>,
    /// What workers last said.
    pub observations: Arc<Observations>,
    /// When.
    pub now: Instant,
    decisions: Arc<OnceLock<BTreeMap<MigrationId, Decision>>>,
}

impl Moment {
    fn new(state: Arc<State>, observations: Arc<Observations>) -> Self {
        Self { state, observations, now: Instant::now(), decisions: Arc::default() }
    }

    /// One move; of a queued one with the reason why it waits.
    pub fn migration(&self, migration: &Migration) -> v1::Migration {
        let mut shown = self.view().migration(migration);
        if migration.phase == Phase::Queued
            && let Some(Decision::Wait(wait)) = self.decisions().get(&migration.id)
        {
            shown.reason = wait.to_string();
        }
        shown
    }

    /// What the scheduler decides now. Looked at once.
    fn decisions(&self) -> &BTreeMap<MigrationId, Decision> {
        self.decisions.get_or_init(|| decisions(&self.state, &self.observations, self.now, unix_ms()))
    }

    /// For views.
    pub fn view(&self) -> View<'_> {
        View::new(&self.state, &self.observations, self.now)
    }

    /// The VM of this name or id.
    ///
    /// # Errors
    /// [`Rejection::VmUnknown`].
    pub fn vm(&self, id_or_name: &str) -> Result<(VmId, &Vm), ApiError> {
        if let Some(found) = self.state.find_vm(id_or_name) {
            return Ok(found);
        }
        Err(match self.state.find_recovering(id_or_name) {
            Some((_, recovering)) => recovering.refusal().into(),
            None => Rejection::VmUnknown { vm: echo(id_or_name) }.into(),
        })
    }

    /// The site of this name.
    ///
    /// # Errors
    /// [`ApiError::SiteUnknown`].
    pub fn site(&self, name: &str) -> Result<SiteName, ApiError> {
        let sites = self.state.sites();
        let found = sites.iter().find(|site| site.as_str() == name).cloned();
        found.ok_or_else(|| ApiError::SiteUnknown {
            site: echo(name),
            known: sites.iter().map(SiteName::as_str).collect::<Vec<_>>().join(", "),
        })
    }

    /// The connected worker of a site that has the fewest VMs, its own and replicas of others; for a VM that fences itself a guarded one,
    /// if there is one.
    ///
    /// # Errors
    /// [`ApiError::NoWorker`].
    pub fn worker_at(&self, site: &SiteName, policy: Policy) -> Result<WorkerName, ApiError> {
        let unfit = |name: &WorkerName| policy == Policy::SelfFence && !self.observations.guarded(name, self.now);
        let connected = |name: &WorkerName| self.observations.connected(name, self.now).is_some();
        let here = self.state.workers.iter().filter(|(_, worker)| worker.site == *site).map(|(name, _)| name);
        let mut counts: BTreeMap<&WorkerName, usize> =
            here.filter(|name| connected(name)).map(|name| (name, 0)).collect();
        for worker in self.state.vms.values().flat_map(parties) {
            counts.entry(worker).and_modify(|count| *count += 1);
        }
        let best = counts.into_iter().min_by_key(|(name, count)| (unfit(name), *count));
        best.map(|(name, _)| name.clone()).ok_or_else(|| ApiError::NoWorker { site: site.clone() })
    }

    /// Refuses to bring a VM that fences itself to a worker where a keeper that is stopped would let it outlive its lease. One
    /// that runs there already goes on: a guard that is away does nothing to it, and an end would be worse.
    ///
    /// # Errors
    /// [`ApiError::NotGuarded`].
    pub fn must_be_guarded(&self, worker: &WorkerName, spec: &Spec) -> Result<(), ApiError> {
        if spec.on_isolation == Policy::KeepRunning || self.observations.guarded(worker, self.now) {
            return Ok(());
        }
        Err(ApiError::NotGuarded { name: spec.name.clone(), worker: worker.clone() })
    }

    /// The worker of a site that can become the VM's owner: one of the two of a move, or the holder of a replica.
    ///
    /// # Errors
    /// [`Rejection::NoReplica`].
    pub fn heir_at(&self, vm: &Vm, site: &SiteName) -> Result<WorkerName, ApiError> {
        let movers =
            vm.ownership.possible_holders().into_iter().filter(|worker| self.state.site_of(worker) == Some(site));
        let holders = vm.replicas.get(site).map(|replica| replica.worker.clone());
        let missing = || Rejection::NoReplica { name: vm.spec.name.clone(), site: site.clone() };
        movers.cloned().chain(holders).next().ok_or_else(|| missing().into())
    }

    /// A connected worker other than `heir` that may run the VM.
    pub fn answering_holder(&self, id: VmId, vm: &Vm, heir: &WorkerName) -> Option<WorkerName> {
        let may_run = |worker: &&WorkerName| {
            let report = self.observations.connected(worker, self.now).and_then(|observed| observed.vm(id));
            report.and_then(record_of).is_some_and(|record| record.owned().is_some())
        };
        vm.ownership.possible_holders().into_iter().filter(|worker| *worker != heir).find(may_run).cloned()
    }

    /// Refuses unless the VM was last seen running.
    ///
    /// # Errors
    /// [`Rejection::NotRunning`], or [`ApiError::WorkerLost`] when nobody can tell.
    pub fn must_run(&self, id: VmId, vm: &Vm) -> Result<(), ApiError> {
        match self.view().vm_state(id, vm) {
            VmState::Running | VmState::Paused | VmState::Migrating => Ok(()),
            VmState::Unknown | VmState::InDoubt | VmState::Unspecified => {
                Err(ApiError::WorkerLost { worker: vm.ownership.owner().0.clone() })
            }
            VmState::Stopped | VmState::Starting | VmState::Crashed => {
                Err(Rejection::NotRunning { name: vm.spec.name.clone() }.into())
            }
        }
    }
}

/// Part of a client's text that may be repeated to it.
pub fn echo(text: &str) -> String {
    clip(text, MAX_ECHO_CHARS)
}

/// The beginning of a text that is as long as its author liked.
pub fn clip(text: &str, max_chars: usize) -> String {
    text.chars().take(max_chars).collect()
}

/// The request's id. A client that gives none cannot repeat its command safely.
fn request_id(text: &str) -> Result<RequestId, ApiError> {
    if text.is_empty() {
        return Ok(RequestId::generate());
    }
    text.parse().map_err(|source| ApiError::BadId { field: "request_id", source })
}

impl Api {
    /// Serves what this node has agreed on.
    pub fn new(consensus: Consensus, hub: Hub, desk: Desk) -> Self {
        Self { consensus, hub, desk }
    }

    /// State (after a quorum round) and observations.
    ///
    /// # Errors
    /// No quorum, or this node does not lead.
    pub async fn read(&self) -> Result<Moment, ApiError> {
        let state = self.consensus.read().await?;
        Ok(Moment::new(state, self.hub.now()))
    }

    /// Gives an order that is decided on what is applied here, which saves the quorum round of [`Api::read`]: a command commits only if this
    /// node leads, and is looked at again when it is applied. A leader that was replaced does not know it at once, so what is refused is
    /// decided once more after a quorum round.
    ///
    /// # Errors
    /// What `give` says then.
    pub async fn decide<T, F>(&self, give: impl Fn(Moment) -> F) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        if self.consensus.status().serving {
            match give(self.glance()).await {
                Ok(done) => return Ok(done),
                Err(ApiError::Consensus(error)) => return Err(error.into()),
                Err(_refused) => {}
            }
        }
        give(self.read().await?).await
    }

    /// State as applied here, and observations.
    pub fn glance(&self) -> Moment {
        Moment::new(self.consensus.applied(), self.hub.now())
    }

    /// Commits a client's order.
    ///
    /// # Errors
    /// What [`crate::model::apply()`] rejects, or no agreement.
    pub async fn order(&self, request: RequestId, order: ClientOrder) -> Result<(Answer, Moment), ApiError> {
        let command = command(request, order);
        let answer = self.consensus.propose(&command).await??;
        Ok((answer, self.glance()))
    }

    /// Would this order be taken? Nothing is committed. For checks that come after those of the state.
    ///
    /// # Errors
    /// What [`crate::model::apply()`] rejects.
    pub fn rehearse(&self, moment: &Moment, request: RequestId, order: &ClientOrder) -> Result<Rehearsal, ApiError> {
        Ok(match self.rehearsed(moment, request, order)? {
            Some(_) => Rehearsal::New,
            None => Rehearsal::Repeated,
        })
    }

    /// The moment as it would be after this order; [`None`]: the request was seen before, and gets its old answer.
    fn rehearsed(&self, moment: &Moment, request: RequestId, order: &ClientOrder) -> Result<Option<Moment>, ApiError> {
        if moment.state.answers.get(&request).is_some() {
            return Ok(None);
        }
        let mut state = State::clone(&moment.state);
        apply(&mut state, command(request, order.clone()))?;
        Ok(Some(Moment::new(Arc::new(state), moment.observations.clone())))
    }
}

fn command(request: RequestId, order: ClientOrder) -> Command {
    Command { now_unix_ms: unix_ms(), order: Order::Client { request, order } }
}

/// Was this request seen before?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rehearsal {
    /// No: further checks apply.
    New,
    /// Yes: it gets its old answer.
    Repeated,
}
