//! The built-in inference server, as its clients meet it: every sample model over every way to send tensors,
//! compared with what ONNX Runtime answers (`tests/models/expected.json`, made by `tests/models/make.py`).
#![allow(clippy::disallowed_methods, clippy::print_stdout, missing_docs, clippy::unwrap_used)]

mod servers;

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;
use wharf::{
    forward::{self, Body, Upstream as _, UpstreamError},
    ports::{BoxIo, Listen},
    rpc::proto::inference::{
        InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelReadyRequest,
        RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
        grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    runtime::{Execution, Library, Limits, Onnx, Options, Runtime, serve},
};

fn samples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models")
}

fn expected() -> serde_json::Map<String, Value> {
    let text = fs::read_to_string(samples().join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn runtime(repository: &Path, execution: Execution, limits: Limits) -> Arc<Runtime> {
    Runtime::new(Options { repository: repository.to_owned(), execution, limits })
}

fn inline() -> Arc<Runtime> {
    inline_by(&Onnx::tract())
}

fn inline_by(onnx: &Onnx) -> Arc<Runtime> {
    let options = Options { repository: samples(), execution: Execution::Inline, limits: Limits::default() };
    Runtime::with(options, onnx.clone())
}

/// ONNX Runtime, from its library.
fn onnx_runtime() -> Onnx {
    let (onnx, problem) = Onnx::find(Library::At(&servers::onnx_runtime()));
    assert_eq!(problem, None);
    assert!(onnx.is_onnx_runtime());
    onnx
}

/// Every engine that there is.
fn engines() -> Vec<Onnx> {
    vec![Onnx::tract(), onnx_runtime()]
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The message of a refusal with `status`.
    #[track_caller]
    fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{:?}", self.body);
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

async fn send(runtime: &Runtime, request: http::Request<Body>) -> Answer {
    let (head, body) = runtime.call(request).await.unwrap().into_parts();
    Answer { status: head.status, headers: head.headers, body: body.collect().await.unwrap().to_bytes() }
}

async fn rest(runtime: &Runtime, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
    let request = http::Request::builder().method(method).uri(path).body(Body::from(body.into())).unwrap();
    send(runtime, request).await
}

async fn get(runtime: &Runtime, path: &str) -> Answer {
    rest(runtime, Method::GET, path, "").await
}

async fn infer(runtime: &Runtime, model: &str, body: &Value) -> Answer {
    rest(runtime, Method::POST, &format!("/v2/models/{model}/infer"), body.to_string()).await
}

async fn load(runtime: &Runtime, model: &str) -> Answer {
    rest(runtime, Method::POST, &format!("/v2/repository/models/{model}/load"), "").await
}

async fn loaded(model: &str) -> Arc<Runtime> {
    loaded_by(&Onnx::tract(), model).await
}

async fn loaded_by(onnx: &Onnx, model: &str) -> Arc<Runtime> {
    let runtime = inline_by(onnx);
    let answer = load(&runtime, model).await;
    assert_eq!(answer.status, 200, "{model}: {:?}", answer.body);
    runtime
}

type InProcess = tower::util::BoxCloneSyncService<http::Request<tonic::body::Body>, forward::Response, UpstreamError>;

fn grpc(runtime: &Arc<Runtime>) -> GrpcInferenceServiceClient<InProcess> {
    let runtime = Arc::clone(runtime);
    let service = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let runtime = Arc::clone(&runtime);
        async move { runtime.call(request.map(Body::new)).await }
    });
    GrpcInferenceServiceClient::new(InProcess::new(service))
}

/// Little-endian bytes of the values of a tensor in expected.json, or strings with their lengths.
fn raw(tensor: &Value) -> Vec<u8> {
    let values = tensor["data"].as_array().unwrap();
    let each = |value: &Value| -> Vec<u8> {
        match tensor["datatype"].as_str().unwrap() {
            "BOOL" => vec![u8::from(value.as_bool().unwrap())],
            "INT8" => (value.as_i64().unwrap() as i8).to_le_bytes().to_vec(),
            "INT16" => (value.as_i64().unwrap() as i16).to_le_bytes().to_vec(),
            "INT32" => (value.as_i64().unwrap() as i32).to_le_bytes().to_vec(),
            "INT64" => value.as_i64().unwrap().to_le_bytes().to_vec(),
            "UINT8" => (value.as_u64().unwrap() as u8).to_le_bytes().to_vec(),
            "UINT16" => (value.as_u64().unwrap() as u16).to_le_bytes().to_vec(),
            "UINT32" => (value.as_u64().unwrap() as u32).to_le_bytes().to_vec(),
            "UINT64" => value.as_u64().unwrap().to_le_bytes().to_vec(),
            "FP16" => half(value.as_f64().unwrap()).to_le_bytes().to_vec(),
            "FP32" => (value.as_f64().unwrap() as f32).to_le_bytes().to_vec(),
            "FP64" => value.as_f64().unwrap().to_le_bytes().to_vec(),
            "BYTES" => {
                let text = value.as_str().unwrap();
                [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
            }
            other => panic!("{other}"),
        }
    };
    values.iter().flat_map(each).collect()
}

/// The bits of the three half floats that the samples have.
fn half(value: f64) -> u16 {
    match value {
        0.5 => 0x3800,
        -2.0 => 0xc000,
        65504.0 => 0x7bff,
        other => panic!("{other}"),
    }
}

fn shape(tensor: &Value) -> Vec<i64> {
    tensor["shape"].as_array().unwrap().iter().map(|length| length.as_i64().unwrap()).collect()
}

/// Whether two arrays of values are the same, floats up to what two engines differ in.
#[track_caller]
fn same(what: &str, datatype: &str, came: &Value, wanted: &Value) {
    let (came, wanted) = (came.as_array().unwrap(), wanted.as_array().unwrap());
    assert_eq!(came.len(), wanted.len(), "{what}");
    for (came, wanted) in came.iter().zip(wanted) {
        if datatype.starts_with("FP") {
            let (came, wanted) = (came.as_f64().unwrap(), wanted.as_f64().unwrap());
            assert!((came - wanted).abs() <= 1e-5 * wanted.abs().max(1.0), "{what}: {came} is not {wanted}");
        } else {
            assert_eq!(came, wanted, "{what}");
        }
    }
}

/// An answer's raw output as JSON values, by way of the tensor that it should be.
#[track_caller]
fn same_raw(what: &str, came: &[u8], wanted: &Value) {
    if wanted["datatype"] != "FP32" {
        assert_eq!(came, raw(wanted), "{what}");
        return;
    }
    let values: Vec<f32> = came.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    assert_eq!(came.len(), values.len() * 4);
    same(what, "FP32", &json!(values), &wanted["data"]);
}

fn rest_inputs(case: &Value) -> Vec<Value> {
    let input = |(name, tensor): (&String, &Value)| {
        // The keys in the least convenient order.
        let text = format!(
            r#"{{"data":{},"parameters":{{"note":[1]}},"shape":{},"datatype":{},"name":{name:?}}}"#,
            tensor["data"], tensor["shape"], tensor["datatype"]
        );
        serde_json::from_str(&text).unwrap()
    };
    // Against the model's order.
    case["inputs"].as_object().unwrap().iter().rev().map(input).collect()
}

#[tokio::test]
async fn every_sample_answers_over_rest_as_onnx_runtime_does() {
    let expected = expected();
    for (onnx, (model, cases)) in engines().iter().flat_map(|onnx| expected.iter().map(move |one| (onnx, one))) {
        let runtime = loaded_by(onnx, model).await;
        for case in cases.as_array().unwrap() {
            let answer = infer(&runtime, model, &json!({ "id": "7", "inputs": rest_inputs(case) })).await;
            assert_eq!(answer.status, 200, "{model} {onnx:?}: {:?}", answer.body);
            let json = answer.json();
            assert_eq!(
                (&json["model_name"], &json["model_version"], &json["id"]),
                (&json!(model), &json!("1"), &json!("7"))
            );
            let outputs = case["outputs"].as_object().unwrap();
            assert_eq!(json["outputs"].as_array().unwrap().len(), outputs.len(), "{model} {onnx:?}");
            for output in json["outputs"].as_array().unwrap() {
                let wanted = &outputs[output["name"].as_str().unwrap()];
                assert_eq!(
                    (&output["datatype"], &output["shape"]),
                    (&wanted["datatype"], &wanted["shape"]),
                    "{model} {onnx:?}"
                );
                same(model, wanted["datatype"].as_str().unwrap(), &output["data"], &wanted["data"]);
            }
        }
    }
}

#[tokio::test]
async fn every_sample_answers_binary_data_with_binary_data() {
    let expected = expected();
    for (onnx, (model, cases)) in engines().iter().flat_map(|onnx| expected.iter().map(move |one| (onnx, one))) {
        let runtime = loaded_by(onnx, model).await;
        for case in cases.as_array().unwrap() {
            let mut behind = Vec::new();
            let mut inputs = Vec::new();
            for (name, tensor) in case["inputs"].as_object().unwrap() {
                let bytes = raw(tensor);
                inputs.push(json!({ "name": name, "datatype": tensor["datatype"], "shape": tensor["shape"],
                    "parameters": { "binary_data_size": bytes.len() } }));
                behind.extend(bytes);
            }
            let head = json!({ "parameters": { "binary_data_output": true }, "inputs": inputs }).to_string();
            let request = http::Request::post(format!("/v2/models/{model}/versions/1/infer"))
                .header("Inference-Header-Content-Length", head.len())
                .body(Body::from(Bytes::from([head.into_bytes(), behind].concat())));
            let answer = send(&runtime, request.unwrap()).await;
            assert_eq!(answer.status, 200, "{model} {onnx:?}: {:?}", answer.body);
            let length: usize = answer.headers["inference-header-content-length"].to_str().unwrap().parse().unwrap();
            let (head, mut rest) = answer.body.split_at(length);
            let head: Value = serde_json::from_slice(head).unwrap();
            for output in head["outputs"].as_array().unwrap() {
                let size = output["parameters"]["binary_data_size"].as_u64().unwrap() as usize;
                same_raw(model, &rest[..size], &case["outputs"][output["name"].as_str().unwrap()]);
                rest = &rest[size..];
            }
            assert!(rest.is_empty());
        }
    }
}

fn contents(tensor: &Value) -> InferTensorContents {
    let values = tensor["data"].as_array().unwrap();
    let mut contents = InferTensorContents::default();
    match tensor["datatype"].as_str().unwrap() {
        "BOOL" => contents.bool_contents = values.iter().map(|v| v.as_bool().unwrap()).collect(),
        "INT8" | "INT16" | "INT32" => {
            contents.int_contents = values.iter().map(|v| v.as_i64().unwrap() as i32).collect()
        }
        "INT64" => contents.int64_contents = values.iter().map(|v| v.as_i64().unwrap()).collect(),
        "UINT8" | "UINT16" | "UINT32" => {
            contents.uint_contents = values.iter().map(|v| v.as_u64().unwrap() as u32).collect();
        }
        "UINT64" => contents.uint64_contents = values.iter().map(|v| v.as_u64().unwrap()).collect(),
        "FP32" => contents.fp32_contents = values.iter().map(|v| v.as_f64().unwrap() as f32).collect(),
        "FP64" => contents.fp64_contents = values.iter().map(|v| v.as_f64().unwrap()).collect(),
        "BYTES" => contents.bytes_contents = values.iter().map(|v| v.as_str().unwrap().as_bytes().to_vec()).collect(),
        other => panic!("{other}"),
    }
    contents
}

fn request(model: &str, case: &Value, binary: bool) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: model.to_owned(), id: "é7".to_owned(), ..Default::default() };
    for (name, tensor) in case["inputs"].as_object().unwrap() {
        if binary {
            request.raw_input_contents.push(raw(tensor).into());
        }
        request.inputs.push(InferInputTensor {
            name: name.clone(),
            datatype: tensor["datatype"].as_str().unwrap().to_owned(),
            shape: shape(tensor),
            contents: (!binary).then(|| contents(tensor)),
            ..Default::default()
        });
    }
    request
}

