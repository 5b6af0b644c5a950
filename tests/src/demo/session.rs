//! One TCP session to the guest that is used all the time, so that a move shows as its longest gap.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::lab::guest::client::{CountingSession, GuestError};

/// Pause between two numbers.
const PACE: Duration = Duration::from_millis(50);
/// The longest answer that still counts as survival.
const PATIENCE: Duration = Duration::from_secs(60);

/// A session in use.
#[derive(Debug)]
pub struct BusySession {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<Summary, GuestError>>,
}

/// What the session saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Numbers received, each exactly once and in order.
    pub numbers: u64,
    /// The longest wait for one.
    pub longest_wait: Duration,
}

impl BusySession {
    /// Uses the session until it is finished.
    #[must_use]
    pub fn start(mut session: CountingSession) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut summary = Summary { numbers: 0, longest_wait: Duration::ZERO };
            while !*stopped.borrow() {
                let begin = Instant::now();
                session.next(PATIENCE).await?;
                summary.numbers += 1;
                summary.longest_wait = summary.longest_wait.max(begin.elapsed());
                // Ends early when the session is finished; a change or the end of time are alike.
                drop(tokio::time::timeout(PACE, stopped.changed()).await);
            }
            // Whatever happened, one more answer must come.
            session.next(PATIENCE).await?;
            Ok(summary)
        });
        Self { stop, task }
    }

    /// Asks for one last number and tells how it was.
    ///
    /// # Errors
    /// When the session broke, or a number was lost or repeated.
    pub async fn finish(self) -> Result<Summary, GuestError> {
        self.stop.send_replace(true);
        match self.task.await {
            Ok(result) => result,
            Err(join) => {
                Err(GuestError::Talk { what: "the session's task".into(), source: std::io::Error::other(join) })
            }
        }
    }
}
