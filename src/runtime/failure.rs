//! What the runtime refuses or fails at, and the one table from that to HTTP and to gRPC.

use std::any::Any;

use http::StatusCode;
use tonic::Code;

/// The longest explanation taken over from the engine, in characters: its own can run to pages.
const EXPLANATION: usize = 400;

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The request is wrong.
    Invalid,
    /// The model or the path is not there.
    NotFound,
    /// The path is there, for other methods only.
    Method,
    /// More bytes than the limit allows.
    TooLarge,
    /// The body is encoded in a way that is not understood.
    Encoding,
    /// The artifact can't be served as it is.
    Artifact,
    /// It is being loaded; later will work.
    Loading,
    /// Something newer overtook the request.
    Overtaken,
    /// Too many wait already; later will work.
    Busy,
    /// It took too long.
    Deadline,
    /// A fault of the runtime or of the engine.
    Internal,
}

impl Kind {
    /// HTTP's and gRPC's words for it.
    const fn codes(self) -> (StatusCode, Code) {
        match self {
            Self::Invalid => (StatusCode::BAD_REQUEST, Code::InvalidArgument),
            Self::NotFound => (StatusCode::NOT_FOUND, Code::NotFound),
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, Code::Unimplemented),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted),
            Self::Encoding => (StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::Unimplemented),
            Self::Artifact => (StatusCode::UNPROCESSABLE_ENTITY, Code::FailedPrecondition),
            Self::Loading => (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
            Self::Overtaken => (StatusCode::CONFLICT, Code::Aborted),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, Code::ResourceExhausted),
            Self::Deadline => (StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, Code::Internal),
        }
    }
}

/// A failure of one request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// Its kind.
    pub(crate) kind: Kind,
    /// One sentence: what came, what was wanted, what to do.
    pub(crate) message: String,
}

impl Failure {
    /// A failure of kind `kind`.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The request is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// No such model here.
    pub(crate) fn not_loaded(model: &str) -> Self {
        let model = clip(model, 64);
        Self::new(Kind::NotFound, format!("model {model:?} is not loaded; load it with RepositoryModelLoad first"))
    }

    /// HTTP's word for it.
    pub(crate) const fn status(&self) -> StatusCode {
        self.kind.codes().0
    }
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> Self {
        Self::new(failure.kind.codes().1, failure.message)
    }
}

/// As much of `text` as a message can bear, on one line.
pub(crate) fn clip(text: &str, characters: usize) -> String {
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(characters) {
        line.truncate(end);
        line.push_str("...");
    }
    line
}

/// The engine's own explanation, innermost cause last.
pub(crate) fn explain(error: &tract_onnx::prelude::TractError) -> String {
    clip(&format!("{error:#}"), EXPLANATION)
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    clip(text, EXPLANATION)
}
