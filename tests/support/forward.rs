//! A TCP port that forwards to a PostgreSQL server. A test can redirect the port to another server, or cut the
//! connection.

use std::{net::SocketAddr, path::PathBuf};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// A forwarding port, which closes when the test's runtime ends.
pub struct Forwarder {
    address: SocketAddr,
    /// The server's Unix socket; `None` while the connection is cut.
    target: watch::Sender<Option<PathBuf>>,
}

impl Forwarder {
    /// Opens a port that forwards to the Unix socket `target`.
    pub async fn start(target: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let target = watch::Sender::new(Some(target));
        tokio::spawn(accept(listener, target.subscribe()));
        Self { address, target }
    }

    /// Returns the URL for `user` and `database` through this port.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@{}/{database}?sslmode=disable", self.address)
    }

    /// Closes all connections, and from now on closes each new connection immediately.
    pub fn cut(&self) {
        self.target.send_replace(None);
    }

    /// Closes all connections, and forwards new connections to the Unix socket `target`.
    pub fn forward_to(&self, target: PathBuf) {
        self.target.send_replace(Some(target));
    }
}

async fn accept(listener: TcpListener, mut target: watch::Receiver<Option<PathBuf>>) {
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        let socket = target.borrow_and_update().clone();
        tokio::spawn(forward(stream, socket, target.clone()));
    }
}

async fn forward(mut stream: TcpStream, socket: Option<PathBuf>, mut target: watch::Receiver<Option<PathBuf>>) {
    let Some(socket) = socket else { return };
    let Ok(mut server) = UnixStream::connect(socket).await else { return };
    stream.set_nodelay(true).expect("a TCP stream");
    tokio::select! {
        // When either future completes, this function returns and so closes both sockets.
        _ = copy_bidirectional(&mut stream, &mut server) => {}
        _ = target.changed() => {}
    }
}
