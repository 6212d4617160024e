//! What runs the models: ONNX Runtime where its library is there, tract within this program otherwise.
//!
//! The rules of this module: one engine serves all models of a server, so that a model's answers don't depend on
//! chance, and its name is in the metadata of each; a library that is missing, too old or broken is told in words
//! and takes nothing down.

mod aside;
mod head;
mod onnxruntime;
mod tract;

use std::{fmt, path::Path, sync::Arc};

use tract_onnx::prelude::Tensor;

use super::{execute::Queue, plan::Port, stop::Stop};

/// What to do about a model whose output is a sequence of maps, which the protocol has no datatype for.
const ZIPMAP: &str =
    "export the model with options={\"zipmap\": False}, so that it gives its probabilities as a tensor";

/// Reads artifacts.
pub(crate) trait Engine: fmt::Debug + Send + Sync {
    /// Its name in the metadata of models.
    fn platform(&self) -> &'static str;

    /// Reads the artifact in `file`; other loads wait `behind` it. Blocks, and may panic.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence that begins with the artifact.
    fn load(&self, file: &Path, behind: &Queue) -> Result<Loaded, String>;
}

/// A model that an engine has read.
pub(crate) struct Loaded {
    /// What it takes, in the engine's order.
    pub(crate) inputs: Vec<Port>,
    /// What it gives, in the engine's order.
    pub(crate) outputs: Vec<Port>,
    /// Bytes of the files that it was read from.
    pub(crate) artifact_bytes: u64,
    /// Bytes of memory that it takes between requests: no less, and where the engine does not tell, more.
    pub(crate) memory_bytes: u64,
    /// Whether its runs have to take turns.
    pub(crate) takes_turns: bool,
    pub(crate) runnable: Box<dyn Runnable>,
}

/// Runs one model, for any number of requests at once.
pub(crate) trait Runnable: Send + Sync {
    /// Runs it on `inputs`, in the engine's order, and returns the outputs at `wanted` as clients are told they are.
    /// Takes as long as the model takes, or until `stop` is said where the engine can be stopped; and may panic.
    ///
    /// # Errors
    /// What the engine said.
    fn run(&self, inputs: Vec<Tensor>, wanted: &[usize], stop: &Stop) -> Result<Vec<Tensor>, RunError>;
}

/// Why a model gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RunError {
    /// It can't be run on these inputs.
    Refused(String),
    /// The engine failed.
    Failed(String),
}

/// Which library of ONNX Runtime is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library<'a> {
    /// None: tract runs the models.
    Off,
    /// The one that the system finds under its usual names, if there is any.
    Auto,
    /// The one in this file.
    At(&'a Path),
}

impl<'a> Library<'a> {
    /// What the setting `agent.onnx_runtime` means.
    #[must_use]
    pub fn of(setting: &'a str) -> Self {
        match setting {
            "off" => Self::Off,
            "auto" => Self::Auto,
            path => Self::At(Path::new(path)),
        }
    }
}

/// The engine of a [`Runtime`](super::Runtime).
#[derive(Clone, Debug)]
pub struct Onnx {
    pub(super) engine: Arc<dyn Engine>,
    library: bool,
}

impl Onnx {
    /// The engine within this program, in pure Rust. It knows fewer operators than ONNX Runtime.
    #[must_use]
    pub fn tract() -> Self {
        Self { engine: Arc::new(tract::Tract), library: false }
    }

    /// ONNX Runtime from `library`; tract where there is none, and then why the library that was asked for is not
    /// used. A process loads at most one library, and keeps it: who asks for another gets the one that there is.
    #[must_use]
    pub fn find(library: Library<'_>) -> (Self, Option<String>) {
        match onnxruntime::find(library) {
            Ok(Some(engine)) => (Self { engine, library: true }, None),
            Ok(None) => (Self::tract(), None),
            Err(problem) => (Self::tract(), Some(problem)),
        }
    }

    /// Whether it is ONNX Runtime.
    #[must_use]
    pub const fn is_onnx_runtime(&self) -> bool {
        self.library
    }
}
