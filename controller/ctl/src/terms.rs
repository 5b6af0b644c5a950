//! What the command line says to the scheduler: terms of a migration, limits, and what is to be emptied.

use clap::{Args, Subcommand, ValueEnum};
use pageport_proto::v1::{self, spot::Place};

use crate::quantity::{Cap, Span};

/// On which terms a VM is moved.
#[derive(Debug, Clone, Args)]
pub struct TermsArgs {
    /// 0 to 100; more is sooner. A migration that waits gains one point a minute.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub priority: Option<u32>,
    /// Give it up if it has not begun by then (like 2h); near the end it gains 50 points of priority.
    #[arg(long, value_name = "DURATION")]
    pub deadline: Option<Span>,
    /// Begin only in this time of the day, in UTC; it may run over midnight.
    #[arg(long, value_name = "HH:MM-HH:MM")]
    pub window: Option<String>,
    /// Begin only when these migrations have completed; given up if one of them does not.
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub after: Vec<String>,
    /// What it may send at most, like 50mbit; left out: its part of the link's budget.
    #[arg(long, value_name = "RATE", default_value = "none")]
    pub rate: Cap,
    /// If it does not converge.
    #[command(flatten)]
    pub convergence: ConvergenceArgs,
}

/// What becomes of a migration whose guest dirties memory faster than the link carries it.
#[derive(Debug, Clone, Default, Args)]
pub struct ConvergenceArgs {
    /// If the guest dirties memory faster than the link carries it; wait, unless it is ordered otherwise.
    #[arg(long, value_name = "POLICY")]
    pub convergence: Option<Policy>,
    /// How long the guest may stand still in all, like 2s (500ms to 20s); with longer-pause.
    #[arg(long, value_name = "DURATION", requires = "convergence", required_if_eq("convergence", "longer-pause"))]
    pub longest_pause: Option<Span>,
}

impl ConvergenceArgs {
    /// As an order, with the longest pause in milliseconds.
    pub fn order(&self) -> (v1::ConvergencePolicy, u64) {
        let policy = self.convergence.map_or(v1::ConvergencePolicy::Unspecified, |policy| match policy {
            Policy::Wait => v1::ConvergencePolicy::Wait,
            Policy::Throttle => v1::ConvergencePolicy::Throttle,
            Policy::LongerPause => v1::ConvergencePolicy::LongerPause,
            Policy::GiveUp => v1::ConvergencePolicy::GiveUp,
        });
        (policy, self.longest_pause.map_or(0, |pause| pause.0))
    }
}

/// What is done when two rounds in a row say that a migration will not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Say so and go on; nothing is done to the guest.
    Wait,
    /// Give the guest less and less of its CPUs until memory converges, and all of them when the migration ends; to be ordered before it begins.
    Throttle,
    /// Let the guest stand still for longer, up to --longest-pause.
    LongerPause,
    /// Give the migration up; the guest goes on at its source, untouched.
    GiveUp,
}

impl TermsArgs {
    /// As an order.
    pub fn order(
        self,
        request_id: String,
        vm: String,
        to_site: String,
        now_unix_ms: i64,
    ) -> v1::CreateMigrationRequest {
        let (convergence, longest_pause_ms) = self.convergence.order();
        let at = |span: Span| now_unix_ms.saturating_add(i64::try_from(span.0).unwrap_or(i64::MAX));
        v1::CreateMigrationRequest {
            request_id,
            vm,
            to_site,
            priority: self.priority,
            rate_bps: self.rate.0,
            deadline_unix_ms: self.deadline.map_or(0, at),
            window: self.window.unwrap_or_default(),
            after_ids: self.after,
            convergence: convergence.into(),
            longest_pause_ms,
        }
    }
}

