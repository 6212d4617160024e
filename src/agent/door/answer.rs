//! Answers that the door gives by itself, in the words of the protocol that was spoken.

use http::{HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};

use crate::forward::{Body, Response};

/// What a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Rest,
    Grpc,
}

impl Dialect {
    pub(super) fn of(headers: &http::HeaderMap) -> Self {
        match headers.get(CONTENT_TYPE) {
            Some(kind) if kind.as_bytes().starts_with(b"application/grpc") => Self::Grpc,
            _ => Self::Rest,
        }
    }
}

/// An answer's status in both protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    rest: StatusCode,
    grpc: tonic::Code,
}

impl Kind {
    pub(super) const NOT_HERE: Self = Self { rest: StatusCode::MISDIRECTED_REQUEST, grpc: tonic::Code::Unavailable };
    pub(super) const INVALID: Self = Self { rest: StatusCode::BAD_REQUEST, grpc: tonic::Code::InvalidArgument };
    pub(super) const FORBIDDEN: Self = Self { rest: StatusCode::FORBIDDEN, grpc: tonic::Code::PermissionDenied };
    pub(super) const BUSY: Self = Self { rest: StatusCode::SERVICE_UNAVAILABLE, grpc: tonic::Code::ResourceExhausted };
    pub(super) const ENDED: Self = Self { rest: StatusCode::SERVICE_UNAVAILABLE, grpc: tonic::Code::Unavailable };
    pub(super) const BROKEN: Self = Self { rest: StatusCode::BAD_GATEWAY, grpc: tonic::Code::Unavailable };
    pub(super) const LATE: Self = Self { rest: StatusCode::GATEWAY_TIMEOUT, grpc: tonic::Code::DeadlineExceeded };
}

/// The answer of this kind; `headers` say the rest.
pub(super) fn answer(
    dialect: Dialect,
    kind: Kind,
    message: &str,
    headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
) -> Response {
    let mut response = match dialect {
        Dialect::Rest => {
            let body = serde_json::json!({ "error": message }).to_string();
            let mut response = Response::new(Body::from(body));
            *response.status_mut() = kind.rest;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Dialect::Grpc => {
            let status = tonic::Status::new(kind.grpc, message);
            let mut response = Response::new(Body::empty());
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            // A message that no header can bear is left out.
            if status.add_header(response.headers_mut()).is_err() {
                response.headers_mut().insert(tonic::Status::GRPC_STATUS, (kind.grpc as i32).into());
            }
            response
        }
    };
    response.headers_mut().extend(headers);
    response
}
