//! The composition root: what starts, in which order, and stops in reverse.
//!
//! The rule of this module: it decides nothing. It takes the network, the clock, the store and the place where
//! actors run as arguments, so that a whole cluster runs inside one test, on one thread, in virtual time.

mod fleet;
pub mod metrics;
pub mod origins;
pub mod page;
pub mod process;
pub mod replica;
pub mod scheduler;

use std::sync::Arc;

use crate::ports::{Clock, Network};

/// What a part of Wharf stands on.
#[derive(Clone, Debug)]
pub struct World {
    /// How to listen and connect.
    pub network: Arc<dyn Network>,
    /// The clock.
    pub clock: Arc<dyn Clock>,
}
