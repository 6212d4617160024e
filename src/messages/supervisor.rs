//! To the supervisor.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use actix::Message;

use super::{Ask, Reply, server::Declare};
use crate::domain::{
    error::Refusal,
    model::Submitted,
    names::{ModelName, ServerName},
    spec::{Definition, KubernetesMeta},
    version::Version,
};

/// What a user asks of a model by name.
#[derive(Debug)]
pub enum Action {
    /// Submit it.
    Submit(Box<Definition>),
    /// Delete it.
    Delete(Option<KubernetesMeta>),
    /// Want an older version's spec again.
    Rollback(Option<Version>),
    /// Want another number of copies.
    Scale(u32),
}

/// A user's request about a model.
#[derive(Debug)]
pub struct OnModel {
    /// The model.
    pub name: ModelName,
    /// What is asked.
    pub action: Action,
}

/// Asks for it; answered once it is durable.
pub type AskModel = Ask<OnModel, Result<Option<Submitted>, Refusal>>;

/// An actor ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Ended {
    /// Which one.
    pub who: Who,
    /// Its panic's message; absent when it stopped by intent.
    pub panic: Option<String>,
}

/// An actor's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    /// The journal.
    Journal,
    /// The placement.
    Placement,
    /// The router.
    Router,
    /// A server.
    Server(ServerName),
    /// A model.
    Model(ModelName),
}

/// The observable state of every actor, as JSON.
pub type Inspect = Ask<(), serde_json::Value>;

/// Say how you stand. The answers go together once the last actor has said, or can't any more.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Observe(Arc<Observations>);

/// Answers to [`Observe`]. Dropping the last hold of it sends them.
#[derive(Debug)]
struct Observations {
    actors: Mutex<BTreeMap<String, serde_json::Value>>,
    reply: Mutex<Option<Reply<serde_json::Value>>>,
}

impl Observe {
    /// A round whose answers go to `reply`.
    #[must_use]
    pub fn round(reply: Reply<serde_json::Value>) -> Self {
        Self(Arc::new(Observations { actors: Mutex::default(), reply: Mutex::new(Some(reply)) }))
    }

    /// An actor's answer.
    pub fn answer(&self, who: &str, state: serde_json::Value) {
        self.0.actors.lock().unwrap_or_else(PoisonError::into_inner).insert(who.to_owned(), state);
    }
}

impl Drop for Observations {
    fn drop(&mut self) {
        let actors = std::mem::take(self.actors.get_mut().unwrap_or_else(PoisonError::into_inner));
        if let Some(reply) = self.reply.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            // Whoever asked may have given up.
            drop(reply.send(serde_json::json!(actors)));
        }
    }
}

impl Who {
    /// What kind of actor it is.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Journal => "journal",
            Self::Placement => "placement",
            Self::Router => "router",
            Self::Server(_) => "server",
            Self::Model(_) => "model",
        }
    }
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Journal => f.write_str("journal"),
            Self::Placement => f.write_str("placement"),
            Self::Router => f.write_str("router"),
            Self::Server(name) => write!(f, "server/{name}"),
            Self::Model(name) => write!(f, "model/{name}"),
        }
    }
}

/// Nothing is left of a deleted model but its retention; or of a server nothing at all.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Terminated(pub Who);

/// End, if nothing is left and nothing waits. Whoever stays says so with [`Stays`].
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Stop;

/// It was asked to end, and is needed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Stays(pub Who);

/// A server's actor took what its owner says; one that is made anew is to know it.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Taken(pub Declare);

/// You can be found now: begin. What others answer to an actor's first words must find it.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Begin;
