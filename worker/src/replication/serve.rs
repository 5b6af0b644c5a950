//! The destination's end of a replication session: says which points there are, and where the changes of the disks' streams go.
//!
//! ```text
//!   hello ─▶ open (recovers) ─▶ points
//!   begin  ─▶ journal, or in place     ┐
//!   layer  ─▶ in place, behind an undo ┴─ changes come on the disks' streams
//!   commit ─▶ digests agree? ─▶ sealed, recorded ─▶ committed ─▶ applied
//!   compare ─▶ blocks of the files, read anew ─▶ the same, or their digests
//!   end    ─▶ a journal is dropped; a layer is undone, unless a hypervisor here waits for the VM
//! ```
//! Guarantees: one session of a VM at a time; `committed` is said only once the point is on stable storage; what a session leaves
//! unfinished is gone before the next begins.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use pageport_ownership::Guest;
use pageport_proto::ids::is_name;
use pageport_proto::v1::{
    BeginPoint, Begun, CommitPoint, Committed, CompareBlocks, Compared, DiskFailure, DiskHello, RecoveryPoint,
    ReplicaPoints, ReplicationDisk, ReplicationHello, ReplicationReply, ReplicationRequest, replication_reply,
    replication_request,
};
use pageport_proto::{PoolName, VmId};
use tokio::sync::OwnedMutexGuard;

use super::scrub::answer::{CompareError, compare};
use crate::node::Node;
use crate::replica::groups::{GroupsError, Points};
use crate::replica::points::{Change as LayerChange, JournalWriter, Lineage, MAX_DISK_BYTES, PointError, PointInfo};
use crate::replica::serve::{DiskChange, DiskTarget, RawChange, ServeError, change_in_place, compress};
use crate::replica::store::{ReplicaDisk, ReplicaError, ReplicaStore};
use crate::replica::view::ReplicaState;
use crate::transport::{MessageError, MessageReader, MessageWriter};
use crate::vms::VmError;

/// How long a new session waits for the one before it to be noticed as dead.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(15);

