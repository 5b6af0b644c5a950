//! The two servers: commands on one port, the counter on the other. A thread per connection, a bounded number of them.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::changes;
use crate::files;
use crate::history::{Fares, History, Plan};
use crate::kernel_log;
use crate::memory::{Dirty, Static};
use crate::protocol::{CONTROL_PORT, COUNTER_PORT, MAX_LINE_BYTES, MAX_REGION_BYTES, Reply, Request};
use crate::records::Records;

const MAX_CONNECTIONS: usize = 64;

#[derive(Debug, Default)]
struct Loads {
    static_region: Option<Static>,
    dirty: Option<Arc<Dirty>>,
    records: Option<Records>,
    history: Option<History>,
}

/// What the servers share.
#[derive(Debug)]
pub struct Guest {
    data: PathBuf,
    files: PathBuf,
    records: PathBuf,
    new_files: PathBuf,
    loads: Mutex<Loads>,
    counter: AtomicU64,
}

impl Guest {
    /// Serves the files below `data`.
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
            files: data.join("files"),
            records: data.join("load/records"),
            new_files: data.join("load/new"),
            loads: Mutex::default(),
            counter: AtomicU64::new(0),
        }
    }

    fn loads(&self) -> io::Result<MutexGuard<'_, Loads>> {
        self.loads.lock().map_err(|_| io::Error::other("a load panicked"))
    }

    /// Carries out a command.
    pub fn answer(&self, request: Request) -> Reply {
        self.carry_out(request).unwrap_or_else(|error| Reply::Refused { reason: error.to_string() })
    }

    /// Carries out a command in its written form.
    pub fn answer_text(&self, text: &[u8]) -> Reply {
        match serde_json::from_slice(text) {
            Ok(request) => self.answer(request),
            Err(error) => Reply::Refused { reason: error.to_string() },
        }
    }

    fn carry_out(&self, request: Request) -> io::Result<Reply> {
        Ok(match request {
            Request::Uptime => uptime()?,
            Request::Meminfo => Reply::Meminfo { bytes: meminfo(&fs::read_to_string("/proc/meminfo")?) },
            Request::Warm { bytes } | Request::Reread { bytes } => {
                let begin = Instant::now();
                let (bytes, files) = files::read_some(&self.files, bytes)?;
                let milliseconds = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
                Reply::Read { bytes, files, milliseconds }
            }
            Request::DropCaches => {
                fs::write("/proc/sys/vm/drop_caches", "3")?;
                Reply::Done
            }
            Request::Sync => {
                nix::unistd::sync();
                Reply::Done
            }
            Request::StaticStart { bytes, seed } => {
                check_region(bytes)?;
                self.loads()?.static_region = Some(Static::new(bytes, seed));
                Reply::Done
            }
            Request::ChecksumMemory => {
                let loads = self.loads()?;
                let region = loads.static_region.as_ref().ok_or_else(|| not_running("static region"))?;
                let (blake3, bytes) = region.checksum();
                Reply::Checksum { blake3, bytes }
            }
            Request::DirtyStart { bytes, pages_per_second, seed } => {
                check_region(bytes)?;
                let mut loads = self.loads()?;
                if loads.dirty.is_some() {
                    return Err(io::Error::other("the dirtying load runs already"));
                }
                loads.dirty = Some(Arc::new(Dirty::start(bytes, pages_per_second, seed)));
                Reply::Done
            }
            Request::DirtyStatus => {
                let loads = self.loads()?;
                let load = loads.dirty.as_ref().ok_or_else(|| not_running("dirtying load"))?;
                Reply::Dirty { writes: load.writes(), corrupt_pages: 0 }
            }
            Request::DirtyStop => {
                let load = self.loads()?.dirty.take().ok_or_else(|| not_running("dirtying load"))?;
                let corrupt_pages = load.stop().ok_or_else(|| io::Error::other("the dirtying load panicked"))?;
                Reply::Dirty { writes: load.writes(), corrupt_pages }
            }
            Request::WriteStart { records_per_second, seed } => {
                let mut loads = self.loads()?;
                if loads.records.is_some() {
                    return Err(io::Error::other("the writing load runs already"));
                }
                loads.records = Some(Records::start(&self.records, records_per_second, seed)?);
                Reply::Done
            }
            Request::WriteStop => {
                let load = self.loads()?.records.take().ok_or_else(|| not_running("writing load"))?;
                let (synced, lost) = load.stop()?;
                Reply::Written { synced, lost }
            }
            Request::RewriteBlocks { bytes, seed } => {
                changes::rewrite_blocks(&self.files, bytes, seed)?;
                nix::unistd::sync();
                Reply::Done
            }
            Request::WriteFiles { bytes, seed } => {
                changes::write_files(&self.files, &self.new_files, bytes, seed)?;
                nix::unistd::sync();
                Reply::Done
            }
            Request::HistoryStart { operations_per_second, seed, trim_every, disks } => {
                let mut loads = self.loads()?;
                if loads.history.is_some() {
                    return Err(io::Error::other("the history load runs already"));
                }
                let disks = disks.into_iter().map(PathBuf::from).collect();
                let plan = Plan { operations_per_second, seed, trim_every, disks };
                loads.history = Some(History::start(&self.data, plan)?);
                Reply::Done
            }
            Request::HistoryStatus => {
                let loads = self.loads()?;
                history(loads.history.as_ref().ok_or_else(|| not_running("history load"))?.fares())
            }
            Request::HistoryStop => {
                let load = self.loads()?.history.take().ok_or_else(|| not_running("history load"))?;
                history(load.stop()?)
            }
            Request::KernelTrouble => Reply::KernelTrouble { lines: kernel_log::trouble()? },
            Request::ChecksumFiles { every } => {
                let (blake3, bytes) = files::checksum(&self.files, every)?;
                Reply::Checksum { blake3, bytes }
            }
        })
    }
}

