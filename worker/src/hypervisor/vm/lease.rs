//! The lease of one QEMU, which its keeper enforces.

use std::sync::PoisonError;

use pageport_keeper::{BootTime, Lease};

use super::Vm;
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::keeper;

impl Vm {
    /// Has the keeper kill QEMU at `deadline`, or later if it was armed for later: a deadline is not moved back by a
    /// request that was overtaken. Cheap enough for any thread.
    ///
    /// # Errors
    /// The deadline file is gone or cannot be written: the lease that the keeper read last stands.
    pub fn arm(&self, deadline: BootTime) -> Result<(), HypervisorError> {
        self.change_lease("extend", |standing| match standing {
            Some(Lease::Until(later)) if later >= deadline => None,
            _ => Some(Lease::Until(deadline)),
        })
    }

    /// As [`Self::arm`], but also to an earlier time.
    ///
    /// # Errors
    /// As there.
    pub fn arm_exactly(&self, deadline: BootTime) -> Result<(), HypervisorError> {
        self.change_lease("set", |_| Some(Lease::Until(deadline)))
    }

    /// Lets QEMU live without a limit.
    ///
    /// # Errors
    /// As [`Self::arm`].
    pub fn disarm(&self) -> Result<(), HypervisorError> {
        self.change_lease("disarm", |_| Some(Lease::Disarmed))
    }

    /// The lease that stands.
    ///
    /// # Errors
    /// The deadline file cannot be read.
    pub fn lease(&self) -> Result<Lease, HypervisorError> {
        keeper::lease(self.id(), self.paths())
    }

    fn change_lease(
        &self,
        operation: &'static str,
        new: impl FnOnce(Option<Lease>) -> Option<Lease>,
    ) -> Result<(), HypervisorError> {
        let _one_at_a_time = self.inner.lease.lock().unwrap_or_else(PoisonError::into_inner);
        keeper::change(self.id(), self.paths(), operation, new)
    }
}
