//! Orders: VMs are defined, started, stopped, copied, moved; requests whose outcome is unknown are repeated under the same id.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use pageport_controller::model::command::ClientOrder;
use pageport_controller::model::state::{Life, Power, Vm};
use pageport_controller::model::{Spec, State, takeover};
use pageport_ownership::Proof;
use pageport_proto::v1;
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};

use crate::calls::{Answer, Cluster, Question, ask};
use crate::invariant::Fact;
use crate::network::Endpoint;
use crate::worker::Host;
use crate::world::{Clock, World};

/// A VM's memory; nothing depends on it.
const MEMORY_BYTES: u64 = 256 << 20;

/// Who gives orders.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct Operator {
    /// The world.
    pub world: Rc<World>,
    /// Whom orders go to.
    pub cluster: Cluster,
    /// Where workers are.
    pub hosts: Vec<Rc<Host>>,
    /// Where the operator sits.
    pub endpoint: Endpoint,
    /// Orders are given until this is set.
    pub done: Cell<bool>,
    /// The controller that led last.
    pub leader: Cell<u64>,
    /// What was seen last.
    pub seen: RefCell<Arc<State>>,
}

impl Operator {
    /// Sets up VMs, then gives orders.
    pub async fn run(self: Rc<Self>, vms: u64) {
        // The first reports make workers known.
        for _ in 0..40 {
            Clock::WORLD.sleep(&self.world, Duration::from_millis(250)).await;
            if self.look().await.is_some_and(|state| state.workers.len() == self.hosts.len()) {
                break;
            }
        }
        for number in 0..vms {
            self.define(number).await;
        }
        while !self.done.get() {
            Clock::WORLD.sleep(&self.world, Duration::from_millis(self.world.between(50, 2500))).await;
            if let Some(state) = self.look().await {
                self.order(&state).await;
            }
        }
    }

    async fn look(&self) -> Option<Arc<State>> {
        let answer =
            ask(&self.world, &self.cluster, self.endpoint, Clock::WORLD, &self.leader, || Question::State).await;
        match answer {
            Some(Answer::State(state)) => {
                *self.seen.borrow_mut() = state.clone();
                Some(state)
            }
            _ => None,
        }
    }

    fn id<T: std::str::FromStr>(&self) -> Option<T> {
        uuid::Uuid::from_u128(u128::from(self.world.number())).to_string().parse().ok()
    }

    /// Gives one order, again and again until its outcome is known; true: it was taken.
    async fn tell(&self, what: &str, order: ClientOrder) -> bool {
        const TRIES: u32 = 8;
        let Some(request) = self.id::<RequestId>() else { return false };
        self.world.tell(&Fact::Asked { request, what });
        for _ in 0..TRIES {
            let question = || Question::Client(request, order.clone());
            let answer = ask(&self.world, &self.cluster, self.endpoint, Clock::WORLD, &self.leader, question).await;
            match answer {
                Some(Answer::Outcome(Ok(answer))) => {
                    self.world.tell(&Fact::Answered { request, answer: &answer });
                    return true;
                }
                Some(Answer::Outcome(Err(_))) => return false,
                _ => {}
            }
        }
        false
    }

    async fn define(&self, number: u64) {
        let (Some(id), Some(host)) = (self.id::<VmId>(), self.world.pick(&self.hosts)) else { return };
        let policy =
            if self.world.one_in(2) { v1::IsolationPolicy::SelfFence } else { v1::IsolationPolicy::KeepRunning };
        let spec = v1::VmSpec {
            name: format!("vm-{number}"),
            memory_bytes: MEMORY_BYTES,
            vcpus: 1,
            disks: vec![v1::DiskSpec {
                name: "root".into(),
                path: "/root.raw".into(),
                format: String::new(),
                ..Default::default()
            }],
            on_isolation: policy.into(),
            ..v1::VmSpec::default()
        };
        let Ok(spec) = Spec::try_from(spec) else { return };
        let order = ClientOrder::DefineVm { id, spec: Box::new(spec), worker: host.name.clone() };
        if self.tell("define", order).await {
            self.tell("start", ClientOrder::SetPower { vm: id, power: Power::Run }).await;
        }
    }

    async fn order(&self, state: &State) {
        let vms: Vec<(&VmId, &Vm)> = state.vms.iter().filter(|(_, vm)| vm.life == Life::Defined).collect();
        let Some((id, vm)) = self.world.pick(&vms).copied() else { return };
        let id = *id;
        let elsewhere = self.hosts.iter().filter(|host| Some(&host.site) != state.site_of_vm(vm));
        let elsewhere: Vec<&Rc<Host>> = elsewhere.collect();
        let Some(there) = self.world.pick(&elsewhere) else { return };
        let (site, worker) = (there.site.clone(), there.name.clone());
        let moving = vm.migration;
        match self.world.between(0, 11) {
            0..=2 => drop(self.tell("seed", ClientOrder::SeedReplica { vm: id, site, worker }).await),
            3..=7 => self.move_it(id, vm, site, worker).await,
            8 => {
                if let Some(id) = moving {
                    self.tell("cancel", ClientOrder::CancelMigration { id }).await;
                }
            }
            9 => {
                let power = if self.world.one_in(2) { Power::Stop } else { Power::Kill };
                self.tell("stop", ClientOrder::SetPower { vm: id, power }).await;
            }
            10 => drop(self.tell("start", ClientOrder::SetPower { vm: id, power: Power::Run }).await),
            _ => self.resolve(id, vm, state).await,
        }
    }

    async fn move_it(&self, vm: VmId, seen: &Vm, site: SiteName, worker: WorkerName) {
        if seen.power != Power::Run {
            self.tell("start", ClientOrder::SetPower { vm, power: Power::Run }).await;
        }
        if !seen.replicas.contains_key(&site) {
            self.tell("seed", ClientOrder::SeedReplica { vm, site, worker }).await;
            return;
        }
        let Some(id) = self.id::<MigrationId>() else { return };
        let order = ClientOrder::CreateMigration { id, vm, site, traceparent: String::new() };
        self.tell("move", order).await;
    }

    /// An operator's word, which is true: every host that may hold the VM is down, and is kept down until the order is settled.
    async fn resolve(&self, id: VmId, vm: &Vm, state: &State) {
        let holders = vm.ownership.possible_holders();
        let holding: Vec<&Rc<Host>> = self.hosts.iter().filter(|host| holders.contains(&&host.name)).collect();
        let down = |host: &&Rc<Host>| host.process().is_none() && host.hypervisors.vms().is_empty();
        if !holding.iter().all(down) {
            return;
        }
        let spare: Vec<&Rc<Host>> = self.hosts.iter().filter(|host| !holders.contains(&&host.name)).collect();
        let Some(heir) = self.world.pick(&spare) else { return };
        for host in &holding {
            host.locked_down.set(true);
        }
        let order = takeover::Order {
            vm: id,
            site: heir.site.clone(),
            worker: heir.name.clone(),
            last: vm.ownership.last(),
            proof: Proof::Override { who: "operator".to_owned(), reason: "its hosts are down".to_owned() },
            seen: format!("{} workers are known", state.workers.len()),
            ordered_by: None,
            point: None,
        };
        self.tell("resolve", ClientOrder::Resolve(order)).await;
        for host in holding {
            host.locked_down.set(false);
            host.start();
        }
    }
}
