//! A real Prometheus reads the metrics, and its own checker has nothing to say against them.

use std::{
    io::Write as _,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::{
    fixture::Fixture,
    support::{
        eventually,
        grpc::CheckClient,
        http,
        process::{End, Guarded, directory, free_port, program},
        shared,
    },
};

const PATIENCE: Duration = Duration::from_secs(30);
const PACKAGE: &str = "prometheus";

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_scrapes_a_run_and_promtool_finds_nothing() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[]).await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for case in fixture.keys(7).await {
        assert_eq!(client.check(&case.key).await.trust_id, case.owner);
    }
    assert_eq!(client.check("key-that-nobody-issued").await.status, 401);

    let (_prometheus, address) = start(server.admin()).await;
    eventually("it has scraped", PATIENCE, || async { value(address, "up").await.as_deref() == Some("1") }).await;
    for (query, wanted) in [
        ("trustgate_checks_total{credential=\"key\",decision=\"allow\",reason=\"key\",transport=\"grpc\"}", "7"),
        ("trustgate_checks_total{credential=\"key\",decision=\"deny\",reason=\"unknown\",transport=\"grpc\"}", "1"),
        ("trustgate_check_duration_seconds_count", "8"),
        // A value whose version no poll confirms within a lease is not kept, so a busy machine may keep fewer than eight.
        ("trustgate_cache_entries > bool 0", "1"),
        ("trustgate_store_up", "1"),
        ("trustgate_redis_up", "1"),
        ("count(trustgate_build_info)", "1"),
    ] {
        eventually(query, PATIENCE, || async { value(address, query).await.as_deref() == Some(wanted) }).await;
    }

    let metrics = http::get(server.admin(), "/metrics", &[]).await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let mut promtool = Command::new(program(&["promtool"], PACKAGE))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(metrics.body.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    let said = [checked.stdout, checked.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert_eq!((checked.status.code(), said.as_str()), (Some(0), ""));
}

#[test]
fn the_alerts_are_rules_and_raise_the_alarm_when_they_should() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (kind, file) in [("check", "docs/alerts.yaml"), ("test", "tests/e2e/alerts.yaml")] {
        let ran =
            Command::new(program(&["promtool"], PACKAGE)).args([kind, "rules"]).arg(root.join(file)).output().unwrap();
        let said = [ran.stdout, ran.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert!(ran.status.success() && said.contains("SUCCESS"), "{file}: {said}");
    }
}

/// A Prometheus that scrapes `target`.
async fn start(target: SocketAddr) -> (Guarded, SocketAddr) {
    for _ in 0..10 {
        let (dir, address) = (directory("prometheus"), SocketAddr::from(([127, 0, 0, 1], free_port())));
        let config = dir.join("prometheus.yml");
        let text = format!(
            "scrape_configs:\n- job_name: trustgate\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n  \
             static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::write(&config, text).unwrap();
        let words = [
            program(&["prometheus"], PACKAGE).display().to_string(),
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", dir.join("data").display()),
            format!("--web.listen-address={address}"),
        ];
        let prometheus = Guarded::start_to(End::Kill, &dir, &words);
        let ready = prometheus.until(async || http::try_get(address, "/-/ready").await.filter(|it| it.status == 200));
        if ready.await.is_some() {
            return (prometheus, address);
        }
        // Somebody else took the port.
        assert!(prometheus.log().contains("address already in use"), "{}", prometheus.log());
    }
    panic!("Prometheus does not start");
}

/// The one value that `query` gives at the moment.
async fn value(prometheus: SocketAddr, query: &str) -> Option<String> {
    let encoded = utf8_percent_encode(query, NON_ALPHANUMERIC);
    let answer = http::get(prometheus, &format!("/api/v1/query?query={encoded}"), &[]).await.body;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let result = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}"));
    assert!(result.len() < 2, "{query}: {answer}");
    result.first()?["value"][1].as_str().map(str::to_owned)
}
