//! A simulated Redis server that speaks the Redis protocol over streams in memory. The server can be down, hang, lose
//! its values, and contain old or forged values.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use redis::{
    AsyncConnectionConfig, RedisConnectionInfo, RedisError,
    aio::{MultiplexedConnection, PubSub},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, duplex},
    sync::broadcast,
    time::{Instant, sleep, sleep_until},
};
use trustgate::testing::redis::{Link, RedisConnection};

use crate::chance::Chance;

/// The script with which a replica stores a value.
const REPLACE: &str = include_str!("../../src/cache/l2/replace.lua");
/// The byte range of the lineage in a value.
const LINEAGE: std::ops::Range<usize> = 33..61;
/// The byte range of the version in a value.
const AS_OF: std::ops::Range<usize> = 61..77;

#[derive(Clone)]
pub struct Redis(Arc<Inner>);

struct Inner {
    chance: Chance,
    state: Mutex<State>,
    notifications: broadcast::Sender<()>,
}

#[derive(Default)]
struct State {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    /// All values that were ever stored, in order.
    past: Vec<(Vec<u8>, Vec<u8>)>,
    refuses: bool,
    hangs_until: Option<Instant>,
}

impl Redis {
    pub fn new(chance: &Chance) -> Self {
        let notifications = broadcast::Sender::new(64);
        Self(Arc::new(Inner { chance: chance.fork(), state: Mutex::default(), notifications }))
    }

    /// Sets whether the server refuses and closes connections.
    pub fn set_refuses(&self, refuses: bool) {
        self.lock().refuses = refuses;
    }

    /// Makes the server delay its replies until `until`.
    pub fn hang_until(&self, until: Instant) {
        self.lock().hangs_until = Some(until);
    }

    /// Deletes all values.
    pub fn empty(&self) {
        self.lock().values.clear();
    }

    /// Restores an earlier value of every missing key and, at random, of some keys that are present.
    pub fn replay(&self) {
        let state = &mut *self.lock();
        for (name, value) in &state.past {
            if self.0.chance.one_in(4) || !state.values.contains_key(name) {
                state.values.insert(name.clone(), value.clone());
            }
        }
    }

