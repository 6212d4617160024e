//! Moving bytes between a client and a server: one body type and one way to hand a request on, whether the
//! next hop is in the same process or behind a socket.
//!
//! The rule of this module: a body is never parsed, copied or buffered whole on its way through.

mod body;
mod client;
mod connections;
mod gather;
pub mod grpc;
pub mod headers;
mod net;
mod pool;
mod rename;
pub mod replay;
pub mod respond;
mod server;
mod split;
mod stall;
mod wire;

use std::fmt;

use futures::future::BoxFuture;

pub use body::{Body, BoxError};
pub use client::{AddressError, ClientOptions, HttpUpstream};
pub use connections::{Connections, IN_PROCESS, Registration};
pub use net::TcpNetwork;
pub use rename::{RenameError, rename};
pub use respond::error_response;
pub use server::{Limits, serve};
pub use split::Split;

/// A request on its way to a door or an inference server: REST and gRPC alike.
pub type Request = http::Request<Body>;
/// The answer to a [`Request`].
pub type Response = http::Response<Body>;

/// The next hop: a door, an inference server, in this process or another.
pub trait Upstream: Send + Sync + fmt::Debug {
    /// Hands the request on. Dropping the future gives the request up.
    ///
    /// # Errors
    /// When no response began; [`UpstreamError::started`] says whether the next hop can have begun work.
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>>;
}

/// Extension of a request that the door hands on: the name under which the inference server knows the copy, for one that
/// is many servers.
#[derive(Clone, Debug)]
pub struct Served(pub std::sync::Arc<str>);

/// No response came from the next hop.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct UpstreamError {
    /// Whether the next hop can have started on the request. Only when it can't may the request go elsewhere.
    pub started: bool,
    /// Whether the wait ended at a deadline.
    pub timed_out: bool,
    /// One sentence.
    pub message: String,
}

/// Request header from a gateway to a door: the generation of the copy that the route named.
pub const COPY: http::HeaderName = http::HeaderName::from_static("x-wharf-copy");
/// Response header from a door that does not hold the copy (NOT_HERE); its value is the newest version of the
/// model that the door does hold, or empty. The request has not reached an inference server.
pub const NOT_HERE: http::HeaderName = http::HeaderName::from_static("x-wharf-not-here");
/// Response header from a door that answered by itself, before any inference server could start: the
/// request may go elsewhere.
pub const NOT_STARTED: http::HeaderName = http::HeaderName::from_static("x-wharf-not-started");
/// Response header from a door: `resident`, or `reloaded` when this request brought the copy back.
pub const RESIDENCY: http::HeaderName = http::HeaderName::from_static("x-wharf-residency");
