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

/// What decides whether a replica is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Where it stands.
    pub state: ReplicaState,
    /// Since when.
    pub since: Instant,
    /// Whether nothing is there, nor wanted there, nor asked about.
    pub idle: bool,
    /// Whether its agent is connected.
    pub connected: bool,
    /// Whether its agent has called since the scheduler started. Until then nobody knows what it holds.
    pub called: bool,
    /// Whether an owner wants it; absent when there is no owner.
    pub expected: Option<bool>,
    /// Whether its server is taken away.
    pub removing: bool,
}

/// Whether a replica is to be forgotten: it holds nothing and is wanted for nothing. One that no owner ever spoke of
/// is kept for the grace period after it was Lost, for its agent may only be late.
#[must_use]
pub fn is_over(rest: Rest, patience: Patience, now: Instant) -> bool {
    let unheard = match rest.state {
        ReplicaState::Unknown { .. } => !rest.called,
        ReplicaState::Pending | ReplicaState::Available | ReplicaState::Draining | ReplicaState::Lost => false,
    };
    if !rest.idle || unheard {
        return false;
    }
    if rest.removing {
        // While its agent is connected it stays: forgotten, it would be made anew by the next word.
        return !rest.connected;
    }
    match rest.expected {
        Some(expected) => !expected,
        None => rest.state == ReplicaState::Lost && !rest.connected && now.since(rest.since) > patience.grace,
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

    const GRACE: Duration = Duration::from_secs(10);
    const PATIENCE: Patience = Patience { lease: Duration::from_secs(1), grace: GRACE };
    const T0: Instant = Instant::from_micros(1_000_000);

    fn lost() -> Rest {
        Rest {
            state: ReplicaState::Lost,
            since: T0,
            idle: true,
            connected: false,
            called: true,
            expected: None,
            removing: false,
        }
    }

    #[test]
    fn a_replica_that_no_owner_spoke_of_is_kept_for_the_grace_period_after_it_was_lost() {
        let second = Duration::from_secs(1);
        assert!(!is_over(lost(), PATIENCE, T0 + GRACE));
        assert!(is_over(lost(), PATIENCE, T0 + GRACE + second));
        for kept in [
            Rest { idle: false, ..lost() },
            Rest { connected: true, ..lost() },
            Rest { state: ReplicaState::Available, ..lost() },
            Rest { state: ReplicaState::Unknown { since: T0 }, ..lost() },
            Rest { expected: Some(true), ..lost() },
        ] {
            assert!(!is_over(kept, PATIENCE, T0 + GRACE + second), "{kept:?}");
        }
    }

    #[test]
    fn a_replica_that_is_not_expected_goes_once_it_holds_nothing_and_somebody_knows_that() {
        let unexpected = Rest { expected: Some(false), state: ReplicaState::Available, connected: true, ..lost() };
        assert!(is_over(unexpected, PATIENCE, T0));
        assert!(!is_over(Rest { idle: false, ..unexpected }, PATIENCE, T0));
        let unknown = Rest { state: ReplicaState::Unknown { since: T0 }, connected: false, ..unexpected };
        assert!(is_over(unknown, PATIENCE, T0), "its agent said what it holds before it went");
        assert!(!is_over(Rest { called: false, ..unknown }, PATIENCE, T0), "nobody has said yet what it holds");
        let removed = Rest { removing: true, expected: Some(true), ..unexpected };
        assert!(!is_over(removed, PATIENCE, T0), "its agent's next word would make it anew");
        assert!(is_over(Rest { connected: false, ..removed }, PATIENCE, T0));
    }

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
