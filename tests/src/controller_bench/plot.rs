//! [`plot`]: how the figures grow with the fleet, as small multiples in SVG that can be read on a light and on a dark page.
//!
//! The fleet's size is on a logarithmic axis; every other axis begins at zero.

use std::fmt::Write as _;

use super::report::{FleetFigures, Report};

const PANEL_WIDTH: f64 = 300.0;
const PANEL_HEIGHT: f64 = 230.0;
const COLUMNS: usize = 3;
const GAP: f64 = 16.0;
/// Room of a panel around its axes: left, top, right, bottom.
const INSET: [f64; 4] = [50.0, 72.0, 18.0, 40.0];
/// Lines across a panel.
const STEPS: usize = 4;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#4b5563}.title{font-weight:600;fill:#1f2937}.panel{fill:#9ca3af;fill-opacity:.08}\
.grid{stroke:#9ca3af;stroke-opacity:.35}.goal{stroke:#9ca3af;stroke-dasharray:4 4}.line{fill:none;stroke-width:2}\
.s0{stroke:#2563eb;fill:#2563eb}.s1{stroke:#d97706;fill:#d97706}.line.s0,.line.s1{fill:none}text.s0,text.s1{stroke:none}\
@media(prefers-color-scheme:dark){text{fill:#9ca3af}.title{fill:#e5e7eb}.s0{stroke:#60a5fa;fill:#60a5fa}.s1{stroke:#fbbf24;fill:#fbbf24}}";

type Figure = fn(&FleetFigures) -> f64;

struct Panel {
    title: &'static str,
    unit: &'static str,
    series: &'static [(&'static str, Figure)],
    goal: Option<f64>,
}

const PANELS: [Panel; 6] = [
    Panel {
        title: "Latency of a command",
        unit: "round trips between sites",
        series: &[("50th percentile", |it| it.commit_p50_rtts), ("99th", |it| it.commit_p99_rtts)],
        goal: Some(1.5),
    },
    Panel {
        title: "Another controller leads after",
        unit: "seconds",
        series: &[("median", |it| it.failover_s), ("longest", |it| it.failover_worst_s)],
        goal: Some(2.0),
    },
    Panel {
        title: "Commands, many clients",
        unit: "per second",
        series: &[("small changes", |it| it.commands_per_s), ("VMs defined", |it| it.defines_per_s)],
        goal: None,
    },
    Panel {
        title: "Leader, heartbeats alone",
        unit: "% of a processor",
        series: &[("processor time", |it| it.leader_cpu_percent)],
        goal: None,
    },
    Panel {
        title: "Leader's memory",
        unit: "MB",
        series: &[
            ("resident", |it| it.leader_memory_bytes as f64 / 1e6),
            ("snapshot", |it| it.snapshot_bytes as f64 / 1e6),
        ],
        goal: None,
    },
    Panel {
        title: "Evacuating a fifth of the VMs",
        unit: "seconds",
        series: &[("planned", |it| it.plan_s), ("all moves ordered", |it| it.drain_queued_s)],
        goal: Some(1.0),
    },
];

/// The picture.
#[must_use]
pub fn plot(report: &Report) -> String {
    let rows = PANELS.len().div_ceil(COLUMNS);
    let width = COLUMNS as f64 * (PANEL_WIDTH + GAP) - GAP;
    let height = rows as f64 * (PANEL_HEIGHT + GAP) - GAP;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\">\n\
         <title>Three controllers as the fleet grows</title>\n<style>{STYLE}</style>\n"
    );
    for (n, panel) in PANELS.iter().enumerate() {
        let (x, y) = ((n % COLUMNS) as f64 * (PANEL_WIDTH + GAP), (n / COLUMNS) as f64 * (PANEL_HEIGHT + GAP));
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">\n{}</g>", panel.draw(&report.fleets));
    }
    svg + "</svg>\n"
}

