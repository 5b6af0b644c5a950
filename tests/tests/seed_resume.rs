//! A seed that was broken in the middle, by a cut link or by the death of the worker that receives it, is ordered again: what
//! had arrived does not cross the link a second time, and the replica is the disk. Bytes are the emulator's.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::netns;
use pageport_lab::wan::flow::UDP;
use pageport_lab::wan::link::Shape;
use support::{PATIENCE, VM, ctl, cut, heal, wait_for};
use tokio::process::Child;

/// Slow enough that a seed can be struck in the middle.
const RATE_BPS: u64 = 60_000_000;
/// The port of the workers' QUIC endpoints.
const PEER_PORT: u16 = 7501;

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_seed_goes_on_where_it_was() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let link = Shape { rate_bps: RATE_BPS, ..LabConfig::default().link };
    let mut lab = Lab::start(LabConfig { link, ..LabConfig::default() }).await.unwrap();
    let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
    ctl(&lab, &["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
    ctl(&lab, &["vm", "start", VM]).await.unwrap();
    let mut guest = lab.guest("c", GUEST_ADDRESS).await.unwrap();
    let boot_id = guest.uptime().await.unwrap().1;

    // What a seed costs that nothing breaks.
    ctl(&lab, &["replica", "seed", VM, "--to", "c", "--watch"]).await.unwrap();
    let whole = sent(&lab, "c");
    assert_equal(&lab, "c", file.disk()).await;

    let (watching, before) = seed_until_half(&lab, whole).await;
    cut(&lab);
    wait_for_the_source_to_give_up(&mut lab).await;
    heal(&lab);
    lab.wait_until_ready().await.unwrap();
    assert_told(watching).await;
    assert_goes_on(&lab, before, whole, file.disk()).await;

    let folder = replica(&lab, "b").await.parent().unwrap().to_owned();
    ctl(&lab, &["replica", "delete", VM, "--site", "b"]).await.unwrap();
    wait_for_the_replica_to_be_gone(&mut lab, &folder).await;
    let (watching, before) = seed_until_half(&lab, whole).await;
    lab.worker("b").kill().unwrap();
    assert_told(watching).await;
    lab.worker("b").restart().unwrap();
    lab.wait_until_ready().await.unwrap();
    assert_goes_on(&lab, before, whole, file.disk()).await;

    assert_eq!(guest.uptime().await.unwrap().1, boot_id);
}

/// What the workers' traffic from a to a site has come to so far.
fn sent(lab: &Lab, to: &str) -> u64 {
    lab.network().wan().unwrap().link("a", to).unwrap().service_bytes(UDP, PEER_PORT)
}

async fn replica(lab: &Lab, site: &str) -> PathBuf {
    let vm = lab.ctl_json(["vm", "get", VM]).await.unwrap();
    lab.folder().join(format!("data/worker-{site}/replicas/{}/root.raw", vm["id"].as_str().unwrap()))
}

/// Begins a seed to b, watched, and hands it back when half of its bytes are on the link, with what had been sent before.
async fn seed_until_half(lab: &Lab, whole: u64) -> (Child, u64) {
    let before = sent(lab, "b");
    let mut watching = order_seed(lab);
    let half = wait_for("half of the seed", || async {
        let sent = sent(lab, "b") - before;
        if sent > whole / 2 { Ok(()) } else { Err(format!("{sent} of {whole}")) }
    });
    tokio::select! {
        () = half => (),
        _ = watching.wait() => panic!("the seed ended early: {:?}", watching.wait_with_output().await),
    }
    (watching, before)
}

fn order_seed(lab: &Lab) -> Child {
    let mut command = lab.ctl_command("a");
    command.args(["replica", "seed", VM, "--to", "b", "--watch"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// The leader may be beyond the cut, so the source's own log is asked, not the controllers.
async fn wait_for_the_source_to_give_up(lab: &mut Lab) {
    let log = lab.worker("a").log().to_owned();
    wait_for("the source to give the seed up", || async {
        let text = std::fs::read_to_string(&log).unwrap();
        if text.contains("seed ended early") { Ok(()) } else { Err(text.lines().last().unwrap_or_default().into()) }
    })
    .await;
}

/// The files are gone, and the controllers have heard so: before that they refuse a new seed.
async fn wait_for_the_replica_to_be_gone(lab: &mut Lab, folder: &Path) {
    let logs = ["a", "b", "c"].map(|site| lab.controller(site).log().to_owned());
    wait_for("the replica to be gone", || async {
        let recorded = logs.iter().any(|log| std::fs::read_to_string(log).unwrap().contains("ReplicaRemoved"));
        if folder.exists() || !recorded { Err(folder.display().to_string()) } else { Ok(()) }
    })
    .await;
}

/// Who watched the broken seed was told why it ended.
async fn assert_told(watching: Child) {
    let output = tokio::time::timeout(PATIENCE, watching.wait_with_output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    assert!(!output.status.success() && last.starts_with("error: ") && last.contains(VM), "{said}");
}

/// Ordered again, the seed ends, and the rest alone has crossed the link.
async fn assert_goes_on(lab: &Lab, before: u64, whole: u64, disk: &Path) {
    let broken = sent(lab, "b") - before;
    ctl(lab, &["replica", "seed", VM, "--to", "b", "--watch"]).await.unwrap();
    let both = sent(lab, "b") - before;
    // What was under way when it broke is sent again, and the digests of what is there come back the other way.
    assert!(both < whole * 6 / 5, "first {broken}, then {}, of {whole}", both - broken);
    assert_equal(lab, "b", disk).await;
}

async fn assert_equal(lab: &Lab, site: &str, disk: &Path) {
    let replica = replica(lab, site).await;
    assert_eq!(digest(&replica), digest(disk), "{} is not the disk", replica.display());
}

fn digest(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).unwrap()).unwrap();
    hasher.finalize().to_hex().to_string()
}
