//! The next hop behind a socket.
//!
//! The rule of this module: [`UpstreamError::started`] is exact. It is false only when the request can't have been
//! read by the peer: no connection came about, the one at hand was closed before the request was written to it, or
//! the peer said that it refused the stream unseen. Everything else counts as started.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{
    HeaderValue, Uri, Version,
    header::HOST,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::{Body as _, Frame, SizeHint};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Request, Response, Upstream, UpstreamError,
    body::{Body, BoxError},
    gather::Gathering,
    grpc::is_grpc,
    pool::{Bounds, Connection, Pool, Shared, Stream},
};
use crate::ports::{BoxIo, Clock, Network};

/// The largest frame that the peer may send on HTTP/2.
const FRAME: u32 = 64 * 1024;

/// How connections to one next hop are made and kept.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// In which a connection must come about.
    pub connect_timeout: Duration,
    /// How long an HTTP/1.1 connection may wait for its next request. It must be shorter than the time after which
    /// the peer closes such a connection (uvicorn, in front of many Python servers: 5 s), because a request
    /// that meets the closing on its way may not be sent again.
    pub idle: Duration,
    /// How long an HTTP/2 connection may be without streams.
    pub shared_idle: Duration,
    /// Connections at a time, of both kinds.
    pub connections: usize,
    /// Streams on one HTTP/2 connection before another is made; servers allow 100 and more.
    pub streams: usize,
    /// Bytes on their way on one HTTP/2 stream before its reader has taken them.
    pub window: u32,
    /// After this long without a word from the peer an HTTP/2 connection is probed.
    pub probe_every: Duration,
    /// In which a probe must be answered.
    pub probe_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            idle: Duration::from_secs(4),
            shared_idle: Duration::from_secs(60),
            connections: 4096,
            streams: 100,
            window: 256 * 1024,
            probe_every: Duration::from_secs(10),
            probe_timeout: Duration::from_secs(5),
        }
    }
}

/// A next hop at `host:port`: HTTP/1.1 with kept connections for REST, one or few HTTP/2 connections for gRPC.
pub struct HttpUpstream {
    address: String,
    host: HeaderValue,
    authority: Authority,
    network: Arc<dyn Network>,
    clock: Arc<dyn Clock>,
    options: ClientOptions,
    pool: Arc<Pool>,
    permits: Arc<Semaphore>,
    /// One HTTP/2 connection is made at a time, so that many first requests share it, or its failure.
    connecting: Semaphore,
    failures: Failures,
}

/// How often an HTTP/2 connection could not be made, and why at last.
#[derive(Debug, Default)]
struct Failures {
    count: AtomicU64,
    last: Mutex<String>,
}

impl Failures {
    fn note(&self, error: &UpstreamError) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&error.message);
        self.count.fetch_add(1, Ordering::Release);
    }

    /// The failure that happened since there were `seen`.
    fn since(&self, seen: u64) -> Option<UpstreamError> {
        if self.count.load(Ordering::Acquire) == seen {
            return None;
        }
        let message = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some(UpstreamError { started: false, timed_out: false, message })
    }
}

impl fmt::Debug for HttpUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (idle, shared) = self.pool.open();
        let mut debug = f.debug_struct("HttpUpstream");
        debug.field("address", &self.address).field("idle", &idle).field("shared", &shared).finish_non_exhaustive()
    }
}

/// An address that no request can be sent to.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is not an address of the form host:port")]
pub struct AddressError {
    /// What was given.
    pub address: String,
}

impl HttpUpstream {
    /// The next hop at `address`, `host:port`. Connects when there is a request.
    ///
    /// # Errors
    /// When `address` is not of that form.
    pub fn new(
        address: &str,
        network: Arc<dyn Network>,
        clock: Arc<dyn Clock>,
        options: ClientOptions,
    ) -> Result<Self, AddressError> {
        let wrong = || AddressError { address: address.to_owned() };
        let authority: Authority = address.parse().map_err(|_| wrong())?;
        if authority.port().is_none() || address.contains('@') {
            return Err(wrong());
        }
        let limits = Bounds { idle: options.idle, shared_idle: options.shared_idle, streams: options.streams };
        Ok(Self {
            address: address.to_owned(),
            host: HeaderValue::from_str(address).map_err(|_| wrong())?,
            authority,
            network,
            pool: Pool::new(Arc::clone(&clock), limits),
            clock,
            permits: Arc::new(Semaphore::new(options.connections)),
            connecting: Semaphore::new(1),
            failures: Failures::default(),
            options,
        })
    }

