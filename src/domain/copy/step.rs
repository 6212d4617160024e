//! One step of a copy: a total match, without a branch for whatever else there may be.

use super::{Copy, Drain, Event, Failure, Illegal, Report, State};
use crate::domain::{names::ReplicaId, time::Instant};

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
