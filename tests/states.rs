//! The promise: what `docs/states.md` says of states is what the code does. Its tables are made from the code;
//! `UPDATE=1` writes them anew.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on has failed"
)]

use std::{collections::BTreeSet, fmt::Write as _, fs, path::PathBuf, time::Duration};

use wharf::{
    domain::{
        copy::{Copy, Drain, Effect, Event, Failure, FailureClass, Progress, Report, Residency, State, step},
        memory::{Bytes, Resources},
        model::{ModelState, Reason, standing},
        names::{ReplicaId, ServerName},
        placement::report::Unplaced,
        replica::{self, Patience, ReplicaState, shown},
        time::Instant,
        version::{Generation, Uid, Version},
    },
    rpc::views::{seldon_replica_state, seldon_state},
};

fn page() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/states.md")
}

/// Compares what stands between the markers of `name` in the page with `table`.
#[track_caller]
fn same(name: &str, table: &str) {
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let text = fs::read_to_string(page()).unwrap();
    let from = text.find(&begin).unwrap_or_else(|| panic!("docs/states.md has no {begin}")) + begin.len();
    let to = from + text[from..].find(&end).unwrap_or_else(|| panic!("docs/states.md has no {end}"));
    if std::env::vars().any(|(name, _)| name == "UPDATE") {
        fs::write(page(), format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
        return;
    }
    assert!(
        text[from..to] == *table,
        "the table {name} in docs/states.md is not what the code does; UPDATE=1 writes it anew. The code does:\n{table}"
    );
}

fn on() -> ReplicaId {
    ReplicaId::new(ServerName::new("mlserver").unwrap(), 0)
}

fn failure() -> Failure {
    Failure { class: FailureClass::Runtime, message: "it broke".to_owned() }
}

fn copy(state: State, draining: bool, routed: bool) -> Copy {
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

/// What a copy can be, as far as it decides over what follows.
fn shapes() -> Vec<(&'static str, Copy)> {
    let unknown = || State::Unknown { on: on() };
    vec![
        ("Pending", copy(State::Pending { reason: None }, false, false)),
        ("Scheduled", copy(State::Scheduled { on: on() }, false, false)),
        ("Downloading", copy(State::Downloading { on: on(), progress: Progress::default() }, false, false)),
        ("Loading", copy(State::Loading { on: on() }, false, false)),
        ("Available", copy(State::Available { on: on(), residency: Residency::Resident }, false, true)),
        ("Draining, leaving the routes", copy(State::Draining { on: on(), phase: Drain::Leaving }, true, false)),
        ("Draining, unloading", copy(State::Draining { on: on(), phase: Drain::Unloading }, true, false)),
        ("Failed, its memory reserved", copy(State::Failed { on: Some(on()), failure: failure() }, false, false)),
        ("Failed, its memory free", copy(State::Failed { on: None, failure: failure() }, false, false)),
        ("Unknown, in the routes", copy(unknown(), false, true)),
        ("Unknown, not in the routes", copy(unknown(), false, false)),
        ("Unknown, and to leave", copy(unknown(), true, false)),
        ("Unloaded", copy(State::Unloaded, false, false)),
    ]
}

/// A copy's shape, by its name in [`shapes`].
fn shape(copy: &Copy) -> &'static str {
    let same = |other: &Copy| {
        let phase = |copy: &Copy| match &copy.state {
            State::Draining { phase, .. } => Some(*phase),
            _ => None,
        };
        copy.state.name() == other.state.name()
            && copy.state.replica().is_some() == other.state.replica().is_some()
            && phase(copy) == phase(other)
            && (copy.state == State::Unloaded || (copy.draining, copy.routed) == (other.draining, other.routed))
    };
    let found = shapes().into_iter().find(|(_, other)| same(other));
    found.unwrap_or_else(|| panic!("docs/states.md knows no copy like this: {copy:?}")).0
}

fn events() -> Vec<(&'static str, Event)> {
    let failed = |freed| Event::Reported(Report::Failed { failure: failure(), freed });
    vec![
        ("Placed", Event::Placed { on: on() }),
        ("Unplaced", Event::Unplaced { reason: Unplaced::default() }),
        ("Reported(Scheduled)", Event::Reported(Report::Scheduled)),
        ("Reported(Downloading)", Event::Reported(Report::Downloading(Progress { done: 1, total: None }))),
        ("Reported(Loading)", Event::Reported(Report::Loading { estimate: None })),
        (
            "Reported(Available)",
            Event::Reported(Report::Available {
                residency: Residency::Resident,
                measured: None,
                estimate: None,
                pinned: false,
            }),
        ),
        ("Reported(Draining)", Event::Reported(Report::Draining { holds: 1 })),
        ("Reported(Unloaded)", Event::Reported(Report::Unloaded)),
        ("Reported(Failed), reserved", failed(false)),
        ("Reported(Failed), freed", failed(true)),
        ("Missing", Event::Missing),
        ("Drain", Event::Drain),
        ("RoutesSettled", Event::RoutesSettled),
        ("AgentLost", Event::AgentLost),
        ("ReplicaLost", Event::ReplicaLost),
    ]
}

/// Fails to compile when a state or an event is new, so that nobody forgets it here.
const fn all_are_listed(state: &State, event: &Event) {
    match state {
        State::Pending { .. }
        | State::Scheduled { .. }
        | State::Downloading { .. }
        | State::Loading { .. }
        | State::Available { .. }
        | State::Draining { .. }
        | State::Unloaded
        | State::Failed { .. }
        | State::Unknown { .. } => {}
    }
    match event {
        Event::Placed { .. }
        | Event::Unplaced { .. }
        | Event::Reported(
            Report::Scheduled
            | Report::Downloading(_)
            | Report::Loading { .. }
            | Report::Available { .. }
            | Report::Draining { .. }
            | Report::Unloaded
            | Report::Failed { .. },
        )
        | Event::Missing
        | Event::Drain
        | Event::RoutesSettled
        | Event::AgentLost
        | Event::ReplicaLost => {}
    }
}

fn take(copy: &Copy, event: &Event) -> Option<(Copy, Vec<Effect>)> {
    let mut after = copy.clone();
    match step(&mut after, event.clone(), Instant::from_micros(2)) {
        Ok(effects) => Some((after, effects)),
        Err(_) => {
            assert_eq!(after, *copy, "an illegal event changed the copy");
            None
        }
    }
}

#[test]
fn the_steps_of_a_copy_are_those_of_the_page() {
    let mut text = String::new();
    for (name, before) in shapes() {
        assert_eq!(shape(&before), name);
        writeln!(text, "### {name}\n\n| event | becomes | effects |\n|---|---|---|").unwrap();
        let mut rows: Vec<(Vec<&str>, String, String)> = Vec::new();
        for (event_name, event) in events() {
            all_are_listed(&before.state, &event);
            let (becomes, effects) = match take(&before, &event) {
                None => ("*illegal*".to_owned(), String::new()),
                Some((after, effects)) => {
                    let effects: Vec<String> = effects.iter().map(|effect| format!("{effect:?}")).collect();
                    let becomes = shape(&after);
                    (if becomes == name { "stays".to_owned() } else { becomes.to_owned() }, effects.join(", "))
                }
            };
            match rows.iter_mut().find(|(_, b, e)| (b, e) == (&becomes, &effects)) {
                Some((events, ..)) => events.push(event_name),
                None => rows.push((vec![event_name], becomes, effects)),
            }
        }
        // What means nothing comes last.
        rows.sort_by_key(|(_, becomes, _)| becomes == "*illegal*");
        for (events, becomes, effects) in rows {
            writeln!(text, "| {} | {becomes} | {effects} |", events.join("; ")).unwrap();
        }
        text.push('\n');
    }
    same("steps", &text);
}

#[test]
fn no_copy_is_ever_in_a_state_that_the_page_lacks() {
    // How a copy begins: wanted, or read from the journal of the run before.
    let begun = ["Pending", "Unknown, in the routes", "Unknown, not in the routes", "Unknown, and to leave"];
    let mut seen: BTreeSet<&str> = begun.into();
    let mut next: Vec<Copy> = shapes().into_iter().filter(|(name, _)| seen.contains(name)).map(|(_, c)| c).collect();
    while let Some(copy) = next.pop() {
        for (_, event) in events() {
            if let Some((after, _)) = take(&copy, &event)
                && seen.insert(shape(&after))
            {
                next.push(after);
            }
        }
    }
    let all: BTreeSet<&str> = shapes().iter().map(|(name, _)| *name).collect();
    assert_eq!(seen, all, "the page has states that no copy can reach");
}

#[test]
fn seldons_words_for_a_copy_are_those_of_the_page() {
    let mut text = "| copy | ModelReplicaState |\n|---|---|\n".to_owned();
    for (name, copy) in shapes() {
        writeln!(text, "| {name} | {} |", seldon_replica_state(&copy).as_str_name()).unwrap();
    }
    same("seldon copies", &text);
}

// === replicas ===

#[test]
fn the_steps_of_a_replica_are_those_of_the_page() {
    let patience = Patience { lease: Duration::from_secs(5), grace: Duration::from_secs(30) };
    let (past, now) = (Instant::from_micros(1_000_000), Instant::from_micros(100_000_000));
    let recent = Instant::from_micros(99_000_000);
    let states = [
        ("Pending", vec![ReplicaState::Pending]),
        ("Available", vec![ReplicaState::Available]),
        ("Unknown", vec![ReplicaState::Unknown { since: recent }]),
        ("Unknown for longer than the grace period", vec![ReplicaState::Unknown { since: past }]),
        ("Lost", vec![ReplicaState::Lost]),
    ];
    let events = [
        ("the agent is heard", replica::Event::Heard),
        ("the agent calls, and obeys a later start of the journal", replica::Event::Refuses),
        ("its connection ends", replica::Event::Gone),
        ("silent within its lease", replica::Event::Passed { heard: recent }),
        ("silent for longer than its lease", replica::Event::Passed { heard: past }),
    ];
    let mut text = "| state |".to_owned();
    events.iter().for_each(|(name, _)| write!(text, " {name} |").unwrap());
    writeln!(text, "\n|---|{}", "---|".repeat(events.len())).unwrap();
    for (name, states) in states {
        write!(text, "| {name} |").unwrap();
        for (_, event) in events {
            let after = replica::step(states[0], event, patience, now);
            let word = if after == states[0] { "stays" } else { after.name() };
            write!(text, " {word} |").unwrap();
        }
        text.push('\n');
    }
    same("replicas", &text);
    // Draining is Available with an operator's mark, and nothing else.
    for state in [ReplicaState::Pending, ReplicaState::Unknown { since: past }, ReplicaState::Lost] {
        assert_eq!(shown(state, true), state);
    }
    assert_eq!(shown(ReplicaState::Available, true), ReplicaState::Draining);
}

// === models ===

/// What there is of a model.
#[derive(Clone, Debug, Default)]
struct Crowd {
    available: u32,
    failed: u32,
    unplaced: u32,
    untried: u32,
    moving: u32,
    joining: u32,
    leaving: u32,
    silent: u32,
    gone: u32,
    wanted: u32,
    least: u32,
    over: bool,
}

impl Crowd {
    const fn left(&self) -> u32 {
        self.available
            + self.failed
            + self.unplaced
            + self.untried
            + self.moving
            + self.joining
            + self.leaving
            + self.silent
    }

    fn copies(&self) -> Vec<Copy> {
        let on = on();
        let mut joining = copy(State::Available { on: on.clone(), residency: Residency::Resident }, false, true);
        joining.awaited = Some(1);
        let kinds = [
            (self.available, copy(State::Available { on: on.clone(), residency: Residency::Evicted }, false, true)),
            (self.failed, copy(State::Failed { on: None, failure: failure() }, false, false)),
            (self.unplaced, copy(State::Pending { reason: Some(Unplaced::default()) }, false, false)),
            (self.untried, copy(State::Pending { reason: None }, false, false)),
            (self.moving, copy(State::Loading { on: on.clone() }, false, false)),
            (self.joining, joining),
            (self.leaving, copy(State::Draining { on: on.clone(), phase: Drain::Leaving }, true, false)),
            (self.silent, copy(State::Unknown { on }, false, true)),
            (self.gone, copy(State::Unloaded, true, false)),
        ];
        kinds.into_iter().flat_map(|(count, copy)| std::iter::repeat_n(copy, count as usize)).collect()
    }
}

type When = fn(&Crowd) -> bool;

/// The rows of the page: the first that holds decides.
const RULES: [(&str, When, ModelState, &str); 9] = [
    ("deleted or superseded, and nothing is left", |c| c.over && c.left() == 0, ModelState::Terminated, ""),
    ("deleted or superseded", |c| c.over, ModelState::Terminating, "how many copies are leaving"),
    ("no copy is wanted, and none is left", |c| c.wanted == 0 && c.left() == 0, ModelState::ScaledDown, ""),
    ("no copy is wanted", |c| c.wanted == 0, ModelState::ScaledDown, "how many copies are leaving"),
    ("as many copies answer as are wanted", |c| c.available >= c.wanted, ModelState::Available, ""),
    (
        "some copies answer, and no fewer than `minReplicas`",
        |c| c.available > 0 && c.available >= c.least,
        ModelState::Available,
        "`Partial`: how many answer, and what keeps the others",
    ),
    ("a copy is Failed", |c| c.failed > 0, ModelState::Failed, "the failure's class and message"),
    ("a copy found no replica", |c| c.unplaced > 0, ModelState::ScheduleFailed, "what the filters said"),
    ("otherwise", |_| true, ModelState::Progressing, "what is being done, or whose word is waited for"),
];

fn crowds() -> Vec<Crowd> {
    let mut crowds = Vec::new();
    let counts = [0_u32, 1, 2];
    let few = [0_u32, 1];
    for available in counts {
        for wanted in [0, 1, 2, 3] {
            for least in 0..=wanted {
                for over in [false, true] {
                    for bits in 0..(1_u32 << 8) {
                        let bit = |n: u32| few[(bits >> n & 1) as usize];
                        crowds.push(Crowd {
                            available,
                            failed: bit(0),
                            unplaced: bit(1),
                            untried: bit(2),
                            moving: bit(3),
                            leaving: bit(4),
                            silent: bit(5),
                            gone: bit(6),
                            joining: bit(7),
                            wanted,
                            least,
                            over,
                        });
                    }
                }
            }
        }
    }
    crowds
}

#[test]
fn the_state_of_a_model_is_that_of_the_first_row_that_holds() {
    let mut held = [false; RULES.len()];
    for crowd in crowds() {
        let found = standing(crowd.copies().iter(), crowd.wanted, crowd.least, crowd.over);
        let row = RULES.iter().position(|(_, when, ..)| when(&crowd)).unwrap();
        held[row] = true;
        let (text, _, state, reason) = RULES[row];
        assert_eq!(found.state, state, "{text}: {crowd:?} is {found:?}");
        assert_eq!(found.sentence().is_empty(), reason.is_empty(), "{text}: {crowd:?} is {found:?}");
        let kind = match &found.reason {
            Reason::None => "",
            Reason::Partial(..) => "`Partial`",
            Reason::Waiting(_) => "what is being done",
            Reason::Leaving => "how many copies are leaving",
            Reason::Unplaced(_) => "what the filters said",
            Reason::Failed(_) => "the failure's",
            Reason::Held(..) | Reason::RolloutFailed(_) => "never from copies alone",
        };
        assert!(reason.starts_with(kind), "{text}: {crowd:?} is {found:?}");
        assert_eq!((found.available, found.available + found.unavailable), (crowd.available, crowd.left()));
    }
    assert_eq!(held, [true; RULES.len()], "a row that never holds says nothing");

    let mut text = "| when | state | reason | Seldon's ModelState |\n|---|---|---|---|\n".to_owned();
    for (when, _, state, reason) in RULES {
        writeln!(text, "| {when} | {} | {reason} | {} |", state.name(), seldon_state(state).as_str_name()).unwrap();
    }
    same("models", &text);
}

#[test]
fn every_failure_class_is_on_the_page_with_whether_it_is_tried_again() {
    let classes = [
        (FailureClass::Artifact, "the artifact is missing, broken or not what was said"),
        (FailureClass::Authorisation, "the store refused the credentials"),
        (FailureClass::Memory, "it needs more memory than there is"),
        (FailureClass::Runtime, "the inference server failed"),
        (FailureClass::Timeout, "it took too long"),
        (FailureClass::Incompatible, "the inference server can't serve this kind of model"),
    ];
    let mut text = "| class | means | tried again |\n|---|---|---|\n".to_owned();
    for (class, means) in classes {
        let again = if class.retryable() { "yes, with a growing pause" } else { "no; another spec is needed" };
        writeln!(text, "| {} | {means} | {again} |", class.name()).unwrap();
    }
    same("failures", &text);
}
