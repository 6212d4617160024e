//! What an agent asks of the inference server beside it, whatever that is.
//!
//! The rules of this module: every adapter keeps the same promises (a load is over when it returns, an unload when
//! its memory is free, what is not known counts as unloaded), so that nothing above it asks which server it is;
//! what a copy's folder holds is decided from the artifact's listing alone, and carried out elsewhere.

mod asked;
mod calls;
mod mlserver;
mod oip;
mod pbtxt;
mod repository;
mod select;
mod triton;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use futures::future::BoxFuture;

use asked::Asked;
pub(super) use asked::kind_of;
use mlserver::MlServer;
use oip::Oip;
pub(super) use repository::{Answer, Repository, Row};
use triton::Triton;

pub use crate::settings::registry::Runtime as Kind;
use crate::{
    domain::{
        copy::{Failure, FailureClass},
        memory::Resources,
        spec::ModelSpec,
        version::Version,
    },
    forward::Upstream,
};

/// The largest configuration file that an adapter looks into, in bytes.
pub const LARGEST_CONFIGURATION: u64 = 1 << 20;

/// An inference server's repository.
pub trait Runtime: Send + Sync + fmt::Debug {
    /// Which server it is for.
    fn kind(&self) -> Kind;

    /// Whether a file of an artifact is configuration that [`layout`](Self::layout) has to see.
    fn reads(&self, path: &str) -> bool;

    /// What a copy's folder has to hold, so that the server loads it under the name that is wanted. Pure.
    ///
    /// # Errors
    /// When the server could not load the artifact: what is missing, and how it is brought.
    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure>;

    /// Loads the folder `served` of the repository. Returns once the server says that it is loaded; of one that is
    /// loaded already, at once or after loading it anew.
    ///
    /// # Errors
    /// Why it can't be loaded, in the words of the server.
    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>>;

    /// Unloads it. One that the server does not know counts as unloaded. Returns once its memory is free; the caller
    /// sets the deadline.
    ///
    /// # Errors
    /// When it may still be in memory.
    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>>;

    /// Whether it answers requests: this model, whatever the server as a whole says of itself.
    ///
    /// # Errors
    /// When the server does not say.
    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>>;

    /// What takes memory in the server: loaded, loading or unloading.
    ///
    /// # Errors
    /// When the server does not say.
    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>>;

    /// Memory that the server says a loaded model takes; nothing when it does not say.
    ///
    /// # Errors
    /// When the server does not answer.
    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>>;

    /// Whether a load may keep the server from answering anything else: then silence means nothing for as long as
    /// a load may take.
    fn loads_block(&self) -> bool;
}

/// A model in the server's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    /// Its name there.
    pub name: String,
    /// Whether it answers.
    pub ready: bool,
}

/// An artifact on disk, as an adapter sees it.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Every file, by its path in the artifact.
    pub files: BTreeSet<String>,
    /// What is in those that the adapter reads and that are not too large for it.
    pub contents: BTreeMap<String, Vec<u8>>,
}

/// What a copy's folder is for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The name under which the server is to know it; also that of the folder.
    pub served: &'a str,
    /// Which version of the model it is.
    pub version: Version,
    /// What the user asked for.
    pub spec: &'a ModelSpec,
}

/// A copy's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Files of the artifact: path in the folder, to the path in the artifact that it comes from.
    pub links: BTreeMap<String, String>,
    /// Files that are made here, with what is in them.
    pub written: BTreeMap<String, Vec<u8>>,
    /// How many times the server will hold the model in memory, if that can be told.
    pub instances: Option<u32>,
}

/// The adapter for a server of this kind; of one whose kind nobody says, the one that the server's own name calls
/// for. `workers` are the processes of an `MLServer` that each hold every model; 0 and 1 are the same here.
#[must_use]
pub fn adapter(kind: Option<Kind>, server: Arc<dyn Upstream>, workers: u32) -> Arc<dyn Runtime> {
    let repository = Repository::new(server);
    match kind {
        Some(kind) => known(kind, repository, workers),
        None => Arc::new(Asked::new(repository, workers)),
    }
}

fn known(kind: Kind, repository: Repository, workers: u32) -> Arc<dyn Runtime> {
    match kind {
        // One that is a process for each model is no adapter for a server: `agent::process` has it.
        Kind::Builtin | Kind::Oip | Kind::Process => Arc::new(Oip::new(kind, repository)),
        Kind::MlServer => Arc::new(MlServer::new(repository, workers)),
        Kind::Triton => Arc::new(Triton::new(repository)),
    }
}

/// A folder that holds the artifact as it is.
///
/// # Errors
/// When the artifact has no such version as is wanted.
pub(super) fn plain(artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
    select::plain(artifact.paths(), wanted.spec.artifact_version).map(Layout::of)
}

/// A failure of class `artifact`.
fn bad(message: impl Into<String>) -> Failure {
    Failure { class: FailureClass::Artifact, message: message.into() }
}

impl Layout {
    /// A folder of these files and no other.
    fn of(links: BTreeMap<String, String>) -> Self {
        Self { links, ..Self::default() }
    }
}

impl Listing {
    fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(String::as_str)
    }

    /// The text of a configuration file that is in the artifact.
    fn text(&self, path: &str) -> Result<&str, Failure> {
        let contents = self.contents.get(path).ok_or_else(|| {
            bad(format!(
                "{path} has more than {LARGEST_CONFIGURATION} bytes, which is no configuration; make it smaller"
            ))
        })?;
        std::str::from_utf8(contents).map_err(|_| bad(format!("{path} is not UTF-8 text; save it as that")))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::forward::{Request, Response, UpstreamError};

    /// A server that is not there.
    #[derive(Debug)]
    struct Nobody;

    impl Upstream for Nobody {
        fn call(&self, _: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
            async { Err(UpstreamError { started: true, timed_out: false, message: "nobody".to_owned() }) }.boxed()
        }
    }

    pub(crate) fn nobody() -> Arc<dyn Upstream> {
        Arc::new(Nobody)
    }

    pub(crate) fn listing(adapter: &dyn Runtime, files: &[(&str, &str)]) -> Listing {
        let read = files.iter().filter(|(path, _)| adapter.reads(path));
        Listing {
            files: files.iter().map(|(path, _)| (*path).to_owned()).collect(),
            contents: read.map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect(),
        }
    }

    pub(crate) fn wanted(spec: &ModelSpec) -> Wanted<'_> {
        Wanted { served: "iris_3", version: Version(3), spec }
    }
}
