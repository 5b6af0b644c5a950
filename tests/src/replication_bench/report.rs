//! The figures: `target/bench/replication.json`, and the table at the end.
//!
//! A ratio is the opponent's figure divided by Pageport's: above 1 Pageport is the better. There is none when a replica was not equal.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::stages::{LOAD, Load, NEW_BYTES, RECORDS_PER_SECOND, REWRITTEN_BYTES, Stage};
use crate::demo::report::LinkFigures;

/// Of the opponents' bytes, what Pageport is to send at most, of a real file tree.
const BYTES_GOAL: f64 = 2.0;

/// What was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFigures {
    /// Its size.
    pub disk_bytes: u64,
    /// Of these, what is no hole.
    pub data_bytes: u64,
    /// Blocks of 4 KiB that were rewritten before the increment.
    pub rewritten_bytes: u64,
    /// New files that were written before the increment.
    pub new_bytes: u64,
}

/// One copy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Until the replica was complete.
    pub seconds: f64,
    /// Data of the disk, or changed data, in that time.
    pub mb_per_s: f64,
    /// What the link carried, both ways.
    pub link_bytes: u64,
    /// Of these, from the replica's site to the source's.
    pub link_bytes_back: u64,
    /// Processor time of all that took part.
    pub cpu_seconds: f64,
    /// The same for each GiB of data, or of changed data.
    pub cpu_seconds_per_gib: f64,
    /// Whether the replica was the disk then.
    pub replica_equal: bool,
}

impl Figures {
    /// The figures of a stage that brought over so many bytes of the disk.
    #[must_use]
    pub fn new(Stage { cost, equal }: Stage, data_bytes: u64) -> Self {
        let (seconds, cpu_seconds) = (cost.time.as_secs_f64(), cost.cpu.as_secs_f64());
        Self {
            seconds,
            mb_per_s: data_bytes as f64 / 1e6 / seconds,
            link_bytes: cost.to_replica + cost.to_source,
            link_bytes_back: cost.to_source,
            cpu_seconds,
            cpu_seconds_per_gib: cpu_seconds / (data_bytes as f64 / f64::from(1 << 30)),
            replica_equal: equal,
        }
    }
}

/// While the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadFigures {
    /// From the first write until the replica held the last.
    pub seconds: f64,
    /// What the link carried, both ways.
    pub link_bytes: u64,
    /// Processor time of all that took part, the guest included.
    pub cpu_seconds: f64,
    /// Synced writes of 4 KiB that the guest got through, each second.
    pub records_per_second: f64,
    /// From the last write until the replica held it.
    pub behind_seconds: f64,
    /// Whether the replica was the disk then.
    pub replica_equal: bool,
}

impl From<Load> for LoadFigures {
    fn from(Load { stage, records, behind }: Load) -> Self {
        Self {
            seconds: stage.cost.time.as_secs_f64(),
            link_bytes: stage.cost.to_replica + stage.cost.to_source,
            cpu_seconds: stage.cost.cpu.as_secs_f64(),
            records_per_second: records as f64 / LOAD.as_secs_f64(),
            behind_seconds: behind.as_secs_f64(),
            replica_equal: stage.equal,
        }
    }
}

/// Pageport beside its opponents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared<T> {
    /// Pageport's.
    pub pageport: T,
    /// Theirs, by name.
    #[serde(flatten)]
    pub opponents: BTreeMap<String, T>,
}

impl<T> Compared<T> {
    fn against<R>(&self, ratio: impl Fn(&T, &T) -> R) -> BTreeMap<String, R> {
        self.opponents.iter().map(|(name, theirs)| (name.clone(), ratio(theirs, &self.pageport))).collect()
    }
}

/// An opponent's figures divided by Pageport's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Time; none under load, where all take as long as the load does.
    pub time: Option<f64>,
    /// Bytes on the link.
    pub bytes: Option<f64>,
}

/// Every opponent's, by stage and name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    /// The whole disk.
    pub first_copy: BTreeMap<String, Ratio>,
    /// What has changed.
    pub increment: BTreeMap<String, Ratio>,
    /// While it changes.
    pub under_load: BTreeMap<String, Ratio>,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was copied.
    pub disk: DiskFigures,
    /// Over what.
    pub link: LinkFigures,
    /// The whole disk.
    pub first_copy: Compared<Figures>,
    /// What has changed.
    pub increment: Compared<Figures>,
    /// While it changes.
    pub under_load: Compared<LoadFigures>,
    /// The opponents' figures divided by Pageport's.
    pub ratios: Ratios,
}

