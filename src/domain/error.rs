//! Errors of the domain. Each names what came, what was wanted and, where there is one, the way out; one
//! table in `rpc` maps their [`Code`] to gRPC and HTTP.

use thiserror::Error;

/// What kind of refusal an error is, for whoever must answer in a protocol's own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong, and will be tomorrow.
    Invalid,
    /// What it speaks of is not there.
    NotFound,
    /// It is right, but not in this state.
    FailedPrecondition,
    /// Another owns what it wants to change.
    PermissionDenied,
    /// A bound is reached; later may work.
    Exhausted,
    /// Not now; later will.
    Unavailable,
    /// It took too long.
    DeadlineExceeded,
    /// Not part of Wharf.
    Unimplemented,
    /// A fault of Wharf's own.
    Internal,
}

/// An error with its code, as the actors answer it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Refusal {
    /// Its kind.
    pub code: Code,
    /// One sentence that says what is wrong and what to do.
    pub message: String,
}

impl Refusal {
    /// A refusal of kind `code`.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<InvalidName> for Refusal {
    fn from(error: InvalidName) -> Self {
        // Seldon answers a bad name FailedPrecondition, and its operator takes only that as final.
        Self::new(Code::FailedPrecondition, error.to_string())
    }
}

impl From<SpecError> for Refusal {
    fn from(error: SpecError) -> Self {
        Self::new(Code::FailedPrecondition, error.to_string())
    }
}

/// A name that breaks the rule for names.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what} name {name:?} is not valid: {rule}; names match ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
pub struct InvalidName {
    /// What was to be named.
    pub what: &'static str,
    /// The name, clipped.
    pub name: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// A spec that can't be what was meant.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// The field, as the manifest calls it.
    pub field: &'static str,
    /// What is wrong with it, and the fix.
    pub problem: String,
}
