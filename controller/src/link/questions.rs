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

/// What can be asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// What would a move take?
    Quote(v1::QuoteAssignment),
    /// What would hinder it?
    Preflight(v1::PreflightAssignment),
}

/// All that a worker is asked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Asks {
    /// Forecasts.
    pub quotes: Vec<v1::QuoteAssignment>,
    /// Looks at what would hinder moves.
    pub preflights: Vec<v1::PreflightAssignment>,
}

/// All that are open, by number.
type Open = BTreeMap<u64, (WorkerName, Question)>;

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
    /// Asks a worker; [`None`]: too many are open. The question gets a number that no other has had, also of an earlier leader.
    pub fn ask(&self, worker: WorkerName, question: Question) -> Option<Asked> {
        let mut asked = None;
        self.0.send_if_modified(|open| {
            if open.len() >= MAX_OPEN {
                return false;
            }
            let after_last = open.last_key_value().map_or(0, |(last, _)| last + 1);
            let seq = after_last.max(unix_ms().unsigned_abs());
            open.insert(seq, (worker, question.numbered(seq)));
            asked = Some(Asked { seq, questions: self.clone() });
            true
        });
        asked
    }

    /// What a worker is asked now.
    pub fn of(&self, worker: &WorkerName) -> Asks {
        let mut asks = Asks::default();
        for (_, question) in self.0.borrow().values().filter(|(asked, _)| asked == worker) {
            match question.clone() {
                Question::Quote(quote) => asks.quotes.push(quote),
                Question::Preflight(preflight) => asks.preflights.push(preflight),
            }
        }
        asks
    }

    /// Notices when something is asked, or no longer.
    pub fn watch(&self) -> watch::Receiver<Open> {
        self.0.subscribe()
    }
}

impl Question {
    fn numbered(self, seq: u64) -> Self {
        match self {
            Self::Quote(quote) => Self::Quote(v1::QuoteAssignment { seq, ..quote }),
            Self::Preflight(preflight) => Self::Preflight(v1::PreflightAssignment { seq, ..preflight }),
        }
    }
}

impl Asked {
    /// The quote, or why there is none, if it is among what a worker has said.
    pub fn quote(&self, report: &v1::WorkerReport) -> Option<v1::QuoteReport> {
        report.quotes.iter().find(|answer| answer.seq == self.seq).cloned()
    }

    /// What the worker has found, if it is among what it has said.
    pub fn preflight(&self, report: &v1::WorkerReport) -> Option<v1::PreflightReport> {
        report.preflights.iter().find(|answer| answer.seq == self.seq).cloned()
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
        let first = questions.ask(a.clone(), Question::Quote(v1::QuoteAssignment::default())).unwrap();
        let second = questions.ask(a.clone(), Question::Preflight(v1::PreflightAssignment::default())).unwrap();
        assert!(first.seq < second.seq);
        let asks = questions.of(&a);
        assert_eq!((asks.quotes[0].seq, asks.preflights[0].seq), (first.seq, second.seq));
        assert_eq!(questions.of(&b), Asks::default());
        let answer = v1::PreflightReport { seq: second.seq, ..v1::PreflightReport::default() };
        let report = v1::WorkerReport { preflights: vec![answer.clone()], ..v1::WorkerReport::default() };
        assert_eq!((first.preflight(&report), second.preflight(&report)), (None, Some(answer)));
        assert!(second.quote(&report).is_none());
        drop(first);
        assert_eq!(questions.of(&a), Asks { quotes: vec![], ..asks });
    }

    #[test]
    fn there_is_a_limit() {
        let questions = Questions::default();
        let worker: WorkerName = "worker-a".parse().unwrap();
        let ask = || questions.ask(worker.clone(), Question::Quote(v1::QuoteAssignment::default()));
        let open: Vec<_> = std::iter::from_fn(ask).collect();
        assert_eq!(open.len(), MAX_OPEN);
        drop(open);
        assert!(ask().is_some());
    }
}
