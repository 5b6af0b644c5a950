//! The keeper's command line. Pure.
//!
//! ```text
//!   pageport-keeper --deadline-file FILE -- PROGRAM ARGUMENTS…          the keeper
//!   pageport-keeper --become PARENT [--oom-score-adj N] -- PROGRAM …    its child, before it becomes PROGRAM
//!   pageport-keeper guard --runtime-dir FOLDER                          the guard of all VMs of a worker
//!   pageport-keeper --version
//! ```

use std::ffi::OsString;
use std::path::PathBuf;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Order {
    /// Keep a program.
    Keep {
        /// Where the lease stands.
        deadline_file: PathBuf,
        /// What to run.
        program: OsString,
        /// And with what.
        arguments: Vec<OsString>,
    },
    /// Become the kept program.
    Become {
        /// The keeper's process.
        parent: i32,
        /// The keeper changed its own; the program gets this one back.
        oom_score_adj: Option<String>,
        /// What to become.
        program: OsString,
        /// And with what.
        arguments: Vec<OsString>,
    },
    /// Guard the VMs of a worker.
    Guard {
        /// The worker's runtime folder.
        runtime_dir: PathBuf,
    },
    /// Say the version.
    Version,
}

/// A command line that means nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// An option that is not known.
    #[error("unknown option {option:?}; usage: pageport-keeper --deadline-file FILE -- PROGRAM ARGUMENTS...")]
    Unknown {
        /// Which.
        option: OsString,
    },
    /// An option or the program is missing, or has no good value.
    #[error("{what} is missing or bad; usage: pageport-keeper --deadline-file FILE -- PROGRAM ARGUMENTS...")]
    Missing {
        /// Which.
        what: &'static str,
    },
    /// A guard of nothing.
    #[error("usage: pageport-keeper guard --runtime-dir FOLDER")]
    Guard,
}

/// Reads the arguments after the program's own name.
pub fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Order, UsageError> {
    let missing = |what| UsageError::Missing { what };
    let (mut deadline_file, mut parent, mut oom_score_adj) = (None, None, None);
    loop {
        let option = arguments.next().ok_or(missing("\"-- PROGRAM\""))?;
        match option.to_str() {
            Some("--") => break,
            Some("guard") => return guard(arguments),
            Some("--version") => return Ok(Order::Version),
            Some("--deadline-file") => {
                deadline_file = Some(arguments.next().map(PathBuf::from).ok_or(missing("--deadline-file"))?);
            }
            Some("--become") => {
                let number = arguments.next().and_then(|number| number.to_str()?.parse().ok());
                parent = Some(number.ok_or(missing("--become"))?);
            }
            Some("--oom-score-adj") => {
                let number = arguments.next().and_then(|number| number.into_string().ok());
                oom_score_adj = Some(number.ok_or(missing("--oom-score-adj"))?);
            }
            _ => return Err(UsageError::Unknown { option }),
        }
    }
    let program = arguments.next().ok_or(missing("\"-- PROGRAM\""))?;
    let arguments = arguments.collect();
    match (deadline_file, parent) {
        (_, Some(parent)) => Ok(Order::Become { parent, oom_score_adj, program, arguments }),
        (Some(deadline_file), None) => Ok(Order::Keep { deadline_file, program, arguments }),
        (None, None) => Err(missing("--deadline-file")),
    }
}

fn guard(mut arguments: impl Iterator<Item = OsString>) -> Result<Order, UsageError> {
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(option), Some(folder), None) if option == "--runtime-dir" => {
            Ok(Order::Guard { runtime_dir: folder.into() })
        }
        _ => Err(UsageError::Guard),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Order, UsageError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_end_at_the_dashes_and_the_programs_own_are_left_alone() {
        let kept = parsed("--deadline-file /run/d -- qemu --version --deadline-file x").unwrap();
        let arguments = ["--version", "--deadline-file", "x"].map(OsString::from).to_vec();
        assert_eq!(kept, Order::Keep { deadline_file: "/run/d".into(), program: "qemu".into(), arguments });
        let program = OsString::from("qemu");
        let become_it = parsed("--become 42 --oom-score-adj -5 -- qemu").unwrap();
        let oom_score_adj = Some("-5".to_owned());
        assert_eq!(become_it, Order::Become { parent: 42, oom_score_adj, program, arguments: Vec::new() });
        assert_eq!(parsed("--version"), Ok(Order::Version));
        assert_eq!(parsed("guard --runtime-dir /run/p"), Ok(Order::Guard { runtime_dir: "/run/p".into() }));
    }

    #[test]
    fn what_is_missing_is_named() {
        let cases = [
            ("", "PROGRAM"),
            ("-- qemu", "--deadline-file"),
            ("--deadline-file", "--deadline-file"),
            ("--deadline-file /run/d", "PROGRAM"),
            ("--deadline-file /run/d --", "PROGRAM"),
            ("--become x -- qemu", "--become"),
            ("--nonsense -- qemu", "--nonsense"),
            ("qemu", "qemu"),
            ("guard", "--runtime-dir FOLDER"),
            ("guard --runtime-dir", "--runtime-dir FOLDER"),
            ("guard --runtime-dir /run/p more", "--runtime-dir FOLDER"),
        ];
        for (line, named) in cases {
            assert!(parsed(line).unwrap_err().to_string().contains(named), "{line}");
        }
    }
}
