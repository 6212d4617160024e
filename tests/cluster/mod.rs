//! The whole of Wharf in one deterministic process: a simulated network, virtual time, and inference servers that
//! note each breach of what is promised about them.

mod client;
mod log;
mod net;
mod promises;
mod random;
mod server;
mod traffic;
mod world;

pub(crate) use client::{Api, Ask};
pub(crate) use promises::Bounds;
pub(crate) use random::Random;

pub(crate) use traffic::{Tolerance, traffic};
pub(crate) use world::{Seat, Shape, World, simulate};

/// Whether the full counts were asked for.
#[expect(clippy::disallowed_methods, reason = "a test's own switch")]
pub(crate) fn prove() -> bool {
    std::env::var("WHARF_PROVE").is_ok_and(|value| value == "1")
}

/// How many seeds, rollouts or models: fewer in the everyday run.
pub(crate) fn count(everyday: u64, full: u64) -> u64 {
    if prove() { full } else { everyday }
}

/// The seeds of a test: the one that `WHARF_SEED` names, or so many from 1 on.
#[expect(clippy::disallowed_methods, reason = "a test's own switch")]
pub(crate) fn seeds(everyday: u64, full: u64) -> Vec<u64> {
    match std::env::var("WHARF_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=count(everyday, full)).collect(),
    }
}
