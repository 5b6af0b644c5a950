//! Errors as one line for people, causes included.

use std::error::Error;

/// The error and all its causes, each once: `open the image x: permission denied`.
pub fn with_causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some libraries repeat their source in their own message.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Failure {
        what: &'static str,
        source: io::Error,
    }

    #[test]
    fn each_cause_is_told_once() {
        let error = |what| Failure { what, source: io::Error::other("permission denied") };
        assert_eq!(with_causes(&error("open the image x")), "open the image x: permission denied");
        assert_eq!(with_causes(&error("x: permission denied")), "x: permission denied", "it says so itself");
    }
}
