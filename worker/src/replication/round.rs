//! One round: one recovery point of one VM, from the frozen moment to its commit at the replica.
//!
//! ```text
//!   connect ─▶ points? ─▶ begin n+1 ─▶ disk streams ─▶ freeze ─▶ copy what changed ─▶ commit ─▶ release
//!                │                                        │           └─ failed ─▶ view rolled back, bitmaps merged back
//!                └─ which bitmap goes on from the newest point?       └─ answer lost ─▶ both bitmaps stay complete
//! ```
//! Guarantees: no guest write waits for anything but local scratch and, where quiescing is ordered, the guest's own agent, a few seconds at most; a round that fails leaves bitmaps from which the next one goes on, and
//! a view that says what the replica's newest point holds; scratch stays within its bound.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use pageport_common::telemetry;
use pageport_proto::v1::{
    BeginPoint, CommitPoint, DiskHello, Protection, RecoveryPoint, ReplicationAssignment, VmSpec,
};

use super::control::{Control, ControlError};
use super::frozen_copy::{Copied, FrozenCopy, FrozenCopyError};
use super::mark::Mark;
use super::plan::{Plan, disks_of};
use super::scrub::pass::Difference;
use super::throttle::Throttle;
use crate::clock::unix_ms;
use crate::hypervisor::freeze::{Consistency, Outcome};
use crate::hypervisor::guest_agent::NotQuiesced;
use crate::hypervisor::{HypervisorError, Vm};
use crate::node::Node;
use crate::replica::CopiesFrom;
use crate::replica::copy::{CopyError, hellos};
use crate::replica::points::ChangeDigest;
use crate::replica::session::{DiskSession, SessionError};
use crate::replica::view::{ReplicaState, ReplicaView};
use crate::transport::{PeerConnection, TransportError};

/// Between two counts of the guest's writes before a full copy.
const COUNT_INTERVAL: Duration = Duration::from_secs(2);

/// Why a round did not bring a point.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] TransportError),
    /// The control stream.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A disk's stream did not begin.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A disk is not as it should be.
    #[error(transparent)]
    Disk(#[from] CopyError),
    /// The hypervisor.
    #[error("take a frozen point")]
    Hypervisor(#[from] HypervisorError),
    /// The copy.
    #[error(transparent)]
    Copy(#[from] FrozenCopyError),
    /// A disk's stream ended.
    #[error("the copy of disk {disk:?} ended: {reason}")]
    Ended {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
    },
    /// A migration needs its place, or the order was withdrawn.
    #[error("interrupted")]
    Interrupted,
}

/// A point that is committed.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Its number.
    pub number: u64,
    /// When, by this host's clock.
    pub taken_unix_ms: i64,
    /// The same moment on its monotonic clock.
    pub at: Instant,
    /// Bytes of the disks that changed with it.
    pub changed_bytes: u64,
    /// How many disks it has.
    pub disks: u32,
    /// The guest's file systems were at rest.
    pub quiesced: bool,
    /// The bitmap of what the guest has written since.
    pub mark: String,
}

/// How far a round is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// The whole disks are looked at.
    pub full: bool,
    /// Bytes of the disks looked at so far.
    pub done_bytes: u64,
    /// In all.
    pub total_bytes: u64,
    /// Sent by the transport in this round.
    pub wan_bytes: u64,
}

/// What a round tells while it goes on.
#[derive(Debug)]
pub enum News {
    /// How far it is.
    Progress(Progress),
    /// The moment was taken; what an operator should know of the guest's file systems then.
    Moment(Option<NotQuiesced>),
}

/// What a round needs.
pub struct Round<'a> {
    /// This worker.
    pub node: &'a Node,
    /// The VM's hypervisor.
    pub qemu: &'a Vm,
    /// Its definition.
    pub spec: &'a VmSpec,
    /// The order.
    pub order: &'a ReplicationAssignment,
    /// What a scrub has found: brought with the point, in front of what the guest has changed.
    pub repairs: &'a [Difference],
}

