//! `[fence]` of the configuration: which agent can turn off which hosts, and when that is done unasked.
//!
//! Guarantees of what comes out: each agent has a name of its own, a command that is there and can be run, and a time limit
//! within bounds; no worker has two agents.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use pageport_common::config::ConfigError;
use pageport_proto::WorkerName;
use pageport_proto::ids::{MAX_NAME_BYTES, is_name};
use serde::Deserialize;

/// Longest time that an agent may be given.
pub const MAX_TIME_LIMIT_MS: u64 = 600_000;
/// Shortest time that an agent may be given.
pub const MIN_TIME_LIMIT_MS: u64 = 1_000;
/// Shortest silence after which a host is turned off unasked: reconnecting after a change of leader must fit in.
pub const MIN_SILENCE_MS: u64 = 10_000;
/// Longest such silence.
pub const MAX_SILENCE_MS: u64 = 24 * 3600 * 1000;
const DEFAULT_TIME_LIMIT_MS: u64 = 60_000;

/// `[fence]` as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawFence {
    agent: Vec<RawAgent>,
    after_silence_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAgent {
    name: String,
    workers: Vec<String>,
    command: Vec<String>,
    #[serde(default = "default_time_limit_ms")]
    time_limit_ms: u64,
}

fn default_time_limit_ms() -> u64 {
    DEFAULT_TIME_LIMIT_MS
}

/// A command that can turn hosts off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Its name, kept with each takeover on its word.
    pub name: String,
    /// Whose hosts it can turn off.
    pub workers: BTreeSet<WorkerName>,
    /// The program and its first arguments.
    pub command: Vec<String>,
    /// It is killed after this.
    pub time_limit: Duration,
}

/// All agents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FenceConfig {
    /// In the order of the file.
    pub agents: Vec<Agent>,
    /// A worker that says nothing for so long is fenced unasked; [`None`]: never.
    pub after_silence: Option<Duration>,
}

impl FenceConfig {
    /// The agent that can turn this worker's host off.
    pub fn agent_for(&self, worker: &WorkerName) -> Option<&Agent> {
        self.agents.iter().find(|agent| agent.workers.contains(worker))
    }
}

fn invalid<T>(key: &'static str, problem: String) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid { key, problem })
}

impl TryFrom<RawFence> for FenceConfig {
    type Error = ConfigError;

    fn try_from(raw: RawFence) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for agent in raw.agent {
            let agent = validated(agent)?;
            for other in &config.agents {
                if other.name == agent.name {
                    return invalid("fence.agent.name", format!("\"{}\" is used twice", agent.name));
                }
                if let Some(worker) = other.workers.intersection(&agent.workers).next() {
                    let problem = format!(
                        "\"{worker}\" has two agents, \"{}\" and \"{}\": write one command that calls both",
                        other.name, agent.name
                    );
                    return invalid("fence.agent.workers", problem);
                }
            }
            config.agents.push(agent);
        }
        if let Some(silence_ms) = raw.after_silence_ms {
            if !(MIN_SILENCE_MS..=MAX_SILENCE_MS).contains(&silence_ms) {
                let problem = format!("{silence_ms} is not between {MIN_SILENCE_MS} and {MAX_SILENCE_MS}");
                return invalid("fence.after_silence_ms", problem);
            }
            if config.agents.is_empty() {
                let problem = "there is no agent to call: add [[fence.agent]], or remove this key".to_owned();
                return invalid("fence.after_silence_ms", problem);
            }
            config.after_silence = Some(Duration::from_millis(silence_ms));
        }
        Ok(config)
    }
}

