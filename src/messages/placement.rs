//! To the placement.

use std::collections::BTreeSet;

use actix::Message;

use super::Ask;
use crate::domain::{
    memory::Resources,
    model::Wanted,
    names::{ModelName, ReplicaId},
    replica::ReplicaState,
    version::Generation,
};

/// Find a replica for each of the copies, in this order. All are answered at once.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Place {
    /// The model.
    pub model: ModelName,
    /// Its copies.
    pub wanted: Vec<Wanted>,
}

/// The copy is not wanted any more, or its memory is free.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Release {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
}

/// The copy is to leave its replica.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Leave {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
}

/// The copy has a place already: at start, or when the ledger is rebuilt.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Restore {
    /// The model.
    pub model: ModelName,
    /// The copy.
    pub generation: Generation,
    /// Its replica.
    pub on: ReplicaId,
    /// Its memory.
    pub need: Resources,
    /// Whether it is never evicted.
    pub pinned: bool,
}

/// These are all the copies of the model that may have a place or want one: what is kept for any other is free.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Only {
    /// The model.
    pub model: ModelName,
    /// Its copies.
    pub generations: BTreeSet<Generation>,
}

/// A replica is there, or is another than before.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ReplicaChanged {
    /// Which one.
    pub replica: ReplicaId,
    /// What it is now; absent when it is gone for good.
    pub facts: Option<ReplicaFacts>,
}

/// What the placement has to know of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaFacts {
    /// Where it stands.
    pub state: ReplicaState,
    /// Whether nothing new may be placed on it, for whatever reason.
    pub closed: bool,
    /// Memory that it has: the smaller of declared and reported.
    pub capacity: Resources,
    /// How much more may be registered, in percent.
    pub overcommit_percent: u32,
    /// What it can serve.
    pub capabilities: Vec<String>,
}

/// Why is the model where it is, or nowhere? The answer is text for a person and JSON.
pub type Explain = Ask<ModelName, Option<Explanation>>;

/// The answer to [`Explain`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// For a person.
    pub text: String,
    /// The same as JSON.
    pub data: serde_json::Value,
}
