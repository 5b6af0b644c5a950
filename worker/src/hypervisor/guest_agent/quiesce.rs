//! One task per freeze: it holds the agent from before the order to freeze until the answer to the order to thaw.
//!
//! The task, and not its caller, keeps the time and thaws: a caller that hangs, fails or is dropped cannot keep a guest frozen. A handle
//! that is dropped is an order to thaw.

use std::path::PathBuf;
use std::time::Duration;

use pageport_proto::VmId;
use tokio::sync::{OwnedMutexGuard, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::client::{Agent, AgentError, FreezeStatus};
use super::{HELLO_LIMIT, NotQuiesced, THAW_LIMIT, WINDOW};
use crate::failpoint;
use crate::hypervisor::event::ExitReport;
use crate::hypervisor::vm::Vm;

/// Between two orders to thaw; ever longer, up to the second.
const THAW_AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(5)];

/// What came of the wish to have the file systems at rest at a moment.
#[derive(Debug, Default)]
pub struct Quiescence {
    /// They were at rest.
    pub quiesced: bool,
    /// What an operator should know.
    pub problem: Option<NotQuiesced>,
}

impl From<NotQuiesced> for Quiescence {
    fn from(problem: NotQuiesced) -> Self {
        Self { quiesced: false, problem: Some(problem) }
    }
}

/// A guest whose file systems are at rest. Dropped, they are thawed.
#[derive(Debug)]
#[must_use = "the guest's writes wait until this is dropped"]
pub struct GuestAtRest {
    order: oneshot::Sender<()>,
    outcome: oneshot::Receiver<Quiescence>,
}

impl GuestAtRest {
    /// Ends the rest, and says whether it lasted until now.
    pub async fn thaw(self) -> Quiescence {
        // Without a receiver the window is over, and the outcome says so.
        let _ = self.order.send(());
        self.outcome.await.unwrap_or_else(|_| NotQuiesced::Ended.into())
    }
}

impl Vm {
    /// Brings the guest's file systems to rest, for [`WINDOW`] at most.
    ///
    /// # Errors
    /// They are not at rest, or not any more: [`NotQuiesced`].
    pub async fn quiesce(&self) -> Result<GuestAtRest, NotQuiesced> {
        let turn = self.take_agent_turn().ok_or(NotQuiesced::ThawUnanswered)?;
        Task::new(self, turn).begin().await
    }
}

/// Thaws what an earlier worker may have left frozen; the VM's agent is held until it is done.
pub(in crate::hypervisor) fn thaw_what_is_left(vm: &Vm) {
    if vm.paths().frozen().exists()
        && let Some(turn) = vm.take_agent_turn()
    {
        tracing::warn!(vm_id = %vm.id(), "an earlier worker may have left the guest's file systems frozen: they are thawed");
        let task = Task::new(vm, turn);
        tokio::spawn(async move { task.thaw(None, None).await });
    }
}

/// It has no handle on the hypervisor, which would hold the control socket for as long as a guest does not answer.
struct Task {
    vm: VmId,
    socket: PathBuf,
    note: PathBuf,
    ended: watch::Receiver<Option<ExitReport>>,
    turn: OwnedMutexGuard<()>,
}

impl Task {
    fn new(vm: &Vm, turn: OwnedMutexGuard<()>) -> Self {
        let (socket, note) = (vm.paths().agent(), vm.paths().frozen());
        Self { vm: vm.id(), socket, note, ended: vm.exit_watch(), turn }
    }

    async fn begin(self) -> Result<GuestAtRest, NotQuiesced> {
        let (order, ordered) = oneshot::channel();
        let (tell_outcome, outcome) = oneshot::channel();
        let (tell, at_rest) = oneshot::channel();
        tokio::spawn(self.run(tell, ordered, tell_outcome));
        at_rest.await.unwrap_or(Err(NotQuiesced::Ended)).map(|()| GuestAtRest { order, outcome })
    }

