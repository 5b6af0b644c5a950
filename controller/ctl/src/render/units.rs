//! Sizes, rates, durations and counts as people read them: three significant digits and a unit.

/// Bytes in binary units: `1.96 GiB`.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Bits per second in decimal units: `142 Mbit/s`.
pub fn rate(bps: u64) -> String {
    scaled(bps, 1000.0, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s", "Pbit/s"])
}

fn scaled(value: u64, base: f64, units: [&str; 6]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    // 999.5 would round up to four digits.
    while scaled >= base.min(999.5) && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { decimals(scaled) };
    format!("{scaled:.digits$} {}", units[unit])
}

fn decimals(value: f64) -> usize {
    match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    }
}

/// A duration: `312 ms`, `4.90 s`, `2 min 5 s`, `3 h 20 min`.
pub fn duration(ms: u64) -> String {
    let seconds = ms.div_ceil(1000);
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..59_950 => format!("{:.*} s", decimals(ms as f64 / 1000.0), ms as f64 / 1000.0),
        59_950..3_600_000 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// How long ago a Unix time was: `4.90 s ago`, or a dash for a time that is not set.
pub fn ago(unix_ms: i64, now_unix_ms: i64) -> String {
    match u64::try_from(now_unix_ms.saturating_sub(unix_ms)) {
        _ if unix_ms == 0 => "-".to_owned(),
        Ok(ms) => format!("{} ago", duration(ms)),
        // Another machine's clock.
        Err(_) => "just now".to_owned(),
    }
}

/// A count with its thousands apart: `405,574`.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share of a whole: `91.5 %`; nothing of nothing is a dash.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (value, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (4096, "4.00 KiB"),
            (73_610_035, "70.2 MiB"),
            (2 << 30, "2.00 GiB"),
            (1023 << 20, "1.00 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(value), text, "{value}");
        }
    }

    #[test]
    fn rates() {
        for (value, text) in
            [(0, "0 bit/s"), (142_000_000, "142 Mbit/s"), (999_600, "1.00 Mbit/s"), (1_500, "1.50 kbit/s")]
        {
            assert_eq!(rate(value), text, "{value}");
        }
    }

    #[test]
    fn durations() {
        for (value, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (1000, "1.00 s"),
            (4_896, "4.90 s"),
            (32_400, "32.4 s"),
            (59_949, "59.9 s"),
            (59_950, "1 min 0 s"),
            (125_000, "2 min 5 s"),
            (3_599_999, "60 min 0 s"),
            (12_000_000, "3 h 20 min"),
        ] {
            assert_eq!(duration(value), text, "{value}");
        }
    }

    #[test]
    fn times_past_never_and_ahead() {
        assert_eq!(ago(10_000, 14_900), "4.90 s ago");
        assert_eq!(ago(0, 14_900), "-");
        assert_eq!(ago(20_000, 14_900), "just now");
    }

    #[test]
    fn counts_and_shares() {
        assert_eq!(
            (count(0), count(999), count(1000), count(1_405_574)),
            ("0".into(), "999".into(), "1,000".into(), "1,405,574".into())
        );
        assert_eq!((percent(1, 3), percent(0, 0)), ("33.3 %".to_owned(), "-".to_owned()));
    }
}
