//! Questions of the controllers, which are part of the assignment until nobody waits any more, and their answers, which are part of every report until
//! then.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// The questions of one kind, by number, with their answers.
#[derive(Debug)]
pub struct Questions<Answer> {
    changed: Arc<Notify>,
    asked: Mutex<BTreeMap<u64, Option<Answer>>>,
}

impl<Answer: Clone> Questions<Answer> {
    /// None; `changed` is notified when a report would differ.
    pub fn new(changed: Arc<Notify>) -> Self {
        Self { changed, asked: Mutex::default() }
    }

    /// These are open: the others are forgotten, and those that are new are handed back, each once.
    pub fn take<'a, Question>(&self, open: &'a [Question], number: impl Fn(&Question) -> u64) -> Vec<&'a Question> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.retain(|seq, _| open.iter().any(|question| number(question) == *seq));
        let mut is_new = |question: &Question| match asked.entry(number(question)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(place) => {
                place.insert(None);
                true
            }
        };
        open.iter().filter(|question| is_new(question)).collect()
    }

    /// The answer to a question that is still open.
    pub fn answer(&self, seq: u64, answer: Answer) {
        if let Some(place) = self.asked.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&seq) {
            *place = Some(answer);
        }
        self.changed.notify_one();
    }

    /// All answers to what is open.
    pub fn answers(&self) -> Vec<Answer> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).values().flatten().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_is_taken_once_and_its_answer_is_kept_while_it_is_open() {
        let questions = Questions::<&str>::new(Arc::default());
        let take = |open: &[u64]| questions.take(open, |seq| *seq).into_iter().copied().collect::<Vec<_>>();
        assert_eq!(take(&[1, 2]), [1, 2]);
        assert_eq!(take(&[1, 2, 3]), [3]);
        questions.answer(2, "two");
        questions.answer(9, "nobody asked");
        assert_eq!(questions.answers(), ["two"]);
        assert_eq!(take(&[1]), [0u64; 0]);
        assert!(questions.answers().is_empty());
    }
}
