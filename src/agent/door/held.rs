//! A response's body with the hold that it came from.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{HeaderMap, HeaderValue};
use http_body::{Body as _, Frame, SizeHint};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::answer::Dialect;
use crate::{
    agent::cache::Hold,
    forward::{Body, BoxError},
};

/// Gives the hold back at the end of the stream, when it breaks off, or when nobody wants it any more. At the
/// deadline of a drain it ends the stream: gRPC with a status, REST by breaking the connection, since its
/// status is out already.
pub(super) struct HeldBody {
    body: Body,
    hold: Option<Hold>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    dialect: Dialect,
}

impl HeldBody {
    pub(super) fn new(body: Body, hold: Hold, dialect: Dialect) -> Self {
        let ended = Box::pin(hold.entry().ended.clone().cancelled_owned());
        let hold = (!body.is_end_stream()).then_some(hold);
        Self { body, hold, ended, dialect }
    }
}

impl http_body::Body for HeldBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.hold.is_some() && this.ended.poll_unpin(cx).is_ready() {
            this.hold = None;
            this.body = Body::empty();
            return Poll::Ready(Some(match this.dialect {
                Dialect::Grpc => {
                    let mut trailers = HeaderMap::new();
                    trailers.insert(tonic::Status::GRPC_STATUS, (tonic::Code::Unavailable as i32).into());
                    let message = HeaderValue::from_static("the copy was unloaded at the deadline of its drain");
                    trailers.insert(tonic::Status::GRPC_MESSAGE, message);
                    Ok(Frame::trailers(trailers))
                }
                Dialect::Rest => Err("the copy was unloaded at the deadline of its drain".into()),
            }));
        }
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(_))) if !this.body.is_end_stream() => {}
            Poll::Ready(Some(Err(_))) => {
                if let Some(hold) = this.hold.take() {
                    hold.entry().broke_off();
                }
            }
            Poll::Ready(_) => this.hold = None,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
