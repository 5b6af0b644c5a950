//! `make demo`: one real guest crosses the WAN, next to what QEMU alone does with the same guest on the same link.
//!
//! ```text
//! set up ─▶ lab ─▶ define, start ─▶ protect: first recovery point ─▶ change 0.5 % of the disk, warm, loads, look ─▶ migrate --watch ─▶ look again
//!        ─▶ opponents on the same link ─▶ table, demo.json ─▶ stay until Ctrl-C (DEMO_EXIT=1: end)
//! ```
//! Without namespaces (see [`crate::lab::network`]) the same story is told on the loopback, and what it then does not show is
//! said. The first copy runs over a faster link so that the demo does not take its time for what is not being shown; it says so.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::baseline::BaselineError;
use crate::baseline::vm::FreePageHints;
use crate::lab::guest::client::{CountingSession, GuestError};
use crate::lab::guest::{BuildError, DEMO, GUEST_ADDRESS, GuestImages, SMALL, Variant};
use crate::lab::network::{Mode, NetworkError};
use crate::lab::{CtlError, Lab, LabConfig, LabError, VmFile};
use crate::paths;
use crate::wan::control::Request;
use crate::wan::link::Shape;

pub mod disk;
pub mod huge_pages;
pub mod loads;
pub mod opponents;
pub mod report;
pub mod session;

use disk::{DiskFigures, Reads};
use huge_pages::HugePageReserve;
use opponents::Opponents;
use report::{GuestFigures, Report, WorkerMemory};
use session::BusySession;

/// The demo's VM.
pub const VM: &str = "demo";
/// The link's rate during the first copy of the disk.
const FIRST_COPY_RATE_BPS: u64 = 1_000_000_000;
/// No further recovery point before the move: it has to carry all that changed.
const RPO: &str = "1h";
/// Of how many bytes of the disk one changes between the recovery point and the move.
const CHANGED: u64 = 200;
const FIRST_COPY_DEADLINE: Duration = Duration::from_secs(1200);
const MIGRATE_DEADLINE: Duration = Duration::from_secs(900);

/// What is different without namespaces.
const LOOPBACK: &str = "\
LOOPBACK MODE: there are no network namespaces, so all daemons run on 127.0.0.1. What the workers send each other (memory
and disks, QUIC over UDP) and QEMU's own migrations (TCP) cross a relay with this rate, delay, loss and queue.
Not shown in this mode: the guest has no network card, so no TCP session moves with it (it is steered over its serial
port); the controllers, pageportctl and the web interface talk without the delay of a WAN; QEMU's TCP ends at the relay,
so it always fills the link, and loss costs it bytes but no time.";

/// How the demo is to be.
#[derive(Clone, Debug)]
pub struct DemoConfig {
    /// The guest.
    pub variant: Variant,
    /// The link.
    pub link: Shape,
    /// Whether the opponents may skip what their guests say is free.
    pub hints: FreePageHints,
    /// Whether to end after the table.
    pub end: End,
    /// How the sites are told apart.
    pub mode: Mode,
    /// Where the figures go.
    pub figures: PathBuf,
}

/// When the demo ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// After the table.
    AtOnce,
    /// When it is interrupted.
    Interrupted,
}

impl DemoConfig {
    /// A 2 GiB guest, 200 Mbit/s, 25 ms each way. `DEMO_EXIT=1` ends it after the table.
    #[must_use]
    pub fn from_environment(small: bool, hints: FreePageHints, mode: Mode) -> Self {
        let unattended = std::env::var_os("DEMO_EXIT").is_some_and(|value| value == "1");
        Self {
            variant: if small { SMALL } else { DEMO },
            link: LabConfig::default().link,
            hints,
            end: if unattended { End::AtOnce } else { End::Interrupted },
            mode,
            figures: paths::lab().join("demo.json"),
        }
    }
}

