//! Policy and lease of one VM, as they come in: from its definition, and from the leader's answers.

use std::sync::Arc;

use pageport_keeper::BootTime;
use pageport_ownership::{Epoch, Event, Guest, MayRun, Nonce, Policy, Record, Standing};
use pageport_proto::v1::VmSpec;

use super::{ManagedVm, State, VmError};
use crate::vms::records;

impl ManagedVm {
    /// The definition, once it has arrived.
    ///
    /// # Errors
    /// It or its policy could not be noted, or not be put into effect.
    pub async fn set_spec(self: &Arc<Self>, spec: &VmSpec) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        self.take_spec(&mut state, spec)?;
        let policy = Policy::from(spec.on_isolation());
        if state.fence.policy() == Some(policy) {
            return Ok(());
        }
        tokio::task::block_in_place(|| records::write_policy(&self.shared.store, self.id, policy))?;
        state.fence.set_policy(policy);
        self.stand(&mut state).await
    }

    pub(super) fn take_spec(&self, state: &mut State, spec: &VmSpec) -> Result<(), VmError> {
        if state.spec.as_ref() != Some(spec) {
            tokio::task::block_in_place(|| records::keep_spec(&self.shared.store, self.id, spec))?;
            state.spec = Some(spec.clone());
        }
        Ok(())
    }

    /// The definition as it was last kept, for controllers that do not know the VM.
    pub fn kept_spec(&self) -> Option<VmSpec> {
        records::read_spec(&self.shared.store, self.id).ok().flatten()
    }

    /// Does it run under a lease only?
    pub fn fences_itself(&self) -> bool {
        self.status.borrow().volatile.standing != Standing::KeepRunning
    }

    /// The question for a lease leaves now.
    pub async fn lease_asked(&self, nonce: Nonce, now: BootTime) {
        self.state.lock().await.fence.asked(nonce, now);
    }

    /// What came of the question: a lease for one epoch, of so many milliseconds, or none.
    ///
    /// # Errors
    /// The keeper could not be given its new deadline, or what waited for the lease did not run.
    pub async fn lease_answered(self: &Arc<Self>, nonce: Nonce, lease: Option<(Epoch, u64)>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        if let Some((own, lease_ms)) = lease {
            state.fence.granted(nonce, own, lease_ms);
        }
        self.stand(&mut state).await
    }

    /// Lets policy and lease take effect.
    pub(super) async fn stand(self: &Arc<Self>, state: &mut State) -> Result<(), VmError> {
        let standing = state.fence.standing(BootTime::now());
        let effects = self.commit(state, Event::Standing(standing))?;
        let outcome = self.carry_out(state, effects).await;
        self.publish(state);
        outcome
    }

    /// Sets running what this worker owns and what yet stands still: when it was to run, its hypervisor did not answer.
    ///
    /// # Errors
    /// It still does not.
    pub async fn resume_what_waits(self: &Arc<Self>) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let waits = matches!(state.volatile.guest, Guest::Paused | Guest::Loaded(_));
        match state.durable.record() {
            Record::Own { .. } if waits => self.stand(&mut state).await,
            _ => Ok(()),
        }
    }

    pub(super) fn permission(&self, state: &State) -> Result<MayRun, VmError> {
        let licence = state.fence.licence(BootTime::now()).ok_or(VmError::NoLease { vm: self.id })?;
        state.durable.may_run(licence).ok_or(VmError::NotPermitted { vm: self.id })
    }
}
