//! Tests `trustgate store copy` between SQLite and PostgreSQL: a copy keeps all fields, and a failed copy leaves no
//! rows.

use serde_json::{Value, json};

use crate::{program::Place, support::postgres::Postgres};

/// Creates trusts and keys in different states. Returns a valid key.
fn fill(place: &Place) -> String {
    place.json(&["trust", "create", "acme"]);
    place.json(&["trust", "create", "closed"]);
    let limits = ["--expires-in", "90d", "--allow-cidr", "192.0.2.0/24", "--allow-cidr", "2001:db8::/32"];
    let words = ["--name", "it's \"ours\"", "--scope", "write", "--scope", "a:b"];
    place.json(&[&["key", "issue", "--trust", "acme"], &limits[..], &words[..]].concat());
    let good = place.json(&["key", "issue", "--trust", "acme"])["key"].as_str().unwrap().to_owned();
    let revoked = place.json(&["key", "issue", "--trust", "acme"]);
    place.json(&["key", "revoke", revoked["id"].as_str().unwrap()]);
    place.json(&["key", "issue", "--trust", "closed", "--expires-in", "36500d"]);
    place.json(&["trust", "disable", "closed"]);
    // Import more keys than one INSERT statement can insert.
    let digests: Vec<_> = (0..2_500).map(|number| format!("{number:064x}")).collect();
    place.feed(&["key", "import", "--trust", "acme", "-"], &digests.join("\n")).done();
    good
}

/// Returns all trusts and keys. The keys are sorted by id, because the databases return them in different orders.
fn stored(place: &Place) -> (Value, Vec<Value>) {
    let mut keys = place.json(&["key", "list"]).as_array().unwrap().clone();
    keys.sort_by_key(|key| key["id"].as_str().unwrap().to_owned());
    (place.json(&["trust", "list"]), keys)
}

fn with_pepper(place: Place) -> Place {
    place.with("TRUSTGATE__CREDENTIAL__PEPPER", &"pepper".repeat(8))
}

#[tokio::test]
async fn a_copy_to_postgresql_and_back_keeps_all_fields_and_keys_still_work() {
    let server = Postgres::shared().await;
    let database = server.database().await;
    let url = server.url("admin", &database);
    let old = with_pepper(Place::migrated());
    let good = fill(&old);
    let before = stored(&old);
    let sqlite = format!("sqlite://{}", old.path().join("trustgate.db").display());

    let new = with_pepper(Place::new()).with("TRUSTGATE__STORE__URL", &url);
    let copy = ["--output", "json", "store", "copy", "--from", &sqlite];
    new.run(&copy).failed(1, &["cannot copy to the PostgreSQL database", "run `trustgate migrate`"]);
    new.run(&["migrate"]).done();
    let ran = new.run(&copy).done();
    let answer = ran.parsed();
    assert_eq!((&answer["trusts"], &answer["keys"]), (&json!(2), &json!(2_504)));
    assert!(answer["from"].as_str().unwrap().contains("SQLite") && answer["to"].as_str().unwrap().contains(&database));
    assert_eq!(stored(&new), before);
    let checked = new.feed(&["--output", "json", "check"], &good).done().parsed();
    assert_eq!(checked["decision"], "allow");
    let audited = "SELECT actor || ' ' || (after->>'keys') FROM trustgate.audit WHERE action = 'store.copy'";
    assert_eq!(server.value::<String>(&database, audited).await, "cli:operator 2504");

    new.run(&copy).failed(1, &["cannot copy to the PostgreSQL database", "already contains trusts (2)"]);
    assert_eq!(stored(&new), before, "the refused second copy changes nothing");

    let back = with_pepper(Place::migrated());
    back.run(&["store", "copy", "--from", &url]).done();
    assert_eq!(stored(&back), before);
    assert_eq!(back.feed(&["--output", "json", "check"], &good).done().parsed()["decision"], "allow");
}

#[tokio::test]
async fn an_unusable_source_is_reported_without_its_password() {
    let place = Place::migrated();
    place.run(&["store", "copy"]).failed(2, &["--from"]);
    let from = |url: &str| place.run(&["store", "copy", "--from", url]);
    from("mysql://host/db").failed(1, &["--from: expected a URL that begins with sqlite://"]);
    from("sqlite://relative.db").failed(1, &["--from: an SQLite URL is sqlite:// and an absolute path"]);
    from("sqlite:///no/such.db").failed(1, &["cannot copy from the SQLite database at /no/such.db", "no database"]);
    let ran = from("postgres://me:hunter2@127.0.0.1:1/db");
    ran.hides("hunter2");
    ran.failed(1, &["cannot copy from the PostgreSQL database \"db\" at 127.0.0.1:1"]);
    let ran = from("postgres://me:hunter2@[");
    ran.hides("hunter2");
    ran.failed(1, &["--from: malformed URL"]);
}

#[tokio::test]
async fn a_copy_that_fails_halfway_leaves_no_rows() {
    let server = Postgres::shared().await;
    let database = server.database().await;
    let old = Place::migrated();
    fill(&old);
    let new = Place::new().with("TRUSTGATE__STORE__URL", &server.url("admin", &database));
    new.run(&["migrate"]).done();
    // The new table refuses only the last imported digest, so the copy fails after it has written other rows.
    let refuse = format!("ALTER TABLE trustgate.api_key ADD CHECK (digest <> decode('{:064x}', 'hex'))", 2_499);
    server.execute(&database, &refuse).await;
    let sqlite = format!("sqlite://{}", old.path().join("trustgate.db").display());
    new.run(&["store", "copy", "--from", &sqlite]).failed(1, &["cannot copy to the PostgreSQL database"]);
    assert_eq!(stored(&new), (json!([]), Vec::new()));
}
