//! The servers that the table needs: one for each configuration in the table. All servers use one database, which has
//! a key of each kind.

use std::{collections::BTreeMap, io::Write as _, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::RwLockReadGuard;
use trustgate::testing::{
    config::{self, Config, Purpose},
    ext_authz::{
        check::Checker,
        credential::{CredentialSettings, Hasher, Source, format},
    },
    manage::{Manager, import::LineForm, keys::Wanted},
    record::KeyId,
    server::{AppBuilder, Delay, Running},
    store::{
        self, Actor, StoreSettings,
        ledger::{NewKey, TrustRef},
    },
};

use super::rows::Table;
use crate::support::shared;

/// The settings that all of these servers share. The timeouts are long, so that a slow machine does not change an
/// answer.
const SETTINGS: [(&str, &str); 6] = [
    ("TRUSTGATE__GRPC__LISTEN", "127.0.0.1:0"),
    ("TRUSTGATE__ADMIN__LISTEN", "127.0.0.1:0"),
    ("TRUSTGATE__STORE__READ_TIMEOUT", "8s"),
    ("TRUSTGATE__DECISION__DEADLINE", "9s"),
    ("TRUSTGATE__DECISION__ENVOY_TIMEOUT", "10s"),
    ("TRUSTGATE__FRESHNESS__LEASE", "1m"),
];

/// The running servers, and the keys that the table uses.
pub struct Fixture {
    servers: BTreeMap<String, (Running, Config)>,
    keys: BTreeMap<&'static str, TestKey>,
    _dir: TempDir,
    _turn: RwLockReadGuard<'static, ()>,
}

/// A key that the table uses. A key that does not exist in the database has only a secret.
#[derive(Clone, Debug, Default)]
pub struct TestKey {
    pub secret: String,
    pub id: String,
    pub trust: String,
    pub scopes: Vec<String>,
}

impl Fixture {
    /// Starts all servers.
    pub async fn start() -> Self {
        Self::of(|_| true).await
    }

    /// Starts the servers whose names `wanted` accepts.
    pub async fn of(wanted: impl Fn(&str) -> bool) -> Self {
        let (turn, dir) = (shared().await, tempfile::tempdir().unwrap());
        let table = Table::read();
        let configs = table.servers.iter().map(|(name, more)| (name.clone(), load_config(dir.path(), more)));
        let configs: BTreeMap<String, Config> = configs.collect();
        store::migrate(&configs["default"].store, &|_| None).await.unwrap();
        let keys = KeyFactory { store: configs["default"].store.clone() }.create(&configs["pepper"].credential).await;
        let mut servers = BTreeMap::new();
        for (name, config) in configs.into_iter().filter(|(name, _)| wanted(name)) {
            let running = AppBuilder::new(config.clone(), &|_| None).unwrap().start().await.unwrap();
            servers.insert(name, (running, config));
        }
        for (running, _) in servers.values() {
            running.ready().await;
        }
        Self { servers, keys, _dir: dir, _turn: turn }
    }

    /// Stops all servers and asserts that none of them reports an error.
    pub async fn stop(self) {
        for (running, _) in self.servers.into_values() {
            running.stop(Delay::None).await.unwrap();
        }
    }

    pub fn checker(&self, server: &str) -> Arc<Checker> {
        self.servers[server].0.checker()
    }

    pub fn address(&self, server: &str) -> SocketAddr {
        self.servers[server].0.grpc_address().unwrap()
    }

    pub fn key(&self, name: &str) -> &TestKey {
        self.keys.get(name).unwrap_or_else(|| panic!("there is no key {name:?}"))
    }

    /// Returns the secrets of all keys, which the application must not receive.
    pub fn secrets(&self) -> Vec<&str> {
        self.keys.values().map(|key| key.secret.as_str()).collect()
    }

    /// Returns the servers for the Python runners: for each server, the port, and the headers that its answers may
    /// change in addition to the identity headers.
    pub fn servers(&self) -> Value {
        let header = |source: &Source| match source {
            Source::Header(name) => Some(name.clone()),
            Source::Authorization(_) => Some("authorization".to_owned()),
            Source::Cookie(_) => Some("cookie".to_owned()),
            Source::Query(_) => None,
        };
        let one = |(running, config): &(Running, Config)| {
            let headers: Vec<_> = config.credential.sources.iter().filter_map(header).collect();
            json!({ "port": running.grpc_address().unwrap().port(), "credential_headers": headers })
        };
        self.servers.iter().map(|(name, server)| (name.clone(), one(server))).collect()
    }

    /// Replaces the placeholders and escapes in `text`.
    pub fn expand(&self, text: &str) -> Vec<u8> {
        let mut expanded = Vec::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find(['{', '\\']) {
            expanded.extend_from_slice(&rest.as_bytes()[..at]);
            rest = &rest[at..];
            if let Some(escape) = rest.strip_prefix("\\x") {
                expanded.push(u8::from_str_radix(&escape[..2], 16).unwrap());
                rest = &escape[2..];
            } else {
                let (name, after) = rest[1..].split_once('}').unwrap();
                expanded.extend(self.placeholder(name));
                rest = after;
            }
        }
        expanded.extend_from_slice(rest.as_bytes());
        expanded
    }

    fn placeholder(&self, name: &str) -> Vec<u8> {
        if let Some(length) = name.strip_prefix("pad:") {
            return vec![b'p'; length.parse().unwrap()];
        }
        let (name, part) = name.split_once('.').unwrap_or((name, ""));
        let TestKey { secret, id, trust, .. } = self.key(name);
        match part {
            "" => secret.clone().into_bytes(),
            "id" => id.clone().into_bytes(),
            "trust" => trust.clone().into_bytes(),
            "digest" => Hasher::new(None, &[]).current(secret.as_bytes()).to_hex().into_bytes(),
            "encoded" => percent_encode(secret.as_bytes(), NON_ALPHANUMERIC).to_string().into_bytes(),
            other => panic!("a key has no {other:?}"),
        }
    }
}

fn load_config(dir: &Path, more: &str) -> Config {
    let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
    file.write_all(more.as_bytes()).unwrap();
    let url = format!("sqlite://{}/trustgate.db", dir.display());
    let settings = SETTINGS.into_iter().chain([("TRUSTGATE__STORE__URL", url.as_str())]);
    let settings = settings.map(|(name, value)| (name.into(), value.into()));
    config::load(Some(file.path()), settings, Purpose::Serve).unwrap_or_else(|error| panic!("{error}"))
}

/// Creates the keys that the table uses.
struct KeyFactory {
    store: StoreSettings,
}

impl KeyFactory {
    async fn create(&self, peppered: &CredentialSettings) -> BTreeMap<&'static str, TestKey> {
        let plain = CredentialSettings::default();
        let mut manager = self.manager(&plain).await;
        for trust in ["alpha", "beta", "disabled", "deleted"] {
            manager.create_trust(trust).await.unwrap();
        }
        let mut keys = BTreeMap::new();
        for (name, wanted) in [
            ("good", wanted("alpha")),
            ("other", wanted("beta")),
            ("scoped", Wanted { scopes: ["read", "write"].map(str::to_owned).to_vec(), ..wanted("alpha") }),
            (
                "cidr",
                Wanted {
                    allowed_cidrs: ["127.1.0.0/16", "10.0.0.0/8", "2001:db8::/32"]
                        .map(|cidr| cidr.parse().unwrap())
                        .to_vec(),
                    ..wanted("alpha")
                },
            ),
            ("revoked", wanted("alpha")),
            ("expired", Wanted { expires_in: Some(Duration::from_micros(1)), ..wanted("alpha") }),
            ("expiring", Wanted { expires_in: Some(Duration::from_hours(1)), ..wanted("beta") }),
            ("disabled", wanted("disabled")),
            ("deleted", wanted("deleted")),
        ] {
            keys.insert(name, issue(&mut manager, wanted).await);
        }
        manager.revoke_key(KeyId(keys["revoked"].id.parse().unwrap())).await.unwrap();
        manager.enable_trust(&trust_named("disabled"), false).await.unwrap();
        manager.delete_trust(&trust_named("deleted"), true).await.unwrap();
        let longest = "l".repeat(512);
        for (name, secret) in
            [("foreign", "sk/live+AbCd==0123~456!"), ("shortest", "sixteen-bytes-ok"), ("longest", longest.as_str())]
        {
            keys.insert(name, import(&mut manager, secret).await);
        }
        keys.insert("not_yet", self.not_yet().await);
        keys.insert("peppered", self.peppered(peppered).await);
        let unknown = format::generate(&plain.prefix).unwrap().expose().to_owned();
        let last = if keys["good"].secret.ends_with('0') { "1" } else { "0" };
        let mistyped = keys["good"].secret[..51].to_owned() + last;
        keys.insert("unknown", TestKey { secret: unknown, ..TestKey::default() });
        keys.insert("mistyped", TestKey { secret: mistyped, ..TestKey::default() });
        keys
    }

    async fn manager(&self, credential: &CredentialSettings) -> Manager {
        let ledger = store::open_ledger(&self.store, &|_| None).await.unwrap();
        Manager::new(ledger, actor(), credential.clone()).unwrap()
    }

    /// Adds a key that is hashed with a pepper that the database does not record, like a key from an earlier release.
    /// Servers without the pepper deny the key.
    async fn peppered(&self, credential: &CredentialSettings) -> TestKey {
        let mut ledger = store::open_ledger(&self.store, &|_| None).await.unwrap();
        let hasher = credential.hasher().unwrap();
        let secret = format::generate(&credential.prefix).unwrap();
        let new = new_key(&hasher, secret.expose());
        let key = ledger
            .add_key(
                &actor(),
                &trust_named("beta"),
                NewKey { made: trustgate::testing::record::Made::Elsewhere, ..new },
            )
            .await
            .unwrap();
        test_key(secret.expose(), &key)
    }

    /// Adds a key that becomes valid after 24 hours. No command creates such a key, so this function writes to the
    /// ledger directly.
    async fn not_yet(&self) -> TestKey {
        let mut ledger = store::open_ledger(&self.store, &|_| None).await.unwrap();
        let (credential, hasher) = (CredentialSettings::default(), Hasher::new(None, &[]));
        let secret = format::generate(&credential.prefix).unwrap();
        let not_before = Some(ledger.now().await.unwrap().after(Duration::from_hours(24)));
        let new = NewKey { not_before, ..new_key(&hasher, secret.expose()) };
        let key = ledger.add_key(&actor(), &trust_named("alpha"), new).await.unwrap();
        test_key(secret.expose(), &key)
    }
}

