//! The process of an inference server, as far as the machine that it is on shows it.

use std::fmt;

use crate::domain::memory::Bytes;

/// What a process and everything below it has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// The process. Another number is another process: what was known of the one before means nothing.
    pub process: u32,
    /// Private and shared anonymous memory; what is shared between them counts once.
    pub bytes: Bytes,
}

/// An inference server's process.
pub trait ServerProcess: Send + Sync + fmt::Debug {
    /// What it has in memory now; nothing when that can't be told. Blocks.
    fn footprint(&self) -> Option<Footprint>;
}
