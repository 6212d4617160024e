//! A request is sent again only when no inference server can have begun it, and then it arrives whole.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::FutureExt as _;
use http::StatusCode;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wharf::{
    domain::{
        names::ModelName,
        routes::{Changes, Epoch},
    },
    forward::{Body, BoxError, ClientOptions, HttpUpstream, NOT_HERE, NOT_STARTED, Request, TcpNetwork, Upstream as _},
    gateway::Options,
    ports::SystemClock,
};

use crate::harness::{Door, HalfDead, World, get, grpc_message, grpc_post, model, post, text, until, version};

fn chunked(parts: Vec<&'static str>) -> Body {
    let frames =
        parts.into_iter().map(|part| Ok::<_, BoxError>(http_body::Frame::data(Bytes::from_static(part.as_bytes()))));
    Body::new(StreamBody::new(futures::stream::iter(frames.collect::<Vec<_>>())))
}

#[tokio::test]
async fn not_here_goes_elsewhere_with_the_body_whole() {
    let mut world = World::new();
    let lost = Door::refusing(NOT_HERE);
    let good = Door::echo();
    for remote in [false, true] {
        let (a, b) = if remote {
            (world.remote(lost.clone()).await, world.remote(good.clone()).await)
        } else {
            (world.local("lost", lost.clone()), world.local("good", good.clone()))
        };
        world.routes(vec![model("iris", vec![version(1, 1, &[&a, &b])])]);
        for turn in 0..40 {
            let answer = world.ask(post("/v2/models/iris/infer", chunked(vec!["first, ", "second, ", "third"]))).await;
            assert_eq!(answer.status, 200, "remote {remote}, turn {turn}: {}", answer.body);
            assert!(answer.body.ends_with("\nfirst, second, third"), "{}", answer.body);
            assert!(!answer.headers.contains_key(NOT_HERE));
        }
        let message = grpc_message("iris", "", 5000);
        for _ in 0..20 {
            let answer = world.ask(grpc_post("ModelInfer", message.clone())).await;
            assert!(answer.body.ends_with(String::from_utf8_lossy(&message).as_ref()), "remote {remote}");
        }
    }
    assert!(lost.calls() > 20, "{}", lost.calls());
    assert_eq!(world.metric(|m| &m.not_here), lost.calls() as u64);
    assert_eq!(world.metric(|m| &m.retries), lost.calls() as u64);
}

#[tokio::test]
async fn each_copy_is_tried_once_and_the_doors_own_words_are_passed_on() {
    let world = World::new();
    let doors: Vec<_> = (0..4).map(|_| Door::refusing(NOT_STARTED)).collect();
    let names: Vec<_> = doors.iter().enumerate().map(|(i, door)| world.local(&i.to_string(), door.clone())).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    world.routes(vec![model("iris", vec![version(1, 1, &names[..2]), version(2, 1, &names[2..])])]);
    let answer = world.get("/v2/models/iris/infer").await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "the door says no"));
    assert!(!answer.headers.contains_key(NOT_STARTED));
    assert!(doors.iter().all(|door| door.calls() == 1));
}

#[tokio::test]
async fn what_may_have_begun_is_never_sent_again() {
    let world = World::new();
    let (bad, good) = (Door::failing(true), Door::echo());
    let (a, b) = (world.local("bad", bad.clone()), world.local("good", good.clone()));
    world.routes(vec![model("iris", vec![version(1, 1, &[&a, &b])])]);
    let mut failed = 0;
    for _ in 0..100 {
        let answer = world.get("/v2/models/iris/infer").await;
        failed += u32::from(answer.status == 503);
        assert!(answer.status == 200 || answer.body.contains("may have begun"), "{}", answer.body);
    }
    assert_eq!(bad.calls() as u32, failed);
    assert_eq!(bad.calls() + good.calls(), 100);
    assert!(failed > 0);
}

