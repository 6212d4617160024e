//! Gives a request the name under which an inference server knows its model.
//!
//! The rule of this module: nothing is parsed. A REST request names its model in the path. In a gRPC message the
//! last occurrence of a field wins, so the new name and an empty version are appended to each message, whose
//! length grows by as much; the bytes in between pass as they are.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{
    Uri,
    header::CONTENT_LENGTH,
    uri::{InvalidUri, PathAndQuery},
};
use http_body::Frame;
use thiserror::Error;

use super::{
    Request,
    body::{Body, BoxError},
    grpc::{self, PREFIX},
};
use crate::domain::error::Code;

/// A message of at most this many bytes that came whole is joined with what is appended, so that it leaves as one
/// frame; copying it costs less than two more frames do.
const JOIN: usize = 4096;

/// A request that can't be given another name.
#[derive(Debug, Error)]
pub enum RenameError {
    /// Compressed messages can't be changed without unpacking them.
    #[error(
        "the request's messages are compressed ({0}), and this server passes only uncompressed ones; send them \
             without grpc-encoding"
    )]
    Compressed(String),
    /// Neither a REST path of a model nor one of the four gRPC methods of one.
    #[error("{0:?} is not a path of a model")]
    NotOfAModel(String),
    /// The new path is not one.
    #[error("the model can't be reached as {served:?}: {problem}")]
    Path {
        /// The name it was to get.
        served: String,
        /// What is wrong with it.
        problem: InvalidUri,
    },
}

impl RenameError {
    /// What kind of refusal this is.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Compressed(_) => Code::Unimplemented,
            Self::NotOfAModel(_) => Code::NotFound,
            Self::Path { .. } => Code::Internal,
        }
    }
}

/// `request` with `served` as the name of its model and without a version, REST and gRPC alike. A compressed gRPC
/// message that its headers do not announce breaks the body off.
///
/// # Errors
/// When the request is not one of a model, or announces compressed messages.
pub fn rename(mut request: Request, served: &str) -> Result<Request, RenameError> {
    let path = request.uri().path();
    if let Some(method) = path.strip_prefix(grpc::SERVICE) {
        if !matches!(method, "ModelInfer" | "ModelStreamInfer" | "ModelReady" | "ModelMetadata") {
            return Err(RenameError::NotOfAModel(path.to_owned()));
        }
        let encoding = request.headers().get("grpc-encoding");
        if let Some(encoding) = encoding.filter(|encoding| *encoding != "identity") {
            return Err(RenameError::Compressed(String::from_utf8_lossy(encoding.as_bytes()).into_owned()));
        }
        request.headers_mut().remove(CONTENT_LENGTH);
        let suffix = suffix(served);
        return Ok(request.map(|body| {
            Body::new(Renamed { body, suffix, prefix: [0; PREFIX], have: 0, left: None, ready: VecDeque::new() })
        }));
    }
    let rest = path.strip_prefix("/v2/models/").ok_or_else(|| RenameError::NotOfAModel(path.to_owned()))?;
    let rest = &rest[rest.find('/').unwrap_or(rest.len())..];
    let rest = match rest.strip_prefix("/versions/") {
        Some(versioned) => &versioned[versioned.find('/').unwrap_or(versioned.len())..],
        None => rest,
    };
    let renamed = match request.uri().query() {
        Some(query) => format!("/v2/models/{served}{rest}?{query}"),
        None => format!("/v2/models/{served}{rest}"),
    };
    match PathAndQuery::from_maybe_shared(Bytes::from(renamed)) {
        Ok(path) => {
            *request.uri_mut() = Uri::from(path);
            Ok(request)
        }
        Err(problem) => Err(RenameError::Path { served: served.to_owned(), problem }),
    }
}

/// Field 1 set to `served`, field 2 set to nothing.
fn suffix(served: &str) -> Bytes {
    let mut suffix = Vec::with_capacity(served.len() + 6);
    suffix.push(0x0a);
    let mut length = served.len();
    while length >= 0x80 {
        suffix.push((length as u8 & 0x7f) | 0x80);
        length >>= 7;
    }
    suffix.push(length as u8);
    suffix.extend_from_slice(served.as_bytes());
    suffix.extend([0x12, 0x00]);
    suffix.into()
}

/// A body whose messages each get `suffix` appended.
struct Renamed {
    body: Body,
    suffix: Bytes,
    prefix: [u8; PREFIX],
    have: usize,
    /// Bytes of the present message still to come.
    left: Option<u64>,
    ready: VecDeque<Bytes>,
}

