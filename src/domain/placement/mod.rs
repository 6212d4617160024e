//! Which replica holds a copy: filters, then scores, both data, so that an explanation is a printout of the
//! decision.
//!
//! [`Placement`] is the whole: the [`Ledger`] of registered bytes and the copies that wait. A decision reserves what it
//! decides in the same step. It is found through indexes (`solve`), and is the one that asking every filter about
//! every replica would find (`explain`), which the tests hold it to. Whoever changes anything calls
//! [`Placement::retry`] afterwards; what to try again follows from what changed.
//!
//! A small copy may be placed while a large one of higher priority waits: memory is never kept free for somebody who
//! does not fit yet, and nobody is moved to make room. Only a replica that has become too small, or can do less than
//! before, or whose pinned copies leave too little to others, has copies moved off it (`relief`).

mod desk;
mod explain;
mod filter;
mod index;
mod ledger;
mod load;
mod problem;
mod relief;
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
pub use relief::{Key, Relief};
pub use replica::{Condition, Replica, ReplicaFacts};
pub use score::{Score, Share, Warmth};
pub use waiting::Entry as Waiting;
