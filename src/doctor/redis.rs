//! What can be found out about Redis from here, for `doctor`: one finding for each of [`NAMES`].
//!
//! Goes the way that `serve` goes, and changes nothing: what would write is sent so that there is nothing to write. A
//! hint on the replicas' channel makes each of them poll once.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, future::join_all};
use redis::{Cmd, ConnectionAddr, ErrorKind, RedisError, Value};
use tokio::time::timeout;
use uuid::Uuid;

use super::diagnosis::{Diagnosis, Times, complete, located, milliseconds, resolve};
use crate::{
    base::clock::Clock,
    redis::{
        CONNECT_TIMEOUT, Connection, Link as _, RedisSettings, connection::servers, notifications::CHANNEL, timed_out,
    },
};

/// The examinations of Redis, in order.
pub const NAMES: &[&str] = &[ADDRESS, CONNECTION, COMMANDS, HINTS];

const ADDRESS: &str = "redis_address";
const CONNECTION: &str = "redis_connection";
const COMMANDS: &str = "redis_commands";
const HINTS: &str = "redis_hints";

/// The settings that hold the URL.
const URL: &[&str] = &["redis.url", "redis.url_file"];
/// How often what is measured is done.
const ROUNDS: usize = 20;
/// How long one answer may take: longer than anybody waits for it, so that slow can be told from never.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a hint may take to be of any use.
const HINT: Duration = Duration::from_secs(1);

/// Examines Redis as `settings` say; hints only where they are used.
pub async fn diagnose(settings: &RedisSettings, hints: bool, clock: &dyn Clock) -> Vec<Diagnosis> {
    if !settings.is_configured() {
        return complete(NAMES, Vec::new(), "redis.url is not set: Redis is not used");
    }
    let mut diagnoses = Vec::new();
    let because = look(settings, hints, clock, &mut diagnoses).await.err().unwrap_or_default();
    complete(NAMES, diagnoses, &because)
}

/// Examines one thing after another.
///
/// # Errors
/// Why the rest cannot be examined.
async fn look(
    settings: &RedisSettings,
    hints: bool,
    clock: &dyn Clock,
    diagnoses: &mut Vec<Diagnosis>,
) -> Result<(), String> {
    match address(settings).await {
        Ok(found) => diagnoses.push(Diagnosis::ok(ADDRESS, found)),
        Err(problem) => {
            let remedy = "correct the host in the URL, or the resolver of this machine; until then replicas share \
                          nothing, and the database answers what they do not hold";
            diagnoses.push(Diagnosis::failed(ADDRESS, problem, remedy).about(URL));
            return Err(format!("because of {ADDRESS}"));
        }
    }
    let began = clock.now();
    let mut connection = match within(CONNECT_TIMEOUT, settings.connect()).await {
        Ok(connection) => connection,
        Err(error) => {
            diagnoses.push(unconnected(&error));
            return Err(format!("because of {CONNECTION}"));
        }
    };
    let took = clock.now().since(began);
    match pings(&mut connection, settings, clock).await {
        Ok(times) => diagnoses.push(judged(&mut connection, settings, took, &times).await),
        Err(error) => {
            let remedy = "find out what keeps Redis, or the network before it, from answering";
            diagnoses.push(Diagnosis::failed(CONNECTION, format!("connected, but: {error}"), remedy).about(URL));
            return Err(format!("because of {CONNECTION}"));
        }
    }
    diagnoses.push(commands(&mut connection).await);
    diagnoses.push(if hints {
        hint(&mut connection, settings, clock).await
    } else {
        Diagnosis::skipped(HINTS, "freshness.hints is false").about(&["freshness.hints"])
    });
    Ok(())
}

/// Where the servers are, in words; each must be somewhere.
async fn address(settings: &RedisSettings) -> Result<String, String> {
    let servers = servers(settings).map_err(|error| error.to_string())?;
    let found = join_all(servers.iter().map(|server| resolved(server.addr()))).await;
    Ok(found.into_iter().collect::<Result<Vec<_>, _>>()?.join("; "))
}

async fn resolved(address: &ConnectionAddr) -> Result<String, String> {
    let (host, port, tls) = match address {
        ConnectionAddr::Tcp(host, port) => (host, *port, "without TLS"),
        ConnectionAddr::TcpTls { host, port, .. } => (host, *port, "with TLS"),
        other => return Ok(other.to_string()),
    };
    let addresses = resolve((host.as_str(), port), CONNECT_TIMEOUT).await?;
    Ok(format!("{}, port {port}, {tls}", located(host, &addresses)))
}

fn unconnected(error: &RedisError) -> Diagnosis {
    let refused = error.kind() == ErrorKind::AuthenticationFailed
        || matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "NOPERM"));
    let remedy = if refused {
        "correct the user in the URL or its password (redis.password_file, redis.password, the URL)"
    } else {
        "start Redis, and let this machine reach its port; with rediss:// its certificate must be of an authority that \
         is trusted (redis.ca_file), for the host in the URL. Until then the database answers what replicas do not hold"
    };
    Diagnosis::failed(CONNECTION, said(error), remedy).about(URL)
}

async fn pings(connection: &mut Connection, settings: &RedisSettings, clock: &dyn Clock) -> Result<Times, RedisError> {
    let mut times = Vec::new();
    // What never comes in time is known before all are sent.
    for _ in 0..ROUNDS {
        let sent_at = clock.now();
        within(ANSWER, connection.ping()).await?;
        times.push(clock.now().since(sent_at));
        let late = times.iter().filter(|took| **took >= settings.timeout).count();
        if late > LATE_MAX {
            break;
        }
    }
    Ok(Times::new(times))
}

