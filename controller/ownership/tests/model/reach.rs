//! [`explore`]: can the VM always still come back? A pass of our own, since "eventually" of the checker is unsound on cycles.
//!
//! Every state is looked at once. Then, backwards from the states where all is well, along steps that are neither faults nor
//! an operator's: what is not met is stuck. With steps that are taken at some time if they are possible again and again
//! (messages are said until superseded), "can always still reach" is "does in the end".

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use stateright::Model;

/// What was found.
#[derive(Debug)]
pub struct Report<M: Model> {
    /// Different states.
    pub states: usize,
    /// Among them, from which it is not asked whether the VM comes back, since the bounds of the model are in its way.
    pub excused: usize,
    /// A shortest way to a state that is stuck.
    pub stuck: Option<(Vec<M::Action>, M::State)>,
}

/// How a state is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// All is well here.
    Well,
    /// Not asked.
    Excused,
    /// It must still be possible to reach one where all is well.
    Open,
}

/// Looks at every state.
pub fn explore<M: Model>(
    model: &M,
    judge: impl Fn(&M::State) -> Judgement,
    counts: impl Fn(&M::Action) -> bool,
) -> Report<M>
where
    M::State: Hash + Clone + PartialEq,
    M::Action: Clone,
{
    let mut ids: HashMap<u64, u32> = HashMap::new();
    let mut parents: Vec<u32> = vec![];
    let mut marks: Vec<u64> = vec![];
    let mut edges: Vec<(u32, u32)> = vec![];
    let mut live: Vec<u32> = vec![];
    let (mut excused, mut queue) = (0, VecDeque::new());
    let mut enter = |state: M::State, parent: u32, queue: &mut VecDeque<(u32, M::State)>| {
        let mark = mark(&state);
        let fresh = u32::try_from(parents.len()).unwrap();
        *ids.entry(mark).or_insert_with(|| {
            parents.push(parent);
            marks.push(mark);
            match judge(&state) {
                Judgement::Well => live.push(fresh),
                Judgement::Excused => {
                    excused += 1;
                    live.push(fresh);
                }
                Judgement::Open => {}
            }
            queue.push_back((fresh, state));
            fresh
        })
    };
    for state in model.init_states() {
        enter(state, u32::MAX, &mut queue);
    }
    let mut actions = vec![];
    while let Some((id, state)) = queue.pop_front() {
        model.actions(&state, &mut actions);
        for action in actions.drain(..) {
            let along = counts(&action);
            let Some(next) = model.next_state(&state, action) else { continue };
            let next = enter(next, id, &mut queue);
            if along {
                edges.push((next, id));
            }
        }
    }
    let reached = backwards(parents.len(), edges, live);
    let stuck = reached.iter().position(|reached| !reached).map(|id| way(model, &parents, &marks, id));
    Report { states: parents.len(), excused, stuck }
}

fn mark(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

fn backwards(states: usize, mut edges: Vec<(u32, u32)>, mut live: Vec<u32>) -> Vec<bool> {
    edges.sort_unstable();
    let mut reached = vec![false; states];
    live.iter().for_each(|id| reached[*id as usize] = true);
    while let Some(id) = live.pop() {
        let from = edges.partition_point(|edge| edge.0 < id);
        for (_, before) in edges[from..].iter().take_while(|edge| edge.0 == id) {
            if !std::mem::replace(&mut reached[*before as usize], true) {
                live.push(*before);
            }
        }
    }
    reached
}

/// The steps that led to a state when it was first met, and the state.
fn way<M: Model>(model: &M, parents: &[u32], marks: &[u64], id: usize) -> (Vec<M::Action>, M::State)
where
    M::State: Hash,
    M::Action: Clone,
{
    let mut path = vec![];
    let mut at = u32::try_from(id).unwrap();
    while at != u32::MAX {
        path.push(marks[at as usize]);
        at = parents[at as usize];
    }
    let first = path.pop().unwrap();
    let mut state = model.init_states().into_iter().find(|state| mark(state) == first).unwrap();
    let mut steps = vec![];
    while let Some(wanted) = path.pop() {
        let mut actions = vec![];
        model.actions(&state, &mut actions);
        let (action, next) = actions
            .into_iter()
            .filter_map(|action| Some((action.clone(), model.next_state(&state, action)?)))
            .find(|(_, next)| mark(next) == wanted)
            .unwrap();
        steps.push(action);
        state = next;
    }
    (steps, state)
}
