//! The promise: a copy that is called Available answers. With `wharf up` as a process of its own, and inference servers
//! that lie, lose and fail.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test stops where it fails, waits in real time, and says what it saw"
)]

mod process;
mod servers;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use http::StatusCode;
use http_body_util::BodyExt as _;
use process::{Home, SOON, Spec, Wharf, onnx, said};
use serde_json::{Value, json};
use wharf::{
    forward::{Body, ClientOptions, HttpUpstream, Request, Response, TcpNetwork, Upstream, UpstreamError},
    ports::{Network as _, SystemClock},
    runtime::{Execution, Limits, Options, Runtime, serve},
};

const MIB: u64 = 1 << 20;
const IRIS: &str = r#"{"inputs":[{"name":"X","datatype":"FP32","shape":[1,4],"data":[5.1,3.5,1.4,0.2]}]}"#;

/// What is at `path` of the server at `address`.
async fn ask(address: &str, path: &str, body: Option<&str>) -> (StatusCode, Value) {
    let upstream =
        HttpUpstream::new(address, Arc::new(TcpNetwork), Arc::new(SystemClock::new()), ClientOptions::default());
    let request = match body {
        Some(body) => http::Request::post(path).body(Body::from(body.to_owned())),
        None => http::Request::get(path).body(Body::empty()),
    };
    let response = tokio::time::timeout(SOON, upstream.unwrap().call(request.unwrap())).await.unwrap().unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// Submits `spec` with a warm-up.
async fn submit(wharf: &Wharf, spec: &Spec, warmup: &str) {
    let mut model = spec.model();
    model.model_spec.as_mut().unwrap().warmup = Some(warmup.to_owned());
    let request = wharf::rpc::proto::scheduler::LoadModelRequest { model: Some(model) };
    wharf.scheduler.clone().load_model(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_that_serves_is_told_and_a_broken_library_takes_nothing_down() {
    let broken = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let good = servers::onnx_runtime();
    let cases = [(broken, "onnx_tract", "builtin"), (good, "onnx_onnxruntime", "builtin (ONNX Runtime)")];
    for (library, platform, runtime) in cases {
        let home = Home::new(&onnx(1, "64Mi", 0)).set("agent.onnx_runtime", library.display());
        let wharf = home.up().await;
        submit(&wharf, &Spec::new("iris", "iris-1", MIB), "auto").await;
        wharf.until_serving("iris", 1).await;
        let (status, metadata) = ask(&wharf.gateway, "/v2/models/iris", None).await;
        assert_eq!((status, &metadata["platform"]), (StatusCode::OK, &json!(platform)));
        let (status, answer) = ask(&wharf.gateway, "/v2/models/iris/infer", Some(IRIS)).await;
        assert_eq!((status, &answer["outputs"][0]["data"]), (StatusCode::OK, &json!([0])));
        assert_eq!(wharf.servers().await[0].runtime, runtime);
        assert_eq!(home.log().contains("ONNX Runtime is not used"), platform == "onnx_tract", "{}", home.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_can_not_answer_its_warm_up_is_not_available_and_says_why() {
    let home = Home::new(&onnx(1, "64Mi", 0));
    let wharf = home.up().await;
    let wrong = r#"[{"name":"X","datatype":"FP32","shape":[1,5],"data":[1,2,3,4,5]}]"#;
    submit(&wharf, &Spec::new("iris", "iris-1", MIB), wrong).await;
    let why = "the server's words about the warm-up";
    let view = wharf.until("iris", why, |view| format!("{view:?}").contains("its warm-up request failed (400")).await;
    assert_eq!(view.available, 0);
    assert!(format!("{view:?}").contains("[-1, 4]"), "{view:?}");
    let status = wharf.cli(&["model", "status", "iris", "-o", "yaml"]).await;
    assert!(said(&status).contains("warmup:"), "{}", said(&status));
    // The next version has none, and answers.
    submit(&wharf, &Spec::new("iris", "iris-1", MIB), "none").await;
    wharf.until_serving("iris", 2).await;
}

/// An inference server that fails every inference while it is sick, and says that it is ready all the same.
#[derive(Debug)]
struct Sick(Arc<Runtime>, Arc<AtomicBool>);

impl Upstream for Sick {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        if request.uri().path().ends_with("/infer") && self.1.load(Ordering::SeqCst) {
            let mut response = Response::new(Body::from(r#"{"error":"CUDA error: device-side assert triggered"}"#));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            return Box::pin(std::future::ready(Ok(response)));
        }
        self.0.call(request)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_is_set_aside_and_one_that_loses_a_copy_gets_it_back() {
    let home = Home::new("");
    let sick = Arc::new(AtomicBool::new(false));
    let mut addresses = Vec::new();
    for index in 0..2 {
        let repository = home.path().join(format!("agent/oip-{index}/repository"));
        let options = Options { repository, execution: Execution::Pool { threads: 2 }, limits: Limits::default() };
        let broken = if index == 0 { Arc::clone(&sick) } else { Arc::default() };
        let listener = TcpNetwork.bind("127.0.0.1:0").await.unwrap();
        addresses.push(listener.address());
        tokio::spawn(serve(listener, Arc::new(Sick(Runtime::new(options), broken))));
    }
    let listed = addresses.iter().map(|address| format!("{{ http = \"http://{address}\" }}")).collect::<Vec<_>>();
    home.write_registry(&format!(
        "[[server]]\nname = \"oip\"\nruntime = \"oip\"\ncapabilities = [\"onnx\"]\nmemory = \"64Mi\"\naddresses = [{}]\n",
        listed.join(", ")
    ));
    let wharf = home.up().await;
    wharf.load(&Spec::new("iris", "iris-1", MIB).replicas(2)).await.unwrap();
    wharf.until("iris", "two copies that answer", |view| view.available == 2).await;

    // Behind the agent's back, and nobody asks for it.
    let unload = "/v2/repository/models/iris_1/unload";
    assert_eq!(ask(&addresses[1], unload, Some("{}")).await.0, StatusCode::OK);
    let back = async {
        while ask(&addresses[1], "/v2/models/iris_1/ready", None).await.0 != StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, back).await.expect("the copy comes back by itself");

    let answers = async |times: usize| {
        let mut failed = 0;
        for _ in 0..times {
            let (status, answer) = ask(&wharf.gateway, "/v2/models/iris/infer", Some(IRIS)).await;
            if status != StatusCode::OK {
                assert!(answer["error"].as_str().unwrap().contains("device-side assert"), "{answer}");
                failed += 1;
            }
        }
        failed
    };
    assert_eq!(answers(40).await, 0);
    sick.store(true, Ordering::SeqCst);
    let failed = answers(100).await;
    // Five set it aside; on a slow machine a probe may fail too.
    assert!((5..8).contains(&failed), "{failed}");
    assert_eq!(wharf.metric("wharf_gateway_set_aside_total").await, Some(1.0));
    assert!(home.log().contains("a copy is set aside"), "{}", home.log());
}
