//! The lab starts everything, bears the loss of a controller, and leaves nothing behind. Needs root and the built daemons;
//! says so and passes when there is no root.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::time::Duration;

use pageport_lab::lab::guest::{GUEST_ADDRESS, GuestImages, SMALL};
use pageport_lab::lab::{Lab, LabConfig, VmFile};
use pageport_lab::netns;
use tokio::time::{Instant, sleep};

const SOON: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_outlives_controllers_and_its_worker_but_not_the_lab() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let images = GuestImages::build(SMALL).unwrap();
    let mut lab = Lab::start(LabConfig::default()).await.unwrap();
    let file = VmFile::new(&lab, "small", &images, SMALL).unwrap();
    lab.ctl(["vm", "define", "-f", file.path(), "--site", "a"]).await.unwrap();
    lab.ctl(["vm", "start", "small"]).await.unwrap();
    let mut guest = lab.guest("b", GUEST_ADDRESS).await.unwrap();
    let (_, boot_id, _) = guest.uptime().await.unwrap();
    let [("a", qemu)] = lab.qemu_pids("small")[..] else { panic!("{:?}", lab.qemu_pids("small")) };

    lab.controller("b").kill().unwrap();
    lab.controller("b").restart().unwrap();
    lab.worker("a").kill().unwrap();
    assert_eq!(lab.qemu_pids("small"), [("a", qemu)]);
    lab.worker("a").restart().unwrap();
    lab.wait_until_ready().await.unwrap();
    assert_eq!(guest.uptime().await.unwrap().1, boot_id);

    // With its store lost as well the worker takes the running guest over, with a fresh grant.
    lab.worker("a").kill().unwrap();
    std::fs::remove_dir_all(lab.worker_data("a").join("store")).unwrap();
    lab.worker("a").restart().unwrap();
    lab.wait_until_ready().await.unwrap();
    assert_eq!(guest.uptime().await.unwrap().1, boot_id);
    assert_eq!(lab.qemu_pids("small"), [("a", qemu)]);

    // The worker that came back owns the guest again: it can end it.
    lab.ctl(["vm", "stop", "small", "--force"]).await.unwrap();
    let deadline = Instant::now() + SOON;
    while !lab.qemu_pids("small").is_empty() {
        assert!(Instant::now() < deadline, "{:?}", lab.qemu_pids("small"));
        sleep(Duration::from_millis(100)).await;
    }
    lab.ctl(["vm", "start", "small"]).await.unwrap();
    let mut guest = lab.guest("c", GUEST_ADDRESS).await.unwrap();
    assert_ne!(guest.uptime().await.unwrap().1, boot_id);
    let [("a", qemu)] = lab.qemu_pids("small")[..] else { panic!("{:?}", lab.qemu_pids("small")) };

    let (folder, runtime) = (lab.folder().to_owned(), lab.runtime().to_owned());
    drop(lab);
    // Gone, or dead and waiting for a machine's first process to notice: the dead have no command line.
    let line = std::fs::read(format!("/proc/{qemu}/cmdline")).unwrap_or_default();
    assert!(line.is_empty(), "{}", String::from_utf8_lossy(&line));
    assert!(!runtime.exists());
    assert!(!folder.join("disks").exists());
    assert!(folder.join("logs").exists());
}
