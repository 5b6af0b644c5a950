//! [`Desk`]: takes orders to fence, one fence per worker at a time, and starts those that silence calls for.
//!
//! The task behind it owns what is under way. It acts at the leader only: on another node orders end in
//! [`Phase::Void`](super::job::Phase::Void).
//!
//! A leader that was just elected has heard nobody, so it takes no orders for [`SETTLED_AFTER`]: every worker that is alive has
//! found it by then, and is not turned off by mistake.
//!
//! Unasked, a host is turned off when all of this holds: the configuration says after how long a silence; the worker has been
//! silent for that long *to this leader*, which was in office all the while; a VM that keeps running would be taken over
//! by it (those that fence themselves need no agent); no other unasked fence is under way; the last one of this worker is a
//! while ago. So hosts go one after the other, and none without a gain.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pageport_ownership::Policy;
use pageport_proto::{RequestId, SiteName, WorkerName};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::FenceConfig;
use super::agent::{self, Action, AgentError};
use super::config::Agent;
use super::job::{Entry, Ground, Job, Progress, Tools};
use super::plan::plan;
use crate::link::observation::Observations;

/// An unasked fence that came to nothing is tried again after this.
pub const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How long workers may take to find a new leader: those of the one before notice its end after 6 s.
pub const SETTLED_AFTER: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const QUEUE: usize = 16;
/// Agents that are asked for the status of a host at the same time.
const MAX_CHECKS: usize = 4;

/// Why an order to fence was not taken.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Nothing can turn it off.
    #[error(
        "no fence agent is configured for worker \"{worker}\": name it in a [[fence.agent]] of every controller.toml"
    )]
    NoAgent {
        /// The worker.
        worker: WorkerName,
    },
    /// Nobody can be counted as silent yet.
    #[error("this controller leads since less than {} s and may not have heard every worker yet: ask again", SETTLED_AFTER.as_secs())]
    Unsettled,
    /// Too many at once.
    #[error("{MAX_CHECKS} fence agents are being asked already: try again in a moment")]
    Busy,
    /// The process ends.
    #[error("this controller is stopping")]
    Stopped,
    /// The agent's own words.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// An operator's order.
#[derive(Debug, Clone)]
pub struct FenceOrder {
    /// The same one once more is answered as the first.
    pub request: RequestId,
    /// Whose host.
    pub worker: WorkerName,
    /// Who ordered it.
    pub by: String,
    /// Why.
    pub reason: String,
}

struct Ask {
    order: FenceOrder,
    agent: Agent,
    answer: oneshot::Sender<Result<watch::Receiver<Progress>, FenceError>>,
}

/// The way to the task.
#[derive(Debug, Clone)]
pub struct Desk {
    config: Arc<FenceConfig>,
    orders: mpsc::Sender<Ask>,
    checks: Arc<Semaphore>,
}

impl Desk {
    /// The agent for a worker.
    ///
    /// # Errors
    /// [`FenceError::NoAgent`].
    pub fn agent_for(&self, worker: &WorkerName) -> Result<&Agent, FenceError> {
        self.config.agent_for(worker).ok_or_else(|| FenceError::NoAgent { worker: worker.clone() })
    }

    /// Begins a fence, or joins the one that is under way.
    ///
    /// # Errors
    /// [`FenceError`].
    pub async fn fence(&self, order: FenceOrder) -> Result<watch::Receiver<Progress>, FenceError> {
        let agent = self.agent_for(&order.worker)?.clone();
        let (answer, answered) = oneshot::channel();
        self.orders.send(Ask { order, agent, answer }).await.map_err(|_| FenceError::Stopped)?;
        answered.await.map_err(|_| FenceError::Stopped)?
    }

    /// Asks the agent whether it reaches the host's power control, and gives its words.
    ///
    /// # Errors
    /// [`FenceError`].
    pub async fn check(&self, worker: &WorkerName, site: &SiteName) -> Result<String, FenceError> {
        let agent = self.agent_for(worker)?;
        let _one = self.checks.try_acquire().map_err(|_| FenceError::Busy)?;
        Ok(agent::run(agent, Action::Status, worker, site).await?)
    }
}

/// Starts the task; it ends when told to.
pub fn start(config: FenceConfig, tools: Tools, stop: CancellationToken) -> Desk {
    let (orders, inbox) = mpsc::channel(QUEUE);
    let config = Arc::new(config);
    let clerk = Clerk { config: config.clone(), tools, known: BTreeMap::new(), watch: Watch::default() };
    tokio::spawn(clerk.work(inbox, stop));
    Desk { config, orders, checks: Arc::new(Semaphore::new(MAX_CHECKS)) }
}

struct Clerk {
    config: Arc<FenceConfig>,
    tools: Tools,
    /// The newest fence of each worker.
    known: BTreeMap<WorkerName, Entry>,
    watch: Watch,
}