impl Report {
    /// Works out the ratios.
    #[must_use]
    pub fn new(
        disk: DiskFigures,
        link: LinkFigures,
        first_copy: Compared<Figures>,
        increment: Compared<Figures>,
        under_load: Compared<LoadFigures>,
    ) -> Self {
        let copy = |theirs: &Figures, ours: &Figures| {
            let counts = theirs.replica_equal && ours.replica_equal;
            let bytes = theirs.link_bytes as f64 / ours.link_bytes as f64;
            Ratio { time: counts.then_some(theirs.seconds / ours.seconds), bytes: counts.then_some(bytes) }
        };
        let load = |theirs: &LoadFigures, ours: &LoadFigures| {
            let counts = theirs.replica_equal && ours.replica_equal;
            Ratio { time: None, bytes: counts.then_some(theirs.link_bytes as f64 / ours.link_bytes as f64) }
        };
        let ratios = Ratios {
            first_copy: first_copy.against(copy),
            increment: increment.against(copy),
            under_load: under_load.against(load),
        };
        Self { disk, link, first_copy, increment, under_load, ratios }
    }

    /// Whether every replica was the disk whenever it was compared.
    #[must_use]
    pub fn all_equal(&self) -> bool {
        let copies = [&self.first_copy, &self.increment];
        let copies = copies.into_iter().flat_map(|it| it.opponents.values().chain([&it.pageport]));
        let loads = self.under_load.opponents.values().chain([&self.under_load.pageport]);
        copies.map(|it| it.replica_equal).chain(loads.map(|it| it.replica_equal)).all(|equal| equal)
    }

    /// The table, ready to print.
    #[must_use]
    pub fn table(&self) -> String {
        let DiskFigures { disk_bytes, data_bytes, .. } = self.disk;
        let mut text = format!(
            "first copy of {} MB of files on a disk of {} MB, over {} Mbit/s and {} ms each way; the guest is idle\n",
            mega(data_bytes),
            mega(disk_bytes),
            self.link.rate_bps / 1_000_000,
            self.link.one_way_delay_ms,
        );
        text += &copies(&self.first_copy, &self.ratios.first_copy);
        text += &format!(
            "\nincrement: {} MiB rewritten in blocks of 4 KiB at random places, {} MiB of new files\n",
            REWRITTEN_BYTES >> 20,
            NEW_BYTES >> 20
        );
        text += &copies(&self.increment, &self.ratios.increment);
        text += &format!(
            "\nunder load: {} s of up to {RECORDS_PER_SECOND} synced writes of 4 KiB per second\n",
            LOAD.as_secs()
        );
        text += &loads(&self.under_load, &self.ratios.under_load);
        text += "\ntime, bytes: the opponent's divided by Pageport's. qemu-img convert copies a disk that nobody uses, whole each time.\n";
        text += &self.goals();
        text
    }

    fn goals(&self) -> String {
        let copies = || self.ratios.first_copy.iter().chain(&self.ratios.increment);
        let least = |figure: fn(&Ratio) -> Option<f64>| {
            // What does not count has missed it.
            let worst = copies().map(|(name, ratio)| (figure(ratio).unwrap_or(0.0), name));
            worst.min_by(|a, b| a.0.total_cmp(&b.0)).map_or((0.0, String::new()), |(ratio, name)| (ratio, name.clone()))
        };
        let line = |what: &str, goal: f64, (ratio, name): (f64, String)| {
            let word = if ratio >= goal { "met" } else { "MISSED" };
            format!("goal: {what}: {word} (least: {ratio:.2}x, {name})\n")
        };
        line("never slower", 1.0, least(|ratio| ratio.time))
            + &line("half the bytes or fewer", BYTES_GOAL, least(|ratio| ratio.bytes))
    }
}

fn mega(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"))
}

fn yes(equal: bool) -> &'static str {
    if equal { "yes" } else { "NO" }
}

/// One line for each way, Pageport's first.
fn rows<T>(
    compared: &Compared<T>,
    ratios: &BTreeMap<String, Ratio>,
    row: impl Fn(&str, &T, String, String) -> String,
) -> String {
    let mut text = row("Pageport", &compared.pageport, "1".into(), "1".into());
    for (name, figures) in &compared.opponents {
        let ratio = ratios.get(name).copied().unwrap_or(Ratio { time: None, bytes: None });
        text += &row(&name.replace('_', " "), figures, times(ratio.time), times(ratio.bytes));
    }
    text
}

