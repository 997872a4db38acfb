//! The demands of a route and of its virtual host, which Envoy merges before it sends the check.

use crate::support::{
    envoy::Plan,
    http,
    server::{IssuedKey, Server, TestConfig},
    shared,
};

/// Starts a server and issues two keys: the first without scopes, the second with the scope `admin`.
async fn server() -> (TestConfig, Server, IssuedKey, IssuedKey) {
    let test_config = TestConfig::new();
    test_config.migrate().await;
    test_config.trust("acme").await;
    let keys = (test_config.issue("acme", &[]).await, test_config.issue("acme", &["--scope", "admin"]).await);
    let server = test_config.serve().await;
    (test_config, server, keys.0, keys.1)
}

/// The demands of the route `/admin` in the shipped configuration.
const ADMIN: &str = "context_extensions: {trustgate.scopes: \"admin\", trustgate.freshness: \"live\"}";

/// Returns the shipped configuration with the context extensions `virtual_host` on the virtual host, and with the
/// demands `admin` in place of [`ADMIN`].
async fn plan(server: &Server, virtual_host: &str, admin: &str) -> Plan {
    let domains = "              domains: [\"*\"]\n";
    let extensions = format!(
        "{domains}              typed_per_filter_config:\n                envoy.filters.http.ext_authz:\n                  \
         \"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute\n                  \
         check_settings: {{context_extensions: {{{virtual_host}}}}}\n"
    );
    Plan::new(http::application().await, &[server.grpc()])
        .replace(domains, &extensions)
        .replace(ADMIN, &format!("context_extensions: {{{admin}}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_with_scopes_denies_anonymous_requests_that_its_virtual_host_allows() {
    let _turn = shared().await;
    let (_test_config, server, plain, admin) = server().await;
    let envoy = plan(&server, "trustgate.optional: \"true\"", "trustgate.scopes: \"admin\"").await.start().await;
    envoy.until_healthy(server.grpc()).await;
    let status = async |path: &str, headers: &[(&str, &str)]| envoy.get(path, headers).await.status;
    assert_eq!(status("/things", &[]).await, 200, "the virtual host makes credentials optional");
    assert_eq!(status("/admin/a", &[]).await, 401);
    assert_eq!(status("/admin/a", &[("x-api-key", &plain.key)]).await, 403);
    assert_eq!(status("/admin/a", &[("x-api-key", &admin.key)]).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_demand_is_a_fault_and_the_log_quotes_it() {
    let _turn = shared().await;
    for (demand, quoted) in [
        ("trustgate.scopes: \"\"", "\\\"trustgate.scopes\\\" with the value \\\"\\\""),
        ("trustgate.scope: \"read\"", "\\\"trustgate.scope\\\" with the value \\\"read\\\""),
        ("Trustgate.Scopes: \"read\"", "\\\"Trustgate.Scopes\\\" with the value \\\"read\\\""),
    ] {
        let (_test_config, server, _, admin) = server().await;
        // In the first case Envoy replaces the scopes of the virtual host with the route's empty list. The server must
        // not read that list as "no scopes required".
        let envoy = plan(&server, "trustgate.scopes: \"admin\"", demand).await.start().await;
        envoy.until_healthy(server.grpc()).await;
        let key = [("x-api-key", admin.key.as_str())];
        assert_eq!(envoy.get("/things", &key).await.status, 200);
        assert_eq!(envoy.get("/admin/a", &key).await.status, 503, "{demand}");
        server.until_logged(quoted).await;
    }
}
