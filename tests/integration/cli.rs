//! Tests the command line with an SQLite database: results, exit codes, errors, imports and the handling of secrets.

use std::fs;

use serde_json::{Value, json};

use crate::program::Place;

#[test]
fn a_key_is_issued_and_shown_once_then_identified_and_revoked() {
    let place = Place::migrated();
    let trust = place.json(&["trust", "create", "acme"]);
    assert_eq!((&trust["name"], &trust["enabled"], &trust["keys"]), (&json!("acme"), &json!(true), &json!(0)));

    let scopes = ["--scope", "write", "--scope", "read"];
    let limits = ["--expires-in", "90d", "--allow-cidr", "192.0.2.7/24", "--allow-cidr", "2001:db8::1"];
    let issue = [&["key", "issue", "--trust", "acme", "--name", "ci"], &scopes[..], &limits[..]].concat();
    let issued = place.json(&issue);
    let (key, id) = (issued["key"].as_str().unwrap(), issued["id"].as_str().unwrap());
    assert_eq!(issued["trust_id"], trust["id"]);
    assert_eq!(issued["hint"], key[..8]);
    assert_eq!(issued["scopes"], json!(["read", "write"]));
    assert_eq!(issued["allowed_cidrs"], json!(["192.0.2.0/24", "2001:db8::1/128"]));

    let shown = place.json(&["key", "show", id]);
    assert_eq!((&shown["state"], &shown["name"], &shown["scheme"]), (&json!("active"), &json!("ci"), &json!("sha256")));
    let days = |field: &str| time(&shown[field]).unix_timestamp() / 86_400;
    assert_eq!(days("expires_at") - days("created_at"), 90);
    assert_eq!(place.json(&["key", "list", "--trust", trust["id"].as_str().unwrap()])[0], shown);
    assert_eq!(place.json(&["trust", "show", "acme"])["keys"], 1);

    let leaked = format!("curl -H 'x-api-key: {key}' http://host/\n");
    let found = place.feed(&["--output", "json", "key", "identify"], &leaked).done();
    assert_eq!((&found.parsed()[0]["key_id"], &found.parsed()[0]["result"]), (&json!(id), &json!("active")));

    let mut revoked = place.json(&["key", "revoke", id]);
    assert_eq!(revoked["state"], "revoked");
    let effect = revoked.as_object_mut().unwrap().remove("effect").unwrap();
    assert_eq!((&effect["replicas"], &effect["applied"], &effect["missing"]), (&json!(0), &json!(0), &json!([])));
    let mut again = place.json(&["key", "revoke", id]);
    assert_eq!(again.as_object_mut().unwrap().remove("effect").unwrap()["version"], effect["version"]);
    assert_eq!(again, revoked, "a second revocation changes nothing");
    let again = place.feed(&["key", "identify"], &leaked).done();
    assert!(again.out.contains("revoked") && again.out.contains("acme"), "{again:?}");

    for ran in [found, again, place.run(&["key", "list"]), place.run(&["key", "show", id])] {
        ran.hides(key);
    }
}

fn time(value: &Value) -> time::OffsetDateTime {
    let format = &time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::parse(value.as_str().unwrap(), format).unwrap()
}

#[test]
fn table_output_has_columns_and_explanatory_notes() {
    let place = Place::migrated();
    place.run(&["trust", "create", "acme"]).done();
    let issued = place.run(&["key", "issue", "--trust", "acme"]).done().out;
    assert!(issued.contains("This is the only time the key is shown"), "{issued}");
    let field = |name: &str| {
        let lines = issued.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.filter(|words| words.first() == Some(&name)).map(|words| words[1].to_owned()).next().unwrap()
    };
    let list = place.run(&["key", "list"]).done();
    assert!(
        list.out.starts_with("ID ") && list.out.contains(&field("hint")) && list.out.contains("active"),
        "{list:?}"
    );
    list.hides(&field("key"));
    let revoked = place.run(&["key", "revoke", &field("id")]).done().out;
    assert!(revoked.ends_with("\neffective: no replica is running\n"), "{revoked}");
    let place = place.with("TRUSTGATE__FRESHNESS__MODE", "ttl");
    let revoked = place.run(&["key", "revoke", &field("id")]).done().out;
    assert!(revoked.contains("used for up to 1m (`freshness.ttl`)"), "{revoked}");
    let trusts = place.run(&["trust", "list"]).done().out;
    let words: Vec<Vec<_>> = trusts.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NAME", "ID", "ENABLED", "KEYS", "CREATED_AT"]);
    assert_eq!((words[1][0], words[1][2], words[1][3]), ("acme", "yes", "1"));
    assert!(words[1][4].ends_with('Z'), "{trusts}");
}

