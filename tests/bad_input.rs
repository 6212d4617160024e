//! What nobody should send, sent to each port of a real process: it answers with what is wrong, changes nothing,
//! keeps nothing, and goes on serving.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops where it fails, waits in real time, and says what it saw"
)]

#[path = "bad_input/connections.rs"]
mod connections;
#[path = "clients/raw.rs"]
mod raw;
#[path = "bad_input/sessions.rs"]
mod sessions;
#[path = "clients/up.rs"]
mod up;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use http_body_util::Full;
use raw::{Came, Dice, exchange, framed, grpc, http2};
use tokio::time::sleep;
use tonic::{Code, Status, transport::Channel};
use up::{SOON, Up, models, said};
use wharf::rpc::proto::{
    scheduler::{self as seldon, scheduler_client::SchedulerClient},
    wharf::{self as wire, wharf_client::WharfClient},
};

/// Memory that bad input may cost for good: what allocators keep, in MiB.
const KEPT: u64 = 96;

/// A process that serves one model, and what is to be the same afterwards.
struct Tried {
    up: Up,
    models: String,
    inside: serde_json::Value,
    files: usize,
    resident: u64,
    journal: Vec<u8>,
}

impl Tried {
    fn start(settings: &[(&str, &str)]) -> Self {
        // A scheduler that starts waits one lease for gateways of the one before it.
        let settings = [&[("scheduler.gateway_lease", "1s")], settings].concat();
        let up = Up::start(&settings);
        up.load("iris", &models().join("iris-1"));
        infer(&up);
        let mut tried = Self {
            models: up.says(&["model", "list", "-o", "json"]),
            inside: serde_json::Value::Null,
            files: 0,
            resident: 0,
            journal: Vec::new(),
            up,
        };
        // Until every commit and acknowledgement of the load is done.
        let deadline = Instant::now() + SOON;
        loop {
            let inside = tried.inside();
            let quiet = inside["router"]["unsettled"] == 0 && inside["journal"]["waiting"] == 0;
            let (same, journal) = (tried.inside == inside, std::fs::read(tried.journal_path()).unwrap());
            if quiet && same && tried.journal == journal && tried.files == tried.up.files() {
                break;
            }
            assert!(Instant::now() < deadline, "it does not come to rest: {inside:#}");
            (tried.inside, tried.journal, tried.files) = (inside, journal, tried.up.files());
            std::thread::sleep(Duration::from_millis(100));
        }
        tried.resident = tried.up.resident();
        tried
    }

    fn journal_path(&self) -> PathBuf {
        self.up.path().join("scheduler/journal.redb")
    }

    fn inside(&self) -> serde_json::Value {
        serde_json::from_str(&self.up.says(&["inspect"])).unwrap()
    }

