//! An image written out as a raw file, by `qemu-img`.
//!
//! ```text
//!   image ─▶ qemu-img convert ─▶ file (holes where nothing or zeros are) ─▶ fsync
//! ```
//! The tool locks the image for reading, so a hypervisor that has it open is refused or refuses. It is ended, and waited for, when it is no longer
//! wanted. One that outlived its worker is found by the file that it writes: [`crate::hypervisor::end_writers_of`].

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio_util::sync::CancellationToken;

use super::Image;

/// Between two looks at what the caller wants to look at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Longest line of progress, in bytes.
const MAX_LINE_BYTES: usize = 64;
/// What is kept of what the tool says, in bytes.
const MAX_WORDS_BYTES: u64 = 2048;

/// Why an image was not converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError<E: std::error::Error + 'static> {
    /// The tool did not start.
    #[error("start {tool}: install qemu-utils, or set hypervisor.qemu_img in worker.toml")]
    Tool {
        /// As configured.
        tool: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tool cannot be heard.
    #[error("follow {tool}")]
    Follow {
        /// As configured.
        tool: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tool failed.
    #[error("{tool} failed ({status}): {words}")]
    Failed {
        /// As configured.
        tool: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        words: String,
    },
    /// The file could not be brought to stable storage.
    #[error("bring {} to stable storage", path.display())]
    Sync {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was no longer wanted.
    #[error("ended before it was done")]
    Cancelled,
    /// What the caller looks at forbids it to go on.
    #[error(transparent)]
    Forbidden(E),
}

/// Writes `image` to the raw file `to`, which is made, and brings it to stable storage. Tells how much of it is done, from 0 to 1, each time after
/// `look`, which ends it with an error.
///
/// # Errors
/// [`ConvertError`]; whatever there is of the file then is for the caller to remove. The tool has ended.
pub async fn convert<E: std::error::Error + 'static>(
    tool: &str,
    image: &Image,
    to: &Path,
    cancel: &CancellationToken,
    look: impl Fn(f64) -> Result<(), E>,
) -> Result<(), ConvertError<E>> {
    let mut command = Command::new(tool);
    command.args(["convert", "-p", "-O", "raw", "--", &image.source_name()]).arg(to);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let started = command.spawn();
    let mut child = started.map_err(|source| ConvertError::Tool { tool: tool.to_owned(), source })?;
    let ended = tokio::select! {
        biased;
        () = cancel.cancelled() => Err(ConvertError::Cancelled),
        ended = follow(tool, &mut child, look) => ended,
    };
    if ended.is_err() {
        // Waits for its end: it must not have the image open any more.
        let killed = child.kill().await;
        killed.map_err(|source| ConvertError::Follow { tool: tool.to_owned(), source })?;
    }
    ended?;
    let synced = tokio::fs::File::open(to).await;
    let synced = match synced {
        Ok(file) => file.sync_all().await,
        Err(error) => Err(error),
    };
    synced.map_err(|source| ConvertError::Sync { path: to.to_owned(), source })
}

async fn follow<E: std::error::Error + 'static>(
    tool: &str,
    child: &mut Child,
    look: impl Fn(f64) -> Result<(), E>,
) -> Result<(), ConvertError<E>> {
    let failed = |source| ConvertError::Follow { tool: tool.to_owned(), source };
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    let mut progress = Progress { output: BufReader::new(stdout), line: Vec::new() };
    let mut words = Vec::new();
    let mut said = stderr.take(MAX_WORDS_BYTES);
    let saying = said.read_to_end(&mut words);
    tokio::pin!(saying);
    let (mut done, mut says) = (0.0, true);
    let mut tick = tokio::time::interval(LOOK_INTERVAL);
    loop {
        tokio::select! {
            told = progress.next() => match told.map_err(failed)? {
                Some(now) => done = now,
                None => break,
            },
            read = &mut saying, if says => {
                read.map_err(failed)?;
                says = false;
            }
            _ = tick.tick() => look(done).map_err(ConvertError::Forbidden)?,
        }
    }
    if says {
        saying.await.map_err(failed)?;
    }
    let status = child.wait().await.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&words).trim().to_owned();
    Err(ConvertError::Failed { tool: tool.to_owned(), status, words })
}

