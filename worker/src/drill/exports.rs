//! All recovery points that this worker has open, and those that ended lately.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageport_proto::VmId;
use pageport_proto::v1::{ExportedDisk, PointExport, PointExportState};
use tokio::sync::{Notify, mpsc, oneshot};

use super::DrillError;
use super::export::{Export, Grounds, Told};
use super::order::Order;
use super::record::Record;
use crate::clock::unix_ms_now;
use crate::error::with_causes;
use crate::replica::points::{LeaseEnd, PointInfo};

/// Ended exports that are remembered, the newest of all VMs.
const MAX_ENDED: usize = 64;
const ORDERS: usize = 4;

/// What this host has to do with a VM's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// They are a replica.
    Replica,
    /// It may run the VM, or a hypervisor of it has them.
    Owned,
}

/// All of them. Cheap to clone; clones are the same.
#[derive(Debug, Clone)]
pub struct Exports {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    grounds: Arc<Grounds>,
    all: Mutex<BTreeMap<(VmId, u64), Entry>>,
    /// One is opened at a time.
    turn: tokio::sync::Mutex<()>,
    /// Notified when a report would differ.
    changed: Arc<Notify>,
}

/// What is told of an export.
#[derive(Debug)]
struct Entry {
    record: Record,
    point: Option<PointInfo>,
    disks: Vec<ExportedDisk>,
    state: State,
}

#[derive(Debug)]
enum State {
    Open(mpsc::Sender<Told>),
    Ended { at_unix_ms: i64, reason: String },
}

impl Exports {
    /// None yet: see [`Self::left_open`].
    pub fn new(grounds: Grounds, changed: Arc<Notify>) -> Self {
        let inner =
            Inner { grounds: Arc::new(grounds), all: Mutex::default(), turn: tokio::sync::Mutex::default(), changed };
        Self { inner: Arc::new(inner) }
    }

    /// Opens a point. One that is open already stays so and ends when this order says.
    ///
    /// # Errors
    /// [`DrillError`]; nothing has changed then.
    pub async fn open(&self, order: Order) -> Result<PointExport, DrillError> {
        let _turn = self.inner.turn.lock().await;
        let Order { vm, name, point, lasts, listen } = order;
        let now = unix_ms_now();
        let until_unix_ms = now.saturating_add(lasts.as_millis() as i64);
        match self.running(vm, point) {
            Some((orders, record)) => {
                if listen.is_some() && listen != record.listen {
                    let listens = record.listen.map_or("its socket only".to_owned(), |address| address.to_string());
                    return Err(DrillError::Listens { point, listens });
                }
                self.renew(vm, point, &orders, until_unix_ms).await?;
            }
            None => self.start(Record { vm, point, name, opened_unix_ms: now, until_unix_ms, listen }).await?,
        }
        let opened = self.reports_of(vm).into_iter().find(|export| export.number == point);
        opened.ok_or(DrillError::NotOpen { point })
    }

    /// Ends an export; when this returns nobody reads it any more, and nothing is held.
    ///
    /// # Errors
    /// [`DrillError::NotOpen`].
    pub async fn close(&self, vm: VmId, point: u64) -> Result<(), DrillError> {
        let (orders, _) = self.running(vm, point).ok_or(DrillError::NotOpen { point })?;
        let (done, ended) = oneshot::channel();
        // One that ends by itself meanwhile is what was asked for.
        if orders.send(Told::Close(done)).await.is_ok() {
            let _ = ended.await;
        }
        Ok(())
    }

    /// What an earlier worker had open. Its sockets are removed. To be called once, before anything is opened.
    ///
    /// # Errors
    /// The worker's store failed.
    pub fn left_open(&self) -> Result<Vec<Record>, DrillError> {
        remove_sockets(&self.inner.grounds.folder);
        Record::all(&self.inner.grounds.store)
    }

    /// Opens again what an earlier worker had open, with the time that it has left; or says why not.
    ///
    /// # Errors
    /// The worker's store failed.
    pub async fn reopen(&self, record: Record, standing: Standing) -> Result<(), DrillError> {
        let _turn = self.inner.turn.lock().await;
        let reason = match standing {
            Standing::Owned => LeaseEnd::Runs.to_string(),
            Standing::Replica if record.until_unix_ms <= unix_ms_now() => {
                "its time was over while the worker was away".to_owned()
            }
            Standing::Replica => match self.start(record.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => format!("not opened again after a restart of the worker: {}", with_causes(&error)),
            },
        };
        tracing::warn!(vm_id = %record.vm, point = record.point, reason, "a recovery point is open no longer");
        tokio::task::block_in_place(|| record.remove(&self.inner.grounds.store))?;
        self.ended(record, None, vec![], reason);
        Ok(())
    }

