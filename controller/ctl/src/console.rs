//! A VM's serial console, straight from the worker that runs it.
//!
//! ```text
//!  stdin ─thread─▶ channel (bounded) ─▶ ConsoleInput stream ═mTLS═▶ worker ─▶ serial port
//!  stdout ◀──────────────────────────── ConsoleOutput stream ◀═════
//! ```
//! | leaves when | terminal | piped input |
//! |---|---|---|
//! | Ctrl-] | yes | no: the byte is the guest's |
//! | end of input | yes | after the console was silent for the linger time |
//! | the worker ends the stream | yes | yes |
//! | SIGTERM, SIGHUP, SIGINT | yes | yes |
//!
//! Does not reconnect after a move: the console of the new place is another stream.

use std::fmt;
use std::io::{self, Read, Write};
use std::time::Duration;

use pageport_common::tls::Identity;
use pageport_proto::v1::{ConsoleInput, Worker};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;

use crate::host::{self, HostError};
use crate::render::note;
use crate::terminal::{RawTerminal, until_escape};

const OPEN_DEADLINE: Duration = Duration::from_secs(10);
const READ_BYTES: usize = 4096;
const QUEUED_READS: usize = 16;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Nobody runs the VM, or its worker never connected.
    #[error("{vm} has no worker that could be reached for its console (owner: \"{worker}\")")]
    NoWorker {
        /// The VM.
        vm: String,
        /// Its owner.
        worker: String,
    },
    /// The worker cannot be reached, said no, or broke off.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The terminal or a standard stream failed.
    #[error("use the terminal for the console")]
    Terminal {
        /// The system's reason.
        #[from]
        source: io::Error,
    },
}

/// Why a console session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The user left, or the input ended.
    Left,
    /// The worker ended the stream: the VM stopped or moved.
    Closed,
    /// A signal told us to.
    Signal,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Left => "left",
            Self::Closed => "closed by the worker",
            Self::Signal => "left on a signal",
        })
    }
}

/// Connects standard input and output to the VM's console until one side leaves.
///
/// # Errors
/// When the worker cannot be reached or refuses, or the terminal fails.
pub async fn attach(
    identity: &Identity,
    worker: &Worker,
    vm_id: String,
    linger: Duration,
) -> Result<End, ConsoleError> {
    let mut service = host::connect(identity, worker).await?;
    let (to_guest, from_user) = mpsc::channel(QUEUED_READS);
    let hello = ConsoleInput { vm_id, data: Default::default() };
    // The queue is empty: there is room.
    let closed = |_| host::unreachable(worker, "the input queue is closed".to_owned());
    to_guest.try_send(hello).map_err(closed)?;
    let opening = service.console(ReceiverStream::new(from_user));
    let mut output = host::answer(worker, OPEN_DEADLINE, opening).await?;

    let raw = RawTerminal::enter()?;
    let interactive = raw.is_some();
    if interactive {
        note("connected; leave with Ctrl-]\r");
    }
    let mut typed = read_stdin();
    let mut input_open = true;
    let mut leave_at: Option<Instant> = None;
    let (mut terminate, mut hang_up, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?, signal(SignalKind::interrupt())?);
    loop {
        tokio::select! {
            message = output.message() => match message {
                Ok(Some(message)) => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&message.data)?;
                    stdout.flush()?;
                    leave_at = leave_at.map(|_| Instant::now() + linger);
                }
                Ok(None) => return Ok(End::Closed),
                Err(status) => return Err(host::refusal(worker, &status).into()),
            },
            bytes = typed.recv(), if input_open => {
                let bytes = match bytes {
                    Some(Ok(bytes)) => bytes,
                    Some(Err(source)) => return Err(source.into()),
                    None if interactive => return Ok(End::Left),
                    None => {
                        input_open = false;
                        leave_at = Some(Instant::now() + linger);
                        continue;
                    }
                };
                let (data, leave) = if interactive { until_escape(&bytes) } else { (&bytes[..], false) };
                let input = ConsoleInput { vm_id: String::new(), data: data.to_vec().into() };
                // A full queue means that the worker takes nothing: that must not hold us for ever.
                if !data.is_empty() && to_guest.send_timeout(input, OPEN_DEADLINE).await.is_err() {
                    let message = "takes no input any more".to_owned();
                    return Err(HostError::Refused { worker: worker.name.clone(), message }.into());
                }
                if leave {
                    return Ok(End::Left);
                }
            },
            () = sleep_until(leave_at.unwrap_or_else(Instant::now)), if leave_at.is_some() => return Ok(End::Left),
            _ = terminate.recv() => return Ok(End::Signal),
            _ = hang_up.recv() => return Ok(End::Signal),
            _ = interrupt.recv() => return Ok(End::Signal),
        }
    }
}

/// Standard input, read by a thread of its own: a blocked read cannot be cancelled, and must not keep us from leaving.
fn read_stdin() -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = [0; READ_BYTES];
        loop {
            let read = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => Ok(buffer[..read].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = read.is_err();
            if sender.blocking_send(read).is_err() || failed {
                return;
            }
        }
    });
    receiver
}
