//! Examines Redis for `doctor`. Returns one diagnosis for each name in [`NAMES`].
//!
//! The examinations connect as `serve` does. They change no data: the arguments of the write commands are chosen so
//! that Redis writes nothing. They send one notification on the replicas' channel, which makes each replica poll once.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, future::join_all};
use redis::{Cmd, ConnectionAddr, ErrorKind, RedisError, Value};
use tokio::time::timeout;
use uuid::Uuid;

use super::diagnosis::{Diagnosis, Times, complete, located, milliseconds, resolve};
use crate::{
    base::clock::Clock,
    redis::{
        Link as _, RedisConnection, RedisSettings,
        connection::servers,
        notifications::CHANNEL,
        reconnect::{CONNECT_TIMEOUT, timed_out},
    },
};

/// The examinations of Redis, in order.
pub(crate) const NAMES: &[&str] = &[ADDRESS, CONNECTION, COMMANDS, NOTIFICATIONS];

const ADDRESS: &str = "redis_address";
const CONNECTION: &str = "redis_connection";
const COMMANDS: &str = "redis_commands";
const NOTIFICATIONS: &str = "redis_notifications";

/// The settings that contain the URL.
const URL: &[&str] = &["redis.url", "redis.url_file"];
/// The number of requests in the measurement.
const ROUNDS: usize = 20;
/// Timeout for one answer. It is longer than the default of `redis.timeout`, to distinguish a slow answer from a
/// missing answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout for the arrival of a notification.
const NOTIFICATION_TIMEOUT: Duration = Duration::from_secs(1);

/// Examines the Redis servers that `settings` name. Examines notifications only if `notifications` is true.
pub(crate) async fn diagnose(settings: &RedisSettings, notifications: bool, clock: &dyn Clock) -> Vec<Diagnosis> {
    if !settings.is_configured() {
        return complete(NAMES, Vec::new(), "redis.url is not set: Redis is not used");
    }
    let mut diagnoses = Vec::new();
    let because = examine(settings, notifications, clock, &mut diagnoses).await.err().unwrap_or_default();
    complete(NAMES, diagnoses, &because)
}

/// Runs the examinations in order.
///
/// # Errors
/// The reason why the remaining examinations are skipped.
async fn examine(
    settings: &RedisSettings,
    notifications: bool,
    clock: &dyn Clock,
    diagnoses: &mut Vec<Diagnosis>,
) -> Result<(), String> {
    match address(settings).await {
        Ok(found) => diagnoses.push(Diagnosis::ok(ADDRESS, found)),
        Err(problem) => {
            let remedy = "correct the host in the URL, or the name resolution of this machine; until then replicas \
                          have no shared cache, and each L1 miss reads the database";
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
            let remedy = "find out why Redis or the network does not answer";
            let found = format!("connected, but PING failed: {error}");
            diagnoses.push(Diagnosis::failed(CONNECTION, found, remedy).about(URL));
            return Err(format!("because of {CONNECTION}"));
        }
    }
    diagnoses.push(commands(&mut connection).await);
    diagnoses.push(if notifications {
        diagnose_notifications(&mut connection, settings, clock).await
    } else {
        Diagnosis::skipped(NOTIFICATIONS, "freshness.notifications is false").about(&["freshness.notifications"])
    });
    Ok(())
}

/// Returns a description of the servers' addresses. Fails if a host name cannot be resolved.
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
        "start Redis, and make its port reachable from this machine; with rediss://, the server's certificate must \
         come from a trusted authority (redis.ca_file) and name the host in the URL. Until then, each L1 miss reads \
         the database"
    };
    Diagnosis::failed(CONNECTION, text(error), remedy).about(URL)
}

async fn pings(
    connection: &mut RedisConnection,
    settings: &RedisSettings,
    clock: &dyn Clock,
) -> Result<Times, RedisError> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let sent_at = clock.now();
        within(ANSWER_TIMEOUT, connection.ping()).await?;
        times.push(clock.now().since(sent_at));
        let late = times.iter().filter(|took| **took >= settings.timeout).count();
        if late > LATE_MAX {
            break;
        }
    }
    Ok(Times::new(times))
}

/// Maximum number of late answers. If more answers are late, the measurement ends early, because its result is clear.
const LATE_MAX: usize = 4;

