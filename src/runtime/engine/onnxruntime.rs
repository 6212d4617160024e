//! ONNX Runtime, from a library that is loaded while the process runs.
//!
//! The rules of this module: nothing of the library is touched before it has been found to be new enough; what the
//! models take is given back when they leave, so the library keeps no arena; its messages go where all others go.

use std::{
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ort::{
    environment::{Environment, GlobalThreadPoolOptions},
    ep,
    logging::LogLevel,
    session::{RunOptions, Session, SessionInputValue},
    value::{DynValue, PrimitiveTensorElementType, TensorElementType, TensorRef, ValueType},
};
use tract_onnx::prelude::{Datum, Tensor, f16};

use super::{Engine, Library, Loaded, RunError, Runnable, ZIPMAP, head};
use crate::runtime::{
    datatype::Datatype,
    execute::Queue,
    failure::{Failure, clip, explain, panic_message},
    plan::{Dim, Port},
    stop::Stop,
    tensor,
};

/// How often ONNX Runtime may keep an artifact's weights: as they came, and packed for the processor. It does not tell.
const KEPT: u64 = 2;
/// Bytes of a session beside its weights, at most, as seen of small models.
const SESSION: u64 = 1 << 20;

/// The longest explanation taken over from the library, in characters.
const EXPLANATION: usize = 400;

/// The library of this process, once one has been found.
static FOUND: Mutex<Option<Arc<OnnxRuntime>>> = Mutex::new(None);

/// The engine.
#[derive(Debug)]
pub(super) struct OnnxRuntime {
    environment: Environment,
    library: PathBuf,
}

/// The engine of `library`. `None` where none is wanted, or none is there and none was named.
///
/// # Errors
/// Why the library that was named, or one that is there, can't be used.
pub(super) fn find(library: Library<'_>) -> Result<Option<Arc<dyn Engine>>, String> {
    let named = match library {
        Library::Off => return Ok(None),
        Library::Auto => None,
        Library::At(path) => Some(path),
    };
    if cfg!(target_feature = "crt-static") {
        return match named {
            Some(path) => Err(format!(
                "this wharf is linked statically and can't load {}; take the build for glibc, or set \
                 agent.onnx_runtime to off",
                path.display()
            )),
            None => Ok(None),
        };
    }
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(engine) = &*found {
        if let Some(path) = named
            && path != engine.library
        {
            let (asked, used) = (path.display(), engine.library.display());
            tracing::warn!(%asked, %used, "a process loads one library of ONNX Runtime, and has loaded another");
        }
        return Ok(Some(Arc::clone(engine) as _));
    }
    let engine = match named {
        Some(path) => Some(open(path)?),
        None => usual_names().iter().find_map(|name| match open(name) {
            Ok(engine) => Some(engine),
            Err(problem) => {
                tracing::debug!(problem, "no ONNX Runtime under a usual name");
                None
            }
        }),
    };
    Ok(engine.map(|engine| {
        tracing::info!(library = %engine.library.display(), "ONNX Runtime runs the models");
        let engine = Arc::new(engine);
        *found = Some(Arc::clone(&engine));
        engine as _
    }))
}

/// As the system's loader knows it.
fn usual_names() -> [PathBuf; 2] {
    let name = format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    [PathBuf::from(format!("{name}.1")), PathBuf::from(name)]
}

/// Loads the library in `path`; a bare name is looked for where the system looks for libraries.
fn open(path: &Path) -> Result<OnnxRuntime, String> {
    let shown = path.display();
    if path.components().count() > 1 && !path.is_file() {
        return Err(format!(
            "agent.onnx_runtime names {shown}, which is not a file; give the path of libonnxruntime.so, or set it to \
             off"
        ));
    }
    // The crate panics where the library is not what it says it is.
    let opened = catch_unwind(AssertUnwindSafe(|| environment(path)));
    let problem = match opened {
        Ok(Ok(environment)) => return Ok(OnnxRuntime { environment, library: path.to_owned() }),
        Ok(Err(problem)) => problem,
        Err(panic) => panic_message(&*panic),
    };
    let least = ort::MINOR_VERSION;
    Err(format!(
        "the library {shown} can't be used: {problem}; ONNX Runtime 1.{least} or a later 1.x is wanted, built for this \
         system"
    ))
}

fn environment(path: &Path) -> Result<Environment, String> {
    let loaded = ort::init_from(path).map_err(|error| clip(&error.to_string(), EXPLANATION))?;
    let build = || {
        // One pool for all models: one for each would be as many threads as there are models, times the cores.
        let threads = GlobalThreadPoolOptions::default()
            .with_inter_threads(1)?
            .with_intra_threads(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))?
            .with_spin_control(false)?;
        loaded
            .with_name("wharf")
            .with_telemetry(false)
            .with_global_thread_pool(threads)
            .with_logger(Arc::new(|level, _, _, place, message| log(level, place, message)))
            .build()
    };
    build().map_err(|error| said(&error))
}