/// After so many late answers no more are asked for.
const LATE_MAX: usize = 4;

async fn judged(connection: &mut Connection, settings: &RedisSettings, took: Duration, times: &Times) -> Diagnosis {
    const SETTING: &[&str] = &["redis.timeout"];
    // Every user may send it, whatever else it may not.
    let hello = ask::<BTreeMap<String, Value>>(connection, redis::cmd("HELLO")).await.unwrap_or_default();
    let word = |name: &str| hello.get(name).and_then(|value| redis::from_redis_value_ref::<String>(value).ok());
    let server = word("server").unwrap_or_else(|| "a server".to_owned());
    let version = word("version").unwrap_or_else(|| "of unknown version".to_owned());
    let found = format!("{server} {version}, after {}; PING {}", milliseconds(took), times.beside(settings.timeout));
    if word("role").is_some_and(|role| role == "replica" || role == "slave") && !settings.cluster {
        let remedy = "lead the URL to the master, or set redis.sentinel_master: a replica takes no values";
        return Diagnosis::failed(CONNECTION, format!("a replica: {found}"), remedy).about(URL);
    }
    let remedy = "bring Redis nearer to `serve`, find out what holds it up, or raise redis.timeout: an answer that \
                  comes later costs a read of the database";
    if times.median() >= settings.timeout {
        Diagnosis::failed(CONNECTION, found, remedy).about(SETTING)
    } else if times.longest() >= settings.timeout {
        Diagnosis::warning(CONNECTION, found, remedy).about(SETTING)
    } else {
        Diagnosis::ok(CONNECTION, found)
    }
}

/// Whether the user may send what `serve` sends: each command so that it finds nothing and leaves nothing.
async fn commands(connection: &mut Connection) -> Diagnosis {
    let name = format!("trustgate:doctor:{}", Uuid::new_v4().simple());
    let values: [(&str, &[&str]); 5] = [
        ("GETRANGE", &[&name, "0", "0"]),
        // Only over a value that is there.
        ("SET", &[&name, "", "XX"]),
        ("UNLINK", &[&name]),
        ("EVAL", &["return redis.call('GETRANGE', KEYS[1], 0, 0)", "1", &name]),
        ("EVALSHA", &["0000000000000000000000000000000000000000", "1", &name]),
    ];
    let denials: [(&str, &[&str]); 5] = [
        ("TIME", &[]),
        ("HLEN", &[&name]),
        ("HKEYS", &[&name]),
        ("HSTRLEN", &[&name, "field"]),
        ("HGET", &[&name, "field"]),
    ];
    let remedy = "give the user of Redis the commands and keys that [redis] in docs/configuration.md lists (ACL \
                  SETUSER); an error of another kind is the server's to explain";
    let refused_values = refused(connection, &values).await;
    if !refused_values.is_empty() {
        return Diagnosis::failed(COMMANDS, refused_values.join("; "), remedy).about(URL);
    }
    let refused_denials = refused(connection, &denials).await;
    if !refused_denials.is_empty() {
        let found = format!("the deny list in Redis cannot be read: {}", refused_denials.join("; "));
        return Diagnosis::warning(COMMANDS, found, remedy).about(URL);
    }
    Diagnosis::ok(COMMANDS, "the user may read, write, delete and run scripts on keys that begin with trustgate:")
}

/// Those of `commands` that may not be sent, each with what is said of it.
async fn refused(connection: &mut Connection, commands: &[(&str, &[&str])]) -> Vec<String> {
    let mut refused = Vec::new();
    for (word, arguments) in commands {
        let mut command = redis::cmd(word);
        command.arg(*arguments);
        match ask::<Value>(connection, command).await {
            Ok(_) => {}
            // It may be sent: that nobody has such a script is another matter.
            Err(error) if error.code() == Some("NOSCRIPT") => {}
            Err(error) => refused.push(format!("{word}: {}", said(&error))),
        }
    }
    refused
}

/// Whether a hint reaches us, and how soon.
async fn hint(connection: &mut Connection, settings: &RedisSettings, clock: &dyn Clock) -> Diagnosis {
    let lost = |problem: String| {
        let found = format!("hints do not arrive by Redis ({problem})");
        let remedy = "let the user publish and subscribe on the channel trustgate:hints: until then a revocation is \
                      found by the database's own hints, or by the next poll";
        Diagnosis::warning(HINTS, found, remedy).about(URL)
    };
    let listening = async {
        let mut subscriber = settings.subscriber(0).await?;
        subscriber.subscribe(CHANNEL).await?;
        Ok(subscriber)
    };
    let mut subscriber = match within(CONNECT_TIMEOUT, listening).await {
        Ok(subscriber) => subscriber,
        Err(error) => return lost(said(&error)),
    };
    let sent_at = clock.now();
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(CHANNEL).arg("");
    if let Err(error) = ask::<Value>(connection, publish).await {
        return lost(said(&error));
    }
    let heard = timeout(HINT, subscriber.on_message().next()).await;
    match heard {
        Ok(Some(_)) => {
            Diagnosis::ok(HINTS, format!("a hint arrives after {}", milliseconds(clock.now().since(sent_at))))
        }
        Ok(None) => lost("the connection broke".to_owned()),
        Err(_) => lost(format!("not within {HINT:?}")),
    }
}

async fn ask<T: redis::FromRedisValue>(connection: &mut Connection, command: Cmd) -> Result<T, RedisError> {
    within(ANSWER, connection.send(&command)).await
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}

/// An error in words; one that is only a limit of ours says so.
fn said(error: &RedisError) -> String {
    if error.is_timeout() { "no answer in time".to_owned() } else { error.to_string() }
}
