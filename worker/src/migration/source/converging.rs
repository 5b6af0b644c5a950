//! Has memory converge, as its order says: looks at each round, and slows the guest down or permits it a longer pause.
//!
//! What it decides is [`crate::migration::convergence`]; here it is done. The hypervisor takes back what was done to the guest
//! when its migration ends, however it ends; the next one begins with the usual parameters.

use pageport_proto::v1::{Convergence, ConvergencePolicy, ConvergenceRecord, ConvergenceStatus, MigrationAssignment};

use super::SourceError;
use crate::hypervisor::migrate::LEAST_THROTTLE_PERCENT;
use crate::hypervisor::{HypervisorError, Vm};
use crate::migration::convergence::USUAL_PAUSE;
use crate::migration::convergence::policy::{Measures, Policy, decide};
use crate::migration::convergence::rounds::{Observation, Rounds};
use crate::migration::convergence::words::Terms;

/// What is seen at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) observation: Observation,
    /// Of its CPUs, what the guest is denied, in per cent.
    pub(super) throttle_percent: u8,
    /// What the hypervisor takes the link to carry.
    pub(super) planned_bytes_per_s: u64,
    /// Something else holds memory back: its rounds say nothing.
    pub(super) held: bool,
}

/// How it goes.
#[derive(Debug)]
pub(super) struct Converging {
    migration: String,
    can_throttle: bool,
    rounds: Rounds,
    in_force: Measures,
    carried_bytes_per_s: Option<u64>,
    round: u64,
    greatest_throttle_percent: u8,
    acted: Vec<ConvergencePolicy>,
}

impl Converging {
    /// Of this move nothing is known yet.
    pub(super) fn new(assignment: &MigrationAssignment) -> Self {
        Self {
            migration: assignment.migration_id.clone(),
            can_throttle: assignment.can_throttle,
            rounds: Rounds::default(),
            in_force: Measures::default(),
            carried_bytes_per_s: None,
            round: 0,
            greatest_throttle_percent: 0,
            acted: Vec::new(),
        }
    }

    /// What the hypervisor is to take the link to carry, which was seen to carry so much at best. A pause that is longer than usual is
    /// planned with what the link carried lately, so that it is not longer still.
    pub(super) fn planned_bytes_per_s(&self, carried_bytes_per_s: u64) -> u64 {
        let lately = self.carried_bytes_per_s.filter(|_| self.in_force.pause > USUAL_PAUSE);
        lately.map_or(carried_bytes_per_s, |lately| lately.min(carried_bytes_per_s))
    }

    /// Takes note of what is seen, does what the policy asks for, and tells how it goes.
    ///
    /// # Errors
    /// The hypervisor's; [`SourceError::GivenUp`]: the policy asks for that.
    pub(super) async fn observe(
        &mut self,
        qemu: &Vm,
        policy: Policy,
        seen: Seen,
    ) -> Result<ConvergenceStatus, SourceError> {
        let policy = if policy == Policy::Throttle && !self.can_throttle { Policy::Wait } else { policy };
        self.round = seen.observation.round;
        self.greatest_throttle_percent = self.greatest_throttle_percent.max(seen.throttle_percent);
        let least = |percent: u8| percent.max(LEAST_THROTTLE_PERCENT);
        let is_under_way = least(seen.throttle_percent) != least(self.in_force.throttle_percent);
        if seen.held || is_under_way {
            self.rounds.forget();
        } else {
            self.rounds.observe(seen.observation);
        }
        let fits_bytes = (seen.planned_bytes_per_s as f64 * self.in_force.pause.as_secs_f64()) as u64;
        let mut estimate = self.rounds.estimate(fits_bytes);
        if let Some(estimate) = &estimate {
            self.carried_bytes_per_s = Some(estimate.carried_bytes_per_s as u64);
        }
        let next = decide(policy, estimate.as_ref(), self.in_force)?;
        if next != self.in_force {
            self.take(qemu, policy, next).await?;
            estimate = None;
        }
        Ok(ConvergenceStatus {
            outlook: estimate.map_or(Convergence::Unspecified, |estimate| estimate.outlook).into(),
            sentence: self.terms(policy).sentence(estimate.as_ref(), self.in_force),
            throttle_percent: seen.throttle_percent.into(),
            permitted_pause_ms: self.in_force.pause.as_millis() as u64,
        })
    }

    async fn take(&mut self, qemu: &Vm, policy: Policy, next: Measures) -> Result<(), HypervisorError> {
        let Measures { throttle_percent, pause } = self.in_force;
        tracing::info!(
            ?policy,
            throttle_percent = next.throttle_percent,
            pause_ms = next.pause.as_millis() as u64,
            "measures"
        );
        if next.throttle_percent != throttle_percent {
            qemu.set_throttle(next.throttle_percent).await?;
        }
        if next.pause != pause {
            qemu.set_downtime_limit(next.pause).await?;
        }
        let goes_further = next.throttle_percent > throttle_percent || next.pause > pause;
        if goes_further && !self.acted.contains(&policy.name()) {
            self.acted.push(policy.name());
        }
        self.in_force = next;
        self.rounds.forget();
        Ok(())
    }

    fn terms(&self, policy: Policy) -> Terms<'_> {
        Terms { migration: &self.migration, policy, can_throttle: self.can_throttle }
    }

    /// What it took.
    pub(super) fn record(&self) -> ConvergenceRecord {
        ConvergenceRecord {
            acted: self.acted.iter().map(|policy| i32::from(*policy)).collect(),
            rounds: self.round as u32,
            greatest_throttle_percent: self.greatest_throttle_percent.into(),
            permitted_pause_ms: self.in_force.pause.as_millis() as u64,
        }
    }
}
