//! Quotes: what a move of a running VM would take, forecast without moving anything.
//!
//! ```text
//!   order ─▶ round trip, probe of the path ─▶ sample of the memory ─▶ dirty rate ─▶ estimate (pure) ─▶ report
//! ```
//! One thing after the other, so that none disturbs the next. The newest quote of a VM is kept for an hour, so that the record of a move has
//! forecast and actual side by side. Quotes live in memory: a worker that restarts has none.

mod estimate;
mod sample;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageport_proto::VmId;
use pageport_proto::v1::{Quote, QuoteAssignment, QuoteReport, VmSpec};
use tokio::sync::Notify;

use crate::clock::unix_ms_now;
use crate::hypervisor::HypervisorError;
use crate::node::Node;
use crate::questions::Questions;
use crate::transport::TransportError;
use crate::transport::probe::{ProbeError, probe};
use crate::vms::VmError;
use estimate::{Facts, estimate};

/// An older quote is of another time.
const KEPT_MS: i64 = 3600 * 1000;

/// Why there is no quote.
#[derive(Debug, thiserror::Error)]
enum QuoteError {
    #[error("the worker does not know the vm: it has moved")]
    Unknown,
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("reach worker {peer}")]
    Connect {
        peer: String,
        #[source]
        source: TransportError,
    },
    #[error("try the link to worker {peer}")]
    Probe {
        peer: String,
        #[source]
        source: ProbeError,
    },
    #[error("the link to worker {peer} took next to nothing for a second: is it up, and free?")]
    Narrow { peer: String },
    #[error("look at the guest's memory")]
    Sample(#[source] std::io::Error),
    #[error("look at the guest")]
    Hypervisor(#[from] HypervisorError),
}

/// The quotes that were asked for, and the newest of each VM and worker.
#[derive(Debug)]
pub struct Quotes {
    asked: Questions<QuoteReport>,
    newest: Mutex<HashMap<(VmId, String), Quote>>,
}

impl Quotes {
    /// None; `changed` is notified when a report would differ.
    pub fn new(changed: Arc<Notify>) -> Self {
        Self { asked: Questions::new(changed), newest: Mutex::default() }
    }

    /// Answers what is asked, each once, and forgets what is no longer asked.
    pub fn follow(&self, node: &Arc<Node>, orders: &[QuoteAssignment], spec_of: impl Fn(&str) -> Option<VmSpec>) {
        for order in self.asked.take(orders, |order| order.seq) {
            tokio::spawn(answer(node.clone(), order.clone(), spec_of(&order.vm_id)));
        }
    }

    /// The answers to what is asked.
    pub fn reports(&self) -> Vec<QuoteReport> {
        self.asked.answers()
    }

    /// The newest quote of a move to this worker, if it is recent.
    pub fn newest(&self, vm: VmId, peer: &str) -> Option<Quote> {
        let newest = lock(&self.newest).get(&(vm, peer.to_owned())).cloned();
        newest.filter(|quote| unix_ms_now() - quote.taken_unix_ms < KEPT_MS)
    }

    /// Forgets those of a VM that has left.
    pub fn forget(&self, vm: VmId) {
        lock(&self.newest).retain(|(of, _), _| *of != vm);
    }
}

fn lock<T>(held: &Mutex<T>) -> MutexGuard<'_, T> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(node: Arc<Node>, order: QuoteAssignment, spec: Option<VmSpec>) {
    let report = match quote(&node, &order, spec).await {
        Ok((vm, quote)) => {
            lock(&node.quotes.newest).insert((vm, order.peer_worker.clone()), quote.clone());
            QuoteReport { seq: order.seq, quote: Some(quote), failure: String::new() }
        }
        Err(error) => {
            let failure = crate::error::with_causes(&error);
            tracing::warn!(vm_id = order.vm_id, to_site = order.to_site, failure, "no quote");
            QuoteReport { seq: order.seq, quote: None, failure }
        }
    };
    node.quotes.asked.answer(order.seq, report);
}

async fn quote(node: &Node, order: &QuoteAssignment, spec: Option<VmSpec>) -> Result<(VmId, Quote), QuoteError> {
    let spec = spec.ok_or(QuoteError::Unknown)?;
    let vm = order.vm_id.parse().ok().and_then(|id: VmId| node.vms.get(id)).ok_or(QuoteError::Unknown)?;
    let qemu = vm.qemu().await?;
    let peer = &order.peer_worker;
    let connecting = node.endpoint.connect(peer, &order.peer_address).await;
    let connection = connecting.map_err(|source| QuoteError::Connect { peer: peer.clone(), source })?;
    let round_trip = connection.round_trip();
    let probed = probe(&connection).await;
    connection.close("the path was tried");
    let link_bytes_per_s = probed.map_err(|source| QuoteError::Probe { peer: peer.clone(), source })?;
    if link_bytes_per_s == 0 {
        return Err(QuoteError::Narrow { peer: peer.clone() });
    }
    let view = node.views.of(vm.id(), peer).await;
    let ram = qemu.ram(spec.memory_bytes).await?;
    let sampling = tokio::task::spawn_blocking(move || sample::take(&ram, &view, &mut rand::rng()));
    let clusters = sampling.await.map_err(std::io::Error::other).flatten().map_err(QuoteError::Sample)?;
    let quote = estimate(&Facts {
        memory_bytes: spec.memory_bytes,
        clusters: &clusters,
        dirty_bytes_per_s: qemu.dirty_rate().await?,
        disk_lag_bytes: node.replications.lag_bytes(vm.id(), &order.to_site),
        link_bytes_per_s,
        round_trip,
    });
    let (vm_id, to_site) = (order.vm_id.clone(), order.to_site.clone());
    Ok((vm.id(), Quote { vm_id, to_site, taken_unix_ms: unix_ms_now(), ..quote }))
}
