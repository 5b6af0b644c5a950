//! A guest that is protected, and what must hold of it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pageport_guest::protocol::{Reply, Request as GuestRequest};
use pageport_lab::lab::guest::client::GuestClient;
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, LabError, VmFile};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use super::{PATIENCE, VM, ctl, set_rate, wait_for};

/// A lab whose guest at a is protected to b.
pub struct Protected {
    pub lab: Lab,
    pub guest: GuestClient,
    pub boot_id: String,
    /// The image at the VM's first site.
    pub disk: PathBuf,
}

impl Protected {
    /// With a first point.
    pub async fn begin() -> Self {
        Self::begin_with(LabConfig::default(), |lab, images| VmFile::new(lab, VM, images, SMALL)).await
    }

    /// As [`Self::begin`], in such a lab with such a VM.
    pub async fn begin_with(
        config: LabConfig,
        file: impl FnOnce(&Lab, &GuestImages) -> Result<VmFile, LabError>,
    ) -> Self {
        Self::begin_on(config, file, &[]).await
    }

    /// As [`Self::begin_with`], protected with these options besides.
    pub async fn begin_on(
        config: LabConfig,
        file: impl FnOnce(&Lab, &GuestImages) -> Result<VmFile, LabError>,
        options: &[&str],
    ) -> Self {
        let images = GuestImages::build(SMALL).unwrap();
        let lab = Lab::start(config).await.unwrap();
        let file = file(&lab, &images).unwrap();
        lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
        lab.ctl(["vm", "start", VM]).await.unwrap();
        let mut guest = lab.guest("c", GUEST_ADDRESS).await.unwrap();
        let boot_id = guest.uptime().await.unwrap().1;
        set_rate(&lab, 1_000_000_000);
        let protect = ["protect", VM, "--to", "b", "--rpo", "5s", "--keep", "4"];
        ctl(&lab, &[&protect[..], options].concat()).await.unwrap();
        let protected = Self { lab, guest, boot_id, disk: file.disk().to_owned() };
        protected.point_after("b", 0).await;
        set_rate(&protected.lab, LabConfig::default().link.rate_bps);
        protected
    }

    /// Waits for a recovery point newer than `number` at a site; returns its number.
    pub async fn point_after(&self, site: &str, number: u64) -> u64 {
        wait_for("a newer recovery point", || async {
            let vm = self.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
            let newest = newest(&vm, site);
            if newest > number { Ok(newest) } else { Err(vm.to_string()) }
        })
        .await
    }

    /// Two points further: the second was begun after this was called.
    pub async fn point_from_now(&self, site: &str) -> u64 {
        let vm = self.lab.ctl_json(["vm", "get", VM]).await.unwrap();
        self.point_after(site, newest(&vm, site) + 1).await
    }

    pub async fn vm_id(&self) -> String {
        self.lab.ctl_json(["vm", "get", VM]).await.unwrap()["id"].as_str().unwrap().to_owned()
    }

    pub async fn replica(&self, site: &str) -> PathBuf {
        self.lab.worker_data(site).join("replicas").join(self.vm_id().await).join("root.raw")
    }

    pub fn log(&mut self, site: &str) -> String {
        std::fs::read_to_string(self.lab.worker(site).log()).unwrap()
    }

    pub async fn write(&mut self, seed: u64) {
        let start = GuestRequest::WriteStart { records_per_second: 200, seed };
        self.guest.call(&start, PATIENCE).await.unwrap();
    }

    /// Stops writing; everything is on the guest's disk then.
    pub async fn written(&mut self) {
        let stopped = self.guest.call(&GuestRequest::WriteStop, PATIENCE).await.unwrap();
        assert!(matches!(stopped, Reply::Written { .. }), "{stopped:?}");
        self.guest.call(&GuestRequest::Sync, PATIENCE).await.unwrap();
    }

