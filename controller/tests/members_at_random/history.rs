//! [`History`]: what clients asked and were answered, and whether it could have happened one after the other.
//!
//! Each key is a register; every value is written once. A call takes effect at one moment between its question and its answer. One
//! whose outcome is not known takes effect at any moment after its question, or never.
//!
//! The search is that of Wing and Gong: whatever was asked before the first answer that is still to come may be next; what was tried
//! with the same rest and the same value is not tried again.

use std::collections::BTreeSet;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    Write(u64),
    /// With what it saw.
    Read(Option<u64>),
    /// It is certain that it did nothing.
    Nothing,
}

#[derive(Debug, Clone, Copy)]
pub struct Call {
    key: usize,
    did: Did,
    asked: u64,
    answered: Option<u64>,
}

#[derive(Debug, Default)]
pub struct History {
    calls: Vec<Call>,
}

impl History {
    /// Gives the call's number.
    pub fn asked(&mut self, key: usize, did: Did, now: u64) -> usize {
        self.calls.push(Call { key, did, asked: now, answered: None });
        self.calls.len() - 1
    }

    pub fn answered(&mut self, call: usize, now: u64) {
        self.calls[call].answered = Some(now);
    }

    pub fn saw(&mut self, call: usize, value: u64, now: u64) {
        self.calls[call].did = Did::Read(Some(value));
        self.answered(call, now);
    }

    pub fn did_not(&mut self, call: usize) {
        self.calls[call].did = Did::Nothing;
    }

    pub fn key(&self, call: usize) -> usize {
        self.calls[call].key
    }

    pub fn answers(&self) -> usize {
        self.calls.iter().filter(|call| call.answered.is_some()).count()
    }

    /// The calls of a key, if there is no order for them.
    pub fn is_linearizable(&self) -> Result<(), Vec<Call>> {
        let keys: BTreeSet<usize> = self.calls.iter().map(|call| call.key).collect();
        for key in keys {
            let calls = self.of(key);
            if !fits(&calls) {
                return Err(calls);
            }
        }
        Ok(())
    }

    /// Without those that cannot matter: reads without an answer, and writes of unknown outcome that nobody saw.
    fn of(&self, key: usize) -> Vec<Call> {
        let calls = self.calls.iter().filter(|call| call.key == key);
        let seen: BTreeSet<u64> =
            calls.clone().filter_map(|call| if let Did::Read(seen) = call.did { seen } else { None }).collect();
        let matters = |call: &&Call| match call.did {
            Did::Write(value) => call.answered.is_some() || seen.contains(&value),
            Did::Read(seen) => seen.is_some(),
            Did::Nothing => false,
        };
        calls.filter(matters).copied().collect()
    }
}

fn fits(calls: &[Call]) -> bool {
    let mut tried = BTreeSet::new();
    // What is done, and the value then.
    let mut open = vec![(vec![false; calls.len()], 0)];
    while let Some((done, value)) = open.pop() {
        if !tried.insert((done.clone(), value)) {
            continue;
        }
        let rest = || calls.iter().enumerate().filter(|(number, _)| !done[*number]);
        let Some(first_answer) = rest().map(|(_, call)| call.answered.unwrap_or(u64::MAX)).min() else { return true };
        for (number, call) in rest().filter(|(_, call)| call.asked <= first_answer) {
            let next = match call.did {
                Did::Write(written) => written,
                Did::Read(Some(seen)) if seen == value => value,
                Did::Read(_) | Did::Nothing => continue,
            };
            let mut done = done.clone();
            done[number] = true;
            open.push((done, next));
        }
    }
    false
}

#[test]
fn a_history_that_cannot_have_happened_is_found() {
    /// Writes and reads of one key: what, asked when, answered when (0: never).
    fn history(calls: &[(Did, u64, u64)]) -> History {
        let call = |(did, asked, answered): &(Did, u64, u64)| Call {
            key: 0,
            did: *did,
            asked: *asked,
            answered: Some(*answered).filter(|at| *at > 0),
        };
        History { calls: calls.iter().map(call).collect() }
    }
    let read = |value| Did::Read(Some(value));
    let good: [&[(Did, u64, u64)]; 5] = [
        &[(Did::Write(1), 1, 2), (read(1), 3, 4)],
        &[(Did::Write(1), 1, 5), (read(0), 2, 3), (read(1), 4, 6)],
        &[(Did::Write(1), 1, 0), (read(0), 2, 3), (read(1), 4, 5)],
        &[(Did::Write(1), 1, 9), (Did::Write(2), 1, 9), (read(2), 2, 3), (read(1), 4, 5)],
        &[(Did::Write(1), 1, 0), (read(0), 9, 10)],
    ];
    for calls in good {
        assert!(history(calls).is_linearizable().is_ok(), "{calls:?}");
    }
    let bad: [&[(Did, u64, u64)]; 5] = [
        // Lost.
        &[(Did::Write(1), 1, 2), (read(0), 3, 4)],
        // Stale, after another has seen it.
        &[(Did::Write(1), 1, 9), (read(1), 2, 3), (read(0), 4, 5)],
        // Seen, lost, seen.
        &[(Did::Write(1), 1, 2), (Did::Write(2), 3, 4), (read(1), 5, 6)],
        // Before it was asked for.
        &[(read(1), 1, 2), (Did::Write(1), 3, 4)],
        // It was certain that it did nothing.
        &[(Did::Nothing, 1, 2), (read(1), 3, 4)],
    ];
    for calls in bad {
        assert!(history(calls).is_linearizable().is_err(), "{calls:?}");
    }
}