#[track_caller]
fn same_response(model: &str, response: &ModelInferResponse, case: &Value, binary: bool) {
    assert_eq!((&*response.model_name, &*response.model_version, &*response.id), (model, "1", "é7"));
    let wanted = case["outputs"].as_object().unwrap();
    assert_eq!(response.outputs.len(), wanted.len());
    assert_eq!(response.raw_output_contents.len(), if binary { wanted.len() } else { 0 });
    for (place, output) in response.outputs.iter().enumerate() {
        let wanted = &wanted[&output.name];
        assert_eq!((&*output.datatype, &output.shape), (wanted["datatype"].as_str().unwrap(), &shape(wanted)));
        match &output.contents {
            None => same_raw(model, &response.raw_output_contents[place], wanted),
            Some(came) if output.datatype == "FP32" => same(model, "FP32", &json!(came.fp32_contents), &wanted["data"]),
            Some(came) => assert_eq!(*came, contents(wanted), "{model}"),
        }
    }
}

#[tokio::test]
async fn every_sample_answers_over_grpc_in_the_kind_that_was_sent() {
    let expected = expected();
    for (onnx, (model, cases)) in engines().iter().flat_map(|onnx| expected.iter().map(move |one| (onnx, one))) {
        let runtime = inline_by(onnx);
        let mut client = grpc(&runtime);
        let order = RepositoryModelLoadRequest { model_name: model.clone(), ..Default::default() };
        client.repository_model_load(order).await.unwrap();
        for case in cases.as_array().unwrap() {
            let response = client.model_infer(request(model, case, true)).await.unwrap().into_inner();
            same_response(model, &response, case, true);
            // FP16 has no typed contents.
            if model == "identity-fp16" {
                continue;
            }
            let response = client.model_infer(request(model, case, false)).await.unwrap().into_inner();
            same_response(model, &response, case, false);
        }
    }
}

