//! One table: what is changed about two ends that fit together, and what that comes to.

use pageport_proto::v1::Severity;

use super::*;
use crate::hypervisor::QemuVersion;

const NOW_S: i64 = 1_700_000_000;

/// Both ends, as a test changes them.
struct Ends {
    spec: VmSpec,
    source: Host,
    destination: Destination,
    answered_within_ms: i64,
}

fn names(features: &[&str]) -> BTreeSet<String> {
    features.iter().map(|name| (*name).to_owned()).collect()
}

fn model(unavailable: &[&str]) -> Option<Cpu> {
    Some(Cpu { migration_safe: true, unavailable: names(unavailable) })
}

fn version(major: u32, minor: u32, micro: u32) -> QemuVersion {
    QemuVersion { major, minor, micro }
}

impl Ends {
    fn that_fit() -> Self {
        let host = Host {
            qemu: version(10, 0, 2),
            accelerator: Accelerator::Kvm,
            machine: Some("pc-q35-10.0".into()),
            cpu: model(&["tsx"]),
            own_cpu: None,
            certificate_ends: Some(NOW_S + 300 * DAY_S),
            offer_failure: None,
        };
        let destination = Destination {
            host: host.clone(),
            now_unix_ms: NOW_S * 1000 + 25,
            unreachable: None,
            no_memory: None,
            no_room: None,
            no_replica: None,
            missing_bridges: vec![],
            owns: false,
        };
        let spec =
            VmSpec { machine: "pc-q35-10.0".into(), cpu: "EPYC".into(), memory_bytes: 1 << 30, ..VmSpec::default() };
        Self { spec, source: host, destination, answered_within_ms: 50 }
    }

    fn found(&self) -> Vec<Finding> {
        judge(&Facts {
            spec: &self.spec,
            from: "worker-a",
            to: "worker-b",
            source: &self.source,
            destination: &self.destination,
            asked_unix_ms: NOW_S * 1000,
            answered_unix_ms: NOW_S * 1000 + self.answered_within_ms,
            round_trip: Duration::from_millis(50),
        })
    }

    /// `host` or `max`.
    fn own_cpu(&mut self, here: &[&str], there: &[&str]) {
        for (host, flags) in [(&mut self.source, here), (&mut self.destination.host, there)] {
            host.cpu = Some(Cpu { migration_safe: false, unavailable: BTreeSet::new() });
            host.own_cpu = Some(OwnCpu { name: "Some CPU".into(), flags: names(flags) });
        }
    }
}

#[test]
fn two_ends_that_fit_together_are_all_green_and_every_check_is_there_once() {
    let found = Ends::that_fit().found();
    assert!(found.iter().all(|it| it.severity() == Severity::Ok && it.fix.is_empty()), "{found:?}");
    let mut checks: Vec<i32> = found.iter().map(|it| it.check).collect();
    checks.sort_unstable();
    let mut expected = vec![Check::Replica as i32];
    expected.extend(Check::Link as i32..=Check::Owner as i32);
    assert_eq!(checks, expected);
}

