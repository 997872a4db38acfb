//! Visits every state that a model can reach, breadth first.

use std::{collections::HashSet, hash::BuildHasher as _};

use foldhash::fast::FixedState;

use crate::protocol::{Next, State, Step, World};

/// The result of an exploration.
pub struct Explored {
    /// The number of different states.
    pub states: usize,
    /// The number of transitions that decide a check.
    pub decided: usize,
    /// The number of transitions that grant a check.
    pub granted: usize,
    /// The shortest path to a wrong answer, if there is one.
    pub wrong: Option<Vec<Step>>,
}

/// Visits the reachable states until a check gets a wrong answer. Visited states are recognised by a 64-bit hash. A
/// collision would hide a state, but is very unlikely among a few million states.
pub fn explore(world: &World) -> Explored {
    let hasher = FixedState::with_seed(7);
    let start = world.start();
    let mut seen = HashSet::from([hasher.hash_one(start)]);
    // For each state, the index of its predecessor on a shortest path, and the step between them.
    let mut transitions: Vec<(u32, Step)> = vec![(0, Step::TimePasses)];
    let mut frontier = vec![(start, 0_u32)];
    let mut explored = Explored { states: 0, decided: 0, granted: 0, wrong: None };
    while !frontier.is_empty() && explored.wrong.is_none() {
        let mut next_frontier: Vec<(State, u32)> = Vec::new();
        for (state, index) in &frontier {
            world.steps(state, |next| match next {
                Next::State(step, after) => {
                    if seen.insert(hasher.hash_one(after)) {
                        transitions.push((*index, step));
                        next_frontier.push((after, u32::try_from(transitions.len() - 1).unwrap()));
                    }
                }
                Next::Decided(step, outcome) => {
                    explored.decided += 1;
                    explored.granted += usize::from(step == Step::CheckDecides { grants: true });
                    if outcome.is_err() && explored.wrong.is_none() {
                        explored.wrong = Some(path_to(&transitions, *index, step));
                    }
                }
            });
        }
        frontier = next_frontier;
    }
    explored.states = seen.len();
    explored
}

/// Returns the steps that lead to the state with this index, followed by `last`.
fn path_to(transitions: &[(u32, Step)], mut index: u32, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while index != 0 {
        let (from, step) = transitions[index as usize];
        steps.push(step);
        index = from;
    }
    steps.reverse();
    steps
}
