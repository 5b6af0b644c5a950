//! A command that was answered is never lost, and never takes effect twice.

use std::collections::{BTreeMap, BTreeSet};

use pageport_controller::model::command::Answer;
use pageport_proto::RequestId;

use super::{Fact, Invariant};

/// What was asked and answered.
#[derive(Debug, Default)]
pub struct Acknowledged {
    answers: BTreeMap<RequestId, Answer>,
    about_power: BTreeSet<RequestId>,
}

impl Invariant for Acknowledged {
    fn name(&self) -> &'static str {
        "acknowledged"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Asked { request, what: "start" | "stop" } => drop(self.about_power.insert(*request)),
            Fact::Answered { request, answer } => {
                let first = self.answers.entry(*request).or_insert_with(|| (*answer).clone());
                if first != *answer {
                    return Err(format!("request {request} was answered {first:?} and {answer:?}"));
                }
            }
            Fact::End { state: Some(state), .. } => {
                for (request, answer) in &self.answers {
                    if state.answers.get(request) != Some(answer) {
                        return Err(format!("request {request} was answered {answer:?}, and is forgotten"));
                    }
                    if let Answer::Migration(id) = answer
                        && !state.migrations.contains_key(id)
                    {
                        return Err(format!("migration {id} was acknowledged, and is not there"));
                    }
                }
                let took_effect = state.vms.values().map(|vm| vm.power_seq).sum::<u64>();
                let asked = self.about_power.len() as u64;
                let answered = self.answers.keys().filter(|request| self.about_power.contains(request)).count() as u64;
                if !(answered..=asked).contains(&took_effect) {
                    return Err(format!(
                        "{took_effect} orders about power took effect, of {asked} that were given and {answered} answered"
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