/// A disk's stream.
#[derive(Debug)]
struct DiskStream {
    name: String,
    session: Arc<DiskSession>,
}

impl Round<'_> {
    /// Takes one point. `interrupt` ends it early; `tell` hears how it goes.
    ///
    /// # Errors
    /// [`RoundError`]; the next round goes on from what was there before.
    pub async fn take(
        &self,
        interrupt: impl Future<Output = ()>,
        mut tell: impl FnMut(News),
    ) -> Result<Taken, RoundError> {
        let connection = self.node.endpoint.connect(&self.order.peer_worker, &self.order.peer_address).await?;
        let taken = self.over(&connection, interrupt, &mut tell).await;
        connection.close("replication round ended");
        taken
    }

    async fn over(
        &self,
        connection: &PeerConnection,
        interrupt: impl Future<Output = ()>,
        tell: &mut impl FnMut(News),
    ) -> Result<Taken, RoundError> {
        let session = rand::random::<u64>().max(1);
        let names = disks_of(self.qemu, self.spec).await?;
        let hellos = hellos(self.node, self.qemu.id(), &names, session)?;
        let (mut control, points) = Control::open(connection, session, &hellos, self.order.into()).await?;
        let plan = Plan::make(self.qemu, &names, &points, &self.order.peer_worker).await?;
        let begin = BeginPoint { number: plan.number, in_place: plan.in_place };
        let lineage = control.begin(begin).await?;
        let view = self.node.views.of(self.qemu.id(), &self.order.peer_worker).await;
        let copies = if plan.in_place { CopiesFrom::Now } else { CopiesFrom::Before };
        let streams = self.open_streams(connection, hellos, &view, copies).await?;
        let attempt = (!plan.in_place).then(|| tokio::task::block_in_place(|| view.begin_attempt()));
        let next = Mark { worker: self.order.peer_worker.clone(), lineage, point: plan.number }.to_string();
        let copied = self.copy(connection, &plan, &next, &streams, interrupt, tell).await;
        let (outcome, committed, frozen) = match copied {
            Err((error, frozen)) => (Outcome::Failed, Err(error), frozen),
            Ok((taken, frozen)) => match control.commit(self.commit_of(&streams, &taken, plan.in_place)).await {
                Ok(_) => (Outcome::Committed, Ok(taken), Some(frozen)),
                // Only the destination knows.
                Err(error) => (Outcome::Unknown, Err(error.into()), Some(frozen)),
            },
        };
        for stream in &streams {
            stream.session.end().await;
        }
        match (&committed, attempt) {
            (Ok(_), _) => {
                let state = ReplicaState { instance: lineage, version: plan.number };
                tokio::task::block_in_place(|| view.keep(attempt, state, streams.len() as u16));
            }
            (Err(_), Some(attempt)) => view.roll_back(attempt),
            (Err(_), None) => {}
        }
        if let Some(frozen) = frozen {
            frozen.release(outcome).await?;
        }
        committed
    }

    /// From the frozen moment until everything is at the destination; the frozen point is left for who knows how it ended.
    async fn copy(
        &self,
        connection: &PeerConnection,
        plan: &Plan,
        next: &str,
        streams: &[DiskStream],
        interrupt: impl Future<Output = ()>,
        tell: &mut impl FnMut(News),
    ) -> Result<(Taken, FrozenCopy), (RoundError, Option<FrozenCopy>)> {
        let full = plan.since.is_none();
        let throttle = if full { Some(self.throttle().await.map_err(|error| (error, None))?) } else { None };
        let at = Instant::now();
        let names: Vec<String> = streams.iter().map(|stream| stream.name.clone()).collect();
        let since = plan.since.as_deref();
        let frozen = FrozenCopy::freeze(self.node, self.qemu, &names, since, next, self.consistency()).await;
        let mut frozen = frozen.map_err(|error| (error.into(), None))?;
        let quiescence = frozen.take_quiescence();
        tell(News::Moment(quiescence.problem));
        let copied = async {
            self.repair(streams).await.map_err(FrozenCopyError::Sessions)?;
            let sink = |stream: &DiskStream| (stream.name.clone(), stream.session.clone());
            frozen.start(streams.iter().map(sink).collect(), throttle.as_ref()).await?;
            let progress = |Copied { done_bytes, total_bytes }| {
                let wan_bytes = connection.sent_bytes();
                tell(News::Progress(Progress { full, done_bytes, total_bytes, wan_bytes }));
            };
            frozen.wait(throttle.clone(), progress).await?;
            // The copy has handed all over; now it is there.
            for stream in streams {
                stream.session.flush().await.map_err(FrozenCopyError::Sessions)?;
            }
            Ok(())
        };
        let copied = tokio::select! {
            biased;
            () = interrupt => Err(RoundError::Interrupted),
            copied = copied => copied.map_err(|error| explain(streams, error)),
        };
        match copied {
            Err(error) => {
                frozen.close().await;
                Err((error, Some(frozen)))
            }
            Ok(()) => {
                let changed_bytes = streams.iter().map(|stream| stream.session.changed_bytes()).sum();
                let taken_unix_ms = unix_ms(frozen.moment());
                let (number, quiesced, mark) = (plan.number, quiescence.quiesced, next.to_owned());
                let disks = streams.len() as u32;
                Ok((Taken { number, taken_unix_ms, at, changed_bytes, disks, quiesced, mark }, frozen))
            }
        }
    }

    /// Older than the moment: what the guest has written since comes behind it.
    async fn repair(&self, streams: &[DiskStream]) -> std::io::Result<()> {
        for Difference { disk, offset, data } in self.repairs {
            if let Some(stream) = streams.iter().find(|stream| stream.name == *disk) {
                stream.session.write(*offset, data.clone()).await?;
            }
        }
        Ok(())
    }

    fn consistency(&self) -> Consistency {
        match self.order.protection {
            Some(Protection { quiesce: true, .. }) => Consistency::FileSystems,
            _ => Consistency::Crash,
        }
    }

    async fn open_streams(
        &self,
        connection: &PeerConnection,
        hellos: Vec<DiskHello>,
        view: &Arc<ReplicaView>,
        copies: CopiesFrom,
    ) -> Result<Vec<DiskStream>, RoundError> {
        let mut streams = vec![];
        for (number, hello) in (0u16..).zip(hellos) {
            let name = hello.disk.clone();
            let traceparent = telemetry::traceparent_of(&tracing::Span::current());
            let cap = self.node.caps.towards(&self.order.to_site);
            let opened = DiskSession::open(connection, number, hello, traceparent, view.clone(), copies, cap).await?;
            streams.push(DiskStream { name, session: Arc::new(opened) });
        }
        Ok(streams)
    }

    /// Looks at the guest's writes for a while, before a full copy makes them slower.
    async fn throttle(&self) -> Result<Throttle, RoundError> {
        let before = self.qemu.write_count().await?;
        tokio::time::sleep(COUNT_INTERVAL).await;
        Ok(Throttle::new(before, self.qemu.write_count().await?))
    }

    fn commit_of(&self, streams: &[DiskStream], taken: &Taken, in_place: bool) -> CommitPoint {
        let Taken { number, taken_unix_ms, changed_bytes, quiesced, disks, .. } = *taken;
        let mut digest = ChangeDigest::default();
        for stream in streams {
            digest.join(stream.session.change_digest());
        }
        CommitPoint {
            point: Some(RecoveryPoint { number, taken_unix_ms, changed_bytes, quiesced, disks }),
            digest: if in_place { Bytes::new() } else { digest.finish().to_vec().into() },
            keep_points: self.order.protection.as_ref().map_or(1, |it| it.keep_points),
        }
    }
}

/// A session that ended says more than the copy that it ended.
fn explain(streams: &[DiskStream], error: FrozenCopyError) -> RoundError {
    let failed = streams.iter().find_map(|stream| Some((stream, stream.session.failure()?)));
    match failed {
        Some((stream, reason)) => RoundError::Ended { disk: stream.name.clone(), reason },
        None => error.into(),
    }
}
