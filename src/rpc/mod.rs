//! The wire: generated code once, wire to domain in one place, errors to status in one place.

pub mod agent_hub;
pub mod agent_wire;
pub mod client;
pub mod directory;
mod pieces;
pub mod routes_service;
pub mod routes_wire;
pub mod scheduler_service;
pub mod serve;
pub mod status;
pub mod views;
pub mod wharf_service;
pub mod wire;

mod generated {
    #![expect(missing_docs, unreachable_pub, clippy::all, reason = "generated; the .proto files say what it means")]
    tonic::include_proto!("wire");
}

/// Code generated from `proto/`.
pub mod proto {
    pub use super::generated::{
        inference,
        seldon::mlops::{health, scheduler},
        wharf::{agent::v1 as agent, routes::v1 as routes, v1 as wharf},
    };

    /// Descriptors of all services, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