fn new_key(hasher: &Hasher, secret: &str) -> NewKey {
    NewKey {
        id: KeyId(uuid::Uuid::new_v4()),
        digest: hasher.current(secret.as_bytes()),
        older: Vec::new(),
        made: hasher.made(),
        hint: secret[..8].to_owned(),
        name: None,
        scopes: Vec::new(),
        allowed_cidrs: Vec::new(),
        not_before: None,
        expires_in: None,
    }
}

fn actor() -> Actor {
    Actor("table".to_owned())
}

fn trust_named(trust: &str) -> TrustRef {
    TrustRef::Name(trust.to_owned())
}

fn wanted(trust: &str) -> Wanted {
    Wanted { trust: trust_named(trust), name: None, scopes: Vec::new(), allowed_cidrs: Vec::new(), expires_in: None }
}

async fn issue(manager: &mut Manager, wanted: Wanted) -> TestKey {
    let issued = manager.issue_key(wanted).await.unwrap();
    test_key(issued.secret.expose(), &issued.key)
}

async fn import(manager: &mut Manager, secret: &str) -> TestKey {
    manager.import_keys(&trust_named("beta"), LineForm::Plaintext, secret.as_bytes(), |_| ()).await.unwrap();
    let (found, _) = manager.identify_keys(secret).await.unwrap();
    test_key(secret, found[0].key.as_ref().unwrap())
}

fn test_key(secret: &str, key: &store::ledger::KeyDetails) -> TestKey {
    TestKey {
        secret: secret.to_owned(),
        id: key.id.0.to_string(),
        trust: key.trust_id.0.to_string(),
        scopes: key.scopes.clone(),
    }
}
