//! [`Model`]: the same fleet as a state of this process, made by the controllers' own functions, and what is measured of it: planning an
//! evacuation, and a snapshot.
//!
//! ```text
//!   orders ─▶ apply ─▶ state ─▶ assignment of each worker ─▶ its report ─▶ observations ─▶ reconcile ─▶ orders ─▶ ...
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageport_controller::consensus::snapshot::{self, Snapshot};
use pageport_controller::link::assignment::assignment;
use pageport_controller::link::drain::emptying;
use pageport_controller::link::fleet::decisions;
use pageport_controller::link::observation::{Observations, Observed};
use pageport_controller::link::reconcile::{Now, reconcile};
use pageport_controller::link::scheduling::schedule;
use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::schedule::Spot;
use pageport_controller::model::state::Power;
use pageport_controller::model::{Command, Order, Spec, State, apply};
use pageport_proto::{MigrationId, RequestId, StoreId, VmId, WorkerName};

use super::size::{EVACUATED, vm_spec};
use super::{BenchError, Size, worker};
use crate::lab::network::SITES;
use crate::paths;

/// Times that something is measured: the median counts.
const REPEATS: usize = 5;
/// The model's time, in milliseconds since 1970.
const NOW_UNIX_MS: i64 = 1_750_000_000_000;
const PRIORITY: u8 = 50;

/// See the module.
#[derive(Debug)]
pub struct Model {
    size: Size,
    state: State,
    observations: Observations,
    /// When everybody last reported; its time stands still then.
    now: tokio::time::Instant,
    /// Of each site.
    workers: BTreeMap<&'static str, Vec<(WorkerName, StoreId)>>,
}

impl Model {
    /// A fleet whose workers have reported that all is as it was ordered.
    #[must_use]
    pub fn new(size: Size) -> Self {
        let named = |site| size.workers_at(site).filter_map(|name| Some((name.parse().ok()?, StoreId::generate())));
        let workers = SITES.map(|site| (site, named(site).collect())).into();
        let (state, observations, now) = (State::default(), Observations::default(), tokio::time::Instant::now());
        let mut model = Self { size, state, observations, now, workers };
        model.settle();
        let ids: Vec<VmId> = (0..size.vms).filter_map(|vm| model.define(vm)).collect();
        model.settle();
        for (n, (vm, to)) in size.leavers().enumerate() {
            let Ok(site) = to.parse() else { continue };
            let worker = model.worker(to, n / 2);
            model.client(ClientOrder::SetPower { vm: ids[vm], power: Power::Run });
            model.client(ClientOrder::SeedReplica { vm: ids[vm], site, worker });
        }
        model.settle();
        model
    }

    fn worker(&self, site: &str, number: usize) -> WorkerName {
        let there = &self.workers[site];
        there[number % there.len()].0.clone()
    }

    fn order(&mut self, order: Order) {
        // What is refused shows in the plan.
        let _ = apply(&mut self.state, Command { now_unix_ms: NOW_UNIX_MS, order });
    }

    fn client(&mut self, order: ClientOrder) {
        self.order(Order::Client { request: RequestId::generate(), order });
    }

    fn define(&mut self, vm: usize) -> Option<VmId> {
        let (id, spec) = (VmId::generate(), Box::new(Spec::try_from(vm_spec(vm)).ok()?));
        let worker = self.worker(Size::site_of(vm), vm / 5);
        self.client(ClientOrder::DefineVm { id, spec, worker });
        Some(id)
    }

    /// Workers report, and what they say is recorded, until there is nothing left to record.
    fn settle(&mut self) {
        loop {
            self.now = tokio::time::Instant::now();
            for (site, workers) in &self.workers {
                for (name, store) in workers {
                    let told = assignment(&self.state, name);
                    let report = Arc::new(worker::report(name.as_str(), site, *store, &told));
                    let assigned = Some(Arc::new(told));
                    let observed = Observed { report, at: self.now, at_unix_ms: NOW_UNIX_MS, assigned };
                    self.observations.put(name.clone(), observed);
                }
            }
            let orders = reconcile(&self.state, &self.observations, self.now());
            if orders.is_empty() {
                return;
            }
            orders.into_iter().for_each(|order| self.order(order));
        }
    }

