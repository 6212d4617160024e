//! To the journal.

use actix::{Message, Recipient};

use crate::{
    domain::{
        names::{ModelName, ServerName},
        record::{ServerRow, Write},
    },
    ports::ModelRows,
};

/// Make these writes durable, all or none.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Commit {
    /// What to write.
    pub writes: Vec<Write>,
    /// Who is told.
    pub by: Recipient<Committed>,
}

/// The writes are durable, or nothing of them was written. Answers come in the order of the commits.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Committed(pub Result<(), String>);

/// Read what the journal has of one name, once every commit that came before this has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Look {
    /// The name.
    pub at: At,
    /// Who is told.
    pub by: Recipient<Found>,
}

/// A name in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// A model's.
    Model(ModelName),
    /// A server's.
    Server(ServerName),
}

/// What the journal has of a name; absent rows were never written, or are removed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum Found {
    /// Of a model.
    Model(ModelName, Option<ModelRows>),
    /// Of a server.
    Server(ServerName, Option<ServerRow>),
    /// It can't be read; and why.
    Unreadable(At, String),
}
