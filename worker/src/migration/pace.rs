//! How fast a move may go, and what it may do to its guest: what the controllers last said, changeable while it runs.
//!
//! Memory and disks of a move share one cap. It ends with the guest's standstill: what is left then is little, and is downtime.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::convergence::policy::Policy;
use crate::replica::cap::Cap;

/// The pace of one move.
#[derive(Debug)]
pub struct Pace {
    cap: Arc<Cap>,
    is_lifted: Mutex<bool>,
    is_paused: AtomicBool,
    policy: Mutex<Policy>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            cap: Arc::new(Cap::none()),
            is_lifted: Mutex::default(),
            is_paused: AtomicBool::new(false),
            policy: Mutex::default(),
        }
    }
}

impl Pace {
    /// So many bits per second from now on (0: no bound), and whether the guest is to run on here.
    pub fn set(&self, rate_bps: u64, paused: bool) {
        let is_lifted = self.is_lifted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*is_lifted {
            self.cap.set(rate_bps);
        }
        self.is_paused.store(paused, Ordering::Relaxed);
    }

    /// What is done from now on if memory does not converge.
    pub fn set_policy(&self, policy: Policy) {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// What is done if memory does not converge.
    pub fn policy(&self) -> Policy {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No bound any more, whatever is said from now on.
    pub fn lift(&self) {
        let mut is_lifted = self.is_lifted.lock().unwrap_or_else(PoisonError::into_inner);
        *is_lifted = true;
        self.cap.set(0);
    }

    /// Is the guest to run on here?
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// What is sent is taken from here.
    pub fn cap(&self) -> Arc<Cap> {
        self.cap.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn once_the_guest_stands_still_nothing_slows_it_down() {
        let pace = Pace::default();
        pace.set(8, true);
        pace.cap().take(1_000_000).await;
        let waits = tokio::spawn({
            let cap = pace.cap();
            async move { cap.take(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished() && pace.is_paused());
        pace.lift();
        pace.set(8, false);
        tokio::time::timeout(std::time::Duration::from_secs(60), waits).await.unwrap().unwrap();
        assert!(!pace.is_paused());
    }
}
