//! The built-in inference server: ONNX models, served over the Open Inference Protocol V2 and its model
//! repository extension, REST and gRPC on the same service.
//!
//! The rule of this module: an answer depends on the request and on what is loaded, and on nothing else. No
//! lock is held while a model runs, no request makes the runtime allocate more than its own size warrants, and
//! no artifact takes the process down. It is one more inference server to the rest of Wharf: reached as a
//! [`forward::Upstream`](crate::forward::Upstream), in this process or through a socket with [`serve`].

mod datatype;
mod engine;
mod execute;
mod failure;
mod grpc;
mod json;
mod plan;
mod registry;
mod repository;
mod rest;
mod serve;
mod stop;
mod tensor;

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use http::header::CONTENT_TYPE;
use tonic::codec::CompressionEncoding;
use tower::Service as _;
use tracing::Instrument as _;

pub use self::{
    engine::{Library, Onnx},
    execute::Execution,
    serve::serve,
};
use self::{
    execute::Executor,
    failure::{Failure, Kind},
    plan::Plan,
    registry::{Listed, Registry},
    repository::Repository,
    stop::Stop,
};
use crate::{
    domain::memory,
    forward::{Body, Request, Response, Upstream, UpstreamError},
    rpc::proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    telemetry::trace::request_span,
};

/// The name that the server tells clients.
const SERVER: &str = "wharf-onnx";
/// The one version that each served model has: Wharf gives versions names of their own.
const VERSION: &str = "1";
/// What of the protocol's extensions is there.
const EXTENSIONS: [&str; 2] = ["model_repository", "binary_tensor_data"];

/// How a [`Runtime`] is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder that models are loaded from: `NAME/model.onnx` or `NAME/NUMBER/model.onnx`. It need not exist yet.
    pub repository: PathBuf,
    /// Where models are loaded and run.
    pub execution: Execution,
    /// The bounds that it keeps.
    pub limits: Limits,
}

/// The bounds of a [`Runtime`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest body of a request, and the longest message of a gRPC stream, in bytes. A longer one is
    /// refused before it is read.
    pub body_bytes: usize,
    /// How many inferences wait for their turn, and apart from them how many loads. What is over is refused.
    pub waiting: usize,
    /// How long an inference may take, from its first byte to its answer.
    pub inference: Duration,
    /// How long a load may take, waiting included.
    pub load: Duration,
}

impl Default for Limits {
    /// 64 MiB, 1024 waiting, a minute for an inference and ten for a load.
    fn default() -> Self {
        Self { body_bytes: 64 << 20, waiting: 1024, inference: Duration::from_secs(60), load: Duration::from_secs(600) }
    }
}

/// The built-in inference server. Nothing is loaded at first.
#[derive(Debug)]
pub struct Runtime {
    shared: Arc<Shared>,
    grpc: GrpcInferenceServiceServer<grpc::Service>,
}

impl Runtime {
    /// A server of the models in `options.repository`, run by tract.
    #[must_use]
    pub fn new(options: Options) -> Arc<Self> {
        Self::with(options, Onnx::tract())
    }

    /// A server of the models in `options.repository`, run by `onnx`.
    #[must_use]
    pub fn with(options: Options, onnx: Onnx) -> Arc<Self> {
        let Options { repository, execution, limits } = options;
        let shared = Arc::new(Shared {
            onnx,
            repository: Arc::new(Repository::new(repository)),
            registry: Arc::default(),
            inferences: Executor::new(execution, limits.waiting),
            loads: Executor::new(execution, limits.waiting),
            listings: Executor::new(execution, limits.waiting),
            limits,
        });
        let grpc = GrpcInferenceServiceServer::new(grpc::Service::new(Arc::clone(&shared)))
            .max_decoding_message_size(limits.body_bytes)
            .max_encoding_message_size(usize::MAX)
            .accept_compressed(CompressionEncoding::Gzip);
        Arc::new(Self { shared, grpc })
    }

