//! What the built-in inference server refuses, and that each refusal says what came and what was wanted.
#![allow(clippy::disallowed_methods, clippy::print_stdout, missing_docs, clippy::unwrap_used)]

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, StreamBody};
use proptest::prelude::*;
use serde_json::{Value, json};
use tonic::Code;
use wharf::{
    forward::{Body, Upstream as _},
    rpc::proto::inference::{
        InferTensorContents, ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::InferInputTensor,
    },
    runtime::{Execution, Limits, Options, Runtime},
};

async fn send(runtime: &Runtime, request: http::Request<Body>) -> (StatusCode, Bytes) {
    let (head, body) = runtime.call(request).await.unwrap().into_parts();
    (head.status, body.collect().await.unwrap().to_bytes())
}

async fn loaded(models: &[&str], body_bytes: usize) -> Arc<Runtime> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models");
    let limits = Limits { body_bytes, ..Limits::default() };
    let runtime = Runtime::new(Options { repository, execution: Execution::Inline, limits });
    for model in models {
        let uri = format!("/v2/repository/models/{model}/load");
        let (status, body) = send(&runtime, http::Request::post(uri).body(Body::empty()).unwrap()).await;
        assert_eq!(status, 200, "{body:?}");
    }
    runtime
}

async fn post(runtime: &Runtime, model: &str, body: impl Into<Bytes>) -> (StatusCode, String) {
    let request = http::Request::post(format!("/v2/models/{model}/infer")).body(Body::from(body.into())).unwrap();
    let (status, body) = send(runtime, request).await;
    let json: Value = serde_json::from_slice(&body).unwrap();
    (status, json["error"].as_str().map_or_else(|| json.to_string(), str::to_owned))
}

fn input(name: &str, datatype: &str, shape: Value, data: Value) -> Value {
    json!({ "name": name, "datatype": datatype, "shape": shape, "data": data })
}

#[tokio::test]
async fn a_wrong_input_is_refused_with_what_came_and_what_was_wanted() {
    let runtime =
        loaded(&["iris-1", "add", "pick", "identity-int8", "identity-bool", "identity-bytes", "concat"], 1 << 20).await;
    let row = || json!([1, 2, 3, 4]);
    let a = || input("a", "FP32", json!([1, 3]), json!([1, 2, 3]));
    for (model, inputs, words) in [
        ("iris-1", json!([]), &["\"X\" is missing"][..]),
        ("iris-1", json!([input("Y", "FP32", json!([1, 4]), row())]), &["\"Y\"", "takes \"X\""]),
        ("iris-1", json!([input("X", "FP64", json!([1, 4]), row())]), &["\"X\"", "\"FP64\"", "wanted FP32"]),
        ("iris-1", json!([input("X", "FP32", json!([1, 5]), row())]), &["\"X\"", "[1, 5]", "[-1, 4]"]),
        ("iris-1", json!([input("X", "FP32", json!([4]), row())]), &["[4]", "[-1, 4]"]),
        ("iris-1", json!([input("X", "FP32", json!([-1, 4]), row())]), &["[-1, 4]"]),
        ("iris-1", json!([input("X", "FP32", json!([2, 4]), row())]), &["input \"X\"", "4 values", "takes 8"]),
        ("iris-1", json!([input("X", "FP32", json!([1, 4]), json!([1, 2, 3, 4, 5]))]), &["more values"]),
        (
            "iris-1",
            json!([input("X", "FP32", json!([1, 4]), json!([1, 2, 3, "4"]))]),
            &["input \"X\"", "value \"4\"", "FP32"],
        ),
        ("iris-1", json!([input("X", "FP32", json!([1, 4]), json!([1, 2, 3, 1e300]))]), &["not of type FP32"]),
        ("iris-1", json!([input("X", "FP32", json!([1, 4]), json!([{ "a": 1 }, 2, 3, 4]))]), &["values of type FP32"]),
        ("iris-1", json!([input("X", "FP32", json!([1_000_000_000_000_000_i64, 4]), row())]), &["more elements"]),
        ("iris-1", json!([input("X", "FP32", json!([100_000, 4]), row())]), &["fewer values", "400000"]),
        ("iris-1", json!([{ "name": "X", "datatype": "FP32", "shape": [1, 4] }]), &["neither data nor"]),
        (
            "iris-1",
            json!([{ "name": "X", "datatype": "FP32", "shape": [1, 4], "parameters": { "binary_data_size": 16 } }]),
            &["16", "0 bytes are left"],
        ),
        ("add", json!([a(), a()]), &["\"a\" is there twice"]),
        (
            "add",
            json!([a(), input("b", "FP32", json!([2, 3]), json!([1, 2, 3, 4, 5, 6]))]),
            &["\"b\"", "\"a\" has 1", "\"N\""],
        ),
        ("pick", json!([input("index", "INT64", json!([1]), json!([1.5]))]), &["value 1.5", "INT64"]),
        (
            "concat",
            json!([a(), input("b", "FP32", json!([2, 3]), json!([1, 2, 3, 4, 5, 6]))]),
            &["along axis \"batch\""],
        ),
        ("identity-int8", json!([input("x", "INT8", json!([1, 1]), json!([128]))]), &["value 128", "INT8"]),
        ("identity-bool", json!([input("x", "BOOL", json!([1, 1]), json!([2]))]), &["value 2", "BOOL"]),
        ("identity-bytes", json!([input("x", "BYTES", json!([1, 1]), json!([7]))]), &["value 7", "BYTES"]),
    ] {
        let (status, message) = post(&runtime, model, json!({ "inputs": inputs }).to_string()).await;
        assert_eq!(status, 400, "{message}");
        for word in words {
            assert!(message.contains(word), "{word} is not in: {message}");
        }
        assert!(message.len() < 300, "{message}");
    }
}

