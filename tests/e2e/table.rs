//! Three runners check the table of requests and answers (`table.json`): in process, over gRPC from Python (with other
//! implementations of gRPC and protobuf), and through a real Envoy to a real application.
//!
//! Only the Rust code reads the file and replaces its placeholders. The Python runners get complete requests and
//! complete expected answers.

pub mod answer;
pub mod fixture;
pub mod python;
pub mod request;
pub mod rows;

use std::fmt::Write as _;

use serde_json::{Value, json};

use self::{
    fixture::Fixture,
    request::Encoding,
    rows::{Expected, Table},
};

/// The minimum number of rows in the table, so that a loss of rows does not go unnoticed.
const ROWS_MIN: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_in_process_match_the_table() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    let rows = table.expanded_rows(&fixture);
    let (mut wrong, mut checked) = (String::new(), 0);
    let selected = rows.iter().filter(|row| row.not_in_process.is_none());
    for row in selected.clone() {
        for encoding in Encoding::BOTH {
            let message = row.request.message(encoding);
            let got = answer::read(fixture.checker(&row.server).check(&message).await);
            let want = row.want(encoding);
            if got != *want {
                writeln!(wrong, "{} ({encoding:?}):\n  want {want}\n  got  {got}", row.name).unwrap();
            }
            checked += 1;
        }
    }
    println!("in process: {} of {} rows, {checked} checks", selected.count(), rows.len());
    assert!(wrong.is_empty(), "answers that differ from the table:\n{wrong}");
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_over_grpc_to_a_python_client_match_the_table() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    python::run("table_grpc.py", &runner_input(&table, &fixture)).await;
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_through_envoy_match_the_table() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    python::run("table_envoy.py", &runner_input(&table, &fixture)).await;
    fixture.stop().await;
}

#[test]
fn the_table_has_every_denial_reason_and_every_identity_header() {
    let table = Table::read();
    assert!(table.rows().count() >= ROWS_MIN, "{} rows", table.rows().count());
    // A denial must not reveal to the client whether a key ever existed.
    let denial = |reason: &str| table.denial(reason).clone();
    for reason in ["revoked", "expired", "not_yet_valid", "trust_disabled"] {
        assert_eq!(denial(reason), denial("unknown"), "{reason}");
    }
    // Each denial reason must have a row, except the reason of the deny list, which other tests cover.
    let reasons = trustgate::testing::ext_authz::decision::DenyReason::ALL
        .map(trustgate::testing::ext_authz::decision::DenyReason::as_str);
    for reason in reasons.into_iter().filter(|reason| *reason != "deny_listed") {
        assert!(table.rows().any(|row| row.want.reason.as_deref() == Some(reason)), "no row has {reason}");
    }
    // Each identity header must be forged in at least one row.
    for header in trustgate::testing::ext_authz::identity::HEADERS {
        let forged = |name: &String| name.eq_ignore_ascii_case(header);
        assert!(
            table.rows().any(|row| row.send.headers.iter().any(|(name, _)| forged(name))),
            "no row forges {header}"
        );
    }
}

/// Returns the input of a Python runner: the servers, the secrets that the application must not receive, and for each
/// row the complete request and the expected answer.
fn runner_input(table: &Table, fixture: &Fixture) -> Value {
    let rows: Vec<Value> = table.expanded_rows(fixture).iter().map(Expected::json).collect();
    json!({ "rows": rows, "servers": fixture.servers(), "secrets": fixture.secrets() })
}
