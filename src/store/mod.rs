//! The journal's stores. The rule of this module: every store keeps one contract, the one that `tests/store.rs`
//! states and runs against all of them, and never reports a commit as anything but what it was.

mod backend;
mod embedded;
mod inspect;
mod memory;
mod schema;

pub use embedded::{EmbeddedStore, OpenBackend, OpenOptions};
pub use inspect::{Inspected, inspect, open_existing};
pub use memory::{Fault, MemoryStore};
pub use schema::SCHEMA;
