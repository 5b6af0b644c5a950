//! The processes of a lab: found, so that they can be counted, and killed, so that none is left behind.
//!
//! | sites are | a process belongs to a site when |
//! |---|---|
//! | namespaces | it runs in the namespace |
//! | ports of the loopback | it is a daemon, a keeper or a QEMU and one of its arguments lies in the site's folder of the run |

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tracing::warn;

/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// The programs that a lab on the loopback starts.
const PROGRAMS: [&str; 4] = ["pageport-controller", "pageport-worker", "pageport-keeper", "qemu-system-"];

/// The ids of all processes in a namespace.
pub(super) fn in_namespace(namespace: &str) -> Vec<i32> {
    let listed = std::process::Command::new("ip").args(["netns", "pids", namespace]).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// A process's program and arguments; empty when it is gone or dead.
pub(crate) fn command_line(pid: i32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The daemons and QEMUs of this machine one of whose arguments `belongs`.
pub(super) fn of_labs(belongs: impl Fn(&str) -> bool) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_ours(&command_line(*pid), &belongs)).collect()
}

fn is_ours(line: &[String], belongs: impl Fn(&str) -> bool) -> bool {
    let Some((program, arguments)) = line.split_first() else { return false };
    let name = Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    PROGRAMS.iter().any(|known| name.starts_with(known)) && arguments.iter().any(|argument| belongs(argument))
}

/// Kills what `list` finds until it finds nothing alive.
pub(super) fn kill_all(whose: &str, list: impl Fn() -> Vec<i32>) {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        let alive: Vec<i32> = list().into_iter().filter(|pid| !is_zombie(*pid)).collect();
        if alive.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            warn!(whose, ?alive, "processes would not end");
            return;
        }
        for pid in alive {
            // It may have ended by itself.
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit(") ").next().map(|rest| rest.starts_with('Z')))
        .unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_labs_programs_with_an_argument_of_the_run_are_ours() {
        let line = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let belongs = |argument: &str| argument.contains("/pp1n0/");
        let qemu = line(&["/usr/bin/qemu-system-x86_64", "-qmp", "unix:/tmp/pp1n0/a/qmp"]);
        assert!(is_ours(&qemu, belongs));
        assert!(is_ours(&line(&["/x/pageport-worker", "--config", "/l/pp1n0/config/w.toml"]), belongs));
        assert!(!is_ours(&line(&["/x/pageport-worker", "--config", "/l/pp1n1/config/w.toml"]), belongs));
        assert!(!is_ours(&line(&["tail", "-f", "/l/pp1n0/logs/w.log"]), belongs));
        assert!(!is_ours(&[], belongs));
    }
}
