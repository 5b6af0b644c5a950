//! A small cluster in this process for the tests of the real binary: TLS identities and fakes of the services.
//!
//! | module | what |
//! |---|---|
//! | `authority` | TLS identities |
//! | `fake` | fakes of the services, which answer by a script that the test writes |

#![allow(dead_code, missing_docs, unused_imports, clippy::unwrap_used)] // each test file uses its part

mod authority;
mod fake;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

pub use authority::Authority;
pub use fake::{Fake, Running, Step, vm};
use tokio::process::Command;

/// Longer than any command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// The binary, with an empty environment and the operator's identity.
pub fn pageportctl(authority: &Authority, controllers: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageportctl"));
    command
        .env_clear()
        .env("HOME", authority.folder.path())
        .env("PAGEPORT_CONTROLLERS", controllers)
        .env("PAGEPORT_CA", authority.path("ca.pem"))
        .env("PAGEPORT_CERT", authority.path("operator.pem"))
        .env("PAGEPORT_KEY", authority.path("operator.key"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// How a finished command ended.
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn lines(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The one error line.
    #[track_caller]
    pub fn error(&self) -> &str {
        assert_eq!(self.code, 1, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        errors[0]
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

pub async fn finish(mut command: Command) -> Ended {
    let output = tokio::time::timeout(COMMAND_DEADLINE, command.output()).await.expect("the command hangs").unwrap();
    ended(output)
}

pub fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub async fn run(authority: &Authority, controllers: &str, arguments: &[&str]) -> Ended {
    finish(pageportctl(authority, controllers, arguments)).await
}

pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}
