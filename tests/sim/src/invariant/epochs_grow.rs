//! Epochs only grow: a worker's record never forgets one, no epoch is held by two workers, the controllers give none twice.

use std::collections::BTreeMap;

use pageport_ownership::{Epoch, Record};
use pageport_proto::{VmId, WorkerName};

use super::{Fact, Invariant};

/// Who has held what.
#[derive(Debug, Default)]
pub struct EpochsGrow {
    seen: BTreeMap<(WorkerName, VmId), Epoch>,
    held: BTreeMap<(VmId, Epoch), WorkerName>,
    given: BTreeMap<(u64, VmId), Epoch>,
}

impl Invariant for EpochsGrow {
    fn name(&self) -> &'static str {
        "epochs-grow"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::RecordWritten { worker, vm, record } => {
                let seen = self.seen.entry(((*worker).clone(), *vm)).or_default();
                if record.seen() < *seen {
                    return Err(format!("{worker} forgot epoch {seen} of vm {vm}: {record:?}"));
                }
                *seen = record.seen();
                if let Record::Own { own, .. } = record {
                    let holder = self.held.entry((*vm, *own)).or_insert_with(|| (*worker).clone());
                    if holder != *worker {
                        return Err(format!("epoch {own} of vm {vm} is held by {holder} and by {worker}"));
                    }
                }
            }
            Fact::Applied { node, state } => {
                for (id, vm) in &state.vms {
                    let given = self.given.entry((*node, *id)).or_default();
                    let last = vm.ownership.last();
                    if last < *given {
                        return Err(format!("controller {node} forgot epoch {given} of vm {id}: {:?}", vm.ownership));
                    }
                    *given = last;
                }
            }
            Fact::StoreLost { worker } => self.seen.retain(|(of, _), _| of != *worker),
            // It applies again what it has applied before.
            Fact::Restarted { node } => self.given.retain(|(of, _), _| of != node),
            _ => {}
        }
        Ok(())
    }
}
