//! One TCP connection through the relay: two sockets, and between them a flow per direction over the lines.
//!
//! ```text
//! socket i ──read, while the line has room──▶ Piece ──Lines──▶ arrived ──write──▶ socket 1-i
//!                      end of stream ────────▶ End ───Lines──▶ shutdown once all is written
//! ```
//! Bytes come out as they went in. What a line has no room for stays in the sender's socket, so the sender feels the line's
//! rate; a piece that the line loses is sent again, and has then used the wire twice. A queue of less than a piece carries nothing.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::flow::{Class, TCP};
use super::lines::{Lines, Pair};
use super::relay::Parcel;

/// Bytes that one read takes at most.
const PIECE_BYTES: usize = 16 * 1024;
/// What a flow may have under way and arrived but not taken: about what TCP's largest window would be.
const WINDOW_BYTES: usize = 4 << 20;
/// What a segment carries on a line with an MTU of 1500, and its headers: IP, TCP, time stamps.
const SEGMENT_BYTES: usize = 1448;
const HEADER_BYTES: usize = 52;

/// The bytes that a stretch of the stream takes on the wire.
fn wire_bytes(payload: usize) -> usize {
    payload + payload.div_ceil(SEGMENT_BYTES).max(1) * HEADER_BYTES
}

#[derive(Debug, Default)]
struct Flow {
    /// Read, but lost on the wire.
    again: Option<Parcel>,
    under_way: usize,
    arrived: VecDeque<u8>,
    sent_end: bool,
    got_end: bool,
    finished: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Stream {
    id: u64,
    sockets: [TcpStream; 2],
    sites: Pair,
    port: u16,
    flows: [Flow; 2],
}

impl Stream {
    /// Joins two connected sockets: the one that dialled, at the first site, and the one that was dialled for it.
    pub(super) fn join(id: u64, sockets: [TcpStream; 2], sites: Pair, port: u16) -> io::Result<Self> {
        for socket in &sockets {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
        }
        Ok(Self { id, sockets, sites, port, flows: Default::default() })
    }

    /// Whether both directions have ended.
    pub(super) fn is_over(&self) -> bool {
        self.flows.iter().all(|flow| flow.finished)
    }

    /// Whether something waits for time to pass and not for a socket.
    pub(super) fn is_waiting(&self) -> bool {
        self.flows.iter().any(|flow| flow.again.is_some() || !flow.arrived.is_empty())
    }

    fn pair(&self, direction: usize) -> Pair {
        if direction == 0 { self.sites } else { (self.sites.1, self.sites.0) }
    }

    /// The sockets from which something could be read onto a line now, and whether one must wait for its line.
    pub(super) fn readable(&self, now: Duration, lines: &Lines<Parcel>) -> (Vec<&TcpStream>, bool) {
        let wanted = |direction: &usize| {
            let flow = &self.flows[*direction];
            !flow.sent_end && flow.under_way + flow.arrived.len() < WINDOW_BYTES
        };
        let (ready, blocked): (Vec<usize>, Vec<usize>) = (0..2)
            .filter(wanted)
            .partition(|direction| lines.has_room(now, self.pair(*direction), wire_bytes(PIECE_BYTES)));
        (ready.into_iter().map(|direction| &self.sockets[direction]).collect(), !blocked.is_empty())
    }

    /// Reads what the lines take; says how many pieces.
    pub(super) fn pump(&mut self, now: Duration, lines: &mut Lines<Parcel>) -> io::Result<usize> {
        let mut pieces = 0;
        for direction in 0..2 {
            let pair = self.pair(direction);
            while lines.has_room(now, pair, wire_bytes(PIECE_BYTES)) {
                let flow = &mut self.flows[direction];
                let parcel = match flow.again.take() {
                    Some(parcel) => parcel,
                    None if flow.sent_end || flow.under_way + flow.arrived.len() >= WINDOW_BYTES => break,
                    None => {
                        let mut bytes = vec![0; PIECE_BYTES];
                        match self.sockets[direction].read(&mut bytes) {
                            Ok(0) => {
                                flow.sent_end = true;
                                Parcel::End { stream: self.id }
                            }
                            Ok(size) => {
                                bytes.truncate(size);
                                flow.under_way += size;
                                Parcel::Piece { stream: self.id, bytes }
                            }
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                            Err(error) => return Err(error),
                        }
                    }
                };
                let size = wire_bytes(parcel.payload());
                let class = Class::Underlay { protocol: TCP, port: self.port };
                if let Err((_, parcel)) = lines.offer(now, pair, class, size, parcel) {
                    flow.again = Some(parcel);
                }
                pieces += 1;
            }
        }
        Ok(pieces)
    }

    /// Takes in what came out of a line.
    pub(super) fn arrive(&mut self, pair: Pair, bytes: Option<&[u8]>) {
        let flow = &mut self.flows[usize::from(pair != self.sites)];
        match bytes {
            Some(bytes) => {
                flow.under_way -= bytes.len();
                flow.arrived.extend(bytes);
            }
            None => flow.got_end = true,
        }
    }

    /// Writes what the receivers take.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        for (direction, flow) in self.flows.iter_mut().enumerate() {
            let socket = &mut self.sockets[1 - direction];
            while !flow.arrived.is_empty() {
                match socket.write(flow.arrived.as_slices().0) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(size) => drop(flow.arrived.drain(..size)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if flow.got_end && flow.arrived.is_empty() && !flow.finished {
                flow.finished = true;
                // The receiver may have closed already.
                socket.shutdown(Shutdown::Write).ok();
            }
        }
        Ok(())
    }
}
