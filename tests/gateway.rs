//! What the gateway promises to clients, with doors that behave as badly as doors can.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops where it fails, waits in real time, and says what it saw"
)]

#[path = "gateway/harness.rs"]
mod harness;

#[path = "gateway/answers.rs"]
mod answers;
#[path = "gateway/follow.rs"]
mod follow;
#[path = "gateway/gathered.rs"]
mod gathered;
#[path = "gateway/grpc.rs"]
mod grpc;
#[path = "gateway/limits.rs"]
mod limits;
#[path = "gateway/outlier.rs"]
mod outlier;
#[path = "gateway/retries.rs"]
mod retries;
#[path = "gateway/simulated.rs"]
mod simulated;
