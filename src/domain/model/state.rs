//! The state of a model, as one total table over its copies.

use std::fmt;

use super::super::{
    copy::{Copy, Failure, State},
    names::ReplicaId,
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
    /// Fewer copies answer than these that are wanted, and what keeps the others.
    Partial(u32, HeldUp),
    /// What keeps it from answering.
    Waiting(HeldUp),
    /// What is left of it is leaving.
    Leaving,
    /// No replica fits.
    Unplaced(String),
    /// Copies failed.
    Failed(Failure),
    /// This newest version does not take over, and why; the one before it serves.
    Held(Version, String),
    /// The newest version was given up, and the one before it serves.
    RolloutFailed(Failure),
}

/// What keeps copies from answering. It becomes a sentence only where somebody reads it: a model with many copies
/// stands anew with each that comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeldUp {
    /// Nothing that is known of.
    Nothing,
    /// A copy failed, or found no place: a sentence.
    Trouble(String),
    /// Nothing was heard from this replica yet.
    Silent(ReplicaId),
    /// A copy of this version looks for a place.
    Looking(Version),
    /// A copy of this version is in the state of this name on this replica.
    Moving(Version, &'static str, ReplicaId),
    /// A copy of this version answers on this replica, and not every gateway knows yet.
    Untold(Version, ReplicaId),
}

impl fmt::Display for HeldUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => Ok(()),
            Self::Trouble(text) => f.write_str(text),
            Self::Silent(on) => write!(f, "no word from {on} yet"),
            Self::Looking(version) => write!(f, "version {version} is looking for a place"),
            Self::Moving(version, state, on) => write!(f, "version {version} is {state} on {on}"),
            Self::Untold(version, on) => {
                write!(f, "version {version} answers on {on}, and not every gateway knows yet")
            }
        }
    }
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
            Reason::Partial(wanted, held_up) => {
                let why = if *held_up == HeldUp::Nothing { String::new() } else { format!("; {held_up}") };
                format!("Partial: {} of {wanted} copies answer{why}", self.available)
            }
            Reason::Waiting(HeldUp::Nothing) => "no copy of it is there yet".to_owned(),
            Reason::Waiting(held_up) => held_up.to_string(),
            Reason::Leaving => format!("{} copies are leaving", self.available + self.unavailable),
            Reason::Unplaced(text) => text.clone(),
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
            .map(|failure| HeldUp::Trouble(format!("{} failure: {}", failure.class.name(), failure.message)))
            .or_else(|| unplaced.map(|reason| HeldUp::Trouble(reason.summary())))
            .or_else(|| silent.map(|on| HeldUp::Silent(on.clone())))
            .or_else(|| moving.map(step_of))
            .unwrap_or(HeldUp::Nothing)
    };
    let (state, reason) = if over {
        match available + unavailable {
            0 => (ModelState::Terminated, Reason::None),
            _ => (ModelState::Terminating, Reason::Leaving),
        }
    } else if available > 0 && available >= wanted && wanted > 0 {
        (ModelState::Available, Reason::None)
    } else if wanted == 0 {
        match available + unavailable {
            0 => (ModelState::ScaledDown, Reason::None),
            _ => (ModelState::ScaledDown, Reason::Leaving),
        }
    } else if available > 0 && available >= least {
        (ModelState::Available, Reason::Partial(wanted, held_up()))
    } else if let Some(failure) = failure {
        (ModelState::Failed, Reason::Failed(failure.clone()))
    } else if let Some(unplaced) = unplaced {
        (ModelState::ScheduleFailed, Reason::Unplaced(unplaced.summary()))
    } else {
        (ModelState::Progressing, Reason::Waiting(held_up()))
    };
    Standing { state, reason, available, unavailable }
}

fn step_of(copy: &Copy) -> HeldUp {
    let version = copy.generation.version;
    match (&copy.state, copy.awaited) {
        (State::Available { on, .. }, Some(_)) => HeldUp::Untold(version, on.clone()),
        (state, _) => match state.replica() {
            Some(on) => HeldUp::Moving(version, state.name(), on.clone()),
            None => HeldUp::Looking(version),
        },
    }
}
