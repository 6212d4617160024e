//! The body of every request and response that passes through.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::{Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;

use super::replay::Reader;

/// Whatever ended a body early.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A stream of bytes from a socket, from memory, or from anything else.
pub struct Body {
    kind: Kind,
    ticket: Option<Box<dyn Send>>,
}

enum Kind {
    Incoming(Incoming),
    Full(Full<Bytes>),
    Replayed(Reader),
    Boxed(UnsyncBoxBody<Bytes, BoxError>),
}

impl Body {
    /// No bytes.
    #[must_use]
    pub fn empty() -> Self {
        Kind::Full(Full::default()).into()
    }

    /// Any other body.
    pub fn new<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        use http_body_util::BodyExt as _;
        Kind::Boxed(body.map_err(Into::into).boxed_unsync()).into()
    }

    /// This body carrying `ticket`, which is dropped when the request has been handed to the next hop: when the
    /// body is first read, when [`handed_over`](Self::handed_over) is called, or when the body is dropped.
    #[must_use]
    pub fn with_ticket(mut self, ticket: impl Send + 'static) -> Self {
        self.ticket = Some(Box::new(ticket));
        self
    }

    /// Says that the next hop has the request, though it has not read the body yet.
    pub fn handed_over(&mut self) {
        self.ticket = None;
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Body")
    }
}

impl From<Kind> for Body {
    fn from(kind: Kind) -> Self {
        Self { kind, ticket: None }
    }
}

impl From<Incoming> for Body {
    fn from(body: Incoming) -> Self {
        Kind::Incoming(body).into()
    }
}

impl From<Reader> for Body {
    fn from(body: Reader) -> Self {
        Kind::Replayed(body).into()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Kind::Full(Full::new(bytes)).into()
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Bytes::from(text).into()
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Bytes::from(text).into()
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.ticket = None;
        match &mut self.kind {
            Kind::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Kind::Full(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Kind::Replayed(body) => Pin::new(body).poll_frame(cx),
            Kind::Boxed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Incoming(body) => body.is_end_stream(),
            Kind::Full(body) => body.is_end_stream(),
            Kind::Replayed(body) => body.is_end_stream(),
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Incoming(body) => body.size_hint(),
            Kind::Full(body) => body.size_hint(),
            Kind::Replayed(body) => body.size_hint(),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}
