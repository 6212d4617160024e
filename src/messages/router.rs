//! To the router.

use std::sync::Arc;

use actix::Message;
use tokio::sync::mpsc;

use crate::domain::{
    names::ModelName,
    routes::{Epoch, Route},
};

/// This is the model's route now; tell the model once every gateway has it.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Publish {
    /// The model.
    pub model: ModelName,
    /// The model's own count of its routes.
    pub revision: u64,
    /// The route; absent when the model is gone.
    pub route: Option<Route>,
}

/// A gateway wants to follow the routes.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct GatewayConnected {
    /// Its own name, kept over reconnects.
    pub gateway: String,
    /// This connection of it.
    pub session: u64,
    /// Whether its table is of this scheduler's lineage, and at which epoch.
    pub holds: Option<Epoch>,
    /// Whether its table is of another journal's lineage.
    pub foreign: bool,
    /// Where updates go. Bounded: a gateway that does not read is cut off.
    pub updates: mpsc::Sender<RouteUpdate>,
}

/// A gateway sends nothing any more under an older epoch.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct GatewayAcknowledged {
    /// Its name.
    pub gateway: String,
    /// Its connection.
    pub session: u64,
    /// The epoch.
    pub epoch: Epoch,
}

/// A gateway's connection ended. Its lease goes on until it runs out.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct GatewayGone {
    /// Its name.
    pub gateway: String,
    /// Its connection.
    pub session: u64,
}

/// What a gateway is sent.
#[derive(Clone, Debug)]
pub enum RouteUpdate {
    /// Everything.
    Table(Epoch, Vec<Arc<Route>>),
    /// What changed; routes that are gone by name.
    Changes(Epoch, Arc<(Vec<Arc<Route>>, Vec<ModelName>)>),
    /// Nothing changed: acknowledge all the same.
    Ping(Epoch),
}