impl Clerk {
    async fn work(mut self, mut inbox: mpsc::Receiver<Ask>, stop: CancellationToken) {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                ask = inbox.recv() => {
                    let Some(ask) = ask else { return };
                    let progress = self.take(ask.order, ask.agent);
                    // Whoever asked may have gone: the order stands.
                    let _ = ask.answer.send(progress);
                }
                _ = look.tick() => self.look(),
            }
        }
    }

    fn take(&mut self, order: FenceOrder, agent: Agent) -> Result<watch::Receiver<Progress>, FenceError> {
        if let Some(entry) = self.known.get(&order.worker) {
            let phase = entry.progress.borrow().phase.clone();
            let same = entry.request == order.request && phase != super::job::Phase::Void;
            if !phase.is_over() || same {
                return Ok(entry.progress.clone());
            }
        }
        if !self.watch.settled(self.office(), Instant::now()) {
            return Err(FenceError::Unsettled);
        }
        let ground = Ground::Ordered { by: order.by, reason: order.reason };
        Ok(self.begin(order.request, agent, order.worker, ground))
    }

    /// The term in which this node serves as the leader.
    fn office(&self) -> Option<u64> {
        let status = self.tools.consensus.status();
        status.serving.then_some(status.term)
    }

    fn begin(
        &mut self,
        request: RequestId,
        agent: Agent,
        worker: WorkerName,
        ground: Ground,
    ) -> watch::Receiver<Progress> {
        let (job, progress) = Job::new(self.tools.clone(), agent, worker.clone(), ground);
        self.known.insert(worker, Entry { request, progress: progress.clone() });
        tokio::spawn(job.run());
        progress
    }

    fn look(&mut self) {
        let now = Instant::now();
        self.watch.note(self.office(), now);
        let Some(after) = self.config.after_silence else { return };
        if self.known.values().any(|entry| !entry.progress.borrow().phase.is_over()) {
            return;
        }
        let (state, observations) = (self.tools.consensus.applied(), self.tools.hub.now());
        let gains = |worker: &WorkerName| {
            let concerned = plan(&state, &observations, worker, now);
            concerned.iter().any(|vm| vm.policy == Policy::KeepRunning && vm.heir.is_ok())
        };
        let workers = self.config.agents.iter().flat_map(|agent| agent.workers.iter().map(move |name| (name, agent)));
        let due = workers.filter(|(worker, _)| state.workers.contains_key(*worker)).find_map(|(worker, agent)| {
            let since = self.watch.due(worker, &observations, after, now)?;
            gains(worker).then(|| (worker.clone(), agent.clone(), since))
        });
        if let Some((worker, agent, since)) = due {
            self.watch.begun(worker.clone(), now);
            self.begin(RequestId::generate(), agent, worker, Ground::Silent { since });
        }
    }
}

/// Since when workers are silent, and when one was last fenced unasked.
#[derive(Debug, Default)]
struct Watch {
    office: Option<(u64, Instant)>,
    begun: BTreeMap<WorkerName, Instant>,
}

impl Watch {
    /// The term in which this node serves as the leader.
    fn note(&mut self, term: Option<u64>, now: Instant) {
        if self.office.map(|(term, _)| term) != term {
            self.office = term.map(|term| (term, now));
        }
    }

    /// Has this node served in this term, and no other since, for long enough to have heard every worker that is alive?
    fn settled(&self, term: Option<u64>, now: Instant) -> bool {
        let since = self.office.filter(|(noted, _)| Some(*noted) == term).map(|(_, since)| since);
        since.is_some_and(|since| now.saturating_duration_since(since) >= SETTLED_AFTER)
    }

    fn begun(&mut self, worker: WorkerName, now: Instant) {
        self.begun.insert(worker, now);
    }

    /// For how long the worker has been silent, if that is long enough. What it told others counts for nothing.
    fn due(&self, worker: &WorkerName, said: &Observations, after: Duration, now: Instant) -> Option<Duration> {
        let (_, in_office) = self.office?;
        let last = said.last(worker).map_or(in_office, |observed| observed.at.max(in_office));
        let silent = now.saturating_duration_since(last);
        let rested = self.begun.get(worker).is_none_or(|begun| now.saturating_duration_since(*begun) >= AGAIN_AFTER);
        (silent >= after && rested).then_some(silent)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::observation::Observed;

    #[test]
    fn silence_counts_from_the_last_word_and_only_while_this_node_leads() {
        let (zero, after) = (Instant::now(), Duration::from_secs(30));
        let at = |seconds| zero + Duration::from_secs(seconds);
        let worker: WorkerName = "a1".parse().unwrap();
        let (mut watch, mut said) = (Watch::default(), Observations::default());
        let due = |watch: &Watch, said: &Observations, seconds| watch.due(&worker, said, after, at(seconds));
        assert_eq!(due(&watch, &said, 100), None, "does not lead");
        watch.note(Some(1), at(100));
        assert!(!watch.settled(Some(1), at(109)) && watch.settled(Some(1), at(110)));
        assert!(!watch.settled(None, at(110)) && !watch.settled(Some(2), at(110)), "not in this term");
        assert_eq!(due(&watch, &said, 129), None);
        assert_eq!(due(&watch, &said, 130), Some(after), "never reported to this leader");
        said.put(worker.clone(), Observed { report: Default::default(), at: at(120), at_unix_ms: 0, assigned: None });
        assert_eq!(due(&watch, &said, 149), None);
        assert_eq!(due(&watch, &said, 150), Some(after));
        watch.note(None, at(160));
        assert_eq!(due(&watch, &said, 161), None);
        watch.note(Some(3), at(170));
        assert_eq!(due(&watch, &said, 199), None, "it may have reported to the leader in between");
        assert_eq!(due(&watch, &said, 200), Some(after));
        watch.begun(worker.clone(), at(200));
        assert_eq!(due(&watch, &said, 259), None);
        assert!(due(&watch, &said, 260).is_some());
    }
}
