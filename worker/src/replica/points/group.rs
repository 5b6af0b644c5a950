//! All points of one VM at this site.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use pageport_common::store::{Batch, Store};
use pageport_proto::VmId;
use tokio::sync::watch;

use super::error::PointError;
use super::format::{FileId, LAYER_FILE};
use super::journal::OpenJournal;
use super::layer::{LayerView, OpenLayer};
use super::lease::LeaseEnd;
use super::medium::{Cell, Disk, Folder, HostFolder, StoreCell};
use super::reader::ReaderIndex;
use super::record::{Phase, Record};
use super::{FOLDER, GroupState, Limits, Lineage, PointInfo, record_key};
use crate::quota::Share;
use crate::replica::store::ReplicaDisk;

/// What a group touches outside itself.
#[derive(Debug)]
pub(super) struct Medium {
    pub(super) folder: Box<dyn Folder>,
    pub(super) cell: Box<dyn Cell>,
    /// The place is the disk's number in files: as the record says, then those that are new, in the order of their names.
    pub(super) disks: Vec<(String, Arc<dyn Disk>)>,
}

impl Medium {
    /// Puts the disks into the order of their numbers.
    fn number_disks(&mut self) -> Result<(), PointError> {
        let record = super::recovery::load(&*self.cell)?;
        let number = |name: &str| record.as_ref().and_then(|record| record.number_of(name)).unwrap_or(usize::MAX);
        self.disks.sort_by(|(one, _), (other, _)| (number(one), one).cmp(&(number(other), other)));
        Ok(())
    }

    /// Names of the disks in the order of their numbers.
    pub(super) fn order(&self) -> Vec<String> {
        self.disks.iter().map(|(name, _)| name.clone()).collect()
    }
}

/// The recovery points of one VM: one point is taken over all its disks. Cheap to clone; clones are the same group.
///
/// One operation runs at a time; [`Self::state`], [`Self::used_bytes`] and open readers do not wait for it.
#[derive(Debug, Clone)]
pub struct Group {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) medium: Medium,
    pub(super) limits: Limits,
    /// In what the points of all VMs may occupy.
    pub(super) share: Share<VmId>,
    core: Mutex<Core>,
    /// Locked for writing while what readers must look at changes. After `core`, never before.
    pub(super) shared: RwLock<Shared>,
    status: RwLock<GroupState>,
    used: AtomicU64,
}

/// What one operation at a time changes.
#[derive(Debug, Default)]
pub(super) struct Core {
    pub(super) record: Option<Record>,
    pub(super) journal: Option<OpenJournal>,
    pub(super) layer: Option<OpenLayer>,
    /// The files and their lengths.
    pub(super) files: BTreeMap<String, u64>,
    unsure: bool,
    closed: bool,
    last_id: u64,
}

/// What readers look at.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) readers: HashMap<u64, ReaderIndex>,
    /// Who is told when the lease of a point ends.
    pub(super) leases: HashMap<u64, watch::Sender<Option<LeaseEnd>>>,
    pub(super) layer: Option<LayerView>,
}

impl Core {
    /// A number that nothing else of this group has.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// The record, if its newest point can be trusted.
    pub(super) fn sound(&self) -> Result<Option<&Record>, PointError> {
        match &self.record {
            Some(Record { damaged: Some(reason), .. }) => Err(PointError::Damaged { reason: reason.clone() }),
            record => Ok(record.as_ref()),
        }
    }

    pub(super) fn phase(&self) -> Option<Phase> {
        self.record.as_ref().map(|record| record.phase)
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.files.values().sum()
    }
}

impl Group {
    /// Opens the points of a VM and recovers: what was committed is put in place, an open layer is undone, and what was not
    /// committed is deleted. `folder` is the VM's folder of replicas.
    ///
    /// A migration's layer that is to stay must have been [kept](super::Layer::keep) before the guest's first instruction:
    /// here it would be undone under a running guest.
    ///
    /// # Errors
    /// The worker's store, a file or a disk failed. Damage is no error: [`GroupState::damaged`] says it. Nor is a lack of
    /// space: then [`GroupState::applying`] stays, and the next operation tries again.
    pub fn open(
        store: Arc<Store>,
        folder: &Path,
        vm: VmId,
        disks: BTreeMap<String, Arc<ReplicaDisk>>,
        limits: Limits,
    ) -> Result<Self, PointError> {
        Self::open_within(store, folder, vm, disks, limits, Share::unlimited(vm))
    }