fn log(level: LogLevel, place: &str, message: &str) {
    match level {
        LogLevel::Fatal | LogLevel::Error => tracing::warn!(target: "wharf::onnxruntime", place, "{message}"),
        LogLevel::Warning => tracing::debug!(target: "wharf::onnxruntime", place, "{message}"),
        LogLevel::Info | LogLevel::Verbose => tracing::trace!(target: "wharf::onnxruntime", place, "{message}"),
    }
}

/// The library's own explanation.
fn said<R>(error: &ort::Error<R>) -> String {
    clip(error.message(), EXPLANATION)
}

impl Engine for OnnxRuntime {
    fn platform(&self) -> &'static str {
        "onnx_onnxruntime"
    }

    fn load(&self, file: &Path, _: &Queue) -> Result<Loaded, String> {
        let (graph, artifact_bytes) = head::read(file)?;
        if let Some(input) = graph.input.iter().find(|input| !input.has_shape()) {
            let name = &input.name;
            return Err(format!(
                "can't be served: input {name:?} declares no shape; export the model with a shape, -1 or a name for \
                 each axis that varies"
            ));
        }
        drop(graph);
        let session = self.session(file).map_err(|error| format!("can't be compiled by ONNX Runtime: {error}"))?;
        let ports = |outlets: &[ort::value::Outlet]| outlets.iter().map(port).collect::<Result<Vec<_>, _>>();
        let (inputs, outputs) = (ports(session.inputs())?, ports(session.outputs())?);
        let names = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect();
        let runnable = Box::new(Model {
            takes: names(&inputs),
            gives: names(&outputs),
            datatypes: outputs.iter().map(|port| port.datatype).collect(),
            session: Mutex::new(session),
        });
        let memory_bytes = artifact_bytes.saturating_mul(KEPT).saturating_add(SESSION);
        Ok(Loaded { inputs, outputs, artifact_bytes, memory_bytes, takes_turns: true, runnable })
    }
}

impl OnnxRuntime {
    fn session(&self, file: &Path) -> Result<Session, String> {
        // Without arena and pattern, what a model took while it ran is free after it, and all of it after its unload.
        let cpu = ep::CPU::default().with_arena_allocator(false).build();
        let build = || {
            Session::builder(&self.environment)?
                .with_execution_providers([cpu])?
                .with_memory_pattern(false)?
                .commit_from_file(file)
        };
        build().map_err(|error| said(&error))
    }
}

