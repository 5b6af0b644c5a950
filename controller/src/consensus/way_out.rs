//! [`WayOut`]: what an operator does about a controller whose data is lost.

use std::fmt;

/// Of the controller of this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WayOut(pub u64);

impl fmt::Display for WayOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.0;
        write!(
            f,
            "while a majority of the other controllers runs: \"pageportctl cluster remove {id}\", then move its data_dir away, \
             give it a new id and join = true, start it, and \"pageportctl cluster add\" it; without a majority: \"Recovering\" in docs/operations.md"
        )
    }
}
