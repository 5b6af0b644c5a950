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
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use pageport_tun::Kind;
use tracing::{debug, info, warn};

use super::config::{ConfigError, TAP_DEVICE, TUN_DEVICE, WanConfig};
use super::control::{REPLY_DEADLINE, Reply, Request, read_line};
use super::fabric::{Fabric, Plane};
use crate::netns;

/// How long packets gather while there are some.
pub const TICK: Duration = Duration::from_micros(250);
/// Packets read from one device before the others have their turn.
const MAX_BATCH: usize = 512;
/// Larger than any packet of a device with an MTU of up to 9000.
const PACKET_BUFFER: usize = 9216;
/// Control connections at a time.
const MAX_CONTROL_CONNECTIONS: usize = 32;

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

type Call = (Request, SyncSender<Reply>);

/// An emulator with its devices open and its socket listening, not yet carrying packets.
pub struct Emulator {
    fabric: Fabric,
    devices: Vec<Device>,
    calls: Receiver<Call>,
    wake: UnixStream,
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
        let listen_error = |source| EmulatorError::Listen { path: config.control.clone(), source };
        let (calls_in, calls) = channel();
        let (wake_in, wake) = UnixStream::pair().map_err(listen_error)?;
        wake.set_nonblocking(true).map_err(listen_error)?;
        wake_in.set_nonblocking(true).map_err(listen_error)?;
        let listener = UnixListener::bind(&config.control).map_err(listen_error)?;
        std::thread::spawn(move || accept(&listener, &calls_in, &wake_in));
        info!(sites = config.sites.len(), links = config.links.len(), "wan emulator is up");
        Ok(Self { fabric: Fabric::new(config), devices, calls, wake, start: Instant::now() })
    }

    /// Carries packets until it is asked to stop.
    ///
    /// # Errors
    /// When waiting for packets fails.
    pub fn run(mut self) -> Result<(), EmulatorError> {
        let mut buffer = [0; PACKET_BUFFER];
        loop {
            while let Ok((request, reply_to)) = self.calls.try_recv() {
                let stop = request == Request::Stop;
                let reply = self.answer(request);
                // The connection may have given up meanwhile.
                drop(reply_to.send(reply));
                if stop {
                    return Ok(());
                }
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

    fn answer(&mut self, request: Request) -> Reply {
        debug!(?request, "control request");
        let result = match request {
            Request::Stop => return Reply::Done,
            Request::Counters => return Reply::Counters { links: self.fabric.counters(), cpu_ms: cpu_ms() },
            Request::SetLink { from, to, shape } => match shape.validate() {
                Ok(()) => self.fabric.set_shape(&from, &to, shape),
                Err(error) => return Reply::Refused { reason: error.to_string() },
            },
            Request::Cut { from, to } => self.fabric.cut(&from, &to),
            Request::Heal { from, to } => self.fabric.heal(&from, &to),
        };
        result.map_or_else(|error| Reply::Refused { reason: error.to_string() }, |()| Reply::Done)
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
        waits.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        match ppoll(&mut waits, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // A device that is down is always "ready": do not spin on it.
        if waits.iter().any(|w| w.revents().is_some_and(|e| e.contains(PollFlags::POLLERR))) {
            std::thread::sleep(TICK);
        }
        let mut drained = [0; 64];
        while matches!((&self.wake).read(&mut drained), Ok(1..)) {}
        Ok(())
    }
}

/// CPU time that this thread has used.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0) / 1_000_000
}

fn accept(listener: &UnixListener, calls: &Sender<Call>, wake: &UnixStream) {
    let open = Arc::new(Mutex::new(0usize));
    for connection in listener.incoming() {
        let (Ok(connection), Ok(wake)) = (connection, wake.try_clone()) else { continue };
        let (open, calls) = (Arc::clone(&open), calls.clone());
        let Ok(mut count) = open.lock() else { return };
        if *count >= MAX_CONTROL_CONNECTIONS {
            warn!("too many control connections, one refused");
            continue;
        }
        *count += 1;
        drop(count);
        std::thread::spawn(move || {
            if let Err(error) = serve(&connection, &calls, &wake) {
                debug!(%error, "control connection ended");
            }
            if let Ok(mut count) = open.lock() {
                *count -= 1;
            }
        });
    }
}

fn serve(connection: &UnixStream, calls: &Sender<Call>, mut wake: &UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(connection);
    while let Some(line) = read_line(&mut reader)? {
        let reply = match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                let (reply_to, reply) = sync_channel(1);
                calls.send((request, reply_to)).map_err(io::Error::other)?;
                // A full pipe already holds a wake-up.
                drop(wake.write(&[1]));
                reply.recv_timeout(REPLY_DEADLINE).map_err(io::Error::other)?
            }
            Err(error) => Reply::Refused { reason: error.to_string() },
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        (&mut &*connection).write_all(&text)?;
    }
    Ok(())
}
