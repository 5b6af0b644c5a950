//! Fences through real controllers, with scripted workers and an agent that is a shell script; and the agent for IPMI.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageport_controller::config::LogLimits;
use pageport_controller::fence::FenceConfig;
use pageport_controller::fence::agent::{Action, run};
use pageport_controller::fence::config::Agent;
use pageport_proto::v1::fence_worker_response::Phase;
use pageport_proto::v1::fleet_service_client::FleetServiceClient;
use pageport_proto::v1::{self, ReplicaState, VmState, takeover};
use support::{Cluster, define, eventually, request_id, within, worker};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// Notes each run, does not end while the file `hold` is there, fails while `broken` is.
const AGENT: &str = r#"#!/bin/sh
echo "$@" >> "$0.runs"
while [ -e "$0.hold" ]; do sleep 0.05; done
if [ -e "$0.broken" ]; then echo "no route to the BMC" >&2; exit 1; fi
echo "power is off"
"#;

struct Lab {
    cluster: Cluster,
    board: worker::Shared,
    node: u64,
    lost: JoinHandle<()>,
    agent: PathBuf,
    _folder: tempfile::TempDir,
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

impl Lab {
    /// A VM runs at `a`, keeps running, and is seeded to `b`; an agent can turn `worker-a` off.
    async fn start(after_silence: Option<Duration>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        script(&path, AGENT);
        let agent = Agent {
            name: "switch".into(),
            workers: ["worker-a".parse().unwrap()].into(),
            command: vec![path.to_str().unwrap().into()],
            time_limit: Duration::from_secs(30),
        };
        let cluster =
            Cluster::with_agents(LogLimits::default(), FenceConfig { agents: vec![agent], after_silence }).await;
        let board = worker::Shared::default();
        let lost = worker::start(&cluster, "worker-a", "a", &board);
        worker::start(&cluster, "worker-b", "b", &board);
        let node = cluster.a_follower().await;
        let lab = Self { cluster, board, node, lost, agent: path, _folder: folder };
        lab.cluster.both_sites(node).await;
        lab.fleet().define_vm(define("web", "a")).await.unwrap();
        lab.fleet().start_vm(v1::StartVmRequest { request_id: request_id(), vm: "web".into() }).await.unwrap();
        lab.vm_until(|vm| vm.state() == VmState::Running).await;
        let seed = v1::SeedReplicaRequest { request_id: request_id(), vm: "web".into(), to_site: "b".into() };
        lab.cluster.replication(node).seed_replica(seed).await.unwrap();
        lab.vm_until(|vm| vm.replicas.iter().any(|replica| replica.state() == ReplicaState::Seeded)).await;
        lab
    }

    fn fleet(&self) -> FleetServiceClient<tonic::transport::Channel> {
        self.cluster.fleet(self.node)
    }

    async fn vm_until(&self, wanted: impl Fn(&v1::Vm) -> bool) -> v1::Vm {
        eventually("the VM to get there", async || {
            let answer = self.fleet().get_vm(v1::GetVmRequest { vm: "web".into() }).await.ok()?;
            answer.into_inner().vm.filter(|vm| wanted(vm))
        })
        .await
    }

    async fn lose(&self) {
        self.lost.abort();
        self.vm_until(|vm| vm.state() == VmState::Unknown).await;
    }

    /// Has the order taken, as soon as the leader has been in office for long enough.
    async fn order(
        &self,
        request: v1::FenceWorkerRequest,
    ) -> Result<tonic::Streaming<v1::FenceWorkerResponse>, Status> {
        loop {
            match self.fleet().fence_worker(request.clone()).await {
                Err(status) if status.message().contains("may not have heard") => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                answer => return answer.map(|stream| stream.into_inner()),
            }
        }
    }

    /// Gives all that was told, or why the order was not taken or the stream broke.
    async fn fence(&self, request: v1::FenceWorkerRequest) -> Result<Vec<v1::FenceWorkerResponse>, Status> {
        within("the end of the fence", async {
            let mut stream = self.order(request).await?;
            let mut told = vec![];
            while let Some(next) = stream.message().await? {
                told.push(next);
            }
            Ok(told)
        })
        .await
    }

    fn flag(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}.{name}", self.agent.display()))
    }

