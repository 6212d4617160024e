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
                | Report::Loading { .. }
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
            copy.ordered = match state {
                State::Scheduled { .. } => Some(now),
                State::Downloading { .. } | State::Loading { .. } => copy.ordered,
                State::Pending { .. }
                | State::Available { .. }
                | State::Draining { .. }
                | State::Unloaded
                | State::Failed { .. }
                | State::Unknown { .. } => None,
            };
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
            | Report::Loading { .. }
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
        Report::Loading { .. } => State::Loading { on },
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
        // It is on its way out there; when it is gone, it is ordered again. An order before that would be answered
        // with the same word, and that with an order, without an end.
        Report::Scheduled | Report::Draining { .. } => State::Scheduled { on },
        // It is wanted there: order it again.
        Report::Unloaded | Report::Available { .. } => {
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
                | Report::Loading { .. }
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

#[cfg(test)]
mod tests {
    use super::{super::FailureClass, *};
    use crate::domain::{
        copy::{Progress, Residency},
        memory::{Bytes, Resources},
        names::ServerName,
        placement::report::Unplaced,
        version::{Generation, Uid, Version},
    };

    /// The shapes that a copy can have, by one letter each: Pending, Scheduled, Downloading, Loading, Available, Draining
    /// while it Leaves the routes and while it is Unloaded, Failed with its memory reserved and Freed, Unloaded, Unknown
    /// while no gateway knows it, while some do, and while it is to leave.
    const SHAPES: &str = "P S D L A l u F f U ? ! x";

    /// Where each event leads from each shape, in the order of [`SHAPES`]; `-` is illegal.
    const TABLE: [(&str, &str); 15] = [
        ("Placed", "S - - - - - - - - - - - -"),
        ("Unplaced", "P - - - - - - - - - - - -"),
        ("Reported(Scheduled)", "- S S S S l u F - - S S l"),
        ("Reported(Downloading)", "- D D D D l u F - - D D l"),
        ("Reported(Loading)", "- L L L L l u F - - L L l"),
        ("Reported(Available)", "- A A A A l u F - - A A l"),
        ("Reported(Draining)", "- S S S S l u F - - S S l"),
        ("Reported(Unloaded)", "- S S S S U U f - - S S U"),
        ("Reported(Failed), reserved", "- F F F F l u F - - F F l"),
        ("Reported(Failed), freed", "- f f f f U U f - - f f U"),
        ("Missing", "- S S S S U U f - - S S U"),
        ("Drain", "U u u u l - - u U - x x -"),
        ("RoutesSettled", "- - - - - u - - - - - - x"),
        ("AgentLost", "- ? ? ? ! x x F - - ? ! x"),
        ("ReplicaLost", "- U U U U U U f - - U U U"),
    ];

    fn on() -> ReplicaId {
        ReplicaId::new(ServerName::new("mlserver").unwrap(), 0)
    }

    fn failure() -> Failure {
        Failure { class: FailureClass::Runtime, message: "it broke".to_owned() }
    }

    fn copy(shape: &str) -> Copy {
        let on = on();
        let (state, draining, routed) = match shape {
            "P" => (State::Pending { reason: None }, false, false),
            "S" => (State::Scheduled { on }, false, false),
            "D" => (State::Downloading { on, progress: Progress::default() }, false, false),
            "L" => (State::Loading { on }, false, false),
            "A" => (State::Available { on, residency: Residency::Resident }, false, true),
            "l" => (State::Draining { on, phase: Drain::Leaving }, true, false),
            "u" => (State::Draining { on, phase: Drain::Unloading }, true, false),
            "F" => (State::Failed { on: Some(on), failure: failure() }, false, false),
            "f" => (State::Failed { on: None, failure: failure() }, false, false),
            "U" => (State::Unloaded, false, false),
            "?" => (State::Unknown { on }, false, false),
            "!" => (State::Unknown { on }, false, true),
            "x" => (State::Unknown { on }, true, false),
            other => panic!("no shape {other}"),
        };
        Copy {
            generation: Generation { uid: Uid(1), version: Version(1), number: 0 },
            state,
            since: Instant::from_micros(1),
            need: Resources::primary(Bytes(1)),
            attempts: 0,
            ordered: None,
            avoid: Vec::new(),
            left: 0,
            awaited: None,
            draining,
            routed,
        }
    }

    fn shape(copy: &Copy) -> &'static str {
        match (&copy.state, copy.draining, copy.routed) {
            (State::Pending { .. }, false, false) => "P",
            (State::Scheduled { .. }, false, false) => "S",
            (State::Downloading { .. }, false, false) => "D",
            (State::Loading { .. }, false, false) => "L",
            (State::Available { .. }, false, true) => "A",
            (State::Draining { phase: Drain::Leaving, .. }, true, false) => "l",
            (State::Draining { phase: Drain::Unloading, .. }, true, false) => "u",
            (State::Failed { on: Some(_), .. }, false, false) => "F",
            (State::Failed { on: None, .. }, false, false) => "f",
            (State::Unloaded, _, false) => "U",
            (State::Unknown { .. }, false, false) => "?",
            (State::Unknown { .. }, false, true) => "!",
            (State::Unknown { .. }, true, false) => "x",
            _ => panic!("no copy may be like this: {copy:?}"),
        }
    }

    fn event(name: &str) -> Event {
        let reported = Event::Reported;
        match name {
            "Placed" => Event::Placed { on: on() },
            "Unplaced" => Event::Unplaced { reason: Unplaced::default() },
            "Reported(Scheduled)" => reported(Report::Scheduled),
            "Reported(Downloading)" => reported(Report::Downloading(Progress { done: 1, total: None })),
            "Reported(Loading)" => reported(Report::Loading { estimate: None }),
            "Reported(Available)" => {
                reported(Report::Available { residency: Residency::Evicted, measured: None, estimate: None })
            }
            "Reported(Draining)" => reported(Report::Draining { holds: 1 }),
            "Reported(Unloaded)" => reported(Report::Unloaded),
            "Reported(Failed), reserved" => reported(Report::Failed { failure: failure(), freed: false }),
            "Reported(Failed), freed" => reported(Report::Failed { failure: failure(), freed: true }),
            "Missing" => Event::Missing,
            "Drain" => Event::Drain,
            "RoutesSettled" => Event::RoutesSettled,
            "AgentLost" => Event::AgentLost,
            "ReplicaLost" => Event::ReplicaLost,
            other => panic!("no event {other}"),
        }
    }

    #[test]
    fn every_event_leads_where_the_table_says() {
        let shapes: Vec<&str> = SHAPES.split(' ').collect();
        for (name, row) in TABLE {
            let row: Vec<&str> = row.split(' ').collect();
            assert_eq!(row.len(), shapes.len(), "{name}");
            for (from, to) in shapes.iter().zip(row) {
                let (before, mut after) = (copy(from), copy(from));
                match step(&mut after, event(name), Instant::from_micros(2)) {
                    Ok(_) => assert_eq!(shape(&after), to, "{from} {name}"),
                    Err(illegal) => {
                        assert_eq!(to, "-", "{from} {name}: {illegal}");
                        assert_eq!(after, before, "an illegal event changed {from}");
                        assert_eq!((illegal.state, illegal.event), (before.state.name(), event(name).name()));
                    }
                }
            }
        }
    }

    #[test]
    fn a_copy_keeps_its_memory_until_it_is_said_to_be_free_and_frees_it_once() {
        for from in SHAPES.split(' ') {
            for (name, _) in TABLE {
                let (before, mut after) = (copy(from), copy(from));
                let Ok(effects) = step(&mut after, event(name), Instant::from_micros(2)) else { continue };
                let freed = before.state.replica().is_some() && after.state.replica().is_none();
                assert_eq!(effects.contains(&Effect::Release), freed, "{from} {name}: {effects:?}");
                assert_eq!(effects.contains(&Effect::Forget), freed, "{from} {name}: {effects:?}");
                let said = matches!(
                    event(name),
                    Event::Missing
                        | Event::ReplicaLost
                        | Event::Reported(Report::Unloaded | Report::Failed { freed: true, .. })
                );
                assert!(!freed || said, "{from} {name} frees memory that nobody said is free");
            }
        }
    }

    #[test]
    fn what_gateways_know_changes_only_with_a_new_route_and_an_unload_waits_for_it() {
        for from in SHAPES.split(' ') {
            for (name, _) in TABLE {
                let (before, mut after) = (copy(from), copy(from));
                let Ok(effects) = step(&mut after, event(name), Instant::from_micros(2)) else { continue };
                if before.routed != after.routed {
                    assert!(effects.contains(&Effect::Route), "{from} {name}: {effects:?}");
                }
                if effects.contains(&Effect::Unregister) {
                    assert!(!before.routed && !after.routed, "{from} {name} orders an unload of a routed copy");
                }
            }
        }
    }

    #[test]
    fn the_time_is_noted_when_the_state_becomes_another() {
        let later = Instant::from_micros(2);
        let mut copy = copy("S");
        step(&mut copy, event("Reported(Scheduled)"), later).unwrap();
        assert_eq!(copy.since, Instant::from_micros(1), "it is Scheduled as before");
        step(&mut copy, event("Reported(Loading)"), later).unwrap();
        assert_eq!(copy.since, later);
    }
}
