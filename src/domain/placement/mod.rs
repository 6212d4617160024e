//! Which replica holds a copy: filters, then scores, both data, so that an explanation is a printout of the
//! decision.

mod explain;
mod filter;
mod index;
mod ledger;
mod problem;
mod replica;
pub mod report;
mod score;
mod solve;
mod tree;

pub use filter::{Filter, Rejection};
pub use ledger::{Decision, Ledger, LedgerError, Placed, Registered};
pub use problem::{Capabilities, PlacementRequest, Prefer};
pub use replica::{Condition, Replica, ReplicaFacts};
pub use score::{Score, Share, Warmth};
