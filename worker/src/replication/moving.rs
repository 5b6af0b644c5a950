//! The disks of a migration that starts from a standing replica: only what is newer than its newest recovery point crosses the link.
//!
//! ```text
//!   begin layer ─▶ mirrors (sync none): what is written from now on ──┐
//!                  freeze ─▶ what was written since the newest point ─┴─▶ merged ─▶ the replica, in place, behind its undo
//!   … memory moves, too … drain ─▶ pause ─▶ last writes ─▶ flush
//! ```
//! Guarantees: the mirrors run before the moment is frozen, so no write is missed between; the mirror's bytes win; after an abort the
//! destination is at its newest point again, the bitmap of that point has missed nothing, and the view knows what it knew.
//! Without a bitmap that goes on from the newest point, or when a scrub has found damage, the mirrors look at the whole disks, which are
//! compared.

use std::sync::Arc;
use std::time::Duration;

use pageport_proto::v1::{DiskHello, VmSpec};

use super::control::{Control, ControlError, Placement};
use super::frozen_copy::{Copied, FrozenCopy, FrozenCopyError};
use super::last_increment::{LastIncrement, LastIncrementError};
use super::mark::Mark;
use super::plan::Plan;
use crate::hypervisor::freeze::Consistency;
use crate::hypervisor::mirror::MirrorSync;
use crate::hypervisor::{HypervisorError, Vm};
use crate::node::Node;
use crate::replica::cap::Cap;
use crate::replica::copy::{CopyError, CopyProgress, DiskCopies, hello};
use crate::replica::merge::{PointTarget, merge};
use crate::replica::view::{AttemptId, ReplicaView};
use crate::transport::{PeerConnection, TransportError};

