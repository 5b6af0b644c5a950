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

/// Set for the process that [`enter`] starts.
const INSIDE: &str = "PAGEPORT_LAB_INSIDE";

/// Mounts over /run, where `ip netns` keeps its names and only the real root may write; then makes a device.
const PROBE: &str =
    "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add pp && ip -n pp tuntap add dev pp mode tun";
/// As the probe, then becomes the program that is given.
const BECOME: &str = "mount -t tmpfs tmpfs /run && mkdir /run/netns && exec \"$0\" \"$@\"";

fn unshare(script: &str) -> Command {
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
        .args(["--mount", "--net", "--", "sh", "-c", script])
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Makes sure that this process may make namespaces and devices: tries it, apart from everything else. Without root it then
/// runs this program again as root of a user namespace of its own, and does not come back.
///
/// # Errors
/// Why there can be none.
pub fn enter() -> io::Result<()> {
    let output = unshare(PROBE).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.lines().next().unwrap_or("no reason given").to_owned()));
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if std::env::var_os(INSIDE).is_some() {
        return Err(io::Error::other("the user namespace does not make root"));
    }
    Err(unshare(BECOME).arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(INSIDE, "1").exec())
}

/// Whether this process may make namespaces and devices.
#[must_use]
pub fn available() -> bool {
    nix::unistd::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists()
}
