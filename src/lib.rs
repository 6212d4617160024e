//! Wharf packs many machine-learning models onto few inference servers, and keeps every one answering.
//!
//! Layers, arrows pointing down only; modules of one row do not import each other:
//!
//! ```text
//! main -> cli -> app
//!      -> { actors  store  agent  gateway  runtime  manifest }
//!      -> { rpc  forward } -> messages -> { ports  settings  telemetry } -> domain
//! ```

pub mod actors;
pub mod agent;
pub mod app;
pub mod cli;
pub mod domain;
pub mod forward;
pub mod gateway;
pub mod manifest;
pub mod messages;
pub mod ports;
pub mod rpc;
pub mod runtime;
pub mod settings;
pub mod store;
pub mod telemetry;
