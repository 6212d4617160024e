//! gRPC services on any listener.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};

use crate::ports::{BoxIo, Listen};

/// How often a silent client is asked whether it is there: a dead one is noticed within twice that.
const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(10);
/// Streams of one client at a time.
const STREAMS: u32 = 1_000_000;

/// Serves `routes` until `shutdown`, then lets calls in flight finish.
///
/// # Errors
/// When the transport fails as a whole; a single connection's failure ends only that one.
pub async fn serve(
    listener: Box<dyn Listen>,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(Some(STREAMS))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming(listener), async move { shutdown.cancelled().await })
        .await
}

fn incoming(listener: Box<dyn Listen>) -> impl Stream<Item = io::Result<Connection>> {
    stream::unfold(listener, |mut listener| async move {
        let accepted = listener.accept().await.map(|(io, _)| Connection(io));
        Some((accepted, listener))
    })
}

struct Connection(BoxIo);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
