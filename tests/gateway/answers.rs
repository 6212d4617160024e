//! Which copy is asked, and what a client is told when there is none.

use std::{collections::BTreeMap, time::Duration};

use http::StatusCode;
use wharf::{
    domain::{
        routes::{Absence, Epoch, Snapshot},
        time::Instant,
    },
    forward::{Body, RESIDENCY},
    ports::{Clock as _, SystemClock},
};

use crate::harness::{Door, World, endpoint, get, grpc_message, grpc_post, model, post, text, version};

#[tokio::test]
async fn a_model_is_found_by_path_by_header_and_by_message() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(2, 1, &[&door])]), model("wine", vec![version(1, 1, &[&door])])]);

    let answer = world.ask(post("/v2/models/iris/infer?x=1", "hello")).await;
    assert_eq!(answer.body, "POST /v2/models/iris/infer?x=1 copy=9.2.1 served=iris_2 secret=-\nhello");
    assert_eq!(answer.header("x-seldon-route"), ":iris_2:");

    let mut request = post("/v2/models/iris/infer", "hello");
    request.headers_mut().insert("seldon-model", "wine".parse().expect("valid"));
    request.headers_mut().insert("x-wharf-copy", "9.9.9".parse().expect("valid"));
    request.headers_mut().insert("x-wharf-secret", "mine".parse().expect("valid"));
    let answer = world.ask(request).await;
    assert_eq!(answer.body, "POST /v2/models/iris/infer copy=9.1.1 served=wine_1 secret=-\nhello");

    let message = grpc_message("iris", "", 10);
    let answer = world.ask(grpc_post("ModelInfer", message.clone())).await;
    assert!(answer.body.starts_with("POST /inference.GRPCInferenceService/ModelInfer copy=9.2.1 served=iris_2"));
    assert!(answer.body.ends_with(String::from_utf8_lossy(&message).as_ref()), "the message arrived changed");

    // With the header the message need not be looked at.
    let mut request = grpc_post("ModelInfer", "not a message");
    request.headers_mut().insert("seldon-model", "wine".parse().expect("valid"));
    assert!(world.ask(request).await.body.contains("served=wine_1"));
}

#[tokio::test]
async fn an_unknown_model_is_a_404_that_names_the_nearest() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(1, 1, &[&door])])]);
    let answer = world.get("/v2/models/irsi/infer").await;
    assert_eq!(answer.status, 404);
    assert!(
        answer.body.contains("\\\"irsi\\\"") && answer.body.contains("did you mean \\\"iris\\\""),
        "{}",
        answer.body
    );
    assert!(!world.get("/v2/models/something-else/infer").await.body.contains("did you mean"));

    let answer = world.ask(grpc_post("ModelInfer", grpc_message("irsi", "", 1))).await;
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "5"));
    assert!(answer.header("grpc-message").contains("\"iris\""));

    // In a large table too.
    let many = (0..2000).map(|n| model(&format!("model-{n}"), vec![version(1, 1, &[&door])])).collect();
    world.routes(many);
    assert!(world.get("/v2/models/modle-77/infer").await.body.contains("did you mean \\\"model-77\\\""));
}

#[tokio::test]
async fn names_that_are_none_are_refused() {
    let world = World::new();
    world.routes(vec![]);
    let answer = world.get("/v2/models/IRIS/infer").await;
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("lower-case"), "{}", answer.body);
    let named = |name: &'static str| {
        let mut request = get("/v2/models/x/infer");
        request.headers_mut().insert("seldon-model", http::HeaderValue::from_static(name));
        request
    };
    for (name, what) in [("a.experiment", "experiments"), ("a.pipeline", "pipelines")] {
        let answer = world.ask(named(name)).await;
        assert_eq!(answer.status, 404);
        assert!(answer.body.contains(what), "{}", answer.body);
    }
    assert_eq!(world.ask(named("")).await.status, 400);
    assert_eq!(world.ask(grpc_post("ModelInfer", grpc_message("", "", 1))).await.header("grpc-status"), "3");
    assert_eq!(world.ask(grpc_post("ModelInfer", Body::empty())).await.header("grpc-status"), "3");
    let mut compressed = grpc_message("iris", "", 1).to_vec();
    compressed[0] = 1;
    let answer = world.ask(grpc_post("ModelInfer", bytes::Bytes::from(compressed))).await;
    assert_eq!(answer.header("grpc-status"), "12");
    assert!(answer.header("grpc-message").contains("uncompressed"));
}

