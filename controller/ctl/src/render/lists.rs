//! What `list`, `get` and `status` show. Pure: messages and the present time in, text out.

use std::fmt::Write as _;

use pageport_proto::v1::{
    DeclareWorkerDeadResponse, DiskPlace, DiskSpec, DiskStatus, FoundVm, ListMigrationsResponse, ListReplicasResponse,
    ListSitesResponse, ListVmsResponse, ListWorkersResponse, Migration, MigrationState, Replica, Takeover, Vm, VmSpec,
};

use super::pools::site;
use super::table::Align::{Left, Right};
use super::table::Table;
use super::words::{or_dash, yes_no};
use super::{progress, units, words};

const LABEL_CELLS: usize = 12;
/// Of a migration that names no priority.
const USUAL_PRIORITY: u32 = 50;

/// `site list`
pub fn sites(response: &ListSitesResponse) -> String {
    let mut table = Table::new([("SITE", Left), ("REACHABLE", Left), ("VMS RUNNING", Right), ("WORKERS", Left)]);
    for site in &response.sites {
        let running = units::count(site.vms_running.into());
        table.row([site.name.clone(), yes_no(site.reachable).to_owned(), running, site.workers.join(", ")]);
    }
    table.render("no sites: no worker has ever connected")
}

/// `worker declare-dead`
pub fn declared_dead(worker: &str, response: &DeclareWorkerDeadResponse) -> String {
    let rest = match response.awaited_workers[..] {
        [] => "every VM is known".to_owned(),
        _ => format!(
            "{} VMs are unknown until these workers have reported: {}",
            response.vms_unknown,
            response.awaited_workers.join(", ")
        ),
    };
    format!("{worker} is not waited for any more; {rest}")
}

/// `worker list`
pub fn workers(response: &ListWorkersResponse, now_unix_ms: i64) -> String {
    let mut table = Table::new([
        ("WORKER", Left),
        ("SITE", Left),
        ("CONNECTED", Left),
        ("GUARDED", Left),
        ("LAST SEEN", Left),
        ("MEMORY", Right),
        ("ACCEL", Left),
        ("QEMU", Left),
        ("VERSION", Left),
        ("GRPC", Left),
        ("PEER", Left),
    ]);
    for worker in &response.workers {
        table.row([
            worker.name.clone(),
            worker.site.clone(),
            yes_no(worker.connected).to_owned(),
            yes_no(worker.guarded).to_owned(),
            units::ago(worker.last_seen_unix_ms, now_unix_ms),
            units::bytes(worker.memory_total_bytes),
            or_dash(&worker.accelerator).to_owned(),
            or_dash(&worker.qemu_version).to_owned(),
            or_dash(&worker.version).to_owned(),
            or_dash(&worker.grpc_address).to_owned(),
            or_dash(&worker.peer_address).to_owned(),
        ]);
    }
    table.render("no workers: none has ever connected")
}

/// `vm list`
pub fn vms(response: &ListVmsResponse) -> String {
    let mut table = Table::new([
        ("VM", Left),
        ("STATE", Left),
        ("SITE", Left),
        ("WORKER", Left),
        ("MEMORY", Right),
        ("VCPUS", Right),
        ("REPLICAS", Left),
        ("PROBLEM", Left),
    ]);
    let none = VmSpec::default();
    for vm in &response.vms {
        let spec = vm.spec.as_ref().unwrap_or(&none);
        let replica = |r: &Replica| format!("{} {}", r.site, words::replica_state(r.state));
        table.row([
            spec.name.clone(),
            words::vm_state(vm.state).to_owned(),
            or_dash(&vm.owner_site).to_owned(),
            or_dash(&vm.owner_worker).to_owned(),
            units::bytes(spec.memory_bytes),
            spec.vcpus.to_string(),
            or_dash(&vm.replicas.iter().map(replica).collect::<Vec<_>>().join(", ")).to_owned(),
            vm.problem.clone(),
        ]);
    }
    let known = table.render("no VMs: define one with `pageportctl vm define -f vm.yaml --site SITE`");
    response.found.iter().map(found).fold(known, |text, line| format!("{text}\n{line}"))
}

/// A VM that a restore of the controllers has left out.
fn found(vm: &FoundVm) -> String {
    let does = if vm.runs { "runs" } else { "is" };
    let (at, id) = (vm.workers.join(", "), &vm.id);
    match vm.name.as_str() {
        "" => format!(
            "found: {id} {does} at {at}, which has not kept its definition: shut its guest down, and define it again"
        ),
        name => format!(
            "found: {name} ({id}) {does} at {at}, defined after the backup that the controllers were restored from: `pageportctl vm adopt {name}`"
        ),
    }
}