    /// Fails unless all is as it was: the process, its models, its actors, its journal, its files, its memory.
    async fn unharmed(mut self, what: &str) {
        self.up.assert_alive();
        infer(&self.up);
        assert_eq!(self.up.says(&["model", "list", "-o", "json"]), self.models, "{what}: models");
        let deadline = Instant::now() + SOON;
        loop {
            let (inside, files) = (self.inside(), self.up.files());
            if inside == self.inside && files <= self.files {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{what} left something behind: {files} files, {} before; inside: {inside:#}\nbefore: {:#}\n{}",
                self.files,
                self.inside,
                self.up.tail()
            );
            // Lets the clients of this test close what they have dropped, too.
            sleep(Duration::from_millis(100)).await;
        }
        assert!(self.journal == std::fs::read(self.journal_path()).unwrap(), "{what}: the journal is another");
        let resident = self.up.resident();
        assert!(resident <= self.resident + KEPT, "{what}: {resident} MiB, {} before", self.resident);
        self.up.assert_alive();
    }

    /// Every port, with a name for messages.
    fn ports(&self) -> [(&'static str, &str); 4] {
        let up = &self.up;
        [("API", &up.api), ("agents", &up.agents), ("gateway", &up.gateway), ("page", &up.page)]
    }
}

const FLOWER: &str = r#"{"inputs":[{"name":"X","shape":[1,4],"datatype":"FP32","data":[5.1,3.5,1.4,0.2]}]}"#;

fn infer(up: &Up) {
    let answer = up.says(&["model", "infer", "iris", FLOWER]);
    assert!(answer.contains("label"), "{answer}");
}

async fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, what: &str) -> String {
    let status = answer.expect_err(what);
    assert_eq!(status.code(), code, "{what}: {status:?}");
    assert!(!status.message().is_empty(), "{what}: no reason");
    status.message().to_owned()
}

const METHODS: [(&str, &str); 7] = [
    ("API", "/seldon.mlops.scheduler.Scheduler/LoadModel"),
    ("API", "/seldon.mlops.scheduler.Scheduler/SubscribeModelStatus"),
    ("API", "/wharf.v1.Wharf/SubmitModel"),
    ("agents", "/wharf.agent.v1.AgentHub/Session"),
    ("agents", "/wharf.routes.v1.Routes/Watch"),
    ("gateway", "/inference.GRPCInferenceService/ModelInfer"),
    ("gateway", "/inference.GRPCInferenceService/ModelStreamInfer"),
];

#[tokio::test]
async fn malformed_grpc() {
    let tried = Tried::start(&[]);
    let bodies: [(&str, Vec<u8>); 7] = [
        ("no protobuf", framed(&[0xff; 40])),
        ("a field that ends too early", framed(&[0x0a, 0x7f, b'x'])),
        ("a message that ends too early", framed(&[0; 100])[..20].to_vec()),
        ("4 GiB announced", [&[0, 0xff, 0xff, 0xff, 0xff][..], &[0; 100]].concat()),
        ("compressed by nothing", [&[1, 0, 0, 0, 4][..], &[1, 2, 3, 4]].concat()),
        ("an unknown flag", [&[7, 0, 0, 0, 4][..], &[1, 2, 3, 4]].concat()),
        ("half a frame", vec![0, 0]),
    ];
    for (port, path) in METHODS {
        let address = tried.ports().into_iter().find(|(name, _)| *name == port).unwrap().1;
        for (what, body) in &bodies {
            let answer = http2(address, grpc(address, path, body.clone())).await;
            assert!(answer.refuses(), "{path}: {what}: {answer:?}");
            assert!(!answer.message.is_empty(), "{path}: {what}: no reason: {answer:?}");
        }
        let answer = http2(address, grpc(address, &format!("{path}Nope"), framed(b""))).await;
        assert_eq!(answer.grpc, Some(12), "{path}Nope: {answer:?}");
        let get = http::Request::get(format!("http://{address}{path}")).body(Full::default()).unwrap();
        let answer = http2(address, get).await;
        assert!(answer.refuses(), "GET {path}: {answer:?}");
        let mut text = grpc(address, path, "{}");
        text.headers_mut().insert("content-type", "application/json".parse().unwrap());
        let answer = http2(address, text).await;
        assert!(answer.refuses(), "JSON to {path}: {answer:?}");
    }
    tried.unharmed("malformed gRPC").await;
}

#[tokio::test]
async fn empty_messages() {
    let tried = Tried::start(&[]);
    let mut api = SchedulerClient::new(channel(&tried.up.api).await);
    refused(api.load_model(seldon::LoadModelRequest::default()).await, Code::FailedPrecondition, "LoadModel");
    let model = Some(seldon::Model::default());
    refused(api.load_model(seldon::LoadModelRequest { model }).await, Code::FailedPrecondition, "LoadModel");
    refused(api.unload_model(seldon::UnloadModelRequest::default()).await, Code::FailedPrecondition, "UnloadModel");
    let servers = vec![seldon::ServerNotify::default()];
    let notify = seldon::ServerNotifyRequest { servers, is_first_sync: true };
    refused(api.server_notify(notify).await, Code::FailedPrecondition, "ServerNotify");
    let mut own = WharfClient::new(channel(&tried.up.api).await);
    refused(own.submit_model(wire::SubmitModelRequest::default()).await, Code::FailedPrecondition, "SubmitModel");
    let codes = [Code::InvalidArgument, Code::FailedPrecondition, Code::NotFound];
    for (what, answer) in [
        ("RollbackModel", own.rollback_model(wire::RollbackModelRequest::default()).await.map(drop)),
        ("ScaleModel", own.scale_model(wire::ScaleModelRequest::default()).await.map(drop)),
        ("DrainReplica", own.drain_replica(wire::DrainReplicaRequest::default()).await.map(drop)),
        ("CordonReplica", own.cordon_replica(wire::CordonReplicaRequest::default()).await.map(drop)),
        ("Explain", own.explain(wire::ExplainRequest::default()).await.map(drop)),
    ] {
        let status = answer.expect_err(what);
        assert!(codes.contains(&status.code()) && !status.message().is_empty(), "{what}: {status:?}");
    }
    for path in ["ModelInfer", "ModelReady", "ModelMetadata", "ModelStreamInfer"] {
        let path = format!("/inference.GRPCInferenceService/{path}");
        let answer = http2(&tried.up.gateway, grpc(&tried.up.gateway, &path, framed(b""))).await;
        assert_eq!(answer.grpc, Some(3), "{path}: {answer:?}");
        assert!(answer.message.contains("name"), "{path}: {answer:?}");
    }
    for body in ["", "{}", "[]", "null", "{\"inputs\":[]}", "{\"inputs\":[{}]}", "{\"inputs\":", "\u{0}"] {
        let came = post(&tried.up.gateway, "/v2/models/iris/infer", body.as_bytes()).await;
        assert_eq!(came.status(), 400, "{body:?}: {came:?}");
        assert!(came.text.contains("{\"error\":\""), "{body:?}: {came:?}");
    }
    drop((api, own));
    tried.unharmed("empty messages").await;
}

async fn post(address: &str, path: &str, body: &[u8]) -> Came {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    exchange(address, &[head.as_bytes(), body].concat()).await
}

fn submission(name: &str, uri: &str) -> seldon::LoadModelRequest {
    let meta = Some(seldon::MetaData { name: name.to_owned(), ..seldon::MetaData::default() });
    let requirements = vec!["onnx".to_owned()];
    let memory_bytes = Some(1 << 20);
    let spec = seldon::ModelSpec { uri: uri.to_owned(), requirements, memory_bytes, ..seldon::ModelSpec::default() };
    let deployment_spec = Some(seldon::DeploymentSpec { replicas: 1, ..seldon::DeploymentSpec::default() });
    let model = seldon::Model { meta, model_spec: Some(spec), deployment_spec, ..seldon::Model::default() };
    seldon::LoadModelRequest { model: Some(model) }
}

#[tokio::test]
async fn names_outside_the_rule() {
    let tried = Tried::start(&[]);
    let mut api = SchedulerClient::new(channel(&tried.up.api).await);
    let uri = models().join("iris-1").display().to_string();
    let long = "a".repeat(300);
    for name in ["", "Iris", "iris_1", "-a", "a-", "a.b", "..", "../../etc/passwd", "a/b", "ä", "a\0b", " ", &long] {
        let text = refused(api.load_model(submission(name, &uri)).await, Code::FailedPrecondition, name);
        assert!(text.contains("name") && text.len() < 1000, "{name:?}: {text}");
        let manifest = tried.up.manifest("bad", &uri);
        let yaml = std::fs::read_to_string(&manifest).unwrap().replace("\"bad\"", &format!("{name:?}"));
        std::fs::write(&manifest, yaml).unwrap();
        let output = tried.up.cli(&["model", "load", "-f", manifest.to_str().unwrap()]);
        assert!(!output.status.success(), "{name:?}: {}", said(&output));
    }
    for path in ["..", "%2e%2e", "..%2f..%2fetc", "iris%2f..", "Iris", "%00", "iris/../iris", "a%ff", &long] {
        for action in ["/infer", "/ready", ""] {
            let came = post(&tried.up.gateway, &format!("/v2/models/{path}{action}"), FLOWER.as_bytes()).await;
            assert!(matches!(came.status(), 400 | 404), "{path}{action}: {came:?}");
            assert!(came.text.contains("{\"error\":\""), "{path}{action}: {came:?}");
        }
    }
    for header in ["..", "Iris", "a/b", "\u{e4}"] {
        let request = format!("GET /v2/models/iris/ready HTTP/1.1\r\nhost: x\r\nseldon-model: {header}\r\n\r\n");
        let came = exchange(&tried.up.gateway, request.as_bytes()).await;
        assert!(matches!(came.status(), 400 | 404), "{header}: {came:?}");
    }
    drop(api);
    tried.unharmed("bad names").await;
}

#[tokio::test]
async fn path_traversal_in_uris() {
    let tried = Tried::start(&[]);
    let mut api = SchedulerClient::new(channel(&tried.up.api).await);
    for uri in [
        "",
        "..",
        "../../etc",
        "/models/../../etc/passwd",
        "file:///models/../../etc",
        "file:///models/%2e%2e/%2E%2e/etc",
        "http://host/a/..%2f..%2fetc",
        "s3://bucket/../secret",
        "/models\\..\\etc",
        "/a\0b",
        "/a\nb",
        &"/a".repeat(5000),
    ] {
        let text = refused(api.load_model(submission("sly", uri)).await, Code::FailedPrecondition, uri);
        assert!(text.contains("uri") && text.len() < 1000, "{uri:?}: {text}");
    }
    drop(api);
    tried.unharmed("URIs that leave their folder").await;
}

#[tokio::test]
async fn artifacts_that_are_not_onnx() {
    let up = Up::start(&[]);
    up.load("iris", &models().join("iris-1"));
    let text = up.path().join("text");
    std::fs::create_dir(&text).unwrap();
    std::fs::write(text.join("model.onnx"), "this is no model\n".repeat(1000)).unwrap();
    let empty = up.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let leak = up.path().join("leak");
    std::fs::create_dir(&leak).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", leak.join("model.onnx")).unwrap();
    let noise = up.path().join("noise.onnx");
    std::fs::write(&noise, Dice(7).bytes(1 << 20)).unwrap();
    let unsupported = models().join("unsupported");
    let missing = up.path().join("missing");
    let files = up.files();
    let cases = [
        ("text", &text, "onnx"),
        ("empty", &empty, "no files"),
        ("leak", &leak, "leads out"),
        ("noise", &noise, "onnx"),
        ("broken", &models().join("broken"), "onnx"),
        ("unsupported", &unsupported, ""),
        ("missing", &missing, "does not exist"),
    ];
    for (name, artifact, words) in cases {
        let manifest = up.manifest(name, &artifact.display().to_string());
        let path = manifest.to_str().unwrap();
        let output = up.cli(&["model", "load", "-f", path, "-w", "ModelAvailable", "-t", "60"]);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", said(&output));
        assert!(said(&output).to_lowercase().contains(words), "{name}: {}", said(&output));
        assert!(!said(&output).contains("root:"), "{name}: what is not the model's was read: {}", said(&output));
    }
    for (name, ..) in cases {
        let output = up.cli(&["model", "unload", name, "-w", "-t", "60"]);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    infer(&up);
    let list = up.says(&["model", "list"]);
    assert!(cases.iter().all(|(name, ..)| !list.contains(name)), "{list}");
    let deadline = Instant::now() + SOON;
    while up.files() > files {
        assert!(Instant::now() < deadline, "{} files are open, {files} before", up.files());
        sleep(Duration::from_millis(50)).await;
    }
    let mut up = up;
    up.assert_alive();
}
