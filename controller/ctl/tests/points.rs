//! Recovery points that are opened for reading: asked of the worker that holds the replica, and listed by the controllers.

#![allow(clippy::unwrap_used)]

mod support;

use pageport_proto::v1;
use support::{Authority, Fake, Running, run, vm};

/// A VM at a with a replica at b, whose worker is the same fake.
struct House {
    authority: Authority,
    fake: Fake,
    controller: Running,
    _worker: Running,
}

async fn house() -> House {
    let (authority, fake) = (Authority::new(), Fake::default());
    let controller = fake.serve(&authority, "controller.pageport").await;
    let worker = fake.serve(&authority, "worker-b.worker.pageport").await;
    let replica = v1::Replica { site: "b".into(), worker: "worker-b".into(), ..Default::default() };
    fake.script().vms = vec![v1::Vm { replicas: vec![replica], ..vm("web") }];
    let grpc_address = worker.address.to_string();
    fake.script().workers = vec![v1::Worker { name: "worker-b".into(), grpc_address, ..Default::default() }];
    House { authority, fake, controller, _worker: worker }
}

impl House {
    async fn run(&self, arguments: &[&str]) -> support::Ended {
        let arguments = [&["recovery-point"], arguments].concat();
        run(&self.authority, &self.controller.address.to_string(), &arguments).await
    }
}

#[tokio::test]
async fn a_point_is_opened_and_closed_at_the_worker_of_its_replica() {
    let house = house().await;
    let opened = house.run(&["open", "web", "41", "--for", "2h", "--listen", "127.0.0.1:10809"]).await.succeeded();
    assert!(opened.stdout.starts_with("recovery point 41, taken "), "{}", opened.stdout);
    assert!(opened.stdout.contains("on the host of worker-b"), "{}", opened.stdout);
    let asked = house.fake.script().opened[0].clone();
    assert_eq!(
        asked,
        v1::OpenPointRequest {
            vm_id: "id-web".into(),
            vm_name: "web".into(),
            number: 41,
            duration_ms: 7_200_000,
            listen: "127.0.0.1:10809".into(),
        }
    );
    let json = house.run(&["open", "web", "41", "--site", "b", "--json"]).await.succeeded().lines();
    assert_eq!(json[0]["number"], 41);
    let closed = house.run(&["close", "web", "41"]).await.succeeded();
    assert_eq!(closed.stdout, "recovery point 41 of web is closed\n");
    assert_eq!(house.fake.script().closed[0].number, 41);
}

#[tokio::test]
async fn what_a_worker_refuses_is_shown_in_its_words_and_a_wrong_site_before_anyone_is_asked() {
    let house = house().await;
    house.fake.script().failures = [tonic::Status::not_found("there is no recovery point 41")].into();
    let refused = house.run(&["open", "web", "41"]).await;
    assert_eq!(refused.error(), "error: worker-b: there is no recovery point 41");
    let elsewhere = house.run(&["open", "web", "41", "--site", "c"]).await;
    assert!(elsewhere.error().contains("site c holds no replica"), "{}", elsewhere.stderr);
    house.fake.script().workers.clear();
    let unknown = house.run(&["close", "web", "41"]).await;
    assert!(unknown.error().contains("has not connected yet"), "{}", unknown.stderr);
    assert!(house.fake.script().opened.is_empty());
}

#[tokio::test]
async fn the_list_shows_points_and_what_is_open_without_a_site_where_one_can_be_meant() {
    let house = house().await;
    house.fake.script().points = vec![v1::RecoveryPoint { number: 3, ..Default::default() }];
    let plain = house.run(&["list", "web"]).await.succeeded();
    assert_eq!(plain.stdout.lines().count(), 2, "{}", plain.stdout);
    let reason = "the vm was given to this site".to_owned();
    let export = v1::PointExport { number: 2, state: 2, reason, ..Default::default() };
    house.fake.script().exports = vec![export];
    let shown = house.run(&["list", "web", "--site", "b"]).await.succeeded();
    assert!(shown.stdout.contains("ended") && shown.stdout.contains("given to this site"), "{}", shown.stdout);
    let json = house.run(&["list", "web", "--json"]).await.succeeded().lines();
    assert_eq!((&json[0]["points"][0]["number"], &json[0]["exports"][0]["state"]), (&3.into(), &"ended".into()));
}
