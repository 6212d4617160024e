//! gRPC services on any listener.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};

use crate::ports::{BoxIo, Listen};

/// How often a silent client is asked whether it is there: a dead one is noticed within twice that.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// In which a client must begin to speak HTTP/2; from then on it is asked whether it is there.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// The length of what every HTTP/2 client sends first (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// In which a request must be read and its answer begin; longer than any question waits for an actor. A stream's
/// answers may then go on.
const REQUEST: Duration = Duration::from_secs(60);
/// How long calls in flight have to finish at the end. A session has no end of its own, and is cut off then.
const FINISH: Duration = Duration::from_secs(2);
/// Streams of one client at a time.
const STREAMS: u32 = 1_000_000;

/// Serves `routes` until `shutdown`, then lets calls in flight finish, for a moment.
///
/// # Errors
/// When the transport fails as a whole; a single connection's failure ends only that one.
pub async fn serve(
    listener: Box<dyn Listen>,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let late = {
        let shutdown = shutdown.clone();
        async move {
            shutdown.cancelled().await;
            sleep(FINISH).await;
        }
    };
    let serving = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(Some(STREAMS))
        .timeout(REQUEST)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming(listener), async move { shutdown.cancelled().await });
    tokio::select! {
        ended = serving => ended,
        () = late => Ok(()),
    }
}

fn incoming(listener: Box<dyn Listen>) -> impl Stream<Item = io::Result<Connection>> {
    stream::unfold(listener, |mut listener| async move {
        let accepted = listener.accept().await.map(|(io, _)| Connection::new(io));
        Some((accepted, listener))
    })
}

/// A client's connection, which fails when it has not begun with a preface in time.
struct Connection {
    io: BoxIo,
    /// Bytes of the preface that are still to come, and until when.
    opening: Option<(usize, Pin<Box<Sleep>>)>,
}

impl Connection {
    fn new(io: BoxIo) -> Self {
        Self { io, opening: Some((PREFACE, Box::pin(sleep(FIRST_WORD)))) }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Some((missing, deadline)) = &mut self.opening {
            *missing = missing.saturating_sub(buf.filled().len() - before);
            if *missing == 0 {
                self.opening = None;
            } else if polled.is_pending() && deadline.as_mut().poll(cx).is_ready() {
                let text = "the client did not begin to speak HTTP/2 in time";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
