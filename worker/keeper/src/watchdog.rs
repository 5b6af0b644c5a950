//! Signs of life for systemd, for the guard and for a keeper that is a service of its own with `WatchdogSec=`: when stopped they
//! give none, and systemd kills them (and with a keeper its QEMU). Does nothing anywhere else.
//!
//! The variables name a process (`WATCHDOG_PID`); those inherited from somebody else's service are not meant for us.

use std::cell::Cell;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::boot_time::BootTime;

/// What systemd sets; a worker must not hand its own on.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];
/// Signs that fit into the time that systemd waits for one.
const SIGNS_PER_LIMIT: u32 = 3;

/// The way to systemd, if there is one.
#[derive(Debug)]
pub(crate) struct Watchdog {
    socket: Option<(UnixDatagram, SocketAddr)>,
    interval: Option<Duration>,
    last: Cell<BootTime>,
}

impl Watchdog {
    pub fn from_environment() -> Self {
        let [socket, limit, process] = VARIABLES.map(|name| std::env::var(name).ok());
        Self::new(socket.as_deref(), limit.as_deref(), process.as_deref(), std::process::id())
    }

    fn new(socket: Option<&str>, limit_us: Option<&str>, process: Option<&str>, own: u32) -> Self {
        let address = socket.and_then(|name| match name.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name).ok(),
            None => SocketAddr::from_pathname(name).ok(),
        });
        let unbound = || {
            let socket = UnixDatagram::unbound().ok()?;
            // A systemd that does not read must not stop the keeper.
            socket.set_nonblocking(true).ok()?;
            Some(socket)
        };
        let ours = process.is_none_or(|process| process.parse() == Ok(own));
        let limit = limit_us.filter(|_| ours).and_then(|limit| limit.parse().ok()).map(Duration::from_micros);
        let interval = limit.filter(|limit| !limit.is_zero()).map(|limit| limit / SIGNS_PER_LIMIT);
        Self { socket: address.and_then(|address| Some((unbound()?, address))), interval, last: BootTime::ZERO.into() }
    }

    /// The keeper's child is started; the guard has looked.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// Called at every look; says so as often as needed.
    pub fn alive(&self, now: BootTime) {
        if self.interval.is_some_and(|interval| now.saturating_since(self.last.get()) >= interval) {
            self.send("WATCHDOG=1");
            self.last.set(now);
        }
    }

    fn send(&self, word: &str) {
        if let Some((socket, address)) = &self.socket {
            // Nobody to tell: then nobody waits for it either.
            let _ = socket.send_to_addr(word.as_bytes(), address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(watchdog: &Watchdog, systemd: &UnixDatagram) -> Vec<String> {
        watchdog.ready();
        for look in 0..10 {
            watchdog.alive(BootTime::from_nanos(10_000_000_000) + Duration::from_millis(100) * look);
        }
        let mut word = [0; 64];
        std::iter::from_fn(|| {
            systemd.recv(&mut word).ok().map(|length| String::from_utf8_lossy(&word[..length]).into())
        })
        .collect()
    }

    #[test]
    fn signs_of_life_are_given_three_times_within_the_limit_and_only_for_this_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_nonblocking(true).unwrap();
        let path = path.to_str();
        let told = |watchdog: Watchdog| words(&watchdog, &systemd);
        assert_eq!(
            told(Watchdog::new(path, Some("900000"), Some("7"), 7)),
            ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]
        );
        assert_eq!(told(Watchdog::new(path, Some("900000"), Some("8"), 7)), ["READY=1"]);
        assert_eq!(told(Watchdog::new(path, Some("nonsense"), None, 7)), ["READY=1"]);
        assert!(told(Watchdog::new(None, Some("900000"), None, 7)).is_empty());
        assert!(told(Watchdog::new(Some("/nonexistent/notify"), Some("900000"), None, 7)).is_empty());
    }
}