/// Why the demo failed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The guest cannot be built.
    #[error("build the demo's guest")]
    Build(#[from] BuildError),
    /// The lab does not start.
    #[error("start the demo's lab")]
    Lab(#[from] LabError),
    /// The WAN does not answer.
    #[error("set the demo's link")]
    Network(#[from] NetworkError),
    /// The WAN refuses a change.
    #[error("set the demo's link")]
    Link(#[source] std::io::Error),
    /// A command failed.
    #[error("run the demo's commands")]
    Ctl(#[from] CtlError),
    /// A watched command failed; it has said why.
    #[error("pageportctl {arguments} failed")]
    Watched {
        /// Which command.
        arguments: String,
    },
    /// The guest does not answer.
    #[error("talk to the demo's guest")]
    Guest(#[from] GuestError),
    /// An opponent failed.
    #[error("run the demo's opponents")]
    Baseline(#[from] BaselineError),
    /// The finished migration has no record.
    #[error("find the record of the finished migration in {answer}")]
    NoRecord {
        /// What there was instead.
        answer: String,
    },
    /// A worker is gone.
    #[error("read the highest memory of the worker at {site}: it does not run")]
    NoPeakMemory {
        /// Where.
        site: &'static str,
    },
    /// The guest's QEMU is not where it should be.
    #[error("find one qemu of {VM}, at {site}: there are {found:?}")]
    WrongPlace {
        /// Where it should be.
        site: &'static str,
        /// Where they are.
        found: Vec<(&'static str, i32)>,
    },
    /// The figures cannot be written.
    #[error("write {path}")]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest is not what it was.
    #[error("the guest is not what it was before the move: see guest_checks in {path}")]
    Changed {
        /// Where the figures are.
        path: PathBuf,
    },
}

/// Tells the person in front of the screen what happens.
pub(crate) fn say(text: &str) {
    // A closed standard output ends nothing.
    writeln!(std::io::stdout().lock(), "{text}").ok();
}

/// Runs the demo.
///
/// # Errors
/// When a step fails; everything is taken down.
pub async fn run(config: DemoConfig) -> Result<(), DemoError> {
    let Variant { memory_bytes, .. } = config.variant;
    say("building the guest (Debian's cloud kernel, busybox, an ext4 disk full of files); cached after the first time");
    let images = GuestImages::build(config.variant)?;
    say(&format!(
        "starting three sites: a controller and a worker each, {} Mbit/s and {} ms each way between them",
        config.link.rate_bps / 1_000_000,
        config.link.one_way_delay_ms
    ));
    if config.mode == Mode::Loopback {
        say(LOOPBACK);
    }
    let reserve = set_huge_pages_aside(memory_bytes).await;
    let huge_pages = reserve.is_some();
    let mut lab =
        Lab::start(LabConfig { link: config.link, mode: config.mode, huge_pages, ..LabConfig::default() }).await?;
    say(&format!("logs: {}", lab.logs().display()));

    say(&format!("defining and starting {VM} at a: {} MiB of memory", memory_bytes >> 20));
    let file = VmFile::new(&lab, VM, &images, config.variant)?;
    lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await?;
    lab.ctl(["vm", "start", VM]).await?;
    let mut guest = lab.reach(VM).await?;

    say(&format!(
        "protecting it at b (the first copy over {} Mbit/s, to save time here)",
        FIRST_COPY_RATE_BPS / 1_000_000
    ));
    set_link(&lab, Shape { rate_bps: FIRST_COPY_RATE_BPS, queue_bytes: None, ..config.link })?;
    watched(&lab, &["protect", VM, "--to", "b", "--rpo", RPO, "--watch"], FIRST_COPY_DEADLINE).await?;
    set_link(&lab, config.link)?;

    let changed_bytes = config.variant.disk_bytes / CHANGED;
    say(&format!("since that recovery point: rewriting blocks all over the files, {} MB", changed_bytes / 1_000_000));
    loads::rewrite(&mut guest, changed_bytes).await?;
    say("warming the page cache, dirtying memory, writing files");
    let before = loads::begin(&mut guest, config.variant).await?;
    let session = match config.mode {
        Mode::Namespaces => {
            say("counting over TCP");
            let session = CountingSession::open(lab.network().namespace("a"), GUEST_ADDRESS).await?;
            Some(BusySession::start(session))
        }
        Mode::Loopback => None,
    };
    say(&format!(
        "clean page cache: {} MB; now: pageportctl migrate {VM} --to b --watch",
        before.page_cache_bytes / 1_000_000
    ));
    let reads = Reads::of(qemu_at(&lab, "a")?);
    watched(&lab, &["migrate", VM, "--to", "b", "--watch"], MIGRATE_DEADLINE).await?;

    say("checking the guest at b");
    guest.follow().await?;
    let survived = match session {
        Some(session) => Some(survived(session).await),
        None => None,
    };
    let guest_checks = loads::compare(&mut guest, &before, survived).await?;
    qemu_at(&lab, "b")?;
    let pageport = record(&lab).await?;
    let disk = DiskFigures {
        disk_bytes: config.variant.disk_bytes,
        changed_bytes,
        wan_bytes: pageport["disk_wan_bytes"].as_u64().unwrap_or(0),
        source_read_bytes: reads.total().await,
    };
    let worker_peak_memory_bytes =
        WorkerMemory { source: peak_memory(&mut lab, "a")?, destination: peak_memory(&mut lab, "b")? };

    say("QEMU's own ways, for comparison");
    let accelerator = lab.accelerator().await?;
    let opponents = Opponents { images: &images, variant: config.variant, accelerator, hints: config.hints };
    let disk_file = lab.folder().join("disks/opponent.raw");
    let (qemu_precopy, qemu_multifd_zstd) = opponents.run(lab.network(), lab.runtime(), &disk_file).await?;

    let guest_figures = GuestFigures { memory_bytes, page_cache_bytes: before.page_cache_bytes, kernel: before.kernel };
    let link = config.link.into();
    let report = Report {
        pageport,
        qemu_precopy,
        qemu_multifd_zstd,
        guest: guest_figures,
        disk,
        link,
        worker_peak_memory_bytes,
        guest_checks,
    };
    let path = config.figures;
    let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::from);
    text.and_then(|text| std::fs::write(&path, text + "\n"))
        .map_err(|source| DemoError::Write { path: path.clone(), source })?;
    say(&format!("\n{}", report.table()));
    say(&format!("figures: {}", path.display()));
    if !report.guest_checks.all() {
        return Err(DemoError::Changed { path });
    }
    if config.end == End::Interrupted {
        let ctl = lab.write_ctl_script().map_err(|source| DemoError::Write { path: lab.folder().into(), source })?;
        say(&format!("{VM} lives on at b. To move it back:\n\n  {} migrate {VM} --to a --watch\n", ctl.display()));
        say("Ctrl-C ends the lab.");
        // Without a handler the signal itself ends the process; the next lab then cleans up.
        tokio::signal::ctrl_c().await.ok();
    }
    Ok(())
}

async fn survived(session: BusySession) -> bool {
    match session.finish().await {
        Ok(summary) => {
            say(&format!(
                "the TCP session got {} numbers, each once; its longest wait was {} ms",
                summary.numbers,
                summary.longest_wait.as_millis()
            ));
            true
        }
        Err(error) => {
            say(&format!("the TCP session broke: {error}"));
            false
        }
    }
}

/// For the guest at both ends of its move.
async fn set_huge_pages_aside(memory_bytes: u64) -> Option<HugePageReserve> {
    say("setting huge pages aside for the guests' memory, until the demo ends");
    let note = paths::lab().join("huge-pages");
    let take = move || HugePageReserve::take(2 * memory_bytes, &note);
    let taken = tokio::task::spawn_blocking(take).await.map_err(std::io::Error::other).flatten();
    taken.inspect_err(|error| say(&format!("no huge pages ({error}): the guests get ordinary ones"))).ok()
}

fn set_link(lab: &Lab, shape: Shape) -> Result<(), DemoError> {
    let mut wan = lab.network().wan()?;
    for (from, to) in [("a", "b"), ("b", "a")] {
        wan.call(&Request::SetLink { from: from.into(), to: to.into(), shape }).map_err(DemoError::Link)?;
    }
    Ok(())
}

/// Runs a command whose progress the person watches.
async fn watched(lab: &Lab, arguments: &[&str], deadline: Duration) -> Result<(), DemoError> {
    let failed = || DemoError::Watched { arguments: arguments.join(" ") };
    let mut command = lab.ctl_command("a");
    command.args(arguments).stdin(Stdio::null());
    let ended = timeout(deadline, command.status()).await.map_err(|_| failed())?;
    if ended.is_ok_and(|status| status.success()) { Ok(()) } else { Err(failed()) }
}

async fn record(lab: &Lab) -> Result<Value, DemoError> {
    let answer = lab.ctl_json(["migration", "list", "--vm", VM]).await?;
    let completed = answer["migrations"].as_array().into_iter().flatten().filter(|m| m["state"] == "completed");
    let newest = completed.max_by_key(|migration| migration["created_unix_ms"].as_i64());
    match newest.map(|migration| &migration["record"]) {
        Some(record) if record.is_object() => Ok(record.clone()),
        _ => Err(DemoError::NoRecord { answer: answer.to_string() }),
    }
}

/// The VM's only QEMU, which must be there.
fn qemu_at(lab: &Lab, site: &'static str) -> Result<i32, DemoError> {
    let found = lab.qemu_pids(VM);
    match found[..] {
        [(at, pid)] if at == site => Ok(pid),
        _ => Err(DemoError::WrongPlace { site, found }),
    }
}

fn peak_memory(lab: &mut Lab, site: &'static str) -> Result<u64, DemoError> {
    lab.worker(site).peak_memory_bytes().ok_or(DemoError::NoPeakMemory { site })
}
