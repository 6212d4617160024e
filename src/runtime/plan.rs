//! One model, ready to run: how an artifact becomes a plan, and how a plan is run.
//!
//! The rule of this module: nothing that an artifact or a tensor holds may take the process down. The engine's
//! panics become failures here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message as _;
use tract_onnx::{
    Onnx,
    data_resolver::{FopenDataResolver, ModelDataResolver},
    pb::{GraphProto, ModelProto, tensor_proto::DataType, type_proto},
    prelude::*,
    tract_core::ops::konst::Const,
    tract_hir::{
        infer::{DimFact, Factoid as _, ShapeFactoid},
        internal::DimLike as _,
    },
};

use super::{
    datatype::Datatype,
    failure::{Failure, Kind, clip, explain, panic_message},
};

/// Bytes that a node of a graph takes beside its constants: its name, its facts, its place in the plan.
const NODE: usize = 4096;

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
    runnable: Arc<TypedRunnableModel>,
}

impl fmt::Debug for Plan {
    /// Without the weights.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, artifact_bytes, .. } = self;
        f.debug_struct("Plan").field("name", name).field("artifact_bytes", artifact_bytes).finish_non_exhaustive()
    }
}

impl Plan {
    /// Reads the artifact in `file`, to be served as `name`. Blocks.
    ///
    /// # Errors
    /// When it can't be read, is not ONNX, or asks for what the engine can't do; the message names the file.
    pub(crate) fn load(name: &str, file: &Path) -> Result<Self, Failure> {
        let shown = file.display();
        let bytes = fs::read(file)
            .map_err(|error| Failure::new(Kind::Artifact, format!("the artifact {shown} can't be read: {error}")))?;
        let load = || Self::compile(name, file, &bytes);
        match catch_unwind(AssertUnwindSafe(load)) {
            Ok(result) => {
                result.map_err(|problem| Failure::new(Kind::Artifact, format!("the artifact {shown} {problem}")))
            }
            Err(panic) => Err(Failure::new(
                Kind::Artifact,
                format!("the artifact {shown} can't be compiled: {}", panic_message(&*panic)),
            )),
        }
    }

    fn compile(name: &str, file: &Path, bytes: &[u8]) -> Result<Self, String> {
        let model = ModelProto::decode(bytes).map_err(|error| format!("is not an ONNX model: {error}"))?;
        let Some(graph) = &model.graph else {
            return Err("is not an ONNX model: it has no graph".to_owned());
        };
        let files = Arc::new(CountedFiles::default());
        let onnx = Onnx { provider: Arc::clone(&files) as _, ..tract_onnx::onnx() };
        let directory = file.parent().and_then(Path::to_str).ok_or("lies under a path that is not UTF-8")?;
        let compiled = typed(&onnx, &model, directory).and_then(|typed| {
            let optimized = typed.into_optimized()?;
            let inputs = facts(&optimized, optimized.input_outlets()?)?;
            let outputs = facts(&optimized, optimized.output_outlets()?)?;
            let held = held(&optimized);
            Ok((inputs, outputs, held, optimized.into_runnable()?))
        });
        let (inputs, outputs, held, runnable) = compiled.map_err(|error| match unsupported(&onnx, graph) {
            Some(operators) => operators,
            None => format!("can't be compiled: {}", explain(&error)),
        })?;
        let initialized: BTreeSet<_> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let taken = graph.input.iter().filter(|input| !initialized.contains(input.name.as_str()));
        Ok(Self {
            name: name.to_owned(),
            inputs: ports(taken.map(|info| (info.name.as_str(), None)), &inputs)?,
            outputs: ports(graph.output.iter().map(|info| (info.name.as_str(), declared(info))), &outputs)?,
            artifact_bytes: bytes.len() as u64 + files.total(),
            memory_bytes: held.max(bytes.len() as u64 + files.total()),
            runnable,
        })
    }

