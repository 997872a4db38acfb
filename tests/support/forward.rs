//! A TCP port that leads to a PostgreSQL server, which can be another one a moment later, or none.

use std::{net::SocketAddr, path::PathBuf};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// The port. It ends with the test.
pub struct Forwarder {
    address: SocketAddr,
    /// The Unix socket of the server; `None` while the way is cut.
    target: watch::Sender<Option<PathBuf>>,
}

impl Forwarder {
    /// A port that leads to the Unix socket `target`.
    pub async fn start(target: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let target = watch::Sender::new(Some(target));
        tokio::spawn(accept(listener, target.subscribe()));
        Self { address, target }
    }

    /// The URL for `user` and `database` through this port.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@{}/{database}?sslmode=disable", self.address)
    }

    /// Drops every connection, and each new one at once.
    pub fn cut(&self) {
        self.target.send_replace(None);
    }

    /// Drops every connection; new ones lead to the Unix socket `target`.
    pub fn lead_to(&self, target: PathBuf) {
        self.target.send_replace(Some(target));
    }
}

async fn accept(listener: TcpListener, mut target: watch::Receiver<Option<PathBuf>>) {
    loop {
        let (stream, _) = listener.accept().await.expect("accepts");
        let goal = target.borrow_and_update().clone();
        tokio::spawn(forward(stream, goal, target.clone()));
    }
}

async fn forward(mut stream: TcpStream, goal: Option<PathBuf>, mut target: watch::Receiver<Option<PathBuf>>) {
    let Some(goal) = goal else { return };
    let Ok(mut server) = UnixStream::connect(goal).await else { return };
    stream.set_nodelay(true).expect("a TCP stream");
    tokio::select! {
        // However it ends, both sides are closed now.
        _ = copy_bidirectional(&mut stream, &mut server) => {}
        _ = target.changed() => {}
    }
}
