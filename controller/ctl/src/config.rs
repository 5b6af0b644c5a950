//! Where the controllers are and who we are: flags, then environment, then config file, key by key.
//!
//! ```toml
//! controllers = ["198.51.100.1:7400", "198.51.100.2:7400"]
//! ca = "ca.pem"            # relative paths: beside this file
//! cert = "operator.pem"
//! key = "operator.key"
//! ```
//!
//! The default file may be absent; one that was named may not. Does not read the PEM files.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use pageport_common::tls::TlsPaths;

use crate::cli::ConnectionArgs;

const DEFAULT_FILE: &str = ".config/pageport/ctl.toml";
/// More than any cluster has members.
const MAX_CONTROLLERS: usize = 32;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The config file was named and cannot be read.
    #[error("read the config file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The config file is no TOML of the known keys.
    #[error("parse the config file {} (keys: controllers, ca, cert, key)", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A setting is in none of the places.
    #[error("{key} is not set: use --{key}, {variable}, or \"{key}\" in {}", path.display())]
    Missing {
        /// The setting.
        key: &'static str,
        /// Its environment variable.
        variable: &'static str,
        /// The config file.
        path: PathBuf,
    },
    /// An address is not HOST:PORT.
    #[error("the controller address \"{address}\" is not HOST:PORT")]
    Address {
        /// What was given.
        address: String,
    },
    /// More addresses than any cluster has.
    #[error("{count} controller addresses were given; at most {MAX_CONTROLLERS} make sense")]
    TooMany {
        /// How many.
        count: usize,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    controllers: Vec<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

/// All that is needed to reach the controllers.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Addresses, in the order in which they are tried.
    pub controllers: Vec<String>,
    /// The operator's identity.
    pub tls: TlsPaths,
}

impl Settings {
    /// Merges flags and environment (clap has done that) with the config file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or the key, and the fix.
    pub fn resolve(args: &ConnectionArgs) -> Result<Self, ConfigError> {
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let (path, required) = match &args.config {
            Some(path) => (path.clone(), true),
            None => (home.join(DEFAULT_FILE), false),
        };
        let file = read(&path, required)?;
        Self::merge(args, file, &path)
    }

    fn merge(args: &ConnectionArgs, file: File, path: &Path) -> Result<Self, ConfigError> {
        let missing = |key, variable| ConfigError::Missing { key, variable, path: path.to_owned() };
        let folder = path.parent().unwrap_or(Path::new("."));
        let pick = |flag: &Option<PathBuf>, entry: Option<PathBuf>, key, variable| {
            flag.clone().or(entry.map(|entry| folder.join(entry))).ok_or_else(|| missing(key, variable))
        };

        let controllers = if args.controllers.is_empty() { file.controllers } else { args.controllers.clone() };
        if controllers.is_empty() {
            return Err(missing("controllers", "PAGEPORT_CONTROLLERS"));
        }
        if controllers.len() > MAX_CONTROLLERS {
            return Err(ConfigError::TooMany { count: controllers.len() });
        }
        let controllers = controllers.iter().map(|text| address(text)).collect::<Result<_, _>>()?;
        let tls = TlsPaths {
            ca: pick(&args.ca, file.ca, "ca", "PAGEPORT_CA")?,
            cert: pick(&args.cert, file.cert, "cert", "PAGEPORT_CERT")?,
            key: pick(&args.key, file.key, "key", "PAGEPORT_KEY")?,
        };
        Ok(Self { controllers, tls })
    }
}

fn read(path: &Path, required: bool) -> Result<File, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) }),
        Err(error) if !required && error.kind() == io::ErrorKind::NotFound => Ok(File::default()),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

fn address(text: &str) -> Result<String, ConfigError> {
    let text = text.trim();
    let bad = || ConfigError::Address { address: text.to_owned() };
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let host_fits = !host.is_empty() && !host.contains(['/', '@', ' ']);
    match port.parse::<u16>() {
        Ok(port) if port != 0 && host_fits => Ok(text.to_owned()),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::one_line;

    fn file(text: &str) -> File {
        toml::from_str(text).unwrap()
    }

    const FULL: &str = "controllers = [\"a:1\"]\nca = \"ca.pem\"\ncert = \"/abs/op.pem\"\nkey = \"op.key\"\n";

    #[test]
    fn the_file_fills_in_what_flags_leave_out() {
        let args = ConnectionArgs { ca: Some("flag-ca.pem".into()), ..Default::default() };
        let settings = Settings::merge(&args, file(FULL), Path::new("/etc/pageport/ctl.toml")).unwrap();
        assert_eq!(settings.controllers, ["a:1"]);
        assert_eq!(settings.tls.ca, Path::new("flag-ca.pem"));
        assert_eq!(settings.tls.cert, Path::new("/abs/op.pem"));
        assert_eq!(settings.tls.key, Path::new("/etc/pageport/op.key"));
    }

    #[test]
    fn what_is_nowhere_is_named_with_every_way_to_set_it() {
        let error = Settings::merge(&ConnectionArgs::default(), File::default(), Path::new("/x/ctl.toml")).unwrap_err();
        assert_eq!(
            one_line(&error),
            "controllers is not set: use --controllers, PAGEPORT_CONTROLLERS, or \"controllers\" in /x/ctl.toml"
        );
        let args = ConnectionArgs { controllers: vec!["a:1".into()], ..Default::default() };
        let error = Settings::merge(&args, File::default(), Path::new("/x/ctl.toml")).unwrap_err();
        assert!(one_line(&error).starts_with("ca is not set: use --ca, PAGEPORT_CA"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<File>("controlers = []").unwrap_err();
        assert!(error.to_string().contains("controlers"), "{error}");
    }

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["127.0.0.1:7400", "[::1]:7400", "ctl.example:1", " a:7400 "] {
            assert!(address(good).is_ok(), "{good} was refused");
        }
        for bad in ["", "a", "a:", ":1", "a:0", "a:70000", "https://a:1", "u@a:1"] {
            assert!(address(bad).is_err(), "{bad} was taken");
        }
    }
}
