//! The protocol of freshness, gone through in every order of its steps within stated bounds: no check is answered with
//! what was so at no moment of the time allowed. Each rule is broken once, and the wrong answer it then allows is found.
//!
//! It is a model: written after design and code, not made from them. What the code does is for the other tests.

// All of it is tests: what fails here should fail loudly, and it says what it found.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, unreachable_pub)]

mod explorer;
mod protocol;

use std::time::Instant;

use crate::{
    explorer::explore,
    protocol::{Bounds, Change, Rule, World},
};

use Change::{BulkInsert, Delete, DisableTrust, EnableTrust, Insert, Other, Revoke, Unrevoke};

const CALM: Bounds = Bounds {
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
    Bounds { name: "a key is revoked, deleted, made anew", changes: &[Revoke, Delete, Insert], ..CALM };
const TRUSTS: Bounds =
    Bounds { name: "a trust is disabled and enabled", changes: &[DisableTrust, EnableTrust], ..CALM };
const MANY: Bounds =
    Bounds { name: "many keys appear at once", begins_good: false, changes: &[BulkInsert, Revoke], ..CALM };
const FAILOVER: Bounds =
    Bounds { name: "failover, with a loss or without", changes: &[Revoke, Other], failovers: 1, moments: 2, ..CALM };
const BACKLOG: Bounds = Bounds { name: "more than a poll lists", changes: &[Revoke, Other], listed: 1, ..CALM };
const LIVE: Bounds = Bounds { name: "the live row is wanted", changes: &[Revoke, Unrevoke], live: true, ..CALM };

/// What is gone through. Together they hold everything that may happen; all of it at once would be too much.
const SCENES: [Bounds; 10] = [
    KEYS,
    TRUSTS,
    MANY,
    FAILOVER,
    BACKLOG,
    LIVE,
    Bounds { name: "a key appears and goes", begins_good: false, changes: &[Insert, Delete], ..CALM },
    Bounds { name: "revoked and good again, a replica restarts", changes: &[Revoke, Unrevoke], crashes: 1, ..CALM },
    Bounds { name: "failover that loses a new key", begins_good: false, changes: &[Insert, Other], ..FAILOVER },
    Bounds { name: "old versions are pruned", changes: &[Revoke, Other], prunes: 2, moments: 2, ..CALM },
];

/// Where it shows that a rule is broken.
const fn scene_of(rule: Rule) -> Bounds {
    match rule {
        Rule::TrustsAreNamed => TRUSTS,
        Rule::AbsencesHaveAFloor => MANY,
        Rule::NonceOfApplied | Rule::NonceOfValue => FAILOVER,
        Rule::AllOfALongPoll => BACKLOG,
        Rule::OwnReadWithoutLease | Rule::OwnReadWhenLive => LIVE,
        _ => KEYS,
    }
}

#[test]
fn no_order_of_steps_leads_to_a_wrong_answer() {
    for bounds in SCENES {
        let began = Instant::now();
        let came = explore(&World { bounds, broken: None });
        println!(
            "{}: {} states, {} checks decided, {} of them granted, {:.1} s",
            bounds.name,
            came.states,
            came.decided,
            came.granted,
            began.elapsed().as_secs_f64()
        );
        assert!(came.wrong.is_none(), "{}: {:#?}", bounds.name, came.wrong);
        assert!(came.granted > 0 && came.decided > came.granted, "{}: nothing was decided", bounds.name);
    }
}

#[test]
fn without_any_one_rule_a_wrong_answer_is_found() {
    let mut needless = Vec::new();
    for rule in Rule::ALL {
        let bounds = scene_of(rule);
        match explore(&World { bounds, broken: Some(rule) }).wrong {
            Some(way) => {
                let way: Vec<_> = way.iter().map(ToString::to_string).collect();
                println!("without {rule:?}, {}:\n    {}", bounds.name, way.join(", "));
            }
            None => needless.push(rule),
        }
    }
    assert!(needless.is_empty(), "nothing goes wrong without {needless:?}");
}
