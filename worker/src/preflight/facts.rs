//! What the two ends of a move are: asked of the host, said on the wire, and read from there with every length bounded.

use std::collections::BTreeSet;

use pageport_proto::v1::{CpuFacts, HostFacts, HostWanted, PreflightReply};

use crate::hypervisor::command_line::{MAX_NICS, is_bridge_name};
use crate::hypervisor::{Accelerator, QemuVersion};
use crate::node::Node;

/// Longest name of a machine type, of a CPU or of a feature.
const MAX_WORD_BYTES: usize = 128;
/// Features of a CPU; the largest has some two hundred.
const MAX_FEATURES: usize = 1024;
/// Longest words of a worker that are passed on, in characters.
const MAX_REASON_CHARS: usize = 500;
const CPUINFO: &str = "/proc/cpuinfo";

/// What a worker says of itself and cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its {field} makes no sense")]
pub struct FactsError {
    field: &'static str,
}

/// One end of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The QEMU that is installed.
    pub qemu: QemuVersion,
    /// What runs guests there.
    pub accelerator: Accelerator,
    /// The versioned machine type that the wanted one stands for.
    pub machine: Option<String>,
    /// The wanted CPU model.
    pub cpu: Option<Cpu>,
    /// The host's CPU, where the wanted model is whatever the host has.
    pub own_cpu: Option<OwnCpu>,
    /// When its certificate ends, in seconds since 1970.
    pub certificate_ends: Option<i64>,
    /// Why machine types and CPU models are not known.
    pub offer_failure: Option<String>,
}

/// A CPU model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// It means the same wherever it is there.
    pub migration_safe: bool,
    /// What of it guests do not get there.
    pub unavailable: BTreeSet<String>,
}

/// A host's CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnCpu {
    /// What it calls itself.
    pub name: String,
    /// Its features.
    pub flags: BTreeSet<String>,
}

/// The destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The host.
    pub host: Host,
    /// By its wall clock, when it was asked, in milliseconds since 1970.
    pub now_unix_ms: i64,
    /// Why it did not reach the source.
    pub unreachable: Option<String>,
    /// Why it has no memory for the guest.
    pub no_memory: Option<String>,
    /// Why the replica cannot become as large as it must.
    pub no_room: Option<String>,
    /// Why the replica cannot be moved to.
    pub no_replica: Option<String>,
    /// Bridges that it lacks.
    pub missing_bridges: Vec<String>,
    /// The VM is its own.
    pub owns: bool,
}

/// What this worker is, for a guest with these needs.
pub async fn of(node: &Node, wanted: &HostWanted) -> HostFacts {
    let mut facts = HostFacts {
        qemu_version: node.qemu_version.to_string(),
        accelerator: node.hypervisor.accelerator.to_string(),
        certificate_ends_unix_s: node.endpoint.certificate_ends().unwrap_or_default(),
        ..HostFacts::default()
    };
    let offer = match node.offers.get(&node.hypervisor).await {
        Ok(offer) => offer,
        Err(error) => return HostFacts { offer_failure: crate::error::with_causes(&error), ..facts },
    };
    facts.machine = offer.machine(&wanted.machine).unwrap_or_default().to_owned();
    // A definition may add features behind the model.
    let model = wanted.cpu.split(',').next().unwrap_or_default();
    facts.cpu = offer.cpu(model).map(|model| CpuFacts {
        migration_safe: model.migration_safe == Some(true),
        unavailable: model.unavailable_features.clone(),
    });
    let is_own = facts.cpu.as_ref().is_some_and(|cpu| !cpu.migration_safe);
    if is_own && node.hypervisor.accelerator == Accelerator::Kvm {
        (facts.host_cpu, facts.host_cpu_flags) = own_cpu(&std::fs::read_to_string(CPUINFO).unwrap_or_default());
    }
    facts
}

