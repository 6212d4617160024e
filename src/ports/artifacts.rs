//! Where artifacts come from.

use std::{fmt, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;

use crate::domain::{
    copy::{Failure, Progress},
    secret::Credentials,
};

/// Is told how far a fetch is. Cheap; may be called for every chunk.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// Fetches artifacts of some URI schemes into a folder.
pub trait ArtifactSource: Send + Sync + fmt::Debug {
    /// The schemes that it serves, in lower case; `""` stands for a plain path.
    fn schemes(&self) -> &[&str];

    /// Fetches what `request` names into its folder. Dropping the future gives the fetch up; what it left in its
    /// folders may be there when the same artifact is asked for again, and is trusted only after a look at it.
    ///
    /// # Errors
    /// With the class of what went wrong, and one sentence in which no credentials appear.
    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>>;
}

/// What to fetch, and where to put it.
#[derive(Clone, Debug)]
pub struct FetchRequest {
    /// Where the artifact is, without the fragment.
    pub uri: String,
    /// The credentials that the model names.
    pub credentials: Option<Credentials>,
    /// The tag of the artifact that is already on disk: when it is still right, nothing needs to be fetched.
    pub known: Option<String>,
    /// An existing folder to write into, the same for every try at the same artifact.
    pub into: PathBuf,
    /// An existing folder for what is to be known of files that are there in part.
    pub notes: PathBuf,
    /// What must not be exceeded.
    pub limits: FetchLimits,
}

/// Bounds of one artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchLimits {
    /// Most bytes, over all files.
    pub bytes: u64,
    /// Most files.
    pub files: usize,
}

/// The outcome of a fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// What is on disk is still right.
    Unchanged,
    /// The artifact is in the folder.
    Files {
        /// Tells this content from a later one at the same URI; absent when the source has no such thing.
        tag: Option<String>,
        /// All files of the artifact.
        files: Vec<FetchedFile>,
    },
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchedFile {
    /// Relative to the folder, with `/` between parts, none of which is empty, `.` or `..`.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256 digest in lower-case hex.
    pub sha256: String,
}
