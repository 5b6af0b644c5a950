//! Never two running copies of a VM.

use std::collections::BTreeMap;

use pageport_proto::{VmId, WorkerName};

use super::{Fact, Invariant};

/// Which copies run.
#[derive(Debug, Default)]
pub struct OneRuns {
    running: BTreeMap<VmId, BTreeMap<u64, WorkerName>>,
}

impl Invariant for OneRuns {
    fn name(&self) -> &'static str {
        "one-runs"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::GuestRuns { worker, vm, instance, .. } => {
                let running = self.running.entry(*vm).or_default();
                running.insert(*instance, (*worker).clone());
                if running.len() > 1 {
                    return Err(format!("vm {vm} runs more than once: {running:?}"));
                }
            }
            Fact::GuestStops { vm, instance, .. } => {
                if let Some(running) = self.running.get_mut(vm) {
                    running.remove(instance);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
