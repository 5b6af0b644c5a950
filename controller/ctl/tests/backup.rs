//! Backups of the controllers, and the word on a worker after a restore.

#![allow(clippy::unwrap_used)]

mod support;

use pageport_common::backup::{open, seal};
use pageport_proto::v1;
use support::{Authority, Fake, run};

/// The file in parts of 10 bytes.
fn parts(file: &[u8]) -> Vec<v1::BackupResponse> {
    let part = |(number, chunk): (usize, &[u8])| v1::BackupResponse {
        chunk: chunk.to_vec().into(),
        total_bytes: file.len() as u64,
        offset: number as u64 * 10,
    };
    file.chunks(10).enumerate().map(part).collect()
}

#[tokio::test]
async fn a_backup_is_written_whole_also_when_the_stream_breaks_and_a_file_that_is_there_is_kept() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let file = seal(b"everything that was agreed on");
    let broken = parts(&file)[..2].to_vec();
    fake.script().backups = [broken, parts(&file)].into();
    let path = authority.path("backup");
    let to = path.to_str().unwrap().to_owned();
    let done = run(&authority, &at, &["cluster", "backup", &to]).await.succeeded();
    assert!(done.stdout.contains("holds all that the controllers have agreed on (53 B)"), "{}", done.stdout);
    assert_eq!(open(&std::fs::read(&path).unwrap()).unwrap(), b"everything that was agreed on");

    let there = run(&authority, &at, &["cluster", "backup", &to]).await;
    assert!(there.error().contains("is there already: name another file, or give --replace"), "{}", there.stderr);

    let mut damaged = file.clone();
    damaged[40] ^= 1;
    fake.script().backups = [parts(&damaged)].into();
    let refused = run(&authority, &at, &["cluster", "backup", "--replace", &to]).await;
    assert!(refused.error().contains("did not arrive as it was sent"), "{}", refused.stderr);
    assert_eq!(std::fs::read(&path).unwrap(), file, "the one before is still there");

    let newer = seal(b"more");
    fake.script().backups = [parts(&newer)].into();
    let done = run(&authority, &at, &["cluster", "backup", "--replace", &to, "--json"]).await.succeeded();
    assert_eq!(done.lines()[0]["size_bytes"], newer.len());
    assert_eq!(std::fs::read(&path).unwrap(), newer);
}

#[tokio::test]
async fn a_worker_is_declared_dead_only_by_its_name_once_more() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let at = server.address.to_string();
    let declare = ["worker", "declare-dead", "worker-a", "--reason", "burnt"];
    let unconfirmed = run(&authority, &at, &declare).await;
    assert!(unconfirmed.error().contains("--confirm NAME"), "{}", unconfirmed.stderr);
    let done = run(&authority, &at, &[&declare[..], &["--confirm", "worker-a"]].concat()).await.succeeded();
    assert_eq!(
        done.stdout,
        "worker-a is not waited for any more; 2 VMs are unknown until these workers have reported: worker-c\n"
    );
}

#[tokio::test]
async fn a_restore_asks_no_controller_and_says_why_it_cannot_be() {
    let authority = Authority::new();
    let (config, file) = (authority.path("controller.toml"), authority.path("backup"));
    let words = ["cluster", "restore", file.to_str().unwrap(), "--controller-config", config.to_str().unwrap()];
    let refused = run(&authority, "127.0.0.1:1", &words).await;
    let error = refused.error();
    assert!(error.contains("pageport-controller") || error.contains("nothing was restored"), "{}", refused.stderr);
    assert!(!error.contains("127.0.0.1"), "{}", refused.stderr);
}
