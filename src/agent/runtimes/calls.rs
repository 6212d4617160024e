//! A load over gRPC, where a server takes it: it says why a load failed where REST does not (MLServer), and keeps no
//! thread from answering that has requests of others (Triton).

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{
    StatusCode,
    header::{CONTENT_TYPE, TE},
};
use http_body_util::{BodyExt as _, Limited};
use prost::Message as _;
use tonic::{Code, Status};

use super::repository::{Answer, runtime};
use crate::{
    domain::copy::{Failure, FailureClass},
    forward::{Body, Request, Upstream, grpc::is_grpc},
    rpc::proto::inference::RepositoryModelLoadRequest,
};

/// Longest answer that is read.
const LONGEST: usize = 1 << 20;
const LOAD: &str = "/inference.GRPCInferenceService/RepositoryModelLoad";

/// What `server` answers to a load over gRPC, in the terms of REST; nothing when it takes no gRPC, and has to be asked
/// over REST.
pub(super) async fn load(server: &dyn Upstream, served: &str) -> Result<Option<Answer>, Failure> {
    let message = RepositoryModelLoadRequest { model_name: served.to_owned(), ..RepositoryModelLoadRequest::default() };
    let request: Request = http::Request::post(LOAD)
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .body(Body::from(framed(&message.encode_to_vec())))
        .map_err(|error| runtime(format!("the request to the inference server can't be made: {error}")))?;
    let response = match server.call(request).await {
        Ok(response) => response,
        Err(error) if error.timed_out => {
            let message = format!("the inference server did not answer: {error}");
            return Err(Failure { class: FailureClass::Timeout, message });
        }
        // A port that speaks REST alone breaks the connection. To ask for a load twice harms nobody.
        Err(_) => return Ok(None),
    };
    if response.status() != StatusCode::OK || !is_grpc(response.headers()) {
        return Ok(None);
    }
    let early = Status::from_header_map(response.headers());
    let status = match early {
        Some(status) => status,
        None => {
            let body = Limited::new(response.into_body(), LONGEST).collect().await;
            let body = body.map_err(|error| runtime(format!("the inference server's answer broke off: {error}")))?;
            let late = body.trailers().and_then(Status::from_header_map);
            late.ok_or_else(|| runtime("the inference server's answer over gRPC has no status".to_owned()))?
        }
    };
    Ok(answer(&status))
}

fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The HTTP status that means the same; nothing when the call is not known there.
fn answer(status: &Status) -> Option<Answer> {
    let http = match status.code() {
        Code::Ok => StatusCode::OK,
        Code::Unimplemented => return None,
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::FailedPrecondition => StatusCode::UNPROCESSABLE_ENTITY,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Cancelled
        | Code::Unknown
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Aborted
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let body = if http.is_success() || status.message().is_empty() {
        Vec::new()
    } else {
        serde_json::json!({ "error": status.message() }).to_string().into_bytes()
    };
    Some(Answer { status: http, body })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::{FutureExt as _, future::BoxFuture};

    use super::*;
    use crate::forward::{Response, Split, UpstreamError};

    /// Answers every call with this status.
    #[derive(Debug)]
    struct Always(Status);

    impl Upstream for Always {
        fn call(&self, _: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
            async { Ok(self.0.clone().into_http()) }.boxed()
        }
    }

    #[tokio::test]
    async fn a_refusal_keeps_its_reason() {
        let answer = load(&Always(Status::internal("invalid load key")), "m_1").await.expect("an answer");
        let answer = answer.expect("it takes gRPC");
        assert_eq!((answer.status, answer.text().as_str()), (StatusCode::INTERNAL_SERVER_ERROR, "invalid load key"));
        let silent = load(&Always(Status::internal("")), "m_1").await.expect("an answer").expect("it takes gRPC");
        assert!(!silent.is_error_body());
    }

    #[tokio::test]
    async fn who_takes_no_grpc_is_left_to_rest() {
        let nobody = super::super::tests::nobody();
        assert!(load(nobody.as_ref(), "m_1").await.expect("to be asked again").is_none());
        let rest_only = Split::new(Arc::new(Always(Status::ok(""))), None);
        assert!(load(&rest_only, "m_1").await.expect("to be asked again").is_none());
    }
}
