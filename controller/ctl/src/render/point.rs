//! Recovery points, and those that are open for reading. Pure: messages and the present time in, text out.

use pageport_proto::v1::{ListRecoveryPointsResponse, PointExport, PointExportState};

use super::table::Align::{Left, Right};
use super::table::Table;
use super::units;
use super::words::{or_dash, point_export_state, yes_no};

/// `recovery-point list`
pub fn points(response: &ListRecoveryPointsResponse, now_unix_ms: i64) -> String {
    let mut table =
        Table::new([("POINT", Right), ("TAKEN", Left), ("CHANGED", Right), ("QUIESCED", Left), ("DISKS", Right)]);
    for point in &response.points {
        table.row([
            point.number.to_string(),
            units::ago(point.taken_unix_ms, now_unix_ms),
            units::bytes(point.changed_bytes),
            yes_no(point.quiesced).to_owned(),
            if point.disks == 0 { "-".to_owned() } else { point.disks.to_string() },
        ]);
    }
    let points =
        table.render("no recovery points yet: `pageportctl replication status` shows how far the first copy is");
    if response.exports.is_empty() { points } else { format!("{points}\n{}", exports(&response.exports, now_unix_ms)) }
}

/// What is open for reading, and what ended lately.
fn exports(exports: &[PointExport], now_unix_ms: i64) -> String {
    let mut table = Table::new([
        ("EXPORT", Right),
        ("TAKEN", Left),
        ("STATE", Left),
        ("ENDS", Left),
        ("KEEPS", Right),
        ("REASON", Left),
        ("DISKS", Left),
    ]);
    for export in exports {
        let urls: Vec<_> = export.disks.iter().flat_map(|disk| &disk.urls).map(String::as_str).collect();
        let ends = match export.state() {
            PointExportState::Ended => units::ago(export.ends_unix_ms, now_unix_ms),
            PointExportState::Open | PointExportState::Unspecified => within(export, now_unix_ms),
        };
        table.row([
            export.number.to_string(),
            units::ago(export.taken_unix_ms, now_unix_ms),
            point_export_state(export.state).to_owned(),
            ends,
            units::bytes(export.held_bytes),
            or_dash(&export.reason).to_owned(),
            or_dash(&urls.join(" ")).to_owned(),
        ]);
    }
    table.render("")
}

fn within(export: &PointExport, now_unix_ms: i64) -> String {
    let left_ms = u64::try_from(export.ends_unix_ms.saturating_sub(now_unix_ms)).unwrap_or_default();
    format!("in {}", units::duration(left_ms))
}

/// `recovery-point open`
pub fn opened(export: &PointExport, worker: &str, now_unix_ms: i64) -> String {
    let taken = units::ago(export.taken_unix_ms, now_unix_ms);
    let head = format!(
        "recovery point {}, taken {taken}, is open for reading on the host of {worker}; it ends {}",
        export.number,
        within(export, now_unix_ms)
    );
    let disks = export.disks.iter().flat_map(|disk| {
        disk.urls.iter().map(|url| format!("  {}  {}  {url}", disk.name, units::bytes(disk.size_bytes)))
    });
    std::iter::once(head).chain(disks).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::{ExportedDisk, RecoveryPoint};

    use super::*;

    fn response(exports: Vec<PointExport>) -> ListRecoveryPointsResponse {
        let point =
            RecoveryPoint { number: 41, taken_unix_ms: 1_000, changed_bytes: 5 << 20, quiesced: true, disks: 2 };
        ListRecoveryPointsResponse { points: vec![point], exports }
    }

    fn open() -> PointExport {
        let urls = vec!["nbd+unix:///web/root?socket=/s".to_owned(), "nbd://127.0.0.1:10809/web/root".to_owned()];
        PointExport {
            number: 7,
            taken_unix_ms: 1_000,
            state: PointExportState::Open.into(),
            ends_unix_ms: 73_300,
            held_bytes: 3 << 20,
            disks: vec![ExportedDisk { name: "root".into(), size_bytes: 1 << 30, urls }],
            ..PointExport::default()
        }
    }

    #[test]
    fn points_look_like_this() {
        assert_eq!(
            points(&response(vec![]), 13_300),
            "POINT  TAKEN        CHANGED  QUIESCED  DISKS\n   41  12.3 s ago  5.00 MiB  yes           2\n"
        );
        assert!(points(&ListRecoveryPointsResponse::default(), 0).contains("replication status"));
    }

    #[test]
    fn what_is_open_and_why_another_ended_stands_below_the_points() {
        let ended = PointExport {
            number: 5,
            state: PointExportState::Ended.into(),
            ends_unix_ms: 10_300,
            reason: "its time was over".into(),
            ..PointExport::default()
        };
        let shown = points(&response(vec![open(), ended]), 13_300);
        let rows: Vec<&str> = shown.lines().skip(3).collect();
        assert_eq!(
            rows,
            [
                "EXPORT  TAKEN       STATE  ENDS             KEEPS  REASON             DISKS",
                "     7  12.3 s ago  open   in 1 min 0 s  3.00 MiB  -                  \
                 nbd+unix:///web/root?socket=/s nbd://127.0.0.1:10809/web/root",
                "     5  -           ended  3.00 s ago         0 B  its time was over  -",
            ]
        );
    }

    #[test]
    fn an_open_point_says_where_it_is_read_and_until_when() {
        assert_eq!(
            opened(&open(), "worker-b", 13_300),
            "recovery point 7, taken 12.3 s ago, is open for reading on the host of worker-b; it ends in 1 min 0 s\n  \
             root  1.00 GiB  nbd+unix:///web/root?socket=/s\n  root  1.00 GiB  nbd://127.0.0.1:10809/web/root"
        );
    }
}
