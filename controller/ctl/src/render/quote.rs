//! A forecast as a page of text, and beside what it came to. Pure.

use pageport_proto::v1::{Convergence, MigrationRecord, Quote, Range};

use super::progress::PAGE_BYTES;
use super::table::{Align, Table};
use super::units;

const LABEL_CELLS: usize = 22;

/// The forecast.
pub fn page(quote: &Quote) -> String {
    let link = quote.link_bps.as_ref().map_or_else(unknown, |link| span(link, units::rate));
    let round_trip = units::duration(quote.round_trip_us.div_ceil(1000));
    let rows = [
        ("total time", time(quote.total_time_ms.as_ref())),
        ("downtime", time(quote.downtime_ms.as_ref())),
        ("memory on the wire", size(quote.memory_wan_bytes.as_ref())),
        ("", String::new()),
        ("memory", units::bytes(quote.memory_bytes)),
        ("  zero", size(quote.zero_bytes.as_ref())),
        ("  teleported", size(quote.teleported_bytes.as_ref())),
        ("  literal", size(quote.literal_bytes.as_ref())),
        ("  looked at", units::bytes(quote.sampled_bytes)),
        ("disk that has changed", units::bytes(quote.disk_lag_bytes)),
        ("dirtied by the guest", units::rate(quote.dirty_rate_bps)),
        ("link", format!("{link}, round trip {round_trip}")),
    ];
    let mut text = format!("{}\n\n", verdict(quote));
    for (label, value) in rows {
        text.push_str(format!("  {label:<LABEL_CELLS$}  {value}").trim_end());
        text.push('\n');
    }
    text
}

fn verdict(quote: &Quote) -> &'static str {
    match Convergence::try_from(quote.convergence) {
        Ok(Convergence::Yes) => "The move will end: the link takes more than the guest dirties.",
        Ok(Convergence::Uncertain) => {
            "The move may not end: the guest dirties memory nearly as fast as the link takes it. Move it at a quieter time, or watch and be ready to cancel."
        }
        Ok(Convergence::No) => {
            "The move would not end: the guest dirties memory faster than the link takes it. Move it at a quieter time, over a wider link, or with --convergence throttle or longer-pause."
        }
        Ok(Convergence::Unspecified) | Err(_) => "Whether the move will end is not known.",
    }
}

/// Forecast and actual side by side.
pub fn beside(quote: &Quote, record: &MigrationRecord) -> String {
    let pages = record.pages.unwrap_or_default();
    let bytes = |pages: u64| pages * PAGE_BYTES;
    let rows = [
        ("total time", quote.total_time_ms.as_ref(), record.total_time_ms, units::duration as fn(u64) -> String),
        ("downtime", quote.downtime_ms.as_ref(), record.downtime_ms, units::duration),
        ("memory on the wire", quote.memory_wan_bytes.as_ref(), record.wan_bytes, units::bytes),
        ("zero", quote.zero_bytes.as_ref(), bytes(pages.zero), units::bytes),
        ("teleported", quote.teleported_bytes.as_ref(), bytes(pages.teleported), units::bytes),
        ("literal", quote.literal_bytes.as_ref(), bytes(pages.literal), units::bytes),
    ];
    let heading = [("QUOTED", Align::Left), ("FORECAST", Align::Right), ("ACTUAL", Align::Right), ("", Align::Left)];
    let mut table = Table::new(heading).indented("  ");
    for (name, forecast, actual, unit) in rows {
        let place = match forecast {
            Some(range) if actual < range.low => "below",
            Some(range) if actual > range.high => "above",
            Some(_) | None => "",
        };
        let forecast = forecast.map_or_else(unknown, |range| span(range, unit));
        table.row([name.to_owned(), forecast, unit(actual), place.to_owned()]);
    }
    table.render("")
}

fn time(range: Option<&Range>) -> String {
    range.map_or_else(unknown, |range| span(range, units::duration))
}

fn size(range: Option<&Range>) -> String {
    range.map_or_else(unknown, |range| span(range, units::bytes))
}

fn unknown() -> String {
    "not known".to_owned()
}

fn span(range: &Range, unit: impl Fn(u64) -> String) -> String {
    let (low, high) = (unit(range.low), unit(range.high));
    if low == high { low } else { format!("{low} to {high}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::record::tests::finished;

    fn quote() -> Quote {
        let range = |low, high| Some(Range { low, high });
        Quote {
            memory_bytes: 2 << 30,
            sampled_bytes: 32 << 20,
            zero_bytes: range(300 << 20, 340 << 20),
            teleported_bytes: range(1600 << 20, 1700 << 20),
            literal_bytes: range(100 << 20, 120 << 20),
            memory_wan_bytes: range(50 << 20, 80 << 20),
            disk_lag_bytes: 20 << 20,
            dirty_rate_bps: 16_000_000,
            link_bps: range(120_000_000, 210_000_000),
            round_trip_us: 50_400,
            total_time_ms: range(5_000, 11_000),
            downtime_ms: range(150, 1_100),
            convergence: Convergence::Yes.into(),
            ..Quote::default()
        }
    }

    #[test]
    fn a_forecast_reads_like_this() {
        assert_eq!(
            page(&quote()),
            "\
The move will end: the link takes more than the guest dirties.

  total time              5.00 s to 11.0 s
  downtime                150 ms to 1.10 s
  memory on the wire      50.0 MiB to 80.0 MiB

  memory                  2.00 GiB
    zero                  300 MiB to 340 MiB
    teleported            1.56 GiB to 1.66 GiB
    literal               100 MiB to 120 MiB
    looked at             32.0 MiB
  disk that has changed   20.0 MiB
  dirtied by the guest    16.0 Mbit/s
  link                    120 Mbit/s to 210 Mbit/s, round trip 51 ms
"
        );
    }

    #[test]
    fn a_move_that_would_not_end_has_no_time_and_says_what_to_do() {
        let none = Quote { total_time_ms: None, convergence: Convergence::No.into(), ..quote() };
        let text = page(&none);
        assert!(text.starts_with("The move would not end") && text.contains("quieter time"), "{text}");
        assert!(text.contains("  total time              not known\n"), "{text}");
    }

    #[test]
    fn what_was_not_foreseen_stands_out() {
        let record = finished().record.unwrap();
        let text = beside(&quote(), &record);
        let line = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
        assert!(line("literal").ends_with("above"), "{text}");
        assert!(line("teleported").ends_with("below"), "{text}");
        assert!(line("total time").ends_with("6.21 s"), "{text}");
    }
}
