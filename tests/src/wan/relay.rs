//! The WAN between ports of one machine, for when there are no namespaces: relays UDP between workers and TCP between
//! QEMUs over the same lines as the emulator's: rate, delay, loss and queue per direction, counted. One thread owns it all.
//!
//! ```text
//!  worker a ──to b's face──▶ ┌ face b ┐      line a→b      ┌ face a ┐ ──▶ worker b   (each worker sees the others' faces only,
//!  worker a ◀──────────────  └────────┘ ◀─── line b→a ───  └────────┘ ◀── worker b    and replies go back the same way)
//!  QEMU at a ──▶ door a→b ──────────────────── line a→b ───────────────────▶ QEMU at b
//! ```
//! A face is a worker's address as the others know it. A datagram that reaches face b comes from the worker that has its
//! sender's address; others are dropped.
//!
//! Bytes count with the headers that they would have on a real line. Does not carry anything else: controllers and gRPC talk
//! directly. The TCP of QEMU ends at the relay on both sides, so its own congestion control has nothing to do.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use tracing::{debug, info};

use super::config::LinkConfig;
use super::emulator::TICK;
use super::flow::{Class, UDP};
use super::lines::{Lines, Pair};
use super::steer::{Steering, Told};
use super::stream::Stream;

/// Datagrams read from one socket before the others have their turn.
const MAX_BATCH: usize = 512;
/// Larger than any datagram.
const DATAGRAM_BUFFER: usize = 65_536;
/// IP and UDP.
const DATAGRAM_HEADER_BYTES: usize = 28;
/// What may wait for the relay's thread in a face's socket; the kernel may grant less.
const FACE_BUFFER_BYTES: usize = 8 << 20;
/// Little, so that senders feel the line and not this socket.
const DOOR_BUFFER_BYTES: usize = 128 << 10;
/// Connections at a time.
const MAX_STREAMS: usize = 256;

/// A site of the relay.
#[derive(Clone, Debug)]
pub struct RelaySite {
    /// Its name.
    pub name: String,
    /// Where its worker's UDP socket is.
    pub peer: SocketAddr,
    /// Where its QEMU takes TCP connections.
    pub stream: SocketAddr,
}

/// The whole relay.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// The sites.
    pub sites: Vec<RelaySite>,
    /// The directed links.
    pub links: Vec<LinkConfig>,
    /// Which packets are lost.
    pub seed: u64,
    /// As which service's ports UDP and TCP are counted.
    pub counted_as: (u16, u16),
    /// Path of the unix socket that takes commands.
    pub control: PathBuf,
}