#[tokio::test]
async fn a_stream_answers_each_message_and_outlives_an_error() {
    let case = &expected()["iris-2"][0];
    let runtime = loaded("iris-2").await;
    let good = request("iris-2", case, true);
    let bad = ModelInferRequest { model_name: "nope".to_owned(), id: "bad".to_owned(), ..Default::default() };
    let messages = futures::stream::iter([good.clone(), bad, good]);
    let mut answers = grpc(&runtime).model_stream_infer(messages).await.unwrap().into_inner();
    for place in 0..3 {
        let answer = answers.message().await.unwrap().unwrap();
        let response = answer.infer_response.unwrap();
        if place == 1 {
            assert!(answer.error_message.contains("\"nope\" is not loaded"), "{}", answer.error_message);
            assert_eq!(response.id, "bad");
        } else {
            assert_eq!(answer.error_message, "");
            same_response("iris-2", &response, case, true);
        }
    }
    assert!(answers.message().await.unwrap().is_none());
}

/// A model's metadata without what its engine says that it takes in memory, and that.
fn without_memory(mut metadata: Value) -> (Value, u64) {
    let memory = metadata["parameters"].as_object_mut().unwrap().remove("memory_bytes").unwrap();
    (metadata, memory.as_u64().unwrap())
}

#[tokio::test]
async fn metadata_tells_what_the_model_takes_and_gives() {
    let runtime = loaded("iris-1").await;
    let size = fs::metadata(samples().join("iris-1/model.onnx")).unwrap().len();
    let wanted = json!({
        "name": "iris-1", "versions": ["1"], "platform": "onnx_tract",
        "inputs": [{ "name": "X", "datatype": "FP32", "shape": [-1, 4] }],
        "outputs": [
            { "name": "label", "datatype": "INT64", "shape": [-1] },
            { "name": "probabilities", "datatype": "FP32", "shape": [-1, 3] },
        ],
        "parameters": { "artifact_bytes": size },
    });
    for path in ["/v2/models/iris-1", "/v2/models/iris-1/versions/1", "/v2/models/iris-1/"] {
        let (seen, memory) = without_memory(get(&runtime, path).await.json());
        assert!(memory >= size, "{memory} bytes for an artifact of {size}");
        assert_eq!(seen, wanted);
    }
    assert_eq!(runtime.artifact_bytes("iris-1").unwrap().0, size);
    let asked = ModelMetadataRequest { name: "iris-1".to_owned(), version: String::new() };
    let metadata = grpc(&runtime).model_metadata(asked).await.unwrap().into_inner();
    assert_eq!((metadata.inputs[0].shape.as_slice(), &*metadata.outputs[0].datatype), (&[-1, 4][..], "INT64"));
    assert!(metadata.parameters.contains_key("artifact_bytes"));
    // Weights in another file count too.
    let external = loaded("external").await;
    let size =
        ["model.onnx", "weights.bin"].map(|name| fs::metadata(samples().join("external").join(name)).unwrap().len());
    assert_eq!(external.artifact_bytes("external").unwrap().0, size.iter().sum::<u64>());

    for (path, key) in
        [("/v2/health/live", "live"), ("/v2/health/ready", "ready"), ("/v2/models/iris-1/ready", "ready")]
    {
        let answer = get(&runtime, path).await;
        assert_eq!((answer.status, &answer.json()[key]), (StatusCode::OK, &json!(true)));
    }
    assert!(get(&runtime, "/v2").await.json()["extensions"].as_array().unwrap().contains(&json!("model_repository")));
    assert!(get(&runtime, "/v2/models/iris-1/versions/2").await.refused(404).contains("no version \"2\""));
}

