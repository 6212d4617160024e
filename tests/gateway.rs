//! What the gateway promises to clients, with doors that behave as badly as doors can.

#[path = "gateway/harness.rs"]
mod harness;

#[path = "gateway/answers.rs"]
mod answers;
#[path = "gateway/follow.rs"]
mod follow;
#[path = "gateway/grpc.rs"]
mod grpc;
#[path = "gateway/limits.rs"]
mod limits;
#[path = "gateway/retries.rs"]
mod retries;
#[path = "gateway/simulated.rs"]
mod simulated;
