//! The recovery points of all replicas of this host: who may change them, and what becomes of them when a hypervisor takes the disks.
//!
//! | moment | the points |
//! |---|---|
//! | a replication session begins | opened: what a crash left is finished or undone |
//! | a VM is to boot from its replica | finished, a layer undone: the disk is the newest point; then forgotten |
//! | a VM that was moved here is to run | forgotten, a layer kept: the disk is what the move has brought |
//! | the image of a move is dropped | the layer is undone |
//! | a worker starts, and no hypervisor holds the image of a move | the same |
//! | the VM was moved away | its disks, as they are, become the first point of a new lineage |
//!
//! Guarantees: a session that is still under way when its points are forgotten changes neither the disks nor the record any more. Of one VM
//! there is never more than one open group.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pageport_common::store::Store;
use pageport_proto::VmId;
use pageport_proto::v1::RecoveryPoint;

use super::points::{Change, Group, GroupState, HeldPoint, Layer, LeaseEnd, Limits, Lineage, PointError, PointInfo};
use super::store::{ReplicaDisk, ReplicaError, ReplicaStore};
use crate::pool::{PoolError, Pools};
use crate::quota::Share;

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
    /// Where they lie.
    #[error(transparent)]
    Pool(#[from] PoolError),
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

    /// Names of its disks.
    pub fn disks(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|(name, _)| name.as_str())
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
    pools: Arc<Pools>,
    limits: Limits,
    open: Mutex<HashMap<VmId, Arc<Points>>>,
    turns: Mutex<HashMap<VmId, Arc<tokio::sync::Mutex<()>>>>,
    /// Held while a VM's points are opened or forgotten: either may save the record.
    gates: Mutex<HashMap<VmId, Arc<Mutex<()>>>>,
}

impl Groups {
    /// Those whose files lie below `data_dir`, where there may be as many as these limits let each VM have.
    pub fn new(store: Arc<Store>, data_dir: &Path, limits: Limits) -> Self {
        let pools = Pools::only(store.clone(), data_dir, limits.reserve_bytes);
        Self::over(store, Arc::new(pools), limits)
    }

    /// Those whose files lie in these pools. Each VM has these limits, but each pool says what is to be left free.
    pub fn over(store: Arc<Store>, pools: Arc<Pools>, limits: Limits) -> Self {
        Self { store, pools, limits, open: Mutex::default(), turns: Mutex::default(), gates: Mutex::default() }
    }

    /// One session of a VM at a time.
    pub fn turn(&self, vm: VmId) -> Arc<tokio::sync::Mutex<()>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).entry(vm).or_default().clone()
    }

    /// Opens a VM's points over these disks; what a crash has left is finished or undone.
    ///
    /// # Errors
    /// The files or the record cannot be read or written, or the pool is not there.
    pub fn open(&self, vm: VmId, mut disks: Vec<(String, Arc<ReplicaDisk>)>) -> Result<Arc<Points>, GroupsError> {
        disks.sort_by(|(one, _), (other, _)| one.cmp(other));
        let gate = self.gate(vm);
        let _gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.lock().get(&vm).cloned();
        if let Some(points) = known {
            if points.is_over(&disks) && !points.group.is_spent() {
                return Ok(points);
            }
            // A session may have it yet, and two groups must not have the same files.
            points.group.close(&LeaseEnd::Reopened);
        }
        // Not under the lock: a journal may be put in place meanwhile, and reports ask for points.
        let pool = self.pools.ready(vm)?;
        let by_name = disks.iter().cloned().collect();
        let limits = Limits { reserve_bytes: pool.limits().reserve_bytes, ..self.limits };
        let share = Share::new(pool.points_quota().clone(), vm);
        let group = Group::open_within(self.store.clone(), &pool.replica(vm), vm, by_name, limits, share)?;
        let points = Arc::new(Points { group, disks, layer: Mutex::default() });
        self.lock().insert(vm, points.clone());
        Ok(points)
    }

    /// What a VM's replica can be brought back to, oldest first.
    pub fn points(&self, vm: VmId) -> Vec<RecoveryPoint> {
        self.state(vm).points.iter().map(RecoveryPoint::from).collect()
    }

    /// What of a VM's replica is held for who reads it.
    pub fn held(&self, vm: VmId) -> Vec<HeldPoint> {
        self.state(vm).held
    }

    fn state(&self, vm: VmId) -> GroupState {
        let open = self.lock().get(&vm).map(|points| points.group.state());
        open.or_else(|| Group::recorded(&self.store, vm).ok().flatten()).unwrap_or_default()
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
        let disks = names.len() as u16;
        let point = PointInfo { number: 1, taken_unix_ms, changed_bytes: 0, quiesced: false, disks };
        Ok(points.group.adopt(Lineage::from_u64(lineage).unwrap_or_else(Lineage::generate), point)?)
    }

    /// A hypervisor is about to change the disks.
    ///
    /// # Errors
    /// As [`Self::open`]: the disks are not what they should be, and must not be used.
    pub fn surrender(&self, replicas: &ReplicaStore, vm: VmId, surrender: Surrender) -> Result<(), GroupsError> {
        let has_points = self.has_points(vm)?;
        if has_points && surrender == Surrender::NewestPoint {
            self.recover(replicas, vm)?;
        }
        // Without points too, a session may be about to make the first.
        let is_open = self.lock().contains_key(&vm);
        if has_points || is_open { self.forget(vm, &LeaseEnd::Runs) } else { Ok(()) }
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

    /// What a move had written when an earlier worker ended, is of no use any more: see [`Self::settle`].
    ///
    /// # Errors
    /// As there.
    pub fn settle_leftovers(&self, replicas: &ReplicaStore, vm: VmId) -> Result<(), GroupsError> {
        if Group::has_layer(&self.pools.of(vm)?.replica(vm)) { self.settle(replicas, vm) } else { Ok(()) }
    }

    /// Opens a VM's points over the disks that are here. The VM must not be this host's, and no hypervisor may hold them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_existing(&self, replicas: &ReplicaStore, vm: VmId) -> Result<Arc<Points>, GroupsError> {
        let names = replicas.names(vm)?;
        let disks = names.iter().map(|name| Ok((name.clone(), replicas.open_existing(vm, name)?)));
        self.open(vm, disks.collect::<Result<_, ReplicaError>>()?)
    }

    /// Finishes what is committed and undoes what is not.
    fn recover(&self, replicas: &ReplicaStore, vm: VmId) -> Result<(), GroupsError> {
        let points = self.open_existing(replicas, vm)?;
        points.undo_layer()?;
        Ok(points.group.apply()?)
    }

    /// Forgets a VM's points; its disks stay as they are. A session that has them open goes on with nothing; who reads one is told why.
    ///
    /// # Errors
    /// The record or the files cannot be removed, or the pool is not there.
    pub fn forget(&self, vm: VmId, why: &LeaseEnd) -> Result<(), GroupsError> {
        let pool = self.pools.leaving(vm)?;
        let gate = self.gate(vm);
        let _gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.lock().remove(&vm);
        if let Some(points) = known {
            points.group.close(why);
        }
        let folder = pool.as_ref().map(|pool| pool.replica(vm));
        Group::forget_closed(&self.store, folder.as_deref(), vm)?;
        if let Some(pool) = pool {
            pool.points_quota().forget(&vm);
        }
        Ok(())
    }

    fn gate(&self, vm: VmId) -> Arc<Mutex<()>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).entry(vm).or_default().clone()
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
            disks: point.disks.into(),
        }
    }
}

#[cfg(test)]
mod tests;