    /// The replica becomes the disk, and stays a file system that needs no repair.
    pub async fn assert_replica_is_the_disk(&self, site: &str, disk: &Path) {
        let replica = self.replica(site).await;
        wait_for("the replica to be the disk", || async {
            let same = digest(&replica) == digest(disk);
            if same { Ok(()) } else { Err(format!("{} differs from {}", replica.display(), disk.display())) }
        })
        .await;
        assert_sound(&replica, &self.lab.folder().join("check.raw"));
    }

    /// What a command says in the guest's shell, on its serial console; an error if that cannot be reached now.
    pub async fn shell(&self, command: &str) -> Result<String, String> {
        let mut console = self.lab.ctl_command("a");
        console.args(["vm", "console", VM, "--linger", "3"]);
        console.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = console.spawn().unwrap();
        // The shell shows what is typed, too; but not as it is said.
        let typed = format!("\necho BEG''IN; {command}; echo EN''D\n");
        child.stdin.take().unwrap().write_all(typed.as_bytes()).await.unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let said = shown.rsplit_once("BEGIN").and_then(|(_, rest)| rest.split_once("END"));
        let said = said.ok_or_else(|| format!("{command}: {shown}{}", String::from_utf8_lossy(&output.stderr)))?;
        Ok(said.0.trim().to_owned())
    }

    pub async fn assert_same_guest(&mut self) {
        let mut guest = self.lab.guest("c", GUEST_ADDRESS).await.unwrap();
        assert_eq!(guest.uptime().await.unwrap().1, self.boot_id, "the guest was booted anew");
        self.guest = guest;
    }

    /// Orders a move; returns its id.
    pub async fn order(&self, to: &str) -> String {
        let moved = self.lab.ctl_json(["migrate", VM, "--to", to]).await.unwrap();
        moved["id"].as_str().unwrap().to_owned()
    }

    /// The migration, once it is over.
    pub async fn ended(&self, id: &str) -> Value {
        wait_for("the end of the move", || async {
            let migration = self.lab.ctl_json(["migration", "get", id]).await.unwrap_or_default();
            let over = ["completed", "failed", "cancelled"].iter().any(|state| migration["state"] == *state);
            if over { Ok(migration) } else { Err(migration.to_string()) }
        })
        .await
    }

    /// Moves; returns the migration.
    pub async fn moves(&self, to: &str) -> Value {
        let migration = self.ended(&self.order(to).await).await;
        assert_eq!(migration["state"], "completed", "{migration}");
        migration
    }

    /// Less than a hundredth of the disk crosses the link for a move.
    pub async fn assert_moves_with_little(&self, to: &str, disk_bytes: u64) {
        let migration = self.moves(to).await;
        let disk_wan_bytes = number_of(&migration["record"]["disk_wan_bytes"]).unwrap();
        eprintln!("to {to}: {disk_wan_bytes} bytes of the disk's {disk_bytes}, {}", migration["record"]);
        assert!(disk_wan_bytes < disk_bytes / 100, "{disk_wan_bytes} of {disk_bytes}");
    }
}

pub fn newest(vm: &Value, site: &str) -> u64 {
    let replicas = vm["replicas"].as_array().into_iter().flatten();
    let number = replicas.filter(|replica| replica["site"] == site);
    number.filter_map(|replica| number_of(&replica["replication"]["newest"]["number"])).max().unwrap_or(0)
}

/// Protobuf's JSON has long integers as text.
pub fn number_of(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

pub fn digest(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).unwrap()).unwrap();
    hasher.finalize().to_hex().to_string()
}

/// A copy of the image passes the file system's check once its journal is replayed.
pub fn assert_sound(image: &Path, copy: &Path) {
    std::fs::copy(image, copy).unwrap();
    let replayed = Command::new("e2fsck").args(["-p", "-E", "journal_only"]).arg(copy).output().unwrap();
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(copy).output().unwrap();
    std::fs::remove_file(copy).unwrap();
    assert!(checked.status.success(), "{replayed:?} {checked:?}");
}
