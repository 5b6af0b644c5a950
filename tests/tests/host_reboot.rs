//! A host loses its power and comes back: its worker asks whose VMs they are, then boots them by their start policy.
//!
//! What a reboot leaves is what is on disk: every process of the host is killed, and the runtime folder (a tmpfs) is emptied.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::netns;
use support::{VM, ctl, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_rebooted_boots_its_vms_as_their_policy_says() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let mut lab = Lab::start(LabConfig::default()).await.unwrap();
    let file = VmFile::new(&lab, VM, &images, SMALL).unwrap();
    let waits = VmFile::with_address(&lab, "waits", &images, SMALL, [10, 88, 0, 77].into()).unwrap();
    waits.add("start: manual").unwrap();
    for (name, file) in [(VM, &file), ("waits", &waits)] {
        ctl(&lab, &["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
        ctl(&lab, &["vm", "start", name]).await.unwrap();
    }
    let boot = lab.guest("b", GUEST_ADDRESS).await.unwrap().uptime().await.unwrap().1;
    is(&lab, "waits", "running").await;

    // Nobody answers it: what it has on disk permits nothing by itself.
    for site in ["a", "b", "c"] {
        lab.controller(site).kill().unwrap();
    }
    reboot(&mut lab);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!((lab.qemu_pids(VM), lab.qemu_pids("waits")), (vec![], vec![]), "booted without asking");

    for site in ["a", "b", "c"] {
        lab.controller(site).restart().unwrap();
    }
    lab.wait_until_ready().await.unwrap();
    is(&lab, VM, "running").await;
    let again = lab.guest("b", GUEST_ADDRESS).await.unwrap().uptime().await.unwrap().1;
    assert_ne!(again, boot);
    is(&lab, "waits", "stopped").await;
    assert!(lab.qemu_pids("waits").is_empty());
    ctl(&lab, &["vm", "start", "waits"]).await.unwrap();
    is(&lab, "waits", "running").await;
}

/// Everything at site a ends at once; what is started at boot comes back.
fn reboot(lab: &mut Lab) {
    for (pid, name) in lab.programs("a") {
        if name != "pageport-controller" {
            // A guest ends with its keeper.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    lab.worker("a").kill().unwrap();
    lab.guard("a").kill().unwrap();
    let runtime = lab.runtime().join("a");
    for entry in fs::read_dir(&runtime).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    lab.guard("a").restart().unwrap();
    lab.worker("a").restart().unwrap();
}

async fn is(lab: &Lab, vm: &str, wanted: &str) {
    wait_for(&format!("{vm} to be {wanted}"), || async {
        let shown = lab.ctl_json(["vm", "get", vm]).await.map_err(|error| error.to_string())?;
        if shown["state"] == wanted { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
}