#[tokio::test]
async fn a_model_without_a_copy_is_a_503_that_says_why_and_when() {
    let world = World::new();
    let mut route = model("iris", vec![version(1, 1, &[])]);
    route.absence = Absence {
        state: "Loading".into(),
        reason: "2 of 3 GiB downloaded".into(),
        retry_at: Some(SystemClock::new().now() + Duration::from_millis(8500)),
        retry_after: None,
    };
    world.routes(vec![route.clone()]);
    let answer = world.get("/v2/models/iris/infer").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "9"));
    assert!(answer.body.contains("Loading: 2 of 3 GiB downloaded"), "{}", answer.body);
    let answer = world.ask(grpc_post("ModelInfer", grpc_message("iris", "", 1))).await;
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "14"));
    assert!(!answer.header("grpc-retry-pushback-ms").is_empty());

    route.absence.retry_at = Some(Instant::from_micros(0));
    world.routes(vec![route.clone()]);
    assert_eq!(world.get("/v2/models/iris/infer").await.header("retry-after"), "1");

    (route.absence.retry_at, route.absence.retry_after) = (None, Some(Duration::from_secs(30)));
    world.routes(vec![route]);
    assert_eq!(world.get("/v2/models/iris/infer").await.header("retry-after"), "30");
}

#[tokio::test]
async fn a_version_that_is_asked_for_is_the_one_that_answers() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(1, 1, &[&door]), version(2, 99, &[&door]), version(3, 0, &[])])]);
    for _ in 0..20 {
        assert_eq!(world.get("/v2/models/iris/versions/1/infer").await.header("x-seldon-route"), ":iris_1:");
    }
    let answer = world.get("/v2/models/iris/versions/7/infer").await;
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("in service: 1, 2, 3"), "{}", answer.body);
    assert_eq!(world.get("/v2/models/iris/versions/x/infer").await.status, 404);
    assert_eq!(world.get("/v2/models/iris/versions/3/infer").await.status, 503);
    let answer = world.ask(grpc_post("ModelInfer", grpc_message("iris", "1", 1))).await;
    assert_eq!(answer.header("x-seldon-route"), ":iris_1:");
}

#[tokio::test]
async fn weights_share_the_requests_and_a_client_may_stay_with_its_version() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(1, 3, &[&door]), version(2, 1, &[&door])])]);
    let mut got = BTreeMap::new();
    for _ in 0..2000 {
        let answer = world.get("/v2/models/iris/ready").await;
        *got.entry(answer.header("x-seldon-route").to_owned()).or_insert(0) += 1;
    }
    assert!((1400..1600).contains(&got[":iris_1:"]), "{got:?}");
    let with = |route: &'static str| {
        let mut request = get("/v2/models/iris/ready");
        request.headers_mut().insert("x-seldon-route", http::HeaderValue::from_static(route));
        request
    };
    for _ in 0..50 {
        assert_eq!(world.ask(with(":iris_2:")).await.header("x-seldon-route"), ":iris_2:");
    }
    // One that is not served any more, or never was, is no reason for an error.
    for stale in [":iris_9:", ":wine_1:", "x", ""] {
        assert_eq!(world.ask(with(stale)).await.status, 200);
    }
}

#[tokio::test]
async fn resident_copies_come_first_and_a_reload_is_remembered() {
    let world = World::new();
    let reloaded = Door::new(|_| async {
        let mut response = text(StatusCode::OK, "cold");
        response.headers_mut().insert(RESIDENCY, "reloaded".parse().expect("valid"));
        Ok(response)
    });
    let warm = Door::echo();
    let (a, b) = (world.local("a", warm.clone()), world.local("b", reloaded.clone()));
    let mut target = version(1, 1, &[]);
    let mut evicted = endpoint(1, 2, &b);
    evicted.resident = false;
    target.endpoints = vec![endpoint(1, 1, &a), evicted.clone()];
    world.routes(vec![model("iris", vec![target.clone()])]);
    for _ in 0..50 {
        world.get("/v2/models/iris/ready").await;
    }
    assert_eq!((warm.calls(), reloaded.calls()), (50, 0));
    target.endpoints[0].resident = false;
    world.routes(vec![model("iris", vec![target])]);
    for _ in 0..200 {
        let answer = world.get("/v2/models/iris/ready").await;
        assert_eq!(answer.header("x-wharf-residency"), "", "it is not the client's business");
    }
    // Once one of them was brought back, it gets the rest.
    assert!(reloaded.calls() > 190, "{}", reloaded.calls());
}

