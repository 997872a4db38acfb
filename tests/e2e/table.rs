//! The table of requests and answers (`table.json`), by three runners: in process, over gRPC from Python (another
//! implementation of both gRPC and protobuf), and through a real Envoy to a real application.
//!
//! What the file says is read and spelt out here alone; the Python runners get every row as it is to be sent and answered.

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

/// Fewer would not be the table that was agreed on.
const ROWS_MIN: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_process() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    let rows = table.spelt_out(&fixture);
    let (mut wrong, mut checked) = (String::new(), 0);
    let asked = rows.iter().filter(|row| row.not_in_process.is_none());
    for row in asked.clone() {
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
    println!("in process: {} of {} rows, {checked} checks", asked.count(), rows.len());
    assert!(wrong.is_empty(), "not as the table says:\n{wrong}");
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_grpc_from_python() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    python::run("table_grpc.py", &given(&table, &fixture)).await;
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_envoy() {
    let (table, fixture) = (Table::read(), Fixture::start().await);
    python::run("table_envoy.py", &given(&table, &fixture)).await;
    fixture.stop().await;
}

#[test]
fn it_is_whole() {
    let table = Table::read();
    assert!(table.rows().count() >= ROWS_MIN, "{} rows", table.rows().count());
    // What a client is told must not say whether a key ever existed.
    let of = |reason: &str| table.denial(reason).clone();
    for reason in ["revoked", "expired", "not_yet_valid", "trust_disabled"] {
        assert_eq!(of(reason), of("unknown"), "{reason}");
    }
    // Every reason that there is, at least once; but the deny list, whose tests are its own.
    let reasons =
        trustgate::ext_authz::decision::DenyReason::ALL.map(trustgate::ext_authz::decision::DenyReason::as_str);
    for reason in reasons.into_iter().filter(|reason| *reason != "deny_listed") {
        assert!(table.rows().any(|row| row.want.reason.as_deref() == Some(reason)), "no row has {reason}");
    }
    // Every identity header, forged.
    for header in trustgate::ext_authz::identity::HEADERS {
        let forged = |name: &String| name.eq_ignore_ascii_case(header);
        assert!(
            table.rows().any(|row| row.send.headers.iter().any(|(name, _)| forged(name))),
            "no row forges {header}"
        );
    }
}

/// What a Python runner is given: the servers, and every row as it is to be sent and answered.
fn given(table: &Table, fixture: &Fixture) -> Value {
    let rows: Vec<Value> = table.spelt_out(fixture).iter().map(Expected::json).collect();
    json!({ "rows": rows, "servers": fixture.servers(), "secrets": fixture.secrets() })
}
