//! Reads `table.json` and replaces the placeholders in its rows with the keys of a fixture. The field `about` of the
//! file describes the other fields.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use trustgate::testing::ext_authz::identity;

use super::{
    fixture::{Fixture, TestKey},
    request::{Encoding, Request},
};

/// The contents of `table.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    #[serde(rename = "about")]
    _about: Vec<String>,
    /// The configuration of each server, by name, without the settings that all servers share.
    pub servers: BTreeMap<String, String>,
    /// The answer for each denial reason.
    denials: BTreeMap<String, Denial>,
    groups: Vec<Group>,
}

/// The answer that the client receives for a denial.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Denial {
    status: u16,
    code: i32,
    error: String,
    message: String,
}

/// Rows whose requests go to one server.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    #[serde(rename = "group")]
    name: String,
    server: Option<String>,
    rows: Vec<Row>,
}

/// A request and its expected answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    #[serde(rename = "row")]
    name: String,
    pub send: Send,
    pub want: Want,
    map: Option<Want>,
    not_envoy: Option<String>,
    envoy_refuses: Option<u16>,
    not_in_process: Option<String>,
}

/// The request of a row.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Send {
    method: Option<String>,
    path: Option<String>,
    from: Option<String>,
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    #[serde(default)]
    route: BTreeMap<String, String>,
    #[serde(default)]
    fillers: usize,
    message: Option<String>,
}

/// The expected answer of a row.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Want {
    status: u16,
    #[serde(rename = "as")]
    who: Option<String>,
    #[serde(default)]
    remove: Vec<String>,
    #[serde(default)]
    query: Vec<String>,
    cookie: Option<String>,
    path: Option<String>,
    #[serde(default)]
    stays: bool,
    pub reason: Option<String>,
    how: Option<String>,
    retry_after: Option<String>,
}

/// A row with its placeholders replaced: the complete request and the expected answers.
pub struct Expected {
    pub name: String,
    pub server: String,
    pub request: Request,
    pub not_in_process: Option<String>,
    not_envoy: Option<String>,
    envoy_refuses: Option<u16>,
    raw: Value,
    map: Value,
    path: String,
    stays: bool,
}

impl Table {
    pub fn read() -> Self {
        let table: Self = serde_json::from_str(include_str!("../table.json")).unwrap();
        for group in &table.groups {
            assert!(group.server.as_ref().is_none_or(|server| table.servers.contains_key(server)), "{}", group.name);
        }
        table
    }

    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.groups.iter().flat_map(|group| &group.rows)
    }

    pub fn denial(&self, reason: &str) -> &Denial {
        self.denials.get(reason).unwrap_or_else(|| panic!("there is no denial {reason:?}"))
    }

    /// Returns all rows, with their placeholders replaced with the keys of `fixture`.
    pub fn expanded_rows(&self, fixture: &Fixture) -> Vec<Expected> {
        let expand = |group: &Group, row: &Row| {
            let raw = self.answer(&row.want, fixture);
            let request = row.send.request(fixture);
            Expected {
                name: format!("{}: {}", group.name, row.name),
                server: group.server.clone().unwrap_or_else(|| "default".to_owned()),
                map: row.map.as_ref().map_or_else(|| raw.clone(), |want| self.answer(want, fixture)),
                path: row.want.path.clone().unwrap_or_else(|| request.path.clone()),
                stays: row.want.stays,
                not_in_process: row.not_in_process.clone(),
                not_envoy: row.not_envoy.clone(),
                envoy_refuses: row.envoy_refuses,
                request,
                raw,
            }
        };
        self.groups.iter().flat_map(|group| group.rows.iter().map(move |row| expand(group, row))).collect()
    }

    /// Returns the expected answer in the form that `answer::read` returns.
    fn answer(&self, want: &Want, fixture: &Fixture) -> Value {
        match (&want.who, &want.reason) {
            (Some(who), None) => granted(want, (who != "nobody").then(|| fixture.key(who))),
            (None, Some(reason)) => self.denied(want, reason),
            _ => panic!("a row must have either `as` or `reason`"),
        }
    }

    fn denied(&self, want: &Want, reason: &str) -> Value {
        let Denial { status, code, error, message } = self.denial(reason);
        assert_eq!(want.status, *status, "the status of a denial for {reason}");
        if want.how.as_deref() == Some("unavailable") {
            return json!({ "kind": "unavailable" });
        }
        let mut headers = Map::new();
        headers.insert("content-type".to_owned(), "application/json".into());
        headers.insert("cache-control".to_owned(), "no-store".into());
        match status {
            401 => drop(headers.insert("www-authenticate".to_owned(), "ApiKey".into())),
            503 => drop(headers.insert("retry-after".to_owned(), want.retry_after.as_deref().unwrap_or("1").into())),
            _ => {}
        }
        json!({
            "kind": want.how.as_deref().unwrap_or("denied"),
            "code": code,
            "status": status,
            "headers": headers,
            "body": { "error": error, "message": message },
            "metadata": { "reason": reason },
        })
    }
}

