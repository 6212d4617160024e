//! What happens to a model, and what it asks of the world.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde::Serialize;

use super::{adopt::Found, submit::Submitted};
use crate::domain::{
    copy,
    memory::Resources,
    names::{ReplicaId, ServerName},
    record::Write,
    spec::{Definition, KubernetesMeta, ModelSpec, Spread},
    time::Instant,
    version::{Generation, Uid, Version},
};

/// What happens to a model.
#[derive(Clone, Debug)]
pub enum Event {
    /// A user submits it. The uid is used if this creates it.
    Submit(Box<Definition>, Uid),
    /// A user wants an older version's spec again; the one before the present when none is named.
    Rollback(Option<Version>),
    /// A user, or whoever acts for one, wants another number of copies.
    Scale(u32),
    /// A user deletes it.
    Delete(Option<KubernetesMeta>),
    /// The placement answers.
    Copy(Generation, copy::Event),
    /// The agent of a replica reports on a copy; without a report, it was found to hold none such.
    Reported(ReplicaId, Generation, Option<copy::Report>),
    /// An agent holds a copy that the scheduler of another journal left.
    Adopt(Box<Found>),
    /// Something happens to every copy on a replica.
    Replica(ReplicaId, copy::Event),
    /// Copies are to leave these replicas of the server, and no others of it.
    Leaving(ServerName, BTreeSet<u32>),
    /// These copies do not fit their replicas any more and are to move, and no others.
    Displaced(BTreeSet<Generation>),
    /// Every gateway that is known has the route at this revision.
    RoutesReached(u64),
    /// That, and no gateway of an earlier scheduler can have an older one.
    RoutesSettled(u64),
    /// Time has passed, or something may have been missed.
    Reconcile,
}

impl Event {
    /// Whether `earlier`, which still waits, need not be taken when this one is: this one says all that it says, or
    /// what became of it since.
    #[must_use]
    pub fn replaces(&self, earlier: &Self) -> bool {
        match self {
            // Only the latest word about a copy counts.
            Self::Reported(on, generation, _) => {
                matches!(earlier, Self::Reported(other, number, _) if (on, generation) == (other, number))
            }
            Self::Replica(on, event) => {
                matches!(earlier, Self::Replica(other, before) if (on, event) == (other, before))
            }
            Self::Leaving(server, _) => matches!(earlier, Self::Leaving(other, _) if server == other),
            Self::RoutesReached(revision) => matches!(earlier, Self::RoutesReached(before) if before <= revision),
            Self::RoutesSettled(revision) => matches!(
                earlier,
                Self::RoutesReached(before) | Self::RoutesSettled(before) if before <= revision
            ),
            Self::Displaced(_) => matches!(earlier, Self::Displaced(_)),
            Self::Reconcile => matches!(earlier, Self::Reconcile),
            Self::Submit(..)
            | Self::Rollback(_)
            | Self::Scale(_)
            | Self::Delete(_)
            | Self::Copy(..)
            | Self::Adopt(_) => false,
        }
    }
}

/// What an event leads to. Nothing of it may leave the process before `writes` are durable.
#[derive(Debug, Default)]
pub struct Decision {
    /// To be committed together.
    pub writes: Vec<Write>,
    /// To be done after that, in this order.
    pub effects: Vec<Effect>,
    /// The answer to whoever asked.
    pub submitted: Option<Submitted>,
}

/// Something for the world to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Find a replica.
    Place(Box<Wanted>),
    /// Stop looking for one.
    Withdraw(Generation),
    /// The agent of `on` is to hold the copy.
    Register {
        /// The replica.
        on: ReplicaId,
        /// Which copy.
        generation: Generation,
        /// What to load.
        spec: Arc<ModelSpec>,
        /// Memory reserved.
        need: Resources,
        /// How many were tried before it.
        attempt: u32,
        /// Whether what was measured of it is within that memory.
        measured: bool,
        /// Whether it is never evicted.
        pinned: bool,
    },
    /// The agent of `on` is to let the copy go.
    Unregister {
        /// The replica.
        on: ReplicaId,
        /// Which copy.
        generation: Generation,
    },
    /// The memory reserved for the copy is free.
    Release(Generation),
    /// The copy has a place and its memory already; or it is of another size now, or pinned, or no more.
    Keep(Generation),
    /// The copy is to leave: it keeps its memory, and no other copy near it.
    Leave(Generation),
    /// The route changed: publish [`Model::route`](super::Model::route) as this revision. Of several decisions that are
    /// carried out at once only the last one's need be.
    Publish(u64),
    /// Send [`Event::Reconcile`] at this time.
    Wake(Instant),
    /// Something that a user may want to know of.
    Note(Note),
    /// A copy has come to answer, so long after it was ordered.
    Arrived(Duration),
    /// Nothing is left of the model but its retention.
    Terminated,
}

/// A copy that wants a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which copy.
    pub generation: Generation,
    /// What it is.
    pub spec: Arc<ModelSpec>,
    /// Memory that it needs.
    pub need: Resources,
    /// Where copies of the same version may be.
    pub spread: Spread,
    /// Who is placed first.
    pub priority: i32,
    /// Whether it is never to be evicted.
    pub pinned: bool,
    /// Replicas to be tried last.
    pub avoid: Vec<ReplicaId>,
    /// Copies of the version that may look for a place about now, this one included.
    pub together: u32,
}

/// An event for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// One word for what happened.
    pub kind: &'static str,
    /// One sentence.
    pub message: String,
    /// What it was decided on, as JSON.
    pub data: String,
}

impl Note {
    /// A note; `data` is what can be JSON, as values and structures are.
    #[must_use]
    pub fn new(kind: &'static str, message: String, data: &impl Serialize) -> Self {
        Self { kind, message, data: serde_json::to_string(data).unwrap_or_default() }
    }
}

impl Decision {
    pub(in crate::domain) fn note(&mut self, kind: &'static str, message: String, data: &impl Serialize) {
        self.effects.push(Effect::Note(Note::new(kind, message, data)));
    }
}
