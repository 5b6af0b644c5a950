//! From an assignment to tasks: one per replication of a VM that this worker owns.

use std::collections::HashMap;
use std::sync::Arc;

use pageport_proto::VmId;
use pageport_proto::v1::{ReplicationAssignment, WorkerAssignment};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::registry::Entry;
use super::scrub;
use super::source::{self, Wanted};
use crate::node::Node;

/// The tasks, by VM and site.
#[derive(Debug, Default)]
pub struct Replicators {
    running: HashMap<(VmId, String), Replicator>,
}

#[derive(Debug)]
struct Replicator {
    wanted: watch::Sender<Wanted>,
    entry: Arc<Entry>,
    task: JoinHandle<()>,
}

impl Replicators {
    /// Starts, changes and ends tasks as the assignment says. A task that is no longer named ends by itself, after the round
    /// that is under way has been undone.
    pub fn follow(&mut self, node: &Arc<Node>, assignment: &WorkerAssignment) {
        let named: HashMap<(VmId, String), Wanted> =
            assignment.replications.iter().filter_map(|order| wanted(assignment, order)).collect();
        for ((vm, site), withdrawn) in self.running.extract_if(|key, _| !named.contains_key(key)) {
            node.replications.end(vm, &site);
            tokio::spawn(withdrawn.end(node.clone(), vm));
        }
        for (key, wanted) in named {
            // At once, also for a round that is under way.
            node.caps.towards(&wanted.order.to_site).set(wanted.order.cap_bps);
            match self.running.get(&key) {
                Some(replicator) => replicator.change(wanted),
                None => drop(start(node, &key, wanted).map(|replicator| self.running.insert(key, replicator))),
            }
        }
    }
}

impl Replicator {
    /// Waits for the end of the task. What was known of the replica is of no use any more: it may be removed, or the VM has left.
    async fn end(self, node: Arc<Node>, vm: VmId) {
        let order = self.wanted.borrow().order.clone();
        let (peer, site) = (order.peer_worker, order.to_site);
        drop(self.wanted);
        if self.task.await.is_ok() {
            node.views.forget_peer(vm, &peer).await;
            tokio::task::block_in_place(|| scrub::forget(&node.records, vm, &site));
        }
    }

    fn change(&self, wanted: Wanted) {
        self.entry.set_seq(wanted.order.protect_seq);
        self.wanted.send_if_modified(|held| {
            let news = *held != wanted;
            *held = wanted;
            news
        });
    }
}

fn wanted(assignment: &WorkerAssignment, order: &ReplicationAssignment) -> Option<((VmId, String), Wanted)> {
    let vm: VmId = order.vm_id.parse().ok()?;
    let spec = assignment.vms.iter().find(|it| it.vm_id == order.vm_id)?.spec.clone()?;
    Some(((vm, order.to_site.clone()), Wanted { order: order.clone(), spec }))
}

fn start(node: &Arc<Node>, (vm_id, site): &(VmId, String), wanted: Wanted) -> Option<Replicator> {
    let vm = node.vms.get(*vm_id)?;
    let entry = node.replications.begin(*vm_id, site, wanted.order.protect_seq);
    let span = tracing::info_span!("replication", %vm_id, site);
    let (sender, receiver) = watch::channel(wanted);
    let task = tokio::spawn(source::run(node.clone(), vm, receiver, entry.clone()).instrument(span));
    Some(Replicator { wanted: sender, entry, task })
}