/// `vm adopt`
pub fn adopted(vm: &Vm) -> String {
    let name = vm.spec.as_ref().map_or("", |spec| &spec.name);
    match vm.problem.as_str() {
        "" => format!("{name} ({}) is known again: {}", vm.id, words::vm_state(vm.state)),
        problem => format!("{name} ({}) is adopted: {problem}", vm.id),
    }
}

/// One line after a command that changes a VM.
pub fn vm_line(vm: &Vm) -> String {
    let name = vm.spec.as_ref().map_or("", |spec| &spec.name);
    let wish = if vm.desired_running { "should run" } else { "should be stopped" };
    let state = words::vm_state(vm.state);
    format!("{name} ({}): {state} at {}, {wish}", vm.id, or_dash(&vm.owner_site))
}

/// `vm get`
pub fn vm(vm: &Vm, now_unix_ms: i64) -> String {
    let none = VmSpec::default();
    let spec = vm.spec.as_ref().unwrap_or(&none);
    let mut lines = vec![
        ("name", spec.name.clone()),
        ("id", vm.id.clone()),
        ("state", words::vm_state(vm.state).to_owned()),
        ("should run", yes_no(vm.desired_running).to_owned()),
        ("owner", format!("{} at {}, epoch {}", or_dash(&vm.owner_worker), or_dash(&vm.owner_site), vm.owner_epoch)),
        ("memory", units::bytes(spec.memory_bytes)),
        ("vcpus", spec.vcpus.to_string()),
        ("when cut off", words::isolation(spec.on_isolation).to_owned()),
        ("after reboot", words::start_policy(spec.start).to_owned()),
    ];
    let mut optional = |label, value: &str| {
        if !value.is_empty() {
            lines.push((label, value.to_owned()));
        }
    };
    optional("machine", &spec.machine);
    optional("cpu", &spec.cpu);
    for disk in &spec.disks {
        optional("disk", &disk_line(disk, vm.disks.iter().find(|seen| seen.name == disk.name)));
    }
    for nic in &spec.nics {
        optional("nic", &format!("{} on {}", nic.mac, nic.bridge));
    }
    if let Some(boot) = &spec.direct_boot {
        optional("kernel", &boot.kernel);
        optional("initrd", &boot.initrd);
        optional("cmdline", &boot.cmdline);
    }
    optional("apart from", &spec.anti_affinity.join(", "));
    optional("migration", &vm.migration_id);
    optional("in doubt", &vm.doubt);
    optional("problem", &vm.problem);
    for takeover in &vm.takeovers {
        optional("taken over", &takeover_line(takeover, now_unix_ms));
    }
    let mut text: String = lines.iter().map(|(label, value)| format!("{label:<LABEL_CELLS$}  {value}\n")).collect();
    if !vm.replicas.is_empty() {
        text.push('\n');
        text.push_str(&replica_table(&vm.replicas));
    }
    text
}

/// Where a disk was defined, and how large it is and is to be.
fn disk_line(disk: &DiskSpec, seen: Option<&DiskStatus>) -> String {
    let format = if disk.format.is_empty() { "raw" } else { &disk.format };
    let held_bytes = seen.map_or(0, |seen| seen.size_bytes);
    let size = match seen {
        Some(_) => format!(", {}", units::bytes(held_bytes)),
        None => String::new(),
    };
    let growing = if disk.size_bytes > held_bytes {
        format!(", to become {}", units::bytes(disk.size_bytes))
    } else {
        String::new()
    };
    let made = if disk.create { ", to be made" } else { "" };
    format!("{} {} ({format}){size}{growing}{made}", disk.name, or_dash(&disk.path))
}

fn takeover_line(takeover: &Takeover, now_unix_ms: i64) -> String {
    let by = |name: &str| if name.is_empty() { String::new() } else { format!(" by {name}") };
    let ordered = match (takeover.agent.as_str(), takeover.operator.as_str()) {
        ("", operator) => by(operator),
        (agent, "") => by(agent),
        (agent, operator) => format!("{} on the order of {operator}", by(agent)),
    };
    format!(
        "{} from {} to {} (epoch {}), {}{ordered}: {}",
        units::ago(takeover.at_unix_ms, now_unix_ms),
        takeover.from_worker,
        takeover.to_worker,
        takeover.epoch,
        words::ground(takeover.ground),
        takeover.reason
    )
}

/// `replica list`
pub fn replicas(response: &ListReplicasResponse) -> String {
    replica_table(&response.replicas)
}

