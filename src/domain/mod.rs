//! Every decision that Wharf takes, as pure functions over plain values.
//!
//! The rule of this module: no actors, no async, no wire types, no files, no clocks and no randomness. Time
//! and identifiers come in as arguments, so any decision can be replayed and asked about.

pub mod copy;
pub mod devices;
pub mod error;
pub mod ghost;
pub mod history;
pub mod invariants;
pub mod leader;
pub mod memory;
pub mod model;
pub mod names;
pub mod near;
pub mod order;
pub mod outlier;
pub mod placement;
pub mod quarantine;
pub mod record;
pub mod recycle;
pub mod replica;
pub mod residency;
pub mod rollout;
pub mod routes;
pub mod secret;
pub mod server;
pub mod size;
pub mod spec;
pub mod time;
pub mod upkeep;
pub mod version;
pub mod warmup;
