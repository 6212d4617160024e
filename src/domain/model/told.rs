//! What people and machines are told of a copy's change.

use serde::Serialize;

use crate::domain::{
    copy::{Copy, State},
    names::ReplicaId,
    placement::report::Unplaced,
};

/// What a copy's change was decided on.
#[derive(Debug, Serialize)]
pub(super) struct Details<'a> {
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<&'static str>,
    copy: u32,
    need: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rejections: Option<&'a Unplaced>,
    replica: Option<String>,
    uid: u64,
    version: u32,
}

impl<'a> Details<'a> {
    pub(super) fn of(copy: &'a Copy, on: Option<&ReplicaId>) -> Self {
        let failure = if let State::Failed { failure, .. } = &copy.state { Some(failure) } else { None };
        Self {
            attempts: copy.attempts,
            class: failure.map(|failure| failure.class.name()),
            copy: copy.generation.number,
            need: copy.need.primary.0,
            rejections: if let State::Pending { reason } = &copy.state { reason.as_ref() } else { None },
            replica: on.map(ToString::to_string),
            uid: copy.generation.uid.0,
            version: copy.generation.version.0,
        }
    }
}

/// What has become of a copy, as a sentence.
pub(super) fn describe(copy: &Copy, on: Option<&ReplicaId>) -> String {
    let version = copy.generation.version;
    let place = on.map_or_else(String::new, |on| format!(" on {on}"));
    match &copy.state {
        State::Failed { failure, .. } => {
            format!("version {version}{place}: {} failure: {}", failure.class.name(), failure.message)
        }
        State::Pending { reason: Some(reason) } => format!("version {version}: {}", reason.summary()),
        State::Pending { reason: None }
        | State::Scheduled { .. }
        | State::Downloading { .. }
        | State::Loading { .. }
        | State::Available { .. }
        | State::Draining { .. }
        | State::Unloaded
        | State::Unknown { .. } => format!("version {version}{place}"),
    }
}