fn replica_table(replicas: &[Replica]) -> String {
    let mut table = Table::new([
        ("REPLICA AT", Left),
        ("STATE", Left),
        ("DONE", Right),
        ("OF", Right),
        ("SENT", Right),
        ("RATE", Right),
        ("PROBLEM", Left),
    ]);
    for replica in replicas {
        let (state, done_bytes, total_bytes) = match &replica.flattening {
            Some(flattening) => ("flattening", flattening.done_bytes, flattening.total_bytes),
            None => (words::replica_state(replica.state), replica.done_bytes, replica.total_bytes),
        };
        table.row([
            site(replica),
            state.to_owned(),
            units::bytes(done_bytes),
            units::bytes(total_bytes),
            units::bytes(replica.wan_bytes),
            units::rate(replica.rate_bps),
            replica.problem.clone(),
        ]);
    }
    let mut text = table.render("no replicas: make one with `pageportctl replica seed VM --to SITE`");
    for replica in replicas {
        for DiskPlace { disk, path } in &replica.places {
            let _ = writeln!(text, "disk {disk} at {} lies on {path}", replica.site);
        }
    }
    text
}

/// `migration list`
pub fn migrations(response: &ListMigrationsResponse, now_unix_ms: i64) -> String {
    let mut table = Table::new([
        ("MIGRATION", Left),
        ("VM", Left),
        ("FROM", Left),
        ("TO", Left),
        ("STATE", Left),
        ("ORDERED", Left),
        ("TOTAL", Right),
        ("DOWNTIME", Right),
        ("SENT", Right),
        ("REASON", Left),
    ]);
    for migration in &response.migrations {
        let of_record = |figure: fn(u64) -> String, value: fn(&pageport_proto::v1::MigrationRecord) -> u64| {
            migration.record.as_ref().map_or_else(|| "-".to_owned(), |record| figure(value(record)))
        };
        table.row([
            migration.id.clone(),
            migration.vm_name.clone(),
            migration.from_site.clone(),
            migration.to_site.clone(),
            progress::phase(migration).to_owned(),
            units::ago(migration.created_unix_ms, now_unix_ms),
            of_record(units::duration, |record| record.total_time_ms),
            of_record(units::duration, |record| record.downtime_ms),
            of_record(units::bytes, |record| record.wan_bytes),
            why(migration),
        ]);
    }
    table.render("no migrations")
}

/// Why it is as it is.
fn why(migration: &Migration) -> String {
    let is_held = migration.state() == MigrationState::Running && migration.terms.as_ref().is_some_and(|it| it.paused);
    if is_held && migration.reason.is_empty() {
        return format!("paused; it goes on with \"pageportctl migration resume {}\"", migration.id);
    }
    progress::reason(migration).to_owned()
}

/// One line after a command about a migration.
pub fn migration_line(migration: &Migration) -> String {
    let Migration { id, vm_name, from_site, to_site, .. } = migration;
    let state = words::migration_state(migration.state);
    let terms = terms(migration);
    let why = if migration.reason.is_empty() { String::new() } else { format!("\n{}", migration.reason) };
    format!("migration {id}: {vm_name} from {from_site} to {to_site}, {state}{terms}{why}")
}

