//! Errors to gRPC status, in one place.

use tonic::{Code as Grpc, Status};

use crate::domain::error::{Code, Refusal};

/// The status of a refusal.
#[must_use]
pub fn status(refusal: Refusal) -> Status {
    let code = match refusal.code {
        Code::Invalid => Grpc::InvalidArgument,
        Code::NotFound => Grpc::NotFound,
        Code::FailedPrecondition => Grpc::FailedPrecondition,
        Code::PermissionDenied => Grpc::PermissionDenied,
        Code::Exhausted => Grpc::ResourceExhausted,
        Code::Unavailable => Grpc::Unavailable,
        Code::DeadlineExceeded => Grpc::DeadlineExceeded,
        Code::Unimplemented => Grpc::Unimplemented,
        Code::Internal => Grpc::Internal,
    };
    Status::new(code, refusal.message)
}
