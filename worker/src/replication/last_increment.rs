//! What the guest wrote since the newest recovery point, on its way to the destination of a migration.
//!
//! It has a task of its own, so that memory begins to move while the last of it is copied. The task also takes the frozen moment out of the
//! hypervisor, whatever ends it. The bitmap goes on from the newest point: until the VM has changed hands that is where the replica can be
//! brought back to.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::frozen_copy::{Copied, FrozenCopy, FrozenCopyError};
use crate::hypervisor::freeze::Outcome;
use crate::replica::session::DiskSession;

/// It ended, and not at its end.
#[derive(Debug, Clone, thiserror::Error)]
#[error("copy what was written since the newest recovery point: {reason}")]
pub struct LastIncrementError {
    reason: String,
}

#[derive(Debug, Clone)]
enum State {
    Copying(Copied),
    Done,
    Failed(LastIncrementError),
}

/// The copy under way. Dropped, it ends by itself.
#[derive(Debug)]
pub struct LastIncrement {
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
    stop: DropGuard,
}

impl LastIncrement {
    /// Goes on with a copy that was started into these sessions.
    pub fn run(frozen: FrozenCopy, sessions: Vec<Arc<DiskSession>>) -> Self {
        let (news, state) = watch::channel(State::Copying(frozen.copied()));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let ended = copy(frozen, &sessions, &news, &stopped).await;
            news.send_replace(match ended {
                Ok(()) => State::Done,
                Err(error) => {
                    let reason = crate::error::with_causes(&error);
                    State::Failed(LastIncrementError { reason })
                }
            });
        });
        Self { state, task, stop: stop.drop_guard() }
    }

    /// What is left to copy, in bytes; not 0 until all is at the destination, and the hypervisor as before.
    ///
    /// # Errors
    /// It has failed.
    pub fn left_bytes(&self) -> Result<u64, LastIncrementError> {
        match &*self.state.borrow() {
            State::Copying(copied) => Ok(copied.left_bytes().max(1)),
            State::Done => Ok(0),
            State::Failed(error) => Err(error.clone()),
        }
    }

    /// Waits until no more than so many bytes are left, in the sense of [`Self::left_bytes`]. Cancel-safe.
    ///
    /// # Errors
    /// It has failed.
    pub async fn wait_until_left(
        &mut self,
        left_bytes: u64,
        mut progress: impl FnMut(Copied),
    ) -> Result<(), LastIncrementError> {
        loop {
            match self.state.borrow_and_update().clone() {
                State::Copying(copied) => {
                    progress(copied);
                    if left_bytes > 0 && copied.left_bytes() <= left_bytes {
                        return Ok(());
                    }
                }
                State::Done => return Ok(()),
                State::Failed(error) => return Err(error),
            }
            if self.state.changed().await.is_err() {
                return Err(LastIncrementError { reason: "its task has ended".to_owned() });
            }
        }
    }

    /// Ends it at once: when this returns nothing is written to the sessions, and the hypervisor is as before.
    pub async fn end(self) {
        drop(self.stop);
        // Its outcome is told elsewhere.
        let _ = self.task.await;
    }
}

async fn copy(
    mut frozen: FrozenCopy,
    sessions: &[Arc<DiskSession>],
    news: &watch::Sender<State>,
    stopped: &CancellationToken,
) -> Result<(), FrozenCopyError> {
    let copies = async {
        frozen.wait(None, |copied| drop(news.send_replace(State::Copying(copied)))).await?;
        // The copy has handed all over; now it is there.
        for session in sessions {
            session.flush().await.map_err(FrozenCopyError::Sessions)?;
        }
        Ok(())
    };
    let copied = stopped.run_until_cancelled(copies).await.unwrap_or(Err(FrozenCopyError::Stopped));
    let released = frozen.release(Outcome::Failed).await;
    if let (Err(_), Err(error)) = (&copied, &released) {
        tracing::warn!(error = %crate::error::with_causes(error), "the last increment is left behind");
    }
    copied.and(released.map_err(Into::into))
}
