//! Where the journal is kept.

use std::fmt;

use thiserror::Error;

use crate::domain::{
    names::{ModelName, ServerName},
    record::{Contents, CopyRow, ModelRow, ServerRow, SizeRow, VersionRow, Write},
};

/// Keeps the journal's rows. Its tables are the state: there is no log beside them.
pub trait Store: Send + Sync + fmt::Debug {
    /// Whose journal this is.
    fn identity(&self) -> Identity;

    /// Everything it holds.
    ///
    /// # Errors
    /// When it can't be read.
    fn load(&self) -> Result<Contents, OpenError>;

    /// What it holds of one model.
    ///
    /// # Errors
    /// When it can't be read.
    fn load_model(&self, name: &ModelName) -> Result<Option<ModelRows>, OpenError>;

    /// What it holds of one server.
    ///
    /// # Errors
    /// When it can't be read.
    fn load_server(&self, name: &ServerName) -> Result<Option<ServerRow>, OpenError>;

    /// Applies `writes` in order, all or none, and returns once they would survive a power cut. Blocks.
    ///
    /// # Errors
    /// Says whether nothing was written or whether that is unknown.
    fn commit(&self, writes: &[Write]) -> Result<(), CommitError>;

    /// Replaces what is kept of the event ring, oldest first. Blocks.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    fn save_events(&self, events: &[Vec<u8>]) -> Result<(), CommitError>;

    /// What [`save_events`](Self::save_events) kept.
    ///
    /// # Errors
    /// When it can't be read.
    fn load_events(&self) -> Result<Vec<Vec<u8>>, OpenError>;
}

/// A model with everything that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRows {
    /// The model.
    pub model: ModelRow,
    /// Its versions.
    pub versions: Vec<VersionRow>,
    /// Its copies.
    pub copies: Vec<CopyRow>,
    /// What was measured of it.
    pub sizes: Vec<SizeRow>,
}

/// Tells one journal from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the cluster: kept over backup and restore.
    pub cluster: String,
    /// Of this journal: another one when a journal was made anew.
    pub lineage: String,
}

/// A store that can't be used. Each says what to do.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is none.
    #[error("there is no journal at {path}; name the folder that wharf was started with: --data-dir DIR")]
    Missing {
        /// The file.
        path: String,
    },
    /// Another process has it.
    #[error(
        "the journal {path} is in use by another process; stop that one, or give this one a data directory of its own"
    )]
    Locked {
        /// The file.
        path: String,
    },
    /// A later Wharf wrote it.
    #[error(
        "the journal {path} has schema {found}, this wharf reads up to {known}; run the newer wharf that wrote it, \
         or restore a backup made before the upgrade"
    )]
    Newer {
        /// The file.
        path: String,
        /// Its schema.
        found: u64,
        /// The newest schema that is known here.
        known: u64,
    },
    /// It does not hold what a journal holds.
    #[error(
        "the journal {path} is damaged ({problem}); restore a backup, or move the file away to start anew: what \
         agents hold is adopted as they call"
    )]
    Damaged {
        /// The file.
        path: String,
        /// What was found.
        problem: String,
    },
    /// The file system said no.
    #[error("the journal {path} can't be opened: {problem}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        problem: String,
    },
}

/// A commit that did not succeed.
#[derive(Debug, Error)]
pub enum CommitError {
    /// Nothing was written.
    #[error("the journal could not be written, and nothing was changed: {0}")]
    Failed(String),
    /// It may or may not have been written: the process must exit and read it again.
    #[error("the journal's last commit has an unknown outcome: {0}")]
    Unknown(String),
}