/// Why the relay cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A socket cannot be made.
    #[error("open the relay's {socket} for site {site}")]
    Open {
        /// Which socket.
        socket: &'static str,
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
        path: PathBuf,
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

/// What is under way.
#[derive(Debug)]
pub(super) enum Parcel {
    /// A whole datagram.
    Datagram(Vec<u8>),
    /// A stretch of a connection's bytes.
    Piece {
        /// Which connection.
        stream: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The end of one direction of a connection.
    End {
        /// Which connection.
        stream: u64,
    },
}

impl Parcel {
    pub(super) fn payload(&self) -> usize {
        match self {
            Self::Datagram(bytes) | Self::Piece { bytes, .. } => bytes.len(),
            Self::End { .. } => 0,
        }
    }
}

struct Door {
    pair: Pair,
    listener: TcpListener,
}

/// A relay with its sockets open, not yet carrying packets.
pub struct Relay {
    config: RelayConfig,
    lines: Lines<Parcel>,
    faces: Vec<UdpSocket>,
    doors: Vec<Door>,
    streams: BTreeMap<u64, Stream>,
    next_stream: u64,
    steering: Steering,
    start: Instant,
}

impl Relay {
    /// Opens the faces, the doors and the control socket, on ports of the loopback that are free.
    ///
    /// # Errors
    /// When one of them cannot be opened.
    pub fn open(config: RelayConfig) -> Result<Self, RelayError> {
        let (mut faces, mut doors) = (Vec::new(), Vec::new());
        for (to, site) in config.sites.iter().enumerate() {
            let failed = |socket| {
                let site = site.name.clone();
                move |source| RelayError::Open { socket, site, source }
            };
            faces.push(face().map_err(failed("face"))?);
            for from in (0..config.sites.len()).filter(|from| *from != to) {
                doors.push(Door { pair: (from, to), listener: door().map_err(failed("door"))? });
            }
        }
        let steering = Steering::listen(&config.control)
            .map_err(|source| RelayError::Listen { path: config.control.clone(), source })?;
        let names = config.sites.iter().map(|site| site.name.clone()).collect();
        let lines = Lines::new(names, &config.links, config.seed);
        info!(sites = config.sites.len(), links = config.links.len(), "relay is up");
        let (streams, start) = (BTreeMap::new(), Instant::now());
        Ok(Self { config, lines, faces, doors, streams, next_stream: 0, steering, start })
    }

    fn position(&self, site: &str) -> Option<usize> {
        self.config.sites.iter().position(|known| known.name == site)
    }

    /// Where the others reach a site's worker.
    #[must_use]
    pub fn face(&self, site: &str) -> Option<SocketAddr> {
        self.faces.get(self.position(site)?)?.local_addr().ok()
    }

    /// Where one site reaches another's QEMU.
    #[must_use]
    pub fn door(&self, from: &str, to: &str) -> Option<SocketAddr> {
        let pair = (self.position(from)?, self.position(to)?);
        self.doors.iter().find(|door| door.pair == pair)?.listener.local_addr().ok()
    }

    /// Carries until it is asked to stop.
    ///
    /// # Errors
    /// When waiting for packets fails.
    pub fn run(mut self) -> Result<(), RelayError> {
        let mut buffer = vec![0; DATAGRAM_BUFFER];
        loop {
            let streams = &mut self.streams;
            let told = self.steering.serve(&mut self.lines, |parcel| match parcel {
                Parcel::Datagram(_) => {}
                // Its bytes are gone for good: the connection breaks.
                Parcel::Piece { stream, .. } | Parcel::End { stream } => drop(streams.remove(&stream)),
            });
            if told == Told::Stop {
                return Ok(());
            }
            let moved = self.read_datagrams(&mut buffer) + self.accept() + self.pump();
            self.deliver();
            if moved > 0 {
                std::thread::sleep(TICK);
            } else {
                self.wait().map_err(|source| RelayError::Wait { source })?;
            }
        }
    }

    fn read_datagrams(&mut self, buffer: &mut [u8]) -> usize {
        let mut total = 0;
        let class = Class::Underlay { protocol: UDP, port: self.config.counted_as.0 };
        for (to, face) in self.faces.iter().enumerate() {
            for _ in 0..MAX_BATCH {
                // Empty, or the echo of a datagram that nobody took: there is nothing to carry.
                let Ok((size, sender)) = face.recv_from(buffer) else { break };
                total += 1;
                let Some(from) = self.config.sites.iter().position(|site| site.peer == sender) else { continue };
                let datagram = Parcel::Datagram(buffer[..size].to_vec());
                let size = size + DATAGRAM_HEADER_BYTES;
                // What is not carried is lost, and counted as such.
                self.lines.offer(self.start.elapsed(), (from, to), class, size, datagram).ok();
            }
        }
        total
    }

    fn accept(&mut self) -> usize {
        let mut total = 0;
        for door in &self.doors {
            while let Ok((near, _)) = door.listener.accept() {
                total += 1;
                if self.streams.len() >= MAX_STREAMS {
                    continue;
                }
                let id = self.next_stream;
                self.next_stream += 1;
                let port = self.config.counted_as.1;
                let far = TcpStream::connect(self.config.sites[door.pair.1].stream);
                match far.and_then(|far| Stream::join(id, [near, far], door.pair, port)) {
                    Ok(stream) => drop(self.streams.insert(id, stream)),
                    Err(error) => debug!(%error, "connection not relayed"),
                }
            }
        }
        total
    }

    fn pump(&mut self) -> usize {
        let (now, mut total) = (self.start.elapsed(), 0);
        let lines = &mut self.lines;
        self.streams.retain(|id, stream| match stream.pump(now, lines) {
            Ok(pieces) => {
                total += pieces;
                true
            }
            Err(error) => {
                debug!(id, %error, "connection broke");
                false
            }
        });
        total
    }

    fn deliver(&mut self) {
        let now = self.start.elapsed();
        while let Some((pair, parcel)) = self.lines.pop_due(now) {
            match parcel {
                Parcel::Datagram(bytes) => {
                    let sent = self.faces[pair.0].send_to(&bytes, self.config.sites[pair.1].peer);
                    if let Err(error) = sent {
                        debug!(%error, "datagram not delivered");
                    }
                }
                Parcel::Piece { stream, bytes } => {
                    if let Some(stream) = self.streams.get_mut(&stream) {
                        stream.arrive(pair, Some(&bytes));
                    }
                }
                Parcel::End { stream } => {
                    if let Some(stream) = self.streams.get_mut(&stream) {
                        stream.arrive(pair, None);
                    }
                }
            }
        }
        self.streams.retain(|_, stream| stream.flush().is_ok() && !stream.is_over());
    }

    fn wait(&mut self) -> io::Result<()> {
        let now = self.start.elapsed();
        let mut waits = vec![PollFd::new(self.steering.as_fd(), PollFlags::POLLIN)];
        waits.extend(self.faces.iter().map(|face| PollFd::new(face.as_fd(), PollFlags::POLLIN)));
        waits.extend(self.doors.iter().map(|door| PollFd::new(door.listener.as_fd(), PollFlags::POLLIN)));
        let mut wait_a_tick = false;
        for stream in self.streams.values() {
            let (readable, blocked) = stream.readable(now, &self.lines);
            waits.extend(readable.into_iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            wait_a_tick |= blocked || stream.is_waiting();
        }
        let due = self.lines.next_due().map(|due| due.saturating_sub(now).max(TICK));
        let timeout: Option<Duration> = if wait_a_tick { Some(TICK) } else { due };
        match ppoll(&mut waits, timeout.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.steering.woken();
        Ok(())
    }
}

fn face() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, sockopt::RcvBuf, &FACE_BUFFER_BYTES)?;
    Ok(socket)
}

fn door() -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    setsockopt(&listener, sockopt::RcvBuf, &DOOR_BUFFER_BYTES)?;
    Ok(listener)
}
