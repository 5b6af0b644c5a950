//! The console: bytes there and back, the terminal's mode, and every way it ends.

#![allow(clippy::unwrap_used)]

mod support;

use std::process::Stdio;
use std::time::Duration;

use pageport_proto::v1;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use support::{Authority, Ended, Fake, Running, ended, pageportctl, run, vm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Child;

/// A VM whose console one fake worker serves.
struct House {
    authority: Authority,
    controller: Running,
    _worker: Running,
}

async fn house() -> House {
    let (authority, fake) = (Authority::new(), Fake::default());
    let controller = fake.serve(&authority, "controller.pageport").await;
    let worker = fake.serve(&authority, "worker-a.worker.pageport").await;
    let grpc_address = worker.address.to_string();
    fake.script().vms = vec![vm("web")];
    fake.script().workers = vec![v1::Worker { name: "worker-a".into(), grpc_address, ..Default::default() }];
    House { authority, controller, _worker: worker }
}

impl House {
    fn console(&self, stdin: Stdio) -> Child {
        let arguments = ["vm", "console", "web", "--linger", "1"];
        let mut command = pageportctl(&self.authority, &self.controller.address.to_string(), &arguments);
        command.stdin(stdin).spawn().unwrap()
    }
}

async fn wait(child: Child) -> Ended {
    ended(tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap())
}

async fn session(input: &str) -> Ended {
    let house = house().await;
    let mut child = house.console(Stdio::piped());
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    wait(child).await
}

#[tokio::test]
async fn a_terminal_is_raw_during_the_session_and_as_before_afterwards() {
    let house = house().await;
    let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&keyboard).unwrap();
    unlockpt(&keyboard).unwrap();
    let path = ptsname(&keyboard, Vec::new()).unwrap().into_string().unwrap();
    let terminal = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let is_raw = || !tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON);
    assert!(!is_raw());

    let mut child = house.console(terminal.try_clone().unwrap().into());
    let mut stdout = child.stdout.take().unwrap();
    let mut screen = [0; "[id-web]".len()];
    stdout.read_exact(&mut screen).await.unwrap();
    assert_eq!(&screen, b"[id-web]");
    assert!(is_raw());

    rustix::io::write(&keyboard, b"hi\r").unwrap();
    let mut echoed = [0; "HI\r".len()];
    stdout.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"HI\r");

    rustix::io::write(&keyboard, b"\x1d").unwrap();
    let ended = wait(child).await.succeeded();
    assert!(
        ended.stderr.contains("leave with Ctrl-]") && ended.stderr.contains("console of web: left"),
        "{}",
        ended.stderr
    );
    assert!(!is_raw());
}

#[tokio::test]
async fn piped_input_reaches_the_guest_and_its_answer_is_awaited() {
    // Ctrl-] is the guest's when it comes through a pipe.
    let ended = session("echo\x1d hi\n").await.succeeded();
    assert_eq!(ended.stdout, "[id-web]ECHO\x1d HI\n");
    assert!(ended.stderr.contains("console of web: left"), "{}", ended.stderr);
}

#[tokio::test]
async fn the_worker_may_end_the_session() {
    let ended = session("bye\n").await.succeeded();
    assert_eq!(ended.stdout, "[id-web]");
    assert!(ended.stderr.contains("closed by the worker"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_vm_without_a_reachable_worker_has_no_console() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let controller = fake.serve(&authority, "controller.pageport").await;
    let at = controller.address.to_string();
    fake.script().vms = vec![vm("web")];
    let none = run(&authority, &at, &["vm", "console", "web"]).await;
    assert!(none.error().contains("no worker that could be reached"), "{}", none.stderr);

    let grpc_address = at.clone();
    fake.script().workers = vec![v1::Worker { name: "worker-a".into(), grpc_address, ..Default::default() }];
    let other = run(&authority, &at, &["vm", "console", "web"]).await;
    assert!(other.error().contains("its certificate carries another name"), "{}", other.stderr);
}
