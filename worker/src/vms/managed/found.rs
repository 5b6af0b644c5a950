//! What an earlier worker left of a VM, found and taken over by the next.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pageport_ownership::{Epoch, Event, Guest};
use pageport_proto::VmId;

use super::{ManagedVm, State, VmError};
use crate::hypervisor::{self, HypervisorError, MigrationStatus, RunState, Vm, VmPaths};
use crate::store_identity::StoreAge;

/// A hypervisor that is only just starting, or has not noticed yet that its earlier worker is gone, does not answer at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// A mirror, or a copy of a frozen point, that an earlier worker left has this long to end.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

impl ManagedVm {
    /// Looks at what an earlier worker left, and takes it over.
    pub(in crate::vms) async fn restore(self: &Arc<Self>, age: StoreAge) -> Result<(), VmError> {
        let mut state = self.state.lock().await;
        let runtime_dir = &self.shared.hypervisor.runtime_dir;
        let found = match adopt(runtime_dir, self.id).await {
            Ok(qemu) => {
                let found = found_guest(&qemu).await?;
                self.install(&mut state, qemu);
                found
            }
            Err(HypervisorError::NotRunning { .. }) => {
                hypervisor::clean_up(runtime_dir, self.id).await?;
                self.found_down.store(state.durable.record().owned().is_some(), Ordering::SeqCst);
                Guest::Absent
            }
            Err(error) => return Err(error.into()),
        };
        let event = match age {
            StoreAge::Known => Event::Restarted(found),
            StoreAge::New => Event::StoreLost(found),
        };
        let effects = self.commit(&mut state, event)?;
        let outcome = self.carry_out(&mut state, effects).await;
        self.settle_found_disks(&state);
        tracing::info!(vm_id = %self.id, ?found, ?age, record = ?state.durable.record(), "vm restored");
        self.publish(&state);
        outcome
    }

    /// Notes which image QEMU holds, so that another worker can vouch for it; the note goes when the guest runs or QEMU ends. It
    /// matters only while this QEMU lives, so it need not be on stable storage.
    pub(super) async fn note_image(&self, state: &State) -> Result<(), VmError> {
        let Some(qemu) = &state.qemu else { return Ok(()) };
        let path = qemu.paths().image();
        let noted = match state.volatile.guest {
            Guest::Loaded(epoch) => tokio::fs::write(&path, epoch.raw().to_string()).await,
            Guest::Absent | Guest::Running | Guest::Paused => match tokio::fs::remove_file(&path).await {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            },
        };
        noted.map_err(|source| VmError::Image { vm: self.id, source })
    }
}

async fn adopt(runtime_dir: &Path, id: VmId) -> Result<Vm, HypervisorError> {
    let give_up = Instant::now() + ANSWER_LIMIT;
    loop {
        match Vm::adopt(runtime_dir, id).await {
            Err(HypervisorError::NotRunning { vm }) => return Err(HypervisorError::NotRunning { vm }),
            Err(error) if Instant::now() < give_up => {
                tracing::warn!(vm_id = %id, error = %crate::error::with_causes(&error), "a hypervisor does not answer yet");
                tokio::time::sleep(ASK_AGAIN).await;
            }
            adopted => return adopted,
        }
    }
}

/// What an adopted hypervisor does. What an earlier worker had under way in it is given up. An image that was received
/// counts as a guest that must not run, unless the earlier worker noted that it had vouched for it.
async fn found_guest(qemu: &Vm) -> Result<Guest, VmError> {
    let image = image_note(qemu.paths()).await;
    let found = match (qemu.run_state().await?, image) {
        (RunState::Running, _) => Guest::Running,
        (_, Some(epoch)) => Guest::Loaded(epoch),
        (_, None) => Guest::Paused,
    };
    let status = qemu.migration_info().await?.status;
    if let Some(MigrationStatus::Setup | MigrationStatus::Active | MigrationStatus::PreSwitchover) = status {
        qemu.cancel_migration().await?;
    }
    qemu.end_orphaned_mirrors(ORPHAN_LIMIT).await?;
    qemu.end_orphaned_freezes(ORPHAN_LIMIT).await?;
    Ok(found)
}

async fn image_note(paths: &VmPaths) -> Option<Epoch> {
    let text = tokio::fs::read_to_string(paths.image()).await.ok()?;
    text.trim().parse().ok().map(Epoch::from_raw)
}
