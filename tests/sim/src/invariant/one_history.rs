//! One history: what one controller takes for committed at a place of the log, every controller finds there.

use std::collections::BTreeMap;

use super::{Fact, Invariant};

/// The log, as far as it was seen.
#[derive(Debug, Default)]
pub struct OneHistory {
    entries: BTreeMap<u64, (u64, Vec<u8>)>,
}

impl Invariant for OneHistory {
    fn name(&self) -> &'static str {
        "one-history"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        if let Fact::Committed { node, index, entry } = fact {
            let (first, found) = self.entries.entry(*index).or_insert_with(|| (*node, entry.to_vec()));
            if found != entry {
                return Err(format!("controllers {first} and {node} committed different entries at {index}"));
            }
        }
        Ok(())
    }
}
