//! What actors say to each other, and how everyone else asks them: one file per listener, a verb for an
//! order, a past participle for an event.
//!
//! The rule of this module: plain data. Whoever is outside the actors asks through a [`Gate`], which bounds
//! how many wait and for how long, and reads what they publish from the [`Board`].

mod board;
mod gate;
pub mod journal;
pub mod model;
pub mod placement;
pub mod router;
pub mod server;
pub mod supervisor;

pub use board::{Board, Feed, Registered, ReplicaView, ServerView};
pub use gate::{Ask, Gate};

/// Where an answer goes. Dropped unanswered, it tells whoever waits that the actor is gone.
pub type Reply<T> = tokio::sync::oneshot::Sender<T>;
