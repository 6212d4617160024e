//! Clients of a scheduler and of a gateway.
//!
//! The rule of this module: every call has a deadline, and every failure is one of a few kinds, so that
//! whoever called can say what to do next and with which exit code.

use std::{error::Error as _, time::Duration};

use thiserror::Error;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

use super::proto::{
    inference::grpc_inference_service_client::GrpcInferenceServiceClient, scheduler::scheduler_client::SchedulerClient,
    wharf::wharf_client::WharfClient,
};

/// The largest message taken from a scheduler or a gateway, in bytes. Inference answers are the large ones.
pub const MAX_MESSAGE: usize = 256 * 1024 * 1024;

/// How often an idle connection is probed, and how long an answer may take: a dead peer is noticed, and
/// Seldon's servers accept as much.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(10));

/// A call that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ClientError {
    /// The address is none.
    #[error("{address:?} is not an address: {problem}; write HOST:PORT")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing answers there.
    #[error("can't reach {address}: {cause}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the system said.
        cause: String,
    },
    /// No answer in time.
    #[error("{address} did not answer within {}", seconds(*.after))]
    TimedOut {
        /// Who did not answer.
        address: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// Something answers there that has no such service.
    #[error("{address} answers, but has no {method}")]
    Unimplemented {
        /// Who answered.
        address: String,
        /// What it does not have, in its own words.
        method: String,
    },
    /// It answered no.
    #[error("{message}")]
    Refused {
        /// The gRPC code, by its canonical name.
        code: &'static str,
        /// What it said.
        message: String,
    },
}

/// A connection to one address. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connection {
    channel: Channel,
    address: String,
    deadline: Duration,
}

impl Connection {
    /// Connects to `address`, `HOST:PORT`, within `deadline`, which is also the deadline of each unary call
    /// made with [`call`](Self::call). `authority` replaces the one that servers see.
    ///
    /// # Errors
    /// When `address` is none, nothing answers there, or not in time.
    pub async fn open(address: &str, authority: Option<&str>, deadline: Duration) -> Result<Self, ClientError> {
        let bad = |problem: String| ClientError::Address { address: address.to_owned(), problem };
        if address.starts_with("https://") {
            return Err(bad("TLS is not supported".to_owned()));
        }
        let bare = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        let uri: Uri = format!("http://{bare}").parse().map_err(|e: http::uri::InvalidUri| bad(e.to_string()))?;
        if uri.port_u16().is_none() {
            return Err(bad("it names no port".to_owned()));
        }
        let mut endpoint = Endpoint::from(uri)
            .connect_timeout(deadline)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .keep_alive_while_idle(false);
        if let Some(authority) = authority {
            let origin = format!("http://{authority}");
            endpoint = endpoint.origin(origin.parse().map_err(|e: http::uri::InvalidUri| bad(e.to_string()))?);
        }
        let channel = match tokio::time::timeout(deadline, endpoint.connect()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                return Err(ClientError::Unreachable { address: bare.to_owned(), cause: root_cause(&error) });
            }
            Err(_) => return Err(ClientError::TimedOut { address: bare.to_owned(), after: deadline }),
        };
        Ok(Self { channel, address: bare.to_owned(), deadline })
    }

    /// Who is connected to.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client of Seldon's scheduler API.
    #[must_use]
    pub fn scheduler(&self) -> SchedulerClient<Channel> {
        SchedulerClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A client of Wharf's own API.
    #[must_use]
    pub fn wharf(&self) -> WharfClient<Channel> {
        WharfClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A client of the Open Inference Protocol.
    #[must_use]
    pub fn inference(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Waits for `call` within the connection's deadline.
    ///
    /// # Errors
    /// What went wrong, by kind.
    pub async fn call<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, ClientError> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(answer) => answer.map_err(|status| self.classify(&status)),
            Err(_) => Err(ClientError::TimedOut { address: self.address.clone(), after: self.deadline }),
        }
    }

    /// What kind of failure a status is.
    #[must_use]
    pub fn classify(&self, status: &Status) -> ClientError {
        let address = self.address.clone();
        // A status with a source was made here, by the transport; one from the wire has none.
        let transport = status.source().map(root_cause);
        match (status.code(), transport) {
            (Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled, Some(cause)) => {
                ClientError::Unreachable { address, cause }
            }
            (Code::DeadlineExceeded, _) => ClientError::TimedOut { address, after: self.deadline },
            (Code::Unimplemented, _) => {
                ClientError::Unimplemented { address, method: said(status, "such method").to_owned() }
            }
            (code, _) => {
                ClientError::Refused { code: code_name(code), message: said(status, code.description()).to_owned() }
            }
        }
    }
}

/// A gRPC code's canonical name.
#[must_use]
pub const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The innermost source of an error: what the system said, without the layers in between.
#[must_use]
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    // The operating system's number helps nobody: "Connection refused (os error 111)".
    let text = innermost.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) if letters.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

fn said<'a>(status: &'a Status, otherwise: &'a str) -> &'a str {
    if status.message().is_empty() { otherwise } else { status.message() }
}

fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn an_address_without_a_port_is_refused_before_anything_is_sent() {
        for bad in ["", "localhost", "https://localhost:1", "a b:1", "host:port", "http://"] {
            let error = Connection::open(bad, None, SHORT).await.unwrap_err();
            assert!(matches!(error, ClientError::Address { .. }), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn a_port_where_nothing_listens_is_unreachable_and_says_why() {
        let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = Connection::open(&free.to_string(), None, SHORT).await.unwrap_err();
        let wanted = ClientError::Unreachable { address: free.to_string(), cause: "connection refused".into() };
        assert_eq!(error, wanted);
    }

    #[tokio::test]
    async fn a_server_that_never_answers_is_timed_out() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap().to_string();
        let connection = Connection::open(&address, None, Duration::from_millis(200)).await;
        // Depending on how far the handshake gets, it is the connection or the first call that waits.
        let error = match connection {
            Err(error) => error,
            Ok(connection) => {
                let mut client = connection.scheduler();
                connection
                    .call(client.scheduler_status(super::super::proto::scheduler::SchedulerStatusRequest::default()))
                    .await
                    .unwrap_err()
            }
        };
        assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    }
}
