//! The console with piped input: bytes there and back, and every way it ends.

#![allow(clippy::unwrap_used)]

mod support;

use std::process::Stdio;
use std::time::Duration;

use pageport_proto::v1;
use support::{Authority, Ended, Fake, ended, pageportctl, run, vm};
use tokio::io::AsyncWriteExt;

async fn session(input: &str) -> Ended {
    let (authority, fake) = (Authority::new(), Fake::default());
    let controller = fake.serve(&authority, "controller.pageport").await;
    let worker = fake.serve(&authority, "worker-a.worker.pageport").await;
    let grpc_address = worker.address.to_string();
    fake.script().vms = vec![vm("web")];
    fake.script().workers = vec![v1::Worker { name: "worker-a".into(), grpc_address, ..Default::default() }];
    let arguments = ["vm", "console", "web", "--linger", "1"];
    let mut child =
        pageportctl(&authority, &controller.address.to_string(), &arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    ended(tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap())
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
