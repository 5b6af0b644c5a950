//! One daemon of the lab: started at its site, killed, stopped, frozen and started again at will.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::network::Place;

/// How long a daemon may take to end when it is asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// Why a daemon did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// It cannot be started.
    #[error("start {name}")]
    Start {
        /// Which daemon.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has ended by itself.
    #[error("{name} ended with {status}; its log {log} ends with:\n{tail}")]
    Ended {
        /// Which daemon.
        name: String,
        /// How.
        status: ExitStatus,
        /// Where its log is.
        log: PathBuf,
        /// Its last words.
        tail: String,
    },
    /// It cannot be signalled.
    #[error("send {signal} to {name}")]
    Signal {
        /// Which signal.
        signal: &'static str,
        /// Which daemon.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It did not end when asked to.
    #[error("stop {name}: it still runs after {} s", STOP_DEADLINE.as_secs())]
    WouldNotStop {
        /// Which daemon.
        name: String,
    },
}

/// A daemon. Killed when dropped; guests that it started are not (see [`super::Lab`]).
#[derive(Debug)]
pub struct Daemon {
    name: String,
    place: Place,
    program: PathBuf,
    config: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    environment: Vec<(&'static str, OsString)>,
    child: Option<Child>,
}

impl Daemon {
    /// Starts `program --config config` at `place`, its output going to `log`; `environment` is added to this process's own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        name: &str,
        place: Place,
        program: &Path,
        config: &Path,
        log: &Path,
        environment: &[(&'static str, OsString)],
    ) -> Result<Self, DaemonError> {
        let arguments = vec!["--config".into(), config.into()];
        let mut daemon = Self::of(name, place, program, arguments, log);
        daemon.config = config.to_owned();
        daemon.environment = environment.to_vec();
        daemon.spawned()
    }

    /// Starts the guard of the worker whose runtime folder this is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_guard(
        name: &str,
        place: Place,
        keeper: &Path,
        runtime: &Path,
        log: &Path,
    ) -> Result<Self, DaemonError> {
        let arguments = vec!["guard".into(), "--runtime-dir".into(), runtime.into()];
        Self::of(name, place, keeper, arguments, log).spawned()
    }

    fn of(name: &str, place: Place, program: &Path, arguments: Vec<OsString>, log: &Path) -> Self {
        Self {
            name: name.to_owned(),
            place,
            program: program.to_owned(),
            config: PathBuf::new(),
            arguments,
            log: log.to_owned(),
            environment: vec![],
            child: None,
        }
    }

    fn spawned(mut self) -> Result<Self, DaemonError> {
        self.spawn()?;
        Ok(self)
    }

    fn spawn(&mut self) -> Result<(), DaemonError> {
        let error = |source| DaemonError::Start { name: self.name.clone(), source };
        let output = File::options().create(true).append(true).open(&self.log).map_err(error)?;
        let errors = output.try_clone().map_err(error)?;
        let child = self
            .place
            .command(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(error)?;
        self.child = Some(child);
        Ok(())
    }

    /// Its process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The highest resident memory that it has had since it was started last, while it runs.
    #[must_use]
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        self.status_bytes("VmHWM:")
    }

    /// Its resident memory, while it runs.
    #[must_use]
    pub fn memory_bytes(&self) -> Option<u64> {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, key: &str) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let kib = |line: &str| line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
        status.lines().find_map(kib).map(|kib| kib << 10)
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The file it was configured with; change it before a restart if need be. A guard has none.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When it has ended without being told to.
    pub fn check(&mut self) -> Result<(), DaemonError> {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => {
                self.child = None;
                let tail = tail(&self.log);
                Err(DaemonError::Ended { name: self.name.clone(), status, log: self.log.clone(), tail })
            }
            _ => Ok(()),
        }
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self) -> Result<(), DaemonError> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let name = &self.name;
        child.kill().and_then(|()| child.wait()).map(drop).map_err(|source| DaemonError::Signal {
            signal: "SIGKILL",
            name: name.clone(),
            source,
        })
    }

    /// Asks it to end and waits until it has.
    ///
    /// # Errors
    /// When it does not end in time; it is then killed.
    pub fn stop(&mut self) -> Result<(), DaemonError> {
        self.signal("SIGTERM", Signal::SIGTERM)?;
        let deadline = Instant::now() + STOP_DEADLINE;
        while let Some(child) = self.child.as_mut() {
            if matches!(child.try_wait(), Ok(Some(_))) {
                self.child = None;
            } else if Instant::now() > deadline {
                self.kill()?;
                return Err(DaemonError::WouldNotStop { name: self.name.clone() });
            } else {
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// `SIGSTOP`: it stays, but does nothing.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn freeze(&self) -> Result<(), DaemonError> {
        self.signal("SIGSTOP", Signal::SIGSTOP)
    }

    /// `SIGCONT`: it goes on.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn thaw(&self) -> Result<(), DaemonError> {
        self.signal("SIGCONT", Signal::SIGCONT)
    }

    /// Starts it again, after killing it if it runs.
    ///
    /// # Errors
    /// When it cannot be killed or started.
    pub fn restart(&mut self) -> Result<(), DaemonError> {
        self.kill()?;
        self.spawn()
    }

    fn signal(&self, name: &'static str, signal: Signal) -> Result<(), DaemonError> {
        let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok()) else { return Ok(()) };
        kill(Pid::from_raw(pid), signal).map_err(|errno| DaemonError::Signal {
            signal: name,
            name: self.name.clone(),
            source: errno.into(),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::warn!(name = self.name, %error, "daemon not ended");
        }
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    const LINES: usize = 15;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
