//! Where cases happen: a lab whose guest runs at a and is protected to b, or the other way round. Used again and again, as long as cases pass.
//!
//! It has two disks, one consistent group: the one with its files, and one without.
//!
//! | | images at a | images at b |
//! |---|---|---|
//! | [`Direction::First`] | the disks, where the VM's file says | the replicas, which the worker has made |
//! | [`Direction::Turned`] | the replicas, still there | the disks, still there |

use std::path::PathBuf;
use std::time::Duration;

use pageport_guest::protocol::{Reply, Request};
use pageport_worker::image::Format;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::cue::Places;
use super::ledger::{Ledger, now_unix_ms};
use super::plan::{Direction, Side};
use crate::faults::FaultsError;
use crate::faults::arena::{VM, seen, steer, wait_for};
use crate::lab::guest::client::GuestClient;
use crate::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use crate::lab::{Lab, LabConfig, VmFile};
use crate::wan::control::Request as WanRequest;
use crate::wan::link::Shape;

/// How old the newest point may become.
const RPO: &str = "5s";
const KEEP: &str = "4";
/// Room for the replica of the small guest, its points, and little else.
const VOLUME_BYTES: u64 = 768 << 20;
const SEED_RATE_BPS: u64 = 1_000_000_000;
const FIRST_POINT_LIMIT: Duration = Duration::from_secs(120);
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// Faster than software emulation lets the guest sync.
const OPERATIONS_PER_SECOND: u64 = 100;
const TRIM_EVERY: u64 = 100;
/// The disk without a file system, as the VM's file and the guest call it.
const DATA: (&str, &str) = ("data", "/dev/vdb");
const DATA_BYTES: u64 = 32 << 20;

/// The newest recovery point, as the controllers know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Newest {
    /// Its number; 0: there is none.
    pub number: u64,
    /// When it was taken, by the clock of this machine.
    pub taken_unix_ms: i64,
}

/// The lab and its protected guest.
#[derive(Debug)]
pub struct Arena {
    /// The lab.
    pub lab: Lab,
    vm_id: String,
    /// Names of the disks, and their images at a.
    given: Vec<(&'static str, PathBuf)>,
    direction: Direction,
}

impl Arena {
    /// Starts a lab, boots the guest, and protects it.
    ///
    /// # Errors
    /// When a part of it does not start, or there is no first point.
    pub async fn open(images: &GuestImages) -> Result<Self, FaultsError> {
        let accelerator = "tcg".to_owned();
        let config = LabConfig { accelerator, worker_volume_bytes: Some(VOLUME_BYTES), ..LabConfig::default() };
        let lab = Lab::start(config).await?;
        let direction = Direction::First;
        let file = VmFile::new(&lab, VM, images, SMALL)?;
        let given = vec![("root", file.disk().to_owned()), (DATA.0, file.add_disk(DATA.0, Format::Raw, DATA_BYTES)?)];
        lab.ctl(["vm", "define", "-f", file.path(), "--site", direction.site(Side::Source)]).await?;
        lab.ctl(["vm", "start", VM]).await?;
        let vm = lab.ctl_json(["vm", "get", VM]).await?;
        let vm_id = vm["id"].as_str().unwrap_or_default().to_owned();
        let arena = Self { lab, vm_id, given, direction };
        arena.guest().await?;
        arena.set_rate(SEED_RATE_BPS)?;
        arena.lab.ctl(["protect", VM, "--to", arena.site(Side::Destination), "--rpo", RPO, "--keep", KEEP]).await?;
        arena.point_taken_after(0, FIRST_POINT_LIMIT).await?;
        arena.set_rate(LabConfig::default().link.rate_bps)?;
        Ok(arena)
    }

