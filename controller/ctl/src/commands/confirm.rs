//! A name that is typed once more at the terminal before something that cannot be undone.

use std::io::IsTerminal as _;

use crate::error::CtlError;
use crate::render::note;

/// Says what is about to happen, line by line, and reads the name of `what` from the terminal.
///
/// # Errors
/// There is no terminal.
pub fn ask_for_name(what: &str, warning: &[String]) -> Result<String, CtlError> {
    if !std::io::stdin().is_terminal() {
        return Err(CtlError::Unconfirmed);
    }
    if let [before @ .., last] = warning {
        before.iter().for_each(|line| note(line));
        note(&format!("{last} To go on, type the {what}'s name:"));
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(CtlError::Terminal)?;
    Ok(line.trim().to_owned())
}
