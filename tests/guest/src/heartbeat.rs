//! The guest's heartbeat: numbered datagrams, broadcast to the segment, so that whoever listens at the hypervisors' network
//! devices learns which copy of the guest executes.
//!
//! A copy of a running guest has the same memory and so the same next number: two copies that both execute send the same
//! number from two places, whether at the same time or one after the other. No number is sent twice by one guest.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

/// Where heartbeats go; nobody needs to listen there.
pub const HEARTBEAT_PORT: u16 = 7002;
/// What each begins with.
const MAGIC: &str = "pageport-heartbeat";

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Differs for every boot.
    pub boot_id: String,
    /// Grows by one, from 0 at boot.
    pub number: u64,
}

impl Heartbeat {
    /// As it is sent.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{MAGIC} {} {}\n", self.boot_id, self.number)
    }

    /// Found anywhere in a frame.
    #[must_use]
    pub fn find_in(frame: &[u8]) -> Option<Self> {
        let begin = frame.windows(MAGIC.len()).position(|window| window == MAGIC.as_bytes())?;
        let text = std::str::from_utf8(frame[begin..].split(|byte| *byte == b'\n').next()?).ok()?;
        let mut words = text.split(' ').skip(1);
        let (boot_id, number) = (words.next()?, words.next()?.parse().ok()?);
        Some(Self { boot_id: boot_id.to_owned(), number })
    }
}

/// Beats until the process ends.
///
/// # Errors
/// When there can be no socket.
pub fn beat(to: Ipv4Addr, period: Duration) -> std::io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_broadcast(true)?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let mut heartbeat = Heartbeat { boot_id, number: 0 };
    loop {
        // One that finds no room is lost, and its number with it.
        socket.send_to(heartbeat.to_text().as_bytes(), (to, HEARTBEAT_PORT)).ok();
        heartbeat.number += 1;
        std::thread::sleep(period);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_is_found_in_a_frame_and_nothing_else_is() {
        let heartbeat = Heartbeat { boot_id: "b-1".into(), number: 42 };
        let mut frame = vec![0xff; 42];
        frame.extend_from_slice(heartbeat.to_text().as_bytes());
        frame.extend_from_slice(&[0; 8]);
        assert_eq!(Heartbeat::find_in(&frame), Some(heartbeat));
        for foreign in [&b"pageport-heartbeat"[..], b"pageport-heartbeat x y\n", b"pageport-heartbeat \xff 1\n", b""] {
            assert_eq!(Heartbeat::find_in(foreign), None);
        }
    }
}