    /// As [`Self::open`], where the points of all VMs together are bounded, too.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_within(
        store: Arc<Store>,
        folder: &Path,
        vm: VmId,
        disks: BTreeMap<String, Arc<ReplicaDisk>>,
        limits: Limits,
        share: Share<VmId>,
    ) -> Result<Self, PointError> {
        let disks = disks.into_iter().map(|(name, disk)| (name, disk as Arc<dyn Disk>)).collect();
        let folder = Box::new(HostFolder(folder.join(FOLDER)));
        let cell = Box::new(StoreCell { store, key: record_key(vm) });
        Self::over(Medium { folder, cell, disks }, limits, share)
    }

    pub(super) fn over(mut medium: Medium, limits: Limits, share: Share<VmId>) -> Result<Self, PointError> {
        medium.number_disks()?;
        let inner = Arc::new(Inner {
            medium,
            limits,
            share,
            core: Mutex::default(),
            shared: RwLock::default(),
            status: RwLock::default(),
            used: AtomicU64::new(0),
        });
        inner.recover(&mut inner.core())?;
        Ok(Self { inner })
    }

    /// What the worker's store says of a VM's points, whether they are open or not; [`None`]: there are none.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn recorded(store: &Store, vm: VmId) -> Result<Option<GroupState>, PointError> {
        let text = store.get(record_key(vm)).map_err(|source| PointError::Store { what: "read", source })?;
        let record = text.map(|text| serde_json::from_slice::<Record>(&text).map_err(PointError::Record));
        Ok(record.transpose()?.map(|record| record.state()))
    }

    /// Has a move left its layer over the points in this folder of a replica, which are not open?
    pub fn has_layer(folder: &Path) -> bool {
        folder.join(FOLDER).join(LAYER_FILE).exists()
    }

    /// Forgets the points of a VM that are not open, without finishing what is under way: the disks stay as they are. [`None`]: nobody knows where
    /// their files are.
    ///
    /// # Errors
    /// The worker's store failed, or files cannot be deleted.
    pub fn forget_closed(store: &Store, folder: Option<&Path>, vm: VmId) -> Result<(), PointError> {
        let mut batch = Batch::default();
        batch.remove(record_key(vm));
        store.commit(batch).map_err(|source| PointError::Store { what: "write", source })?;
        let Some(folder) = folder else { return Ok(()) };
        match std::fs::remove_dir_all(folder.join(FOLDER)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error("delete", FOLDER)(error)),
            _ => Ok(()),
        }
    }

    /// Ends the group for all who hold it: waits for the operation under way, and refuses every later one. The record and the
    /// files stay as they are, for whoever forgets them or opens them anew. Who holds a point is told why.
    pub fn close(&self, why: &LeaseEnd) {
        let mut core = self.inner.core();
        core.closed = true;
        // Their files may be another group's soon: nothing is tidied up any more.
        core.journal = None;
        core.layer = None;
        self.inner.close_readers(why);
    }

    /// Whether every operation is refused until the group is opened anew. Waits for the operation under way.
    pub fn is_spent(&self) -> bool {
        self.inner.check(&self.inner.core()).is_err()
    }

    /// What the group holds now.
    pub fn state(&self) -> GroupState {
        self.inner.status.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What journals and undo files occupy, in bytes.
    pub fn used_bytes(&self) -> u64 {
        self.inner.used.load(Ordering::Acquire)
    }

    /// Makes the disks as they are the only point, of a lineage of its own. For a first copy that was written in place, and
    /// for turning round after a migration. Ends damage. Readers of earlier points end.
    ///
    /// # Errors
    /// [`PointError::LayerOpen`]; the worker's store, a file or a disk failed.
    pub fn adopt(&self, lineage: Lineage, point: PointInfo) -> Result<(), PointError> {
        let mut core = self.inner.core();
        self.inner.check(&core)?;
        if core.phase() == Some(Phase::Layer) {
            return Err(PointError::LayerOpen);
        }
        self.inner.flush_disks()?;
        let disks = &self.inner.medium.disks;
        let record = Record {
            lineage,
            points: vec![point],
            keep: 1,
            held: vec![],
            disks: disks.iter().map(|(name, disk)| (name.clone(), disk.size_bytes())).collect(),
            order: self.inner.medium.order(),
            phase: Phase::Settled,
            damaged: None,
            lost: None,
        };
        self.inner.close_readers(&LeaseEnd::Replaced);
        self.inner.save(&mut core, Some(record))?;
        core.journal = None;
        self.inner.sweep(&mut core)
    }

    /// Forgets all points. The disks stay as they are: an open layer counts as kept, and a point that is not in place yet is
    /// put in place first.
    ///
    /// # Errors
    /// The worker's store, a file or a disk failed.
    pub fn forget(&self) -> Result<(), PointError> {
        let mut core = self.inner.core();
        self.inner.check(&core)?;
        self.inner.apply(&mut core)?;
        self.inner.forget(&mut core)
    }
}