#[tokio::test]
async fn a_door_that_can_not_be_reached_costs_no_request() {
    let mut world = World::new();
    let good = world.remote(Door::echo()).await;
    // A port that was free a moment ago.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").to_string();
    let unregistered = "inproc:nobody";
    world.routes(vec![model("iris", vec![version(1, 1, &[&gone, &good, unregistered])])]);
    for _ in 0..50 {
        assert_eq!(world.ask(post("/v2/models/iris/infer", "x")).await.status, 200);
    }
    // A door that failed is not chosen again while there is another.
    assert!(world.metric(|m| &m.unreachable) < 20, "{}", world.metric(|m| &m.unreachable));
    world.routes(vec![model("iris", vec![version(1, 1, &[&gone, unregistered])])]);
    let answer = world.get("/v2/models/iris/infer").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    assert!(answer.body.contains("could be reached"), "{}", answer.body);
}

#[tokio::test]
async fn not_here_everywhere_waits_for_newer_routes() {
    let world = World::with(Options { route_wait: Duration::from_secs(20), ..Options::default() });
    let (lost, good) = (Door::refusing(NOT_HERE), Door::echo());
    let (a, b) = (world.local("lost", lost.clone()), world.local("good", good));
    world.routes(vec![model("iris", vec![version(1, 1, &[&a])]), model("wine", vec![])]);
    let gateway = Arc::clone(&world.gateway);
    let asking = tokio::spawn(async move { gateway.call(post("/v2/models/iris/infer", "x")).await });
    until("the door has refused", || lost.calls() > 0).await;
    // Another model's change is not what it waits for.
    let change = |epoch, route| Changes { epoch: Epoch(epoch), routes: vec![route], removed: vec![] };
    world.gateway.table().apply(change(50, model("wine", vec![version(1, 1, &[&b])]))).await.expect("newer");
    world.gateway.table().apply(change(51, model("iris", vec![version(1, 1, &[&b])]))).await.expect("newer");
    let response = asking.await.expect("no panic").expect("an answer");
    assert_eq!(response.status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_comes_back_to_where_it_was_is_found_there() {
    let world = World::new();
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (lost, good) = (Door::refusing(NOT_HERE), Door::echo());
    let door = Door::new({
        let (asked, lost, good) = (Arc::clone(&asked), Arc::clone(&lost), Arc::clone(&good));
        move |request: Request| {
            let there = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) >= 3;
            let door = Arc::clone(if there { &good } else { &lost });
            async move { door.call(request).await }
        }
    });
    let a = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&a])])]);
    let began = tokio::time::Instant::now();
    let answer = world.ask(post("/v2/models/iris/infer", "x")).await;
    assert_eq!((answer.status, lost.calls(), good.calls()), (200, 3, 1));
    assert_eq!(began.elapsed(), Duration::from_millis(5 + 5 + 10));
}

#[tokio::test(start_paused = true)]
async fn who_refused_is_not_asked_again_while_another_copy_is_waited_for() {
    let world = World::new();
    let (lost, full) = (Door::refusing(NOT_HERE), Door::refusing(NOT_STARTED));
    let (a, b) = (world.local("lost", lost.clone()), world.local("full", full.clone()));
    world.routes(vec![model("iris", vec![version(1, 1, &[&a, &b])])]);
    let answer = world.ask(post("/v2/models/iris/infer", "x")).await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "the door says no"));
    assert_eq!((full.calls(), lost.calls()), (1, 10));
}

#[tokio::test(start_paused = true)]
async fn not_here_everywhere_without_newer_routes_is_a_503() {
    let world = World::new();
    let lost = Door::refusing(NOT_HERE);
    let a = world.local("lost", lost.clone());
    world.routes(vec![model("iris", vec![version(1, 1, &[&a])])]);
    let answer = world.ask(post("/v2/models/iris/infer", "x")).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    // At once, after 5 ms, 10, 20 and so on, and at the end of the second.
    assert_eq!(lost.calls(), 10);
}