    /// Flips a bit of each value, or replaces the value with a random stored value.
    pub fn forge(&self) {
        let state = &mut *self.lock();
        let others: Vec<_> = state.values.values().cloned().collect();
        for value in state.values.values_mut() {
            if self.0.chance.one_in(2) {
                value.clone_from(&others[self.0.chance.number(0..others.len())]);
            } else {
                let at = self.0.chance.number(0..value.len());
                value[at] ^= 1;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<DuplexStream, RedisError> {
        if self.lock().refuses {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        let (ours, theirs) = duplex(1 << 16);
        let redis = self.clone();
        // The task ends when the client disconnects or sends an invalid message.
        tokio::spawn(async move { drop(redis.serve(ours).await) });
        Ok(theirs)
    }

    async fn serve(self, stream: DuplexStream) -> io::Result<()> {
        let (read, mut write) = tokio::io::split(stream);
        let mut read = BufReader::new(read);
        loop {
            let command = self.command(&mut read).await?;
            let rarely = self.0.chance.one_in(50);
            sleep(self.0.chance.micros(0..if rarely { 30_000 } else { 500 })).await;
            let hangs_until = self.lock().hangs_until;
            if let Some(until) = hangs_until {
                sleep_until(until).await;
            }
            if self.lock().refuses {
                return Ok(());
            }
            if command[0] == b"SUBSCRIBE" {
                write
                    .write_all(&[b"*3\r\n$9\r\nsubscribe\r\n".as_slice(), &bulk(&command[1]), b":1\r\n"].concat())
                    .await?;
                return self.send_notifications(&command[1], &mut read, &mut write).await;
            }
            write.write_all(&self.answer(&command)).await?;
        }
    }

    /// Reads one command: an array of strings.
    async fn command(&self, read: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> io::Result<Vec<Vec<u8>>> {
        let count = number(read, b'*').await?;
        let mut command = Vec::with_capacity(count);
        for _ in 0..count {
            let mut text = vec![0; number(read, b'$').await?];
            read.read_exact(&mut text).await?;
            read.read_exact(&mut [0; 2]).await?;
            command.push(text);
        }
        Ok(command)
    }

    fn answer(&self, command: &[Vec<u8>]) -> Vec<u8> {
        let state = &mut *self.lock();
        match command[0].as_slice() {
            b"PING" => b"+PONG\r\n".to_vec(),
            b"GETRANGE" => bulk(state.values.get(&command[1]).map_or(&[], Vec::as_slice)),
            // This server stores no scripts, so replicas send the full source of each script.
            b"EVALSHA" => b"-NOSCRIPT No matching script.\r\n".to_vec(),
            b"EVAL" if command[1] == REPLACE.as_bytes() => {
                let (name, value) = (&command[3], &command[4]);
                // Sometimes ignore the script's rule: replicas must cope with an older value.
                if self.0.chance.one_in(10) || state.values.get(name).is_none_or(|stored| !is_newer(stored, value)) {
                    state.values.insert(name.clone(), value.clone());
                    state.past.push((name.clone(), value.clone()));
                }
                b":1\r\n".to_vec()
            }
            b"EVAL" if command[3] == b"trustgate:deny" => b"*4\r\n:1\r\n:0\r\n:0\r\n*0\r\n".to_vec(),
            b"EVAL" => {
                state.values.remove(&command[3]);
                b":1\r\n".to_vec()
            }
            b"PUBLISH" => {
                // `send` fails only if there is no subscriber.
                let _ = self.0.notifications.send(());
                b":1\r\n".to_vec()
            }
            _ => b"+OK\r\n".to_vec(),
        }
    }

    /// Sends notifications to one subscriber: some late, some not at all, some twice.
    async fn send_notifications(
        &self,
        channel: &[u8],
        read: &mut (impl tokio::io::AsyncBufRead + Unpin),
        write: &mut (impl tokio::io::AsyncWrite + Unpin),
    ) -> io::Result<()> {
        let mut notifications = self.0.notifications.subscribe();
        let message = [b"*3\r\n$7\r\nmessage\r\n".as_slice(), &bulk(channel), &bulk(b"")].concat();
        loop {
            tokio::select! {
                biased;
                command = self.command(read) => {
                    command?; // a PING
                    write.write_all(b"*2\r\n$4\r\npong\r\n$0\r\n\r\n").await?;
                }
                notification = notifications.recv() => {
                    if matches!(notification, Err(broadcast::error::RecvError::Closed)) || self.lock().refuses {
                        return Ok(());
                    }
                    sleep(self.0.chance.micros(0..5_000)).await;
                    for _ in 0..self.0.chance.number(0..3) {
                        write.write_all(&message).await?;
                    }
                }
            }
        }
    }
}

/// Returns true if the stored value has the lineage of `value` and is not older than `value`, which is the rule of
/// `replace.lua`.
fn is_newer(stored: &[u8], value: &[u8]) -> bool {
    stored.get(LINEAGE) == value.get(LINEAGE) && stored.get(AS_OF) >= value.get(AS_OF)
}

fn bulk(text: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", text.len()).as_bytes(), text, b"\r\n"].concat()
}

/// Reads a line that consists of `kind` and a number.
async fn number(read: &mut (impl tokio::io::AsyncBufRead + Unpin), kind: u8) -> io::Result<usize> {
    let mut line = Vec::new();
    read.read_until(b'\n', &mut line).await?;
    let number = line.strip_prefix(&[kind]).and_then(|line| std::str::from_utf8(line).ok()?.trim().parse().ok());
    number.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}

#[async_trait]
impl Link for Redis {
    async fn connect(&self) -> Result<RedisConnection, RedisError> {
        let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let (connection, driver) =
            MultiplexedConnection::new_with_config(&RedisConnectionInfo::default(), self.open()?, config).await?;
        tokio::spawn(driver);
        Ok(RedisConnection::Server(connection))
    }

    async fn subscriber(&self, _: usize) -> Result<PubSub, RedisError> {
        PubSub::new(&RedisConnectionInfo::default(), self.open()?).await
    }
}

/// The maximum time for which the server hangs.
pub const HANGS_MAX: Duration = Duration::from_secs(2);
