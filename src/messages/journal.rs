//! To the journal.

use actix::{Message, Recipient};

use crate::domain::record::Write;

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