    /// The input or output named `name`, and its place.
    pub(crate) fn find<'a>(ports: &'a [Port], name: &str) -> Option<(usize, &'a Port)> {
        ports.iter().enumerate().find(|(_, port)| port.name == name)
    }

    /// Runs the model on `inputs`, in the engine's order, and returns the outputs at `wanted`. Takes as long as
    /// the model takes.
    ///
    /// # Errors
    /// When the model fails on these inputs.
    pub(crate) fn run(&self, inputs: TVec<TValue>, wanted: &[usize]) -> Result<Vec<Tensor>, Failure> {
        let run = || {
            let mut outputs: Vec<_> = self.runnable.run(inputs)?.into_iter().map(Some).collect();
            wanted.iter().map(|index| self.output(*index, &mut outputs)).collect::<TractResult<Vec<_>>>()
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(outputs)) => Ok(outputs),
            Ok(Err(error)) => Err(Failure::invalid(format!(
                "model {:?} can't be run on these inputs: {}",
                self.name,
                explain(&error)
            ))),
            Err(panic) => Err(Failure::new(
                Kind::Internal,
                format!("model {:?} failed on these inputs: {}", self.name, panic_message(&*panic)),
            )),
        }
    }

    /// The output at `index`, as clients are told it is.
    fn output(&self, index: usize, outputs: &mut [Option<TValue>]) -> TractResult<Tensor> {
        let value = outputs.get_mut(index).and_then(Option::take);
        let tensor = value.ok_or_else(|| TractError::msg("the engine gave fewer outputs than it has"))?.into_tensor();
        let datum = self.outputs[index].datatype.datum();
        // Labels can come as dimensions, and quantised numbers carry their scale in their type.
        let tensor = if tensor.datum_type() == datum { tensor } else { tensor.cast_to_dt(datum)?.into_owned() };
        tensor.into_plain_ram()
    }
}

/// Reads `model` and infers every type and shape in it.
fn typed(onnx: &Onnx, model: &ModelProto, directory: &str) -> TractResult<TypedModel> {
    // Axes without a name are first taken to be unrelated. Where the model can't be typed that way, the first
    // axis of each input is taken to be the batch.
    let mut last = None;
    for shared in [false, true] {
        let parsed = onnx.parse(model, Some(directory))?;
        if let Some(name) = parsed.unresolved_inputs.first() {
            return Err(TractError::msg(format!("its graph uses {name:?}, which nothing in it gives")));
        }
        let mut inference = parsed.model;
        let named = name_axes(&mut inference, shared)?;
        match inference.into_typed() {
            Ok(typed) => return Ok(typed),
            Err(error) if named => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| TractError::msg("its shapes can't be inferred")))
}

/// Gives every input axis without a length or a name a name of its own; the first axes `shared` one. Says
/// whether there was any.
fn name_axes(model: &mut InferenceModel, shared: bool) -> TractResult<bool> {
    let mut any = false;
    let batch = model.symbols.new_with_prefix("batch");
    for outlet in model.input_outlets()?.to_vec() {
        let mut fact = model.outlet_fact(outlet)?.clone();
        let name = model.node(outlet.node).name.clone();
        let Some(rank) = fact.shape.rank().concretize() else {
            return Err(TractError::msg(format!(
                "input {name:?} declares no shape; export the model with a shape, -1 or a name for each axis that varies"
            )));
        };
        let rank = usize::try_from(rank)?;
        let mut dims: TVec<DimFact> = tvec!();
        for axis in 0..rank {
            let dim = fact.shape.dim(axis).unwrap_or_default();
            dims.push(if dim.is_concrete() {
                dim
            } else {
                any = true;
                let symbol = if shared && axis == 0 { batch.clone() } else { model.symbols.new_with_prefix("axis") };
                DimFact::from(TDim::from(symbol))
            });
        }
        fact.shape = ShapeFactoid::closed(dims);
        model.set_outlet_fact(outlet, fact)?;
    }
    Ok(any)
}

fn facts(model: &TypedModel, outlets: &[OutletId]) -> TractResult<Vec<TypedFact>> {
    outlets.iter().map(|outlet| model.outlet_fact(*outlet).cloned()).collect()
}