    /// Releases what is held of a VM's replica for no export that is open. The VM's disks must be a replica here.
    pub async fn release_orphans(&self, vm: VmId) {
        let _turn = self.inner.turn.lock().await;
        let grounds = &self.inner.grounds;
        let held = grounds.groups.held(vm).into_iter().map(|held| held.point.number);
        let orphans: Vec<u64> = held.filter(|point| self.running(vm, *point).is_none()).collect();
        if orphans.is_empty() {
            return;
        }
        let released = tokio::task::block_in_place(|| -> Result<(), DrillError> {
            let open = grounds.groups.open_existing(&grounds.replicas, vm)?;
            Ok(orphans.iter().try_for_each(|point| open.group().release(*point))?)
        });
        if let Err(error) = released {
            tracing::warn!(vm_id = %vm, error = %with_causes(&error), "a recovery point is held for nobody until its time is over");
        }
    }

    /// What is open, and what ended lately.
    pub fn reports(&self) -> Vec<PointExport> {
        self.lock().iter().map(|((vm, _), entry)| self.report(*vm, entry)).collect()
    }

    fn reports_of(&self, vm: VmId) -> Vec<PointExport> {
        self.lock().range((vm, 0)..=(vm, u64::MAX)).map(|(_, entry)| self.report(vm, entry)).collect()
    }

    fn running(&self, vm: VmId, point: u64) -> Option<(mpsc::Sender<Told>, Record)> {
        let all = self.lock();
        let entry = all.get(&(vm, point))?;
        match &entry.state {
            State::Open(orders) => Some((orders.clone(), entry.record.clone())),
            State::Ended { .. } => None,
        }
    }

    async fn start(&self, record: Record) -> Result<(), DrillError> {
        let export = Export::start(self.inner.grounds.clone(), record).await?;
        let (orders, inbox) = mpsc::channel(ORDERS);
        let record = export.record().clone();
        let (point, disks) = (Some(export.point()), export.disks().to_vec());
        let key = (record.vm, record.point);
        self.lock()
            .insert(key, Entry { record: record.clone(), point, disks: disks.clone(), state: State::Open(orders) });
        self.inner.changed.notify_one();
        let exports = self.clone();
        tokio::spawn(async move {
            let (reason, asked) = export.run(inbox).await;
            exports.ended(record, point, disks, reason);
            // Who asked finds it ended.
            drop(asked);
        });
        Ok(())
    }

    async fn renew(
        &self,
        vm: VmId,
        point: u64,
        orders: &mpsc::Sender<Told>,
        until_unix_ms: i64,
    ) -> Result<(), DrillError> {
        let (answer, renewed) = oneshot::channel();
        let told = orders.send(Told::Until(until_unix_ms, answer)).await.is_ok();
        let ended = || DrillError::Ended { point, reason: "it has just ended; open it again".to_owned() };
        match if told { renewed.await.ok() } else { None } {
            Some(renewed) => renewed?,
            None => return Err(ended()),
        }
        if let Some(entry) = self.lock().get_mut(&(vm, point)) {
            entry.record.until_unix_ms = until_unix_ms;
        }
        self.inner.changed.notify_one();
        Ok(())
    }

    fn ended(&self, record: Record, point: Option<PointInfo>, disks: Vec<ExportedDisk>, reason: String) {
        let state = State::Ended { at_unix_ms: unix_ms_now(), reason };
        let mut all = self.lock();
        all.insert((record.vm, record.point), Entry { record, point, disks, state });
        forget_oldest(&mut all);
        drop(all);
        self.inner.changed.notify_one();
    }

    fn report(&self, vm: VmId, entry: &Entry) -> PointExport {
        let Record { point, opened_unix_ms, until_unix_ms, .. } = entry.record;
        let export = PointExport {
            vm_id: vm.to_string(),
            number: point,
            taken_unix_ms: entry.point.map_or(0, |point| point.taken_unix_ms),
            opened_unix_ms,
            ..PointExport::default()
        };
        match &entry.state {
            State::Open(_) => {
                let held = self.inner.grounds.groups.held(vm);
                let held = held.iter().find(|held| held.point.number == point);
                PointExport {
                    state: PointExportState::Open.into(),
                    ends_unix_ms: until_unix_ms,
                    disks: entry.disks.clone(),
                    held_bytes: held.map_or(0, |held| held.bytes),
                    ..export
                }
            }
            State::Ended { at_unix_ms, reason } => PointExport {
                state: PointExportState::Ended.into(),
                ends_unix_ms: *at_unix_ms,
                reason: reason.clone(),
                ..export
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(VmId, u64), Entry>> {
        self.inner.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of those that have ended only the newest are remembered.
fn forget_oldest(all: &mut BTreeMap<(VmId, u64), Entry>) {
    let ended = |(key, entry): (&(VmId, u64), &Entry)| match entry.state {
        State::Ended { at_unix_ms, .. } => Some((at_unix_ms, *key)),
        State::Open(_) => None,
    };
    let mut ended: Vec<_> = all.iter().filter_map(ended).collect();
    ended.sort_unstable();
    for (_, key) in ended.iter().rev().skip(MAX_ENDED) {
        all.remove(key);
    }
}

/// Nobody listens at what an earlier worker has left.
fn remove_sockets(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::warn!(socket = %entry.path().display(), %error, "a socket is left behind");
        }
    }
}
