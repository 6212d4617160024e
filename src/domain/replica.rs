//! The states of a server's replica.

use serde::{Deserialize, Serialize};

use super::time::Instant;

/// Where a replica stands. Whether it is cordoned is a mark beside this, kept over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// Declared, and no agent has called yet.
    Pending,
    /// Its agent renews its lease.
    Available,
    /// Its copies move away; nothing new is placed on it.
    Draining,
    /// Its agent is silent since then; its copies stay routed and their memory reserved.
    Unknown {
        /// When it was last heard.
        since: Instant,
    },
    /// It was silent for the whole grace period, or left; its copies are placed elsewhere.
    Lost,
}

impl ReplicaState {
    /// The state's name, as people and clients see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Available => "Available",
            Self::Draining => "Draining",
            Self::Unknown { .. } => "Unknown",
            Self::Lost => "Lost",
        }
    }
}
