//! The process of an inference server, as far as the machine that it is on shows it.

use std::fmt;

use crate::domain::memory::Bytes;

/// What an inference server's processes have in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Which run of the server. Another number is another run: what was known of the one before means nothing.
    pub run: u64,
    /// Private and shared anonymous memory; what is shared between processes counts once.
    pub bytes: Bytes,
    /// What that run had before anything was loaded in it, where that was seen.
    pub empty: Option<Bytes>,
}

/// An inference server's process.
pub trait ServerProcess: Send + Sync + fmt::Debug {
    /// What it has in memory now; nothing when that can't be told. Blocks.
    fn footprint(&self) -> Option<Footprint>;
}
