//! Network namespaces: made and removed with `ip`, entered by threads.
//!
//! A thread that enters a namespace ends there, so that no thread of a runtime is ever left in the wrong one; sockets and
//! devices that were opened inside stay inside, whoever uses them.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread inside the namespace `name` and waits for it.
///
/// # Errors
/// When there is no such namespace or it may not be entered.
pub fn within<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let namespace = File::open(PathBuf::from("/run/netns").join(name))?;
    let thread = std::thread::Builder::new().name(format!("in-{name}")).spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })?;
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A command that will run inside the namespace. Its process id is that of `program`.
#[must_use]
pub fn command(name: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]).arg(program);
    command
}

/// Runs `ip` with `args`.
///
/// # Errors
/// When it cannot be run or fails; the error carries what it said.
pub fn ip<'a>(args: impl IntoIterator<Item = &'a str>) -> io::Result<()> {
    let args: Vec<&str> = args.into_iter().collect();
    let output = Command::new("ip").args(&args).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("ip {}: {}", args.join(" "), said.trim())))
}

/// A namespace that is removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with its loopback up and without IPv6.
    ///
    /// # Errors
    /// When it exists already or may not be made.
    pub fn create(name: &str) -> io::Result<Self> {
        ip(["netns", "add", name])?;
        let namespace = Self { name: name.to_owned() };
        namespace.ip("link set lo up")?;
        within(name, || {
            for scope in ["all", "default"] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").ok();
            }
        })?;
        Ok(namespace)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` with these space-separated arguments inside the namespace.
    ///
    /// # Errors
    /// As [`ip`].
    pub fn ip(&self, args: &str) -> io::Result<()> {
        ip(["-n", &self.name].into_iter().chain(args.split_whitespace()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(["netns", "del", &self.name]) {
            tracing::warn!(namespace = self.name, %error, "namespace not removed");
        }
    }
}

/// Set for the process that [`enter_user_namespace`] starts.
const INSIDE: &str = "PAGEPORT_LAB_INSIDE";

/// Without root: runs this program again as root of a user namespace of its own, which may make network namespaces there.
/// Comes back only when that is not needed, was done already, or cannot be done.
///
/// # Errors
/// Why it cannot be done.
pub fn enter_user_namespace() -> io::Result<()> {
    if nix::unistd::geteuid().is_root() || std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    // `ip netns` keeps its names below /run, which only the real root may write.
    let script = "mount -t tmpfs tmpfs /run && mkdir /run/netns && exec \"$0\" \"$@\"";
    let error = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--net", "--", "sh", "-c", script])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .exec();
    Err(error)
}

/// Whether this process may make namespaces and devices.
#[must_use]
pub fn available() -> bool {
    nix::unistd::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists()
}
