//! The server loop: HTTP/1.1 and HTTP/2 without TLS on one port, in front of any [`Upstream`].
//!
//! The rule of this module: no client, however slow, large or many, takes more than its bounds: connections,
//! streams of one, bytes of headers, the time to send them, and the time in which it must take something.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Response, Upstream, body::Body, gather::Streams, grpc::is_grpc, respond::error_response, stall::Answers, wire::Wire,
};
use crate::{
    domain::error::Code,
    ports::{BoxIo, Listen},
};

/// How long to wait after a connection could not be accepted: the process may be out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The largest frame that a peer may send on HTTP/2.
const FRAME: u32 = 64 * 1024;

/// How much of an HTTP/1.1 body is read at once, at most.
const READ_BUFFER: usize = 256 * 1024;

/// What one listener takes from its clients.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the system's queue.
    pub connections: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// Bytes of one request's headers; more are answered 431.
    pub header_bytes: u32,
    /// In which a request's headers must come; also how long a connection may be idle.
    pub header_timeout: Duration,
    /// In which a client must take something of what is sent to it.
    pub stall: Duration,
    /// Bytes on their way on one HTTP/2 stream before its reader has taken them.
    pub window: u32,
    /// How long requests in flight may take to finish on shutdown.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            streams: 256,
            header_bytes: 64 * 1024,
            header_timeout: Duration::from_secs(30),
            stall: Duration::from_secs(30),
            window: 256 * 1024,
            drain: Duration::from_secs(30),
        }
    }
}

/// Serves `service` until `shutdown`, then lets requests in flight finish, for at most `limits.drain`. A client that
/// goes away drops the service's future.
pub async fn serve(
    mut listener: Box<dyn Listen>,
    service: Arc<dyn Upstream>,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let limits = Arc::new(limits);
    let permits = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (listener.accept().await, permit)
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => report(ended),
            (accepted, permit) = next => match accepted {
                Ok((io, peer)) => {
                    let connection = connection(io, Arc::clone(&service), Arc::clone(&limits), shutdown.clone());
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(peer, error, "connection ended");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    let address = listener.address();
    drop(listener);
    let drained = timeout(limits.drain, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(address, connections = connections.len(), "requests in flight were cut off at the deadline");
        connections.shutdown().await;
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's handler panicked");
    }
}

async fn connection(
    io: BoxIo,
    service: Arc<dyn Upstream>,
    limits: Arc<Limits>,
    shutdown: CancellationToken,
) -> Result<(), String> {
    let (io, http2) = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        opened = timeout(limits.header_timeout, Wire::open(io, limits.stall)) => {
            opened.map_err(|_| "nothing was asked in time")?.map_err(|error| error.to_string())?
        }
    };
    let io = TokioIo::new(io);
    if !http2 {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_header_size(limits.header_bytes as usize)
            .max_buf_size(READ_BUFFER.max(limits.header_bytes as usize));
        let connection = builder.serve_connection(io, service_fn(|request| answer(Arc::clone(&service), request)));
        return drive(connection, Future::poll, &shutdown, std::future::pending()).await;
    }
    let streams = Streams::default();
    let mut builder = http2::Builder::new(streams.clone());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(limits.header_bytes)
        .max_frame_size(FRAME)
        .initial_stream_window_size(limits.window)
        // As much as all streams together may have on their way: one that nobody reads holds up no other.
        .initial_connection_window_size(limits.window.saturating_mul(limits.streams).min(i32::MAX as u32))
        .keep_alive_interval(limits.header_timeout)
        .keep_alive_timeout(limits.stall);
    let answers = Arc::new(Answers::default());
    let connection = builder.serve_connection(
        io,
        service_fn(|request| {
            let (service, answers) = (Arc::clone(&service), Arc::clone(&answers));
            async move { answer(service, request).await.map(|response| response.map(|body| answers.watch(body))) }
        }),
    );
    let stuck = async {
        while !answers.look() {
            sleep(limits.stall).await;
        }
    };
    let mut turn = streams.turn();
    drive(connection, |connection, cx| turn.poll(connection, cx), &shutdown, stuck).await
}

async fn answer(service: Arc<dyn Upstream>, request: http::Request<Incoming>) -> Result<Response, Infallible> {
    let grpc = is_grpc(request.headers());
    Ok(service.call(request.map(Body::from)).await.unwrap_or_else(|error| {
        let code = if error.timed_out { Code::DeadlineExceeded } else { Code::Unavailable };
        error_response(grpc, code, &error.message, None)
    }))
}

/// Runs a connection to its end, to the end of its requests after `shutdown`, or until its client is `stuck`.
async fn drive<C>(
    connection: C,
    mut poll: impl FnMut(Pin<&mut C>, &mut Context<'_>) -> Poll<C::Output>,
    shutdown: &CancellationToken,
    stuck: impl Future<Output = ()>,
) -> Result<(), String>
where
    C: GracefulConnection<Error = hyper::Error>,
{
    let mut connection = std::pin::pin!(connection);
    let mut stuck = std::pin::pin!(stuck);
    let mut leaving = false;
    loop {
        tokio::select! {
            ended = poll_fn(|cx| poll(connection.as_mut(), cx)) => return ended.map_err(|error| error.to_string()),
            () = shutdown.cancelled(), if !leaving => {
                leaving = true;
                connection.as_mut().graceful_shutdown();
            }
            () = stuck.as_mut() => return Err("the client has left an answer unread for too long".to_owned()),
        }
    }
}