    /// Moves the VM if its disks are replicated the other way, and waits until they are replicated this way.
    ///
    /// # Errors
    /// When it does not move, or there is no point of the turned-round replication.
    pub async fn turn(&mut self, direction: Direction) -> Result<(), FaultsError> {
        if self.direction == direction {
            return Ok(());
        }
        let ordered = self.lab.ctl_json(["migrate", VM, "--to", direction.site(Side::Source)]).await?;
        let id = ordered["id"].as_str().unwrap_or_default().to_owned();
        let moved = wait_for("the move to end", MOVE_LIMIT, async || {
            let migration = self.lab.ctl_json(["migration", "get", &id]).await.map_err(|error| error.to_string())?;
            let over = ["completed", "failed", "cancelled"].iter().any(|state| migration["state"] == *state);
            if over { Ok(migration) } else { Err(migration.to_string()) }
        })
        .await?;
        if moved["state"] != "completed" {
            return Err(FaultsError::Answer { what: "a completed move", answer: moved.to_string() });
        }
        self.direction = direction;
        self.point_taken_after(now_unix_ms(), FIRST_POINT_LIMIT).await.map(drop)
    }

    /// Where a side is now.
    #[must_use]
    pub fn site(&self, side: Side) -> &'static str {
        self.direction.site(side)
    }