/// What was asked for beyond the usual.
fn terms(migration: &Migration) -> String {
    let Some(terms) = &migration.terms else { return String::new() };
    let mut parts = vec![];
    if terms.priority != USUAL_PRIORITY {
        parts.push(format!("priority {}", terms.priority));
    }
    if migration.rate_bps > 0 {
        parts.push(format!("at most {}", units::rate(migration.rate_bps)));
    } else if terms.rate_bps > 0 {
        parts.push(format!("at most {}", units::rate(terms.rate_bps)));
    }
    if !terms.window.is_empty() {
        parts.push(format!("window {} UTC", terms.window));
    }
    if terms.paused {
        parts.push("paused".to_owned());
    }
    parts.extend(words::if_it_does_not_converge(terms));
    parts.into_iter().map(|part| format!(", {part}")).collect()
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::{DiskSpec, ReplicaState, Site, VmState, Worker};

    use super::*;
    use crate::render::record::tests::finished;

    fn web() -> Vm {
        Vm {
            id: "v1".into(),
            spec: Some(VmSpec {
                name: "web".into(),
                memory_bytes: 2 << 30,
                vcpus: 2,
                disks: vec![DiskSpec {
                    name: "root".into(),
                    path: "/srv/web.img".into(),
                    format: "raw".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            owner_site: "a".into(),
            owner_worker: "worker-a".into(),
            owner_epoch: 3,
            state: VmState::Running.into(),
            desired_running: true,
            replicas: vec![Replica {
                site: "b".into(),
                state: ReplicaState::Seeded.into(),
                done_bytes: 4 << 30,
                total_bytes: 4 << 30,
                wan_bytes: 1 << 30,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn lists_look_like_this() {
        let site = Site { name: "a".into(), workers: vec!["worker-a".into()], vms_running: 1, reachable: true };
        assert_eq!(
            sites(&ListSitesResponse { sites: vec![site] }),
            "SITE  REACHABLE  VMS RUNNING  WORKERS\na     yes                  1  worker-a\n"
        );
        assert_eq!(
            vms(&ListVmsResponse { vms: vec![web()], found: vec![] }),
            "VM   STATE    SITE  WORKER      MEMORY  VCPUS  REPLICAS  PROBLEM\n\
             web  running  a     worker-a  2.00 GiB      2  b seeded\n"
        );
        let worker = Worker {
            name: "worker-a".into(),
            site: "a".into(),
            connected: true,
            guarded: true,
            last_seen_unix_ms: 1_000,
            memory_total_bytes: 8 << 30,
            accelerator: "tcg".into(),
            ..Default::default()
        };
        assert_eq!(
            workers(&ListWorkersResponse { workers: vec![worker] }, 1_312),
            "WORKER    SITE  CONNECTED  GUARDED  LAST SEEN     MEMORY  ACCEL  QEMU  VERSION  GRPC  PEER\n\
             worker-a  a     yes        yes      312 ms ago  8.00 GiB  tcg    -     -        -     -\n"
        );
        assert_eq!(
            migrations(&ListMigrationsResponse { migrations: vec![finished()] }, 1_700_000_009_000),
            "MIGRATION  VM   FROM  TO  STATE      ORDERED      TOTAL  DOWNTIME      SENT  REASON\n\
             m1         web  a     b   completed  9.00 s ago  6.21 s    312 ms  70.2 MiB\n"
        );
    }

    #[test]
    fn one_vm_looks_like_this() {
        assert_eq!(
            vm(&web(), 0),
            "name          web\nid            v1\nstate         running\nshould run    yes\n\
             owner         worker-a at a, epoch 3\nmemory        2.00 GiB\nvcpus         2\n\
             when cut off  keeps running\nafter reboot  boots again if it was ordered to run\n\
             disk          root /srv/web.img (raw)\n\n\
             REPLICA AT  STATE       DONE        OF      SENT     RATE  PROBLEM\n\
             b           seeded  4.00 GiB  4.00 GiB  1.00 GiB  0 bit/s\n"
        );
        assert_eq!(vm_line(&web()), "web (v1): running at a, should run");
    }

    #[test]
    fn vms_that_a_restore_has_left_out_are_listed_with_what_to_do() {
        let found =
            |name: &str| FoundVm { id: "v7".into(), name: name.into(), workers: vec!["worker-a".into()], runs: true };
        let shown = vms(&ListVmsResponse { vms: vec![web()], found: vec![found("mail"), found("")] });
        let lines: Vec<_> = shown.lines().filter(|line| line.starts_with("found: ")).collect();
        assert!(
            lines[0].contains("mail (v7) runs at worker-a") && lines[0].contains("`pageportctl vm adopt mail`"),
            "{shown}"
        );
        assert!(lines[1].contains("v7 runs at worker-a, which has not kept its definition"), "{shown}");
        let unknown = Vm { problem: "until these workers have reported: \"worker-b\"".into(), ..web() };
        assert_eq!(adopted(&unknown), "web (v1) is adopted: until these workers have reported: \"worker-b\"");
        assert_eq!(adopted(&web()), "web (v1) is known again: running");
    }

    #[test]
    fn a_vm_that_was_taken_over_says_from_whom_when_and_why() {
        let takeover = Takeover {
            at_unix_ms: 1_000,
            ground: pageport_proto::v1::takeover::Ground::Override.into(),
            from_worker: "worker-a".into(),
            to_worker: "worker-b".into(),
            epoch: 4,
            reason: "the host burnt down".into(),
            operator: "ann.operator.pageport".into(),
            agent: String::new(),
        };
        let fenced = Takeover {
            ground: pageport_proto::v1::takeover::Ground::Fenced.into(),
            agent: "ipmi".into(),
            reason: "no heartbeat".into(),
            ..takeover.clone()
        };
        let unasked = Takeover { operator: String::new(), ..fenced.clone() };
        let text =
            vm(&Vm { doubt: "worker-b is away".into(), takeovers: vec![takeover, fenced, unasked], ..web() }, 61_000);
        assert!(text.contains("in doubt      worker-b is away\n"), "{text}");
        let line = "from worker-a to worker-b (epoch 4), forced by ann.operator.pageport: the host burnt down\n";
        assert!(text.contains(line), "{text}");
        let line = "its host was fenced by ipmi on the order of ann.operator.pageport: no heartbeat\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("its host was fenced by ipmi: no heartbeat\n"), "{text}");
    }

    #[test]
    fn an_empty_fleet_says_what_to_do() {
        assert!(vms(&ListVmsResponse::default()).contains("vm define"));
        assert!(replicas(&ListReplicasResponse::default()).contains("replica seed"));
    }
}