#[tokio::test]
async fn a_body_that_was_read_too_far_is_not_sent_again() {
    let world = World::with(Options { replay: 1000, ..Options::default() });
    let greedy = Door::new(|request: Request| async move {
        let read = request.into_body().collect().await.expect("a body").to_bytes();
        assert_eq!(read.len(), 2000);
        let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "");
        response.headers_mut().insert(NOT_STARTED, "".parse().expect("valid"));
        Ok(response)
    });
    let good = Door::echo();
    let (a, b) = (world.local("greedy", greedy.clone()), world.local("good", good.clone()));
    world.routes(vec![model("iris", vec![version(1, 1, &[&a, &b])])]);
    let mut refused = 0;
    for _ in 0..40 {
        let body = "x".repeat(2000);
        let answer = world.ask(post("/v2/models/iris/infer", body)).await;
        refused += usize::from(answer.status == 503);
        assert!(answer.status == 200 || answer.body.contains("too much of its body"), "{}", answer.body);
    }
    assert_eq!((refused, good.calls()), (greedy.calls(), 40 - refused));
    assert!(refused > 0);
}

#[tokio::test]
async fn a_route_that_is_taken_away_is_gone() {
    let world = World::new();
    let door = world.local("a", Door::echo());
    world.routes(vec![model("iris", vec![version(1, 1, &[&door])])]);
    let removed = vec![ModelName::new("iris").expect("valid")];
    world
        .gateway
        .table()
        .apply(Changes { epoch: Epoch(9), routes: vec![], removed: removed.clone() })
        .await
        .expect("newer");
    assert_eq!(world.get("/v2/models/iris/infer").await.status, 404);
    let stale = Changes { epoch: Epoch(9), routes: vec![model("iris", vec![version(1, 1, &[&door])])], removed };
    assert_eq!(world.gateway.table().apply(stale).await, None);
    assert_eq!(world.get("/v2/models/iris/infer").await.status, 404);
    assert_eq!(world.gateway.inspect()["models"], 0);
}

fn client(address: &str) -> HttpUpstream {
    HttpUpstream::new(address, Arc::new(TcpNetwork), Arc::new(SystemClock::new()), ClientOptions::default())
        .expect("an address")
}

#[tokio::test]
async fn a_connection_is_used_again_and_a_closed_one_costs_nothing() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    // Each connection answers twice, then closes.
    let connections = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            for _ in 0..2 {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.expect("a request"));
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.expect("taken");
            }
        }
    });
    let client = client(&address);
    for left in [1, 0, 1, 0, 1, 0] {
        let response = client.call(get("/")).await.expect("an answer");
        assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "ok");
        // A request that meets the closing on its way would rightly fail.
        until("the connection is free, or known to be closed", || {
            format!("{client:?}").contains(&format!("idle: {left}"))
        })
        .await;
    }
    let made = connections.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(made, 3);
    server.abort();
}

#[tokio::test]
async fn whether_it_began_is_known_exactly() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").to_string();
    let error = client(&gone).call(get("/")).await.expect_err("refused");
    assert!(!error.started, "{error}");
    assert!(error.message.contains(&gone));
    // One that reads the request and hangs up may have begun.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let mut buffer = [0; 1024];
        assert!(stream.read(&mut buffer).await.expect("a request") > 0);
    });
    let error = client(&address).call(get("/")).await.expect_err("hung up");
    assert!(error.started, "{error}");
    server.await.expect("no panic");
    assert!(
        HttpUpstream::new("nowhere", Arc::new(TcpNetwork), Arc::new(SystemClock::new()), ClientOptions::default())
            .is_err()
    );
}