impl Panel {
    fn draw(&self, fleets: &[FleetFigures]) -> String {
        let [left, top, right, bottom] = INSET;
        let values = self.series.iter().flat_map(|(_, figure)| fleets.iter().map(figure)).chain(self.goal);
        let step = round_step(values.fold(0.0, f64::max) / STEPS as f64);
        let full = step * STEPS as f64;
        let y = |value: f64| PANEL_HEIGHT - bottom - (PANEL_HEIGHT - top - bottom) * value / full;
        let x = Scale::of(fleets, left + 14.0, PANEL_WIDTH - right - 14.0);

        let mut out = format!(
            "<rect class=\"panel\" width=\"{PANEL_WIDTH}\" height=\"{PANEL_HEIGHT}\" rx=\"8\"/>\n\
             <text class=\"title\" x=\"12\" y=\"20\">{}</text>\n",
            self.title
        );
        let mut legend = 12.0;
        for (n, (name, _)) in self.series.iter().enumerate() {
            let _ = writeln!(out, "<text class=\"s{n}\" x=\"{legend:.0}\" y=\"38\">{name}</text>");
            // About as wide as the letters are.
            legend += 7.0 * name.len() as f64 + 12.0;
        }
        let _ = writeln!(out, "<text x=\"12\" y=\"58\">{}</text>", self.unit);
        for line in 0..=STEPS {
            let value = step * line as f64;
            let at = y(value);
            let _ = writeln!(
                out,
                "<path class=\"grid\" d=\"M{left} {at:.1}H{}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                PANEL_WIDTH - right,
                left - 6.0,
                at + 4.0,
                number(value)
            );
        }
        if let Some(goal) = self.goal {
            let _ = writeln!(out, "<path class=\"goal\" d=\"M{left} {:.1}H{}\"/>", y(goal), PANEL_WIDTH - right);
        }
        for fleet in fleets {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                x.at(fleet),
                PANEL_HEIGHT - bottom + 18.0,
                number(fleet.workers as f64)
            );
        }
        let middle = f64::midpoint(left, PANEL_WIDTH - right);
        let _ =
            writeln!(out, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">workers</text>", PANEL_HEIGHT - 7.0);
        for (n, (_, figure)) in self.series.iter().enumerate() {
            let points: Vec<_> = fleets.iter().map(|fleet| (x.at(fleet), y(figure(fleet)))).collect();
            let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(out, "<polyline class=\"line s{n}\" points=\"{}\"/>", path.join(" "));
            for (x, y) in points {
                let _ = writeln!(out, "<circle class=\"s{n}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
            }
        }
        out
    }
}

/// Workers on a logarithmic axis.
struct Scale {
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn of(fleets: &[FleetFigures], from: f64, to: f64) -> Self {
        let sizes = || fleets.iter().map(|fleet| (fleet.workers.max(1) as f64).ln());
        Self { least: sizes().fold(f64::INFINITY, f64::min), most: sizes().fold(0.0, f64::max), from, to }
    }

    fn at(&self, fleet: &FleetFigures) -> f64 {
        let range = self.most - self.least;
        let part = if range > 0.0 { ((fleet.workers.max(1) as f64).ln() - self.least) / range } else { 0.5 };
        self.from + (self.to - self.from) * part
    }
}

/// The next 1, 2, 2.5 or 5 times a power of ten.
fn round_step(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let factors = [1.0, 2.0, 2.5, 5.0, 10.0];
    power * factors.into_iter().find(|factor| value <= factor * power * (1.0 + 1e-9)).unwrap_or(10.0)
}

/// As few digits as tell the steps of an axis apart, and thousands set off.
fn number(value: f64) -> String {
    if value >= 1000.0 {
        let whole = value.round() as u64;
        return format!("{},{:03}", whole / 1000, whole % 1000);
    }
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() { "0".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_a_point_of_every_series() {
        let fleet = |workers| FleetFigures { workers, commit_p50_rtts: 1.2, ..FleetFigures::default() };
        let svg = plot(&Report::new("now".into(), vec![fleet(100), fleet(300), fleet(1000)], 0.1));
        let series: usize = PANELS.iter().map(|panel| panel.series.len()).sum();
        assert_eq!(svg.matches("<polyline").count(), series);
        assert_eq!(svg.matches("<circle").count(), series * 3);
        assert_eq!(svg.matches(">1,000</text>").count(), PANELS.len());
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn axes_end_at_round_numbers() {
        for (value, step) in [(0.0, 1.0), (0.3, 0.5), (0.021, 0.025), (1.0, 1.0), (120.0, 200.0), (999.0, 1000.0)] {
            assert!((round_step(value) - step).abs() < 1e-9, "{value}: {}", round_step(value));
        }
        assert_eq!([0.0, 0.5, 1.0, 1000.0, 2500.0].map(number), ["0", "0.5", "1", "1,000", "2,500"]);
    }
}
