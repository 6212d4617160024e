//! How a command can end badly, and the exit code of each way.

use std::time::Duration;

use thiserror::Error;

use crate::{manifest::ManifestError, rpc::client::ClientError};

/// Whom a call was for: names it in errors, with the flag that says where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Scheduler,
    Gateway,
}

impl Peer {
    const fn name(self) -> &'static str {
        match self {
            Self::Scheduler => "scheduler",
            Self::Gateway => "gateway",
        }
    }

    const fn flag(self) -> &'static str {
        match self {
            Self::Scheduler => "--scheduler-host",
            Self::Gateway => "--inference-host",
        }
    }
}

/// A command that did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum Failure {
    /// The operation failed.
    #[error("{0}")]
    Failed(String),
    /// It was asked for wrongly.
    #[error("{0}")]
    Usage(String),
    /// Nothing answers.
    #[error("{0}")]
    Unreachable(String),
    /// It took too long.
    #[error("{0}")]
    TimedOut(String),
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// The process's exit code.
    pub(crate) const fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 3,
            Self::TimedOut(_) => 4,
            // What a shell expects of a process that an interrupt ended.
            Self::Interrupted => 130,
        }
    }

    /// A failed call to `peer`, with the next step.
    pub(crate) fn of(peer: Peer, error: ClientError) -> Self {
        let (name, flag) = (peer.name(), peer.flag());
        match error {
            ClientError::Address { .. } => Self::Usage(format!("{flag}: {error}")),
            ClientError::Unreachable { address, cause } => Self::Unreachable(format!(
                "can't reach the {name} at {address}: {cause}; is `wharf up` running? set {flag}"
            )),
            ClientError::TimedOut { address, after } => Self::TimedOut(format!(
                "the {name} at {address} did not answer within {}; try again, or set {flag}",
                seconds(after)
            )),
            ClientError::Unimplemented { address, method } => Self::Failed(format!(
                "the {name} at {address} can't do that ({method}); is it a Wharf, and as new as this one? set {flag}"
            )),
            ClientError::Refused { message, .. } => Self::Failed(message),
        }
    }
}

impl From<ManifestError> for Failure {
    fn from(error: ManifestError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A duration as people say it.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}