#[tokio::test]
async fn onnx_runtime_is_named_in_metadata_and_refuses_with_words_too() {
    let onnx = onnx_runtime();
    let (by_tract, _) = without_memory(get(&*loaded("iris-1").await, "/v2/models/iris-1").await.json());
    let (mut by_library, _) = without_memory(get(&*loaded_by(&onnx, "iris-1").await, "/v2/models/iris-1").await.json());
    assert_eq!(by_library["platform"], "onnx_onnxruntime");
    by_library["platform"] = json!("onnx_tract");
    assert_eq!(by_library, by_tract);
    let external = loaded_by(&onnx, "external").await;
    assert_eq!(external.artifact_bytes("external"), loaded("external").await.artifact_bytes("external"));

    let runtime = inline_by(&onnx);
    for (model, reasons) in [
        ("broken", &["tests/models/broken/model.onnx", "not an ONNX model"][..]),
        ("unsupported", &["tests/models/unsupported/model.onnx", "Frobnicate"]),
        ("iris-zipmap", &["ZipMap", "options={\"zipmap\": False}"]),
    ] {
        let message = load(&runtime, model).await.refused(422);
        assert!(reasons.iter().all(|reason| message.contains(reason)), "{message}");
    }
}

#[tokio::test]
async fn onnx_runtime_takes_empty_batches_and_a_bad_index_takes_nothing_down() {
    let onnx = onnx_runtime();
    let add = loaded_by(&onnx, "add").await;
    let none = ["a", "b"].map(|name| json!({ "name": name, "datatype": "FP32", "shape": [0, 3], "data": [] }));
    let answer = infer(&add, "add", &json!({ "inputs": none })).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert_eq!(
        (&answer.json()["outputs"][0]["shape"], &answer.json()["outputs"][0]["data"]),
        (&json!([0, 3]), &json!([]))
    );

    let pick = loaded_by(&onnx, "pick").await;
    let ask =
        |index: i64| json!({ "inputs": [{ "name": "index", "datatype": "INT64", "shape": [1], "data": [index] }] });
    let message = infer(&pick, "pick", &ask(7)).await.refused(400);
    assert!(message.contains("\"pick\" can't be run on these inputs"), "{message}");
    assert_eq!(infer(&pick, "pick", &ask(2)).await.status, 200);

    let text = loaded_by(&onnx, "identity-bytes").await;
    let zero = json!({ "inputs": [{ "name": "x", "datatype": "BYTES", "shape": [1, 1], "data": ["a\u{0}b"] }] });
    assert!(infer(&text, "identity-bytes", &zero).await.refused(400).contains("zero byte"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_for_one_model_of_onnx_runtime_are_all_answered() {
    let onnx = onnx_runtime();
    let options =
        Options { repository: samples(), execution: Execution::Pool { threads: 4 }, limits: Limits::default() };
    let runtime = Runtime::with(options, onnx);
    assert_eq!(load(&runtime, "mlp").await.status, 200);
    let case = &expected()["mlp"][1];
    let client = grpc(&runtime);
    let asks = (0..64).map(|_| {
        let mut client = client.clone();
        async move { client.model_infer(request("mlp", case, true)).await }
    });
    for response in futures::future::join_all(asks).await {
        same_response("mlp", &response.unwrap().into_inner(), case, true);
    }
    assert_eq!(rest(&runtime, Method::POST, "/v2/repository/models/mlp/unload", "{}").await.status, 200);
}

#[tokio::test]
async fn the_index_tells_disk_and_memory_apart_and_unload_frees() {
    let runtime = loaded("iris-1").await;
    load(&runtime, "broken").await.refused(422);
    let index = async |body: &'static str| rest(&runtime, Method::POST, "/v2/repository/index", body).await.json();
    let all = index("").await;
    let state = |name: &str| all.as_array().unwrap().iter().find(|model| model["name"] == name).unwrap().clone();
    assert_eq!(state("iris-1"), json!({ "name": "iris-1", "version": "1", "state": "READY", "reason": "" }));
    assert_eq!(state("iris-2")["state"], "UNAVAILABLE");
    assert!(state("broken")["reason"].as_str().unwrap().contains("not an ONNX model"));
    assert_eq!(index(r#"{"ready":true}"#).await.as_array().unwrap().len(), 1);
    let asked = RepositoryIndexRequest { ready: true, ..Default::default() };
    let models = grpc(&runtime).repository_index(asked).await.unwrap().into_inner().models;
    assert_eq!((models.len(), &*models[0].name, &*models[0].state), (1, "iris-1", "READY"));

    let unload = || rest(&runtime, Method::POST, "/v2/repository/models/iris-1/unload", "{}");
    assert_eq!(unload().await.status, 200);
    unload().await.refused(404);
    assert_eq!(index(r#"{"ready":true}"#).await, json!([]));
    infer(&runtime, "iris-1", &json!({ "inputs": [] })).await.refused(404);
    let mut client = grpc(&runtime);
    let asked = RepositoryModelUnloadRequest { model_name: "iris-1".to_owned(), ..Default::default() };
    assert_eq!(client.repository_model_unload(asked).await.unwrap_err().code(), Code::NotFound);
    let asked = ModelReadyRequest { name: "iris-1".to_owned(), version: String::new() };
    assert_eq!(client.model_ready(asked).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn an_artifact_that_cannot_be_served_says_which_and_why() {
    let runtime = inline();
    for (model, reasons) in [
        ("broken", &["tests/models/broken/model.onnx", "not an ONNX model"][..]),
        ("unsupported", &["tests/models/unsupported/model.onnx", "Frobnicate", "set agent.onnx_runtime"]),
        ("iris-zipmap", &["ZipMap", "options={\"zipmap\": False}"]),
    ] {
        let message = load(&runtime, model).await.refused(422);
        for reason in reasons {
            assert!(message.contains(reason), "{message}");
        }
        let order = RepositoryModelLoadRequest { model_name: model.to_owned(), ..Default::default() };
        let status = grpc(&runtime).repository_model_load(order).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, &*message));
    }
    load(&runtime, "nope").await.refused(404);
    load(&runtime, "..").await.refused(400);
    load(&runtime, "%2e%2e").await.refused(400);
}

#[tokio::test]
async fn loading_again_takes_what_is_on_disk_now_and_a_failure_keeps_the_old() {
    let repository = tempfile::tempdir().unwrap();
    let runtime = runtime(repository.path(), Execution::Pool { threads: 2 }, Limits::default());
    let put = |version: &str, sample: &str| {
        let folder = repository.path().join("iris_1").join(version);
        fs::create_dir_all(&folder).unwrap();
        fs::copy(samples().join(sample).join("model.onnx"), folder.join("net.onnx")).unwrap();
    };
    let body = json!({ "inputs": rest_inputs(&expected()["iris-1"][0]), "outputs": [{ "name": "label" }] });
    let label = async || infer(&runtime, "iris_1", &body).await.json()["outputs"][0]["data"][0].clone();
    put("9", "iris-1");
    assert_eq!(load(&runtime, "iris_1").await.status, 200);
    assert_eq!(label().await, 0);
    put("10", "iris-2");
    assert_eq!(label().await, 0);
    assert_eq!(load(&runtime, "iris_1").await.status, 200);
    assert_eq!(label().await, 1);
    put("11", "broken");
    load(&runtime, "iris_1").await.refused(422);
    assert_eq!(label().await, 1);
    fs::remove_dir_all(repository.path().join("iris_1")).unwrap();
    load(&runtime, "iris_1").await.refused(404);
    assert_eq!(label().await, 1);
}

#[derive(Debug)]
struct Tcp(TcpListener);

impl Listen for Tcp {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        Box::pin(async {
            let (stream, peer) = self.0.accept().await?;
            Ok((Box::new(stream) as BoxIo, peer.to_string()))
        })
    }

    fn address(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_and_grpc_share_a_port_and_a_huge_body_is_refused_unread() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let runtime = runtime(&samples(), Execution::Pool { threads: 2 }, Limits::default());
    let listener = Box::new(Tcp(TcpListener::bind("127.0.0.1:0").await.unwrap()));
    let address = listener.address();
    let server = tokio::spawn(serve(listener, runtime));
    let all = async {
        let mut client = GrpcInferenceServiceClient::connect(format!("http://{address}")).await.unwrap();
        let order = RepositoryModelLoadRequest { model_name: "mlp".to_owned(), ..Default::default() };
        client.repository_model_load(order).await.unwrap();
        let case = &expected()["mlp"][1];
        let mut asked = request("mlp", case, true);
        asked.outputs.push(InferRequestedOutputTensor { name: "y".to_owned(), ..Default::default() });
        let one = client.clone();
        let asks = (0..32).map(|_| {
            let (mut one, asked) = (one.clone(), asked.clone());
            async move { one.model_infer(asked).await }
        });
        for response in futures::future::join_all(asks).await {
            same_response("mlp", &response.unwrap().into_inner(), case, true);
        }
        let mut socket = TcpStream::connect(&address).await.unwrap();
        let head = format!(
            "POST /v2/models/mlp/infer HTTP/1.1\r\nhost: {address}\r\ncontent-length: {}\r\n\r\n",
            10_u64 << 30
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(answer.contains("longer than the 67108864 bytes"), "{answer}");
        // The end of the server is the end of its connections.
        server.abort();
        while client.server_live(wharf::rpc::proto::inference::ServerLiveRequest {}).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
}

/// Bytes of this process that are in memory.
fn in_memory() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// A model that adds a constant of this many bytes.
fn large(bytes: usize) -> Vec<u8> {
    use prost::Message as _;
    use tract_onnx::pb::{
        GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
        ValueInfoProto, tensor_shape_proto::Dimension, tensor_shape_proto::dimension, type_proto,
    };
    let length = (bytes / 4) as i64;
    let value = |name: &str| {
        let shape = TensorShapeProto {
            dim: vec![Dimension { value: Some(dimension::Value::DimValue(length)), ..Default::default() }],
        };
        let tensor = type_proto::Tensor { elem_type: 1, shape: Some(shape) };
        ValueInfoProto {
            name: name.to_owned(),
            r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
            ..Default::default()
        }
    };
    let constant = TensorProto {
        name: "c".to_owned(),
        dims: vec![length],
        data_type: 1,
        raw_data: vec![7; bytes],
        ..Default::default()
    };
    let add = NodeProto {
        input: vec!["x".to_owned(), "c".to_owned()],
        output: vec!["y".to_owned()],
        op_type: "Add".to_owned(),
        ..Default::default()
    };
    let graph = GraphProto {
        name: "g".to_owned(),
        node: vec![add],
        initializer: vec![constant],
        input: vec![value("x")],
        output: vec![value("y")],
        ..Default::default()
    };
    let opset = OperatorSetIdProto { domain: String::new(), version: 17 };
    ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(graph), ..Default::default() }.encode_to_vec()
}

/// A model that goes round as often as it is told to.
fn looping() -> Vec<u8> {
    use prost::Message as _;
    use tract_onnx::pb::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto,
        ValueInfoProto, attribute_proto::AttributeType, tensor_shape_proto::Dimension, tensor_shape_proto::dimension,
        type_proto,
    };
    let value = |name: &str, elem_type: i32, dims: &[i64]| {
        let dim = |length: &i64| Dimension { value: Some(dimension::Value::DimValue(*length)), ..Default::default() };
        let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
        let tensor = type_proto::Tensor { elem_type, shape: Some(shape) };
        ValueInfoProto {
            name: name.to_owned(),
            r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
            ..Default::default()
        }
    };
    let node = |op: &str, input: &[&str], output: &str| NodeProto {
        input: input.iter().map(|name| (*name).to_owned()).collect(),
        output: vec![output.to_owned()],
        op_type: op.to_owned(),
        ..Default::default()
    };
    let (float, int64, boolean) = (1, 7, 9);
    let body = GraphProto {
        name: "body".to_owned(),
        node: vec![node("Identity", &["go_on"], "goes_on"), node("Neg", &["before"], "after")],
        input: vec![value("turn", int64, &[]), value("go_on", boolean, &[]), value("before", float, &[1])],
        output: vec![value("goes_on", boolean, &[]), value("after", float, &[1])],
        ..Default::default()
    };
    let mut turns = node("Loop", &["n", "", "x"], "y");
    turns.attribute.push(AttributeProto {
        name: "body".to_owned(),
        r#type: AttributeType::Graph as i32,
        g: Some(body),
        ..Default::default()
    });
    let graph = GraphProto {
        name: "g".to_owned(),
        node: vec![turns],
        input: vec![value("n", int64, &[1]), value("x", float, &[1])],
        output: vec![value("y", float, &[1])],
        ..Default::default()
    };
    let opset = OperatorSetIdProto { domain: String::new(), version: 17 };
    ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(graph), ..Default::default() }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_onnx_runtime_that_does_not_end_is_ended_and_keeps_no_other_waiting() {
    const LIMIT: Duration = Duration::from_secs(5);
    let repository = tempfile::tempdir().unwrap();
    for name in ["loop", "other"] {
        fs::create_dir(repository.path().join(name)).unwrap();
        fs::write(repository.path().join(name).join("model.onnx"), looping()).unwrap();
    }
    let options = Options {
        repository: repository.path().to_owned(),
        execution: Execution::Pool { threads: 2 },
        limits: Limits { inference: LIMIT, ..Limits::default() },
    };
    let runtime = Runtime::with(options, onnx_runtime());
    for name in ["loop", "other"] {
        assert_eq!(load(&runtime, name).await.status, 200);
    }
    let turns = |turns: i64| {
        json!({ "inputs": [
            { "name": "n", "datatype": "INT64", "shape": [1], "data": [turns] },
            { "name": "x", "datatype": "FP32", "shape": [1], "data": [1.0] },
        ] })
    };
    let for_ever = turns(i64::MAX);
    let stuck = futures::future::join_all((0..4).map(|_| infer(&runtime, "loop", &for_ever)));
    let few = turns(3);
    let meanwhile = async {
        let answer = infer(&runtime, "other", &few).await;
        assert_eq!(answer.status, 200, "the pool has room for others: {:?}", answer.json());
        assert_eq!(answer.json()["outputs"][0]["data"], json!([-1.0]));
    };
    let (stuck, ()) = futures::join!(stuck, meanwhile);
    assert!(stuck.iter().all(|answer| answer.status == 504), "each took too long");
    // It is ended, not only given up.
    let answer = infer(&runtime, "loop", &turns(2)).await;
    assert_eq!(answer.status, 200, "{:?}", answer.json());
    assert_eq!(answer.json()["outputs"][0]["data"], json!([1.0]));
}

#[tokio::test]
async fn what_a_model_of_onnx_runtime_took_is_free_after_its_unload() {
    const BYTES: u64 = 128 << 20;
    let onnx = onnx_runtime();
    let repository = tempfile::tempdir().unwrap();
    fs::create_dir(repository.path().join("large")).unwrap();
    fs::write(repository.path().join("large/model.onnx"), large(BYTES as usize)).unwrap();
    let options = Options {
        repository: repository.path().to_owned(),
        execution: Execution::Inline,
        limits: Limits { body_bytes: BYTES as usize * 2, ..Limits::default() },
    };
    let runtime = Runtime::with(options, onnx);
    let before = in_memory();
    assert_eq!(load(&runtime, "large").await.status, 200);
    let shape = json!([BYTES / 4]);
    let head = json!({
        "parameters": { "binary_data_output": true },
        "inputs": [{ "name": "x", "datatype": "FP32", "shape": shape, "parameters": { "binary_data_size": BYTES } }],
    });
    let head = head.to_string().into_bytes();
    let request = http::Request::post("/v2/models/large/infer").header("Inference-Header-Content-Length", head.len());
    let body = [head, vec![0; BYTES as usize]].concat();
    let answer = send(&runtime, request.body(Body::from(Bytes::from(body))).unwrap()).await;
    assert_eq!(answer.status, 200);
    drop(answer);
    assert!(in_memory() > before + BYTES / 2, "it takes memory");
    assert_eq!(rest(&runtime, Method::POST, "/v2/repository/models/large/unload", "{}").await.status, 200);
    let left = in_memory().saturating_sub(before);
    assert!(left < BYTES / 4, "{left} bytes are left");
}
