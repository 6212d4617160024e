//! The life of a copy. [`step`] is the only place where a copy's state changes.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{memory::Resources, names::ReplicaId, placement::report::Unplaced, time::Instant, version::Generation};

/// One version of a model on at most one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Which copy.
    pub generation: Generation,
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// Memory reserved for it on its replica.
    pub need: Resources,
    /// How many copies were tried in its place before it.
    pub attempts: u32,
    /// Replicas where its predecessors failed, to be tried last.
    pub avoid: Vec<ReplicaId>,
    /// The revision of the model's route that it left with.
    pub left: u64,
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
    Loading,
    /// It answers.
    Available {
        /// Where its bytes are.
        residency: Residency,
        /// What it was seen to need, when that was measured.
        measured: Option<Resources>,
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
            Self::Loading => "Reported(Loading)",
            Self::Available { .. } => "Reported(Available)",
            Self::Draining { .. } => "Reported(Draining)",
            Self::Unloaded => "Reported(Unloaded)",
            Self::Failed { .. } => "Reported(Failed)",
        }
    }
}

/// What a step asks of the world, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Write the assignment, with its marks, to the journal.
    Save,
    /// Remove the assignment from the journal.
    Forget,
    /// Free the reserved memory.
    Release,
    /// Take the request for a place back.
    Withdraw,
    /// Order the agent to hold the copy.
    Register,
    /// Order the agent to let it go.
    Unregister,
    /// Publish the model's route anew; once it is acknowledged, `RoutesSettled` follows.
    Route,
}

/// Takes `event` in the copy's state. The copy is changed only on success.
///
/// # Errors
/// When the event has no meaning in that state.
pub fn step(copy: &mut Copy, event: Event, now: Instant) -> Result<Vec<Effect>, Illegal> {
    let illegal = Illegal { state: copy.state.name(), event: event.name() };
    let (state, effects) = match (copy.state.clone(), event) {
        (State::Pending { .. }, event) => match event {
            Event::Placed { on } => (State::Scheduled { on }, vec![Effect::Save, Effect::Register]),
            Event::Unplaced { reason } => (State::Pending { reason: Some(reason) }, vec![]),
            Event::Drain => {
                copy.draining = true;
                (State::Unloaded, vec![Effect::Withdraw])
            }
            Event::Reported(_) | Event::Missing | Event::RoutesSettled | Event::AgentLost | Event::ReplicaLost => {
                return Err(illegal);
            }
        },
        (
            state @ (State::Scheduled { .. }
            | State::Downloading { .. }
            | State::Loading { .. }
            | State::Available { .. }
            | State::Unknown { .. }),
            event,
        ) => held(copy, state, event).ok_or(illegal)?,
        (State::Draining { on, phase }, event) => match event {
            Event::RoutesSettled => match phase {
                Drain::Leaving => (State::Draining { on, phase: Drain::Unloading }, vec![Effect::Unregister]),
                Drain::Unloading => return Err(illegal),
            },
            Event::Reported(Report::Unloaded | Report::Failed { freed: true, .. })
            | Event::Missing
            | Event::ReplicaLost => (State::Unloaded, vec![Effect::Forget, Effect::Release]),
            Event::Reported(
                Report::Scheduled
                | Report::Downloading(_)
                | Report::Loading
                | Report::Available { .. }
                | Report::Draining { .. }
                | Report::Failed { freed: false, .. },
            ) => (State::Draining { on, phase }, vec![]),
            Event::AgentLost => (State::Unknown { on }, vec![]),
            Event::Placed { .. } | Event::Unplaced { .. } | Event::Drain => return Err(illegal),
        },
        (State::Failed { on, failure }, event) => failed(copy, on, failure, event).ok_or(illegal)?,
        (State::Unloaded, _) => return Err(illegal),
    };
    if state != copy.state {
        if state.name() != copy.state.name() {
            copy.since = now;
        }
        copy.state = state;
    }
    Ok(effects)
}

