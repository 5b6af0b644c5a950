//! One leader in each term.

use std::collections::BTreeMap;

use super::{Fact, Invariant};

/// Who has led.
#[derive(Debug, Default)]
pub struct OneLeader {
    leaders: BTreeMap<u64, u64>,
}

impl Invariant for OneLeader {
    fn name(&self) -> &'static str {
        "one-leader"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        if let Fact::Leads { node, term } = fact {
            let leader = *self.leaders.entry(*term).or_insert(*node);
            if leader != *node {
                return Err(format!("controllers {leader} and {node} both lead in term {term}"));
            }
        }
        Ok(())
    }
}
