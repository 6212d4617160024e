//! Errors in a protocol's own words: one table for HTTP and gRPC, one function that writes the answer.

use std::time::Duration;

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};

use super::{Response, body::Body, grpc};
use crate::domain::error::Code;

/// gRPC clients with a retry policy wait this many milliseconds before they ask again.
const GRPC_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// What a [`Code`] is in HTTP, and its number in gRPC. A bound that is reached is a 503, never a 404 or a 429:
/// the client did nothing wrong.
#[must_use]
pub const fn statuses(code: Code) -> (StatusCode, u8) {
    match code {
        Code::Invalid => (StatusCode::BAD_REQUEST, 3),
        Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, 4),
        Code::NotFound => (StatusCode::NOT_FOUND, 5),
        Code::PermissionDenied => (StatusCode::FORBIDDEN, 7),
        Code::Exhausted => (StatusCode::SERVICE_UNAVAILABLE, 8),
        Code::FailedPrecondition => (StatusCode::CONFLICT, 9),
        Code::Unimplemented => (StatusCode::NOT_IMPLEMENTED, 12),
        Code::Internal => (StatusCode::INTERNAL_SERVER_ERROR, 13),
        Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, 14),
    }
}

/// An answer that says what went wrong: JSON `{"error": message}`, or a gRPC answer of trailers only.
/// `retry_after` tells the client when to ask again, in whole seconds for REST, rounded up.
#[must_use]
pub fn error_response(is_grpc: bool, code: Code, message: &str, retry_after: Option<Duration>) -> Response {
    let (http, grpc) = statuses(code);
    let mut response = if is_grpc { grpc_error(grpc, message) } else { rest_error(http, message) };
    if let Some(after) = retry_after {
        add_retry_after(response.headers_mut(), is_grpc, after);
    }
    response
}

/// The answer to a body over the limit: 413, or RESOURCE_EXHAUSTED.
#[must_use]
pub fn too_large(is_grpc: bool, limit: u64) -> Response {
    let message = format!(
        "the request is over the limit of {limit} bytes; send less at once, or raise the gateway's limit for bodies"
    );
    if is_grpc {
        grpc_error(statuses(Code::Exhausted).1, &message)
    } else {
        rest_error(StatusCode::PAYLOAD_TOO_LARGE, &message)
    }
}

/// A JSON answer.
#[must_use]
pub fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn rest_error(status: StatusCode, message: &str) -> Response {
    json(status, &serde_json::json!({ "error": message }))
}

fn grpc_error(status: u8, message: &str) -> Response {
    let mut response = Response::new(Body::empty());
    *response.headers_mut() = grpc::status_trailers(status, message);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn add_retry_after(headers: &mut HeaderMap, is_grpc: bool, after: Duration) {
    headers.insert(RETRY_AFTER, HeaderValue::from(after.as_millis().div_ceil(1000).clamp(1, 86_400) as u32));
    if is_grpc {
        headers.insert(GRPC_PUSHBACK, HeaderValue::from(after.as_millis().clamp(1, 86_400_000) as u32));
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn rest_gets_json_with_the_sentence() {
        let response = error_response(false, Code::Unavailable, "say \"when\"", Some(Duration::from_millis(1200)));
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        assert_eq!(body, r#"{"error":"say \"when\""}"#);
    }

    #[tokio::test]
    async fn grpc_gets_trailers_only() {
        let response = error_response(true, Code::NotFound, "no such model", Some(Duration::from_millis(1200)));
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "5");
        assert_eq!(response.headers()["grpc-message"], "no such model");
        assert_eq!(response.headers()["grpc-retry-pushback-ms"], "1200");
        assert!(http_body::Body::is_end_stream(response.body()));
    }

    #[test]
    fn a_body_that_is_too_large_has_its_own_status() {
        assert_eq!(too_large(false, 7).status(), 413);
        assert_eq!(too_large(true, 7).headers()["grpc-status"], "8");
    }
}
