//! `pageportctl`, run as an operator at a site would.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;

use super::Lab;
use crate::paths;

/// How long a command that does not watch may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a command said.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// It cannot be run.
    #[error("run pageportctl {arguments}")]
    Run {
        /// What was asked.
        arguments: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not end in time.
    #[error("pageportctl {arguments}: still running after {seconds} s")]
    Late {
        /// What was asked.
        arguments: String,
        /// How long.
        seconds: u64,
    },
    /// It failed.
    #[error("pageportctl {arguments}: {status}: {said}")]
    Failed {
        /// What was asked.
        arguments: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// Its answer is no JSON.
    #[error("pageportctl {arguments}: parse its answer")]
    Parse {
        /// What was asked.
        arguments: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl Lab {
    /// A `pageportctl` at a site with the operator's identity, ready to be given arguments.
    #[must_use]
    pub fn ctl_command(&self, site: &str) -> Command {
        let mut command = Command::from(self.network.place(site).command(paths::program("pageportctl")));
        for (key, value) in self.ctl_environment() {
            command.env(key, value);
        }
        command.kill_on_drop(true);
        command
    }

    /// What `pageportctl` must be told by its environment.
    #[must_use]
    pub fn ctl_environment(&self) -> [(&'static str, String); 4] {
        let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
        [
            ("PAGEPORT_CONTROLLERS", self.network.addresses().controllers().join(",")),
            ("PAGEPORT_CA", path(&self.operator.ca)),
            ("PAGEPORT_CERT", path(&self.operator.cert)),
            ("PAGEPORT_KEY", path(&self.operator.key)),
        ]
    }

    /// Writes a script that runs `pageportctl` at site a as the operator, for a person to type; hands back its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_ctl_script(&self) -> std::io::Result<PathBuf> {
        let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
        let mut script = String::from("#!/bin/sh\n# Runs pageportctl at site a of the lab that is running.\n");
        for (key, value) in self.ctl_environment() {
            script += &format!("export {key}={}\n", quoted(&value));
        }
        let program = paths::program("pageportctl");
        let command = self.network.place("a").command(program);
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let words: Vec<_> = words.map(|word| quoted(&word.to_string_lossy())).collect();
        script += &format!("exec {} \"$@\"\n", words.join(" "));
        let path = paths::lab().join("ctl");
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// Runs `pageportctl` at site a and hands back what it said, whether it succeeded or not.
    ///
    /// # Errors
    /// When it cannot be run or does not end within `deadline`.
    pub async fn ctl_within<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        deadline: Duration,
    ) -> Result<Output, CtlError> {
        let words: Vec<_> = arguments.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let mut command = self.ctl_command("a");
        command.args(&words).stdin(Stdio::null());
        let arguments = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        let output = timeout(deadline, command.output())
            .await
            .map_err(|_| CtlError::Late { arguments: arguments.clone(), seconds: deadline.as_secs() })?
            .map_err(|source| CtlError::Run { arguments, source })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    /// Runs `pageportctl` at site a; it must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ctl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output, CtlError> {
        let words: Vec<_> = arguments.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let output = self.ctl_within(&words, DEADLINE).await?;
        if !output.status.success() {
            let arguments = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
            let said = output.stderr.trim().to_owned();
            return Err(CtlError::Failed { arguments, status: output.status, said });
        }
        Ok(output)
    }

    /// Runs `pageportctl --json` at site a; it must succeed. The message has the names of the `.proto` files.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ctl_json<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Value, CtlError> {
        let mut words = vec![OsStr::new("--json").to_owned()];
        words.extend(arguments.into_iter().map(|word| word.as_ref().to_owned()));
        let output = self.ctl(&words).await?;
        serde_json::from_str(&output.stdout).map_err(|source| CtlError::Parse {
            arguments: words.join(OsStr::new(" ")).to_string_lossy().into_owned(),
            source,
        })
    }

    /// What the worker at site a found to run guests with.
    ///
    /// # Errors
    /// When the controllers do not say.
    pub async fn accelerator(&self) -> Result<String, CtlError> {
        let answer = self.ctl_json(["worker", "list"]).await?;
        let workers = answer["workers"].as_array().into_iter().flatten();
        let at_a = workers.filter(|worker| worker["site"] == "a").find_map(|worker| worker["accelerator"].as_str());
        Ok(at_a.filter(|name| !name.is_empty()).unwrap_or("tcg").to_owned())
    }
}
