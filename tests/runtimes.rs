//! The promise: whichever inference server is behind it, an adapter does the same thing, and a user of Wharf sees the
//! same thing. The built-in runtime, MLServer and Triton, the real programs, each pass one and the same suite.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so, and one against a real process has the real clock"
)]

mod process;
mod servers;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, future::join_all};
use http_body_util::BodyExt as _;
use process::{
    Home, SOON, Spec, artifact,
    load::{Clients, FLOWER, Load, Protocol, Question, in_turns},
    said,
};
use servers::{Server, TURN, entry, trained, triton};
use tonic::{Code, transport::Channel};
use wharf::{
    agent::runtimes::{Listing, Runtime, Wanted, adapter},
    domain::{
        copy::{Failure, FailureClass},
        spec::ModelSpec,
        version::Version,
    },
    forward::{Body, Upstream},
    rpc::proto::inference::{
        InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelReadyRequest,
        ModelStreamInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::InferInputTensor,
    },
    settings::registry::Runtime as Kind,
};

const MIB: u64 = 1 << 20;

/// The artifacts that a server is tried with: two that answer differently, and one that can't be loaded.
struct Artifacts {
    requirement: &'static str,
    first: (PathBuf, Option<u32>),
    second: (PathBuf, Option<u32>),
    broken: PathBuf,
}

fn artifacts(kind: Kind) -> Artifacts {
    let onnx = |name: &str| (PathBuf::from(artifact(name)), None);
    match kind {
        Kind::Builtin | Kind::Oip | Kind::Process => Artifacts {
            requirement: "onnx",
            first: onnx("iris-1"),
            second: onnx("iris-2"),
            broken: artifact("broken").into(),
        },
        Kind::MlServer => Artifacts {
            requirement: "sklearn",
            first: (trained("sklearn-iris-1"), None),
            second: (trained("sklearn-iris-2"), None),
            broken: trained("sklearn-broken"),
        },
        Kind::Triton => Artifacts {
            requirement: "triton",
            first: (triton("triton-iris"), Some(1)),
            second: (triton("triton-iris"), None),
            broken: triton("triton-broken"),
        },
    }
}

// === The adapter, on the server itself ===

struct Bench {
    server: Server,
    upstream: Arc<dyn Upstream>,
    adapter: Arc<dyn Runtime>,
    artifacts: Artifacts,
    _home: tempfile::TempDir,
}

impl Bench {
    async fn new(kind: Kind) -> Self {
        let home = tempfile::tempdir().unwrap();
        let server = Server::start(kind, &home.path().join("repository"), home.path()).await;
        let upstream = server.upstream();
        // Nobody says which server it is, so the adapter finds that out with its first question.
        let asked = if kind == Kind::Builtin { Some(kind) } else { None };
        let adapter = adapter(asked, Arc::clone(&upstream), 1);
        assert_eq!(adapter.index().await.unwrap(), []);
        assert_eq!(adapter.kind(), kind);
        Self { server, upstream, adapter, artifacts: artifacts(kind), _home: home }
    }

