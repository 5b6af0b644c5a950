//! [`Stakes`]: what each worker has to do with, kept up to date, so that nobody looks through the whole fleet for one worker, and
//! whoever a change does not concern is not woken by it.
//!
//! ```text
//!   published state ──▶ what changed ──▶ index: worker ─▶ VMs, moves ──▶ assignment of one worker
//!                                  └───▶ bells of those it concerns ──▶ their streams
//! ```
//! | what changed | who is woken |
//! |---|---|
//! | a VM | workers that had or have to do with it |
//! | a move, a worker, the links, what the scheduler is told, the generation | everyone: it may change addresses and rates |
//!
//! Guarantees: an assignment is of the newest state that is published, and never of an older one than another before it.
//!
//! A VM's change can also change what is left of a link for the replication of others: they hear of it with their next sign of life.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use pageport_proto::v1;
use pageport_proto::{MigrationId, SiteName, VmId, WorkerName};
use tokio::sync::{Notify, watch};

use super::assignment::{assignment_of, parties};
use super::budget;
use crate::model::{Migration, State};

/// By link, in bits per second; 0: no cap.
type Caps = BTreeMap<(SiteName, SiteName), u64>;

/// See the module.
#[derive(Debug)]
pub struct Stakes {
    states: watch::Receiver<Arc<State>>,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    state: Arc<State>,
    /// Of this state, once somebody has asked.
    caps: Arc<OnceLock<Caps>>,
    vms: BTreeMap<WorkerName, BTreeSet<VmId>>,
    migrations: BTreeMap<WorkerName, BTreeSet<MigrationId>>,
    bells: BTreeMap<WorkerName, Vec<Weak<Notify>>>,
}

impl Stakes {
    /// Follows the published states until there are no more.
    pub fn follow(mut states: watch::Receiver<Arc<State>>) -> Arc<Self> {
        let stakes = Arc::new(Self::of(states.clone()));
        let follower = stakes.clone();
        tokio::spawn(async move {
            while states.changed().await.is_ok() {
                drop(follower.book());
            }
        });
        stakes
    }

    fn of(states: watch::Receiver<Arc<State>>) -> Self {
        Self { states, book: Mutex::default() }
    }

    /// What is known, brought up to date.
    fn book(&self) -> MutexGuard<'_, Book> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        // Only now: nobody else has put a newer one in since.
        let state = self.states.borrow().clone();
        if !Arc::ptr_eq(&state, &book.state) {
            book.take(state);
        }
        book
    }

    /// Rings when there may be news for a worker, as long as it is held.
    pub fn bell(&self, worker: &WorkerName) -> Arc<Notify> {
        let bell = Arc::new(Notify::new());
        let mut book = self.book();
        let bells = book.bells.entry(worker.clone()).or_default();
        bells.retain(|bell| bell.strong_count() > 0);
        bells.push(Arc::downgrade(&bell));
        bell
    }

    /// What a worker should do. `seq` and `term` are left for the sender.
    pub fn assignment(&self, worker: &WorkerName) -> v1::WorkerAssignment {
        let (state, caps, vms, migrations) = {
            let book = self.book();
            let vms = book.vms.get(worker).cloned().unwrap_or_default();
            let migrations = book.migrations.get(worker).cloned().unwrap_or_default();
            (book.state.clone(), book.caps.clone(), vms, migrations)
        };
        let cap_bps = |to: &SiteName| {
            let from = state.site_of(worker)?;
            caps.get_or_init(|| all_caps(&state)).get(&(from.clone(), to.clone())).copied()
        };
        let vms = vms.iter().filter_map(|id| Some((*id, state.vms.get(id)?)));
        let migrations = migrations.iter().filter_map(|id| state.migrations.get(id));
        assignment_of(&state, worker, vms, migrations, |to| cap_bps(to).unwrap_or_default())
    }
}

fn all_caps(state: &State) -> Caps {
    let sites = state.sites();
    let links = sites.iter().flat_map(|from| sites.iter().filter(move |to| *to != from).map(move |to| (from, to)));
    links.map(|(from, to)| ((from.clone(), to.clone()), budget::replication_bps(state, from, to))).collect()
}

fn movers(migration: &Migration) -> [&WorkerName; 2] {
    [&migration.from.worker, &migration.to.worker]
}

impl Book {
    fn take(&mut self, state: Arc<State>) {
        let before = std::mem::replace(&mut self.state, state.clone());
        self.caps = Arc::default();
        let mut woken = BTreeSet::new();
        for (was, is) in state.vms.changed(&before.vms) {
            for (id, vm, holds) in
                [was.map(|(id, vm)| (id, vm, false)), is.map(|(id, vm)| (id, vm, true))].into_iter().flatten()
            {
                for worker in parties(vm) {
                    note(&mut self.vms, worker, *id, holds);
                    woken.insert(worker);
                }
            }
        }
        let migrations = state.migrations.changed(&before.migrations);
        for (was, is) in &migrations {
            for (migration, holds) in
                [was.map(|(_, it)| (it, false)), is.map(|(_, it)| (it, true))].into_iter().flatten()
            {
                movers(migration)
                    .into_iter()
                    .for_each(|worker| note(&mut self.migrations, worker, migration.id, holds));
            }
        }
        let everyone = !migrations.is_empty()
            || !state.workers.changed(&before.workers).is_empty()
            || state.links != before.links
            || state.schedule != before.schedule
            || state.generation != before.generation;
        let concerned = self.bells.iter().filter(|(worker, _)| everyone || woken.contains(worker));
        concerned.flat_map(|(_, bells)| bells).filter_map(Weak::upgrade).for_each(|bell| bell.notify_one());
    }
}

