//! From what the controllers want of a VM to steps of its record: level-triggered, called again and again.
//!
//! | assignment says | this worker |
//! |---|---|
//! | owned by another worker, newer | ends its guest, becomes a replica |
//! | released / refused evidence | acquires or refuses / revokes |
//! | run, and it stands still | resumes it, again if its hypervisor did not answer |
//! | run, and it may | asks for a grant (twice for a cold boot), boots or resumes |
//! | stop, kill | asks the guest, pulls the plug |
//! | deleted | removes everything but the original disk |

use std::sync::Arc;

use pageport_ownership::{Epoch, Event, Nonce, needs_grant};
use pageport_proto::v1::{AskGrantRequest, StartPolicy, VmAssignment, vm_assignment::Power};

use super::managed::{ManagedVm, VmError};
use super::plan::{self, Stop};
use crate::agent::controllers::{ControllerError, Controllers};

/// Why a VM is not where it should be yet.
#[derive(Debug, thiserror::Error)]
pub enum ConvergeError {
    /// This host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The controllers.
    #[error("ask the controllers for a grant")]
    Controllers(#[from] ControllerError),
    /// The controllers said no.
    #[error("the controllers do not let this worker run the vm: {reason}")]
    Denied {
        /// Their words.
        reason: String,
    },
}

/// What became of a VM that was looked after once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Converged {
    /// It is as it should be, or on its way.
    Kept,
    /// Nothing of it is left here.
    Gone,
}

/// Brings one VM a step closer to its assignment.
///
/// # Errors
/// [`ConvergeError`]: try again later.
pub async fn converge(
    vm: &Arc<ManagedVm>,
    wanted: &VmAssignment,
    me: &str,
    controllers: &Controllers,
) -> Result<Converged, ConvergeError> {
    if let Some(spec) = &wanted.spec {
        vm.set_spec(spec).await?;
        if spec.start() == StartPolicy::Manual {
            vm.stay_down(wanted.power_seq);
        }
    }
    vm.note_whose(Epoch::from_raw(wanted.owner_epoch), &wanted.owner_worker);
    for event in plan::ownership(wanted, me) {
        vm.step(event).await?;
    }
    if wanted.deleted {
        vm.purge().await?;
        return Ok(Converged::Gone);
    }
    vm.take_power_order(wanted.power_seq);
    power(vm, wanted, plan::owned(wanted, me), controllers).await?;
    Ok(Converged::Kept)
}

async fn power(
    vm: &Arc<ManagedVm>,
    wanted: &VmAssignment,
    owned: Option<Epoch>,
    controllers: &Controllers,
) -> Result<(), ConvergeError> {
    if wanted.power() != Power::Run {
        vm.clear_crash();
    }
    let status = vm.status();
    match plan::stop(wanted, &status.record) {
        Some(Stop::Ask) => vm.ask_to_shut_down().await?,
        Some(Stop::PullThePlug) => vm.pull_the_plug().await?,
        None => {}
    }
    let power_on = plan::power_on(wanted, status.halted_under);
    if power_on && owned.is_some() {
        vm.resume_what_waits().await?;
    }
    // A cold boot takes two grants: the first is recorded, the second boots.
    for _ in 0..2 {
        let status = vm.status();
        if !needs_grant(&status.record, &status.volatile, power_on, owned) {
            return Ok(());
        }
        ask_grant(vm, controllers).await?;
    }
    Ok(())
}

async fn ask_grant(vm: &Arc<ManagedVm>, controllers: &Controllers) -> Result<(), ConvergeError> {
    let nonce = rand::random();
    vm.step(Event::Asked(Nonce(nonce))).await?;
    let request = AskGrantRequest { worker: controllers.worker().to_owned(), vm_id: vm.id().to_string(), nonce };
    let answer = controllers.ask_grant(request).await?;
    let event = plan::granted(&answer).ok_or(ConvergeError::Denied { reason: answer.reason })?;
    vm.step(event).await?;
    Ok(())
}
