//! A guest's memory never goes back, and is not thrown away for a cold boot while it could go on.
//!
//! A copy that runs remembers all that any copy of its boot ever did. A VM is booted anew only if its newest memory is nowhere any
//! more: it was struck, it shut down, its lease ended it, it was ordered down. Or if it was struck at its owner: a source that has
//! let go does not take it back. Or if it was taken over from a worker that may hold it still, or a worker lost its store.

use std::collections::BTreeMap;

use pageport_controller::model::state::Power;
use pageport_ownership::{Epoch, Record};
use pageport_proto::{VmId, WorkerName};

use super::{Fact, Invariant};
use crate::hypervisor::{Cause, Memory};

#[derive(Debug, Default)]
struct Guest {
    newest: Option<Memory>,
    /// What each QEMU holds.
    copies: BTreeMap<u64, Memory>,
    /// Why the last QEMU that held the newest memory ended.
    lost: Option<Cause>,
    /// Whoever may run it by its record, and since which epoch.
    owner: Option<(Epoch, WorkerName)>,
    /// The owner's copy of the newest memory was struck: what others hold is not gone back to.
    struck: bool,
    down: bool,
    /// It was ordered down while it ran for the last time or the time before: the order may have come late.
    ordered_down: [bool; 2],
    taken_over: Option<Epoch>,
    /// It was taken over since it last began to run.
    excused: bool,
}

impl Guest {
    fn holds_newest(&self, memory: Memory) -> bool {
        self.newest.is_some_and(|newest| memory >= newest)
    }

    fn runs(&mut self, memory: Memory) -> Result<(), String> {
        let before = self.newest.replace(memory);
        let excused = std::mem::take(&mut self.excused);
        let ordered_down = self.ordered_down.contains(&true);
        self.ordered_down = [self.down, self.ordered_down[0]];
        let lost = self.lost.take();
        let struck = std::mem::take(&mut self.struck);
        let Some(newest) = before else { return Ok(()) };
        if excused {
            return Ok(());
        }
        if memory.boot == newest.boot {
            let goes_on = memory.ran_us >= newest.ran_us;
            return if goes_on { Ok(()) } else { Err(format!("it remembers {memory:?}, and was at {newest:?}")) };
        }
        match lost {
            _ if struck => Ok(()),
            Some(Cause::Struck | Cause::Lease | Cause::ByItself) => Ok(()),
            Some(Cause::Told) if ordered_down => Ok(()),
            Some(Cause::Told) => Err(format!("booted anew: its worker threw {newest:?} away")),
            None => Err(format!("booted anew, while {newest:?} is held: {:?}", self.copies)),
        }
    }
}

/// What each guest has come to.
#[derive(Debug, Default)]
pub struct MemoryGoesOn {
    guests: BTreeMap<VmId, Guest>,
}

impl Invariant for MemoryGoesOn {
    fn name(&self) -> &'static str {
        "memory-goes-on"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::GuestRuns { worker, vm, instance, memory } => {
                let guest = self.guests.entry(*vm).or_default();
                guest.copies.insert(*instance, *memory);
                guest.runs(*memory).map_err(|what| format!("vm {vm} at {worker}: {what}"))?;
            }
            // It knows no more what its paused guests are for, and ends them.
            Fact::StoreLost { .. } => self.guests.values_mut().for_each(|guest| guest.excused = true),
            Fact::Loaded { vm, instance, memory } => {
                let guest = self.guests.entry(*vm).or_default();
                guest.copies.insert(*instance, *memory);
            }
            Fact::GuestStops { vm, instance, memory, .. } => {
                let guest = self.guests.entry(*vm).or_default();
                guest.copies.insert(*instance, *memory);
                if guest.holds_newest(*memory) {
                    guest.newest = Some(*memory);
                }
            }
            Fact::RecordWritten { worker, vm, record: Record::Own { own, .. } } => {
                let guest = self.guests.entry(*vm).or_default();
                if guest.owner.as_ref().is_none_or(|(since, _)| since < own) {
                    guest.owner = Some((*own, (*worker).clone()));
                }
            }
            Fact::GuestGone { worker, vm, instance, cause } => {
                let guest = self.guests.entry(*vm).or_default();
                let gone = guest.copies.remove(instance);
                let was_newest = gone.is_some_and(|memory| guest.holds_newest(memory));
                let owned = guest.owner.as_ref().is_some_and(|(_, owner)| owner == *worker);
                guest.struck |= was_newest && owned && matches!(cause, Cause::Struck | Cause::Lease);
                if was_newest && !guest.copies.values().any(|memory| guest.holds_newest(*memory)) {
                    guest.lost = Some(*cause);
                }
            }
            Fact::Applied { state, .. } => {
                for (id, vm) in &state.vms {
                    let newest = vm.takeovers.last().map(|takeover| takeover.epoch);
                    let guest = self.guests.entry(*id).or_default();
                    guest.down = vm.power != Power::Run;
                    guest.ordered_down[0] |= guest.down;
                    if newest > guest.taken_over {
                        guest.taken_over = newest;
                        guest.excused = true;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