/// What clients are told of an input or output.
fn port(outlet: &ort::value::Outlet) -> Result<Port, String> {
    let name = outlet.name();
    let (ty, shape, symbols) = match outlet.dtype() {
        ValueType::Tensor { ty, shape, dimension_symbols } => (*ty, shape, dimension_symbols),
        ValueType::Sequence(of) if matches!(**of, ValueType::Map { .. }) => {
            return Err(format!(
                "has {name:?}, a sequence of maps as ZipMap gives them, which the protocol has no datatype for; {ZIPMAP}"
            ));
        }
        other @ (ValueType::Sequence(_) | ValueType::Map { .. } | ValueType::Optional(_)) => {
            let other = clip(&other.to_string(), 64);
            return Err(format!(
                "has {name:?} of type {other}, which the protocol has no datatype for; export the model with tensors"
            ));
        }
    };
    let datatype = datatype(ty)
        .ok_or_else(|| format!("has a tensor {name:?} of type {ty}, which the protocol has no datatype for"))?;
    let dims = shape.iter().zip(symbols.iter()).map(|(length, symbol)| match usize::try_from(*length) {
        Ok(length) => Dim::Fixed(length),
        Err(_) if symbol.is_empty() => Dim::Free,
        Err(_) => Dim::Named(symbol.clone()),
    });
    Ok(Port { name: name.to_owned(), datatype, shape: dims.collect() })
}

/// The datatype under which clients see the library's.
const fn datatype(ty: TensorElementType) -> Option<Datatype> {
    Some(match ty {
        TensorElementType::Bool => Datatype::Bool,
        TensorElementType::Int8 => Datatype::Int8,
        TensorElementType::Int16 => Datatype::Int16,
        TensorElementType::Int32 => Datatype::Int32,
        TensorElementType::Int64 => Datatype::Int64,
        TensorElementType::Uint8 => Datatype::Uint8,
        TensorElementType::Uint16 => Datatype::Uint16,
        TensorElementType::Uint32 => Datatype::Uint32,
        TensorElementType::Uint64 => Datatype::Uint64,
        TensorElementType::Float16 => Datatype::Fp16,
        TensorElementType::Float32 => Datatype::Fp32,
        TensorElementType::Float64 => Datatype::Fp64,
        TensorElementType::String => Datatype::Bytes,
        _ => return None,
    })
}

/// A model.
struct Model {
    takes: Vec<String>,
    gives: Vec<String>,
    datatypes: Vec<Datatype>,
    /// One request at a time: the crate doesn't trust the library with more, and one uses all cores. Requests take turns
    /// before they come here, so nobody waits for this.
    session: Mutex<Session>,
}

