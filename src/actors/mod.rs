//! The scheduler's actors: thin shells around the domain.
//!
//! The rule of this module: a handler translates, asks the domain, hands the effects over and publishes.
//! Journal first, memory second: nothing that a decision leads to leaves an actor before the journal has it.
//! No actor awaits another; a message that is lost with a restart is repaired by the comparison of wanted
//! with reported that every actor runs on each message and on a timer.

mod absent;
mod adopt;
mod journal;
mod life;
mod links;
mod model;
mod placement;
mod restore;
mod router;
mod server;
mod spawn;
mod start;
mod supervisor;
#[cfg(test)]
mod tests;

pub use journal::Fatal;
pub use links::{Identity, Links, Timing};
pub use spawn::{Arbiters, Spawner};
pub use start::{Handle, Scheduler, StartError, start};
