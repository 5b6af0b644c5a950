//! What a step asks of the hypervisor, done: boot, resume, pause, kill; and what becomes of a hypervisor that ends.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageport_keeper::BootTime;
use pageport_ownership::{Effect, Epoch, Event, MayRun, Record};
use pageport_proto::VmId;
use pageport_proto::v1::{DiskSpec, VmSpec, VmState};

use super::{ManagedVm, Shared, State, VmError};
use crate::hypervisor::{self, ExitCause, HypervisorError, Launch, StartMode, Vm};
use crate::image::{Format, Image};
use crate::replica::groups::{Groups, GroupsError, Surrender};
use crate::replica::store::{DiskLocation, ReplicaError, ReplicaStore};
use crate::vms::fence;

impl ManagedVm {
    pub(super) async fn carry_out(self: &Arc<Self>, state: &mut State, effects: Vec<Effect>) -> Result<(), VmError> {
        for effect in effects {
            match effect {
                Effect::Resume => {
                    let permission = self.permission(state)?;
                    self.resume(state, permission).await?;
                }
                Effect::Boot => {
                    let permission = self.permission(state)?;
                    self.boot(state, permission).await?;
                }
                Effect::Pause => {
                    if let Some(qemu) = &state.qemu {
                        qemu.stop().await?;
                    }
                }
                Effect::KillGuest | Effect::DropImage => self.end_qemu(state).await?,
                // The destination of the move does that: it needs the definition that comes with the move.
                Effect::LoadImage(_) => {}
                Effect::Arm => {
                    if let (Some(qemu), Some(deadline)) = (&state.qemu, state.fence.deadline(BootTime::now())) {
                        qemu.arm(deadline)?;
                    }
                }
                Effect::Disarm => {
                    if let Some(qemu) = &state.qemu {
                        qemu.disarm()?;
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) async fn resume(&self, state: &mut State, permission: MayRun) -> Result<(), VmError> {
        let qemu = state.qemu.clone().ok_or(VmError::NotHere { vm: self.id })?;
        // From now on the hypervisor changes the disks.
        self.surrender_disks(Surrender::AsTheyAre).await?;
        if let Some(until_ms) = permission.deadline_ms() {
            qemu.arm(fence::deadline(until_ms))?;
        }
        qemu.cont().await?;
        tracing::info!(vm_id = %self.id, epoch = %permission.own(), "guest resumed");
        self.commit(state, Event::Resumed).map(drop)
    }

    pub(super) async fn boot(self: &Arc<Self>, state: &mut State, permission: MayRun) -> Result<(), VmError> {
        self.modify(|status| status.state = VmState::Starting);
        self.surrender_disks(Surrender::NewestPoint).await?;
        let Some(until_ms) = permission.deadline_ms() else {
            self.launch(state, StartMode::Running, None).await?;
            tracing::info!(vm_id = %self.id, epoch = %permission.own(), "guest booted");
            return self.commit(state, Event::Resumed).map(drop);
        };
        // Starting takes time: the guest waits until the lease has been looked at once more.
        self.launch(state, StartMode::Paused, Some(fence::deadline(until_ms))).await?;
        let resumed = match self.permission(state) {
            Ok(permission) => self.resume(state, permission).await,
            Err(error) => Err(error),
        };
        if resumed.is_err() {
            self.end_qemu(state).await?;
        }
        resumed
    }

    pub(super) async fn launch(
        self: &Arc<Self>,
        state: &mut State,
        mode: StartMode,
        deadline: Option<BootTime>,
    ) -> Result<Vm, VmError> {
        let mut spec = state.spec.clone().ok_or(VmError::Undefined { vm: self.id })?;
        let images = self.images(&spec, mode, state.durable.record())?;
        let images = if mode == StartMode::Incoming { images } else { self.grow_on_devices(&spec, images) };
        // A disk that was added and cannot be made keeps nothing from running; it is plugged in when it can.
        spec.disks.retain(|disk| images.contains_key(&disk.name));
        let grow = if mode == StartMode::Incoming { vec![] } else { too_small(&spec, &images)? };
        // The guest is to see its disks as they are to be from the beginning.
        let begin = if grow.is_empty() { mode } else { StartMode::Paused };
        let launch = Launch { vm: self.id, spec, images, mode: begin, deadline };
        let qemu = Vm::start(&self.shared.hypervisor, &launch).await?;
        self.install(state, qemu.clone());
        if let Err(error) = self.grow_disks(&qemu, &grow, mode).await {
            self.end_qemu(state).await?;
            return Err(error);
        }
        Ok(qemu)
    }

    /// Disks on block devices grow while no hypervisor has them. One whose device is too small keeps the vm from nothing.
    fn grow_on_devices(&self, spec: &VmSpec, mut images: BTreeMap<String, Image>) -> BTreeMap<String, Image> {
        for DiskSpec { name, size_bytes, .. } in &spec.disks {
            let small = |image: &Image| image.device_bytes().is_some_and(|held_bytes| held_bytes < *size_bytes);
            let Some(image) = images.get_mut(name).filter(|image| small(image)) else { continue };
            let grown = tokio::task::block_in_place(|| self.shared.replicas.grow_on_device(self.id, name, *size_bytes));
            match grown {
                Ok(()) => *image = Image::device(image.path(), *size_bytes),
                Err(error) => {
                    let problem = crate::error::with_causes(&error);
                    tracing::warn!(vm_id = %self.id, disk = name, problem, "the vm starts with a disk that is too small");
                }
            }
        }
        images
    }

    /// Makes disks of a hypervisor that waits larger, and lets it run if it is to.
    async fn grow_disks(&self, qemu: &Vm, grow: &[(String, u64)], mode: StartMode) -> Result<(), VmError> {
        for (disk, size_bytes) in grow {
            qemu.grow_disk(disk, *size_bytes).await?;
        }
        if !grow.is_empty() && mode == StartMode::Running {
            qemu.cont().await?;
        }
        Ok(())
    }

    pub(super) fn images(
        &self,
        spec: &VmSpec,
        mode: StartMode,
        record: Record,
    ) -> Result<BTreeMap<String, Image>, VmError> {
        // Once it was moved or taken over, its disk is where this worker noted it, and the definition's path may be another's.
        let as_defined = record.owned() == Some(Epoch::ZERO.next());
        let locate = |disk: &DiskSpec| {
            let location = match mode {
                // A destination has its replicas; the definition's path is another host's.
                StartMode::Incoming => {
                    let found = self.shared.replicas.locate(self.id, &disk.name)?;
                    found.ok_or_else(|| ReplicaError::Missing { vm: self.id, disk: disk.name.clone() })?
                }
                StartMode::Running | StartMode::Paused if disk.create => match self.make_image(disk) {
                    Ok(location) => location,
                    Err(error) => {
                        let problem = crate::error::with_causes(&error);
                        tracing::warn!(vm_id = %self.id, disk = disk.name, problem, "the vm starts without a disk");
                        return Ok(None);
                    }
                },
                StartMode::Running | StartMode::Paused if as_defined && !disk.path.is_empty() => {
                    let (given, format) = (disk.path.as_ref(), Format::parse(&disk.format));
                    self.shared.replicas.locate_or_adopt(self.id, &disk.name, given, format)?
                }
                StartMode::Running | StartMode::Paused => {
                    let found = self.shared.replicas.locate(self.id, &disk.name)?;
                    found.ok_or_else(|| VmError::DiskForgotten { vm: self.id, disk: disk.name.clone() })?
                }
            };
            Ok(Some((disk.name.clone(), self.shared.replicas.image(self.id, &location)?)))
        };
        tokio::task::block_in_place(|| {
            if mode == StartMode::Incoming {
                self.shared.replicas.must_be_flat(self.id)?;
            }
            spec.disks.iter().filter_map(|disk| locate(disk).transpose()).collect()
        })
    }

    /// The image of a disk that was added, made if it is not there: at its path, which is one of this host, or, if it has none, below the data folder.
    ///
    /// # Errors
    /// Something is in the way, or the system's.
    pub fn make_image(&self, disk: &DiskSpec) -> Result<DiskLocation, ReplicaError> {
        let given = (!disk.path.is_empty()).then(|| Path::new(&disk.path));
        self.shared.replicas.make_image(self.id, &disk.name, given, disk.size_bytes)
    }

    pub(super) fn install(self: &Arc<Self>, state: &mut State, qemu: Vm) {
        state.qemu = Some(qemu.clone());
        state.asked_to_end = None;
        state.console = None;
        let vm = Arc::downgrade(self);
        tokio::spawn(async move {
            let report = exit_report(&qemu).await;
            if let (Some(vm), Some(report)) = (vm.upgrade(), report) {
                vm.qemu_ended(&qemu, &report).await;
            }
        });
    }

    pub(super) async fn qemu_ended(self: &Arc<Self>, ended: &Vm, report: &hypervisor::ExitReport) {
        let mut state = self.state.lock().await;
        if state.qemu.as_ref().is_none_or(|qemu| qemu.pid() != ended.pid()) {
            return;
        }
        let fenced = report.cause == ExitCause::LeaseExpired;
        // Who ended as told boots again when the next order says so, and who was fenced when there is a lease.
        let unasked = state.durable.record().owned().is_some() && state.asked_to_end.is_none() && !fenced;
        state.qemu = None;
        state.console = None;
        if let Err(error) = self.commit(&mut state, Event::QemuGone) {
            tracing::error!(vm_id = %self.id, %error, "the end of the hypervisor could not be recorded");
        }
        self.settle_disks(&state);
        self.publish(&state);
        if fenced {
            self.set_problem("its lease ran out, so it was ended; it boots again under the next lease".to_owned());
        }
        if unasked {
            self.modify(|status| {
                status.halted_under = Some(self.power_seq.load(Ordering::SeqCst));
                if !report.expected() {
                    status.state = VmState::Crashed;
                    status.problem =
                        format!("the hypervisor ended unexpectedly ({}): {}", report.status, report.log_tail);
                }
            });
        }
    }

    pub(super) async fn end_qemu(&self, state: &mut State) -> Result<(), VmError> {
        if let Some(qemu) = state.qemu.take() {
            qemu.kill().await?;
            state.console = None;
            self.commit(state, Event::QemuGone)?;
            self.settle_disks(state);
        }
        Ok(())
    }

    /// A hypervisor is about to change the disks.
    async fn surrender_disks(&self, surrender: Surrender) -> Result<(), VmError> {
        let Shared { groups, replicas, flattenings, .. } = &*self.shared;
        flattenings.end(self.id).await;
        tokio::task::block_in_place(|| {
            replicas.forget_flattening(self.id)?;
            groups.surrender(replicas, self.id, surrender)?;
            Ok::<_, VmError>(())
        })?;
        replicas.close(self.id);
        Ok(())
    }

    /// Without a hypervisor, what a move has written into a replica that is none's disk is undone.
    pub(super) fn settle_disks(&self, state: &State) {
        self.settle_with(state, Groups::settle);
    }

    /// The same for what an earlier worker left.
    pub(super) fn settle_found_disks(&self, state: &State) {
        self.settle_with(state, Groups::settle_leftovers);
    }

    fn settle_with(&self, state: &State, settle: fn(&Groups, &ReplicaStore, VmId) -> Result<(), GroupsError>) {
        if state.qemu.is_some() || state.durable.record().owned().is_some() {
            return;
        }
        let Shared { groups, replicas, .. } = &*self.shared;
        if let Err(error) = tokio::task::block_in_place(|| settle(groups, replicas, self.id)) {
            tracing::error!(vm_id = %self.id, error = %crate::error::with_causes(&error), "the replica is not at its newest point");
        }
    }
}

/// Disks that are smaller than was ordered, with what was.
fn too_small(spec: &VmSpec, images: &BTreeMap<String, Image>) -> Result<Vec<(String, u64)>, VmError> {
    let mut grow = vec![];
    for disk in spec.disks.iter().filter(|disk| disk.size_bytes > 0) {
        let Some(image) = images.get(&disk.name).filter(|image| image.device_bytes().is_none()) else { continue };
        let failed = |source| ReplicaError::Open { path: image.path().to_owned(), source };
        if image.size_bytes().map_err(failed)? < disk.size_bytes {
            grow.push((disk.name.clone(), disk.size_bytes));
        }
    }
    Ok(grow)
}

/// Waits for the end of a hypervisor, as long as it takes.
async fn exit_report(qemu: &Vm) -> Option<hypervisor::ExitReport> {
    const A_DAY: Duration = Duration::from_secs(24 * 3600);
    loop {
        match qemu.wait_exit(A_DAY).await {
            Ok(report) => return Some(report),
            Err(HypervisorError::Deadline { .. }) => {}
            Err(_) => return None,
        }
    }
}
