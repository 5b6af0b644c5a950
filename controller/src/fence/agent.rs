//! The contract with a fence agent, and how one is run.
//!
//! ```text
//!   COMMAND... ACTION WORKER SITE          standard input is empty; both outputs are kept, the end of them
//! ```
//! | action | exit 0 promises | anything else |
//! |---|---|---|
//! | `off` | **the host's power is surely off, and stays off until someone turns it on** | nothing is known |
//! | `status` | the agent reaches the power control of this host. It prints what it found, and has changed nothing | it does not |
//!
//! Both must be idempotent: an agent is run again after a change of leader, and on a host that is off already.
//!
//! Guarantees: an agent and what it started (its process group) are killed at the time limit; what it prints is bounded in
//! memory ([`MAX_OUTPUT_BYTES`]) and free of control characters. It does not check what an agent says.

use std::fmt;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageport_proto::{SiteName, WorkerName};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::config::Agent;

/// Kept of what an agent prints: the end of it, since last words tell most.
pub const MAX_OUTPUT_BYTES: usize = 2048;
/// How long the outputs are read after the agent has ended: a child of its own may hold them open.
const OUTPUT_WITHIN: Duration = Duration::from_secs(1);
/// How long a killed agent may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// What an agent is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Turn the host off.
    Off,
    /// Look at its power.
    Status,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Status => "status",
        })
    }
}

/// Why an agent's promise was not given.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It did not start.
    #[error("start fence agent \"{agent}\" ({program}): {source}")]
    Start {
        /// The agent.
        agent: String,
        /// Its program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Its end was not seen.
    #[error("wait for fence agent \"{agent}\": {source}")]
    Wait {
        /// The agent.
        agent: String,
        /// Why.
        source: io::Error,
    },
    /// It says that it could not.
    #[error("fence agent \"{agent}\" could not do \"{action}\" ({status}){}", words(said))]
    Failed {
        /// The agent.
        agent: String,
        /// What was asked.
        action: Action,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        said: String,
    },
    /// It took too long.
    #[error("fence agent \"{agent}\" did not end \"{action}\" within {} ms and was killed{}", limit.as_millis(), words(said))]
    TooLong {
        /// The agent.
        agent: String,
        /// What was asked.
        action: Action,
        /// Its time limit.
        limit: Duration,
        /// The end of what it printed.
        said: String,
    },
}

fn words(said: &str) -> String {
    if said.is_empty() { "; it printed nothing".to_owned() } else { format!(": {said}") }
}

/// Runs an agent. Gives what it printed once it has promised what the action asks for.
///
/// # Errors
/// [`AgentError`]: there is no promise.
pub async fn run(agent: &Agent, action: Action, worker: &WorkerName, site: &SiteName) -> Result<String, AgentError> {
    let name = || agent.name.clone();
    let (program, first) = agent.command.split_first().map_or(("", &[][..]), |(program, rest)| (program, rest));
    let mut command = Command::new(program);
    command.args(first).arg(action.to_string()).arg(worker.as_str()).arg(site.as_str());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    let start = |source| AgentError::Start { agent: name(), program: program.to_owned(), source };
    let mut child = command.spawn().map_err(start)?;
    let tail = Arc::new(Mutex::new(Tail::default()));
    let mut readers = JoinSet::new();
    if let Some(out) = child.stdout.take() {
        readers.spawn(read(out, tail.clone()));
    }
    if let Some(err) = child.stderr.take() {
        readers.spawn(read(err, tail.clone()));
    }
    let ended = timeout(agent.time_limit, child.wait()).await;
    if ended.is_err() {
        end(&mut child).await;
    }
    // What still holds the outputs open after this is not waited for.
    let _ = timeout(OUTPUT_WITHIN, async { while readers.join_next().await.is_some() {} }).await;
    let said = tail.lock().unwrap_or_else(PoisonError::into_inner).text();
    match ended {
        Ok(Ok(status)) if status.success() => Ok(said),
        Ok(Ok(status)) => Err(AgentError::Failed { agent: name(), action, status, said }),
        Ok(Err(source)) => Err(AgentError::Wait { agent: name(), source }),
        Err(_) => Err(AgentError::TooLong { agent: name(), action, limit: agent.time_limit, said }),
    }
}

/// Kills an agent that was not waited for yet, so that its number is still its own, with all that it started.
async fn end(child: &mut Child) {
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(group) = group
        && let Err(error) = kill_process_group(group, Signal::KILL)
    {
        tracing::warn!(%error, "a fence agent could not be killed");
    }
    if timeout(GONE_WITHIN, child.wait()).await.is_err() {
        tracing::warn!("a killed fence agent is not gone yet");
    }
}

async fn read(mut output: impl AsyncRead + Unpin, tail: Arc<Mutex<Tail>>) {
    let mut piece = [0; 1024];
    while let Ok(length @ 1..) = output.read(&mut piece).await {
        tail.lock().unwrap_or_else(PoisonError::into_inner).push(&piece[..length]);
    }
}

/// The end of what was printed.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    fn push(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        let surplus = self.bytes.len().saturating_sub(MAX_OUTPUT_BYTES);
        self.bytes.drain(..surplus);
    }

    /// In one line, without what could move a terminal's cursor.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        let printable: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        printable.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn agent(script: &str, limit: Duration) -> Agent {
        let command = ["/bin/sh", "-c", script, "fence"].map(str::to_owned).to_vec();
        Agent { name: "test".into(), workers: ["a1".parse().unwrap()].into(), command, time_limit: limit }
    }

    async fn off(script: &str, limit: Duration) -> Result<String, AgentError> {
        run(&agent(script, limit), Action::Off, &"a1".parse().unwrap(), &"a".parse().unwrap()).await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn an_agent_is_told_the_action_the_worker_and_the_site() {
        let said = off("echo $1 $2 $3; read line || echo no input >&2", LONG).await.unwrap();
        assert!(said.contains("off a1 a") && said.contains("no input"), "{said}");
    }

    #[tokio::test]
    async fn one_that_fails_is_quoted_with_its_exit_status() {
        let error = off("echo 'no route\nto \\033[2Jthe BMC' >&2; exit 3", LONG).await.unwrap_err().to_string();
        assert!(error.contains("\"test\" could not do \"off\" (exit status: 3): no route to"), "{error}");
        assert!(error.lines().count() == 1 && !error.contains('\u{1b}'), "{error}");
        let error = off("exit 1", LONG).await.unwrap_err().to_string();
        assert!(error.ends_with("it printed nothing"), "{error}");
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; echo asked the BMC; wait", pid.display());
        let error = off(&script, Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(&error, AgentError::TooLong { said, .. } if said == "asked the BMC"), "{error}");
        let child = std::fs::read_to_string(pid).unwrap();
        let state = format!("/proc/{}/stat", child.trim());
        let deadline = Instant::now() + LONG;
        while std::fs::read_to_string(&state).is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(Instant::now() < deadline, "the agent's child lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn the_end_of_much_output_is_kept_and_an_open_output_is_not_waited_for() {
        let said = off("seq 1 100000; sleep 1000 & echo the end", LONG).await.unwrap();
        assert!(said.len() <= MAX_OUTPUT_BYTES && said.ends_with("100000 the end"), "{said}");
    }

    #[tokio::test]
    async fn a_command_that_is_not_there_is_named() {
        let missing = Agent { command: vec!["/nonexistent/fence".into()], ..agent("", LONG) };
        let error = run(&missing, Action::Status, &"a1".parse().unwrap(), &"a".parse().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/fence"), "{error}");
    }
}