fn own_cpu(cpuinfo: &str) -> (String, String) {
    let value = |key: &str| {
        let of_key = |line: &str| {
            line.split_once(':').filter(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
        };
        cpuinfo.lines().find_map(of_key).unwrap_or_default()
    };
    (value("model name"), value("flags"))
}

impl TryFrom<HostFacts> for Host {
    type Error = FactsError;

    fn try_from(facts: HostFacts) -> Result<Self, FactsError> {
        let flags = features("CPU", facts.host_cpu_flags.split_whitespace())?;
        let cpu = facts.cpu.map(|cpu| {
            let unavailable = features("CPU model", cpu.unavailable.iter().map(String::as_str));
            unavailable.map(|unavailable| Cpu { migration_safe: cpu.migration_safe, unavailable })
        });
        Ok(Self {
            qemu: QemuVersion::parse(&facts.qemu_version).ok_or(FactsError { field: "version of QEMU" })?,
            accelerator: Accelerator::parse(&facts.accelerator).ok_or(FactsError { field: "accelerator" })?,
            machine: word("machine type", facts.machine)?,
            cpu: cpu.transpose()?,
            own_cpu: word("CPU", facts.host_cpu)?.map(|name| OwnCpu { name, flags }),
            certificate_ends: Some(facts.certificate_ends_unix_s).filter(|ends| *ends != 0),
            offer_failure: reason(&facts.offer_failure),
        })
    }
}

impl TryFrom<PreflightReply> for Destination {
    type Error = FactsError;

    fn try_from(reply: PreflightReply) -> Result<Self, FactsError> {
        let bridges = &reply.missing_bridges;
        if bridges.len() > MAX_NICS || !bridges.iter().all(|bridge| is_bridge_name(bridge)) {
            return Err(FactsError { field: "list of bridges" });
        }
        Ok(Self {
            host: reply.host.ok_or(FactsError { field: "host" })?.try_into()?,
            now_unix_ms: reply.now_unix_ms,
            unreachable: reason(&reply.unreachable),
            no_memory: reason(&reply.no_memory),
            no_room: reason(&reply.no_room),
            no_replica: reason(&reply.no_replica),
            missing_bridges: reply.missing_bridges,
            owns: reply.owns,
        })
    }
}

fn word(field: &'static str, text: String) -> Result<Option<String>, FactsError> {
    if text.len() > MAX_WORD_BYTES || text.contains(char::is_control) {
        return Err(FactsError { field });
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

fn features<'a>(field: &'static str, names: impl Iterator<Item = &'a str>) -> Result<BTreeSet<String>, FactsError> {
    let named: BTreeSet<String> = names
        .take(MAX_FEATURES + 1)
        .filter_map(|name| word(field, name.to_owned()).transpose())
        .collect::<Result<_, _>>()?;
    if named.len() > MAX_FEATURES { Err(FactsError { field }) } else { Ok(named) }
}

/// Somebody else's words, as far as they are passed on.
fn reason(text: &str) -> Option<String> {
    let clipped: String = text.chars().filter(|char| !char.is_control()).take(MAX_REASON_CHARS).collect();
    Some(clipped).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said() -> PreflightReply {
        let cpu = CpuFacts { migration_safe: true, unavailable: vec!["avx512f".into()] };
        let host = HostFacts {
            qemu_version: "10.0.2".into(),
            accelerator: "kvm".into(),
            machine: "pc-q35-10.0".into(),
            cpu: Some(cpu),
            ..HostFacts::default()
        };
        PreflightReply { host: Some(host), now_unix_ms: 5, ..PreflightReply::default() }
    }

    #[test]
    fn what_is_empty_on_the_wire_is_absent() {
        let read = Destination::try_from(said()).unwrap();
        assert_eq!(read.host.machine.as_deref(), Some("pc-q35-10.0"));
        assert_eq!((read.host.own_cpu, read.host.certificate_ends, read.unreachable), (None, None, None));
    }

    #[test]
    fn what_makes_no_sense_or_is_too_long_is_refused_and_words_are_cut() {
        type Damage = fn(&mut PreflightReply);
        fn host(reply: &mut PreflightReply) -> &mut HostFacts {
            reply.host.as_mut().unwrap()
        }
        let cases: [(&str, Damage); 8] = [
            ("host", |it| it.host = None),
            ("version of QEMU", |it| host(it).qemu_version = "new".into()),
            ("accelerator", |it| host(it).accelerator = "hvf".into()),
            ("machine type", |it| host(it).machine = "m".repeat(129)),
            ("CPU", |it| host(it).host_cpu = "a\nb".into()),
            ("CPU model", |it| host(it).cpu.as_mut().unwrap().unavailable = (0..1025).map(|n| n.to_string()).collect()),
            ("list of bridges", |it| it.missing_bridges = vec!["br0".into(); 9]),
            ("list of bridges", |it| it.missing_bridges = vec!["br 0".into()]),
        ];
        for (field, damage) in cases {
            let mut reply = said();
            damage(&mut reply);
            assert_eq!(Destination::try_from(reply), Err(FactsError { field }));
        }
        let long = PreflightReply { no_room: "x".repeat(10_000), ..said() };
        assert_eq!(Destination::try_from(long).unwrap().no_room.unwrap().len(), MAX_REASON_CHARS);
    }

    #[test]
    fn a_hosts_cpu_is_its_first_processors() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu vme\n\nprocessor\t: 1\nmodel name\t: Another\n";
        assert_eq!(own_cpu(text), ("Some CPU @ 2.0GHz".to_owned(), "fpu vme".to_owned()));
        assert_eq!(own_cpu(""), (String::new(), String::new()));
    }
}