    /// A new connection to the guest, once it answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn guest(&self) -> Result<GuestClient, FaultsError> {
        let segment = self.lab.network().namespace(self.site(Side::Source));
        Ok(GuestClient::connect(segment, GUEST_ADDRESS, BOOT_LIMIT).await?)
    }

    /// Begins a history of this seed, and to look at it.
    ///
    /// # Errors
    /// When the guest does not.
    pub async fn begin_history(&self, seed: u64) -> Result<Ledger, FaultsError> {
        let mut guest = self.guest().await?;
        let start = Request::HistoryStart {
            operations_per_second: OPERATIONS_PER_SECOND,
            seed,
            trim_every: TRIM_EVERY,
            disks: vec![DATA.1.to_owned()],
        };
        guest.call(&start, ANSWER_LIMIT).await?;
        Ok(Ledger::start(guest))
    }

    /// Ends the history; hands back what it came to: operations, and the slowest write in milliseconds.
    ///
    /// # Errors
    /// When the guest does not answer, or the history had failed.
    pub async fn end_history(&self) -> Result<(u64, u64), FaultsError> {
        match self.guest().await?.call(&Request::HistoryStop, ANSWER_LIMIT).await? {
            Reply::History { done, slowest_write_ms, failure: None } => Ok((done, slowest_write_ms)),
            reply => Err(FaultsError::Answer { what: "a history without failure", answer: format!("{reply:?}") }),
        }
    }

    /// Everything that the guest has written is on its disks when this returns.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn sync(&self) -> Result<(), FaultsError> {
        Ok(self.guest().await?.call(&Request::Sync, ANSWER_LIMIT).await.map(drop)?)
    }

    /// What the guest's kernel says of I/O errors.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn kernel_trouble(&self) -> Result<Vec<String>, FaultsError> {
        match self.guest().await?.call(&Request::KernelTrouble, ANSWER_LIMIT).await? {
            Reply::KernelTrouble { lines } => Ok(lines),
            reply => Err(FaultsError::Answer { what: "the kernel's log", answer: format!("{reply:?}") }),
        }
    }

    /// Starts the VM once the controllers know that it does not run, and waits until the guest answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn boot_again(&self) -> Result<(), FaultsError> {
        wait_for("the vm to be started again", BOOT_LIMIT, async || {
            let vm = self.vm().await.map_err(|error| seen(&error))?;
            if vm["state"] != "crashed" && vm["state"] != "stopped" {
                return Err(format!("state {}", vm["state"]));
            }
            self.lab.ctl(["vm", "start", VM]).await.map(drop).map_err(|error| error.to_string())
        })
        .await?;
        self.guest().await.map(drop)
    }

    /// The VM as the controllers show it.
    ///
    /// # Errors
    /// When they do not answer.
    pub async fn vm(&self) -> Result<Value, FaultsError> {
        Ok(self.lab.ctl_json(["vm", "get", VM]).await?)
    }

    /// Its newest recovery point.
    ///
    /// # Errors
    /// When the controllers do not answer.
    pub async fn newest(&self) -> Result<Newest, FaultsError> {
        Ok(newest(&self.vm().await?, self.site(Side::Destination)))
    }

    /// Waits for a point that was taken after this time.
    ///
    /// # Errors
    /// [`FaultsError::InVain`] with the replica's state.
    pub async fn point_taken_after(&self, unix_ms: i64, limit: Duration) -> Result<Newest, FaultsError> {
        wait_for("a recovery point taken after the moment", limit, async || {
            let vm = self.vm().await.map_err(|error| seen(&error))?;
            let newest = newest(&vm, self.site(Side::Destination));
            if newest.taken_unix_ms > unix_ms { Ok(newest) } else { Err(vm["replicas"].to_string()) }
        })
        .await
    }

    /// Waits until the replica lies in place, as it is at its newest point.
    ///
    /// # Errors
    /// [`FaultsError::InVain`] with the files that are left.
    pub async fn applied(&self) -> Result<(), FaultsError> {
        let Places { points, .. } = self.places();
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let entries = std::fs::read_dir(&points).into_iter().flatten().flatten();
            let names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            if !names.iter().any(|name| name.ends_with(".journal")) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let what = "the newest point to be in place".to_owned();
                return Err(FaultsError::InVain { what, seconds: ANSWER_LIMIT.as_secs(), seen: names.join(" ") });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The VM's id.
    #[must_use]
    pub fn vm_id(&self) -> &str {
        &self.vm_id
    }

    /// The VM's images at a side, with the names of the disks; the one with the file system first.
    #[must_use]
    pub fn images(&self, side: Side) -> Vec<(&'static str, PathBuf)> {
        let site = self.site(side);
        if site == Direction::First.site(Side::Source) {
            return self.given.clone();
        }
        let folder = self.replica_folder(site);
        self.given.iter().map(|(disk, _)| (*disk, folder.join(format!("{disk}.raw")))).collect()
    }

    /// Where rounds leave their files.
    #[must_use]
    pub fn places(&self) -> Places {
        let scratch = self.lab.worker_data(self.site(Side::Source)).join("scratch");
        let points = self.replica_folder(self.site(Side::Destination)).join("points");
        Places { scratch, points }
    }

    /// Where copies of images may be made.
    #[must_use]
    pub fn copies(&self) -> PathBuf {
        self.lab.folder().join("disks")
    }

    fn replica_folder(&self, site: &str) -> PathBuf {
        self.lab.worker_data(site).join("replicas").join(&self.vm_id)
    }

    /// Bytes that the workers have sent from the source to the destination since the lab began.
    ///
    /// # Errors
    /// When the WAN does not answer.
    pub fn wan_bytes(&self) -> Result<u64, FaultsError> {
        let (from, to) = (self.site(Side::Source), self.site(Side::Destination));
        let error = |source| FaultsError::Link { from: from.to_owned(), to: to.to_owned(), source };
        let counters = self.lab.network().wan()?.link(from, to).map_err(error)?;
        Ok(counters.service_bytes(crate::wan::flow::UDP, crate::lab::addresses::PEER_PORT))
    }

    fn set_rate(&self, rate_bps: u64) -> Result<(), FaultsError> {
        let shape = Shape { rate_bps, queue_bytes: None, ..LabConfig::default().link };
        let (source, destination) = (self.site(Side::Source), self.site(Side::Destination));
        for (from, to) in [(source, destination), (destination, source)] {
            steer(&self.lab, from, to, |from, to| WanRequest::SetLink { from, to, shape })?;
        }
        Ok(())
    }
}

fn newest(vm: &Value, site: &str) -> Newest {
    let mut replicas = vm["replicas"].as_array().into_iter().flatten();
    let Some(replica) = replicas.find(|replica| replica["site"] == site) else {
        return Newest::default();
    };
    let newest = &replica["replication"]["newest"];
    Newest { number: whole(&newest["number"]), taken_unix_ms: whole(&newest["taken_unix_ms"]).cast_signed() }
}

/// Protobuf's JSON has long integers as text.
fn whole(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}
