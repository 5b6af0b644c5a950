//! What the installed QEMU offers: machine types and CPU models.
//!
//! ```text
//!   qemu -machine none ◀─ query-machines, query-cpu-definitions, quit ─▶ lines of QMP ─▶ Offer
//! ```
//! Asked once, of a QEMU that has no guest and ends with the answer. What it says of a CPU model is of the accelerator that guests have here. Kept for as
//! long as the worker lives, so a QEMU that is installed meanwhile is known after a restart, as its version is.

use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::qmp::{self, Ignored, QmpCapabilities, QmpError, Received, qmp_command};
use super::vm::Host;

/// Time that QEMU has for all of it; it takes a tenth of a second.
const DEADLINE: Duration = Duration::from_secs(10);

qmp_command!(/// All machine types.
    QueryMachines = "query-machines" -> Vec<Machine> {});
qmp_command!(/// All CPU models.
    QueryCpuDefinitions = "query-cpu-definitions" -> Vec<CpuModel> {});
qmp_command!(/// Ends QEMU.
    Quit = "quit" -> Ignored {});

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// It did not start, or broke off.
    #[error("ask {qemu} for its machine types and CPU models")]
    Run {
        /// The binary.
        qemu: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not end.
    #[error("{qemu} did not name its machine types and CPU models within {} s", DEADLINE.as_secs())]
    Deadline {
        /// The binary.
        qemu: String,
    },
    /// It said something else.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// A machine type.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Machine {
    name: String,
    alias: Option<String>,
}

/// A CPU model, with the accelerator that guests have here.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuModel {
    name: String,
    /// It means the same wherever it is there.
    pub migration_safe: Option<bool>,
    /// Features of it that guests do not get here.
    #[serde(default)]
    pub unavailable_features: Vec<String>,
}

/// Machine types and CPU models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    machines: Vec<Machine>,
    cpus: Vec<CpuModel>,
}

impl Offer {
    /// The versioned name of a machine type, if it is offered under this name.
    pub fn machine(&self, wanted: &str) -> Option<&str> {
        let named = |machine: &&Machine| machine.name == wanted || machine.alias.as_deref() == Some(wanted);
        self.machines.iter().find(named).map(|machine| machine.name.as_str())
    }

    /// A CPU model, if it is offered.
    pub fn cpu(&self, wanted: &str) -> Option<&CpuModel> {
        self.cpus.iter().find(|model| model.name == wanted)
    }
}

/// The offer, from the first question on.
#[derive(Debug, Default)]
pub struct Offers(OnceCell<Offer>);

impl Offers {
    /// What is offered; a question that failed is asked again.
    ///
    /// # Errors
    /// [`OfferError`].
    pub async fn get(&self, host: &Host) -> Result<&Offer, OfferError> {
        self.0.get_or_try_init(|| ask(host)).await
    }
}

async fn ask(host: &Host) -> Result<Offer, OfferError> {
    let failed = |source| OfferError::Run { qemu: host.qemu.clone(), source };
    let questions = [
        qmp::format(0, &QmpCapabilities {}),
        qmp::format(1, &QueryMachines {}),
        qmp::format(2, &QueryCpuDefinitions {}),
        qmp::format(3, &Quit {}),
    ];
    let questions = questions.into_iter().collect::<Result<String, _>>();
    let questions = questions.map_err(|source| failed(std::io::Error::other(source)))?;
    let asked = async {
        let mut qemu = Command::new(&host.qemu)
            .args(["-no-user-config", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", "-machine"])
            .arg(format!("none,accel={}", host.accelerator))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut input) = qemu.stdin.take() {
            input.write_all(questions.as_bytes()).await?;
        }
        qemu.wait_with_output().await
    };
    let asked = tokio::time::timeout(DEADLINE, asked).await;
    let output = asked.map_err(|_| OfferError::Deadline { qemu: host.qemu.clone() })?.map_err(failed)?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(said: &str) -> Result<Offer, OfferError> {
    Ok(Offer { machines: answer::<QueryMachines>(said, 1)?, cpus: answer::<QueryCpuDefinitions>(said, 2)? })
}

fn answer<C: qmp::Command>(said: &str, id: u64) -> Result<C::Reply, QmpError> {
    let reply = said.lines().find_map(|line| match qmp::parse(line) {
        Some(Received::Reply { id: Some(of), result }) if of == id => Some(result),
        _ => None,
    });
    let result = reply.ok_or(QmpError::Closed { command: C::NAME })?;
    let value = result.map_err(|refusal| QmpError::Refused { command: C::NAME, refusal })?;
    serde_json::from_value(value).map_err(|source| QmpError::Form { command: C::NAME, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0 says it, but for what is left out.
    const SAID: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}
{"return": {}, "id": 0}
{"return": [{"hotpluggable-cpus": true, "name": "pc-q35-9.2", "cpu-max": 4096}, {"name": "pc-q35-10.0", "alias": "q35"}], "id": 1}
{"return": [{"name": "max", "static": false, "migration-safe": false}, {"name": "EPYC", "unavailable-features": ["topoext"], "migration-safe": true}], "id": 2}
{"return": {}, "id": 3}
{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}
"#;

    #[test]
    fn machine_types_are_found_by_both_names_and_models_with_what_they_lack() {
        let offer = parse(SAID).unwrap();
        assert_eq!(offer.machine("q35"), Some("pc-q35-10.0"));
        assert_eq!(offer.machine("pc-q35-9.2"), Some("pc-q35-9.2"));
        assert_eq!(offer.machine("pc-q35-11.0"), None);
        assert_eq!(offer.cpu("EPYC").unwrap().unavailable_features, ["topoext"]);
        assert_eq!(offer.cpu("max").unwrap().migration_safe, Some(false));
        assert_eq!(offer.cpu("Skylake"), None);
    }

    #[test]
    fn a_qemu_that_broke_off_or_refused_offers_nothing() {
        let first: String = SAID.lines().take(2).collect::<Vec<_>>().join("\n");
        assert!(parse(&first).unwrap_err().to_string().contains("query-machines"));
        let refused = format!("{first}\n{}", r#"{"id": 1, "error": {"class": "GenericError", "desc": "no"}}"#);
        assert!(parse(&refused).unwrap_err().to_string().contains("refused query-machines"));
    }
}