    async fn run(
        self,
        tell: oneshot::Sender<Result<(), NotQuiesced>>,
        ordered: oneshot::Receiver<()>,
        tell_outcome: oneshot::Sender<Quiescence>,
    ) {
        let mut agent = match self.hello().await {
            Ok((agent, FreezeStatus::Thawed)) => agent,
            Ok((agent, FreezeStatus::Frozen)) => {
                let told = move |unanswered: Option<NotQuiesced>| {
                    let _ = tell.send(Err(unanswered.unwrap_or(NotQuiesced::WasFrozen)));
                };
                return self.thaw(Some(agent), Some(Box::new(told))).await;
            }
            Err(error @ AgentError::Refused { .. }) => return drop(tell.send(Err(NotQuiesced::Freeze(error)))),
            Err(error) => return drop(tell.send(Err(NotQuiesced::NoAgent(error)))),
        };
        if tell.is_closed() {
            return;
        }
        if let Err(error) = tokio::fs::write(&self.note, b"").await {
            return drop(tell.send(Err(NotQuiesced::Note(error))));
        }
        let until = Instant::now() + WINDOW;
        let frozen = match agent.freeze(until).await {
            Ok(0) => Err(NotQuiesced::NothingToFreeze),
            Ok(_) => Ok(()),
            Err(error) => Err(NotQuiesced::Freeze(error)),
        };
        if let Err(problem) = frozen {
            // It may be frozen all the same.
            let told = move |unanswered: Option<NotQuiesced>| {
                let _ = tell.send(Err(unanswered.unwrap_or(problem)));
            };
            return self.thaw(Some(agent), Some(Box::new(told))).await;
        }
        failpoint::reach("source", "frozen").await;
        // A caller that is gone has dropped its order, too.
        let _ = tell.send(Ok(()));
        let asked = matches!(timeout_at(until, ordered).await, Ok(Ok(())));
        let quiesced = asked && matches!(agent.status(until).await, Ok(FreezeStatus::Frozen));
        let told = move |unanswered: Option<NotQuiesced>| {
            let problem = unanswered.or((!quiesced).then_some(NotQuiesced::NotLongEnough));
            let _ = tell_outcome.send(Quiescence { quiesced, problem });
        };
        self.thaw(Some(agent), Some(Box::new(told))).await;
    }

    /// Is somebody there, and are the file systems frozen?
    async fn hello(&self) -> Result<(Agent, FreezeStatus), AgentError> {
        let deadline = Instant::now() + HELLO_LIMIT;
        let mut agent = Agent::connect(&self.socket, deadline).await?;
        agent.sync(deadline).await?;
        let status = agent.status(deadline).await?;
        Ok((agent, status))
    }

    /// Orders the file systems thawed until that is answered. `told` hears of the first order: [`None`]: it was answered.
    async fn thaw(mut self, mut agent: Option<Agent>, mut told: Option<Told>) {
        let [mut pause, longest] = THAW_AGAIN;
        let mut tell = |unanswered| {
            if let Some(told) = told.take() {
                told(unanswered);
            }
        };
        let mut warned = false;
        loop {
            match self.order_thaw(&mut agent).await {
                Ok(()) => break,
                Err(error) if !warned => {
                    let error = crate::error::with_causes(&error);
                    tracing::warn!(vm_id = %self.vm, error, "the order to thaw the guest's file systems is repeated");
                    warned = true;
                }
                Err(error) => tracing::debug!(vm_id = %self.vm, %error, "the order to thaw is repeated"),
            }
            tell(Some(NotQuiesced::ThawUnanswered));
            tokio::select! {
                _ = self.ended.wait_for(Option::is_some) => return,
                () = sleep(pause) => pause = (pause * 2).min(longest),
            }
        }
        if let Err(error) = tokio::fs::remove_file(&self.note).await {
            tracing::debug!(vm_id = %self.vm, %error, "note of a freeze not removed");
        }
        if warned {
            tracing::info!(vm_id = %self.vm, "the guest's file systems are thawed");
        }
        // Whoever is told may freeze again.
        drop((agent, self.turn));
        if let Some(told) = told.take() {
            told(None);
        }
    }

    /// The agent is kept while its connection lives: what was ordered last may still be on its way.
    async fn order_thaw(&self, agent: &mut Option<Agent>) -> Result<(), AgentError> {
        let deadline = Instant::now() + THAW_LIMIT;
        let mut connected = match agent.take() {
            Some(connected) => connected,
            None => Agent::connect(&self.socket, deadline).await?,
        };
        let thawed = match connected.thaw(deadline).await {
            Err(refused @ AgentError::Refused { .. }) => match connected.status(deadline).await? {
                FreezeStatus::Thawed => Ok(()),
                FreezeStatus::Frozen => Err(refused),
            },
            thawed => thawed,
        };
        if !thawed.as_ref().is_err_and(AgentError::is_broken) {
            *agent = Some(connected);
        }
        thawed
    }
}

type Told = Box<dyn FnOnce(Option<NotQuiesced>) + Send>;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