fn validated(raw: RawAgent) -> Result<Agent, ConfigError> {
    if !is_name(&raw.name) {
        return invalid("fence.agent.name", format!("{:?} is not 1 to {MAX_NAME_BYTES} of a-z, 0-9 and -", raw.name));
    }
    let mut workers = BTreeSet::new();
    for worker in &raw.workers {
        match worker.parse() {
            Ok(worker) => drop(workers.insert(worker)),
            Err(error) => return invalid("fence.agent.workers", format!("{error}")),
        }
    }
    if workers.is_empty() {
        let problem = format!("agent \"{}\" can turn no host off: name the workers that it is for", raw.name);
        return invalid("fence.agent.workers", problem);
    }
    match raw.command.first() {
        None => return invalid("fence.agent.command", "it is empty: give a program and its arguments".to_owned()),
        Some(program) => runnable(program)?,
    }
    if !(MIN_TIME_LIMIT_MS..=MAX_TIME_LIMIT_MS).contains(&raw.time_limit_ms) {
        let problem = format!("{} is not between {MIN_TIME_LIMIT_MS} and {MAX_TIME_LIMIT_MS}", raw.time_limit_ms);
        return invalid("fence.agent.time_limit_ms", problem);
    }
    let time_limit = Duration::from_millis(raw.time_limit_ms);
    Ok(Agent { name: raw.name, workers, command: raw.command, time_limit })
}

/// The day of need is no time to find out that an agent was never installed.
fn runnable(program: &str) -> Result<(), ConfigError> {
    let path = Path::new(program);
    if !path.is_absolute() {
        return invalid("fence.agent.command", format!("{program} is not an absolute path"));
    }
    match std::fs::metadata(path) {
        Ok(about) if about.is_file() && about.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(_) => {
            invalid("fence.agent.command", format!("{program} is not a program: install it, and make it executable"))
        }
        Err(error) => invalid("fence.agent.command", format!("{program} cannot be run ({error}): install it")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
after_silence_ms = 30000
[[agent]]
name = "ipmi"
workers = ["a1", "a2"]
command = ["/bin/sh", "-c", "exit 0"]
[[agent]]
name = "pdu"
workers = ["b1"]
command = ["/bin/sh"]
time_limit_ms = 90000
"#;

    fn parse(text: &str) -> Result<FenceConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fence.toml");
        std::fs::write(&path, text).unwrap();
        FenceConfig::try_from(pageport_common::config::load::<RawFence>(&path)?)
    }

    #[test]
    fn a_worker_is_found_with_its_agent_and_its_time_limit() {
        let config = parse(GOOD).unwrap();
        let agent = |name: &str| config.agent_for(&name.parse().unwrap()).map(|agent| agent.name.as_str());
        assert_eq!((agent("a2"), agent("b1"), agent("c1")), (Some("ipmi"), Some("pdu"), None));
        assert_eq!(config.agents[0].time_limit, Duration::from_secs(60));
        assert_eq!(config.agents[1].time_limit, Duration::from_secs(90));
        assert_eq!(config.after_silence, Some(Duration::from_secs(30)));
        assert_eq!(parse("").unwrap(), FenceConfig::default());
    }

    #[test]
    fn each_bad_value_is_named_by_its_key() {
        for (good, bad, expected) in [
            ("\"ipmi\"", "\"ip mi\"", "fence.agent.name"),
            ("\"pdu\"", "\"ipmi\"", "fence.agent.name"),
            ("[\"b1\"]", "[\"a1\"]", "fence.agent.workers"),
            ("[\"b1\"]", "[]", "fence.agent.workers"),
            ("[\"b1\"]", "[\"B1\"]", "fence.agent.workers"),
            ("[\"/bin/sh\"]", "[]", "fence.agent.command"),
            ("[\"/bin/sh\"]", "[\"sh\"]", "fence.agent.command"),
            ("[\"/bin/sh\"]", "[\"/nonexistent/fence\"]", "fence.agent.command"),
            ("[\"/bin/sh\"]", "[\"/etc/passwd\"]", "fence.agent.command"),
            ("90000", "600001", "fence.agent.time_limit_ms"),
            ("90000", "999", "fence.agent.time_limit_ms"),
            ("30000", "9999", "fence.after_silence_ms"),
        ] {
            assert!(GOOD.contains(good), "{good}");
            match parse(&GOOD.replacen(good, bad, 1)) {
                Err(ConfigError::Invalid { key, .. }) => assert_eq!(key, expected, "{bad}"),
                other => panic!("{bad:?} gave {other:?}"),
            }
        }
        assert!(matches!(
            parse("after_silence_ms = 30000"),
            Err(ConfigError::Invalid { key: "fence.after_silence_ms", .. })
        ));
        assert!(matches!(parse(&format!("{GOOD}retries = 3\n")), Err(ConfigError::Parse { .. })));
    }
}