impl Runnable for Model {
    fn run(&self, inputs: Vec<Tensor>, wanted: &[usize], stop: &Stop) -> Result<Vec<Tensor>, RunError> {
        let values = inputs.iter().map(value).collect::<Result<Vec<_>, _>>()?;
        let named: Vec<(&str, SessionInputValue<'_>)> = self.takes.iter().map(String::as_str).zip(values).collect();
        // All outputs are made: options that choose among them can't be shared with whoever ends the run.
        let options = Arc::new(RunOptions::new().map_err(|error| failed(&error))?);
        let ended = Arc::clone(&options);
        let _heeding = stop.heed(move || {
            if let Err(error) = ended.terminate() {
                tracing::debug!(error = said(&error), "a run can't be ended");
            }
        });
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = session.run_with_options(named, &*options).map_err(|error| failed(&error))?;
        let output = |place: &usize| {
            let name = &self.gives[*place];
            let value = outputs.get(name).ok_or_else(|| RunError::Failed(format!("there is no output {name:?}")))?;
            tensor_of(self.datatypes[*place], value)
        };
        wanted.iter().map(output).collect()
    }
}

/// What went wrong while a model ran: mostly inputs that it can't take, which no declared shape could tell.
fn failed(error: &ort::Error) -> RunError {
    let said = said(error);
    let refused = match error.code() {
        ort::ErrorCode::InvalidArgument | ort::ErrorCode::GenericFailure | ort::ErrorCode::RuntimeException => {
            !said.contains("bad_alloc") && !said.contains("Failed to allocate")
        }
        _ => false,
    };
    if refused { RunError::Refused(said) } else { RunError::Failed(said) }
}

/// An input as the library takes it: the tensor's own memory, but for strings.
fn value(tensor: &Tensor) -> Result<SessionInputValue<'_>, RunError> {
    fn view<T: Datum + PrimitiveTensorElementType>(tensor: &Tensor) -> Result<SessionInputValue<'_>, RunError> {
        let elements = tensor::elements::<T>(tensor).map_err(|failure| RunError::Failed(failure.message))?;
        let view = TensorRef::from_array_view((tensor.shape(), elements)).map_err(|error| failed(&error))?;
        Ok(view.into())
    }
    let datatype = Datatype::from_datum(tensor.datum_type());
    match datatype.ok_or_else(|| RunError::Failed(format!("an input is of type {:?}", tensor.datum_type())))? {
        Datatype::Bool => view::<bool>(tensor),
        Datatype::Int8 => view::<i8>(tensor),
        Datatype::Int16 => view::<i16>(tensor),
        Datatype::Int32 => view::<i32>(tensor),
        Datatype::Int64 => view::<i64>(tensor),
        Datatype::Uint8 => view::<u8>(tensor),
        Datatype::Uint16 => view::<u16>(tensor),
        Datatype::Uint32 => view::<u32>(tensor),
        Datatype::Uint64 => view::<u64>(tensor),
        Datatype::Fp16 => view::<f16>(tensor),
        Datatype::Fp32 => view::<f32>(tensor),
        Datatype::Fp64 => view::<f64>(tensor),
        Datatype::Bytes => {
            let texts = tensor::elements::<String>(tensor).map_err(|failure| RunError::Failed(failure.message))?;
            if texts.iter().any(|text| text.contains('\0')) {
                return Err(RunError::Refused(
                    "a string has a zero byte in it, which ends it for ONNX Runtime".to_owned(),
                ));
            }
            let value = ort::value::Tensor::from_string_array((tensor.shape(), texts));
            Ok(value.map_err(|error| failed(&error))?.into())
        }
    }
}

/// An output as clients get it.
fn tensor_of(datatype: Datatype, value: &DynValue) -> Result<Tensor, RunError> {
    fn copy<T: Datum + Debug + Copy + PrimitiveTensorElementType>(value: &DynValue) -> Result<Tensor, RunError> {
        let (shape, elements) = value.try_extract_tensor::<T>().map_err(|error| failed(&error))?;
        Tensor::from_shape(&lengths(shape)?, elements).map_err(|error| RunError::Failed(explain(&error)))
    }
    match datatype {
        Datatype::Bool => copy::<bool>(value),
        Datatype::Int8 => copy::<i8>(value),
        Datatype::Int16 => copy::<i16>(value),
        Datatype::Int32 => copy::<i32>(value),
        Datatype::Int64 => copy::<i64>(value),
        Datatype::Uint8 => copy::<u8>(value),
        Datatype::Uint16 => copy::<u16>(value),
        Datatype::Uint32 => copy::<u32>(value),
        Datatype::Uint64 => copy::<u64>(value),
        Datatype::Fp16 => copy::<f16>(value),
        Datatype::Fp32 => copy::<f32>(value),
        Datatype::Fp64 => copy::<f64>(value),
        Datatype::Bytes => {
            let (shape, texts) = value.try_extract_strings().map_err(|error| failed(&error))?;
            let broken = |failure: Failure| RunError::Failed(failure.message);
            let mut tensor = tensor::blank(datatype, &lengths(shape)?).map_err(broken)?;
            tensor::slice::<String>(&mut tensor).map_err(broken)?.clone_from_slice(&texts);
            Ok(tensor)
        }
    }
}

fn lengths(shape: &[i64]) -> Result<Vec<usize>, RunError> {
    let lengths = shape.iter().map(|length| usize::try_from(*length)).collect::<Result<_, _>>();
    lengths.map_err(|_| RunError::Failed(format!("an output has the shape {shape:?}")))
}