fn history(fares: Fares) -> Reply {
    let Fares { done, slowest_write_ms, failure } = fares;
    Reply::History { done, slowest_write_ms, failure }
}

fn not_running(what: &str) -> io::Error {
    io::Error::other(format!("there is no {what}"))
}

fn check_region(bytes: u64) -> io::Result<()> {
    if (4096..=MAX_REGION_BYTES).contains(&bytes) {
        return Ok(());
    }
    Err(io::Error::other(format!("a region of {bytes} bytes is not within 4096 and {MAX_REGION_BYTES}")))
}

fn uptime() -> io::Result<Reply> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let seconds = read("/proc/uptime")?.split(' ').next().and_then(|s| s.parse().ok());
    Ok(Reply::Uptime {
        seconds: seconds.ok_or(io::ErrorKind::InvalidData)?,
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        kernel: read("/proc/sys/kernel/osrelease")?,
    })
}

fn meminfo(text: &str) -> std::collections::BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
            Some((name.to_owned(), kib * 1024))
        })
        .collect()
}

/// Reads one line of at most [`MAX_LINE_BYTES`]; none at the end.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = reader.take(MAX_LINE_BYTES).read_line(&mut line)?;
    match (read, line.ends_with('\n')) {
        (0, _) => Ok(None),
        (_, true) => Ok(Some(line)),
        (_, false) => Err(io::Error::new(io::ErrorKind::InvalidData, "line is cut short or too long")),
    }
}

fn commands(guest: &Guest, stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(line) = read_line(&mut reader)? {
        let reply = guest.answer_text(line.as_bytes());
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        reader.get_mut().write_all(&text)?;
    }
    Ok(())
}

fn counting(guest: &Guest, stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while read_line(&mut reader)?.is_some() {
        let number = guest.counter.fetch_add(1, Ordering::Relaxed);
        reader.get_mut().write_all(format!("{number}\n").as_bytes())?;
    }
    Ok(())
}

type Service = fn(&Guest, TcpStream) -> io::Result<()>;

fn accept(guest: &Arc<Guest>, listener: &TcpListener, service: Service) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (guest, open) = (Arc::clone(guest), Arc::clone(&open));
        std::thread::spawn(move || {
            // A client that went away is its own affair.
            service(&guest, stream).ok();
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Serves both ports until the process ends.
///
/// # Errors
/// When a port cannot be had.
pub fn serve(guest: &Arc<Guest>) -> io::Result<()> {
    let control = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONTROL_PORT))?;
    let counter = TcpListener::bind((Ipv4Addr::UNSPECIFIED, COUNTER_PORT))?;
    std::thread::spawn({
        let guest = Arc::clone(guest);
        move || accept(&guest, &counter, counting)
    });
    accept(guest, &control, commands);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn loads_start_once_and_are_checked_when_they_stop() {
        let folder = tempfile::tempdir().unwrap();
        let guest = Guest::new(folder.path());
        assert!(matches!(guest.answer(Request::DirtyStop), Reply::Refused { .. }));
        let start = Request::DirtyStart { bytes: 1 << 16, pages_per_second: 1000, seed: 1 };
        assert_eq!(guest.answer(start.clone()), Reply::Done);
        assert!(matches!(guest.answer(start), Reply::Refused { .. }));
        assert!(matches!(guest.answer(Request::DirtyStop), Reply::Dirty { corrupt_pages: 0, .. }));
        let huge = Request::StaticStart { bytes: u64::MAX, seed: 1 };
        assert!(matches!(guest.answer(huge), Reply::Refused { .. }));
    }

    #[test]
    fn meminfo_is_bytes_by_name() {
        let parsed = meminfo("MemTotal:  2 kB\nHugePages_Total: 0\nCached: 10 kB\n");
        assert_eq!(parsed, [("Cached".to_owned(), 10_240), ("MemTotal".to_owned(), 2048)].into());
    }

    #[test]
    fn the_counter_goes_on_over_connections() {
        let guest = Arc::new(Guest::new(Path::new("/nowhere")));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || accept(&guest, &listener, counting));
        for expected in ["0\n", "1\n"] {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"x\n").unwrap();
            assert_eq!(read_line(&mut BufReader::new(stream)).unwrap().unwrap(), expected);
        }
    }
}
