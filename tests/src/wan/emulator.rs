//! The shell around [`Fabric`]: devices, clock, control socket. One thread owns it all; control connections send it messages.
//!
//! ```text
//! control connection ──request──▶ channel + wake ─┐
//! TUN, TAP of each site ──packets──▶ read all ────┼─▶ Fabric ──due──▶ write ──▶ TUN, TAP of the other site
//!                                                 └─ busy: sleep one tick · idle: wait for a packet, a command or the next due
//! ```
//! While packets flow it wakes once per [`TICK`] and handles what has gathered, which costs little and adds at most one tick
//! to the delay.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use pageport_tun::Kind;
use tracing::{debug, info};

use super::config::{ConfigError, TAP_DEVICE, TUN_DEVICE, WanConfig};
use super::fabric::{Fabric, Plane};
use super::steer::{Steering, Told};
use crate::netns;

/// How long packets gather while there are some.
pub const TICK: Duration = Duration::from_micros(250);
/// Packets read from one device before the others have their turn.
const MAX_BATCH: usize = 512;
/// Larger than any packet of a device with an MTU of up to 9000.
const PACKET_BUFFER: usize = 9216;

/// Why the emulator cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// The configuration cannot be served.
    #[error("start wan emulator")]
    Config(#[from] ConfigError),
    /// A device cannot be opened.
    #[error("open device {device} of site {site}")]
    Device {
        /// Which device.
        device: &'static str,
        /// Whose.
        site: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control socket cannot be made.
    #[error("listen on control socket {path}")]
    Listen {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Waiting for packets failed.
    #[error("wait for packets")]
    Wait {
        /// Why.
        #[source]
        source: io::Error,
    },
}

struct Device {
    site: usize,
    plane: Plane,
    file: File,
}

/// An emulator with its devices open and its socket listening, not yet carrying packets.
pub struct Emulator {
    fabric: Fabric,
    devices: Vec<Device>,
    steering: Steering,
    start: Instant,
}

impl Emulator {
    /// Opens the devices and the control socket.
    ///
    /// # Errors
    /// When one of them cannot be opened.
    pub fn open(config: &WanConfig) -> Result<Self, EmulatorError> {
        config.validate()?;
        let mut devices = Vec::new();
        for (site, site_config) in config.sites.iter().enumerate() {
            for (plane, name, kind) in
                [(Plane::Underlay, TUN_DEVICE, Kind::Tun), (Plane::Segment, TAP_DEVICE, Kind::Tap)]
            {
                let open = move || pageport_tun::open(name, kind);
                let opened = match &site_config.netns {
                    Some(netns) => netns::within(netns, open).and_then(|result| result),
                    None => open(),
                };
                let file = opened.map_err(|source| EmulatorError::Device {
                    device: name,
                    site: site_config.name.clone(),
                    source,
                })?;
                devices.push(Device { site, plane, file });
            }
        }
        let steering = Steering::listen(&config.control)
            .map_err(|source| EmulatorError::Listen { path: config.control.clone(), source })?;
        info!(sites = config.sites.len(), links = config.links.len(), "wan emulator is up");
        Ok(Self { fabric: Fabric::new(config), devices, steering, start: Instant::now() })
    }

    /// Carries packets until it is asked to stop.
    ///
    /// # Errors
    /// When waiting for packets fails.
    pub fn run(mut self) -> Result<(), EmulatorError> {
        let mut buffer = [0; PACKET_BUFFER];
        loop {
            if self.steering.serve(self.fabric.lines(), drop) == Told::Stop {
                return Ok(());
            }
            let read = self.read_packets(&mut buffer);
            self.deliver();
            if read > 0 {
                std::thread::sleep(TICK);
            } else {
                self.wait().map_err(|source| EmulatorError::Wait { source })?;
            }
        }
    }

    fn read_packets(&mut self, buffer: &mut [u8]) -> usize {
        let mut total = 0;
        for device in &self.devices {
            for _ in 0..MAX_BATCH {
                match (&device.file).read(buffer) {
                    Ok(size) => {
                        self.fabric.ingress(self.start.elapsed(), device.site, device.plane, &buffer[..size]);
                        total += 1;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // Empty, or the device is down: then there is nothing to carry.
                    Err(_) => break,
                }
            }
        }
        total
    }

    fn deliver(&mut self) {
        let now = self.start.elapsed();
        while let Some((site, packet)) = self.fabric.pop_due(now) {
            let device = self.devices.iter().find(|d| d.site == site && d.plane == packet.plane);
            if let Some(Err(error)) = device.map(|d| (&d.file).write(&packet.bytes)) {
                debug!(site, %error, "packet not delivered");
            }
            self.fabric.recycle(packet);
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let timeout = self.fabric.next_due().map(|due| due.saturating_sub(self.start.elapsed()).max(TICK));
        let mut waits: Vec<PollFd<'_>> =
            self.devices.iter().map(|d| PollFd::new(d.file.as_fd(), PollFlags::POLLIN)).collect();
        waits.push(PollFd::new(self.steering.as_fd(), PollFlags::POLLIN));
        match ppoll(&mut waits, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // A device that is down is always "ready": do not spin on it.
        if waits.iter().any(|w| w.revents().is_some_and(|e| e.contains(PollFlags::POLLERR))) {
            std::thread::sleep(TICK);
        }
        self.steering.woken();
        Ok(())
    }
}
