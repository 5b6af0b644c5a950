//! That a VM never runs twice, seen from outside.
#![allow(clippy::unwrap_used, dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pageport_lab::lab::Lab;

use super::VM;

/// Looks all the time for two hypervisors of the VM.
pub struct Witness {
    stop: Arc<AtomicBool>,
    watching: tokio::task::JoinHandle<Result<u64, String>>,
}

impl Witness {
    pub fn of(lab: &Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, look) = (stop.clone(), lab.hypervisors_of(VM));
        let watching = tokio::task::spawn_blocking(move || {
            let mut looks = 0;
            while !stopped.load(Ordering::SeqCst) {
                let pids = look();
                if pids.len() > 1 {
                    return Err(format!("{pids:?}"));
                }
                looks += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(looks)
        });
        Self { stop, watching }
    }

    pub async fn assert_never_two(self) {
        self.stop.store(true, Ordering::SeqCst);
        let looks = self.watching.await.unwrap().expect("two hypervisors ran the vm");
        assert!(looks > 100, "only {looks} looks");
    }
}