    /// The size of the files that the loaded model `served_name` was read from: the least that it takes in
    /// memory. `None` when it is not loaded.
    #[must_use]
    pub fn artifact_bytes(&self, served_name: &str) -> Option<memory::Bytes> {
        self.shared.registry.get(served_name).ok().map(|plan| memory::Bytes(plan.artifact_bytes))
    }
}

impl Upstream for Runtime {
    /// Never fails: every refusal is a response.
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        let span = request_span("runtime", request.headers());
        if is_grpc(&request) {
            let mut grpc = self.grpc.clone();
            return async move {
                let response = grpc.call(request).await.unwrap_or_else(|never| match never {});
                Ok(response.map(Body::new))
            }
            .instrument(span)
            .boxed();
        }
        rest::answer(&self.shared, request).map(Ok).instrument(span).boxed()
    }
}

fn is_grpc(request: &Request) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE).map(http::HeaderValue::as_bytes);
    content_type
        .and_then(|value| value.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// What both protocols speak to.
#[derive(Debug)]
struct Shared {
    onnx: Onnx,
    repository: Arc<Repository>,
    registry: Arc<Registry>,
    inferences: Executor,
    loads: Executor,
    listings: Executor,
    limits: Limits,
}

impl Shared {
    /// The plan of version `version` of model `name`; no version means the one there is.
    fn plan(&self, name: &str, version: &str) -> Result<Arc<Plan>, Failure> {
        let plan = self.registry.get(name)?;
        if version.is_empty() || version == VERSION {
            return Ok(plan);
        }
        let version = failure::clip(version, 32);
        Err(Failure::new(
            Kind::NotFound,
            format!("model {name:?} has no version {version:?}; its only version here is {VERSION:?}"),
        ))
    }

    /// Does `job` with a plan, in its turn. It is told to stop when its time is over, or its caller is gone.
    async fn infer<T: Send + 'static>(
        &self,
        plan: Arc<Plan>,
        job: impl FnOnce(&Plan, &Stop) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (stop, of) = (Stop::default(), Arc::clone(&plan));
        let _caller = stop.caller();
        let run = self.inferences.run_in(plan.turn.as_ref(), move || {
            if stop.said() {
                return Err(Failure::new(Kind::Deadline, "nobody waits for the inference any more"));
            }
            job(&of, &stop)
        });
        deadline(self.limits.inference, "the inference", run).await
    }

    /// Loads model `name` from disk, again if it is loaded already: the old plan serves until the new one does.
    async fn load(&self, name: &str) -> Result<(), Failure> {
        repository::check(name)?;
        let loading = self.registry.begin(name);
        let (name, repository, engine) = (name.to_owned(), Arc::clone(&self.repository), Arc::clone(&self.onnx.engine));
        let queue = self.loads.queue();
        let run = self.loads.run(move || match repository.find(&name) {
            // Not remembered: there would be no end of names that are not there.
            Err(failure) if failure.kind == Kind::NotFound => Err(failure),
            found => loading.finish(found.and_then(|file| Plan::load(&*engine, &name, &file, &queue))),
        });
        deadline(self.limits.load, "the load", run).await
    }

    fn unload(&self, name: &str) -> Result<(), Failure> {
        self.registry.unload(name)
    }

    /// What is on disk and what is loaded, by name; only what is loaded where `ready` is asked for.
    async fn index(&self, ready: bool) -> Result<Vec<Listed>, Failure> {
        let repository = Arc::clone(&self.repository);
        let run = self.listings.run(move || repository.names());
        let names = deadline(self.limits.inference, "listing the repository", run).await?;
        let mut listed = self.registry.index(names);
        listed.retain(|model| !ready || model.state == registry::READY);
        Ok(listed)
    }
}

/// Gives `work` up after `limit`.
async fn deadline<T>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let seconds = limit.as_secs_f64();
        Err(Failure::new(Kind::Deadline, format!("{what} took longer than the {seconds} s that it may take")))
    })
}
