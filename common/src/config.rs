//! Configuration files: TOML into a typed struct.
//!
//! Unknown keys are the business of the struct (`#[serde(deny_unknown_fields)]`); validation of values is the business
//! of the daemon that owns it. This module reads the file and says which file and which line is wrong.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error("read configuration {}: give an existing file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, or not the keys that are expected.
    #[error("parse configuration {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and what was expected.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot work.
    #[error("configuration key `{key}`: {problem}")]
    Invalid {
        /// Dotted path of the key.
        key: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

/// Reads a TOML file.
///
/// # Errors
/// [`ConfigError::Read`] or [`ConfigError::Parse`].
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code)]
        rate_bps: u64,
    }

    fn parse(text: &str) -> Result<Sample, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse("rate_bps = 1\nspeed = 2\n").unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("speed") && cause.contains("line 2"), "{cause}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Sample>(Path::new("/nonexistent/pageport.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/pageport.toml"));
    }
}
