//! Sizes as people write them: `2GiB`, `512 MiB`, or a plain number of bytes.
//!
//! Only binary units: `2GB` and `2G` mean different things to different people and are refused with the right word.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(&str, u64); 5] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// No number in front.
    #[error("\"{text}\" is no size: write a whole number and a unit, like 512MiB or 2GiB")]
    Number {
        /// What was given.
        text: String,
    },
    /// The unit is none of ours.
    #[error("\"{text}\" has the unknown unit \"{unit}\": use KiB, MiB, GiB, TiB or plain bytes")]
    Unit {
        /// What was given.
        text: String,
        /// Its unit.
        unit: String,
    },
    /// More than 64 bits hold.
    #[error("\"{text}\" is too large")]
    TooLarge {
        /// What was given.
        text: String,
    },
}

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let unit = unit.trim_start();
        if digits.is_empty() || unit.starts_with('.') {
            return Err(ParseSizeError::Number { text: text.to_owned() });
        }
        let factor = match UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, factor)) => *factor,
            None if unit.is_empty() => 1,
            None => return Err(ParseSizeError::Unit { text: text.to_owned(), unit: unit.to_owned() }),
        };
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        number.map(Self).ok_or_else(|| ParseSizeError::TooLarge { text: text.to_owned() })
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like 512MiB, 2GiB or a number of bytes")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1KiB", 1024),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            (" 2GiB ", 2 << 30),
            ("3TiB", 3 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_ambiguous_or_wrong_is_refused_with_the_fix() {
        for (text, part) in [
            ("2GB", "unknown unit \"GB\""),
            ("2G", "unknown unit \"G\""),
            ("2gib", "use KiB, MiB, GiB"),
            ("", "whole number"),
            ("GiB", "whole number"),
            ("1.5GiB", "whole number"),
            ("-1", "whole number"),
            ("99999999999TiB", "too large"),
        ] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
