//! Preflights: what an order would be refused for, and what workers find; two VMs with one MAC address are kept apart.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use pageport_proto::v1::{self, Check, Finding, MigrationState, Severity};
use support::lab::{Lab, order};
use support::{define, request_id};
use tonic::{Code, Status};

impl Lab {
    /// A VM that runs, with a network card.
    async fn vm(&self, name: &str, site: &str) {
        let mut order = define(name, site);
        order.spec.as_mut().unwrap().nics = vec![v1::NicSpec { mac: "52:54:00:12:34:56".into(), bridge: "br0".into() }];
        self.run(order).await;
    }

    async fn preflight(&self, name: &str, site: &str) -> Result<Vec<Finding>, Status> {
        let request = v1::PreflightMigrationRequest { vm: name.into(), to_site: site.into() };
        Ok(self.cluster.quote(self.node).preflight_migration(request).await?.into_inner().findings)
    }
}

fn seen(findings: &[Finding]) -> Vec<(Check, Severity)> {
    findings.iter().map(|finding| (finding.check(), finding.severity())).collect()
}

fn of(findings: &[Finding], check: Check) -> &Finding {
    findings.iter().find(|finding| finding.check() == check).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preflight_has_what_an_order_would_be_told_and_what_the_workers_find() {
    let lab = Lab::start().await;
    lab.board.lock().unwrap().findings = vec![Finding::warns(Check::Clocks, "x".repeat(5000), "run NTP")];
    lab.vm("web", "a").await;

    // Without a replica there is nobody to ask at the other site.
    let found = lab.preflight("web", "b").await.unwrap();
    let expected =
        [(Check::Replica, Severity::Blocks), (Check::Addresses, Severity::Ok), (Check::Workers, Severity::Warning)];
    assert_eq!(seen(&found), expected, "{found:?}");
    assert_eq!(of(&found, Check::Replica).seen, "no replica of vm \"web\" at site \"b\"");
    assert!(of(&found, Check::Replica).fix.starts_with("run \"pageportctl replica seed web --to b\""), "{found:?}");
    assert!(lab.board.lock().unwrap().preflights.is_empty());

    lab.seed("web", "b").await;
    let found = lab.preflight("web", "b").await.unwrap();
    let expected = [
        (Check::Vm, Severity::Ok),
        (Check::Replica, Severity::Ok),
        (Check::Placement, Severity::Ok),
        (Check::Addresses, Severity::Ok),
        (Check::Clocks, Severity::Warning),
    ];
    assert_eq!(seen(&found), expected, "{found:?}");
    assert_eq!(of(&found, Check::Clocks).seen.len(), 1000, "words of a worker are cut");
    assert_eq!(lab.board.lock().unwrap().preflights[0].peer_worker, "worker-b");

    assert!(lab.preflight("web", "a").await.unwrap_err().message().contains("already runs at site"));
    assert_eq!(lab.preflight("nobody", "b").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(lab.preflight("web", "atlantis").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_does_not_move_to_where_another_has_its_mac_address() {
    let lab = Lab::start().await;
    lab.vm("web", "a").await;
    lab.vm("twin", "b").await;
    lab.seed("web", "b").await;
    let found = lab.preflight("web", "b").await.unwrap();
    let finding = of(&found, Check::Addresses);
    assert_eq!(finding.severity(), Severity::Blocks, "{found:?}");
    assert!(
        finding.seen.starts_with("vm \"twin\" at site \"b\" has the same MAC address")
            && finding.fix.contains("stop it"),
        "{found:?}"
    );
    let refused = lab.migrate(order("web", "b")).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::FailedPrecondition, format!("{}: {}", finding.seen, finding.fix).as_str())
    );
    let listed = lab.cluster.migration(lab.node).list_migrations(v1::ListMigrationsRequest::default()).await.unwrap();
    assert!(listed.into_inner().migrations.is_empty(), "nothing was ordered");

    // One that is down disturbs nobody yet.
    let stop = v1::StopVmRequest { request_id: request_id(), vm: "twin".into(), force: true };
    lab.cluster.fleet(lab.node).stop_vm(stop).await.unwrap();
    let found = lab.preflight("web", "b").await.unwrap();
    assert_eq!(of(&found, Check::Addresses).severity(), Severity::Warning, "{found:?}");
    let migration = lab.migrate(order("web", "b")).await.unwrap();
    lab.migration_until(&migration.id, |migration| migration.state() == MigrationState::Completed).await;
}
