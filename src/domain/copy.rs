//! The life of a copy. [`step`] is the only place where a copy's state changes.

mod step;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::step::{Effect, step};

use super::{
    memory::Resources, names::ReplicaId, placement::report::Unplaced, size::Size, time::Instant, version::Generation,
};

/// One version of a model on at most one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Which copy.
    pub generation: Generation,
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// When it was ordered, while it is on its way to answer; absent when that is not known.
    pub ordered: Option<Instant>,
    /// Memory reserved for it on its replica.
    pub need: Resources,
    /// How many copies were tried in its place before it.
    pub attempts: u32,
    /// Replicas where its predecessors failed, to be tried last.
    pub avoid: Vec<ReplicaId>,
    /// The revision of the model's route that it left with.
    pub left: u64,
    /// The revision of the model's route that it joined with, until every gateway has that. Until then a
    /// client may still be told that nothing answers, so it does not count as available.
    pub awaited: Option<u64>,
    /// Whether it is to leave: set once, never taken back.
    pub draining: bool,
    /// Whether the routes hold it.
    pub routed: bool,
}

/// Where a copy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Wanted; no replica chosen.
    Pending {
        /// Why none was found, filter by filter; absent before the first try.
        reason: Option<Unplaced>,
    },
    /// A replica is chosen and its memory reserved; the order is with the agent.
    Scheduled {
        /// The replica.
        on: ReplicaId,
    },
    /// The agent fetches the artifact.
    Downloading {
        /// The replica.
        on: ReplicaId,
        /// Bytes so far.
        progress: Progress,
    },
    /// The inference server loads it.
    Loading {
        /// The replica.
        on: ReplicaId,
    },
    /// It answers requests.
    Available {
        /// The replica.
        on: ReplicaId,
        /// Where its bytes are.
        residency: Residency,
    },
    /// Out of the routes, or leaving them; requests in flight are finishing.
    Draining {
        /// The replica.
        on: ReplicaId,
        /// How far it is.
        phase: Drain,
    },
    /// The agent has reported its memory free.
    Unloaded,
    /// It could not be loaded.
    Failed {
        /// The replica whose memory is reserved until it reports it free; absent after that.
        on: Option<ReplicaId>,
        /// What went wrong.
        failure: Failure,
    },
    /// Its agent is silent, or the scheduler has just started.
    Unknown {
        /// The replica.
        on: ReplicaId,
    },
}

/// How far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes fetched.
    pub done: u64,
    /// Bytes in all, when the source tells.
    pub total: Option<u64>,
}

/// Where an available copy's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Residency {
    /// In memory.
    Resident,
    /// Being removed from memory.
    Evicting,
    /// On disk only; the next request brings it back.
    Evicted,
    /// Being brought back.
    Reloading,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Waiting until every gateway has acknowledged routes without it.
    Leaving,
    /// The agent is ordered to unload it after its last hold.
    Unloading,
}

/// Why a copy could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of trouble.
    pub class: FailureClass,
    /// One sentence, from where it happened.
    pub message: String,
}

/// Kinds of failure, which decide whether another try can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureClass {
    /// The artifact is missing, broken or not what was said.
    Artifact,
    /// The store refused the credentials.
    Authorisation,
    /// It needs more memory than there is.
    Memory,
    /// The inference server failed.
    Runtime,
    /// It took too long.
    Timeout,
    /// The inference server can't serve this kind of model.
    Incompatible,
}

impl FailureClass {
    /// Whether the same spec could load elsewhere or later.
    #[must_use]
    pub const fn retryable(self) -> bool {
        match self {
            Self::Memory | Self::Runtime | Self::Timeout | Self::Artifact | Self::Authorisation => true,
            Self::Incompatible => false,
        }
    }

    /// The class, as people see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Artifact => "artifact",
            Self::Authorisation => "authorisation",
            Self::Memory => "memory",
            Self::Runtime => "runtime",
            Self::Timeout => "timeout",
            Self::Incompatible => "incompatible",
        }
    }
}

/// What an agent says of a copy that it holds or held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The order arrived and waits.
    Scheduled,
    /// The artifact is being fetched.
    Downloading(Progress),
    /// The inference server is loading it.
    Loading {
        /// What it is taken for until it is measured.
        estimate: Option<Box<Size>>,
    },
    /// It answers.
    Available {
        /// Where its bytes are.
        residency: Residency,
        /// What it was seen to need, when that was measured.
        measured: Option<Box<Size>>,
        /// What it is taken for, when it was not measured: who did not hear of its load hears it here.
        estimate: Option<Box<Size>>,
    },
    /// It refuses new holds and waits for the last.
    Draining {
        /// Holds still out.
        holds: u32,
    },
    /// Its memory is free, and nothing of it is left in the inference server.
    Unloaded,
    /// It could not be loaded.
    Failed {
        /// Why.
        failure: Failure,
        /// Whether its memory is free.
        freed: bool,
    },
}

impl State {
    /// The replica that holds, or is to hold, the copy.
    #[must_use]
    pub const fn replica(&self) -> Option<&ReplicaId> {
        match self {
            Self::Pending { .. } | Self::Unloaded => None,
            Self::Failed { on, .. } => on.as_ref(),
            Self::Scheduled { on }
            | Self::Downloading { on, .. }
            | Self::Loading { on }
            | Self::Available { on, .. }
            | Self::Draining { on, .. }
            | Self::Unknown { on } => Some(on),
        }
    }

    /// The state's name, as people and clients see it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pending { .. } => "Pending",
            Self::Scheduled { .. } => "Scheduled",
            Self::Downloading { .. } => "Downloading",
            Self::Loading { .. } => "Loading",
            Self::Available { .. } => "Available",
            Self::Draining { .. } => "Draining",
            Self::Unloaded => "Unloaded",
            Self::Failed { .. } => "Failed",
            Self::Unknown { .. } => "Unknown",
        }
    }
}

/// What happens to a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The placement chose a replica and reserved the memory.
    Placed {
        /// The replica.
        on: ReplicaId,
    },
    /// The placement found no replica.
    Unplaced {
        /// Why.
        reason: Unplaced,
    },
    /// Its agent reports.
    Reported(Report),
    /// Its agent's inventory lacks it.
    Missing,
    /// It is to leave: superseded, deleted, scaled down, or its replica is drained.
    Drain,
    /// Every gateway with a lease has acknowledged routes without it.
    RoutesSettled,
    /// Its agent is silent.
    AgentLost,
    /// Its agent was silent for the whole grace period, or its replica is gone.
    ReplicaLost,
}

impl Event {
    /// The event's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Placed { .. } => "Placed",
            Self::Unplaced { .. } => "Unplaced",
            Self::Reported(report) => report.name(),
            Self::Missing => "Missing",
            Self::Drain => "Drain",
            Self::RoutesSettled => "RoutesSettled",
            Self::AgentLost => "AgentLost",
            Self::ReplicaLost => "ReplicaLost",
        }
    }
}

impl Report {
    /// The report's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Scheduled => "Reported(Scheduled)",
            Self::Downloading(_) => "Reported(Downloading)",
            Self::Loading { .. } => "Reported(Loading)",
            Self::Available { .. } => "Reported(Available)",
            Self::Draining { .. } => "Reported(Draining)",
            Self::Unloaded => "Reported(Unloaded)",
            Self::Failed { .. } => "Reported(Failed)",
        }
    }
}

/// An event that has no meaning in a state. It changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a copy that is {state} can't take {event}")]
pub struct Illegal {
    /// The state's name.
    pub state: &'static str,
    /// The event's name.
    pub event: &'static str,
}
