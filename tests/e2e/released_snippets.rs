//! Operators have copied the Envoy configurations of earlier releases, so these configurations must work with the
//! current server. Another test checks `credential.query_removal = "exact"`, which needs one change to the shipped
//! configuration.

use crate::support::{envoy::Plan, http, server::TestConfig, shared};

/// Released configurations, each with a description of the later change that it lacks.
const RELEASED: [(&str, &str); 1] =
    [("before identity headers were allowed by their prefix", include_str!("released/envoy-1.yaml"))];

#[tokio::test(flavor = "multi_thread")]
async fn every_released_envoy_configuration_works_with_the_current_server() {
    let _turn = shared().await;
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let (plain, admin) = (test_config.issue("acme", &[]).await, test_config.issue("acme", &["--scope", "admin"]).await);
    let server = test_config.serve().await;
    for (name, config) in RELEASED {
        let envoy = Plan::of(config, http::application().await, &[server.grpc()]).start().await;
        envoy.until_healthy(server.grpc()).await;
        let forged = [("x-api-key", admin.key.as_str()), ("x-trust-id", "forged"), ("x-trust-scopes", "forged")];
        let granted = envoy.get("/admin/a", &forged).await;
        assert_eq!(granted.status, 200, "{name}: {granted:?}");
        assert_eq!(granted.saw("x-trust-id").as_ref(), Some(&admin.trust_id), "{name}");
        assert_eq!(granted.saw("x-trust-scopes").as_deref(), Some("admin"), "{name}");
        assert_eq!(granted.saw("x-api-key"), None, "{name}: the application gets the key");
        assert_eq!(envoy.get("/admin/a", &[("x-api-key", &plain.key)]).await.status, 403, "{name}");
        assert_eq!(envoy.get("/", &[]).await.status, 401, "{name}");
        assert_eq!(envoy.get("/public/a", &[]).await.status, 200, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_query_removal_leaves_the_other_query_parameters_unchanged() {
    let _turn = shared().await;
    let test_config =
        TestConfig::new().with("credential.sources", "query:key").with("credential.query_removal", "exact");
    test_config.migrate().await;
    test_config.trust("acme").await;
    let key = test_config.issue("acme", &[]).await;
    let server = test_config.serve().await;
    let allowed = "(x-trust-[a-z-]+|x-api-key)";
    let plan = Plan::new(http::application().await, &[server.grpc()]);
    let envoy = plan.replace(allowed, "(x-trust-[a-z-]+|x-api-key|:path)").start().await;
    envoy.until_healthy(server.grpc()).await;
    for (query, left) in [
        ("z=1&a=2&key=K&m=3", "/things?z=1&a=2&m=3"),
        ("flag&key=K", "/things?flag"),
        ("key=K&param[0:1:0]", "/things?param[0:1:0]"),
        ("&&a=1&&key=K&", "/things?&&a=1&&"),
        ("key=K", "/things"),
    ] {
        let seen = envoy.get(&format!("/things?{}", query.replace('K', &key.key)), &[]).await;
        let seen: serde_json::Value = serde_json::from_str(&seen.body).unwrap_or_else(|_| panic!("{query}: {seen:?}"));
        assert_eq!(seen["path"], left, "{query}");
    }
}
