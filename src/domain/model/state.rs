//! The state of a model, as one total table over its copies.

use super::super::{
    copy::{Copy, Failure, State},
    version::Version,
};

/// A model's, or a version's, state. `docs/states.md` shows Seldon's word beside each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelState {
    /// Copies are on their way, and none answers yet.
    Progressing,
    /// It answers.
    Available,
    /// None answers, and what was tried failed.
    Failed,
    /// None answers, and no replica can take it.
    ScheduleFailed,
    /// No copy is wanted.
    ScaledDown,
    /// It is deleted or superseded, and copies are still leaving.
    Terminating,
    /// It is deleted or superseded, and nothing of it is left.
    Terminated,
}

impl ModelState {
    /// The state's name, as people see it; Seldon's has `Model` before most of them.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Progressing => "Progressing",
            Self::Available => "Available",
            Self::Failed => "Failed",
            Self::ScheduleFailed => "ScheduleFailed",
            Self::ScaledDown => "ScaledDown",
            Self::Terminating => "Terminating",
            Self::Terminated => "Terminated",
        }
    }
}

/// Why a model stands where it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// The state says it all.
    #[default]
    None,
    /// Fewer copies answer than are wanted; the sentence says what keeps the others.
    Partial(String),
    /// What keeps it from answering.
    Waiting(String),
    /// No replica fits.
    Unplaced(String),
    /// Copies failed.
    Failed(Failure),
    /// This newest version does not take over, and why; the one before it serves.
    Held(Version, String),
    /// The newest version was given up, and the one before it serves.
    RolloutFailed(Failure),
}

/// A state with its reason and counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The state.
    pub state: ModelState,
    /// Why.
    pub reason: Reason,
    /// Copies that answer.
    pub available: u32,
    /// Copies that are there or on their way, and don't.
    pub unavailable: u32,
}

impl Standing {
    /// The reason as one sentence; empty when the state says it all.
    #[must_use]
    pub fn sentence(&self) -> String {
        match &self.reason {
            Reason::None => String::new(),
            Reason::Partial(text) | Reason::Waiting(text) | Reason::Unplaced(text) => text.clone(),
            Reason::Failed(failure) => format!("{} failure: {}", failure.class.name(), failure.message),
            Reason::Held(version, why) => format!("version {version} does not take over: {why}"),
            Reason::RolloutFailed(failure) => format!(
                "rollout given up after {} failure: {}; resubmit to try again",
                failure.class.name(),
                failure.message
            ),
        }
    }
}

/// The table. `over` is deleted or superseded. Failing copies never hide serving ones.
pub fn standing<'a>(copies: impl Iterator<Item = &'a Copy>, wanted: u32, least: u32, over: bool) -> Standing {
    let mut available = 0_u32;
    let mut unavailable = 0_u32;
    let mut failure = None;
    let mut unplaced = None;
    let mut silent = None;
    let mut moving = None;
    for copy in copies {
        match &copy.state {
            State::Available { .. } if !copy.draining && copy.awaited.is_none() => available += 1,
            State::Unloaded => {}
            State::Failed { failure: what, .. } => {
                unavailable += 1;
                failure = failure.or(Some(what));
            }
            State::Pending { reason: Some(reason) } => {
                unavailable += 1;
                unplaced = unplaced.or(Some(reason));
            }
            State::Unknown { on } => {
                unavailable += 1;
                silent = silent.or(Some(on));
            }
            State::Pending { reason: None }
            | State::Scheduled { .. }
            | State::Downloading { .. }
            | State::Loading { .. }
            | State::Available { .. }
            | State::Draining { .. } => {
                unavailable += 1;
                moving = moving.or(Some(copy));
            }
        }
    }
    let held_up = || {
        failure
            .map(|failure| format!("{} failure: {}", failure.class.name(), failure.message))
            .or_else(|| unplaced.map(super::super::placement::report::Unplaced::summary))
            .or_else(|| silent.map(|on| format!("no word from {on} yet")))
            .or_else(|| moving.map(step_of))
            .unwrap_or_default()
    };
    let (state, reason) = if over {
        match available + unavailable {
            0 => (ModelState::Terminated, Reason::None),
            left => (ModelState::Terminating, Reason::Waiting(format!("{left} copies are leaving"))),
        }
    } else if available > 0 && available >= wanted && wanted > 0 {
        (ModelState::Available, Reason::None)
    } else if wanted == 0 {
        match available + unavailable {
            0 => (ModelState::ScaledDown, Reason::None),
            left => (ModelState::ScaledDown, Reason::Waiting(format!("{left} copies are leaving"))),
        }
    } else if available > 0 && available >= least {
        let text = format!("Partial: {available} of {wanted} copies answer; {}", held_up());
        (ModelState::Available, Reason::Partial(text.trim_end_matches("; ").to_owned()))
    } else if let Some(failure) = failure {
        (ModelState::Failed, Reason::Failed(failure.clone()))
    } else if let Some(unplaced) = unplaced {
        (ModelState::ScheduleFailed, Reason::Unplaced(unplaced.summary()))
    } else {
        let text = Some(held_up()).filter(|text| !text.is_empty());
        (ModelState::Progressing, Reason::Waiting(text.unwrap_or_else(|| "no copy of it is there yet".to_owned())))
    };
    Standing { state, reason, available, unavailable }
}

fn step_of(copy: &Copy) -> String {
    if let (State::Available { on, .. }, Some(_)) = (&copy.state, copy.awaited) {
        return format!("version {} answers on {on}, and not every gateway knows yet", copy.generation.version);
    }
    match copy.state.replica() {
        Some(on) => format!("version {} is {} on {on}", copy.generation.version, copy.state.name()),
        None => format!("version {} is looking for a place", copy.generation.version),
    }
}