/// Why a session is refused, or ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The hello makes no sense.
    #[error("the request makes no sense: {what}")]
    Request {
        /// What does not.
        what: &'static str,
    },
    /// This host may run the VM.
    #[error("this site runs vm {vm} itself: its disks are no replicas")]
    Owned {
        /// The VM.
        vm: VmId,
    },
    /// Another session has not ended.
    #[error("another replication of the same vm is under way; it has not ended within {} s", TAKE_OVER_LIMIT.as_secs())]
    Busy,
    /// The stream broke.
    #[error("serve a replication stream")]
    Stream(#[from] MessageError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// Its points.
    #[error(transparent)]
    Points(#[from] PointError),
    /// Its points cannot be opened.
    #[error(transparent)]
    Open(#[from] GroupsError),
    /// The replica could not be compared.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// A replica cannot be made as large as its disk.
    #[error("make the replica of disk {disk:?} as large as the disk")]
    Grow {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VM at this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A thread ended.
    #[error("the thread that served the request ended")]
    Thread(#[from] tokio::task::JoinError),
}

/// The sessions under way, by the number that their source has drawn.
#[derive(Debug, Default)]
pub struct Sessions {
    all: Mutex<HashMap<u64, Arc<Session>>>,
}

impl Sessions {
    /// Where the changes of a disk's stream go.
    pub fn disk(&self, vm: VmId, hello: &DiskHello) -> Option<SessionDisk> {
        let session = self.lock().get(&hello.session).filter(|session| session.vm == vm)?.clone();
        let number = session.disks.iter().position(|(name, _)| *name == hello.disk)?;
        Some(SessionDisk { session, number })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Session>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One session.
#[derive(Debug)]
pub struct Session {
    vm: VmId,
    disks: Vec<(String, Arc<ReplicaDisk>)>,
    /// Of the source's disks, in the same order. A replica gets its disk's size with what is written into it, and not before.
    sizes_bytes: Vec<u64>,
    points: Arc<Points>,
    target: RwLock<Target>,
}

/// Where changes go.
#[derive(Debug)]
enum Target {
    Nowhere,
    InPlace { lineage: Lineage },
    Journal(JournalWriter),
    Layer,
}

/// One disk's stream within a session.
#[derive(Debug)]
pub struct SessionDisk {
    session: Arc<Session>,
    number: usize,
}

impl DiskTarget for SessionDisk {
    fn replica(&self) -> &Arc<ReplicaDisk> {
        &self.session.disks[self.number].1
    }

    fn state(&self) -> ReplicaState {
        match &*self.session.target() {
            Target::InPlace { .. } | Target::Nowhere => {
                let replica = self.replica();
                ReplicaState { instance: replica.instance(), version: replica.version() }
            }
            // Until it is committed, or the VM has changed hands, the replica counts as what it was.
            Target::Journal(_) | Target::Layer => self.session.state(),
        }
    }

    fn change(&self, changes: Vec<DiskChange>) -> Result<(), ServeError> {
        if changes.is_empty() {
            return Ok(());
        }
        match &*self.session.target() {
            Target::Nowhere => Err(NOWHERE),
            Target::InPlace { .. } => change_in_place(self.replica(), changes),
            Target::Journal(journal) => changes.iter().try_for_each(|change| self.keep(journal, change)),
            Target::Layer => {
                let changes: Vec<_> = changes.into_iter().map(DiskChange::unpack).collect::<Result<_, _>>()?;
                let changes: Vec<_> = changes.iter().map(|change| self.in_layer(change)).collect();
                Ok(self.session.points.change(&changes)?)
            }
        }
    }

    fn flush(&self) -> Result<(), ServeError> {
        match &*self.session.target() {
            // What is journalled is on stable storage once it is committed.
            Target::Nowhere | Target::Journal(_) => Ok(()),
            Target::InPlace { .. } | Target::Layer => {
                self.replica().flush().map(drop).map_err(|source| self.failed(source))
            }
        }
    }
}

const NOWHERE: ServeError = ServeError::Hostile { what: "a change that belongs to nothing" };

impl SessionDisk {
    fn name(&self) -> &str {
        &self.session.disks[self.number].0
    }

    /// Into the journal; what came packed is kept as it came.
    fn keep(&self, journal: &JournalWriter, change: &DiskChange) -> Result<(), ServeError> {
        match change {
            DiskChange::Packed { offset, raw_length, zstd } => {
                Ok(journal.write(self.name(), *offset, *raw_length, zstd)?)
            }
            DiskChange::Raw(RawChange::Data { offset, data }) => {
                let zstd = compress(data).map_err(|source| self.failed(source))?;
                Ok(journal.write(self.name(), *offset, data.len() as u32, &zstd)?)
            }
            DiskChange::Raw(RawChange::Zero { offset, length }) => Ok(journal.zero(self.name(), *offset, *length)?),
        }
    }

    /// As the layer takes it.
    fn in_layer<'a>(&'a self, change: &'a RawChange) -> LayerChange<'a> {
        let disk = self.name();
        match change {
            RawChange::Data { offset, data } => LayerChange::Write { disk, offset: *offset, data },
            RawChange::Zero { offset, length } => LayerChange::Zero { disk, offset: *offset, length: *length },
        }
    }

    fn failed(&self, source: io::Error) -> ServeError {
        ServeError::Disk { disk: self.replica().to_string(), source }
    }
}

impl Session {
    fn target(&self) -> RwLockReadGuard<'_, Target> {
        self.target.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, target: Target) -> Target {
        std::mem::replace(&mut *self.target.write().unwrap_or_else(PoisonError::into_inner), target)
    }

    /// Names the content of the replica at its newest point.
    fn state(&self) -> ReplicaState {
        let state = self.points.group().state();
        let version = state.points.last().map_or(0, |point| point.number);
        ReplicaState { instance: state.lineage.map_or(0, Lineage::get), version }
    }

    fn points(&self) -> ReplicaPoints {
        let state = self.points.group().state();
        ReplicaPoints {
            lineage: state.lineage.map_or(0, Lineage::get),
            newest: state.points.last().map(RecoveryPoint::from),
            damage: state.damaged.unwrap_or_default(),
        }
    }

    fn begin(&self, begin: &BeginPoint) -> Result<u64, SessionError> {
        let group = self.points.group();
        if begin.in_place {
            // What there was is a mixture from now on.
            group.forget()?;
            self.grow_disks(ReplicaDisk::grow_to_compare)?;
            let lineage = Lineage::generate();
            self.replace(Target::InPlace { lineage });
            return Ok(lineage.get());
        }
        let lineage = group.state().lineage.ok_or(SessionError::Request { what: "a point after none" })?;
        let journal = group.begin(lineage, begin.number)?;
        for ((name, _), size_bytes) in self.disks.iter().zip(&self.sizes_bytes) {
            journal.resize(name, *size_bytes)?;
        }
        self.replace(Target::Journal(journal));
        Ok(lineage.get())
    }

    /// Blocks of the files, which must be at the newest point.
    fn compare(&self, blocks: &CompareBlocks) -> Result<Compared, SessionError> {
        if !matches!(&*self.target(), Target::Nowhere) {
            return Err(SessionError::Request { what: "a comparison while something is received" });
        }
        Ok(compare(&self.disks, blocks)?)
    }

    fn begin_layer(&self) -> Result<u64, SessionError> {
        self.points.open_layer()?;
        self.grow_disks(ReplicaDisk::grow)?;
        self.replace(Target::Layer);
        Ok(self.state().instance)
    }

    fn grow_disks(&self, grow: impl Fn(&ReplicaDisk, u64) -> io::Result<()>) -> Result<(), SessionError> {
        for ((name, disk), size_bytes) in self.disks.iter().zip(&self.sizes_bytes) {
            grow(disk, *size_bytes).map_err(|source| SessionError::Grow { disk: name.clone(), source })?;
        }
        Ok(())
    }

    fn commit(&self, commit: &CommitPoint) -> Result<Committed, SessionError> {
        let point = commit.point.as_ref().ok_or(SessionError::Request { what: "a commit of no point" })?;
        let info = PointInfo {
            number: point.number,
            taken_unix_ms: point.taken_unix_ms,
            changed_bytes: point.changed_bytes,
            quiesced: point.quiesced,
            disks: self.disks.len() as u16,
        };
        let group = self.points.group();
        match self.replace(Target::Nowhere) {
            Target::InPlace { lineage } => group.adopt(lineage, info)?,
            Target::Journal(journal) => {
                let digest = commit.digest[..].try_into();
                let digest = digest.map_err(|_| SessionError::Request { what: "a commit without a digest" })?;
                group.commit(&journal, info, digest, commit.keep_points as usize)?;
            }
            Target::Nowhere | Target::Layer => {
                return Err(SessionError::Request { what: "a commit of what was not begun" });
            }
        }
        let state = self.state();
        Ok(Committed { lineage: state.instance, number: state.version })
    }
}

/// Serves one session, from its hello to the end of its control stream.
pub async fn serve(node: Arc<Node>, hello: ReplicationHello, mut reader: MessageReader, mut writer: MessageWriter) {
    let outcome = match open(&node, &hello).await {
        Ok((session, turn)) => {
            node.sessions.lock().insert(hello.session, session.clone());
            let outcome = control(&session, &mut reader, &mut writer).await;
            node.sessions.lock().remove(&hello.session);
            // Disk streams that are still open write nothing any more.
            drop(session.replace(Target::Nowhere));
            drop(turn);
            if let Some(vm) = node.vms.get(session.vm) {
                vm.settle_replica().await;
            }
            outcome
        }
        Err(refused) => Err(refused),
    };
    if let Err(error) = outcome {
        let reason = crate::error::with_causes(&error);
        tracing::warn!(reason, "replication session ended early");
        // The peer may be the reason why the stream ended; then there is nobody to tell.
        let _ = say(&mut writer, replication_reply::Kind::Failure(DiskFailure { reason, not_held: false })).await;
    }
    node.changed.notify_one();
}

async fn open(node: &Node, hello: &ReplicationHello) -> Result<(Arc<Session>, OwnedMutexGuard<()>), SessionError> {
    let request = |what| SessionError::Request { what };
    let vm: VmId = hello.vm_id.parse().map_err(|_| request("it names no vm"))?;
    if hello.session == 0 || hello.disks.is_empty() || hello.disks.iter().any(|disk| !is_name(&disk.name)) {
        return Err(request("it names no session, no disks, or a disk without a name"));
    }
    if hello.disks.iter().any(|disk| disk.size_bytes > MAX_DISK_BYTES) {
        return Err(request("a disk is too large"));
    }
    let pool: Option<PoolName> = match hello.pool.as_str() {
        "" => None,
        name => Some(name.parse().map_err(|_| request("its pool has no good name"))?),
    };
    let known = node.vms.get_or_create(vm)?;
    let status = known.status();
    if status.record.owned().is_some() || status.volatile.guest != Guest::Absent {
        return Err(SessionError::Owned { vm });
    }
    let turn = tokio::time::timeout(TAKE_OVER_LIMIT, node.groups.turn(vm).lock_owned()).await;
    let turn = turn.map_err(|_| SessionError::Busy)?;
    let (replicas, groups, asked) = (node.replicas.clone(), node.groups.clone(), hello.disks.clone());
    let opened = tokio::task::spawn_blocking(move || -> Result<_, SessionError> {
        replicas.must_be_flat(vm)?;
        if let Some(pool) = pool {
            replicas.choose_pool(vm, &pool)?;
        }
        let disks = open_disks(&replicas, vm, &asked);
        replicas.expect_only_what_is_made(vm)?;
        let disks = disks?;
        let points = groups.open(vm, disks.clone())?;
        // What an earlier session left of a move is of no use. Damage is for the source to hear of: it copies anew.
        match points.undo_layer() {
            Err(PointError::Damaged { .. }) => {}
            undone => undone?,
        }
        disks.iter().zip(&asked).try_for_each(|((_, disk), asked)| {
            disk.must_not_shrink(asked.size_bytes)?;
            disk.must_have_room(asked.size_bytes)
        })?;
        Ok((disks, points))
    });
    let (disks, points) = opened.await??;
    // Once more, now that the disks are open: had the VM been given to this worker meanwhile, nobody else would close them.
    let (record, guest) = known.decided().await;
    if record.owned().is_some() || guest != Guest::Absent {
        node.replicas.close(vm);
        return Err(SessionError::Owned { vm });
    }
    let sizes_bytes = hello.disks.iter().map(|disk| disk.size_bytes).collect();
    let session = Session { vm, disks, sizes_bytes, points, target: RwLock::new(Target::Nowhere) };
    Ok((Arc::new(session), turn))
}

fn open_disks(
    replicas: &ReplicaStore,
    vm: VmId,
    asked: &[ReplicationDisk],
) -> Result<Vec<(String, Arc<ReplicaDisk>)>, ReplicaError> {
    let files = asked.iter().filter(|disk| disk.place.is_empty());
    let wanted: Vec<_> = files.map(|disk| (disk.name.as_str(), disk.allocated_bytes)).collect();
    replicas.make_room(vm, &wanted)?;
    let open = |disk: &ReplicationDisk| {
        if !disk.place.is_empty() {
            replicas.place(vm, &disk.name, Path::new(&disk.place), disk.size_bytes)?;
        }
        Ok((disk.name.clone(), replicas.open_as_it_is(vm, &disk.name, disk.allocated_bytes)?))
    };
    asked.iter().map(open).collect()
}

async fn control(
    session: &Arc<Session>,
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
) -> Result<(), SessionError> {
    say(writer, replication_reply::Kind::Points(session.points())).await?;
    loop {
        let request: ReplicationRequest = match reader.receive().await {
            Err(MessageError::Closed) => return Ok(()),
            other => other?,
        };
        let kind = request.kind.ok_or(MessageError::Empty)?;
        let committed = matches!(kind, replication_request::Kind::Commit(_));
        let serving = session.clone();
        let reply = tokio::task::spawn_blocking(move || -> Result<_, SessionError> {
            Ok(match kind {
                replication_request::Kind::Begin(begin) => {
                    replication_reply::Kind::Begun(Begun { lineage: serving.begin(&begin)? })
                }
                replication_request::Kind::Layer(_) => {
                    replication_reply::Kind::Begun(Begun { lineage: serving.begin_layer()? })
                }
                replication_request::Kind::Compare(blocks) => {
                    replication_reply::Kind::Compared(serving.compare(&blocks)?)
                }
                replication_request::Kind::Commit(commit) => {
                    replication_reply::Kind::Committed(serving.commit(&commit)?)
                }
            })
        });
        say(writer, reply.await??).await?;
        if committed {
            // The peer need not wait for that.
            let applying = session.clone();
            tokio::task::spawn_blocking(move || applying.points.group().apply()).await??;
        }
    }
}

async fn say(writer: &mut MessageWriter, kind: replication_reply::Kind) -> Result<(), MessageError> {
    writer.send(&ReplicationReply { kind: Some(kind) }).await
}
