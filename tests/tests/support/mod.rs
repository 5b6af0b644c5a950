//! What the stories of moving a VM share: a lab with one small guest that runs, is seeded, warm and busy.
#![allow(clippy::unwrap_used, dead_code)]

pub mod protected;
pub mod witness;

use std::path::PathBuf;
use std::time::Duration;

use pageport_guest::protocol::Request as GuestRequest;
use pageport_lab::demo::loads::{self, Before};
use pageport_lab::demo::session::BusySession;
use pageport_lab::lab::guest::client::{CountingSession, GuestClient};
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::wan::control::Request;
use pageport_lab::wan::link::Shape;
use serde_json::Value;
use tokio::time::{Instant, sleep};

pub const VM: &str = "web";
/// Anything that takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// A lab with a guest at site a.
pub struct Story {
    pub lab: Lab,
    pub guest: GuestClient,
    pub before: Before,
}

impl Story {
    /// Starts everything and seeds site b over a fast link, then sets the link to `rate_bps`.
    pub async fn begin(config: LabConfig, rate_bps: u64) -> Self {
        let images = GuestImages::build(SMALL).unwrap();
        let lab = Lab::start(config).await.unwrap();
        let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
        lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
        lab.ctl(["vm", "start", VM]).await.unwrap();
        let mut guest = lab.guest("a", GUEST_ADDRESS).await.unwrap();
        let story_link = LabConfig::default().link;
        set_rate(&lab, 1_000_000_000);
        ctl(&lab, &["replica", "seed", VM, "--to", "b", "--watch"]).await.unwrap();
        set_rate(&lab, rate_bps);
        assert_eq!(story_link.one_way_delay_ms, 25);
        let before = loads::begin(&mut guest, SMALL).await.unwrap();
        Self { lab, guest, before }
    }

    /// A TCP session to the guest, from its first site, that is used all the time.
    pub async fn busy_session(&self) -> BusySession {
        BusySession::start(CountingSession::open(self.lab.network().namespace("a"), GUEST_ADDRESS).await.unwrap())
    }

    /// The guest is the one that was booted, and goes on.
    pub async fn assert_guest_lives(&mut self, boot_id: &str) {
        let (_, seen, _) = self.guest.uptime().await.unwrap();
        assert_eq!(seen, boot_id, "the guest was booted anew");
        self.guest.call(&GuestRequest::Sync, PATIENCE).await.unwrap();
    }

    /// Exactly one hypervisor runs the VM, and nothing of a migration is left behind at any site.
    pub async fn assert_nothing_left(&self, owner: &str) {
        wait_for("one hypervisor, and nothing of a migration", || async {
            let pids = self.lab.qemu_pids(VM);
            let one = matches!(pids[..], [(site, _)] if site == owner);
            let leftovers = self.leftovers();
            if one && leftovers.is_empty() { Ok(()) } else { Err(format!("{pids:?} {leftovers:?}")) }
        })
        .await;
    }

    fn leftovers(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for site in ["a", "b", "c"] {
            let Ok(vms) = std::fs::read_dir(self.lab.runtime().join(site).join("vm")) else { continue };
            let files = vms.flatten().filter_map(|vm| std::fs::read_dir(vm.path()).ok()).flatten().flatten();
            found.extend(files.map(|file| file.path()).filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.starts_with("outgoing") || name.starts_with("nbd-")
            }));
        }
        found
    }

    /// Orders a move to b and hands back its id.
    pub async fn order(&self) -> String {
        let created = self.lab.ctl_json(["migrate", VM, "--to", "b"]).await.unwrap();
        created["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a migration is in its memory phase and has sent some of it.
    pub async fn wait_for_memory(&self, id: &str) {
        wait_for("the memory phase", || async {
            let migration = self.migration(id).await;
            let progress = &migration["progress"];
            let sent = progress["pages"]["literal"].as_u64().unwrap_or(0);
            if progress["phase"] == "memory" && sent > 500 { Ok(()) } else { Err(migration.to_string()) }
        })
        .await;
    }

    /// Waits until a migration has ended, and hands it back.
    pub async fn wait_for_end(&self, id: &str) -> Value {
        wait_for("the end of the migration", || async {
            let migration = self.migration(id).await;
            let state = migration["state"].as_str().unwrap_or_default().to_owned();
            if ["completed", "failed", "cancelled"].contains(&state.as_str()) {
                Ok(migration)
            } else {
                Err(migration.to_string())
            }
        })
        .await
    }

    pub async fn migration(&self, id: &str) -> Value {
        self.lab.ctl_json(["migration", "get", id]).await.unwrap_or_default()
    }

    /// Waits until the controllers see the VM in this state.
    pub async fn wait_for_vm(&self, state: &str) -> Value {
        wait_for("the vm's state", || async {
            let vm = self.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
            if vm["state"] == state { Ok(vm) } else { Err(vm.to_string()) }
        })
        .await
    }
}

/// Runs a command that may take long.
pub async fn ctl(lab: &Lab, arguments: &[&str]) -> Result<String, String> {
    let output = lab.ctl_within(arguments, PATIENCE).await.unwrap();
    if output.status.success() { Ok(output.stdout) } else { Err(output.stderr) }
}

/// Both directions between a and b.
pub fn set_rate(lab: &Lab, rate_bps: u64) {
    let shape = Shape { rate_bps, queue_bytes: None, ..LabConfig::default().link };
    each_direction(lab, |from, to| Request::SetLink { from, to, shape });
}

pub fn cut(lab: &Lab) {
    each_direction(lab, |from, to| Request::Cut { from, to });
}

pub fn heal(lab: &Lab) {
    each_direction(lab, |from, to| Request::Heal { from, to });
}

fn each_direction(lab: &Lab, request: impl Fn(String, String) -> Request) {
    let mut wan = lab.network().wan().unwrap();
    for (from, to) in [("a", "b"), ("b", "a")] {
        wan.call(&request(from.to_owned(), to.to_owned())).unwrap();
    }
}

/// Looks again and again until it is so; tells the last look if it never is.
pub async fn wait_for<T, F: Future<Output = Result<T, String>>>(what: &str, look: impl Fn() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) => assert!(Instant::now() < deadline, "waited in vain for {what}; last seen: {seen}"),
        }
        sleep(POLL).await;
    }
}