    /// Time to plan the evacuation of a fifth of the VMs: who goes where, and, once all moves are queued, which begin now.
    ///
    /// # Errors
    /// When the plan is not one for all.
    pub fn plan(&mut self) -> Result<Duration, BenchError> {
        let Ok(site) = EVACUATED.parse() else {
            return Err(BenchError::Unknown { what: "the site that is evacuated" });
        };
        let spot = Spot::Site(site);
        self.client(ClientOrder::Drain { spot: spot.clone(), to: None, priority: PRIORITY });
        let missing = BenchError::Unknown { what: "whether the site is drained" };
        let drain = self.state.schedule.drain(&spot).cloned().ok_or(missing)?;
        let destinations = || emptying(&self.state, &self.observations, &spot, &drain, self.now, NOW_UNIX_MS).plan;
        let plan = destinations();
        if plan.leave.len() != self.size.evacuated() {
            let why = plan.stay.first().map(|stay| stay.why.clone()).unwrap_or_default();
            return Err(BenchError::Plan { expected: self.size.evacuated(), planned: plan.leave.len(), why });
        }
        let placing = median_time(destinations);
        self.queue();
        let deciding = median_time(|| decisions(&self.state, &self.observations, self.now, NOW_UNIX_MS));
        Ok(placing + deciding)
    }

    /// Orders all that leave to do so, and lets none begin: all are to be decided on.
    fn queue(&mut self) {
        loop {
            let orders = schedule(&self.state, &self.observations, self.now(), MigrationId::generate);
            let queued: Vec<_> = orders.into_iter().filter(|it| matches!(it, Order::QueueDrain { .. })).collect();
            if queued.is_empty() {
                return;
            }
            queued.into_iter().for_each(|order| self.order(order));
        }
    }

    fn now(&self) -> Now {
        Now { instant: self.now, unix_ms: NOW_UNIX_MS, older_leases_out: Duration::ZERO }
    }

    /// Time to make a snapshot of the state, synced, and its bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn snapshot(&self) -> Result<(Duration, usize), BenchError> {
        std::fs::create_dir_all(paths::lab()).map_err(BenchError::Folder)?;
        let folder = tempfile::tempdir_in(paths::lab()).map_err(BenchError::Folder)?;
        let snapshot = Snapshot { index: 1, term: 1, membership: None, state: self.state.clone() };
        let mut taken = vec![];
        let mut size = 0;
        for _ in 0..REPEATS {
            let begin = Instant::now();
            let bytes = snapshot::encode(&snapshot)?;
            snapshot::replace(folder.path(), &bytes)?;
            taken.push(begin.elapsed());
            size = bytes.len();
        }
        Ok((median(taken), size))
    }
}

fn median_time<T>(work: impl Fn() -> T) -> Duration {
    let timed = |_| {
        let begin = Instant::now();
        drop(work());
        begin.elapsed()
    };
    median((0..REPEATS).map(timed).collect())
}

/// The middle one; nothing of none.
pub fn median(mut taken: Vec<Duration>) -> Duration {
    taken.sort_unstable();
    taken.get(taken.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_is_planned_whole_and_its_snapshot_grows_with_it() {
        let [mut small, large] = [30, 60].map(|vms| Model::new(Size { workers: 6, vms }));
        let bytes = |model: &Model| model.snapshot().map(|(_, bytes)| bytes).unwrap_or_default();
        assert!(bytes(&small) > 10_000 && bytes(&large) > bytes(&small) * 3 / 2);
        assert!(small.plan().is_ok());
        assert_eq!(small.state.migrations.len(), 6);
    }
}