#[test]
fn a_trust_with_keys_is_deleted_only_with_the_option_with_keys() {
    let place = Place::migrated();
    place.json(&["trust", "create", "acme"]);
    place.run(&["trust", "create", "acme"]).failed(1, &["trust \"acme\" already exists"]);
    place.run(&["trust", "create", ""]).failed(2, &["the name of a trust must be"]);
    let key = place.json(&["key", "issue", "--trust", "acme"]);
    let disabled = place.json(&["trust", "disable", "acme"]);
    assert_eq!((&disabled["enabled"], &disabled["effect"]["replicas"]), (&json!(false), &json!(0)));
    assert_eq!(place.json(&["key", "show", key["id"].as_str().unwrap()])["state"], "trust_disabled");
    assert_eq!(place.json(&["trust", "enable", "acme"])["enabled"], true);
    place.run(&["trust", "delete", "acme"]).failed(1, &["still has 1 keys", "--with-keys"]);
    let deleted = place.json(&["trust", "delete", "acme", "--with-keys"]);
    assert_eq!((&deleted["name"], &deleted["effect"]["replicas"]), (&json!("acme"), &json!(0)));
    assert_eq!(place.json(&["trust", "list"]), json!([]));
    place.run(&["trust", "show", "acme"]).failed(1, &["trust \"acme\" not found"]);
}

#[test]
fn a_digest_is_imported_only_once_and_an_invalid_line_prevents_the_import() {
    let place = Place::migrated();
    place.json(&["trust", "create", "acme"]);
    let digests: Vec<_> = (0..10_000).map(|number| format!("{number:064x}")).collect();
    let import = ["--output", "json", "key", "import", "--trust", "acme"];

    let mut bad = digests.clone();
    bad[41] = "hunter2-hunter2-hunter2".to_owned();
    bad[9_999] = "0".repeat(63);
    let refused = place
        .feed(&import, &bad.join("\n"))
        .failed(1, &["import failed: 2 invalid lines", "line 42: expected a SHA-256 digest", "line 10000: expected"]);
    refused.hides("hunter2");
    assert_eq!(place.json(&["trust", "show", "acme"])["keys"], 0);

    let file = place.write("digests", &format!("# old gateway\n\n{}\n", digests.join("\r\n")));
    let ran = place.run(&[&import[..], &[file.to_str().unwrap()]].concat()).done().parsed();
    assert_eq!((&ran["imported"], &ran["already_stored"]), (&json!(10_000), &json!(0)));
    let ran = place.feed(&import, &digests[..7].join("\n")).done().parsed();
    assert_eq!((&ran["imported"], &ran["already_stored"]), (&json!(0), &json!(7)));
    assert_eq!(place.json(&["trust", "show", "acme"])["keys"], 10_000);
}

#[test]
fn keys_from_other_systems_are_imported_from_plaintext_and_identified_with_a_pepper() {
    let place = Place::migrated().with("TRUSTGATE__CREDENTIAL__PEPPER", "pepper-hunter2-hunter2");
    place.json(&["trust", "create", "acme"]);
    let keys = "first-foreign-key-1234\nsecond-foreign-key-5678\n";
    let ran = place.feed(&["key", "import", "--trust", "acme", "--plaintext"], keys).done();
    assert!(ran.out.contains("imported"), "{ran:?}");
    let found = place.feed(&["--output", "json", "key", "identify"], "  second-foreign-key-5678\n").done();
    assert_eq!(found.parsed()[0]["hint"], "seco");
    assert_eq!(place.json(&["key", "list"])[0]["scheme"], "hmac-sha256");
    // After the pepper is changed, an import still recognizes keys whose digests use the earlier pepper.
    let (url, earlier) = (place.path().join("trustgate.db"), place.write("earlier", "pepper-hunter2-hunter2"));
    let other = Place::new()
        .with("TRUSTGATE__STORE__URL", &format!("sqlite://{}", url.display()))
        .with("TRUSTGATE__CREDENTIAL__PEPPER", "another-hunter2-hunter2")
        .with("TRUSTGATE__CREDENTIAL__PREVIOUS_PEPPER_FILES", earlier.to_str().unwrap());
    let again = ["--output", "json", "key", "import", "--trust", "acme", "--plaintext"];
    other.feed(&again, keys).failed(1, &["but the database records the pepper", "pepper use"]);
    other.run(&["pepper", "use"]).done();
    let again = other.feed(&again, &format!("{keys}third-foreign-key-9012\n")).done().parsed();
    assert_eq!((&again["imported"], &again["already_stored"]), (&json!(1), &json!(2)));
    let bad = place.feed(&["key", "import", "--trust", "acme", "--plaintext"], "short\nanother-foreign-key-9\n");
    let bad = bad.failed(1, &["line 1: expected a key of 16 to 512 visible ASCII characters"]);
    for secret in ["first-foreign-key", "second-foreign-key", "another-foreign", "pepper-hunter2-hunter2"] {
        for ran in [&ran, &found, &bad] {
            ran.hides(secret);
        }
    }
    // No database file contains a plaintext key.
    for file in fs::read_dir(place.path()).unwrap() {
        let content = fs::read(file.unwrap().path()).unwrap();
        assert!(!String::from_utf8_lossy(&content).contains("foreign-key"));
    }
}

