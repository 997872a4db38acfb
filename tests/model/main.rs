//! Explores a model of the freshness protocol in every order of its steps, within the bounds of each scenario. The
//! answer to each check must have been correct at some moment within the allowed time. A second test breaks each rule
//! of the protocol once, and expects the exploration to find a wrong answer.
//!
//! The model was written by hand to match the design and the code. It does not execute the code, which other tests
//! cover.

// This crate contains only tests: they may panic, and they print their results.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, unreachable_pub)]

mod explorer;
mod protocol;

use std::time::Instant;

use crate::{
    explorer::explore,
    protocol::{Bounds, Change, Rule, World},
};

use Change::{BulkInsert, Delete, DisableTrust, EnableTrust, Insert, Other, Revoke, Unrevoke};

const BASE: Bounds = Bounds {
    name: "",
    begins_good: true,
    changes: &[],
    commits: 2,
    moments: 3,
    failovers: 0,
    crashes: 0,
    prunes: 0,
    listed: 9,
    live: false,
};

const KEYS: Bounds =
    Bounds { name: "a key is revoked, deleted, created again", changes: &[Revoke, Delete, Insert], ..BASE };
const TRUSTS: Bounds =
    Bounds { name: "a trust is disabled and enabled", changes: &[DisableTrust, EnableTrust], ..BASE };
const MANY: Bounds =
    Bounds { name: "many keys are created at once", begins_good: false, changes: &[BulkInsert, Revoke], ..BASE };
const FAILOVER: Bounds =
    Bounds { name: "failover with or without a loss", changes: &[Revoke, Other], failovers: 1, moments: 2, ..BASE };
const BACKLOG: Bounds =
    Bounds { name: "more versions than a poll lists", changes: &[Revoke, Other], listed: 1, ..BASE };
const LIVE: Bounds = Bounds { name: "the route demands `live`", changes: &[Revoke, Unrevoke], live: true, ..BASE };

/// The scenarios. Together they contain every event of the model; a single scenario with all events would have too many
/// states.
const SCENARIOS: [Bounds; 10] = [
    KEYS,
    TRUSTS,
    MANY,
    FAILOVER,
    BACKLOG,
    LIVE,
    Bounds { name: "a key is created and deleted", begins_good: false, changes: &[Insert, Delete], ..BASE },
    Bounds { name: "a key is restored, a replica restarts", changes: &[Revoke, Unrevoke], crashes: 1, ..BASE },
    Bounds { name: "failover that loses a new key", begins_good: false, changes: &[Insert, Other], ..FAILOVER },
    Bounds { name: "old versions are pruned", changes: &[Revoke, Other], prunes: 2, moments: 2, ..BASE },
];

/// Returns the scenario in which breaking `rule` leads to a wrong answer.
const fn scenario_for(rule: Rule) -> Bounds {
    match rule {
        Rule::TrustChangesReachRecords => TRUSTS,
        Rule::NegativeEntriesHaveAFloor => MANY,
        Rule::NonceOfApplied | Rule::NonceOfValue => FAILOVER,
        Rule::FloorAfterALongPoll => BACKLOG,
        Rule::OwnReadWithoutLease | Rule::OwnReadWhenLive => LIVE,
        _ => KEYS,
    }
}

#[test]
fn no_order_of_steps_leads_to_a_wrong_answer() {
    for bounds in SCENARIOS {
        let began = Instant::now();
        let explored = explore(&World { bounds, broken: None });
        println!(
            "{}: {} states, {} checks decided, {} of them granted, {:.1} s",
            bounds.name,
            explored.states,
            explored.decided,
            explored.granted,
            began.elapsed().as_secs_f64()
        );
        assert!(explored.wrong.is_none(), "{}: {:#?}", bounds.name, explored.wrong);
        let denied = explored.decided - explored.granted;
        assert!(explored.granted > 0 && denied > 0, "{}: no grants or no denials", bounds.name);
    }
}

#[test]
fn breaking_any_one_rule_leads_to_a_wrong_answer() {
    let mut unnoticed = Vec::new();
    for rule in Rule::ALL {
        let bounds = scenario_for(rule);
        match explore(&World { bounds, broken: Some(rule) }).wrong {
            Some(path) => {
                let path: Vec<_> = path.iter().map(ToString::to_string).collect();
                println!("without {rule:?}, {}:\n    {}", bounds.name, path.join(", "));
            }
            None => unnoticed.push(rule),
        }
    }
    assert!(unnoticed.is_empty(), "no wrong answer without {unnoticed:?}");
}
