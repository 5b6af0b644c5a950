//! Everything settles once faults are over: somebody leads, every move has ended, every VM that should run does, at its owner and
//! nowhere else; a VM is shown as crashed only if it was struck.
//!
//! What waits for an operator is left out: a VM that a worker may hold which has lost its store.

use std::collections::BTreeSet;

use pageport_controller::model::state::{Life, Power};
use pageport_controller::model::{Migration, State};
use pageport_ownership::Ownership;
use pageport_proto::{VmId, WorkerName};

use super::{Fact, Invariant};
use crate::hypervisor::Cause;

/// Who was struck.
#[derive(Debug, Default)]
pub struct Settles {
    struck: BTreeSet<VmId>,
    forgetful: BTreeSet<WorkerName>,
}

impl Invariant for Settles {
    fn name(&self) -> &'static str {
        "settles"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::GuestGone { vm, cause: Cause::Struck, .. } => drop(self.struck.insert(*vm)),
            Fact::StoreLost { worker } => drop(self.forgetful.insert((*worker).clone())),
            Fact::End { state: None, .. } => return Err("nobody leads".to_owned()),
            Fact::End { state: Some(state), running, present } => return self.settled(state, running, present),
            _ => {}
        }
        Ok(())
    }
}

type Places = [(WorkerName, VmId)];

impl Settles {
    fn settled(&self, state: &State, running: &Places, present: &Places) -> Result<(), String> {
        let forgotten = |migration: &&Migration| {
            self.forgetful.contains(&migration.from.worker) || self.forgetful.contains(&migration.to.worker)
        };
        if let Some(migration) = state.migrations.values().filter(|it| !forgotten(it)).find(|it| !it.is_over()) {
            return Err(format!("migration {} has not ended: {:?}", migration.id, migration.phase));
        }
        for (id, vm) in &state.vms {
            if vm.ownership.possible_holders().iter().any(|worker| self.forgetful.contains(*worker)) {
                continue;
            }
            let Ownership::Owned { owner, .. } = &vm.ownership else {
                return Err(format!("vm {id} has no certain owner: {:?}", vm.ownership));
            };
            let runs: Vec<&WorkerName> = at(running, *id);
            let is: Vec<&WorkerName> = at(present, *id);
            let right = match vm.power {
                Power::Run if vm.life == Life::Defined => runs == [owner] && is == [owner],
                Power::Run | Power::Stop | Power::Kill | Power::Crashed => is.is_empty(),
            };
            if !right {
                return Err(format!("vm {id} ({:?}, of {owner}) runs at {runs:?} and has a QEMU at {is:?}", vm.power));
            }
            if vm.power == Power::Crashed && !self.struck.contains(id) {
                return Err(format!("vm {id} is shown as crashed, and was not struck: {}", vm.problem));
            }
        }
        Ok(())
    }
}

fn at(places: &Places, vm: VmId) -> Vec<&WorkerName> {
    places.iter().filter(|(_, of)| *of == vm).map(|(worker, _)| worker).collect()
}