/// How a site or a worker is emptied.
#[derive(Debug, Clone, Args)]
pub struct DrainArgs {
    /// The only site that will do; left out: wherever a VM has a replica.
    #[arg(long, value_name = "SITE")]
    pub to: Option<String>,
    /// Of its migrations, 0 to 100.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub priority: Option<u32>,
    /// Only show what would move where, and what could not.
    #[arg(long, conflicts_with = "watch")]
    pub dry_run: bool,
    /// Follow it until nothing more can leave.
    #[arg(long)]
    pub watch: bool,
}

/// `scheduler ...`
#[derive(Debug, Subcommand)]
pub enum SchedulerCommand {
    /// Show the limits of all migrations.
    Get,
    /// Change the limits of all migrations; takes effect at once on what waits.
    #[command(group = clap::ArgGroup::new("limits").required(true).multiple(true))]
    Set {
        /// Migrations that one worker takes part in at a time, as source or destination (1 to 256).
        #[arg(long, value_name = "N", group = "limits", value_parser = clap::value_parser!(u32).range(1..=256))]
        per_worker: Option<u32>,
        /// Migrations over one link at a time (1 to 256); `link set --migrations` is for one link.
        #[arg(long, value_name = "N", group = "limits", value_parser = clap::value_parser!(u32).range(1..=256))]
        per_link: Option<u32>,
        /// Of a host's memory, what VMs may have together for another one to be moved there (10 to 1000).
        #[arg(long, value_name = "PERCENT", group = "limits", value_parser = clap::value_parser!(u32).range(10..=1000))]
        memory_percent: Option<u32>,
    },
}

/// A site.
pub fn site(name: String) -> v1::Spot {
    v1::Spot { place: Some(Place::Site(name)) }
}

/// A worker.
pub fn worker(name: String) -> v1::Spot {
    v1::Spot { place: Some(Place::Worker(name)) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        terms: TermsArgs,
    }

    fn parse(words: &[&str]) -> Result<TermsArgs, clap::Error> {
        Line::try_parse_from([&["migrate"], words].concat()).map(|line| line.terms)
    }

    #[test]
    fn an_order_without_terms_asks_for_nothing() {
        let order = parse(&[]).unwrap().order("r".into(), "web".into(), "b".into(), 1_000);
        let plain = v1::CreateMigrationRequest {
            request_id: "r".into(),
            vm: "web".into(),
            to_site: "b".into(),
            ..v1::CreateMigrationRequest::default()
        };
        assert_eq!(order, plain);
    }

    #[test]
    fn terms_are_parsed_at_once_and_a_deadline_counts_from_now() {
        let words =
            ["--priority", "80", "--deadline", "2h", "--window", "22:00-06:00", "--after", "x,y", "--rate", "50mbit"];
        let order = parse(&words).unwrap().order(String::new(), "web".into(), "b".into(), 1_000);
        assert_eq!((order.priority, order.deadline_unix_ms, order.rate_bps), (Some(80), 7_201_000, 50_000_000));
        assert_eq!((order.window.as_str(), order.after_ids), ("22:00-06:00", vec!["x".to_owned(), "y".to_owned()]));
        for wrong in [["--priority", "101"], ["--rate", "50MB"], ["--deadline", "2"]] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_longer_pause_is_ordered_with_its_maximum() {
        let order =
            |words: &[&str]| parse(words).map(|terms| terms.order(String::new(), String::new(), String::new(), 0));
        let longer = order(&["--convergence", "longer-pause", "--longest-pause", "2s"]).unwrap();
        assert_eq!((longer.convergence(), longer.longest_pause_ms), (v1::ConvergencePolicy::LongerPause, 2_000));
        let give_up = order(&["--convergence", "give-up"]).unwrap();
        assert_eq!((give_up.convergence(), give_up.longest_pause_ms), (v1::ConvergencePolicy::GiveUp, 0));
        let missing = order(&["--convergence", "longer-pause"]).unwrap_err().to_string();
        assert!(missing.contains("--longest-pause <DURATION>"), "{missing}");
        for wrong in [&["--longest-pause", "2s"][..], &["--convergence", "hope"]] {
            assert!(order(wrong).is_err(), "{wrong:?}");
        }
    }
}