#[test]
fn each_misfit_is_one_finding_that_names_it_and_its_fix() {
    use Severity::{Blocks, Ok, Warning};
    type Change = fn(&mut Ends);
    let cases: [(Check, Severity, &str, Change); 37] = [
        (Check::Replica, Blocks, "holds no replica", |it| {
            it.destination.no_replica = Some("this site holds no replica: seed it".into())
        }),
        (Check::LinkBack, Warning, "worker-b does not reach worker-a: no answer", |it| {
            it.destination.unreachable = Some("no answer".into())
        }),
        (Check::Certificates, Blocks, "worker-b has ended", |it| it.destination.host.certificate_ends = Some(NOW_S)),
        (Check::Certificates, Blocks, "worker-a has ended", |it| it.source.certificate_ends = Some(i64::MIN)),
        (Check::Certificates, Warning, "worker-a ends within 7 days", |it| {
            it.source.certificate_ends = Some(NOW_S + SOON_S - 1)
        }),
        (Check::Certificates, Ok, "7 days", |it| it.source.certificate_ends = Some(NOW_S + SOON_S + 1)),
        (Check::Certificates, Warning, "not checked", |it| {
            (it.source.certificate_ends, it.destination.host.certificate_ends) = (None, None);
        }),
        (Check::Clocks, Warning, "worker-b is 3.0 s ahead of", |it| it.destination.now_unix_ms += 3000),
        (Check::Clocks, Warning, "worker-b is 3.0 s behind", |it| it.destination.now_unix_ms -= 3000),
        (Check::Clocks, Ok, "agree within", |it| it.destination.now_unix_ms += 1000),
        // What the answer may have taken is no difference.
        (Check::Clocks, Ok, "agree within 5000 ms", |it| {
            (it.answered_within_ms, it.destination.now_unix_ms) = (5000, NOW_S * 1000 + 4000);
        }),
        (Check::Clocks, Warning, "behind", |it| it.destination.now_unix_ms = i64::MIN),
        (Check::Qemu, Warning, "older on worker-b, 9.2.5", |it| it.destination.host.qemu = version(9, 2, 5)),
        (Check::Qemu, Ok, "10.1.0 on worker-b", |it| it.destination.host.qemu = version(10, 1, 0)),
        (Check::Qemu, Ok, "10.0.1 on worker-b", |it| it.destination.host.qemu = version(10, 0, 1)),
        (Check::Accelerator, Blocks, "kvm on worker-a and with tcg on worker-b", |it| {
            it.destination.host.accelerator = Accelerator::Tcg
        }),
        (Check::Accelerator, Blocks, "loses dirty pages", |it| {
            for host in [&mut it.source, &mut it.destination.host] {
                (host.accelerator, host.qemu) = (Accelerator::Tcg, version(8, 2, 0));
            }
        }),
        (Check::Machine, Blocks, "no machine type pc-q35-10.0", |it| it.destination.host.machine = None),
        (Check::Machine, Blocks, "q35 is pc-q35-10.1 on worker-b and pc-q35-10.0 on worker-a", |it| {
            it.spec.machine = "q35".into();
            it.destination.host.machine = Some("pc-q35-10.1".into());
        }),
        (Check::Machine, Ok, "q35 is pc-q35-10.0 at both ends", |it| it.spec.machine = "q35".into()),
        // The guest runs: whatever the newer QEMU at its host offers does not matter.
        (Check::Machine, Ok, "has pc-q35-10.0", |it| it.source.machine = None),
        (Check::Machine, Warning, "not checked: worker-b says: broken", |it| {
            it.destination.host.offer_failure = Some("broken".into())
        }),
        (Check::Cpu, Blocks, "no CPU model EPYC", |it| it.destination.host.cpu = None),
        (Check::Cpu, Blocks, "lacks features that the guest may use: avx512f", |it| {
            it.destination.host.cpu = model(&["tsx", "avx512f"])
        }),
        (Check::Cpu, Warning, "has features that it has not on worker-a", |it| it.destination.host.cpu = model(&[])),
        (Check::Cpu, Blocks, "a, b, c, d, e and 2 more", |it| {
            it.destination.host.cpu = model(&["tsx", "a", "b", "c", "d", "e", "f", "g"])
        }),
        (Check::Cpu, Ok, "machine type's own", |it| {
            it.spec.cpu.clear();
            it.destination.host.cpu = None;
        }),
        (Check::Cpu, Warning, "not checked", |it| it.source.offer_failure = Some("broken".into())),
        (Check::Cpu, Ok, "means the same at both ends: Some CPU", |it| it.own_cpu(&["avx"], &["avx"])),
        (Check::Cpu, Blocks, "lacks features that the guest may use: avx", |it| it.own_cpu(&["avx"], &["sse"])),
        (Check::Cpu, Warning, "could not move back: avx2", |it| it.own_cpu(&["avx"], &["avx", "avx2"])),
        (Check::Cpu, Warning, "cannot be compared", |it| {
            it.own_cpu(&["avx"], &["avx"]);
            it.destination.host.own_cpu = None;
        }),
        (Check::Cpu, Ok, "means the same", |it| {
            it.own_cpu(&[], &[]);
            for host in [&mut it.source, &mut it.destination.host] {
                (host.accelerator, host.own_cpu) = (Accelerator::Tcg, None);
            }
        }),
        (Check::Memory, Blocks, "no memory for a guest", |it| {
            it.destination.no_memory = Some("no memory for a guest: stop another".into())
        }),
        (Check::DiskSpace, Blocks, "replicas occupy 9 of 10 bytes", |it| {
            it.destination.no_room = Some("replicas occupy 9 of 10 bytes: make room".into());
        }),
        (Check::Bridges, Blocks, "no bridge br0, br1", |it| {
            it.destination.missing_bridges = vec!["br0".into(), "br1".into()]
        }),
        (Check::Owner, Blocks, "takes the VM for its own", |it| it.destination.owns = true),
    ];
    for (check, severity, seen, change) in cases {
        let mut ends = Ends::that_fit();
        change(&mut ends);
        let found = ends.found();
        let of_check: Vec<_> = found.iter().filter(|it| it.check() == check).collect();
        let [finding] = of_check[..] else { panic!("{check:?}: {found:?}") };
        assert!(finding.severity() == severity && finding.seen.contains(seen), "{seen:?} of {finding:?}");
        assert_eq!(finding.fix.is_empty(), severity == Ok, "{finding:?}");
    }
}
