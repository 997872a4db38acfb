//! Tests the configuration file and its errors, as an operator sees them on the command line.

use crate::program::Place;

const SECRETS: [&str; 3] = ["pepper-hunter2-hunter2", "password-hunter2", "url-hunter2"];

#[test]
fn config_check_lists_every_error_with_its_location_and_without_its_value() {
    let place = Place::new().with("TRUSTGATE__CREDENTIAL__PEPPER", SECRETS[0]).with("TRUSTGATE__CACHE__SZIE", "1GiB");
    place.write(
        "trustgate.toml",
        &format!(
            "[grpc]\nlisten = \"nowhere\"\n[store]\nurl = \"mysql://root:{}@host/db\"\npassword = \"{}\"\npool = 5\n\
             [credential]\npepper_file = \"/nowhere/pepper\"\n[decision]\ndeadline = \"1s\"\n[redsi]\n",
            SECRETS[2], SECRETS[1]
        ),
    );
    let command = ["--config", "trustgate.toml", "config", "check"];
    let ran = place.run(&command);
    assert_eq!((ran.code, ran.err.as_str()), (1, ""), "{ran:?}");
    for text in [
        "the configuration has 8 errors:",
        "trustgate.toml:2: grpc.listen: expected an address with its port",
        "trustgate.toml:4: store.url: expected sqlite:///",
        "trustgate.toml:6: store.pool: there is no such setting",
        "trustgate.toml:8: credential.pepper_file: credential.pepper is also set (TRUSTGATE__CREDENTIAL__PEPPER)",
        "trustgate.toml:8: credential.pepper_file: cannot read /nowhere/pepper",
        "trustgate.toml:10: decision.deadline: decision.deadline (1s) must be shorter than decision.envoy_timeout (200ms)",
        "trustgate.toml:11: redsi: there is no such section; did you mean [redis]?",
        "TRUSTGATE__CACHE__SZIE: there is no such setting; did you mean TRUSTGATE__CACHE__SIZE?",
    ] {
        assert!(ran.out.contains(text), "no {text:?} in {}", ran.out);
    }
    let json = place.run(&[&["--output", "json"], &command[..]].concat());
    assert_eq!((json.code, json.parsed()["mistakes"].as_array().unwrap().len()), (1, 8), "{json:?}");
    let other =
        place.run(&["--config", "trustgate.toml", "trust", "list"]).failed(1, &["the configuration has 8 errors"]);
    for secret in SECRETS {
        for ran in [&ran, &json, &other] {
            ran.hides(secret);
        }
    }
}

#[test]
fn the_configuration_file_named_by_an_option_or_a_variable_must_exist() {
    let place = Place::new().with("TRUSTGATE_CONFIG", "other.toml");
    place
        .run(&["config", "check"])
        .failed(1, &["cannot read the configuration file other.toml (named by TRUSTGATE_CONFIG)"]);
    place.run(&["--config", "mine.toml", "config", "check"]).failed(1, &["mine.toml (named by --config)"]);
    place.write("other.toml", "[cache]\nsize = \"1GiB\"\n");
    assert_eq!(place.run(&["config", "check"]).done().out, "ok\n");
    assert_eq!(place.json(&["config", "check"])["ok"], true);
}

#[test]
fn the_file_that_config_default_prints_is_valid() {
    let place = Place::new();
    place.write("trustgate.toml", &place.run(&["config", "default"]).done().out);
    assert_eq!(place.run(&["config", "check", "--config", "trustgate.toml"]).done().out, "ok\n");
    let described = place.json(&["config", "default"]);
    let listen = described.as_array().unwrap().iter().find(|one| one["setting"] == "grpc.listen").unwrap();
    assert_eq!(
        (&listen["variable"], &listen["default"]),
        (&"TRUSTGATE__GRPC__LISTEN".into(), &"127.0.0.1:50051".into())
    );
}
