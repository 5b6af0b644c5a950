//! Points with the guest's file systems at rest: clean file systems in them, a guest that never stays frozen, and what is said where there is
//! no agent.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use pageport_guest::protocol::{Reply, Request as GuestRequest};
use pageport_lab::lab::guest::client::GuestClient;
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Failpoints, Lab, LabConfig, VmFile};
use pageport_lab::netns;
use serde_json::Value;
use support::{PATIENCE, VM, ctl, set_rate, wait_for};

/// A protected guest that writes all the time.
struct Story {
    lab: Lab,
    guest: GuestClient,
    vm_id: String,
}

impl Story {
    async fn begin(images: &GuestImages) -> Self {
        let lab = Lab::start(LabConfig { failpoints: Failpoints::On, ..LabConfig::default() }).await.unwrap();
        let file = VmFile::new(&lab, VM, images, SMALL).unwrap();
        lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
        lab.ctl(["vm", "start", VM]).await.unwrap();
        let mut guest = lab.guest("c", GUEST_ADDRESS).await.unwrap();
        let start = GuestRequest::WriteStart { records_per_second: 50, seed: 1 };
        guest.call(&start, PATIENCE).await.unwrap();
        set_rate(&lab, 1_000_000_000);
        ctl(&lab, &["protect", VM, "--to", "b", "--rpo", "5s", "--keep", "4", "--quiesce"]).await.unwrap();
        let vm_id = lab.ctl_json(["vm", "get", VM]).await.unwrap()["id"].as_str().unwrap().to_owned();
        Self { lab, guest, vm_id }
    }

    /// How replication stands, once `fits` says so.
    async fn status(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || async {
            let vm = self.lab.ctl_json(["vm", "get", VM]).await.unwrap_or_default();
            let status = vm["replicas"][0]["replication"].clone();
            if fits(&status) { Ok(status) } else { Err(vm.to_string()) }
        })
        .await
    }

    /// Waits for the second point from now, which was begun after this was called; is it quiesced?
    async fn next_point_is_quiesced(&self) -> bool {
        let number = |status: &Value| status["newest"]["number"].as_u64().unwrap_or(0);
        let now = number(&self.status("a status", |_| true).await);
        let later = self.status("a newer point", |status| number(status) > now + 1).await;
        later["newest"]["quiesced"] == true
    }

    /// Ends the protection: the replica stays at its newest point. Is that a file system whose journal need not be replayed?
    async fn newest_point_is_clean(&self) -> bool {
        self.lab.ctl(["unprotect", VM, "--site", "b"]).await.unwrap();
        let replica = self.lab.worker_data("b").join("replicas").join(&self.vm_id).join("root.raw");
        let copy = self.lab.folder().join("check.raw");
        let digest = || blake3::hash(&std::fs::read(&replica).unwrap());
        wait_for("the end of what was under way", || async {
            let before = digest();
            tokio::time::sleep(std::time::Duration::from_secs(3)).await;
            if digest() == before { Ok(()) } else { Err("the replica changes".to_owned()) }
        })
        .await;
        std::fs::copy(&replica, &copy).unwrap();
        needs_no_replay(&copy)
    }

    fn runtime(&self) -> PathBuf {
        self.lab.runtime().join("a").join("vm").join(&self.vm_id)
    }

    /// The guest has gone on: every record that it wrote is there.
    async fn written(&mut self) {
        let stopped = self.guest.call(&GuestRequest::WriteStop, PATIENCE).await.unwrap();
        assert!(matches!(stopped, Reply::Written { .. }), "{stopped:?}");
        self.guest.call(&GuestRequest::Sync, PATIENCE).await.unwrap();
    }
}

fn needs_no_replay(image: &Path) -> bool {
    let header = Command::new("dumpe2fs").arg("-h").arg(image).output().unwrap();
    let header = String::from_utf8_lossy(&header.stdout).into_owned();
    let features = header.lines().find(|line| line.starts_with("Filesystem features")).unwrap().to_owned();
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().unwrap();
    eprintln!("{features}\n{}", String::from_utf8_lossy(&checked.stdout));
    !features.contains("needs_recovery") && checked.status.success()
}

/// What the agent itself says, asked past the worker.
fn frozen(socket: &Path) -> bool {
    let mut agent = UnixStream::connect(socket).unwrap();
    agent.set_read_timeout(Some(PATIENCE)).unwrap();
    agent.write_all(b"{\"execute\":\"guest-fsfreeze-status\"}\n").unwrap();
    let mut reader = BufReader::new(agent);
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the agent is gone");
        match serde_json::from_str::<Value>(&line).unwrap_or_default()["return"].as_str() {
            Some("frozen") => return true,
            Some("thawed") => return false,
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiesced_point_is_a_clean_file_system_and_a_guest_whose_worker_is_killed_while_it_is_frozen_writes_on() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(&GuestImages::build_with_agent(SMALL).unwrap()).await;
    assert!(story.next_point_is_quiesced().await);
    let points = story.lab.ctl_json(["recovery-point", "list", VM, "--site", "b"]).await.unwrap();
    assert_eq!(points["points"].as_array().unwrap().last().unwrap()["quiesced"], true, "{points}");
    let status = story.status("a status", |_| true).await;
    assert_eq!(status["quiesce_problem"].as_str().unwrap_or(""), "", "{status}");

    eprintln!("the worker is killed while the guest is frozen");
    let folder = story.lab.failpoints();
    let (hold, reached) = (folder.join("source.frozen.hold"), folder.join("source.frozen.reached"));
    std::fs::write(&hold, b"").unwrap();
    let _ = std::fs::remove_file(&reached);
    wait_for("a frozen guest", || async { if reached.exists() { Ok(()) } else { Err(String::new()) } }).await;
    story.lab.worker("a").kill().unwrap();
    let (note, socket) = (story.runtime().join("frozen"), story.runtime().join("agent.sock"));
    assert!(note.exists());
    assert!(frozen(&socket));
    std::fs::remove_file(&hold).unwrap();
    story.lab.worker("a").restart().unwrap();
    wait_for("a thawed guest", || async { if note.exists() { Err("noted as frozen".into()) } else { Ok(()) } }).await;
    story.guest.call(&GuestRequest::Sync, PATIENCE).await.unwrap();
    assert!(story.next_point_is_quiesced().await);

    assert!(story.newest_point_is_clean().await);
    story.written().await;
    assert!(!frozen(&socket));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_an_agent_is_protected_as_after_a_power_cut_and_the_status_says_why() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(&GuestImages::build(SMALL).unwrap()).await;
    assert!(!story.next_point_is_quiesced().await);
    let status = story.status("a status", |_| true).await;
    assert!(status["quiesce_problem"].as_str().unwrap_or("").starts_with("no guest agent answers"), "{status}");
    let table = ctl(&story.lab, &["replication", "status", VM]).await.unwrap();
    assert!(table.contains("quiescing: no guest agent answers"), "{table}");
    let log = std::fs::read_to_string(story.lab.worker("a").log()).unwrap();
    assert_eq!(log.matches("recovery points are not quiesced").count(), 1, "once, however many points");
    story.guest.call(&GuestRequest::Sync, PATIENCE).await.unwrap();
    story.written().await;

    eprintln!("ordered again without it");
    ctl(&story.lab, &["protect", VM, "--to", "b", "--rpo", "5s", "--keep", "4"]).await.unwrap();
    story.status("no word of it", |status| status["quiesce_problem"].as_str().unwrap_or("").is_empty()).await;
}
