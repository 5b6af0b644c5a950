//! The control socket of a running WAN: connections take requests, the WAN's own thread carries them out.
//!
//! ```text
//! control connection (a thread each) ──request──▶ channel, wake ──▶ the thread that owns the lines ──reply──▶ connection
//! ```
//! The owner polls [`Steering`] as a file that becomes readable when there is something to do.

use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use tracing::{debug, warn};

use super::control::{REPLY_DEADLINE, Reply, Request, read_line};
use super::lines::Lines;

/// Control connections at a time.
const MAX_CONTROL_CONNECTIONS: usize = 32;

type Call = (Request, SyncSender<Reply>);

/// Whether the WAN goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It goes on.
    GoOn,
    /// It was asked to stop.
    Stop,
}

/// A listening control socket.
#[derive(Debug)]
pub struct Steering {
    calls: Receiver<Call>,
    wake: UnixStream,
}

impl Steering {
    /// Listens at `path`.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn listen(path: &Path) -> io::Result<Self> {
        let (calls_in, calls) = channel();
        let (wake_in, wake) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        wake_in.set_nonblocking(true)?;
        let listener = UnixListener::bind(path)?;
        std::thread::spawn(move || accept(&listener, &calls_in, &wake_in));
        Ok(Self { calls, wake })
    }

    /// Carries out all requests that wait; `lost` gets what a cut takes off the lines.
    pub fn serve<P>(&self, lines: &mut Lines<P>, mut lost: impl FnMut(P)) -> Told {
        while let Ok((request, reply_to)) = self.calls.try_recv() {
            let stop = request == Request::Stop;
            let reply = answer(lines, request, &mut lost);
            // The connection may have given up meanwhile.
            drop(reply_to.send(reply));
            if stop {
                return Told::Stop;
            }
        }
        Told::GoOn
    }

    /// Takes the wake-ups back after a poll.
    pub fn woken(&self) {
        let mut drained = [0; 64];
        while matches!((&self.wake).read(&mut drained), Ok(1..)) {}
    }
}

impl AsFd for Steering {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn answer<P>(lines: &mut Lines<P>, request: Request, lost: impl FnMut(P)) -> Reply {
    debug!(?request, "control request");
    let result = match request {
        Request::Stop => return Reply::Done,
        Request::Counters => return Reply::Counters { links: lines.counters(), cpu_ms: cpu_ms() },
        Request::SetLink { from, to, shape } => match shape.validate() {
            Ok(()) => lines.set_shape(&from, &to, shape),
            Err(error) => return Reply::Refused { reason: error.to_string() },
        },
        Request::Cut { from, to } => lines.cut(&from, &to).map(|packets| packets.into_iter().for_each(lost)),
        Request::Heal { from, to } => lines.heal(&from, &to),
    };
    result.map_or_else(|error| Reply::Refused { reason: error.to_string() }, |()| Reply::Done)
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