/// A copy that its replica holds, is about to hold, or held when its agent was last heard.
fn held(copy: &mut Copy, state: State, event: Event) -> Option<(State, Vec<Effect>)> {
    let on = state.replica()?.clone();
    match event {
        Event::Placed { .. } | Event::Unplaced { .. } => None,
        Event::Drain if copy.draining => None,
        Event::Drain => {
            copy.draining = true;
            let unknown = matches!(state, State::Unknown { .. });
            let effects = match (std::mem::take(&mut copy.routed), unknown) {
                (true, _) => vec![Effect::Save, Effect::Route],
                (false, true) => vec![Effect::Save],
                // No gateway was ever told of it, so none has to acknowledge that it is gone.
                (false, false) => vec![Effect::Save, Effect::Unregister],
            };
            let next = match (unknown, effects.contains(&Effect::Unregister)) {
                (true, _) => state,
                (false, true) => State::Draining { on, phase: Drain::Unloading },
                (false, false) => State::Draining { on, phase: Drain::Leaving },
            };
            Some((next, effects))
        }
        Event::AgentLost => Some((State::Unknown { on }, vec![])),
        Event::ReplicaLost => {
            let mut effects = vec![Effect::Forget, Effect::Release];
            if std::mem::take(&mut copy.routed) {
                effects.push(Effect::Route);
            }
            Some((State::Unloaded, effects))
        }
        // The routes may be acknowledged while the agent is silent: what it says next decides.
        Event::RoutesSettled if copy.draining => Some((state, vec![])),
        Event::RoutesSettled => None,
        Event::Reported(report) if copy.draining => Some(match report {
            Report::Unloaded | Report::Failed { freed: true, .. } => {
                (State::Unloaded, vec![Effect::Forget, Effect::Release])
            }
            Report::Scheduled
            | Report::Downloading(_)
            | Report::Loading
            | Report::Available { .. }
            | Report::Draining { .. }
            | Report::Failed { freed: false, .. } => {
                (State::Draining { on, phase: Drain::Leaving }, vec![Effect::Route])
            }
        }),
        Event::Missing if copy.draining => Some((State::Unloaded, vec![Effect::Forget, Effect::Release])),
        Event::Reported(Report::Available { residency, .. }) => {
            let effects = if copy.routed { vec![] } else { vec![Effect::Save, Effect::Route] };
            copy.routed = true;
            Some((State::Available { on, residency }, effects))
        }
        Event::Reported(report) => Some(unavailable(copy, on, report)),
        Event::Missing => Some(unavailable(copy, on, Report::Unloaded)),
    }
}

/// Its agent says that a copy, which is to stay, does not answer.
fn unavailable(copy: &mut Copy, on: ReplicaId, report: Report) -> (State, Vec<Effect>) {
    let mut effects = if std::mem::take(&mut copy.routed) { vec![Effect::Save, Effect::Route] } else { vec![] };
    let state = match report {
        Report::Downloading(progress) => State::Downloading { on, progress },
        Report::Loading => State::Loading { on },
        Report::Failed { failure, freed: false } => {
            copy.avoid.push(on.clone());
            State::Failed { on: Some(on), failure }
        }
        Report::Failed { failure, freed: true } => {
            copy.avoid.push(on);
            effects.retain(|effect| *effect != Effect::Save);
            effects.splice(0..0, [Effect::Forget, Effect::Release]);
            State::Failed { on: None, failure }
        }
        Report::Scheduled => State::Scheduled { on },
        // It is wanted there: order it again.
        Report::Unloaded | Report::Draining { .. } | Report::Available { .. } => {
            let at = effects.iter().position(|effect| *effect == Effect::Route).unwrap_or(effects.len());
            effects.insert(at, Effect::Register);
            State::Scheduled { on }
        }
    };
    (state, effects)
}

fn failed(copy: &mut Copy, on: Option<ReplicaId>, failure: Failure, event: Event) -> Option<(State, Vec<Effect>)> {
    let freed = |failure| (State::Failed { on: None, failure }, vec![Effect::Forget, Effect::Release]);
    match (on, event) {
        (Some(on), event) => match event {
            Event::Reported(Report::Unloaded | Report::Failed { freed: true, .. })
            | Event::Missing
            | Event::ReplicaLost => Some(freed(failure)),
            // A late word of success about what is given up: it has to go.
            Event::Reported(Report::Available { .. }) => {
                Some((State::Failed { on: Some(on), failure }, vec![Effect::Unregister]))
            }
            Event::Reported(
                Report::Scheduled
                | Report::Downloading(_)
                | Report::Loading
                | Report::Draining { .. }
                | Report::Failed { freed: false, .. },
            )
            | Event::AgentLost => Some((State::Failed { on: Some(on), failure }, vec![])),
            Event::Drain => {
                copy.draining = true;
                Some((State::Draining { on, phase: Drain::Unloading }, vec![Effect::Save, Effect::Unregister]))
            }
            Event::Placed { .. } | Event::Unplaced { .. } | Event::RoutesSettled => None,
        },
        (None, Event::Drain) => {
            copy.draining = true;
            Some((State::Unloaded, vec![]))
        }
        (
            None,
            Event::Placed { .. }
            | Event::Unplaced { .. }
            | Event::Reported(_)
            | Event::Missing
            | Event::RoutesSettled
            | Event::AgentLost
            | Event::ReplicaLost,
        ) => None,
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