    async fn connect(&self) -> Result<(BoxIo, OwnedSemaphorePermit), UpstreamError> {
        let not_started = |timed_out, message| UpstreamError { started: false, timed_out, message };
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            let most = self.options.connections;
            not_started(false, format!("all {most} connections to {} are in use", self.address))
        })?;
        match timeout(self.options.connect_timeout, self.network.connect(&self.address)).await {
            Ok(Ok(io)) => Ok((io, permit)),
            Ok(Err(error)) => Err(not_started(false, format!("{} could not be reached: {error}", self.address))),
            Err(_) => {
                let after = self.options.connect_timeout;
                Err(not_started(true, format!("{} could not be reached within {after:?}", self.address)))
            }
        }
    }

    async fn connection(&self) -> Result<Connection, UpstreamError> {
        let (io, permit) = self.connect().await?;
        let handshake = http1::handshake(TokioIo::new(io)).await;
        let (sender, connection) = handshake.map_err(|error| self.failed(&error, false))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the next hop ended");
            }
        });
        Ok(Connection { sender, _task: AbortOnDropHandle::new(task), _permit: permit })
    }

    async fn stream(&self) -> Result<Stream, UpstreamError> {
        if let Some(stream) = self.pool.stream() {
            return Ok(stream);
        }
        let seen = self.failures.count.load(Ordering::Acquire);
        let _turn = self.connecting.acquire().await;
        if let Some(stream) = self.pool.stream() {
            return Ok(stream);
        }
        // Whoever waited while it failed does not wait for another failure.
        if let Some(error) = self.failures.since(seen) {
            return Err(error);
        }
        let made = self.shared().await;
        if let Err(error) = &made {
            self.failures.note(error);
        }
        Ok(self.pool.share(made?))
    }

    async fn shared(&self) -> Result<Shared, UpstreamError> {
        let (io, permit) = self.connect().await?;
        let mut builder = http2::Builder::new(Gathering::default());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(self.options.window)
            // As much as all streams together may have on their way: one that nobody reads holds up no other.
            .initial_connection_window_size(
                self.options.window.saturating_mul(self.options.streams as u32).min(i32::MAX as u32),
            )
            .max_frame_size(FRAME)
            .keep_alive_interval(self.options.probe_every)
            .keep_alive_timeout(self.options.probe_timeout)
            .keep_alive_while_idle(true);
        let handshake = timeout(self.options.connect_timeout, builder.handshake(TokioIo::new(io))).await;
        let Ok(handshake) = handshake else {
            let message = format!("{} did not begin HTTP/2 in time", self.address);
            return Err(UpstreamError { started: false, timed_out: true, message });
        };
        let (sender, connection) = handshake.map_err(|error| self.failed(&error, false))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the next hop ended");
            }
        });
        Ok(Shared {
            sender,
            streams: AtomicUsize::new(0),
            used: self.clock.now().as_micros().into(),
            _task: AbortOnDropHandle::new(task),
            _permit: permit,
        })
    }

    async fn call_rest(&self, mut request: Request) -> Result<Response, UpstreamError> {
        *request.version_mut() = Version::HTTP_11;
        if request.uri().authority().is_some() {
            let path = request.uri().path_and_query().cloned();
            *request.uri_mut() = Uri::from(path.unwrap_or(PathAndQuery::from_static("/")));
        }
        request.headers_mut().insert(HOST, self.host.clone());
        loop {
            let (mut connection, kept) = match self.pool.take() {
                Some(connection) => (connection, true),
                None => (self.connection().await?, false),
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    let (parts, body) = response.into_parts();
                    return Ok(Response::from_parts(parts, Lent::body(body, connection, &self.pool)));
                }
                Err(mut error) => match error.take_message() {
                    // The kept connection had been closed; each turn uses up one of them.
                    Some(unsent) if kept => request = unsent,
                    unsent => return Err(self.failed(error.error(), unsent.is_none())),
                },
            }
        }
    }

    async fn call_grpc(&self, mut request: Request) -> Result<Response, UpstreamError> {
        *request.version_mut() = Version::HTTP_2;
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = request.uri().path_and_query().cloned();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        request.headers_mut().remove(HOST);
        let mut again = true;
        loop {
            let stream = self.stream().await?;
            match stream.connection.sender.clone().try_send_request(request).await {
                Ok(response) => {
                    return Ok(response.map(|body| {
                        if body.is_end_stream() { body.into() } else { Body::new(Held { body, _stream: stream }) }
                    }));
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if again => {
                        again = false;
                        request = unsent;
                    }
                    unsent => {
                        let started = unsent.is_none() && !refused_unseen(&error);
                        return Err(self.failed(error.error(), started));
                    }
                },
            }
        }
    }

    fn failed(&self, error: &hyper::Error, started: bool) -> UpstreamError {
        use std::error::Error as _;
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        let message = format!("{} did not answer: {error}{cause}", self.address);
        UpstreamError { started, timed_out: error.is_timeout(), message }
    }
}

impl Upstream for HttpUpstream {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        if is_grpc(request.headers()) { self.call_grpc(request).boxed() } else { self.call_rest(request).boxed() }
    }
}

/// Whether the peer said that it has not looked at the request: it refused the stream, or went away naming an
/// earlier stream as the last one that it saw (RFC 9113, 8.7).
fn refused_unseen(error: &TrySendError<http::Request<Body>>) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error.error());
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM));
        }
        cause = error.source();
    }
    false
}

/// A response's body that gives its connection back when it has been read to its end, and closes it otherwise.
struct Lent {
    body: Incoming,
    connection: Option<Connection>,
    pool: Arc<Pool>,
}

impl Lent {
    fn body(body: Incoming, connection: Connection, pool: &Arc<Pool>) -> Body {
        if body.is_end_stream() {
            pool.give(connection);
            return body.into();
        }
        Body::new(Self { body, connection: Some(connection), pool: Arc::clone(pool) })
    }
}

impl http_body::Body for Lent {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let ended = match &polled {
            Poll::Ready(None) => true,
            Poll::Ready(Some(Ok(_))) => self.body.is_end_stream(),
            Poll::Ready(Some(Err(_))) => {
                self.connection = None;
                false
            }
            Poll::Pending => false,
        };
        if ended && let Some(connection) = self.connection.take() {
            self.pool.give(connection);
        }
        polled.map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body that counts as a stream of its connection.
struct Held {
    body: Incoming,
    _stream: Stream,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