impl Inner {
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses to go on once closed, or after a write to the worker's store of which nobody knows whether it took effect.
    pub(super) fn check(&self, core: &Core) -> Result<(), PointError> {
        match core {
            Core { closed: true, .. } => Err(PointError::Closed),
            Core { unsure: true, .. } => Err(PointError::Unsure),
            _ => Ok(()),
        }
    }

    /// Makes this the durable record; the commit point of every step.
    pub(super) fn save(&self, core: &mut Core, record: Option<Record>) -> Result<(), PointError> {
        let text = record.as_ref().map(serde_json::to_vec).transpose().map_err(PointError::Record)?;
        if let Err(source) = self.medium.cell.save(text.as_deref()) {
            core.unsure = true;
            return Err(PointError::Store { what: "write", source });
        }
        core.record = record;
        self.show(core);
        Ok(())
    }

    /// Makes the record what [`Group::state`] says.
    pub(super) fn show(&self, core: &Core) {
        let state = core.record.as_ref().map(Record::state).unwrap_or_default();
        let state = GroupState { held: self.held(core), ..state };
        *self.status.write().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Deletes all files that the record does not speak of.
    pub(super) fn sweep(&self, core: &mut Core) -> Result<(), PointError> {
        let mut wanted: BTreeSet<String> = core.record.iter().flat_map(Record::files).map(|id| id.name()).collect();
        wanted.extend(core.journal.as_ref().map(|journal| journal.log.id.name()));
        let gone: Vec<_> = core.files.keys().filter(|name| !wanted.contains(*name)).cloned().collect();
        for name in &gone {
            self.remove_file(core, name)?;
        }
        if gone.is_empty() { Ok(()) } else { self.sync_folder() }
    }

    pub(super) fn remove_file(&self, core: &mut Core, name: &str) -> Result<(), PointError> {
        self.medium.folder.remove(name).map_err(file_error("delete", name))?;
        core.files.remove(name);
        self.count(core);
        Ok(())
    }

    /// Notes the length of a file.
    pub(super) fn note_length(&self, core: &mut Core, id: FileId, length: u64) {
        core.files.insert(id.name(), length);
        self.count(core);
    }

    pub(super) fn count(&self, core: &Core) {
        self.used.store(core.used_bytes(), Ordering::Release);
        self.share.note(core.used_bytes());
    }

    pub(super) fn sync_folder(&self) -> Result<(), PointError> {
        self.medium.folder.sync().map_err(file_error("sync", FOLDER))
    }

    pub(super) fn flush_disks(&self) -> Result<(), PointError> {
        self.medium.disks.iter().try_for_each(|(name, disk)| disk.flush().map_err(disk_error("flush", name)))
    }

    /// The number of a disk.
    pub(super) fn disk_number(&self, name: &str) -> Result<u16, PointError> {
        let number = self.medium.disks.iter().position(|(known, _)| known == name);
        let number = number.and_then(|number| u16::try_from(number).ok());
        number.ok_or_else(|| PointError::NoDisk { disk: name.to_owned() })
    }

    /// Name and file of a disk, by its number.
    pub(super) fn disk(&self, number: u16) -> Option<(&str, &Arc<dyn Disk>)> {
        self.medium.disks.get(usize::from(number)).map(|(name, disk)| (name.as_str(), disk))
    }

    /// Ends all readers and leases.
    pub(super) fn close_readers(&self, why: &LeaseEnd) {
        let mut shared = self.shared_mut();
        shared.readers.clear();
        shared.leases.drain().for_each(|(_, end)| drop(end.send_replace(Some(why.clone()))));
    }

    /// What readers look at, to be changed.
    pub(super) fn shared_mut(&self) -> RwLockWriteGuard<'_, Shared> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, core: &mut Core) -> Result<(), PointError> {
        self.flush_disks()?;
        self.close_readers(&LeaseEnd::Replaced);
        self.save(core, None)?;
        core.journal = None;
        core.layer = None;
        self.shared_mut().layer = None;
        self.sweep(core)
    }
}

/// Says what was being done to which file.
pub(super) fn file_error(what: &'static str, file: &str) -> impl FnOnce(io::Error) -> PointError {
    move |source| PointError::File { what, file: file.to_owned(), source }
}

/// Says what was being done to which disk.
pub(super) fn disk_error(what: &'static str, disk: &str) -> impl FnOnce(io::Error) -> PointError {
    move |source| PointError::Disk { what, disk: disk.to_owned(), source }
}
