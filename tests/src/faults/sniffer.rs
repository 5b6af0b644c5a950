//! Sees the guest's heartbeats where they leave QEMU: at the tap devices of every site.
//!
//! A thread in each site's namespace reads a packet socket. A frame that *enters* the host through a tap was sent by the QEMU
//! behind it; what arrives from other sites enters through the WAN's devices and is not looked at.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::net::if_::if_indextoname;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use pageport_guest::heartbeat::Heartbeat;

use super::witness::Sighting;
use crate::lab::network::{Network, SITES};
use crate::netns;
use crate::wan::config::{TAP_DEVICE, TUN_DEVICE};

/// A heartbeat's frame is shorter; of others the rest is not read.
const READ_BYTES: usize = 160;
/// What may wait in the kernel while memory crosses the link.
const BUFFER_BYTES: usize = 8 << 20;
/// How often a thread looks whether it is to end.
const PATIENCE_MS: u16 = 100;
/// `PACKET_OUTGOING` of packet(7): the host sends it.
const OUTGOING: u8 = 4;

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Sniffer {
    seen: Arc<Mutex<Vec<Sighting>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Sniffer {
    /// Begins to listen at all sites.
    #[must_use]
    pub fn start(network: &Network) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let threads = SITES.map(|site| {
            let (seen, stop, namespace) = (seen.clone(), stop.clone(), network.namespace(site).to_owned());
            std::thread::spawn(move || {
                let listened = netns::within(&namespace, move || listen(site, &seen, &stop)).and_then(|ended| ended);
                if let Err(error) = listened {
                    tracing::error!(site, %error, "heartbeats are not seen any more");
                }
            })
        });
        Self { seen, stop, threads: threads.into() }
    }

    /// What was seen since the last time, beginning with the last that was handed out then.
    ///
    /// # Errors
    /// When a site is not listened to any more: nothing can be said then.
    pub fn take(&self) -> io::Result<Vec<Sighting>> {
        let mut seen = self.lock()?;
        let taken = seen.clone();
        let keep_from = seen.len().saturating_sub(1);
        seen.drain(..keep_from);
        Ok(taken)
    }

    /// What was seen since then, to be looked at again.
    ///
    /// # Errors
    /// As [`Sniffer::take`].
    pub fn seen(&self) -> io::Result<Vec<Sighting>> {
        Ok(self.lock()?.clone())
    }

    /// The last one.
    ///
    /// # Errors
    /// As [`Sniffer::take`].
    pub fn last(&self) -> io::Result<Option<Sighting>> {
        Ok(self.lock()?.last().cloned())
    }

    fn lock(&self) -> io::Result<std::sync::MutexGuard<'_, Vec<Sighting>>> {
        if self.threads.iter().any(JoinHandle::is_finished) {
            return Err(io::Error::other("heartbeats of a site are not seen any more"));
        }
        self.seen.lock().map_err(|_| io::Error::other("a listener panicked"))
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // It ends within its patience, or has panicked already.
            drop(thread.join());
        }
    }
}

/// Runs in the site's namespace.
fn listen(site: &'static str, seen: &Mutex<Vec<Sighting>>, stop: &AtomicBool) -> io::Result<()> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
    let mut taps = HashMap::new();
    let mut frame = [0; READ_BYTES];
    while !stop.load(Ordering::SeqCst) {
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(PATIENCE_MS))?;
        loop {
            let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
                Ok(received) => received,
                Err(nix::errno::Errno::EAGAIN) => break,
                // A device that went away or is down says so once.
                Err(nix::errno::Errno::ENETDOWN | nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let Some(from) = from.filter(|from| from.pkttype() != OUTGOING) else { continue };
            let index = from.ifindex();
            if !*taps.entry(index).or_insert_with(|| is_guests_tap(index)) {
                continue;
            }
            let Some(heartbeat) = Heartbeat::find_in(&frame[..length.min(READ_BYTES)]) else { continue };
            let sighting = Sighting { site, at: Instant::now(), heartbeat };
            seen.lock().map_err(|_| io::Error::other("another listener panicked"))?.push(sighting);
        }
    }
    Ok(())
}

/// Whether a device of this thread's namespace is the worker's for a guest; its name is not reused for another device.
fn is_guests_tap(index: usize) -> bool {
    let name = u32::try_from(index).ok().and_then(|index| if_indextoname(index).ok());
    let name = name.and_then(|name| name.into_string().ok()).unwrap_or_default();
    name.starts_with("pp") && ![TUN_DEVICE, TAP_DEVICE].contains(&name.as_str())
}
