//! One model, ready to run: what it takes and gives, and whoever runs it.
//!
//! The rule of this module: nothing that an artifact or a tensor holds may take the process down. The engine's
//! panics become failures here.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use tract_onnx::prelude::Tensor;

use super::{
    datatype::Datatype,
    engine::{Engine, Loaded, RunError, Runnable},
    execute::{Queue, Turn},
    failure::{Failure, Kind, panic_message},
    stop::Stop,
};

/// One axis of a tensor that a model takes or gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    /// Always this long.
    Fixed(usize),
    /// As long as every other axis of this name in the request.
    Named(String),
    /// Any length.
    Free,
}

impl Dim {
    /// As metadata shows it: -1 for any length.
    pub(crate) fn wire(&self) -> i64 {
        match self {
            Self::Fixed(length) => i64::try_from(*length).unwrap_or(i64::MAX),
            Self::Named(_) | Self::Free => -1,
        }
    }
}

/// One tensor that a model takes or gives.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    /// Its name in the model.
    pub(crate) name: String,
    /// What clients send or get.
    pub(crate) datatype: Datatype,
    /// Its axes.
    pub(crate) shape: Vec<Dim>,
}

impl Port {
    /// The shape as metadata and messages show it.
    pub(crate) fn wire_shape(&self) -> Vec<i64> {
        self.shape.iter().map(Dim::wire).collect()
    }
}

/// A model that can be run, by any number of requests at once.
pub(crate) struct Plan {
    /// The name under which it is served.
    pub(crate) name: String,
    /// What it takes, in the engine's order.
    pub(crate) inputs: Vec<Port>,
    /// What it gives, in the engine's order.
    pub(crate) outputs: Vec<Port>,
    /// Bytes of the files that it was read from.
    pub(crate) artifact_bytes: u64,
    /// Bytes of memory that it takes between requests: no less, and where the engine does not tell, more.
    pub(crate) memory_bytes: u64,
    /// What runs it, as metadata says it.
    pub(crate) platform: &'static str,
    /// Whose turn it is, where its runs have to take turns.
    pub(super) turn: Option<Turn>,
    runnable: Box<dyn Runnable>,
}

impl fmt::Debug for Plan {
    /// Without the weights.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, artifact_bytes, platform, .. } = self;
        f.debug_struct("Plan")
            .field("name", name)
            .field("artifact_bytes", artifact_bytes)
            .field("platform", platform)
            .finish_non_exhaustive()
    }
}

impl Plan {
    /// Has `engine` read the artifact in `file`, to be served as `name`. Blocks.
    ///
    /// # Errors
    /// When it can't be read, is not ONNX, or asks for what the engine can't do; the message names the file.
    pub(super) fn load(engine: &dyn Engine, name: &str, file: &Path, behind: &Queue) -> Result<Self, Failure> {
        let shown = file.display();
        let problem = match catch_unwind(AssertUnwindSafe(|| engine.load(file, behind))) {
            Ok(Ok(Loaded { inputs, outputs, artifact_bytes, memory_bytes, takes_turns, runnable })) => {
                let (name, platform) = (name.to_owned(), engine.platform());
                let turn = takes_turns.then(Turn::default);
                return Ok(Self { name, inputs, outputs, artifact_bytes, memory_bytes, platform, turn, runnable });
            }
            Ok(Err(problem)) => problem,
            Err(panic) => format!("can't be compiled: {}", panic_message(&*panic)),
        };
        Err(Failure::new(Kind::Artifact, format!("the artifact {shown} {problem}")))
    }

    /// The input or output named `name`, and its place.
    pub(crate) fn find<'a>(ports: &'a [Port], name: &str) -> Option<(usize, &'a Port)> {
        ports.iter().enumerate().find(|(_, port)| port.name == name)
    }

    /// Runs the model on `inputs`, in the engine's order, and returns the outputs at `wanted`. Takes as long as
    /// the model takes, or until `stop` is said where the engine can be stopped.
    ///
    /// # Errors
    /// When the model fails on these inputs.
    pub(crate) fn run(&self, inputs: Vec<Tensor>, wanted: &[usize], stop: &Stop) -> Result<Vec<Tensor>, Failure> {
        let name = &self.name;
        let failed =
            |said: &str| Failure::new(Kind::Internal, format!("model {name:?} failed on these inputs: {said}"));
        match catch_unwind(AssertUnwindSafe(|| self.runnable.run(inputs, wanted, stop))) {
            Ok(Ok(outputs)) => Ok(outputs),
            Ok(Err(RunError::Refused(said))) => {
                Err(Failure::invalid(format!("model {name:?} can't be run on these inputs: {said}")))
            }
            Ok(Err(RunError::Failed(said))) => Err(failed(&said)),
            Err(panic) => Err(failed(&panic_message(&*panic))),
        }
    }
}
