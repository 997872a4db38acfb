//! Goes every way there is through a model, the shortest ways first.

use std::{collections::HashSet, hash::BuildHasher as _};

use foldhash::fast::FixedState;

use crate::protocol::{Next, State, Step, World};

/// What came of it.
pub struct Explored {
    /// Different states that were reached.
    pub states: usize,
    /// Checks that were decided, on whatever way.
    pub decided: usize,
    /// Grants among them.
    pub granted: usize,
    /// The shortest way to a wrong answer, if there is one.
    pub wrong: Option<Vec<Step>>,
}

/// Visits every state that can be reached; stops at the first wrong answer. A state is known again by 64 bits of a hash:
/// that two of a few million share one is next to impossible, and would leave one of them out.
pub fn explore(world: &World) -> Explored {
    let hasher = FixedState::with_seed(7);
    let start = world.start();
    let mut seen = HashSet::from([hasher.hash_one(start)]);
    // How each state was reached first: from which, by which step.
    let mut ways: Vec<(u32, Step)> = vec![(0, Step::AMomentPasses)];
    let mut front = vec![(start, 0_u32)];
    let mut came = Explored { states: 0, decided: 0, granted: 0, wrong: None };
    while !front.is_empty() && came.wrong.is_none() {
        let mut next_front: Vec<(State, u32)> = Vec::new();
        for (state, place) in &front {
            world.steps(state, |next| match next {
                Next::State(step, after) => {
                    if seen.insert(hasher.hash_one(after)) {
                        ways.push((*place, step));
                        next_front.push((after, u32::try_from(ways.len() - 1).unwrap()));
                    }
                }
                Next::Decided(step, outcome) => {
                    came.decided += 1;
                    came.granted += usize::from(step == Step::CheckDecides { grants: true });
                    if outcome.is_err() && came.wrong.is_none() {
                        came.wrong = Some(way(&ways, *place, step));
                    }
                }
            });
        }
        front = next_front;
    }
    came.states = seen.len();
    came
}

fn way(ways: &[(u32, Step)], mut place: u32, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while place != 0 {
        let (from, step) = ways[place as usize];
        steps.push(step);
        place = from;
    }
    steps.reverse();
    steps
}