impl Renamed {
    fn take(&mut self, mut chunk: Bytes) -> Result<(), BoxError> {
        while !chunk.is_empty() {
            if let Some(left) = self.left {
                let taken = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
                self.ready.push_back(chunk.split_to(taken));
                self.proceed(left - taken as u64);
                continue;
            }
            let taken = (PREFIX - self.have).min(chunk.len());
            self.prefix[self.have..self.have + taken].copy_from_slice(&chunk.split_to(taken));
            self.have += taken;
            if self.have < PREFIX {
                break;
            }
            self.have = 0;
            if self.prefix[0] != 0 {
                return Err("a compressed message can't be given the model's name; send it uncompressed".into());
            }
            let length = grpc::length(&self.prefix);
            let longer = u32::try_from(length + self.suffix.len() as u64).map_err(|_| "the message is over 4 GiB")?;
            let whole = usize::try_from(length).unwrap_or(usize::MAX);
            let joined = whole <= JOIN && chunk.len() >= whole;
            let mut head = BytesMut::with_capacity(PREFIX + if joined { whole + self.suffix.len() } else { 0 });
            head.put_u8(0);
            head.put_u32(longer);
            if joined {
                head.put(chunk.split_to(whole));
                head.put_slice(&self.suffix);
                self.ready.push_back(head.freeze());
            } else {
                self.ready.push_back(head.freeze());
                self.proceed(length);
            }
        }
        Ok(())
    }

    /// Of the present message, `left` bytes are still to come.
    fn proceed(&mut self, left: u64) {
        if left == 0 {
            self.ready.push_back(self.suffix.clone());
            self.left = None;
        } else {
            self.left = Some(left);
        }
    }
}

impl http_body::Body for Renamed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            match frame.into_data() {
                Ok(data) => {
                    if let Err(error) = self.take(data) {
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    /// The fields of the protocol's message that matter here.
    #[derive(Clone, PartialEq, prost::Message)]
    struct ModelInferRequest {
        #[prost(string, tag = "1")]
        model_name: String,
        #[prost(string, tag = "2")]
        model_version: String,
        #[prost(string, tag = "3")]
        id: String,
        #[prost(bytes = "bytes", repeated, tag = "7")]
        raw_input_contents: Vec<Bytes>,
    }

    fn rest(uri: &str) -> Result<String, RenameError> {
        let request = http::Request::builder().uri(uri).body(Body::empty()).expect("a request");
        rename(request, "iris_2").map(|request| request.uri().to_string())
    }

    #[test]
    fn rest_paths_get_the_served_name_and_no_version() {
        for (path, renamed) in [
            ("/v2/models/iris/infer", "/v2/models/iris_2/infer"),
            ("/v2/models/iris/versions/7/infer?a=b&c", "/v2/models/iris_2/infer?a=b&c"),
            ("/v2/models/iris", "/v2/models/iris_2"),
            ("/v2/models/iris/versions/7", "/v2/models/iris_2"),
            ("http://host:1/v2/models/iris/ready", "/v2/models/iris_2/ready"),
        ] {
            assert_eq!(rest(path).expect(path), renamed);
        }
        assert!(rest("/v2/health/live").is_err());
        assert!(rest("/inference.GRPCInferenceService/ServerLive").is_err());
    }

    fn grpc(chunks: Vec<Bytes>) -> Request {
        let frames = chunks.into_iter().map(|c| Ok::<_, BoxError>(Frame::data(c)));
        http::Request::builder()
            .uri("/inference.GRPCInferenceService/ModelInfer")
            .header("content-type", "application/grpc")
            .body(Body::new(StreamBody::new(futures::stream::iter(frames.collect::<Vec<_>>()))))
            .expect("a request")
    }

    #[tokio::test]
    async fn announced_and_unannounced_compression_are_both_refused() {
        let mut request = grpc(vec![]);
        request.headers_mut().insert("grpc-encoding", "gzip".parse().expect("valid"));
        let error = rename(request, "iris_2").expect_err("compressed");
        assert!(error.to_string().contains("gzip") && error.code() == Code::Unimplemented);
        let request = grpc(vec![Bytes::from_static(&[1, 0, 0, 0, 1, 9])]);
        assert!(rename(request, "iris_2").expect("not announced").into_body().collect().await.is_err());
    }

    proptest! {
        #[test]
        fn each_message_gets_the_name_and_keeps_the_rest(
            tensors in prop::collection::vec(0..9000_usize, 1..5), cut in 1..6000_usize, named in "[a-z]{0,200}",
        ) {
            let requests: Vec<_> = tensors.iter().map(|n| ModelInferRequest {
                model_name: named.clone(),
                model_version: "4".into(),
                id: "id".into(),
                raw_input_contents: vec![vec![3; *n].into()],
            }).collect();
            let mut stream = Vec::new();
            for request in &requests {
                let bytes = request.encode_to_vec();
                stream.push(0);
                stream.extend((bytes.len() as u32).to_be_bytes());
                stream.extend(bytes);
            }
            let chunks = stream.chunks(cut).map(Bytes::copy_from_slice).collect();
            let served = format!("{}_2", "m".repeat(150));
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let renamed = runtime.block_on(rename(grpc(chunks), &served).expect("plain").into_body().collect()).expect("read").to_bytes();
            let mut rest = renamed.as_ref();
            for request in requests {
                let (prefix, after) = rest.split_first_chunk::<PREFIX>().expect("a prefix");
                let (message, after) = after.split_at(grpc::length(prefix) as usize);
                let expected = ModelInferRequest { model_name: served.clone(), model_version: String::new(), ..request };
                prop_assert_eq!(ModelInferRequest::decode(message).expect("a message"), expected);
                rest = after;
            }
            prop_assert!(rest.is_empty());
        }
    }
}
