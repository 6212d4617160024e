//! tract: pure Rust, always there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message as _;
use tract_onnx::{
    Onnx,
    data_resolver::{FopenDataResolver, ModelDataResolver},
    pb::{GraphProto, ModelProto, tensor_proto::DataType, type_proto},
    prelude::*,
    tract_core::{ops::konst::Const, optim::Optimizer},
    tract_hir::{
        infer::{DimFact, Factoid as _, ShapeFactoid},
        internal::DimLike as _,
    },
};

use super::{Engine, Loaded, RunError, Runnable, ZIPMAP, aside::Aside};
use crate::runtime::{
    datatype::Datatype,
    execute::Queue,
    failure::{clip, explain},
    plan::{Dim, Port},
    stop::Stop,
};

/// What to do about a model that tract can't run.
const WAY_OUT: &str = "set agent.onnx_runtime to the path of libonnxruntime.so";

/// Bytes that a node of a graph takes beside its constants: its name, its facts, its place in the plan.
const NODE: usize = 4096;

/// The engine.
#[derive(Debug)]
pub(super) struct Tract;

impl Engine for Tract {
    fn platform(&self) -> &'static str {
        "onnx_tract"
    }

    fn load(&self, file: &Path, behind: &Queue) -> Result<Loaded, String> {
        let aside = Aside::begin(behind.clone());
        let bytes = fs::read(file).map_err(|error| format!("can't be read: {error}"))?;
        let model = ModelProto::decode(&*bytes).map_err(|error| format!("is not an ONNX model: {error}"))?;
        let Some(graph) = &model.graph else {
            return Err("is not an ONNX model: it has no graph".to_owned());
        };
        let files = Arc::new(CountedFiles::default());
        let onnx = Onnx { provider: Arc::clone(&files) as _, ..tract_onnx::onnx() };
        let directory = file.parent().and_then(Path::to_str).ok_or("lies under a path that is not UTF-8")?;
        aside.step();
        let compiled = typed(&onnx, &model, directory, &aside).and_then(|mut optimized| {
            // What `into_optimized` does.
            aside.between(Optimizer::declutter()).session().optimize(&mut optimized)?;
            optimized.optimize_with_session(&mut aside.between(Optimizer::codegen()).session())?;
            let inputs = facts(&optimized, optimized.input_outlets()?)?;
            let outputs = facts(&optimized, optimized.output_outlets()?)?;
            let held = held(&optimized);
            Ok((inputs, outputs, held, optimized.into_runnable()?))
        });
        let (inputs, outputs, held, runnable) = compiled.map_err(|error| match unsupported(&onnx, graph) {
            Some(operators) => operators,
            None => format!("can't be compiled by tract: {}; if ONNX Runtime can, {WAY_OUT}", explain(&error)),
        })?;
        let initialized: BTreeSet<_> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let taken = graph.input.iter().filter(|input| !initialized.contains(input.name.as_str()));
        let inputs = ports(taken.map(|info| (info.name.as_str(), None)), &inputs)?;
        let outputs = ports(graph.output.iter().map(|info| (info.name.as_str(), declared(info))), &outputs)?;
        let datatypes = outputs.iter().map(|port| port.datatype).collect();
        let artifact_bytes = bytes.len() as u64 + files.total();
        let memory_bytes = held.max(artifact_bytes);
        Ok(Loaded {
            inputs,
            outputs,
            artifact_bytes,
            memory_bytes,
            takes_turns: false,
            runnable: Box::new(Compiled { runnable, datatypes }),
        })
    }
}

/// A model.
struct Compiled {
    runnable: Arc<TypedRunnableModel>,
    /// Of the outputs.
    datatypes: Vec<Datatype>,
}

impl Runnable for Compiled {
    fn run(&self, inputs: Vec<Tensor>, wanted: &[usize], _: &Stop) -> Result<Vec<Tensor>, RunError> {
        let run = || {
            let inputs = inputs.into_iter().map(IntoTValue::into_tvalue).collect();
            let mut outputs: Vec<_> = self.runnable.run(inputs)?.into_iter().map(Some).collect();
            wanted.iter().map(|index| self.output(*index, &mut outputs)).collect::<TractResult<Vec<_>>>()
        };
        run().map_err(|error| RunError::Refused(explain(&error)))
    }
}

impl Compiled {
    /// The output at `index`, as clients are told it is.
    fn output(&self, index: usize, outputs: &mut [Option<TValue>]) -> TractResult<Tensor> {
        let value = outputs.get_mut(index).and_then(Option::take);
        let tensor = value.ok_or_else(|| TractError::msg("the engine gave fewer outputs than it has"))?.into_tensor();
        let datum = self.datatypes[index].datum();
        // Labels can come as dimensions, and quantised numbers carry their scale in their type.
        let tensor = if tensor.datum_type() == datum { tensor } else { tensor.cast_to_dt(datum)?.into_owned() };
        tensor.into_plain_ram()
    }
}

/// Reads `model` and infers every type and shape in it.
fn typed(onnx: &Onnx, model: &ModelProto, directory: &str, aside: &Aside) -> TractResult<TypedModel> {
    // Axes without a name are first taken to be unrelated. Where the model can't be typed that way, the first
    // axis of each input is taken to be the batch.
    let mut last = None;
    for shared in [false, true] {
        let parsed = onnx.parse(model, Some(directory))?;
        if let Some(name) = parsed.unresolved_inputs.first() {
            return Err(TractError::msg(format!("its graph uses {name:?}, which nothing in it gives")));
        }
        aside.step();
        let mut inference = parsed.model;
        let named = name_axes(&mut inference, shared)?;
        let typed = inference.into_typed();
        aside.step();
        match typed {
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
        ZIPMAP.to_owned()
    } else {
        format!("export the model without them, or, if ONNX Runtime can run them, {WAY_OUT}")
    };
    Some(format!("uses operators that tract can't run: {list}; {hint}"))
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
