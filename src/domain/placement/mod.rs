//! Which replica holds a copy: filters, then scores, both data, so that an explanation is a printout of the
//! decision.

mod desk;
mod explain;
mod filter;
mod index;
mod ledger;
mod problem;
mod replica;
pub mod report;
mod score;
mod solve;
#[cfg(test)]
mod tests;
mod tree;
mod waiting;

pub use desk::{Placement, Retried};
pub use filter::{Filter, Rejection};
pub use ledger::{Decision, Ledger, LedgerError, Placed, Registered};
pub use problem::{Capabilities, PlacementRequest, Prefer};
pub use replica::{Condition, Replica, ReplicaFacts};
pub use score::{Score, Share, Warmth};
pub use waiting::Entry as Waiting;