#[tokio::test]
async fn a_model_that_panics_takes_nothing_down() {
    let runtime = loaded(&["pick"], 1 << 20).await;
    let ask = |index: i64| json!({ "inputs": [input("index", "INT64", json!([1]), json!([index]))] }).to_string();
    let (status, message) = post(&runtime, "pick", ask(7)).await;
    assert!(status == 500 && message.contains("\"pick\" failed on these inputs"), "{message}");
    assert_eq!(post(&runtime, "pick", ask(2)).await.0, 200);
}

#[tokio::test]
async fn outputs_and_forms_that_do_not_exist_are_refused() {
    let runtime = loaded(&["add"], 1 << 20).await;
    let inputs = ["a", "b"].map(|name| input(name, "FP32", json!([1, 3]), json!([[1, 2, 3]])));
    let ask = |outputs: Value| json!({ "inputs": inputs, "outputs": outputs }).to_string();
    let (status, message) = post(&runtime, "add", ask(json!([{ "name": "total" }]))).await;
    assert!(status == 400 && message.contains("\"total\"") && message.contains("gives \"sum\""), "{message}");
    let (status, message) = post(&runtime, "add", ask(json!([{ "name": "sum" }, { "name": "sum" }]))).await;
    assert!(status == 400 && message.contains("twice"), "{message}");
    let (status, _) = post(&runtime, "add", ask(json!([{ "name": "sum", "parameters": null }]))).await;
    assert_eq!(status, 200);

    let deep = format!(r#"{{"inputs":{}}}"#, "[".repeat(100_000));
    let nested = ask(json!([])).replace("[[1,2,3]]", &format!("{}1,2,3{}", "[".repeat(5000), "]".repeat(5000)));
    for body in ["", "{", "[]", "null", "{}", r#"{"inputs":7}"#, r#"{"inputs":[7]}"#, "\u{0}", "NaN", &deep, &nested] {
        let (status, message) = post(&runtime, "add", body.to_owned()).await;
        assert_eq!(status, 400, "{message}");
    }

    let request =
        |method: &str, path: &str| http::Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
    for (method, path, wanted) in [
        ("GET", "/v2/models/add/infer", 405),
        ("POST", "/v2/models/add", 405),
        ("DELETE", "/v2/repository/models/add/load", 405),
        ("GET", "/", 404),
        ("GET", "/v3", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/add/versions/1/ready/now/or/never", 404),
        ("GET", "/v2/models/add/versions/2/ready", 404),
        ("GET", "/v2/models/nope/ready", 404),
    ] {
        assert_eq!(send(&runtime, request(method, path)).await.0, wanted, "{method} {path}");
    }
}

#[tokio::test]
async fn binary_data_that_does_not_add_up_is_refused() {
    let runtime = loaded(&["add", "identity-bytes"], 1 << 20).await;
    let ask = async |model: &str, json: Value, tail: &[u8], length: Option<&str>| {
        let json = json.to_string();
        let length = length.map_or_else(|| json.len().to_string(), str::to_owned);
        let request = http::Request::post(format!("/v2/models/{model}/infer"))
            .header("inference-header-content-length", length)
            .body(Body::from(Bytes::from([json.as_bytes(), tail].concat())));
        let (status, body) = send(&runtime, request.unwrap()).await;
        (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    };
    let binary = |name: &str, datatype: &str, shape: Value, size: u64| json!({ "name": name, "datatype": datatype, "shape": shape, "parameters": { "binary_data_size": size } });
    let row = |a: u64, b: u64| json!({ "inputs": [binary("a", "FP32", json!([1, 3]), a), binary("b", "FP32", json!([1, 3]), b)] });
    assert_eq!(ask("add", row(12, 12), &[0; 24], None).await.0, 200);
    for (json, tail, length, word) in [
        (row(12, 12), 23, None, "11 bytes are left"),
        (row(12, 12), 25, None, "belong to no input"),
        (row(8, 16), 24, None, "8 bytes, wanted 12"),
        (row(u64::MAX, 12), 24, None, "are left"),
        (row(12, 12), 24, Some("99999"), "more than"),
        (row(12, 12), 24, Some("-1"), "not a number"),
        (row(12, 12), 24, Some("5"), "not an inference request"),
    ] {
        let (status, message) = ask("add", json, &vec![0; tail], length).await;
        assert!(status == 400 && message.contains(word), "{word}: {message}");
    }
    for (shape, tail, word) in [
        (json!([1, 1]), &[1, 0, 0][..], "too few"),
        (json!([1, 1]), &[1, 0, 0, 0], "within a string"),
        (json!([1, 1]), &[255, 255, 255, 255, 1], "within a string"),
        (json!([1, 1]), &[1, 0, 0, 0, 255], "not UTF-8"),
        (json!([1, 1]), &[0, 0, 0, 0, 0], "after its last"),
        (json!([1, 100]), &[0; 8], "too few"),
    ] {
        let inputs = json!({ "inputs": [binary("x", "BYTES", shape, tail.len() as u64)] });
        let (status, message) = ask("identity-bytes", inputs, tail, None).await;
        assert!(status == 400 && message.contains(word), "{word}: {message}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_however_it_comes() {
    let runtime = loaded(&["add"], 1000).await;
    let (status, message) = post(&runtime, "add", vec![b' '; 1001]).await;
    assert!(status == 413 && message.contains("1000 bytes"), "{message}");
    // Without a length: frame by frame, and no more of them than are needed to know.
    let endless = futures::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(http_body::Frame::data(Bytes::from_static(&[b' '; 100])))
    });
    let request = http::Request::post("/v2/models/add/infer").body(Body::new(StreamBody::new(endless))).unwrap();
    assert_eq!(send(&runtime, request).await.0, 413);
    let request = http::Request::post("/v2/models/add/infer").header("content-encoding", "gzip").body(Body::empty());
    assert_eq!(send(&runtime, request.unwrap()).await.0, 415);
}

#[tokio::test]
async fn grpc_refuses_with_its_own_codes() {
    let runtime = loaded(&["add", "identity-fp16"], 10_000).await;
    let service = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let runtime = Arc::clone(&runtime);
        async move { runtime.call(request.map(Body::new)).await }
    });
    let mut client = GrpcInferenceServiceClient::new(service);
    let input = |name: &str, contents: Option<Vec<f32>>| InferInputTensor {
        name: name.to_owned(),
        datatype: "FP32".to_owned(),
        shape: vec![1, 3],
        contents: contents.map(|fp32_contents| InferTensorContents { fp32_contents, ..Default::default() }),
        ..Default::default()
    };
    let ask = |inputs: Vec<InferInputTensor>, raw: Vec<usize>| ModelInferRequest {
        model_name: "add".to_owned(),
        inputs,
        raw_input_contents: raw.into_iter().map(|size| vec![0; size].into()).collect(),
        ..Default::default()
    };
    let row = || Some(vec![1.0, 2.0, 3.0]);
    let fp16 = InferInputTensor { datatype: "FP16".to_owned(), ..input("x", None) };
    let with = |model: &str, version: &str, inputs: Vec<InferInputTensor>| ModelInferRequest {
        model_name: model.to_owned(),
        model_version: version.to_owned(),
        ..ask(inputs, vec![])
    };
    for (request, code, word) in [
        (
            ask(vec![input("a", row()), input("b", Some(vec![1.0]))], vec![]),
            Code::InvalidArgument,
            "1 values in fp32_contents",
        ),
        (ask(vec![input("a", None), input("b", row())], vec![]), Code::InvalidArgument, "0 values in fp32_contents"),
        (ask(vec![input("a", None), input("b", None)], vec![12]), Code::InvalidArgument, "1 entries for 2 inputs"),
        (
            ask(vec![input("a", None), input("b", row())], vec![12, 12]),
            Code::InvalidArgument,
            "send all inputs one way",
        ),
        (ask(vec![input("a", None), input("b", None)], vec![12, 13]), Code::InvalidArgument, "13 bytes, wanted 12"),
        (ask(vec![input("a", None), input("b", None)], vec![12, 20_000]), Code::OutOfRange, "too large"),
        (with("nope", "", vec![]), Code::NotFound, "\"nope\" is not loaded"),
        (with("add", "2", vec![]), Code::NotFound, "no version \"2\""),
        (with("identity-fp16", "1", vec![fp16]), Code::InvalidArgument, "raw_input_contents"),
    ] {
        let status = client.model_infer(request).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(word), "{word}: {status}");
    }
}

