//! The states of a server's replica.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::time::Instant;

/// Where a replica stands. Whether it is cordoned is a mark beside this, kept over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// Declared, and no agent has called yet.
    Pending,
    /// Its agent renews its lease.
    Available,
    /// Its copies move away; nothing new is placed on it.
    Draining,
    /// Its agent is silent since then; its copies stay routed and their memory reserved.
    Unknown {
        /// When it was last heard.
        since: Instant,
    },
    /// It was silent for the whole grace period, or left; its copies are placed elsewhere.
    Lost,
}

impl ReplicaState {
    /// The state's name, as people and clients see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Available => "Available",
            Self::Draining => "Draining",
            Self::Unknown { .. } => "Unknown",
            Self::Lost => "Lost",
        }
    }
}

/// What happens to a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its agent called, or was heard again.
    Heard,
    /// Its agent called, and obeys this scheduler in nothing.
    Refuses,
    /// Its agent's connection ended.
    Gone,
    /// Time passed; the agent was last heard then.
    Passed {
        /// The last word of the agent.
        heard: Instant,
    },
}

/// Patience with silent agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Silence longer than this makes it Unknown.
    pub lease: Duration,
    /// Being Unknown longer than this makes it Lost.
    pub grace: Duration,
}

/// Takes an event. Draining is a mark beside the state, so it is not among the results: see [`shown`].
#[must_use]
pub fn step(state: ReplicaState, event: Event, patience: Patience, now: Instant) -> ReplicaState {
    match (state, event) {
        (_, Event::Heard) => ReplicaState::Available,
        // It is there, and what it holds answers: its grace begins anew.
        (_, Event::Refuses) => ReplicaState::Unknown { since: now },
        (ReplicaState::Available | ReplicaState::Draining, Event::Gone) => ReplicaState::Unknown { since: now },
        (ReplicaState::Available | ReplicaState::Draining, Event::Passed { heard })
            if now.since(heard) > patience.lease =>
        {
            ReplicaState::Unknown { since: now }
        }
        (ReplicaState::Unknown { since }, Event::Passed { .. }) if now.since(since) > patience.grace => {
            ReplicaState::Lost
        }
        (
            ReplicaState::Available
            | ReplicaState::Draining
            | ReplicaState::Pending
            | ReplicaState::Unknown { .. }
            | ReplicaState::Lost,
            Event::Gone | Event::Passed { .. },
        ) => state,
    }
}

/// The state with the operator's mark: what people and the placement see.
#[must_use]
pub const fn shown(state: ReplicaState, draining: bool) -> ReplicaState {
    match state {
        ReplicaState::Available if draining => ReplicaState::Draining,
        ReplicaState::Available
        | ReplicaState::Draining
        | ReplicaState::Pending
        | ReplicaState::Unknown { .. }
        | ReplicaState::Lost => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_whose_agent_calls_and_refuses_is_never_lost() {
        let patience = Patience { lease: Duration::from_secs(5), grace: Duration::from_secs(30) };
        let at = |seconds: u64| Instant::from_micros(seconds * 1_000_000);
        let mut state = ReplicaState::Unknown { since: at(0) };
        for now in (0..300).step_by(10) {
            state = step(state, Event::Refuses, patience, at(now));
            state = step(state, Event::Passed { heard: at(0) }, patience, at(now + 9));
            assert_eq!(state, ReplicaState::Unknown { since: at(now) });
        }
        state = step(state, Event::Passed { heard: at(0) }, patience, at(400));
        assert_eq!(state, ReplicaState::Lost);
    }
}
