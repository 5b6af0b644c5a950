//! How far the guest's history was, by the host's clock: what a recovery point must hold, and what it cannot hold.
//!
//! The host that looks, and the worker that dates points, share a clock: the lab is one machine.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageport_guest::protocol::{Reply, Request};
use tokio::task::JoinHandle;

use crate::kept::unix_ms;
use crate::lab::guest::client::GuestClient;

const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// A point is dated a little before or after its moment.
const DATING_SLACK_MS: i64 = 3000;

/// One look.
#[derive(Clone, Copy, Debug)]
struct Look {
    asked_unix_ms: i64,
    heard_unix_ms: i64,
    done: u64,
}

/// Looks at a history again and again. Ends when dropped.
#[derive(Debug)]
pub struct Ledger {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Seen {
    looks: Vec<Look>,
    slowest_write_ms: u64,
    failure: Option<String>,
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Ledger {
    /// Begins to look, until the guest answers no more.
    #[must_use]
    pub fn start(mut guest: GuestClient) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let task = tokio::spawn({
            let seen = Arc::clone(&seen);
            async move {
                loop {
                    let asked_unix_ms = now_unix_ms();
                    let answer = guest.call(&Request::HistoryStatus, ANSWER_LIMIT).await;
                    let Ok(Reply::History { done, slowest_write_ms, failure }) = answer else { return };
                    {
                        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        seen.looks.push(Look { asked_unix_ms, heard_unix_ms: now_unix_ms(), done });
                        seen.slowest_write_ms = slowest_write_ms;
                        seen.failure = failure;
                    }
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        });
        Self { seen, task }
    }

    /// Operations that were on the disk for sure at that time: someone had heard so before.
    #[must_use]
    pub fn at_least(&self, unix_ms: i64) -> u64 {
        let done = |look: &Look| (look.heard_unix_ms < unix_ms).then_some(look.done);
        self.read(|seen| seen.looks.iter().filter_map(done).max().unwrap_or_default())
    }

    /// Operations that can have been on the disk at that time; [`None`]: nobody has looked since.
    #[must_use]
    pub fn at_most(&self, unix_ms: i64) -> Option<u64> {
        let done = |look: &Look| (look.asked_unix_ms > unix_ms + DATING_SLACK_MS).then_some(look.done);
        self.read(|seen| seen.looks.iter().find_map(done))
    }

    /// The slowest write with its sync that was told, in milliseconds.
    #[must_use]
    pub fn slowest_write_ms(&self) -> u64 {
        self.read(|seen| seen.slowest_write_ms)
    }

    /// Why the history has ended early.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.read(|seen| seen.failure.clone())
    }

    fn read<T>(&self, what: impl FnOnce(&Seen) -> T) -> T {
        what(&self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Now, as points are dated.
#[must_use]
pub fn now_unix_ms() -> i64 {
    i64::try_from(unix_ms()).unwrap_or(i64::MAX)
}