    fn agent_runs(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.flag("runs")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn set_running_at(&self) -> Vec<String> {
        self.board.lock().unwrap().runs.iter().map(|(_, worker)| worker.clone()).collect()
    }
}

fn off() -> v1::FenceWorkerRequest {
    v1::FenceWorkerRequest {
        request_id: request_id(),
        worker: "worker-a".into(),
        action: v1::fence_worker_request::Action::Off.into(),
        confirm_name: "worker-a".into(),
        reason: "no heartbeat".into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_keeps_running_is_taken_over_on_the_agents_word_and_not_without_it() {
    let lab = Lab::start(None).await;
    for (request, code, part) in [
        (off(), Code::FailedPrecondition, "is connected"),
        (v1::FenceWorkerRequest { worker: "worker-b".into(), ..off() }, Code::FailedPrecondition, "no fence agent"),
        (v1::FenceWorkerRequest { worker: "worker-x".into(), ..off() }, Code::NotFound, "worker-x"),
        (v1::FenceWorkerRequest { confirm_name: "worker-b".into(), ..off() }, Code::InvalidArgument, "worker-b"),
        (v1::FenceWorkerRequest { reason: " ".into(), ..off() }, Code::InvalidArgument, "reason"),
    ] {
        let refused = lab.fence(request).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(part), "{refused}");
    }
    let stranger = support::dial(&lab.cluster.worker_identity("worker-b"), &lab.cluster.addresses()[0]);
    let refused = FleetServiceClient::new(stranger).fence_worker(off()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(lab.agent_runs().is_empty());
    let check = v1::FenceWorkerRequest { action: v1::fence_worker_request::Action::Check.into(), ..off() };
    let checked = lab.fence(check).await.unwrap();
    assert_eq!((checked[1].phase(), checked[1].agent_output.as_str()), (Phase::Done, "power is off"));
    assert_eq!(lab.agent_runs(), ["status worker-a a"]);

    lab.lose().await;
    std::fs::write(lab.flag("broken"), "").unwrap();
    let failed = lab.fence(off()).await.unwrap();
    let last = failed.last().unwrap();
    assert_eq!(last.phase(), Phase::Failed);
    assert!(last.problem.contains("\"switch\"") && last.problem.contains("no route to the BMC"), "{last:?}");
    let vm = lab.vm_until(|_| true).await;
    assert!(vm.owner_worker == "worker-a" && vm.takeovers.is_empty(), "{vm:?}");

    std::fs::remove_file(lab.flag("broken")).unwrap();
    let request = off();
    let done = lab.fence(request.clone()).await.unwrap();
    let last = done.last().unwrap();
    assert_eq!((last.phase(), last.agent_output.as_str()), (Phase::Done, "power is off"));
    assert!(last.vms[0].taken_over && last.vms[0].to_worker == "worker-b", "{last:?}");
    let vm = lab.vm_until(|vm| vm.state() == VmState::Running && vm.owner_worker == "worker-b").await;
    let [taken] = &vm.takeovers[..] else { panic!("{vm:?}") };
    assert_eq!((taken.ground(), taken.agent.as_str()), (takeover::Ground::Fenced, "switch"));
    assert_eq!(taken.operator, "operator.pageport");
    assert!(taken.reason.contains("no heartbeat") && taken.reason.contains("power is off"), "{taken:?}");
    assert_eq!(lab.set_running_at(), ["worker-a", "worker-b"]);

    // The same request once more is answered as before, without another run.
    let runs = lab.agent_runs();
    assert_eq!(lab.fence(request).await.unwrap().last(), Some(last));
    assert_eq!(lab.agent_runs(), runs);

    // Who comes back is no longer the owner, and says so.
    let back = worker::start(&lab.cluster, "worker-a", "a", &lab.board);
    lab.vm_until(|vm| vm.replicas.iter().any(|replica| replica.state() == ReplicaState::Outdated)).await;
    assert_eq!(lab.set_running_at(), ["worker-a", "worker-b"]);
    back.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_leader_while_the_agent_runs_voids_its_word_and_the_next_order_runs_it_again() {
    let mut lab = Lab::start(None).await;
    lab.lose().await;
    std::fs::write(lab.flag("hold"), "").unwrap();
    let request = off();
    let leader = lab.cluster.leader().await;
    let mut stream = within("the order", lab.order(request.clone())).await.unwrap();
    eventually("the agent", async || (!lab.agent_runs().is_empty()).then_some(())).await;
    lab.cluster.stop(leader).await;
    let broken = within("the end of the stream", async {
        loop {
            match stream.message().await {
                Ok(Some(told)) => assert_eq!(told.phase(), Phase::Agent, "{told:?}"),
                ended => return ended,
            }
        }
    })
    .await;
    assert!(!matches!(broken, Ok(Some(_))), "{broken:?}");
    lab.node = lab.cluster.leader().await;
    std::fs::remove_file(lab.flag("hold")).unwrap();
    let vm = lab.vm_until(|vm| vm.state() == VmState::Unknown).await;
    assert!(vm.owner_worker == "worker-a" && vm.takeovers.is_empty(), "{vm:?}");
    let done = lab.fence(request).await.unwrap();
    assert_eq!(done.last().unwrap().phase(), Phase::Done, "{done:?}");
    assert_eq!(lab.agent_runs(), ["off worker-a a", "off worker-a a"]);
    lab.vm_until(|vm| vm.state() == VmState::Running && vm.owner_worker == "worker-b").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_silent_for_long_enough_is_fenced_unasked() {
    let lab = Lab::start(Some(Duration::from_secs(7))).await;
    assert!(lab.agent_runs().is_empty());
    lab.lose().await;
    let vm = lab.vm_until(|vm| vm.state() == VmState::Running && vm.owner_worker == "worker-b").await;
    let [taken] = &vm.takeovers[..] else { panic!("{vm:?}") };
    assert_eq!((taken.ground(), taken.operator.as_str()), (takeover::Ground::Fenced, ""));
    assert!(taken.reason.contains("had been silent for"), "{taken:?}");
    assert_eq!(lab.agent_runs(), ["off worker-a a"]);
}

/// Notes what it is asked. `chassis power off` takes effect when the file `stubborn` is not there.
const IPMITOOL: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked"
if [ -e "$here/dead" ]; then echo "Error: Unable to establish IPMI v2 / RMCP+ session" >&2; exit 1; fi
case "$*" in
    *"chassis power off") [ -e "$here/stubborn" ] || touch "$here/is-off"; echo "Chassis Power Control: Down/Off" ;;
    *"chassis power status") if [ -e "$here/is-off" ]; then echo "Chassis Power is off"; else echo "Chassis Power is on"; fi ;;
    *) exit 2 ;;
esac
"#;

#[tokio::test]
async fn the_ipmi_agent_promises_only_what_the_bmc_confirms() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    script(&at("ipmitool"), IPMITOOL);
    std::fs::write(at("secret"), "geheim").unwrap();
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/fence/ipmi.sh");
    let (agent, here) = (agent.to_str().unwrap(), folder.path().to_str().unwrap());
    let path = format!("PATH={here}:/usr/bin:/bin");
    let command = ["/usr/bin/env", &path, agent, "--folder", here, "--within-seconds", "1"];
    let agent = Agent {
        name: "ipmi".into(),
        workers: ["a1".parse().unwrap()].into(),
        command: command.map(str::to_owned).to_vec(),
        time_limit: Duration::from_secs(30),
    };
    let ask = async |action| {
        let answer = run(&agent, action, &"a1".parse().unwrap(), &"a".parse().unwrap()).await;
        answer.map_err(|error| error.to_string())
    };
    assert!(ask(Action::Status).await.unwrap_err().contains("a1.conf is missing"));
    let config = |text: &str| std::fs::write(at("a1.conf"), text).unwrap();
    config("host=192.0.2.9\nuser=fence\npasswort=x\n");
    assert!(ask(Action::Status).await.unwrap_err().contains("key passwort is unknown"));
    config("host=192.0.2.9\nuser=fence\n");
    assert!(ask(Action::Off).await.unwrap_err().contains("password_file"));
    assert!(!at("asked").exists(), "nothing is asked before the configuration is whole");

    config(&format!("# the BMC\nhost=192.0.2.9\nuser=fence\npassword_file={here}/secret"));
    assert_eq!(ask(Action::Status).await, Ok("on".into()));
    std::fs::write(at("stubborn"), "").unwrap();
    let refused = ask(Action::Off).await.unwrap_err();
    assert!(refused.contains("did not say \"off\" within 1 s"), "{refused}");
    std::fs::remove_file(at("stubborn")).unwrap();
    for _ in 0..2 {
        assert_eq!(ask(Action::Off).await, Ok("the BMC 192.0.2.9 says that a1 is off".into()));
    }
    assert_eq!(ask(Action::Status).await, Ok("off".into()));
    let asked = std::fs::read_to_string(at("asked")).unwrap();
    assert!(asked.lines().all(|line| line.starts_with("-I lanplus -H 192.0.2.9 -U fence -f /")), "{asked}");
    assert!(!asked.contains("geheim"));
    std::fs::write(at("dead"), "").unwrap();
    let refused = ask(Action::Off).await.unwrap_err();
    assert!(refused.contains("Unable to establish"), "{refused}");
}