async fn judged(
    connection: &mut RedisConnection,
    settings: &RedisSettings,
    took: Duration,
    times: &Times,
) -> Diagnosis {
    const SETTING: &[&str] = &["redis.timeout"];
    // Every Redis user may send HELLO, regardless of the user's rights.
    let hello = ask::<BTreeMap<String, Value>>(connection, redis::cmd("HELLO")).await.unwrap_or_default();
    let word = |name: &str| hello.get(name).and_then(|value| redis::from_redis_value_ref::<String>(value).ok());
    let server = word("server").unwrap_or_else(|| "a server".to_owned());
    let version = word("version").unwrap_or_else(|| "of unknown version".to_owned());
    let (took, pings) = (milliseconds(took), times.beside(settings.timeout));
    let found = format!("{server} {version}, connected in {took}; PING {pings}");
    if word("role").is_some_and(|role| role == "replica" || role == "slave") && !settings.cluster {
        let remedy = "point the URL to the master, or set redis.sentinel_master: a replica accepts no writes";
        return Diagnosis::failed(CONNECTION, format!("a replica: {found}"), remedy).about(URL);
    }
    let remedy = "run `serve` closer to Redis, find out why Redis is slow, or raise redis.timeout: a check whose \
                  answer is late reads the database";
    if times.median() >= settings.timeout {
        Diagnosis::failed(CONNECTION, found, remedy).about(SETTING)
    } else if times.longest() >= settings.timeout {
        Diagnosis::warning(CONNECTION, found, remedy).about(SETTING)
    } else {
        Diagnosis::ok(CONNECTION, found)
    }
}

/// Diagnoses whether the user may send the commands that `serve` sends. The arguments are chosen so that no command
/// reads or changes existing data.
async fn commands(connection: &mut RedisConnection) -> Diagnosis {
    let name = format!("trustgate:doctor:{}", Uuid::new_v4().simple());
    let values: [(&str, &[&str]); 5] = [
        ("GETRANGE", &[&name, "0", "0"]),
        // XX writes only if the key exists, and this key does not exist.
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
    let remedy = "give the Redis user the commands and keys that [redis] in docs/configuration.md lists (ACL SETUSER); \
                  for any other error, see the Redis log";
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

/// Sends `commands`, and returns the ones that Redis refuses, each with its error.
async fn refused(connection: &mut RedisConnection, commands: &[(&str, &[&str])]) -> Vec<String> {
    let mut refused = Vec::new();
    for (word, arguments) in commands {
        let mut command = redis::cmd(word);
        command.arg(*arguments);
        match ask::<Value>(connection, command).await {
            Ok(_) => {}
            // The user may send the command, but no script has this digest.
            Err(error) if error.code() == Some("NOSCRIPT") => {}
            Err(error) => refused.push(format!("{word}: {}", text(&error))),
        }
    }
    refused
}

/// Diagnoses whether notifications through Redis arrive, and how long they take.
async fn diagnose_notifications(
    connection: &mut RedisConnection,
    settings: &RedisSettings,
    clock: &dyn Clock,
) -> Diagnosis {
    let lost = |problem: String| {
        let found = format!("notifications do not arrive through Redis ({problem})");
        let remedy = "let the user publish and subscribe on the channel trustgate:hints: until then replicas find a \
                      revocation by a notification of the database, or by the next poll";
        Diagnosis::warning(NOTIFICATIONS, found, remedy).about(URL)
    };
    let listening = async {
        let mut subscriber = settings.subscriber(0).await?;
        subscriber.subscribe(CHANNEL).await?;
        Ok(subscriber)
    };
    let mut subscriber = match within(CONNECT_TIMEOUT, listening).await {
        Ok(subscriber) => subscriber,
        Err(error) => return lost(text(&error)),
    };
    let sent_at = clock.now();
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(CHANNEL).arg("");
    if let Err(error) = ask::<Value>(connection, publish).await {
        return lost(text(&error));
    }
    let received = timeout(NOTIFICATION_TIMEOUT, subscriber.on_message().next()).await;
    match received {
        Ok(Some(_)) => {
            let took = milliseconds(clock.now().since(sent_at));
            Diagnosis::ok(NOTIFICATIONS, format!("a notification arrived after {took}"))
        }
        Ok(None) => lost("the connection was lost".to_owned()),
        Err(_) => lost(format!("no notification within {NOTIFICATION_TIMEOUT:?}")),
    }
}

async fn ask<T: redis::FromRedisValue>(connection: &mut RedisConnection, command: Cmd) -> Result<T, RedisError> {
    within(ANSWER_TIMEOUT, connection.send(&command)).await
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}

/// Formats an error as human-readable text. A timeout in this module is shown as a missing answer.
fn text(error: &RedisError) -> String {
    if error.is_timeout() { "no answer in time".to_owned() } else { error.to_string() }
}