#[tokio::test]
async fn an_empty_batch_is_a_batch() {
    let runtime = loaded(&["identity-fp32", "add"], 1 << 20).await;
    let (status, answer) = post(
        &runtime,
        "identity-fp32",
        json!({ "inputs": [input("x", "FP32", json!([0, 7840]), json!([]))] }).to_string(),
    )
    .await;
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&answer["outputs"][0]["shape"], &answer["outputs"][0]["data"]), (&json!([0, 7840]), &json!([])));
}

#[tokio::test]
async fn what_json_cannot_say_is_null_both_ways() {
    let runtime = loaded(&["identity-fp32"], 1 << 20).await;
    let inputs = json!([input("x", "FP32", json!([1, 2]), json!([null, 1]))]);
    let (status, answer) = post(&runtime, "identity-fp32", json!({ "inputs": inputs }).to_string()).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.contains(r#""data":[null,1.0]"#), "{answer}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever comes: an answer, and never a fault of the server's own.
    #[test]
    fn no_body_is_a_fault_of_the_server(
        shape in prop::collection::vec(-2_i64..5, 0..4),
        data in "[0-9\\[\\],.e \"-]{0,40}",
        header in prop::option::of(0_usize..200),
        tail in prop::collection::vec(any::<u8>(), 0..20),
        size in prop::option::of(0_usize..30),
        datatype in prop::sample::select(vec!["FP32", "BYTES", "INT64", "fp32"]),
        model in prop::sample::select(vec!["identity-fp32", "identity-bytes", "identity-int64"]),
    ) {
        let parameters = size.map_or_else(|| "null".to_owned(), |size| format!(r#"{{"binary_data_size":{size}}}"#));
        let body = format!(
            r#"{{"inputs":[{{"name":"x","shape":{shape:?},"datatype":"{datatype}","parameters":{parameters},"data":{data}}}]}}"#
        );
        let body = body.replace(r#","data":}"#, "}");
        let mut request = http::Request::post(format!("/v2/models/{model}/infer"));
        if let Some(header) = header {
            request = request.header("inference-header-content-length", if header < 100 { body.len() } else { header });
        }
        let request = request.body(Body::from(Bytes::from([body.as_bytes(), &tail].concat()))).unwrap();
        let block = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let status = block.block_on(async {
            let runtime = loaded(&[model], 1 << 20).await;
            send(&runtime, request).await.0
        });
        prop_assert!(status == 200 || status == 400, "{status} to {body}");
    }
}
