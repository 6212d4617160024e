//! The answer's body on its way to the client.
//!
//! The rule of this module: bytes pass as they come; what a request holds (its place in the counts) it holds as
//! long as its answer; an answer that overruns its deadline or falls silent is ended, in the protocol's own words.

use std::{
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, response::Parts};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::{
    health::{self, Flight},
    metrics::{Admitted, Class},
};
use crate::{
    domain::{error::Code, outlier::Verdict},
    forward::{Body, BoxError, grpc::status_trailers, respond::statuses},
};

/// An answer's body with what its request holds.
pub(super) struct Passage {
    body: Body,
    admitted: Admitted,
    flight: Flight,
    limit: Limit,
    /// How the request has ended when its answer is read to the end; for gRPC, unless trailers say otherwise.
    class: Class,
    over: bool,
}

/// When an answer is ended from here.
pub(super) enum Limit {
    /// At the deadline that the client set.
    Deadline(Pin<Box<Sleep>>),
    /// When nothing came for this long.
    Silence {
        /// The time.
        most: Duration,
        /// Runs while nothing comes.
        timer: Option<Pin<Box<Sleep>>>,
        /// Whether something came since it was set.
        heard: bool,
    },
}

impl Limit {
    pub(super) fn deadline(left: Duration) -> Self {
        Self::Deadline(Box::pin(sleep(left)))
    }

    pub(super) const fn silence(most: Duration) -> Self {
        Self::Silence { most, timer: None, heard: false }
    }

    const fn heard(&mut self) {
        if let Self::Silence { heard, .. } = self {
            *heard = true;
        }
    }

    /// Ready when the answer is to be ended. Called when nothing has come.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Deadline(timer) => timer.as_mut().poll(cx),
            Self::Silence { most, timer, heard } => loop {
                let running = timer.get_or_insert_with(|| Box::pin(sleep(*most)));
                if running.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                // It is not set anew for each frame: one that came meanwhile earns another full time.
                *timer = None;
                if !std::mem::take(heard) {
                    return Poll::Ready(());
                }
            },
        }
    }
}

impl Passage {
    /// The body of an answer with the head `parts`, as it goes to the client.
    pub(super) fn body(body: Body, parts: &Parts, mut admitted: Admitted, mut flight: Flight, limit: Limit) -> Body {
        let class = if admitted.is_grpc() { grpc_class(&parts.headers) } else { Class::of_http(parts.status) };
        if !admitted.is_grpc() {
            admitted.judge(&mut flight, health::of_http(parts.status));
        } else if let Some(status) = parts.headers.get("grpc-status") {
            admitted.judge(&mut flight, health::of_grpc(status.as_bytes()));
        }
        if body.is_end_stream() {
            admitted.ended(class);
            return body;
        }
        Body::new(Self { body, admitted, flight, limit, class, over: false })
    }
}

/// By the trailers, or a head that is trailers too; without a status the server broke the protocol.
fn grpc_class(trailers: &HeaderMap) -> Class {
    trailers.get("grpc-status").map_or(Class::ServerError, |status| Class::of_grpc(status.as_bytes()))
}

impl http_body::Body for Passage {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        let grpc = this.admitted.is_grpc();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        let (code, message) = match polled {
            Poll::Ready(Some(Ok(frame))) => {
                this.limit.heard();
                if let Some(trailers) = frame.trailers_ref()
                    && grpc
                {
                    let verdict = trailers.get("grpc-status").and_then(|status| health::of_grpc(status.as_bytes()));
                    this.admitted.judge(&mut this.flight, verdict);
                    this.admitted.ended(grpc_class(trailers));
                }
                if !grpc && this.body.is_end_stream() {
                    this.admitted.ended(this.class);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
            Poll::Ready(None) => {
                this.admitted.ended_unless_known(this.class);
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                this.admitted.judge(&mut this.flight, Some(Verdict::Error));
                (Code::Unavailable, format!("the answer broke off: {error}"))
            }
            Poll::Pending => {
                if this.limit.poll_over(cx).is_pending() {
                    return Poll::Pending;
                }
                if matches!(this.limit, Limit::Silence { .. }) {
                    this.admitted.judge(&mut this.flight, Some(Verdict::Error));
                }
                let message = match this.limit {
                    Limit::Deadline(_) => "the deadline that the client set was over before the answer was".to_owned(),
                    Limit::Silence { most, .. } => format!("nothing came from the inference server for {most:?}"),
                };
                this.admitted.metrics().deadline_exceeded.fetch_add(1, Ordering::Relaxed);
                (Code::DeadlineExceeded, message)
            }
        };
        this.over = true;
        this.body = Body::empty();
        this.admitted.ended(Class::ServerError);
        Poll::Ready(Some(if grpc {
            Ok(Frame::trailers(status_trailers(statuses(code).1, &message)))
        } else {
            Err(message.into())
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
