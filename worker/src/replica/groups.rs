//! The recovery points of all replicas of this host: who may change them, and what becomes of them when a hypervisor takes the disks.
//!
//! | moment | the points |
//! |---|---|
//! | a replication session begins | opened: what a crash left is finished or undone |
//! | a VM is to boot from its replica | finished, a layer undone: the disk is the newest point; then forgotten |
//! | a VM that was moved here is to run | forgotten, a layer kept: the disk is what the move has brought |
//! | the image of a move is dropped | the layer is undone |
//! | the VM was moved away | its disks, as they are, become the first point of a new lineage |

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_proto::v1::RecoveryPoint;

use super::points::{Change, Group, Layer, Limits, Lineage, PointError, PointInfo};
use super::store::{ReplicaDisk, ReplicaError, ReplicaStore};

/// How a hypervisor takes the disks over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surrender {
    /// As they are at the newest recovery point.
    NewestPoint,
    /// As a move has left them.
    AsTheyAre,
}

/// Why the points cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GroupsError {
    /// The disks.
    #[error(transparent)]
    Disk(#[from] ReplicaError),
    /// The points.
    #[error(transparent)]
    Points(#[from] PointError),
}

/// The points of one VM's replica, open.
#[derive(Debug)]
pub struct Points {
    group: Group,
    disks: Vec<(String, Arc<ReplicaDisk>)>,
    /// What a migration has written outlives its session: until a hypervisor runs on it, or nobody needs it.
    layer: Mutex<Option<Layer>>,
}

impl Points {
    /// Its points.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Begins what can be undone.
    ///
    /// # Errors
    /// [`PointError`].
    pub fn open_layer(&self) -> Result<(), PointError> {
        *self.layer() = Some(self.group.open_layer()?);
        Ok(())
    }

    /// Changes the disks in place, so that it can be undone.
    ///
    /// # Errors
    /// [`PointError`]; also when there is no layer.
    pub fn change(&self, changes: &[Change<'_>]) -> Result<(), PointError> {
        match &*self.layer() {
            Some(layer) => layer.change(changes),
            None => Err(PointError::Hostile { what: "a change of a layer that was not begun" }),
        }
    }

    /// Brings the disks back to the newest point, if a layer is open.
    ///
    /// # Errors
    /// [`PointError`].
    pub fn undo_layer(&self) -> Result<(), PointError> {
        *self.layer() = None;
        self.group.undo_layer()
    }

    fn is_over(&self, disks: &[(String, Arc<ReplicaDisk>)]) -> bool {
        let mut pairs = self.disks.iter().zip(disks);
        self.disks.len() == disks.len() && pairs.all(|(one, other)| one.0 == other.0 && Arc::ptr_eq(&one.1, &other.1))
    }

    fn layer(&self) -> std::sync::MutexGuard<'_, Option<Layer>> {
        self.layer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of them.
#[derive(Debug)]
pub struct Groups {
    store: Arc<Store>,
    folder: PathBuf,
    limits: Limits,
    open: Mutex<HashMap<VmId, Arc<Points>>>,
    turns: Mutex<HashMap<VmId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Groups {
    /// Those whose files lie below `data_dir`.
    pub fn new(store: Arc<Store>, data_dir: &Path, limits: Limits) -> Self {
        let folder = data_dir.join("replicas");
        Self { store, folder, limits, open: Mutex::default(), turns: Mutex::default() }
    }

    /// One session of a VM at a time.
    pub fn turn(&self, vm: VmId) -> Arc<tokio::sync::Mutex<()>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).entry(vm).or_default().clone()
    }

    /// Opens a VM's points over these disks; what a crash has left is finished or undone.
    ///
    /// # Errors
    /// The files or the record cannot be read or written.
    pub fn open(&self, vm: VmId, mut disks: Vec<(String, Arc<ReplicaDisk>)>) -> Result<Arc<Points>, PointError> {
        disks.sort_by(|(one, _), (other, _)| one.cmp(other));
        if let Some(points) = self.lock().get(&vm).filter(|points| points.is_over(&disks)) {
            return Ok(points.clone());
        }
        // Not under the lock: a journal may be put in place meanwhile, and reports ask for points.
        let folder = self.folder.join(vm.to_string());
        let by_name = disks.iter().cloned().collect();
        let group = Group::open(self.store.clone(), &folder, vm, by_name, self.limits)?;
        let points = Arc::new(Points { group, disks, layer: Mutex::default() });
        self.lock().insert(vm, points.clone());
        Ok(points)
    }

    /// What a VM's replica can be brought back to, oldest first.
    pub fn points(&self, vm: VmId) -> Vec<RecoveryPoint> {
        let open = self.lock().get(&vm).map(|points| points.group.state());
        let state = open.or_else(|| Group::recorded(&self.store, vm).ok().flatten()).unwrap_or_default();
        state.points.iter().map(RecoveryPoint::from).collect()
    }

    /// The disks as they are become the one point of a new lineage.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn adopt(
        &self,
        replicas: &ReplicaStore,
        vm: VmId,
        names: &[&str],
        lineage: u64,
        taken_unix_ms: i64,
    ) -> Result<(), GroupsError> {
        let disks = names.iter().map(|name| Ok(((*name).to_owned(), replicas.open_existing(vm, name)?)));
        let points = self.open(vm, disks.collect::<Result<_, ReplicaError>>()?)?;
        let point = PointInfo { number: 1, taken_unix_ms, changed_bytes: 0, quiesced: false };
        Ok(points.group.adopt(Lineage::from_u64(lineage).unwrap_or_else(Lineage::generate), point)?)
    }

    /// A hypervisor is about to change the disks.
    ///
    /// # Errors
    /// As [`Self::open`]: the disks are not what they should be, and must not be used.
    pub fn surrender(&self, replicas: &ReplicaStore, vm: VmId, surrender: Surrender) -> Result<(), GroupsError> {
        if !self.has_points(vm)? {
            return Ok(());
        }
        if surrender == Surrender::NewestPoint {
            self.recover(replicas, vm)?;
        }
        self.forget(vm)
    }

    /// Nobody needs what a move has written: unless a session is under way, which will say so at its end, the replica is brought back to
    /// its newest point.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn settle(&self, replicas: &ReplicaStore, vm: VmId) -> Result<(), GroupsError> {
        let turn = self.turn(vm);
        let Ok(_turn) = turn.try_lock() else { return Ok(()) };
        if self.has_points(vm)? { self.recover(replicas, vm) } else { Ok(()) }
    }

    /// Finishes what is committed and undoes what is not.
    fn recover(&self, replicas: &ReplicaStore, vm: VmId) -> Result<(), GroupsError> {
        let names = replicas.names(vm)?;
        let disks = names.iter().map(|name| Ok((name.clone(), replicas.open_existing(vm, name)?)));
        let points = self.open(vm, disks.collect::<Result<_, ReplicaError>>()?)?;
        points.undo_layer()?;
        Ok(points.group.apply()?)
    }

    /// Forgets a VM's points; its disks stay as they are.
    ///
    /// # Errors
    /// The record or the files cannot be removed.
    pub fn forget(&self, vm: VmId) -> Result<(), GroupsError> {
        self.lock().remove(&vm);
        Ok(Group::forget_closed(&self.store, &self.folder.join(vm.to_string()), vm)?)
    }

    fn has_points(&self, vm: VmId) -> Result<bool, PointError> {
        Ok(Group::recorded(&self.store, vm)?.is_some())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Arc<Points>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<&PointInfo> for RecoveryPoint {
    fn from(point: &PointInfo) -> Self {
        Self {
            number: point.number,
            taken_unix_ms: point.taken_unix_ms,
            changed_bytes: point.changed_bytes,
            quiesced: point.quiesced,
        }
    }
}
