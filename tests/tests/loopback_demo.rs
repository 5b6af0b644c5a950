//! Without namespaces the demo tells the same story on the loopback. Needs the built daemons, but no rights.
#![allow(clippy::unwrap_used)]

use pageport_lab::baseline::vm::FreePageHints;
use pageport_lab::demo::{self, DemoConfig, End};
use pageport_lab::lab::network::Mode;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_crosses_the_relay_and_what_was_not_checked_is_null() {
    let folder = tempfile::tempdir().unwrap();
    let figures = folder.path().join("demo.json");
    let config = DemoConfig {
        end: End::AtOnce,
        figures: figures.clone(),
        ..DemoConfig::from_environment(true, FreePageHints::Off, Mode::Loopback)
    };
    let rate_bps = config.link.rate_bps;
    demo::run(config).await.unwrap();

    let report: Value = serde_json::from_slice(&std::fs::read(figures).unwrap()).unwrap();
    let (pageport, checks) = (&report["pageport"], &report["guest_checks"]);
    assert_eq!(pageport["stream_digest_match"], true, "{report:#}");
    for check in ["files_checksum_equal", "memory_checksum_equal", "uptime_continued"] {
        assert_eq!(checks[check], true, "{check}: {report:#}");
    }
    assert_eq!(checks["tcp_session_survived"], Value::Null, "{report:#}");
    let figure = |of: &Value, key: &str| of[key].as_u64().unwrap_or_else(|| panic!("{key}: {report:#}"));
    let (ours, precopy) = (figure(pageport, "wan_bytes"), figure(&report["qemu_precopy"], "wan_bytes"));
    assert!(figure(&pageport["pages"], "teleported") > 10_000, "{report:#}");
    assert!(ours > 0 && ours * 2 < precopy, "{report:#}");
    assert!(figure(&report["qemu_multifd_zstd"], "wan_bytes") < precopy, "{report:#}");
    // Neither was faster than the relay lets them be.
    assert!(figure(pageport, "memory_time_ms") >= ours * 8000 / rate_bps, "{report:#}");
    assert!(figure(&report["qemu_precopy"], "total_time_ms") >= precopy * 8000 / rate_bps, "{report:#}");
}