/// Puts an entry into a worker's, or takes it out.
fn note<T: Ord>(index: &mut BTreeMap<WorkerName, BTreeSet<T>>, worker: &WorkerName, entry: T, holds: bool) {
    if holds {
        index.entry(worker.clone()).or_default().insert(entry);
    } else if let Some(entries) = index.get_mut(worker) {
        entries.remove(&entry);
        if entries.is_empty() {
            index.remove(worker);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::assignment::assignment;
    use super::*;
    use crate::model::command::ClientOrder;
    use crate::model::state::{Power, Worker};
    use crate::model::{Command, Order, Spec, apply};
    use pageport_proto::RequestId;
    use pageport_proto::v1::{DiskSpec, VmSpec};
    use tokio::time::{Duration, timeout};

    const WORKERS: [&str; 3] = ["w1", "w2", "w3"];

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    struct Story {
        state: State,
        published: watch::Sender<Arc<State>>,
        stakes: Stakes,
    }

    impl Story {
        /// A worker at each of three sites.
        fn new() -> Self {
            let published = watch::Sender::default();
            let stakes = Stakes::of(published.subscribe());
            let mut story = Self { state: State::default(), published, stakes };
            for name in WORKERS {
                let site = name.replace('w', "s").parse().unwrap();
                story.order(Order::RegisterWorker { name: worker(name), worker: Worker::at(site) });
            }
            story
        }

        /// Whatever is ordered, each worker is told what a look at the whole fleet would find.
        fn order(&mut self, order: Order) {
            apply(&mut self.state, Command { now_unix_ms: 1, order }).unwrap();
            self.published.send_replace(Arc::new(self.state.clone()));
            for name in WORKERS.map(worker) {
                assert_eq!(self.stakes.assignment(&name), assignment(&self.state, &name));
            }
        }

        fn client(&mut self, order: ClientOrder) {
            self.order(Order::Client { request: RequestId::generate(), order });
        }

        fn define(&mut self, name: &str, at: &str) -> VmId {
            let disk = DiskSpec { name: "root".into(), path: "/d".into(), ..DiskSpec::default() };
            let spec =
                VmSpec { name: name.into(), memory_bytes: 1 << 30, vcpus: 1, disks: vec![disk], ..VmSpec::default() };
            let (id, spec) = (VmId::generate(), Box::new(Spec::try_from(spec).unwrap()));
            self.client(ClientOrder::DefineVm { id, spec, worker: worker(at) });
            id
        }
    }

    #[tokio::test]
    async fn whom_a_change_concerns_is_woken_and_told_what_the_whole_state_says() {
        let mut story = Story::new();
        let bells = WORKERS.map(|name| story.stakes.bell(&worker(name)));
        let rung = async || {
            let mut rung = vec![];
            for (name, bell) in WORKERS.iter().zip(&bells) {
                if timeout(Duration::ZERO, bell.notified()).await.is_ok() {
                    rung.push(*name);
                }
            }
            rung
        };
        let vm = story.define("web", "w1");
        assert_eq!(rung().await, ["w1"]);
        story.define("db", "w3");
        assert_eq!(rung().await, ["w3"]);
        story.client(ClientOrder::SeedReplica { vm, site: "s2".parse().unwrap(), worker: worker("w2") });
        assert_eq!(rung().await, ["w1", "w2"]);
        story.client(ClientOrder::SetPower { vm, power: Power::Run });
        assert_eq!(rung().await, ["w1", "w2"]);
        let cap =
            ClientOrder::SetLinkCap { from: "s1".parse().unwrap(), to: "s2".parse().unwrap(), cap_bps: 9_000_000 };
        story.client(cap);
        assert_eq!(rung().await, WORKERS, "a link's cap is for everyone");
        assert_eq!(story.stakes.assignment(&worker("w1")).seeds[0].cap_bps, 9_000_000);
        story.client(ClientOrder::DeleteReplica { vm, site: "s2".parse().unwrap() });
        story.order(Order::ReplicaRemoved { vm, site: "s2".parse().unwrap() });
        assert_eq!(rung().await, ["w1", "w2"], "also those that had to do with it");
        story.client(ClientOrder::SetPower { vm, power: Power::Stop });
        assert_eq!(rung().await, ["w1"]);
        story.client(ClientOrder::DeleteVm { vm });
        story.order(Order::ForgetVm { vm });
        assert_eq!(story.stakes.assignment(&worker("w1")).vms, []);
    }
}