/// Why the disks could not follow.
#[derive(Debug, thiserror::Error)]
pub enum MovingError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] TransportError),
    /// The control stream.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A mirror or its stream.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The hypervisor.
    #[error("copy what was written since the newest recovery point")]
    Hypervisor(#[from] HypervisorError),
    /// The last increment did not begin.
    #[error(transparent)]
    Freeze(#[from] FrozenCopyError),
    /// The last increment.
    #[error(transparent)]
    Last(#[from] LastIncrementError),
}

/// Memory may begin to move when no more than this is left of the last increment, in bytes: it takes longer.
const LEFT_FOR_LATER_BYTES: u64 = 64 << 20;

/// The copies under way. [`Self::cancel`] ends them, in whatever state they are.
pub struct MovingDisks {
    copies: DiskCopies,
    view: Arc<ReplicaView>,
    /// What the view learns, once the sessions are open.
    attempt: Option<AttemptId>,
    /// What was written since the newest point.
    last: Option<LastIncrement>,
    /// Closed, it tells the destination that the session is over.
    control: Option<Control>,
}

impl MovingDisks {
    /// Begins, if the replica has a recovery point; [`None`]: it has none, and the disks are compared without it.
    ///
    /// # Errors
    /// Nothing is left running.
    pub async fn start(
        node: &Node,
        qemu: &Vm,
        spec: &VmSpec,
        connection: PeerConnection,
        peer: &str,
        migration_id: &str,
        cap: Arc<Cap>,
    ) -> Result<Option<Self>, MovingError> {
        let session = rand::random::<u64>().max(1);
        let names: Vec<String> = spec.disks.iter().map(|disk| disk.name.clone()).collect();
        let of = |name: &String| {
            let migration_id = migration_id.to_owned();
            Ok::<_, CopyError>(DiskHello { session, migration_id, ..hello(node, qemu.id(), name)? })
        };
        let hellos = tokio::task::block_in_place(|| names.iter().map(of).collect::<Result<Vec<_>, _>>())?;
        let (mut control, points) = Control::open(&connection, session, &hellos, Placement::default()).await?;
        let mut plan = Plan::make(qemu, &names, &points, peer).await?;
        if node.replications.has_damage(qemu.id()) {
            // The bitmap says nothing of what a scrub has found.
            plan.since = None;
        }
        if plan.in_place {
            return Ok(None);
        }
        control.begin_layer().await?;
        let view = node.views.of(qemu.id(), peer).await;
        let copies = DiskCopies::beside_memory(connection);
        let mut moving = Self { copies, view, attempt: None, last: None, control: Some(control) };
        match moving.begin(node, qemu, peer, hellos, &plan, &cap).await {
            Ok(()) => Ok(Some(moving)),
            Err(error) => {
                moving.cancel().await;
                Err(error)
            }
        }
    }

    async fn begin(
        &mut self,
        node: &Node,
        qemu: &Vm,
        peer: &str,
        hellos: Vec<DiskHello>,
        plan: &Plan,
        cap: &Arc<Cap>,
    ) -> Result<(), MovingError> {
        let mut sessions = vec![];
        for (number, hello) in (0u16..).zip(hellos) {
            let name = hello.disk.clone();
            let session = self.copies.open(number, hello, self.view.clone(), cap.clone()).await?;
            sessions.push((name, session));
        }
        // Only now: what the sessions learned while they opened is true whatever becomes of the migration.
        self.attempt = Some(tokio::task::block_in_place(|| self.view.begin_attempt()));
        let sync = if plan.since.is_some() { MirrorSync::None } else { MirrorSync::Full };
        let mut targets = vec![];
        for (name, session) in sessions {
            let (newer, older) = merge(session.clone());
            self.copies.mirror(qemu, &name, session, Arc::new(newer), sync).await?;
            targets.push((name, older));
        }
        if let Some(since) = &plan.since {
            self.wait_for_mirrors().await?;
            // Not a point: it only ends the increment, and is removed with it.
            let end = Mark { worker: peer.to_owned(), lineage: plan.lineage, point: u64::MAX }.to_string();
            self.freeze(node, qemu, since, &end, targets).await?;
        }
        Ok(())
    }

    /// A mirror that copies nothing is ready at once, and must be before the moment is frozen.
    async fn wait_for_mirrors(&mut self) -> Result<(), MovingError> {
        Ok(self.copies.wait_ready(Duration::from_secs(30), |_| {}).await?)
    }

    async fn freeze(
        &mut self,
        node: &Node,
        qemu: &Vm,
        since: &str,
        end: &str,
        targets: Vec<(String, PointTarget)>,
    ) -> Result<(), MovingError> {
        let names: Vec<String> = targets.iter().map(|(name, _)| name.clone()).collect();
        // No point: the guest itself moves, with whatever it had not written yet.
        let mut frozen = FrozenCopy::freeze(node, qemu, &names, Some(since), end, Consistency::Crash).await?;
        let targets = targets.into_iter().map(|(name, target)| (name, Arc::new(target))).collect();
        let started = frozen.start(targets, None).await;
        let sessions = self.copies.sessions().map(|(_, session)| session.clone()).collect();
        // Its task also takes out what was frozen, if it did not start.
        self.last = Some(LastIncrement::run(frozen, sessions));
        Ok(started?)
    }

    /// Waits until the mirrors keep up and little is left of the last increment.
    ///
    /// # Errors
    /// A copy or a session ended, or it took too long.
    pub async fn wait_ready(
        &mut self,
        limit: Duration,
        mut progress: impl FnMut(CopyProgress),
    ) -> Result<(), MovingError> {
        if let Some(last) = &mut self.last {
            let copies = &self.copies;
            let copied = |Copied { done_bytes, total_bytes }| {
                progress(CopyProgress { done_bytes, total_bytes, wan_bytes: copies.wan_bytes(), rate_bps: 0 });
            };
            last.wait_until_left(LEFT_FOR_LATER_BYTES, copied).await?;
        }
        Ok(self.copies.wait_ready(limit, progress).await?)
    }

    /// What is left to copy of the last increment, in bytes; 0 when it has ended altogether.
    ///
    /// # Errors
    /// It has failed.
    pub fn last_increment_bytes(&self) -> Result<u64, MovingError> {
        Ok(self.last.as_ref().map_or(Ok(0), LastIncrement::left_bytes)?)
    }

    /// What the mirrors have not copied yet, or the peer has not acknowledged, in bytes.
    ///
    /// # Errors
    /// A mirror ended.
    pub async fn lag_bytes(&self) -> Result<u64, MovingError> {
        Ok(self.copies.lag_bytes().await?)
    }

    /// Once ready and with the guest stopped: the last writes, on stable storage.
    ///
    /// # Errors
    /// A mirror, a session or the last increment failed.
    pub async fn finish(&mut self) -> Result<(), MovingError> {
        if let Some(mut last) = self.last.take() {
            last.wait_until_left(0, |_| {}).await?;
        }
        Ok(self.copies.finish().await?)
    }

    /// Ends everything at once: the destination undoes what it has written.
    pub async fn cancel(&mut self) {
        if let Some(last) = self.last.take() {
            last.end().await;
        }
        let sessions: Vec<_> = self.copies.sessions().map(|(_, session)| session.clone()).collect();
        self.copies.cancel().await;
        for session in sessions {
            session.end().await;
        }
        self.control = None;
        if let Some(attempt) = self.attempt.take() {
            self.view.roll_back(attempt);
        }
    }

    /// Bytes that the transport sent for disks.
    pub fn wan_bytes(&self) -> u64 {
        self.copies.wan_bytes()
    }

    /// Of them those that the connection of memory counts too.
    pub fn shared_bytes(&self) -> u64 {
        self.copies.shared_bytes()
    }
}

impl std::fmt::Debug for MovingDisks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MovingDisks").field("copies", &self.copies).finish_non_exhaustive()
    }
}
