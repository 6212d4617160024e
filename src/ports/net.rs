//! Sockets, or what stands for them in a simulation.

use std::{fmt, io};

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection's two directions.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Any connection.
pub type BoxIo = Box<dyn Io>;

/// Accepts connections.
pub trait Listen: Send + fmt::Debug {
    /// The next connection, and who is at its other end.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>>;

    /// The address it listens on, `host:port`, with the port that was really taken.
    fn address(&self) -> String;
}

/// A network to listen and connect on.
pub trait Network: Send + Sync + fmt::Debug {
    /// Listens on `host:port`; port 0 takes a free one.
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>>;

    /// Connects to `host:port`.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>>;
}
