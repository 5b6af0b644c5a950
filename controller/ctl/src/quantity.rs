//! Durations and rates as people write them: `30s`, `5m`, `1h`; `100mbit`, `1gbit`.
//!
//! Rates are bits per second in decimal units, and say so: `100MB` is refused with the right word.

use std::fmt;
use std::str::FromStr;

/// A duration in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub u64);

/// A cap in bits per second; 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cap(pub u64);

const SPANS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("min", 60_000), ("h", 3_600_000)];
const RATES: [(&str, u64); 4] = [("bit", 1), ("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];
const NO_CAP: &str = "none";

/// A text that is no such quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// No duration.
    #[error("\"{text}\" is no duration: write a whole number and s, m or h, like 30s or 5m")]
    Span {
        /// What was given.
        text: String,
    },
    /// No rate.
    #[error("\"{text}\" is no rate: write a whole number and kbit, mbit or gbit (per second), like 100mbit, or none")]
    Rate {
        /// What was given.
        text: String,
    },
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at(split);
    let unit = unit.trim_start();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    digits.parse::<u64>().ok()?.checked_mul(*factor)
}

impl FromStr for Span {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let span = parse(text.trim(), &SPANS);
        span.map(Self).ok_or_else(|| ParseQuantityError::Span { text: text.to_owned() })
    }
}

impl FromStr for Cap {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let lower = text.trim().to_ascii_lowercase();
        if lower == NO_CAP {
            return Ok(Self(0));
        }
        let rate = parse(lower.strip_suffix("/s").unwrap_or(&lower), &RATES);
        rate.map(Self).ok_or_else(|| ParseQuantityError::Rate { text: text.to_owned() })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = SPANS.iter().rev().find(|(name, factor)| *name != "min" && self.0.is_multiple_of(*factor));
        let (name, factor) = whole.unwrap_or(&SPANS[0]);
        write!(f, "{}{name}", self.0 / factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_and_are_whole() {
        for (text, ms) in
            [("30s", 30_000), (" 5m ", 300_000), ("5 min", 300_000), ("1h", 3_600_000), ("500ms", 500), ("0s", 0)]
        {
            assert_eq!(text.parse(), Ok(Span(ms)), "{text}");
        }
        for text in ["", "30", "s", "1.5h", "-5s", "30S", "1d", "99999999999999999999s", "99999999999999999h"] {
            let error = text.parse::<Span>().unwrap_err().to_string();
            assert!(error.contains("like 30s or 5m"), "{text}: {error}");
        }
        for (ms, text) in [(30_000, "30s"), (300_000, "5m"), (7_200_000, "2h"), (1_500, "1500ms")] {
            assert_eq!(Span(ms).to_string(), text);
            assert_eq!(text.parse(), Ok(Span(ms)));
        }
    }

    #[test]
    fn rates_are_bits_per_second_whatever_their_letters_and_none_is_no_cap() {
        for (text, bps) in [
            ("100mbit", 100_000_000),
            ("100 Mbit/s", 100_000_000),
            ("1gbit", 1_000_000_000),
            ("100kbit", 100_000),
            ("800bit", 800),
            ("none", 0),
        ] {
            assert_eq!(text.parse(), Ok(Cap(bps)), "{text}");
        }
        for text in ["", "100", "100MB", "100mb", "100Mib", "fast", "1.5gbit", "-1mbit"] {
            let error = text.parse::<Cap>().unwrap_err().to_string();
            assert!(error.contains("like 100mbit, or none"), "{text}: {error}");
        }
    }
}