/// What the tool tells of its progress: `    (12.50/100%)` and a carriage return, again and again.
struct Progress {
    output: BufReader<ChildStdout>,
    line: Vec<u8>,
}

impl Progress {
    /// The next share done, from 0 to 1; [`None`]: it has ended. Cancel-safe.
    async fn next(&mut self) -> io::Result<Option<f64>> {
        loop {
            let mut byte = [0];
            if self.output.read(&mut byte).await? == 0 {
                return Ok(None);
            }
            if !matches!(byte[0], b'\r' | b'\n') {
                if self.line.len() < MAX_LINE_BYTES {
                    self.line.push(byte[0]);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if let Some(share) = share(&String::from_utf8_lossy(&line)) {
                return Ok(Some(share));
            }
        }
    }
}

fn share(line: &str) -> Option<f64> {
    let percent: f64 = line.trim().strip_prefix('(')?.strip_suffix("/100%)")?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::image::Format;

    fn image(folder: &Path) -> Image {
        let path = folder.join("a.qcow2");
        let run = |program: &str, arguments: &[&str]| {
            assert!(
                std::process::Command::new(program).args(arguments).stdout(Stdio::null()).status().unwrap().success()
            );
        };
        let name = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 4M 64k", name]);
        Image::open(&path, Format::Qcow2).unwrap()
    }

    /// A tool that takes any arguments, says nothing and never ends by itself.
    fn endless_tool(folder: &Path) -> String {
        let path = folder.join("endless");
        std::fs::write(&path, "#!/bin/sh\nexec sleep 600\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_raw_file_is_what_the_image_shows_with_holes_where_it_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("a.raw");
        let seen = std::sync::Mutex::new(vec![]);
        let look = |done| -> Result<(), Infallible> {
            seen.lock().unwrap().push(done);
            Ok(())
        };
        convert("qemu-img", &image(folder.path()), &to, &CancellationToken::new(), look).await.unwrap();
        let content = std::fs::read(&to).unwrap();
        let mut expected = vec![0; 8 << 20];
        expected[4 << 20..][..64 << 10].fill(5);
        assert!(content == expected);
        let (_, allocated) = crate::replica::store::image_bytes(&to).unwrap();
        assert!(allocated <= 128 << 10, "{allocated} bytes are allocated");
        assert!(!seen.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn an_image_that_is_gone_and_a_tool_that_is_not_there_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let (image, to) = (image(folder.path()), folder.path().join("a.raw"));
        let (none, look) = (CancellationToken::new(), |_| Ok::<(), Infallible>(()));
        let missing = convert("/no/such/tool", &image, &to, &none, look).await.unwrap_err();
        assert!(missing.to_string().contains("qemu-utils"), "{missing}");
        std::fs::remove_file(image.path()).unwrap();
        let failed = convert("qemu-img", &image, &to, &none, look).await.unwrap_err();
        assert!(failed.to_string().contains("a.qcow2"), "{failed}");
    }

    #[tokio::test]
    async fn it_ends_when_it_is_not_wanted_or_the_caller_forbids_it() {
        let folder = tempfile::tempdir().unwrap();
        let (image, to) = (image(folder.path()), folder.path().join("a.raw"));
        let cancelled = CancellationToken::new();
        cancelled.cancel();
        let ended = convert("qemu-img", &image, &to, &cancelled, |_| Ok::<(), Infallible>(())).await;
        assert!(matches!(ended, Err(ConvertError::Cancelled)), "{ended:?}");
        let forbidden = |_| Err(io::Error::from(io::ErrorKind::StorageFull));
        let tool = endless_tool(folder.path());
        let ended = convert(&tool, &image, &to, &CancellationToken::new(), forbidden).await;
        assert!(matches!(ended, Err(ConvertError::Forbidden(_))), "{ended:?}");
    }

    #[test]
    fn progress_is_read_and_anything_else_is_not() {
        assert_eq!(share("    (12.50/100%)"), Some(0.125));
        for other in ["", "(x/100%)", "(101.00/100%)", "12.5", "(NaN/100%)"] {
            assert_eq!(share(other), None, "{other}");
        }
    }
}
