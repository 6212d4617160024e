//! Where a copy stands, and how that and the number of its holds are one word.

/// Where a copy stands, for whoever wants to hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Not yet answering.
    Preparing,
    /// In memory.
    Resident,
    /// On its way out of memory.
    Evicting,
    /// On disk only.
    Evicted,
    /// On its way back.
    Reloading,
    /// Leaving: no new holds.
    Draining,
    /// Left.
    Gone,
}

impl Phase {
    pub(super) const fn of(word: u64) -> Self {
        match word >> 32 {
            0 => Self::Preparing,
            1 => Self::Resident,
            2 => Self::Evicting,
            3 => Self::Evicted,
            4 => Self::Reloading,
            5 => Self::Draining,
            _ => Self::Gone,
        }
    }

    pub(super) const fn with(self, holds: u32) -> u64 {
        ((self as u64) << 32) | holds as u64
    }

    /// Whether the copy answers requests, if need be after a reload.
    pub(crate) const fn serves(self) -> bool {
        match self {
            Self::Resident | Self::Evicting | Self::Evicted | Self::Reloading => true,
            Self::Preparing | Self::Draining | Self::Gone => false,
        }
    }
}

pub(super) const fn holds_of(word: u64) -> u32 {
    (word & 0xffff_ffff) as u32
}