fn granted(want: &Want, key: Option<&TestKey>) -> Value {
    assert_eq!(want.status, 200);
    let mut set = Map::new();
    let mut remove = want.remove.clone();
    for header in identity::HEADERS {
        let value = key.map(|key| match header {
            "x-trust-id" => key.trust.clone(),
            "x-trust-key-id" => key.id.clone(),
            "x-trust-scopes" => key.scopes.join(" "),
            other => panic!("no expected value for {other}: add one here"),
        });
        match value.filter(|value| !value.is_empty()) {
            Some(value) => drop(set.insert(header.to_owned(), value.into())),
            None => remove.push(header.to_owned()),
        }
    }
    if let Some(rest) = &want.cookie {
        set.insert("cookie".to_owned(), rest.as_str().into());
    }
    remove.sort();
    let metadata = key.map_or_else(
        || json!({ "anonymous": true }),
        |key| json!({ "trust_id": key.trust, "key_id": key.id, "scopes": key.scopes }),
    );
    json!({ "kind": "ok", "code": 0, "set": set, "remove": remove, "query": want.query, "metadata": metadata })
}

impl Send {
    fn request(&self, fixture: &Fixture) -> Request {
        let text = |text: &str| String::from_utf8(fixture.expand(text)).unwrap();
        let fillers = (0..self.fillers).map(|number| (format!("x-filler-{number}"), b"f".to_vec()));
        Request {
            method: self.method.clone().unwrap_or_else(|| "GET".to_owned()),
            path: text(self.path.as_deref().unwrap_or("/things?page=2")),
            from: self.from.clone().unwrap_or_else(|| "127.0.0.1".to_owned()),
            headers: fillers
                .chain(self.headers.iter().map(|(name, value)| (name.clone(), fixture.expand(value))))
                .collect(),
            route: self.route.clone(),
            instead: self.message.as_ref().map(|message| fixture.expand(message)),
        }
    }
}

impl Expected {
    /// Returns the expected answer to a request in this encoding.
    pub fn want(&self, encoding: Encoding) -> &Value {
        match encoding {
            Encoding::Raw => &self.raw,
            Encoding::Map => &self.map,
        }
    }

    /// Returns the row in the form that the Python runners read, with bytes in base64.
    pub fn json(&self) -> Value {
        let Request { method, path, from, headers, route, instead } = &self.request;
        let encoded = |bytes: &Vec<u8>| BASE64_STANDARD.encode(bytes);
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name, encoded(value))).collect();
        json!({
            "name": self.name,
            "server": self.server,
            "method": method,
            "path": path,
            "from": from,
            "headers": headers,
            "route": route,
            "message": instead.as_ref().map(encoded),
            "want": { "raw": self.raw, "map": self.map },
            "path_left": self.path,
            "stays": self.stays,
            "not_envoy": self.not_envoy,
            "envoy_refuses": self.envoy_refuses,
        })
    }
}
