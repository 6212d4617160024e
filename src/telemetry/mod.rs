//! What an operator sees.

pub mod events;
