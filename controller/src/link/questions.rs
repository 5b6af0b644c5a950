//! What the leader asks of workers for somebody who waits for the answer: in memory, beside what is agreed.
//!
//! ```text
//!   ask ─▶ questions ─▶ assignment ─▶ worker ─▶ report ─▶ hub ─▶ answer      (dropped: no longer asked)
//! ```
//! A question is part of the worker's assignment until its [`Asked`] is dropped, so it reaches a worker that connects anew, and its answer is in every
//! report until then. Leaders do not hand questions on: who waits at one that has ended asks again.

use std::collections::BTreeMap;
use std::sync::Arc;

use pageport_proto::WorkerName;
use pageport_proto::v1;
use tokio::sync::watch;

use crate::api::unix_ms;

/// Most questions at a time; each costs a worker some seconds of a processor and of a link.
pub const MAX_OPEN: usize = 64;

/// All that are open, by number.
type Open = BTreeMap<u64, (WorkerName, v1::QuoteAssignment)>;

/// The questions of one controller.
#[derive(Debug, Clone, Default)]
pub struct Questions(Arc<watch::Sender<Open>>);

/// One that is open until this is dropped.
#[derive(Debug)]
pub struct Asked {
    seq: u64,
    questions: Questions,
}

impl Questions {
    /// Asks a worker for a quote; [`None`]: too many are open. The question gets a number that no other has had, also of an earlier leader.
    pub fn ask(&self, worker: WorkerName, question: v1::QuoteAssignment) -> Option<Asked> {
        let mut asked = None;
        self.0.send_if_modified(|open| {
            if open.len() >= MAX_OPEN {
                return false;
            }
            let after_last = open.last_key_value().map_or(0, |(last, _)| last + 1);
            let seq = after_last.max(unix_ms().unsigned_abs());
            open.insert(seq, (worker, v1::QuoteAssignment { seq, ..question }));
            asked = Some(Asked { seq, questions: self.clone() });
            true
        });
        asked
    }

    /// What a worker is asked now.
    pub fn of(&self, worker: &WorkerName) -> Vec<v1::QuoteAssignment> {
        self.0.borrow().values().filter(|(asked, _)| asked == worker).map(|(_, question)| question.clone()).collect()
    }

    /// Notices when something is asked, or no longer.
    pub fn watch(&self) -> watch::Receiver<Open> {
        self.0.subscribe()
    }
}

impl Asked {
    /// The answer, if it is among what a worker has said.
    pub fn answer<'a>(&self, report: &'a v1::WorkerReport) -> Option<&'a v1::QuoteReport> {
        report.quotes.iter().find(|answer| answer.seq == self.seq)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.questions.0.send_modify(|open| drop(open.remove(&self.seq)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_open_until_nobody_waits_for_its_answer() {
        let questions = Questions::default();
        let (a, b): (WorkerName, WorkerName) = ("worker-a".parse().unwrap(), "worker-b".parse().unwrap());
        let first = questions.ask(a.clone(), v1::QuoteAssignment::default()).unwrap();
        let second = questions.ask(a.clone(), v1::QuoteAssignment::default()).unwrap();
        assert!(first.seq < second.seq);
        assert_eq!((questions.of(&a).len(), questions.of(&b).len()), (2, 0));
        let answer = v1::QuoteReport { seq: second.seq, ..v1::QuoteReport::default() };
        let report = v1::WorkerReport { quotes: vec![answer], ..v1::WorkerReport::default() };
        assert!(first.answer(&report).is_none() && second.answer(&report).is_some());
        drop(first);
        assert_eq!(questions.of(&a).iter().map(|question| question.seq).collect::<Vec<_>>(), [second.seq]);
    }

    #[test]
    fn there_is_a_limit() {
        let questions = Questions::default();
        let worker: WorkerName = "worker-a".parse().unwrap();
        let ask = || questions.ask(worker.clone(), v1::QuoteAssignment::default());
        let open: Vec<_> = std::iter::from_fn(ask).collect();
        assert_eq!(open.len(), MAX_OPEN);
        drop(open);
        assert!(ask().is_some());
    }
}