#[test]
fn key_identify_reports_unknown_mistyped_and_foreign_keys() {
    let place = Place::migrated();
    let unknown = "tg_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp10Xwm86";
    for (input, result) in
        [(unknown, "unknown"), (&unknown.replace("86", "87"), "mistyped"), ("foreign-foreign-foreign", "foreign")]
    {
        let ran = place.feed(&["--output", "json", "key", "identify"], input);
        assert_eq!((ran.code, &ran.parsed()[0]["result"]), (1, &json!(result)), "{ran:?}");
        ran.hides(input);
    }
    let ran = place.feed(&["key", "identify"], "nothing here\n");
    assert!(ran.code == 1 && ran.out.contains("No key from this database was found"), "{ran:?}");
}

#[test]
fn only_serve_and_migrate_create_a_database() {
    let place = Place::new();
    let path = place.path().join("trustgate.db");
    let id = "00000000-0000-0000-0000-000000000001";
    for command in [
        &["trust", "list"][..],
        &["trust", "create", "a"],
        &["key", "show", id],
        &["key", "identify"],
        &["cache", "clear"],
    ] {
        let no_database = format!("error: no database at {}", path.display());
        let ways_out = ["trustgate serve", "trustgate migrate", "store.url is not set"];
        place.run(command).failed(1, &[&[no_database.as_str()], &ways_out[..]].concat());
        assert!(!path.exists(), "{command:?}");
    }
    place.write("t.toml", "\n[store]\nurl = \"sqlite:///nowhere/at/all.db\"");
    place
        .run(&["--config", "t.toml", "trust", "list"])
        .failed(1, &["no database at /nowhere/at/all.db", "store.url is set in t.toml:3"]);
    place.run(&["migrate"]).done();
    assert!(path.exists());
    place.run(&["migrate"]).done();
    assert_eq!(place.json(&["trust", "list"]), json!([]));
}

#[test]
fn an_unreachable_database_is_reported_without_its_password() {
    let url = "postgres://operator:url-hunter2@127.0.0.1:1/db";
    let place = Place::new().with("TRUSTGATE__STORE__URL", url);
    let ran = place.run(&["trust", "list"]).failed(1, &["store.url is set in TRUSTGATE__STORE__URL"]);
    ran.hides("hunter2");
    let place = Place::new().with("TRUSTGATE__STORE__URL", "sqlite://relative-hunter2.db");
    place.run(&["trust", "list"]).failed(1, &["store.url"]).hides("hunter2");
}

#[test]
fn commands_refuse_to_change_an_existing_table() {
    let place = Place::migrated();
    let url = format!("sqlite://{}", place.path().join("trustgate.db").display());
    place.write("t.toml", &format!("[store]\nurl = \"{url}\"\npreset = \"trust-table\"\n"));
    for command in [&["trust", "create", "acme"][..], &["key", "list"], &["migrate"], &["cache", "clear"]] {
        let ran = place.run(&[&["--config", "t.toml"], command].concat());
        ran.failed(1, &["which trustgate does not change", "store.preset is set in t.toml:3"]);
    }
}

#[test]
fn a_pepper_file_is_used_and_a_missing_pepper_file_is_an_error() {
    let place = Place::migrated().with("TRUSTGATE__CREDENTIAL__PEPPER_FILE", "pepper");
    place
        .run(&["trust", "list"])
        .failed(1, &["TRUSTGATE__CREDENTIAL__PEPPER_FILE: credential.pepper_file: cannot read pepper"]);
    place.write("pepper", "pepper-hunter2-hunter2\n");
    place.json(&["trust", "create", "acme"]);
    assert_eq!(place.json(&["key", "issue", "--trust", "acme"])["scheme"], "hmac-sha256");
}

#[test]
fn cache_clear_without_replicas_ends_at_once() {
    let place = Place::migrated();
    assert_eq!(place.run(&["cache", "clear"]).done().out, "effective: no replica is running\n");
    let cleared = place.json(&["cache", "clear"]);
    assert_eq!((&cleared["replicas"], &cleared["missing"]), (&json!(0), &json!([])));
}

