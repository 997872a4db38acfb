//! A real Prometheus scrapes the metrics, and its tool `promtool` checks them and the documented alerts.

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
async fn prometheus_scrapes_the_metrics_and_promtool_reports_no_problem() {
    let _turn = shared().await;
    let fixture = Fixture::new(&[]).await;
    let server = fixture.test_config.serve().await;
    let client = CheckClient::connect(server.grpc()).await;
    for case in fixture.keys(7).await {
        assert_eq!(client.check(&case.key).await.trust_id, case.trust_id);
    }
    assert_eq!(client.check("key-that-was-not-issued").await.status, 401);

    let (_prometheus, address) = start(server.admin()).await;
    eventually("Prometheus has scraped the server", PATIENCE, || async {
        value(address, "up").await.as_deref() == Some("1")
    })
    .await;
    for (query, wanted) in [
        ("trustgate_checks_total{credential=\"key\",decision=\"allow\",reason=\"key\",transport=\"grpc\"}", "7"),
        ("trustgate_checks_total{credential=\"key\",decision=\"deny\",reason=\"unknown\",transport=\"grpc\"}", "1"),
        ("trustgate_check_duration_seconds_count", "8"),
        // L1 keeps an entry only after a poll has confirmed the version of the entry within a lease, so on a busy
        // machine there may be fewer than eight entries.
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
    let output = [checked.stdout, checked.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert_eq!((checked.status.code(), output.as_str()), (Some(0), ""));
}

#[test]
fn the_documented_alerts_are_valid_and_fire_when_they_should() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (kind, file) in [("check", "docs/alerts.yaml"), ("test", "tests/e2e/alerts.yaml")] {
        let ran =
            Command::new(program(&["promtool"], PACKAGE)).args([kind, "rules"]).arg(root.join(file)).output().unwrap();
        let output = [ran.stdout, ran.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert!(ran.status.success() && output.contains("SUCCESS"), "{file}: {output}");
    }
}

/// Starts a Prometheus that scrapes `target`; returns the process and its address.
async fn start(target: SocketAddr) -> (Guarded, SocketAddr) {
    for _ in 0..10 {
        let (dir, address) = (directory("prometheus"), SocketAddr::from(([127, 0, 0, 1], free_port())));
        let config = dir.join("prometheus.yml");
        let text = format!(
            "scrape_configs:\n- job_name: trustgate\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n  \
             static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::write(&config, text).unwrap();
        let command = [
            program(&["prometheus"], PACKAGE).display().to_string(),
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", dir.join("data").display()),
            format!("--web.listen-address={address}"),
        ];
        let prometheus = Guarded::start_with_end(End::Kill, &dir, &command);
        let ready = prometheus.until(async || http::try_get(address, "/-/ready").await.filter(|it| it.status == 200));
        if ready.await.is_some() {
            return (prometheus, address);
        }
        // Another process took the port first, so try another port.
        assert!(prometheus.log().contains("address already in use"), "{}", prometheus.log());
    }
    panic!("Prometheus does not start");
}

/// Returns the current result of `query`, which must have at most one value.
async fn value(prometheus: SocketAddr, query: &str) -> Option<String> {
    let encoded = utf8_percent_encode(query, NON_ALPHANUMERIC);
    let answer = http::get(prometheus, &format!("/api/v1/query?query={encoded}"), &[]).await.body;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let result = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}"));
    assert!(result.len() < 2, "{query}: {answer}");
    result.first()?["value"][1].as_str().map(str::to_owned)
}
