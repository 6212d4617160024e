//! What people and machines see of a running Wharf: logs, metrics, health, traces and events.
//!
//! The rule of this module: it observes and never decides. What it keeps is bounded, whatever happens; labels
//! come from closed sets; time and randomness are passed in.

pub mod durations;
pub mod events;
pub mod http;
pub mod log;
pub mod metrics;
pub mod trace;
