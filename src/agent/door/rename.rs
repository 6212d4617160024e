//! To be replaced by `forward::rename` when that is merged: same name, same signature.
//!
//! The model's name in a request becomes the one that the inference server knows. In REST it is in the path.
//! In gRPC it is field 1 of each message, and the version field 2; protobuf's last value of a field wins, so
//! both are appended, and nothing of the message is read or copied.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{Uri, header::CONTENT_LENGTH, uri::PathAndQuery};
use http_body::Frame;

use super::answer::Dialect;
use crate::forward::{Body, BoxError, Request};

/// A request that names no model where one belongs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct RenameError(String);

/// `request` for the model `served`.
///
/// # Errors
/// When its path names no model.
pub(crate) fn rename(request: Request, served: &str) -> Result<Request, RenameError> {
    match Dialect::of(request.headers()) {
        Dialect::Rest => rename_path(request, served),
        Dialect::Grpc => {
            let (mut parts, body) = request.into_parts();
            parts.headers.remove(CONTENT_LENGTH);
            Ok(Request::from_parts(parts, Body::new(Renamed::new(body, served))))
        }
    }
}

fn rename_path(request: Request, served: &str) -> Result<Request, RenameError> {
    let bad = || RenameError("the path names no model; it is /v2/models/NAME/infer".to_owned());
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().strip_prefix("/v2/models/").ok_or_else(bad)?;
    let (_, mut rest) = path.split_once('/').map_or((path, None), |(name, rest)| (name, Some(rest)));
    if let Some(versioned) = rest.and_then(|rest| rest.strip_prefix("versions/")) {
        rest = versioned.split_once('/').map(|(_, rest)| rest);
    }
    let mut to = format!("/v2/models/{served}");
    if let Some(rest) = rest {
        to.push('/');
        to.push_str(rest);
    }
    if let Some(query) = parts.uri.query() {
        to.push('?');
        to.push_str(query);
    }
    let mut uri = parts.uri.into_parts();
    uri.path_and_query = Some(PathAndQuery::try_from(to).map_err(|_| bad())?);
    parts.uri = Uri::from_parts(uri).map_err(|_| bad())?;
    Ok(Request::from_parts(parts, body))
}

/// A gRPC body whose every message gets a suffix.
struct Renamed {
    body: Body,
    suffix: Bytes,
    head: BytesMut,
    left: usize,
    out: VecDeque<Bytes>,
}

impl Renamed {
    fn new(body: Body, served: &str) -> Self {
        let mut suffix = BytesMut::new();
        suffix.put_u8(0x0a);
        let mut length = served.len();
        while length >= 0x80 {
            suffix.put_u8((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        suffix.put_u8(length as u8);
        suffix.put_slice(served.as_bytes());
        suffix.put_slice(&[0x12, 0]);
        Self { body, suffix: suffix.freeze(), head: BytesMut::new(), left: 0, out: VecDeque::new() }
    }

    fn feed(&mut self, mut data: Bytes) -> Result<(), BoxError> {
        while !data.is_empty() {
            if self.left == 0 {
                let take = data.len().min(5 - self.head.len());
                self.head.extend_from_slice(&data.split_to(take));
                if self.head.len() < 5 {
                    continue;
                }
                if self.head[0] != 0 {
                    return Err("a compressed request can't be renamed".into());
                }
                self.head.advance(1);
                let length = self.head.get_u32() as usize;
                self.head.clear();
                let longer = u32::try_from(length + self.suffix.len())?;
                let mut head = BytesMut::with_capacity(5);
                head.put_u8(0);
                head.put_u32(longer);
                self.out.push_back(head.freeze());
                self.left = length;
                if length == 0 {
                    self.out.push_back(self.suffix.clone());
                }
                continue;
            }
            let part = data.split_to(data.len().min(self.left));
            self.left -= part.len();
            self.out.push_back(part);
            if self.left == 0 {
                self.out.push_back(self.suffix.clone());
            }
        }
        Ok(())
    }
}

impl http_body::Body for Renamed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if let Some(data) = self.out.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        if let Err(error) = self.feed(data) {
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                other => return Poll::Ready(other),
            }
        }
    }
}
