//! The task that watches one QEMU: turns its QMP events into [`VmEvent`]s and notices its end.
//!
//! The end is QEMU's pidfd becoming readable, not the control socket's closing: the socket may close late, or never be
//! read again. After the end, events that were already in the socket are still told, then the keeper's end is awaited
//! (it may have a word to say), then the VM's devices and sockets are removed, then the exit is reported.
//!
//! Ends without a word when every handle on the VM is dropped; QEMU runs on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use pageport_proto::VmId;
use tokio::process::Child;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use super::event::{EventTime, ExitCause, ExitReport, VmEvent, VmEventKind, translate};
use super::paths::VmPaths;
use super::process::{self, Process};
use super::qmp::QmpNotice;
use super::vm::{Marks, remove_leftovers};

/// Time for the control socket to deliver what an ended QEMU still said.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Time for the keeper to follow QEMU; one that is stopped is helped.
const KEEPER_DEADLINE: Duration = Duration::from_secs(5);

/// The task's state.
pub(super) struct Watcher {
    pub vm: VmId,
    pub paths: VmPaths,
    pub process: Arc<Process>,
    pub keeper: Arc<Process>,
    pub child: Option<Child>,
    pub notices: broadcast::Receiver<QmpNotice>,
    pub end_ordered: Arc<AtomicBool>,
    pub events: broadcast::Sender<VmEvent>,
    pub marks: Arc<watch::Sender<Marks>>,
    pub exit: watch::Sender<Option<ExitReport>>,
}

/// What the control connection has come to.
enum Control {
    /// QEMU closed it: it is about to end, or has.
    Closed,
    /// Every handle is gone.
    Unused,
}

impl Watcher {
    pub async fn run(mut self) {
        let mut guest_shut_down = false;
        let process = Arc::clone(&self.process);
        let ended = async {
            if let Err(error) = process.gone().await {
                tracing::error!(error = %error, "cannot watch QEMU's process");
                std::future::pending::<()>().await;
            }
        };
        tokio::pin!(ended);
        tokio::select! {
            control = Self::relay(&mut self.notices, &self.events, &self.marks, &mut guest_shut_down) => match control {
                Control::Closed => ended.await,
                Control::Unused => return,
            },
            () = &mut ended => {
                let rest = Self::relay(&mut self.notices, &self.events, &self.marks, &mut guest_shut_down);
                // A forked-off holder of the socket cannot keep the report back.
                let _ = tokio::time::timeout(DRAIN_DEADLINE, rest).await;
            }
        }
        self.report(guest_shut_down).await;
    }

    async fn relay(
        notices: &mut broadcast::Receiver<QmpNotice>,
        events: &broadcast::Sender<VmEvent>,
        marks: &watch::Sender<Marks>,
        guest_shut_down: &mut bool,
    ) -> Control {
        loop {
            match notices.recv().await {
                Ok(QmpNotice::Event(raw, received)) => {
                    let Some(event) = translate(&raw, received) else { continue };
                    tracing::debug!(event = ?event.kind, "QEMU event");
                    *guest_shut_down |= event.kind == VmEventKind::Shutdown { by_guest: true };
                    marks.send_modify(|marks| marks.take(&event));
                    // No subscriber is no error.
                    let _ = events.send(event);
                }
                Ok(QmpNotice::Disconnected) => return Control::Closed,
                Err(RecvError::Closed) => return Control::Unused,
                Err(RecvError::Lagged(lost)) => tracing::warn!(lost, "QEMU events lost"),
            }
        }
    }

    /// How the keeper ended, which is how QEMU did; empty if it was not our child.
    async fn keeper_ended(&mut self) -> String {
        if tokio::time::timeout(KEEPER_DEADLINE, self.keeper.gone()).await.is_err() {
            tracing::warn!(vm_id = %self.vm, keeper = self.keeper.pid(), "the keeper does not end; it is killed");
            if let Err(error) = self.keeper.kill() {
                tracing::error!(vm_id = %self.vm, error = %error, "the keeper could not be killed");
                return String::new();
            }
        }
        match self.child.take() {
            Some(mut child) => child.wait().await.map(|status| status.to_string()).unwrap_or_default(),
            None => String::new(),
        }
    }

    async fn report(mut self, guest_shut_down: bool) {
        let status = self.keeper_ended().await;
        let cause = if super::keeper::expired(&self.paths).is_some() {
            ExitCause::LeaseExpired
        } else if self.end_ordered.load(Ordering::SeqCst) {
            ExitCause::Ordered
        } else if guest_shut_down {
            ExitCause::GuestShutdown
        } else {
            ExitCause::Unexpected
        };
        let report = ExitReport { cause, status, log_tail: process::log_tail(&self.paths) };
        remove_leftovers(&self.paths).await;
        tracing::info!(vm_id = %self.vm, ?cause, status = report.status, "QEMU ended");
        let qemu = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at = EventTime { received: Instant::now(), qemu };
        self.exit.send_replace(Some(report.clone()));
        let event = VmEvent { at, kind: VmEventKind::Exited(report) };
        self.marks.send_modify(|marks| marks.take(&event));
        let _ = self.events.send(event);
    }
}

impl Marks {
    fn take(&mut self, event: &VmEvent) {
        match &event.kind {
            VmEventKind::Stopped => self.stopped = Some(event.at),
            VmEventKind::Resumed => self.resumed = Some(event.at),
            VmEventKind::Migration(status) => self.migration = Some(*status),
            VmEventKind::MigrationPass(pass) => self.migration_pass = *pass,
            VmEventKind::Exited(_) => self.ended = true,
            _ => {}
        }
    }
}
