//! What is said or done on the strength of a record comes after the record has reached the disk: seen in the system calls
//! of a real worker while it takes over a real guest. Needs root (network namespaces, ptrace); says so and passes when
//! there is none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use pageport_lab::lab::LabConfig;
use pageport_lab::netns;
use support::{Story, VM, ctl, wait_for};

/// One system call of the trace that matters here.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// A write into the store's data file; does it hold an `Own` record?
    Write { own: bool },
    /// `fdatasync` of the store's data file, successful.
    Sync,
    /// The worker tells QEMU to run the guest.
    Resume,
}

/// Writes and syncs in the order in which they returned, the resume where it began: the strictest reading.
fn calls(trace: &str, store: &str) -> Vec<Call> {
    let mut unfinished = std::collections::HashMap::new();
    let mut found = Vec::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let call = call.trim_start();
        if call.contains(r#"\"execute\":\"cont\""#) {
            found.push(Call::Resume);
            continue;
        }
        let whole = if let Some(begun) = call.strip_suffix("<unfinished ...>") {
            unfinished.insert(thread.to_owned(), begun.to_owned());
            continue;
        } else if call.starts_with("<... ") {
            unfinished.remove(thread).unwrap_or_default() + call
        } else {
            call.to_owned()
        };
        if !whole.contains(store) {
            continue;
        }
        if whole.starts_with("pwrite64(") {
            found.push(Call::Write { own: whole.contains(r#"{\"Own\""#) });
        } else if whole.starts_with("fdatasync(") && whole.ends_with("= 0") {
            found.push(Call::Sync);
        }
    }
    found
}

fn attach(pid: u32, output: &Path) -> Child {
    Command::new("strace")
        .args([
            "-f",
            "-y",
            "-s",
            "4096",
            "-e",
            "trace=pwrite64,fdatasync,write,writev,sendto,sendmsg",
            "-e",
            "signal=none",
            "-o",
        ])
        .arg(output)
        .args(["-p", &pid.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_resumed_only_after_the_record_that_permits_it_has_reached_the_disk() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), 200_000_000).await;
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("trace");
    let worker = story.lab.worker("b").pid().unwrap();
    let mut tracer = attach(worker, &output);
    wait_for("the tracer", || async {
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
        let tracer =
            status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap_or_default().trim().to_owned();
        if tracer == "0" { Err(status) } else { Ok(()) }
    })
    .await;
    ctl(&story.lab, &["migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(tracer.id().cast_signed()), nix::sys::signal::Signal::SIGINT)
        .unwrap();
    tracer.wait().unwrap();

    let store = story.lab.folder().join("data/worker-b/store/db");
    assert!(store.exists(), "no store at {}", store.display());
    let trace = std::fs::read_to_string(&output).unwrap();
    let calls = calls(&trace, &store.to_string_lossy());
    let resume = calls.iter().position(|call| *call == Call::Resume).expect("the guest was resumed");
    let own = calls[..resume].iter().rposition(|call| *call == Call::Write { own: true });
    let own = own.unwrap_or_else(|| panic!("no record was written before the guest was resumed: {calls:?}"));
    assert!(
        calls[own..resume].contains(&Call::Sync),
        "the record was not on the disk when the guest was resumed: {:?}",
        &calls[own..=resume]
    );
}
