//! Routes: from a model's name to weighted versions to the endpoints of their copies.

use super::{
    names::{ModelName, ReplicaId},
    time::Instant,
    version::{Generation, Version},
};

/// Says which of two route tables is newer: the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Where requests for one model go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The model.
    pub model: ModelName,
    /// Versions by weight. An experiment would be one more writer of these.
    pub targets: Vec<Target>,
    /// What a client is told while there is no endpoint.
    pub absence: Absence,
}

/// One version's share of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The version.
    pub version: Version,
    /// Its share, relative to the sum of the route's weights.
    pub weight: u32,
    /// Its copies.
    pub endpoints: Vec<Endpoint>,
}

/// One copy that may be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Which copy.
    pub generation: Generation,
    /// The replica that holds it.
    pub replica: ReplicaId,
    /// Where that replica's door is: `host:port`, or `inproc:NAME` in the same process.
    pub door: String,
    /// Whether it is in memory, as far as is known: a hint.
    pub resident: bool,
}

/// Why a model has no endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Absence {
    /// The model's state.
    pub state: String,
    /// The reason for it.
    pub reason: String,
    /// When to ask again.
    pub retry_at: Option<Instant>,
}

impl Route {
    /// Whether any copy may be sent to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.iter().all(|target| target.endpoints.is_empty())
    }
}
