//! [`Proposals`] and [`Reads`]: who waits for which entry, and for which quorum round.
//!
//! A proposal is answered by the entry at its index only if that entry is of the term in which it was proposed: another
//! leader may have put something else there. Reads are gathered into rounds: one round is under way, those that come
//! meanwhile form the next, so that each read begins after it was asked for.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

/// Those who wait for an entry of the log; `T` is what they get.
#[derive(Debug)]
pub struct Proposals<T> {
    waiting: BTreeMap<u64, (u64, oneshot::Sender<T>)>,
}

impl<T> Default for Proposals<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new() }
    }
}

impl<T> Proposals<T> {
    /// Waits for the entry at `index`, if it is of `term`.
    pub fn wait(&mut self, index: u64, term: u64, answer: oneshot::Sender<T>) {
        self.waiting.insert(index, (term, answer));
    }

    /// Who waits for this entry. One who waits for the same index in another term is dropped: its entry is lost.
    pub fn take(&mut self, index: u64, term: u64) -> Option<oneshot::Sender<T>> {
        let (waited, answer) = self.waiting.remove(&index)?;
        (waited == term).then_some(answer)
    }

    /// Drops all who wait: they learn that the outcome is unknown.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }
}

/// Those who wait for a quorum round; `T` is what they get.
#[derive(Debug)]
pub struct Reads<T> {
    next: Vec<oneshot::Sender<T>>,
    round: Option<Round<T>>,
    last_round: u64,
}

#[derive(Debug)]
struct Round<T> {
    number: u64,
    index: Option<u64>,
    age_ticks: u64,
    waiting: Vec<oneshot::Sender<T>>,
}

impl<T> Default for Reads<T> {
    fn default() -> Self {
        Self { next: vec![], round: None, last_round: 0 }
    }
}

impl<T> Reads<T> {
    /// Joins the next round.
    pub fn wait(&mut self, answer: oneshot::Sender<T>) {
        self.next.push(answer);
    }

    /// The context of a round to be started now, if one is due.
    pub fn start(&mut self) -> Option<Vec<u8>> {
        if self.round.is_some() || self.next.is_empty() {
            return None;
        }
        self.last_round += 1;
        let waiting = std::mem::take(&mut self.next);
        self.round = Some(Round { number: self.last_round, index: None, age_ticks: 0, waiting });
        Some(self.last_round.to_be_bytes().to_vec())
    }

    /// A tick passed. A round without an answer for `patience` ticks is given up and its readers join the next.
    pub fn tick(&mut self, patience: u64) {
        let Some(round) = &mut self.round else { return };
        round.age_ticks += 1;
        if round.index.is_none()
            && round.age_ticks >= patience
            && let Some(round) = self.round.take()
        {
            self.next.extend(round.waiting);
        }
    }

    /// The quorum has confirmed the round of this context: its readers need the state at `index`.
    pub fn confirm(&mut self, context: &[u8], index: u64) {
        if let Some(round) = &mut self.round
            && round.number.to_be_bytes() == context
        {
            round.index = Some(index);
        }
    }

    /// Those who may be answered now.
    pub fn ready(&mut self, applied: u64) -> Vec<oneshot::Sender<T>> {
        match self.round.take() {
            Some(round) if round.index.is_some_and(|index| index <= applied) => round.waiting,
            other => {
                self.round = other;
                vec![]
            }
        }
    }

    /// All who wait, for whatever round.
    pub fn drain(&mut self) -> Vec<oneshot::Sender<T>> {
        let round = self.round.take().map(|round| round.waiting).unwrap_or_default();
        round.into_iter().chain(std::mem::take(&mut self.next)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_of_another_term_answers_nobody() {
        let mut proposals = Proposals::<u8>::default();
        let (answer, mut answered) = oneshot::channel();
        proposals.wait(5, 2, answer);
        assert!(proposals.take(5, 3).is_none());
        assert!(answered.try_recv().is_err(), "the proposer learns that its entry is lost");
    }

    #[test]
    fn a_read_that_came_during_a_round_waits_for_the_next() {
        let mut reads = Reads::<u8>::default();
        let (first, _first) = oneshot::channel();
        let (second, _second) = oneshot::channel();
        reads.wait(first);
        let context = reads.start().expect("a round is due");
        reads.wait(second);
        assert!(reads.start().is_none(), "one round at a time");
        reads.confirm(&context, 7);
        assert_eq!(reads.ready(6).len(), 0);
        assert_eq!(reads.ready(7).len(), 1);
        assert!(reads.start().is_some());
    }

    #[test]
    fn a_round_that_got_lost_is_asked_again() {
        let mut reads = Reads::<u8>::default();
        let (answer, _answered) = oneshot::channel();
        reads.wait(answer);
        let lost = reads.start().expect("a round is due");
        reads.tick(1);
        let again = reads.start().expect("asked again");
        assert_ne!(lost, again);
        reads.confirm(&lost, 1);
        assert_eq!(reads.ready(9).len(), 0, "a confirmation of the lost round counts for nothing");
    }
}