    /// Puts the folder of a copy together as an agent does.
    fn place(&self, from: &Path, artifact_version: Option<u32>, served: &str) {
        let mut listing = Listing::default();
        let mut folders = vec![from.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(from).unwrap().to_str().unwrap().to_owned();
                if self.adapter.reads(&name) {
                    listing.contents.insert(name.clone(), std::fs::read(&path).unwrap());
                }
                listing.files.insert(name);
            }
        }
        let requirements = vec![self.artifacts.requirement.to_owned()];
        let spec = ModelSpec { requirements, artifact_version, ..ModelSpec::default() };
        let wanted = Wanted { served, version: Version(1), spec: &spec };
        let layout = self.adapter.layout(&listing, &wanted).unwrap();
        let target = |path: &str| {
            let target = self.server.repository.join(served).join(path);
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            target
        };
        for (to, source) in &layout.links {
            std::fs::copy(from.join(source), target(to)).unwrap();
        }
        for (to, contents) in &layout.written {
            std::fs::write(target(to), contents).unwrap();
        }
    }

    fn place_first(&self, served: &str) {
        self.place(&self.artifacts.first.0, self.artifacts.first.1, served);
    }

    async fn load(&self, served: &str) -> Result<(), Failure> {
        self.adapter.load(served).await
    }

    async fn is_ready(&self, served: &str) -> bool {
        self.adapter.ready(served).await.unwrap()
    }

    /// The names of what takes memory; all of it is ready.
    async fn loaded(&self) -> BTreeSet<String> {
        let index = self.adapter.index().await.unwrap();
        assert!(index.iter().all(|one| one.ready), "{index:?}");
        index.into_iter().map(|one| one.name).collect()
    }

    /// The class that a model chooses, or the status of the refusal.
    async fn ask(&self, served: &str) -> Result<i64, u16> {
        let tensor = serde_json::json!({"name": "X", "shape": [1, 4], "datatype": "FP32", "data": FLOWER});
        let request = http::Request::post(format!("/v2/models/{served}/infer"))
            .header("content-type", "application/json")
            .body(Body::from(serde_json::json!({"inputs": [tensor]}).to_string()))
            .unwrap();
        let response = self.upstream.call(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        if !status.is_success() {
            return Err(status.as_u16());
        }
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(json["model_name"], served);
        let outputs = json["outputs"].as_array().unwrap();
        let label = outputs.iter().find(|output| output["name"] == "label" || output["name"] == "predict").unwrap();
        Ok(label["data"][0].as_i64().unwrap())
    }

    async fn until_children(&self, count: usize) {
        let deadline = Instant::now() + SOON;
        while self.server.children() != count {
            assert!(Instant::now() < deadline, "{} processes, not {count}", self.server.children());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn status_of(&self, path: &str) -> u16 {
        let request = http::Request::get(path).body(Body::empty()).unwrap();
        self.upstream.call(request).await.unwrap().status().as_u16()
    }
}

async fn conforms(kind: Kind) {
    let _turn = TURN.lock().await;
    let bench = Bench::new(kind).await;
    let idle = bench.server.children();

    // What nobody has.
    assert!(!bench.is_ready("nobody_1").await);
    bench.load("nobody_1").await.expect_err("there is no such folder");
    bench.adapter.unload("nobody_1").await.expect("what is not there is unloaded");

    // Loaded, and loaded again.
    bench.place_first("iris_1");
    assert!(!bench.is_ready("iris_1").await);
    assert_eq!(bench.loaded().await, BTreeSet::new(), "a folder is not in memory");
    bench.load("iris_1").await.unwrap();
    assert!(bench.is_ready("iris_1").await);
    bench.load("iris_1").await.expect("what is loaded can be loaded");
    assert!(bench.is_ready("iris_1").await);
    assert_eq!(bench.ask("iris_1").await, Ok(0));
    assert_eq!(bench.status_of("/v2/models/iris_1").await, 200);
    drop(bench.adapter.memory("iris_1").await.expect("it says what it takes, or that it does not know"));

    // Another version beside it.
    bench.place(&bench.artifacts.second.0, bench.artifacts.second.1, "iris_2");
    bench.load("iris_2").await.unwrap();
    assert_eq!((bench.ask("iris_1").await, bench.ask("iris_2").await), (Ok(0), Ok(1)));
    assert_eq!(bench.loaded().await, ["iris_1", "iris_2"].map(str::to_owned).into());

    // One that is broken harms no other.
    bench.place(&bench.artifacts.broken, None, "broken_1");
    let failure = bench.load("broken_1").await.expect_err("it is broken");
    assert_eq!(failure.class, FailureClass::Artifact, "{}", failure.message);
    assert!(!bench.is_ready("broken_1").await);
    bench.adapter.unload("broken_1").await.expect("what failed to load is unloaded");
    assert_eq!(bench.loaded().await, ["iris_1", "iris_2"].map(str::to_owned).into());
    assert_eq!(bench.ask("iris_1").await, Ok(0));

    // Unloaded, and unloaded again: it is out of memory when the call is over.
    if kind == Kind::Triton {
        // A model's process is its memory. That of the broken one ends when Triton finds the time.
        bench.until_children(idle + 2).await;
    }
    bench.adapter.unload("iris_1").await.unwrap();
    assert_eq!(bench.loaded().await, ["iris_2".to_owned()].into());
    if kind == Kind::Triton {
        assert_eq!(bench.server.children(), idle + 1);
    }
    assert!(!bench.is_ready("iris_1").await);
    bench.ask("iris_1").await.expect_err("it is unloaded");
    bench.adapter.unload("iris_1").await.expect("what is unloaded can be unloaded");
    bench.load("iris_1").await.expect("what was unloaded can be loaded");
    assert_eq!(bench.ask("iris_1").await, Ok(0));

    // Every character that a name may have, and as many as it may have.
    let longest = format!("{}_1", "m".repeat(253));
    let names = ["a_1", "0_4294967295", "a-b--c9_12", "true_1", "null_2", longest.as_str()];
    for name in names {
        bench.place_first(name);
        bench.load(name).await.unwrap();
        assert_eq!((bench.is_ready(name).await, bench.ask(name).await), (true, Ok(0)), "{name}");
    }
    assert_eq!(bench.loaded().await.len(), names.len() + 2);

    // Many, several at a time.
    let many: Vec<String> = (0..20).map(|number| format!("many-{number}_1")).collect();
    many.iter().for_each(|name| bench.place_first(name));
    let loads = futures::stream::iter(&many).map(|name| bench.load(name)).buffer_unordered(4);
    loads.for_each(|loaded| async { loaded.unwrap() }).await;
    for name in &many {
        assert_eq!((bench.is_ready(name).await, bench.ask(name).await), (true, Ok(0)), "{name}");
    }
    let all = bench.loaded().await;
    join_all(all.iter().map(|name| bench.adapter.unload(name))).await.into_iter().for_each(Result::unwrap);
    assert_eq!(bench.adapter.index().await.unwrap(), []);
    if kind == Kind::Triton {
        assert_eq!(bench.server.children(), idle);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_runtime_conforms() {
    conforms(Kind::Builtin).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mlserver_conforms() {
    conforms(Kind::MlServer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn triton_conforms() {
    conforms(Kind::Triton).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_on_triton_is_ready_while_another_loads() {
    let _turn = TURN.lock().await;
    let bench = Bench::new(Kind::Triton).await;
    bench.place_first("iris_1");
    bench.place(&triton("triton-slow"), None, "slow_1");
    bench.load("iris_1").await.unwrap();
    let asked = async {
        let deadline = Instant::now() + SOON;
        while bench.status_of("/v2/health/ready").await == 200 {
            assert!(Instant::now() < deadline, "Triton is ready while it loads: nothing is proved");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (bench.is_ready("iris_1").await, bench.is_ready("slow_1").await, bench.ask("iris_1").await)
    };
    let (loaded, asked) = tokio::join!(bench.load("slow_1"), asked);
    loaded.unwrap();
    assert_eq!(asked, (true, false, Ok(0)));
    // An unload in the middle of it is over when the model is gone.
    bench.adapter.unload("slow_1").await.unwrap();
    assert_eq!(bench.loaded().await, ["iris_1".to_owned()].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn mlserver_gets_the_settings_that_an_artifact_brings() {
    let _turn = TURN.lock().await;
    let bench = Bench::new(Kind::MlServer).await;
    bench.place(&trained("sklearn-settings"), None, "mine_1");
    bench.load("mine_1").await.unwrap();
    assert_eq!(bench.ask("mine_1").await, Ok(0));
    // What only MLServer understands has reached it.
    let request = http::Request::get("/v2/models/mine_1").body(Body::empty()).unwrap();
    let body = bench.upstream.call(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    let metadata: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((&metadata["platform"], &metadata["outputs"][0]["name"]), (&"scikit-learn".into(), &"predict".into()));
}

// === Wharf, in front of the server ===

struct Fleet {
    home: Home,
    server: Server,
    artifacts: Artifacts,
}

impl Fleet {
    /// One replica of a server called `iris-server`, on the real program.
    async fn new(kind: Kind, memory: &str, overcommit_percent: u32) -> Self {
        let home = Home::new("");
        let repository = home.path().join("agent/iris-server-0/repository");
        let server = Server::start(kind, &repository, home.path()).await;
        home.write_registry(&entry("iris-server", &server, memory, overcommit_percent));
        Self { home, server, artifacts: artifacts(kind) }
    }

    fn spec(&self, name: &str, second: bool, memory: u64) -> Spec {
        let (uri, version) = if second { &self.artifacts.second } else { &self.artifacts.first };
        Spec { artifact_version: *version, ..Spec::at(name, uri, self.artifacts.requirement, memory) }
    }

    /// The names of what the program itself says that it has in memory. The built-in runtime is Wharf's own process,
    /// which has no repository API of its own to ask.
    async fn in_memory(&self) -> Option<BTreeSet<String>> {
        let kind = self.server.kind;
        if kind == Kind::Builtin {
            return None;
        }
        let index = adapter(Some(kind), self.server.upstream(), 1).index().await.unwrap();
        Some(index.into_iter().map(|one| one.name).collect())
    }
}

async fn grpc(gateway: &str) -> GrpcInferenceServiceClient<Channel> {
    let channel = Channel::from_shared(format!("http://{gateway}")).unwrap().connect().await.unwrap();
    GrpcInferenceServiceClient::new(channel)
}

/// A request about [`FLOWER`], its tensor as bytes or as numbers.
fn question(model: &str, raw: bool) -> ModelInferRequest {
    let (contents, raw_input_contents) = if raw {
        (None, vec![Bytes::from(FLOWER.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())])
    } else {
        (Some(InferTensorContents { fp32_contents: FLOWER.to_vec(), ..InferTensorContents::default() }), Vec::new())
    };
    let input = InferInputTensor {
        name: "X".to_owned(),
        datatype: "FP32".to_owned(),
        shape: vec![1, 4],
        contents,
        ..InferInputTensor::default()
    };
    ModelInferRequest { model_name: model.to_owned(), inputs: vec![input], raw_input_contents, ..Default::default() }
}

fn label(response: &ModelInferResponse) -> i64 {
    let place = response.outputs.iter().position(|output| matches!(output.name.as_str(), "label" | "predict")).unwrap();
    match response.raw_output_contents.get(place) {
        Some(raw) => i64::from_le_bytes(raw[..8].try_into().unwrap()),
        None => response.outputs[place].contents.as_ref().unwrap().int64_contents[0],
    }
}

/// Sends `questions` over one stream; the answers' form differs by server.
async fn stream<R>(gateway: &str, questions: Vec<ModelInferRequest>) -> Vec<R>
where
    R: prost::Message + Default + 'static,
{
    let channel = Channel::from_shared(format!("http://{gateway}")).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let mut request = tonic::Request::new(tokio_stream::iter(questions.clone()));
    request.metadata_mut().insert("seldon-model", questions[0].model_name.parse().unwrap());
    let path = http::uri::PathAndQuery::from_static("/inference.GRPCInferenceService/ModelStreamInfer");
    let codec = tonic_prost::ProstCodec::<ModelInferRequest, R>::default();
    let answers = client.streaming(request, path, codec).await.unwrap().into_inner();
    answers.map(Result::unwrap).collect().await
}

async fn serves(kind: Kind) {
    let _turn = TURN.lock().await;
    let fleet = Fleet::new(kind, "64Mi", 0).await;
    let wharf = fleet.home.up().await;
    let mut client = grpc(&wharf.gateway).await;

    // Nothing there yet.
    let unknown = client.model_infer(question("iris", true)).await.expect_err("nobody knows it");
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");

    // One model: REST and gRPC, numbers and bytes, alone and in a stream, readiness and metadata.
    wharf.submit(&fleet.spec("iris", false, MIB)).await.unwrap();
    wharf.until_serving("iris", 1).await;
    let clients = Clients::connect(&wharf.gateway).await;
    let rest = clients.ask(0, "iris", Protocol::Rest).await.unwrap();
    assert_eq!((rest.model.as_str(), rest.label), ("iris_1", 0));
    for raw in [false, true] {
        let answer = client.model_infer(question("iris", raw)).await.unwrap().into_inner();
        assert_eq!((answer.model_name.as_str(), label(&answer)), ("iris_1", 0), "raw: {raw}");
        if raw {
            assert!(!answer.raw_output_contents.is_empty(), "bytes are answered with bytes");
        }
    }
    let ready = ModelReadyRequest { name: "iris".to_owned(), version: String::new() };
    assert!(client.model_ready(ready).await.unwrap().into_inner().ready);
    let metadata = ModelMetadataRequest { name: "iris".to_owned(), version: String::new() };
    assert_eq!(client.model_metadata(metadata).await.unwrap().into_inner().name, "iris_1");
    assert!(process::load::get(&wharf.gateway, "/v2/models/iris").await.contains("iris_1"));
    let questions = vec![question("iris", true), question("iris", true), question("iris", true)];
    let labels: Vec<i64> = if kind == Kind::MlServer {
        stream::<ModelInferResponse>(&wharf.gateway, questions).await.iter().map(label).collect()
    } else {
        let answers = stream::<ModelStreamInferResponse>(&wharf.gateway, questions).await;
        answers.iter().map(|answer| label(answer.infer_response.as_ref().unwrap())).collect()
    };
    // MLServer's stream takes one question: asked directly it gives as many answers.
    let expected = if kind == Kind::MlServer {
        let questions = vec![question("iris_1", true), question("iris_1", true), question("iris_1", true)];
        stream::<ModelInferResponse>(&fleet.server.grpc, questions).await.len()
    } else {
        3
    };
    assert!(expected > 0 && labels == vec![0; expected], "{expected} answers were expected: {labels:?}");

    // Its next version is another one, and the first leaves memory.
    wharf.submit(&fleet.spec("iris", true, MIB)).await.unwrap();
    wharf.until_alone("iris", 2).await;
    for protocol in [Protocol::Rest, Protocol::Grpc] {
        let answer = clients.ask(0, "iris", protocol).await.unwrap();
        assert_eq!((answer.model.as_str(), answer.label), ("iris_2", 1));
    }
    if let Some(loaded) = fleet.in_memory().await {
        assert_eq!(loaded, ["iris_2".to_owned()].into());
    }

    // A broken one says why.
    let broken = Spec::at("broken", &fleet.artifacts.broken, fleet.artifacts.requirement, MIB);
    wharf.submit(&broken).await.unwrap();
    let view = wharf.until("broken", "failed", |view| view.reason.contains("artifact failure")).await;
    println!("{}: {}", kind.name(), view.reason);

    // An agent that dies and comes back finds what is loaded, and loads nothing.
    wharf.kill();
    let wharf = fleet.home.up().await;
    wharf.until_serving("iris", 2).await;
    let answer = Clients::connect(&wharf.gateway).await.ask(0, "iris", Protocol::Rest).await.unwrap();
    assert_eq!((answer.model.as_str(), answer.label), ("iris_2", 1));
    if kind != Kind::Builtin {
        let loads = wharf.metric("seldon_load_model_counter").await.unwrap_or(0.0);
        assert!(loads < 1.0, "it was loaded {loads} times again");
    }

    // What is deleted leaves nothing behind.
    wharf.unload("iris").await.unwrap();
    wharf.unload("broken").await.unwrap();
    wharf.until("iris", "gone", |view| view.state == "Terminated").await;
    wharf.until("broken", "gone", |view| view.state == "Terminated").await;
    if let Some(loaded) = fleet.in_memory().await {
        assert_eq!(loaded, BTreeSet::new());
    }
    let left: Vec<_> = std::fs::read_dir(&fleet.server.repository).unwrap().map(Result::unwrap).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_served_by_the_built_in_runtime() {
    serves(Kind::Builtin).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_served_by_mlserver() {
    serves(Kind::MlServer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_served_by_triton() {
    serves(Kind::Triton).await;
}

/// Three models where memory holds two: each request for the third brings it back, and none fails.
async fn packs(kind: Kind) {
    let _turn = TURN.lock().await;
    let fleet = Fleet::new(kind, "2Mi", 50).await;
    let wharf = fleet.home.up().await;
    for number in 0..3 {
        wharf.submit(&fleet.spec(&format!("m{number}"), number == 1, MIB)).await.unwrap();
        wharf.until_serving(&format!("m{number}"), 1).await;
    }
    let load = Load::start(&wharf.gateway, 10, |number| {
        // Each model for a while, so that every change of models takes an eviction and a reload.
        let model = number / 6 % 3;
        let check = move |answer: &process::load::Answer| {
            let right = answer.model == format!("m{model}_1") && answer.label == i64::from(model == 1);
            if right { Ok(()) } else { Err(format!("m{model}_1 was asked")) }
        };
        Question { model: format!("m{model}"), protocol: in_turns(number), check: Box::new(check) }
    })
    .await;
    load.more(90).await;
    let account = load.stop().await;
    println!("{}: {}", kind.name(), account.line());
    account.assert_clean(&wharf);
    let evicted = wharf.metric("seldon_cache_evict_count").await.unwrap();
    assert!(evicted >= 5.0, "{evicted} evictions");
    if let Some(loaded) = fleet.in_memory().await {
        assert_eq!(loaded.len(), 2, "{loaded:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_runtime_is_packed_under_traffic() {
    packs(Kind::Builtin).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mlserver_is_packed_under_traffic() {
    packs(Kind::MlServer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn triton_is_packed_under_traffic() {
    packs(Kind::Triton).await;
}

/// MLServer forgets in its index what has no folder any more, and still holds it in memory.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_ordered_leaves_mlserver_with_its_folder() {
    let _turn = TURN.lock().await;
    let fleet = Fleet::new(Kind::MlServer, "64Mi", 0).await;
    let folder = fleet.server.repository.join("foreign");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(fleet.artifacts.first.0.join("iris.joblib"), folder.join("model.joblib")).unwrap();
    let settings = r#"{"name": "foreign", "implementation": "mlserver_sklearn.SKLearnModel"}"#;
    std::fs::write(folder.join("model-settings.json"), settings).unwrap();
    let mlserver = adapter(Some(Kind::MlServer), fleet.server.upstream(), 1);
    mlserver.load("foreign").await.unwrap();
    assert!(mlserver.ready("foreign").await.unwrap());
    let wharf = fleet.home.up().await;
    wharf.submit(&fleet.spec("iris", false, MIB)).await.unwrap();
    wharf.until_serving("iris", 1).await;
    assert!(!folder.exists());
    assert!(!mlserver.ready("foreign").await.unwrap(), "it is in memory, and nobody counts it");
}

#[tokio::test(flavor = "multi_thread")]
async fn eleven_models_are_served_where_memory_holds_ten() {
    const MODELS: u64 = 11;
    let _turn = TURN.lock().await;
    let fleet = Fleet::new(Kind::MlServer, "10M", 10).await;
    let wharf = fleet.home.up().await;
    for number in 0..MODELS {
        wharf.submit(&fleet.spec(&format!("iris-{number}"), false, 1_000_000)).await.unwrap();
    }
    for number in 0..MODELS {
        wharf.until_serving(&format!("iris-{number}"), 1).await;
    }
    let clients = Clients::connect(&wharf.gateway).await;
    let asked = (0..10 * MODELS).map(|number| {
        let (clients, protocol) = (&clients, in_turns(number / MODELS));
        async move {
            let name = format!("iris-{}", number % MODELS);
            let answer =
                clients.ask(number, &name, protocol).await.map_err(|refused| format!("{name}: {refused:?}"))?;
            let right = answer.model == format!("{name}_1") && answer.label == 0;
            if right { Ok(protocol) } else { Err(format!("{name} was asked: {answer:?}")) }
        }
    });
    let answers: Vec<Result<Protocol, String>> = join_all(asked).await;
    let failed: Vec<&String> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}\n{}", failed.len(), answers.len(), wharf.tail());
    // A model's answer may be out before the eviction that made room for it was counted.
    wharf
        .until_servers("one evicted copy", |servers| {
            let replica = &servers[0].replicas[0];
            (replica.copies, replica.resident) == (11, 10_000_000)
        })
        .await;
    assert_eq!(fleet.in_memory().await.unwrap().len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_goes_from_scikit_learn_to_xgboost_without_a_failed_request() {
    let _turn = TURN.lock().await;
    let fleet = Fleet::new(Kind::MlServer, "64Mi", 0).await;
    let wharf = fleet.home.up().await;
    wharf.submit(&fleet.spec("iris", false, MIB)).await.unwrap();
    wharf.until_serving("iris", 1).await;
    let load = Load::start(&wharf.gateway, 20, |number| {
        let check = |answer: &process::load::Answer| match (answer.model.as_str(), answer.label) {
            ("iris_1", 0) | ("iris_2", 1) => Ok(()),
            _ => Err("version 1 says 0, version 2 says 1".to_owned()),
        };
        Question { model: "iris".to_owned(), protocol: in_turns(number), check: Box::new(check) }
    })
    .await;
    load.more(40).await;
    load.marks.mark("the rollout");
    wharf.submit(&Spec::at("iris", &trained("xgboost-iris-2"), "xgboost", MIB)).await.unwrap();
    wharf.until_alone("iris", 2).await;
    load.more(40).await;
    let account = load.stop().await;
    println!("scikit-learn to xgboost: {}; {:?}", account.line(), account.by_version);
    account.assert_clean(&wharf);
    assert!(account.by_version.len() == 2, "both versions answered: {:?}", account.by_version);
}

/// `wharf server probe`, against the real servers: the entry that it prints is one that works.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_finds_out_which_server_it_is() {
    let _turn = TURN.lock().await;
    for kind in [Kind::Builtin, Kind::MlServer, Kind::Triton] {
        let bench = Bench::new(kind).await;
        bench.place_first("iris_1");
        let (http, grpc) = (format!("http://{}", bench.server.http), format!("http://{}", bench.server.grpc));
        let command = probe(&[&http, "--grpc", &grpc, "--model", "iris_1"]);
        let output = tokio::task::spawn_blocking(command).await.unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        println!("{text}");
        let registry = wharf::settings::registry::Registry::parse(&text, "probed").unwrap();
        let expected = if kind == Kind::Builtin { Kind::Oip } else { kind };
        assert_eq!(registry.servers[0].runtime, expected);
        let line =
            |start: &str| text.lines().find(|line| line.contains(start)).unwrap_or_else(|| panic!("{start}: {text}"));
        assert_eq!(line("its index").contains("with a body"), kind == Kind::MlServer);
        let ready = if kind == Kind::Triton { "ready 400" } else { "ready 404" };
        assert!(line("not there").contains(ready), "{text}");
        assert_eq!(line("its unload answered").contains("after that"), kind == Kind::Triton, "{text}");
        assert_eq!(bench.adapter.index().await.unwrap(), [], "nothing is left loaded");
    }
}

fn probe(args: &[&str]) -> impl FnOnce() -> std::process::Output + Send + 'static {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.args(["server", "probe"]).args(args);
    move || command.output().unwrap()
}
