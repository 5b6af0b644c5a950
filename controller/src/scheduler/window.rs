//! [`Window`]: the time of the day in which a move may begin, in UTC; it may run over midnight.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const DAY_MINUTES: u16 = 24 * 60;
const MINUTE_MS: i64 = 60_000;

/// From a minute of the day up to another, which does not belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    from_minute: u16,
    to_minute: u16,
}

/// A text that is no window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no window: write two different times of the day in UTC, like 22:00-06:00")]
pub struct ParseWindowError {
    /// What was given.
    pub text: String,
}

impl Window {
    /// May a move begin now?
    pub fn is_open(self, now_unix_ms: i64) -> bool {
        let minute = minute_of_day(now_unix_ms);
        if self.from_minute < self.to_minute {
            (self.from_minute..self.to_minute).contains(&minute)
        } else {
            minute >= self.from_minute || minute < self.to_minute
        }
    }
}

fn minute_of_day(unix_ms: i64) -> u16 {
    // A remainder by 1440 always fits.
    unix_ms.div_euclid(MINUTE_MS).rem_euclid(i64::from(DAY_MINUTES)) as u16
}

fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let digits = |part: &str| part.len() <= 2 && !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(hours) || !digits(minutes) {
        return None;
    }
    let (hours, minutes) = (hours.parse::<u16>().ok()?, minutes.parse::<u16>().ok()?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

impl FromStr for Window {
    type Err = ParseWindowError;

    fn from_str(text: &str) -> Result<Self, ParseWindowError> {
        let ends = text.split_once('-').and_then(|(from, to)| Some((minute(from.trim())?, minute(to.trim())?)));
        match ends {
            Some((from_minute, to_minute)) if from_minute != to_minute => Ok(Self { from_minute, to_minute }),
            _ => Err(ParseWindowError { text: text.chars().take(40).collect() }),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from_minute: from, to_minute: to } = self;
        write!(f, "{:02}:{:02}-{:02}:{:02}", from / 60, from % 60, to / 60, to % 60)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const DAY_MS: i64 = 86_400_000;

    fn at(text: &str) -> i64 {
        20_000 * DAY_MS + i64::from(minute(text).unwrap()) * MINUTE_MS
    }

    #[test]
    fn a_window_is_open_from_its_first_minute_until_its_last_has_passed_also_over_midnight() {
        for (window, open, shut) in [
            ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
            ("9:30-9:31", ["09:30", "09:30", "09:30", "09:30"], ["09:29", "09:31", "21:30"]),
            ("00:00-12:00", ["00:00", "06:00", "11:00", "11:59"], ["12:00", "23:59", "18:00"]),
        ] {
            let window: Window = window.parse().unwrap();
            assert!(open.iter().all(|time| window.is_open(at(time))), "{window}");
            assert!(!shut.iter().any(|time| window.is_open(at(time))), "{window}");
        }
        let before_1970: Window = "23:00-23:30".parse().unwrap();
        assert!(before_1970.is_open(-31 * MINUTE_MS) && !before_1970.is_open(-30 * MINUTE_MS));
    }

    #[test]
    fn a_window_reads_as_it_is_written_and_what_is_none_is_refused() {
        for text in ["22:00-06:00", "00:05-23:59"] {
            assert_eq!(text.parse::<Window>().unwrap().to_string(), text);
        }
        for text in
            ["", "22-06", "22:00", "22:00-22:00", "24:00-01:00", "22:60-23:00", "22:00-06:00-07:00", "+2:00-3:00"]
        {
            assert!(text.parse::<Window>().unwrap_err().to_string().contains("like 22:00-06:00"), "{text}");
        }
    }
}