fn copies(compared: &Compared<Figures>, ratios: &BTreeMap<String, Ratio>) -> String {
    let head = ["s", "MB/s", "link MB", "CPU s", "CPU s/GiB", "equal", "time", "bytes"];
    let [s, rate, link, cpu, per_gib, equal, time, bytes] = head;
    let head = format!("{:<18}{s:>8}{rate:>8}{link:>10}{cpu:>8}{per_gib:>11}{equal:>7}{time:>9}{bytes:>9}\n", "");
    head + &rows(compared, ratios, |name, figures, time, bytes| {
        let Figures { seconds, mb_per_s, link_bytes, cpu_seconds, cpu_seconds_per_gib, replica_equal, .. } = figures;
        format!(
            "{name:<18}{seconds:>8.1}{mb_per_s:>8.1}{:>10}{cpu_seconds:>8.1}{cpu_seconds_per_gib:>11.1}{:>7}{time:>9}{bytes:>9}\n",
            mega(*link_bytes),
            yes(*replica_equal),
        )
    })
}

fn loads(compared: &Compared<LoadFigures>, ratios: &BTreeMap<String, Ratio>) -> String {
    let head = ["behind s", "writes/s", "link MB", "CPU s", "equal", "bytes"];
    let [behind, writes, link, cpu, equal, bytes] = head;
    let head = format!("{:<18}{behind:>9}{writes:>9}{link:>10}{cpu:>8}{equal:>7}{bytes:>9}\n", "");
    head + &rows(compared, ratios, |name, figures, _, bytes| {
        let LoadFigures { link_bytes, cpu_seconds, records_per_second, behind_seconds, replica_equal, .. } = figures;
        format!(
            "{name:<18}{behind_seconds:>9.1}{records_per_second:>9.1}{:>10}{cpu_seconds:>8.1}{:>7}{bytes:>9}\n",
            mega(*link_bytes),
            yes(*replica_equal),
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::replication_bench::meter::Cost;
    use crate::wan::link::Shape;

    fn stage(seconds: u64, megabytes: u64, equal: bool) -> Stage {
        let (time, cpu) = (Duration::from_secs(seconds), Duration::from_secs(seconds / 2));
        Stage { cost: Cost { time, cpu, to_replica: megabytes * 900_000, to_source: megabytes * 100_000 }, equal }
    }

    fn compared<T>(pageport: T, mirror: T) -> Compared<T> {
        Compared { pageport, opponents: [("qemu_mirror".to_owned(), mirror)].into() }
    }

    fn report(mirror_equal: bool) -> Report {
        let figures = |seconds, megabytes, equal| Figures::new(stage(seconds, megabytes, equal), 1 << 30);
        let load = |megabytes| {
            let (stage, behind) = (stage(21, megabytes, true), Duration::from_millis(1500));
            LoadFigures::from(Load { stage, records: 400, behind })
        };
        Report::new(
            DiskFigures { disk_bytes: 2 << 30, data_bytes: 1 << 30, rewritten_bytes: 64 << 20, new_bytes: 64 << 20 },
            Shape { rate_bps: 200_000_000, one_way_delay_ms: 25, loss: 0.0, queue_bytes: None }.into(),
            compared(figures(20, 300, true), figures(40, 1100, true)),
            compared(figures(6, 50, true), figures(3, 130, mirror_equal)),
            compared(load(4), load(40)),
        )
    }

    #[test]
    fn ratios_are_theirs_by_ours_and_the_table_judges_the_worst() {
        let report = report(true);
        assert_eq!(report.ratios.first_copy["qemu_mirror"].time, Some(2.0));
        assert_eq!(report.ratios.increment["qemu_mirror"], Ratio { time: Some(0.5), bytes: Some(2.6) });
        assert_eq!(report.ratios.under_load["qemu_mirror"], Ratio { time: None, bytes: Some(10.0) });
        assert!((report.first_copy.pageport.cpu_seconds_per_gib - 10.0).abs() < 1e-9);
        let table = report.table();
        assert!(table.contains("never slower: MISSED (least: 0.50x, qemu_mirror)"), "{table}");
        assert!(table.contains("half the bytes or fewer: met (least: 2.60x, qemu_mirror)"), "{table}");
        assert!(report.all_equal());
    }

    #[test]
    fn a_replica_that_differs_has_no_ratio_and_meets_no_goal() {
        let report = report(false);
        assert_eq!(report.ratios.increment["qemu_mirror"], Ratio { time: None, bytes: None });
        assert!(report.table().contains("half the bytes or fewer: MISSED (least: 0.00x"), "{}", report.table());
        assert!(!report.all_equal());
    }

    #[test]
    fn opponents_stand_beside_pageport_in_the_file() {
        let value = serde_json::to_value(report(true)).unwrap();
        assert!(value["first_copy"]["pageport"]["seconds"].is_number());
        assert!(value["first_copy"]["qemu_mirror"]["link_bytes"].is_number());
        assert!(value["ratios"]["under_load"]["qemu_mirror"]["time"].is_null());
        assert_eq!(serde_json::from_value::<Report>(value).unwrap(), report(true));
    }
}
