//! Standing replication under faults: a few cases of those that `make faults-replication` runs, on real processes.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use pageport_lab::faults::Passed;
use pageport_lab::netns;
use pageport_lab::replication_faults::{self, ReplicationFaultsConfig};

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_at_its_newest_point_whatever_ends_and_replication_goes_on_by_itself() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cases = replication_faults::short_set();
    let count = cases.len();
    let config = ReplicationFaultsConfig { cases, passed: Passed::Again, folder: folder.path().to_owned() };
    let outcome = replication_faults::run(&config, |news| eprintln!("{news:?}")).await.unwrap();
    assert!(outcome.failed.is_empty(), "{:#?}", outcome.failed);
    let sum = outcome.sum;
    assert_eq!((sum.cases, sum.passed), (count, count));
    assert_eq!((sum.fsck_failures, sum.content_mismatches, sum.guest_io_errors, sum.stuck), (0, 0, 0, 0));
}