#[tokio::test]
async fn the_gateway_answers_for_itself() {
    let world = World::new();
    assert_eq!(world.get("/v2/health/live").await.status, 200);
    assert_eq!(world.get("/v2/health/ready").await.status, 503, "it has no routes yet");
    assert_eq!(world.get("/v2/models/iris/infer").await.status, 503, "it can't know what there is");
    world.gateway.table().replace(Snapshot { epoch: Epoch(1), routes: vec![] });
    assert_eq!(world.get("/v2/health/ready").await.status, 200);
    assert!(world.get("/v2").await.body.contains("\"name\":\"wharf\""));
    assert_eq!(world.get("/nothing").await.status, 404);
    let answer = world.ask(post("/v2/repository/models/iris/load", "{}")).await;
    assert_eq!(answer.status, 501);
    assert!(answer.body.contains("scheduler"), "{}", answer.body);
    let head = http::Request::head("/v2/health/live").body(Body::empty()).expect("a request");
    assert_eq!(world.ask(head).await.body, "");
    assert_eq!(world.ask(grpc_post("RepositoryIndex", "")).await.header("grpc-status"), "12");
    assert_eq!(world.ask(grpc_post("Nope", "")).await.header("grpc-status"), "12");
}

#[tokio::test]
async fn ids_and_traces_are_passed_on_or_made() {
    let world = World::new();
    let door = Door::new(|request| async move {
        let of = |name: &str| request.headers().get(name).map_or("-", |v| v.to_str().expect("text")).to_owned();
        Ok(text(StatusCode::OK, &format!("{} {}", of("x-request-id"), of("traceparent"))))
    });
    let door = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&door])])]);
    let answer = world.get("/v2/models/iris/ready").await;
    let (id, trace) = answer.body.split_once(' ').expect("two");
    assert_eq!(answer.header("x-request-id"), id);
    assert_eq!((id.len(), trace.len()), (32, 55));
    let mut request = get("/v2/models/iris/ready");
    request.headers_mut().insert("x-request-id", "mine".parse().expect("valid"));
    request.headers_mut().insert("traceparent", "theirs".parse().expect("valid"));
    let answer = world.ask(request).await;
    assert_eq!((answer.header("x-request-id"), answer.body.as_str()), ("mine", "mine theirs"));
}

#[tokio::test]
async fn what_differs_from_request_to_request_is_marked_to_stay_out_of_http2s_table() {
    let world = World::new();
    let door = Door::new(|request| async move {
        let marked = request.headers().iter().filter(|(_, value)| value.is_sensitive());
        let mut marked: Vec<&str> = marked.map(|(name, _)| name.as_str()).collect();
        marked.sort_unstable();
        Ok(text(StatusCode::OK, &marked.join(" ")))
    });
    let door = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&door])])]);
    let mut request = grpc_post("ModelInfer", grpc_message("iris", "", 10));
    request.headers_mut().insert("seldon-model", "iris".parse().expect("valid"));
    let answer = world.ask(request).await;
    assert_eq!(answer.body, "seldon-internal-model seldon-model traceparent x-request-id x-wharf-copy");
    assert!(answer.headers["x-seldon-route"].is_sensitive() && answer.headers["x-request-id"].is_sensitive());
}

#[tokio::test]
async fn what_it_knows_can_be_looked_at() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(1, 3, &[&door])])]);
    let seen = world.gateway.inspect();
    assert_eq!(seen["models"], 1);
    assert_eq!(seen["routes"][0]["targets"][0]["endpoints"][0]["copy"], "9.1.1");
    assert_eq!(seen["routes"][0]["targets"][0]["endpoints"][0]["replica"], "mlserver-0");
}