/// Bytes of the constants of a model that is ready to run, each counted once, in the form in which it is kept, as far as
/// the engine shows them: what an operator has packed into itself it does not. The artifact's bytes are the bound then.
fn held(model: &TypedModel) -> u64 {
    let mut seen = BTreeSet::new();
    let mut bytes = (model.nodes.len() * NODE) as u64;
    let constants = model.nodes.iter().flat_map(|node| {
        let own = node.op_as::<Const>().map(Const::val);
        node.outputs.iter().filter_map(|output| output.fact.konst.as_ref()).chain(own)
    });
    for tensor in constants {
        if seen.insert(Arc::as_ptr(tensor)) {
            let plain = tensor.len() * tensor.datum_type().size_of();
            // What is packed for the processor has a size of its own.
            let packed = tensor.exotic_fact().ok().flatten().and_then(|fact| fact.mem_size().to_usize().ok());
            bytes = bytes.saturating_add(packed.unwrap_or(plain) as u64);
        }
    }
    bytes
}

/// What the model's file says an output's elements are.
fn declared(info: &tract_onnx::pb::ValueInfoProto) -> Option<DatumType> {
    let type_proto::Value::TensorType(tensor) = info.r#type.as_ref()?.value.as_ref()?;
    DataType::try_from(tensor.elem_type).ok()?.try_into().ok()
}

fn ports<'a>(
    named: impl Iterator<Item = (&'a str, Option<DatumType>)>,
    facts: &[TypedFact],
) -> Result<Vec<Port>, String> {
    let named: Vec<_> = named.collect();
    if named.len() != facts.len() {
        return Err(format!("declares {} tensors where the engine found {}", named.len(), facts.len()));
    }
    let port = |((name, declared), fact): (&(&str, Option<DatumType>), &TypedFact)| {
        let datum = declared.unwrap_or(fact.datum_type);
        let datatype = Datatype::from_datum(datum).ok_or_else(|| {
            format!("has a tensor {name:?} of type {datum:?}, which the protocol has no datatype for")
        })?;
        let shape = fact.shape.iter().map(|dim| match (dim.to_usize(), dim) {
            (Ok(length), _) => Dim::Fixed(length),
            (Err(_), TDim::Sym(symbol)) => Dim::Named(symbol.to_string()),
            (Err(_), _) => Dim::Free,
        });
        Ok(Port { name: (*name).to_owned(), datatype, shape: shape.collect() })
    };
    named.iter().zip(facts).map(port).collect()
}

/// Which operators of `graph` the engine can't run, as the end of a sentence about the artifact.
fn unsupported(onnx: &Onnx, graph: &GraphProto) -> Option<String> {
    let mut names = BTreeSet::new();
    let mut graphs = vec![graph];
    while let Some(graph) = graphs.pop() {
        for node in &graph.node {
            if !onnx.op_register.0.contains_key(&node.op_type) {
                names.insert(clip(&node.op_type, 64));
            }
            graphs.extend(node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()));
        }
    }
    if names.is_empty() {
        return None;
    }
    let zipmap = names.contains("ZipMap");
    let list = names.into_iter().take(10).collect::<Vec<_>>().join(", ");
    let hint = if zipmap {
        "; export the model with options={\"zipmap\": False}, so that it gives its probabilities as a tensor"
    } else {
        "; export the model without them, or serve it with another server"
    };
    Some(format!("uses operators that this runtime can't run: {list}{hint}"))
}

/// Reads the files that an artifact keeps weights in, and counts their bytes.
#[derive(Default)]
struct CountedFiles {
    sizes: Mutex<BTreeMap<PathBuf, u64>>,
}

impl CountedFiles {
    fn total(&self) -> u64 {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

impl ModelDataResolver for CountedFiles {
    fn read_bytes_from_path(
        &self,
        buffer: &mut Vec<u8>,
        path: &Path,
        offset: usize,
        length: Option<usize>,
    ) -> TractResult<()> {
        FopenDataResolver.read_bytes_from_path(buffer, path, offset, length)?;
        let size = fs::metadata(path)?.len();
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), size);
        Ok(())
    }
}
