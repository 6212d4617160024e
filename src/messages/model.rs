//! To a model.

use actix::Message;

use super::Reply;
use crate::domain::{
    error::Refusal,
    model::{Event, Submitted},
};

/// A user's request, answered once it is durable.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Request {
    /// What is asked.
    pub event: Event,
    /// The answer.
    pub reply: Reply<Result<Option<Submitted>, Refusal>>,
}

/// Something happened that the model has to know.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Happened(pub Event);

/// All of this happened, in this order: one decision takes it.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct AllHappened(pub Vec<Event>);

/// Say again to the others what they should know of this model: one of them has lost it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub enum Announce {
    /// The placement: every copy that has a place, and those that want one.
    ToPlacement,
    /// The router: the route.
    ToRouter,
    /// The server: every copy on it.
    ToServer,
}
