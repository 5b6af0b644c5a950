//! Reaching the controllers: one that is down is passed over, and whatever is wrong is said with its fix.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;

use support::{Authority, Fake, finish, pageportctl, run, write};
use tonic::Status;

/// An address where nobody listens.
async fn nobody() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_controller_that_is_down_is_passed_over() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let controllers = format!("{},{}", nobody().await, server.address);
    run(&authority, &controllers, &["site", "list"]).await.succeeded();
}

#[tokio::test]
async fn when_nobody_answers_each_address_is_named_with_its_reason() {
    let authority = Authority::new();
    let (one, two) = (nobody().await, nobody().await);
    let ended = run(&authority, &format!("{one},{two}"), &["site", "list"]).await;
    assert_eq!(
        ended.error(),
        format!(
            "error: no controller answered: {one}: connection refused; {two}: connection refused \
             (check --controllers, and that pageport-controller runs there)"
        )
    );
}

#[tokio::test]
async fn a_cluster_without_a_leader_is_asked_again_and_then_reported() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().failures = (0..100).map(|_| Status::unavailable("there is no leader")).collect();
    let server = fake.serve(&authority, "controller.pageport").await;
    let ended = run(&authority, &server.address.to_string(), &["site", "list"]).await;
    assert!(ended.error().contains("there is no leader"), "{}", ended.stderr);
    assert!(fake.script().failures.len() < 97, "it did not ask again");
}

#[tokio::test]
async fn a_server_that_does_not_know_a_command_is_told_apart() {
    let (authority, fake) = (Authority::new(), Fake::default());
    fake.script().failures = [Status::unimplemented("")].into();
    let server = fake.serve(&authority, "controller.pageport").await;
    let ended = run(&authority, &server.address.to_string(), &["site", "list"]).await;
    assert!(ended.error().contains("waits for a backup"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_server_of_another_authority_is_not_trusted() {
    let (ours, theirs, fake) = (Authority::new(), Authority::new(), Fake::default());
    let server = fake.serve(&theirs, "controller.pageport").await;
    let ended = run(&ours, &server.address.to_string(), &["site", "list"]).await;
    assert!(ended.error().contains("its certificate is not from our authority (check --ca)"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_server_with_another_name_is_no_controller() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "worker-a.worker.pageport").await;
    let ended = run(&authority, &server.address.to_string(), &["site", "list"]).await;
    assert!(ended.error().contains("its certificate carries another name"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_certificate_that_the_server_refuses_is_named_as_the_cause() {
    let (theirs, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&theirs, "controller.pageport").await;
    let (cert, key) = Authority::new().issue("operator.pageport");
    let mut command = pageportctl(&theirs, &server.address.to_string(), &["site", "list"]);
    command.env("PAGEPORT_CERT", write(&theirs.path(""), "foreign.pem", &cert));
    command.env("PAGEPORT_KEY", write(&theirs.path(""), "foreign.key", &key));
    let ended = finish(command).await;
    assert!(ended.error().contains("take our certificate"), "{}", ended.stderr);
}

#[tokio::test]
async fn missing_files_and_settings_are_named() {
    let authority = Authority::new();
    let mut command = pageportctl(&authority, "127.0.0.1:1", &["site", "list"]);
    command.env("PAGEPORT_CA", "/nowhere/ca.pem");
    let ended = finish(command).await;
    assert!(ended.error().contains("/nowhere/ca.pem") && ended.stderr.contains("No such file"), "{}", ended.stderr);

    let mut command = pageportctl(&authority, "", &["site", "list"]);
    command.env_remove("PAGEPORT_CONTROLLERS");
    let ended = finish(command).await;
    assert!(ended.error().starts_with("error: controllers is not set: use --controllers"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_config_file_is_enough() {
    let (authority, fake) = (Authority::new(), Fake::default());
    let server = fake.serve(&authority, "controller.pageport").await;
    let text = format!(
        "controllers = [\"{}\"]\nca = \"ca.pem\"\ncert = \"operator.pem\"\nkey = \"operator.key\"\n",
        server.address
    );
    let file = write(&authority.path(""), "ctl.toml", &text);
    let mut command = pageportctl(&authority, "", &["site", "list", "--config", file.to_str().unwrap()]);
    for variable in ["PAGEPORT_CONTROLLERS", "PAGEPORT_CA", "PAGEPORT_CERT", "PAGEPORT_KEY"] {
        command.env_remove(variable);
    }
    finish(command).await.succeeded();
}
