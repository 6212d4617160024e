//! What a scheduler orders an agent to do. Only these two words exist: eviction and reload are the agent's own.

use std::{sync::Arc, time::Duration};

use super::{memory::Resources, names::ModelName, size::Trust, spec::ModelSpec, version::Generation};

/// One order. Repeating it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Fetch the version and make it answer.
    Register {
        /// The model.
        model: ModelName,
        /// Which copy of it.
        generation: Generation,
        /// What the version is.
        spec: Arc<ModelSpec>,
        /// Memory that it takes while it is resident.
        need: Resources,
        /// How many copies were tried in its place before it.
        attempt: u32,
        /// Whether that memory was measured: then it is what all instances take together.
        measured: bool,
        /// What counts where the version declares memory and the agent measures another amount.
        trust: Trust,
    },
    /// Let requests in flight finish, then leave nothing of it behind.
    Unregister {
        /// The model.
        model: ModelName,
        /// Which copy of it.
        generation: Generation,
        /// How long holds may keep it.
        drain: Duration,
    },
}

impl Order {
    /// The model that it speaks of.
    #[must_use]
    pub const fn model(&self) -> &ModelName {
        match self {
            Self::Register { model, .. } | Self::Unregister { model, .. } => model,
        }
    }

    /// The copy that it speaks of.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        match self {
            Self::Register { generation, .. } | Self::Unregister { generation, .. } => *generation,
        }
    }
}