#[tokio::test]
async fn an_answer_that_is_given_up_closes_its_connection() {
    let mut world = World::new();
    let (gone, dropped) = futures::channel::oneshot::channel::<()>();
    let gone = std::sync::Mutex::new(Some(gone));
    let endless = Door::new(move |_| {
        let gone = gone.lock().expect("no panic").take();
        async move {
            let frames = futures::stream::unfold(gone, |gone| async {
                tokio::task::yield_now().await;
                Some((Ok::<_, BoxError>(http_body::Frame::data(Bytes::from_static(b"more "))), gone))
            });
            Ok(http::Response::new(Body::new(StreamBody::new(frames))))
        }
    });
    let address = world.remote(endless).await;
    let client = client(&address);
    let mut body = client.call(get("/")).await.expect("an answer").into_body();
    body.frame().await.expect("a frame").expect("good");
    drop(body);
    tokio::time::timeout(crate::harness::PATIENCE, dropped.map(drop)).await.expect("the server noticed");
    assert!(format!("{client:?}").contains("idle: 0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_door_that_shuts_down_gracefully_costs_no_grpc_request() {
    let mut world = World::new();
    let steady = world.remote(Door::echo()).await;
    let gateway = Arc::clone(&world.gateway);
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let done = tokio_util::sync::CancellationToken::new();
    let mut clients = tokio::task::JoinSet::new();
    world.routes(vec![model("iris", vec![version(1, 1, &[&steady])])]);
    for _ in 0..8 {
        let (gateway, asked, done) = (Arc::clone(&gateway), Arc::clone(&asked), done.clone());
        clients.spawn(async move {
            while !done.is_cancelled() {
                let response = gateway.call(grpc_post("ModelInfer", grpc_message("iris", "", 100))).await;
                let response = response.expect("a gateway always answers");
                assert_eq!(response.headers().get("grpc-status"), None, "{:?}", response.headers());
                response.into_body().collect().await.expect("whole");
                asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
    }
    for _ in 0..20 {
        let listener = wharf::ports::Network::bind(&TcpNetwork, "127.0.0.1:0").await.expect("a port");
        let leaving = listener.address();
        let stop = tokio_util::sync::CancellationToken::new();
        let server = tokio::spawn(wharf::forward::serve(listener, Door::echo(), Default::default(), stop.clone()));
        world.routes(vec![model("iris", vec![version(1, 1, &[&steady, &leaving])])]);
        let before = asked.load(std::sync::atomic::Ordering::SeqCst);
        until("requests flow", || asked.load(std::sync::atomic::Ordering::SeqCst) > before + 50).await;
        stop.cancel();
        tokio::time::timeout(crate::harness::PATIENCE, server).await.expect("ended").expect("no panic");
    }
    done.cancel();
    while let Some(client) = clients.join_next().await {
        client.expect("no request failed");
    }
}

#[tokio::test]
async fn a_stream_that_was_refused_unseen_has_not_begun_and_any_other_reset_has() {
    for (reason, started) in [(h2::Reason::REFUSED_STREAM, false), (h2::Reason::INTERNAL_ERROR, true)] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        respond.send_reset(reason);
                    }
                });
            }
        });
        let client = client(&address);
        let error = client.call(grpc_post("ModelInfer", grpc_message("iris", "", 10))).await.expect_err("reset");
        assert_eq!(error.started, started, "{reason:?}: {error}");
        // The gateway acts on it.
        let mut world = World::new();
        let good = world.remote(Door::echo()).await;
        world.routes(vec![model("iris", vec![version(1, 1, &[&address, &good])])]);
        let mut failed = false;
        for _ in 0..30 {
            let answer = world.ask(grpc_post("ModelInfer", grpc_message("iris", "", 10))).await;
            failed |= answer.header("grpc-status") == "14";
        }
        assert_eq!(failed, started, "{reason:?}");
        server.abort();
    }
}

#[tokio::test]
async fn what_waits_for_a_connection_that_fails_fails_with_it() {
    let options = ClientOptions { connect_timeout: Duration::from_millis(300), ..ClientOptions::default() };
    let client = HttpUpstream::new("black.hole:1", Arc::new(HalfDead), Arc::new(SystemClock::new()), options);
    let client = client.expect("an address");
    let calls = (0..200).map(|_| client.call(grpc_post("ModelInfer", grpc_message("iris", "", 10))));
    // One after the other they would take a minute.
    let outcomes = tokio::time::timeout(crate::harness::PATIENCE, futures::future::join_all(calls)).await;
    for outcome in outcomes.expect("in time") {
        assert!(!outcome.expect_err("nobody is there").started);
    }
}