#[test]
fn usage_errors_exit_with_code_2_and_say_what_is_expected() {
    let place = Place::new();
    for (command, text) in [
        (&["trsut", "list"][..], "trust"),
        (&["trust"], "create"),
        (&["key", "issue"], "--trust"),
        (&["key", "issue", "--trust", ""], "--trust"),
        (&["key", "issue", "--trust", "a", "--expires-in", "90"], "with its unit"),
        (&["key", "issue", "--trust", "a", "--allow-cidr", "nowhere"], "expected a network"),
        (&["--output", "xml", "trust", "list"], "table, json"),
    ] {
        place.run(command).failed(2, &[text]);
    }
    place.run(&["key", "show", "x"]).failed(2, &["expected the UUID of a key"]);
}

#[test]
fn each_command_has_help() {
    let place = Place::new();
    for command in [
        "",
        "serve",
        "migrate",
        "trust",
        "trust create",
        "trust list",
        "trust show",
        "trust enable",
        "trust disable",
        "trust delete",
        "key",
        "key issue",
        "key list",
        "key show",
        "key revoke",
        "key identify",
        "key import",
        "deny",
        "deny add",
        "deny list",
        "deny remove",
        "cache",
        "cache clear",
        "config",
        "config check",
        "config default",
        "check",
        "doctor",
        "completions",
    ] {
        let arguments: Vec<_> = command.split_whitespace().chain(["--help"]).collect();
        let help = place.run(&arguments).done().out;
        assert!(
            help.contains("Usage: trustgate") && help.contains("--config") && help.contains("--output"),
            "{command}: {help}"
        );
    }
    let version = place.run(&["--version"]).done().out;
    assert!(version.starts_with(concat!("trustgate ", env!("CARGO_PKG_VERSION"), " (")), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(place.run(&["completions", shell]).done().out.contains("trustgate"), "{shell}");
    }
}

#[test]
fn key_issue_reports_the_key_id_if_the_key_cannot_be_written() {
    let place = Place::migrated();
    place.run(&["trust", "create", "acme"]).done();
    for (output, command) in [("text", "key issue --trust acme"), ("json", "--output json key issue --trust acme")] {
        let ran = place.run_to_full_disk(&command.split(' ').collect::<Vec<_>>());
        let keys = place.json(&["key", "list"]);
        let id = keys[0]["id"].as_str().unwrap();
        assert_eq!(ran.code, 1, "{output}: {ran:?}");
        assert!(ran.err.contains("cannot write the output") && ran.err.contains(id), "{output}: {ran:?}");
        assert!(ran.err.contains("trustgate key revoke"), "{output}: {ran:?}");
    }
    let ran = place.run_to_full_disk(&["key", "list"]);
    assert!(ran.code == 1 && ran.err.contains("No space left"), "{ran:?}");
}

#[test]
fn a_pepper_has_the_same_effect_in_a_variable_and_in_a_file() {
    let place = Place::migrated();
    place.run(&["trust", "create", "acme"]).done();
    let pepper = "a-pepper-of-more-than-sixteen-bytes";
    let url = format!("sqlite://{}", place.path().join("trustgate.db").display());
    let other = || Place::new().with("TRUSTGATE__STORE__URL", &url);
    let issued = other()
        .with("TRUSTGATE__CREDENTIAL__PEPPER", &format!("{pepper}\n"))
        .json(&["key", "issue", "--trust", "acme"]);
    let file = place.write("pepper", &format!("\u{feff}{pepper}\r\n"));
    for other in [
        other().with("TRUSTGATE__CREDENTIAL__PEPPER", pepper),
        other().with("TRUSTGATE__CREDENTIAL__PEPPER_FILE", file.to_str().unwrap()),
    ] {
        let ran = other.feed(&["check"], issued["key"].as_str().unwrap());
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    let ran = other().with("TRUSTGATE__CREDENTIAL__PEPPER", "two\nlines").run(&["config", "check"]);
    assert!(ran.code != 0 && ran.out.contains("expected one line of text"), "{ran:?}");
}

#[test]
fn a_key_among_the_arguments_is_neither_shown_nor_stored() {
    let place = Place::migrated();
    place.run(&["trust", "create", "acme"]).done();
    let issued = place.json(&["key", "issue", "--trust", "acme"]);
    let key = issued["key"].as_str().unwrap();
    for command in
        [&["key", "revoke", key][..], &["trust", "create", key], &["key", "show", key], &["trust", "show", key]]
    {
        let ran = place.run(command);
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.err.contains("an argument is an API key"), "{ran:?}");
        ran.hides(key);
    }
    let ran = place.run(&["key", "issue", &format!("--trust={key}")]);
    assert_eq!(ran.code, 2);
    ran.hides(key);
    assert_eq!(place.json(&["trust", "list"]).as_array().unwrap().len(), 1);
}
