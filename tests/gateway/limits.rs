//! Slow, large, endless and vanishing clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use wharf::{
    forward::{Body, BoxError, ClientOptions, HttpUpstream, Limits, Request, TcpNetwork, Upstream as _},
    gateway::Options,
    ports::SystemClock,
};

use crate::harness::{Door, PATIENCE, World, get, grpc_message, grpc_post, model, post, until, version};

/// A door whose calls never end, and how many of them are there now.
fn stuck() -> (Arc<Door>, Arc<AtomicUsize>) {
    struct Present(Arc<AtomicUsize>);
    impl Drop for Present {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let present = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&present);
    let door = Door::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        let present = Present(Arc::clone(&count));
        async move {
            std::future::pending::<()>().await;
            drop(present);
            unreachable!()
        }
    });
    (door, present)
}

/// A gateway on a socket in front of `door`, and its address.
async fn opened(door: Arc<Door>, options: Options, limits: Limits) -> (World, String) {
    let mut world = World::with(Options { limits, ..options });
    let at = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    let address = world.open().await;
    (world, address)
}

async fn raw(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    // A server that has seen enough may close before all is written.
    stream.write_all(request).await.ok();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..read]);
            if answer.windows(4).any(|w| w == b"\r\n\r\n") {
                break;
            }
        }
    };
    timeout(PATIENCE, reading).await.expect("an answer or an end in time");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_request() {
    let (door, present) = stuck();
    let (world, address) = opened(door, Options::default(), Limits::default()).await;
    let mut stream = TcpStream::connect(&address).await.expect("connected");
    stream
        .write_all(b"POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi")
        .await
        .expect("sent");
    until("the request is at the door", || present.load(Ordering::SeqCst) == 1).await;
    drop(stream);
    until("the door's work was dropped", || present.load(Ordering::SeqCst) == 0).await;
    until("nothing is in flight", || world.metric(|m| &m.in_flight) == 0).await;
    assert_eq!(world.metric(|m| &m.rest.cancelled), 1);
}

#[tokio::test]
async fn a_grpc_client_that_goes_away_ends_its_request_behind_a_socket_too() {
    let (door, present) = stuck();
    let mut world = World::new();
    let at = world.remote(door).await;
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    let address = world.open().await;
    let client =
        HttpUpstream::new(&address, Arc::new(TcpNetwork), Arc::new(SystemClock::new()), ClientOptions::default());
    let client = client.expect("an address");
    let call = tokio::spawn(async move { client.call(grpc_post("ModelInfer", grpc_message("iris", "", 9))).await });
    until("the request is at the door", || present.load(Ordering::SeqCst) == 1).await;
    call.abort();
    until("the door's work was dropped", || present.load(Ordering::SeqCst) == 0).await;
    until("nothing is in flight", || world.metric(|m| &m.in_flight) == 0).await;
}

#[tokio::test]
async fn bodies_pass_without_being_gathered() {
    // What goes in comes out, piece by piece, and neither side ever ends.
    let door = Door::new(|request: Request| async move { Ok(http::Response::new(request.into_body())) });
    let mut world = World::new();
    let (local, remote) = (world.local("a", door.clone()), world.remote(door).await);
    for at in [local, remote] {
        world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
        let (sender, receiver) = futures::channel::mpsc::unbounded::<Result<Frame<Bytes>, BoxError>>();
        let request = post("/v2/models/iris/infer_stream", Body::new(StreamBody::new(receiver)));
        sender.unbounded_send(Ok(Frame::data(Bytes::from_static(b"start")))).expect("open");
        let response = timeout(PATIENCE, world.gateway.call(request)).await.expect("in time").expect("an answer");
        let mut body = response.into_body();
        let mut seen = 0;
        for round in 0..200 {
            let piece = Bytes::from(vec![b'x'; 1000]);
            sender.unbounded_send(Ok(Frame::data(piece))).expect("open");
            while seen < 5 + (round + 1) * 1000 {
                let frame = timeout(PATIENCE, body.frame()).await.expect("in time").expect("no end").expect("good");
                seen += frame.into_data().expect("data").len();
            }
        }
    }
}

#[tokio::test]
async fn clients_that_say_nothing_or_too_slowly_are_cut_off() {
    let limits = Limits { header_timeout: Duration::from_millis(300), ..Limits::default() };
    let (_world, address) = opened(Door::echo(), Options::default(), limits).await;
    for start in [&b""[..], b"P", b"PRI * HT", b"GET /v2/health/live HTTP/1.1\r\nhost:"] {
        let mut stream = TcpStream::connect(&address).await.expect("connected");
        stream.write_all(start).await.expect("sent");
        let mut rest = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("cut off").ok();
    }
    assert!(raw(&address, b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_header_of_a_mebibyte_is_431() {
    let (_world, address) = opened(Door::echo(), Options::default(), Limits::default()).await;
    let request = format!("GET /v2 HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "a".repeat(1 << 20));
    let answer = raw(&address, request.as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    // Small enough to be read in full, so that the answer surely arrives.
    let request = format!("GET /v2 HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "a".repeat(70 << 10));
    let answer = raw(&address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn ten_gibibytes_are_refused_before_one_byte_is_taken() {
    let door = Door::echo();
    let (_world, address) = opened(door.clone(), Options::default(), Limits::default()).await;
    let length = 10_u64 << 30;
    let answer = raw(
        &address,
        format!("POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n").as_bytes(),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(door.calls(), 0);
}

#[tokio::test]
async fn a_body_that_does_not_say_its_size_is_cut_at_the_limit() {
    let mut world = World::with(Options { body_limit: 10_000, ..Options::default() });
    let (local, remote) = (world.local("a", Door::echo()), world.remote(Door::echo()).await);
    for at in [local, remote] {
        world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
        let endless = || {
            Body::new(StreamBody::new(futures::stream::repeat_with(|| {
                Ok::<_, BoxError>(Frame::data(Bytes::from_static(&[b'x'; 999])))
            })))
        };
        let answer = world.ask(post("/v2/models/iris/infer", endless())).await;
        // A door that reads its body itself may answer in its own words first.
        assert!(answer.status == 413 || (answer.status == 400 && answer.body.contains("over the limit")), "{answer:?}");
        let fits = world.ask(post("/v2/models/iris/infer", "x".repeat(10_000))).await;
        assert_eq!(fits.status, 200);
    }
    // Of a gRPC stream each message counts.
    let small = grpc_message("iris", "", 6_000);
    let twice = Bytes::from([small.as_ref(), small.as_ref()].concat());
    assert_eq!(world.ask(grpc_post("ModelStreamInfer", twice.clone())).await.status, 200);
    let answer = world.ask(grpc_post("ModelInfer", twice)).await;
    assert!(answer.header("grpc-status") == "8" || answer.status == 400, "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn deadlines_end_requests() {
    let (door, present) = stuck();
    let world = World::with(Options { request_deadline: Duration::from_secs(5), ..Options::default() });
    let at = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    let answer = world.ask(post("/v2/models/iris/infer", "x")).await;
    assert_eq!(answer.status, 504);
    let mut request = grpc_post("ModelInfer", grpc_message("iris", "", 1));
    request.headers_mut().insert("grpc-timeout", "200m".parse().expect("valid"));
    let answer = world.ask(request).await;
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "4"));
    assert!(answer.header("grpc-message").contains("200ms"), "{answer:?}");
    assert_eq!(present.load(Ordering::SeqCst), 0);
    assert_eq!(world.metric(|m| &m.deadline_exceeded), 2);
}

#[tokio::test(start_paused = true)]
async fn answers_that_fall_silent_or_overrun_are_ended() {
    let door = Door::new(|request: Request| async move {
        let frames = futures::stream::unfold(0, |count| async move {
            if count == 3 {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_secs(4)).await;
            Some((Ok::<_, BoxError>(Frame::data(Bytes::from_static(b"x"))), count + 1))
        });
        let mut response = http::Response::new(Body::new(StreamBody::new(frames)));
        if let Some(kind) = request.headers().get("content-type") {
            response.headers_mut().insert("content-type", kind.clone());
        }
        Ok(response)
    });
    let world = World::with(Options { request_deadline: Duration::from_secs(5), ..Options::default() });
    let at = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    // REST: each piece earns another five seconds; then it is broken off.
    let mut body = world.gateway.call(post("/v2/models/iris/infer", "")).await.expect("an answer").into_body();
    for _ in 0..3 {
        assert!(body.frame().await.expect("a frame").is_ok());
    }
    assert!(body.frame().await.expect("an error").is_err());
    // gRPC: the client's deadline holds for the whole answer, and is said in trailers.
    let mut request = grpc_post("ModelStreamInfer", grpc_message("iris", "", 1));
    request.headers_mut().insert("grpc-timeout", "6S".parse().expect("valid"));
    let mut body = world.gateway.call(request).await.expect("an answer").into_body();
    assert!(body.frame().await.expect("a frame").expect("good").is_data());
    let trailers = body.frame().await.expect("a frame").expect("good").into_trailers().expect("trailers");
    assert_eq!(trailers["grpc-status"], "4");
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn too_many_requests_at_once_are_told_to_come_back() {
    let (door, present) = stuck();
    let world = World::with(Options { in_flight: 2, ..Options::default() });
    let at = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    let calls: Vec<_> = (0..2)
        .map(|_| {
            let gateway = Arc::clone(&world.gateway);
            tokio::spawn(async move { gateway.call(get("/v2/models/iris/infer")).await })
        })
        .collect();
    until("two are at the door", || present.load(Ordering::SeqCst) == 2).await;
    let answer = world.get("/v2/models/iris/infer").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    let answer = world.ask(grpc_post("ModelInfer", grpc_message("iris", "", 1))).await;
    assert_eq!(answer.header("grpc-status"), "8");
    for call in calls {
        call.abort();
    }
    until("there is room again", || world.metric(|m| &m.in_flight) == 0).await;
    assert_eq!(world.get("/v2/health/live").await.status, 200);
}

#[tokio::test]
async fn shutting_down_lets_requests_finish_and_cuts_off_those_that_do_not() {
    let (sender, receiver) = tokio::sync::watch::channel(false);
    let door = Door::new(move |request: Request| {
        let mut released = receiver.clone();
        async move {
            if request.uri().path().ends_with("infer") {
                released.wait_for(|released| *released).await.expect("open");
            } else {
                std::future::pending::<()>().await;
            }
            Ok(http::Response::new(Body::from("done")))
        }
    });
    let world = World::new();
    let at = world.local("a", door.clone());
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    let listener = wharf::ports::Network::bind(&TcpNetwork, "127.0.0.1:0").await.expect("a port");
    let address = listener.address();
    let stop = tokio_util::sync::CancellationToken::new();
    let limits = Limits { drain: Duration::from_millis(700), ..Limits::default() };
    let server = tokio::spawn(wharf::forward::serve(listener, Arc::clone(&world.gateway) as _, limits, stop.clone()));
    let ask = |path: &'static str| {
        let address = address.clone();
        tokio::spawn(async move { raw(&address, format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await })
    };
    let (good, bad) = (ask("/v2/models/iris/infer"), ask("/v2/models/iris/ready"));
    until("both are at the door", || door.calls() == 2).await;
    stop.cancel();
    sender.send_replace(true);
    assert!(good.await.expect("no panic").starts_with("HTTP/1.1 200"));
    assert_eq!(bad.await.expect("no panic"), "");
    timeout(PATIENCE, server).await.expect("ended").expect("no panic");
    assert!(TcpStream::connect(&address).await.is_err(), "the port is closed");
}

#[tokio::test]
async fn a_client_that_leaves_one_answer_unread_is_cut_off_though_its_connection_lives() {
    let door = Door::new(|_| async {
        let frames = futures::stream::repeat_with(|| Ok::<_, BoxError>(Frame::data(Bytes::from(vec![b'x'; 16_000]))));
        let mut response = http::Response::new(Body::new(StreamBody::new(frames)));
        response.headers_mut().insert("content-type", "application/grpc".parse().expect("valid"));
        Ok(response)
    });
    let limits = Limits { stall: Duration::from_millis(200), ..Limits::default() };
    let (world, address) = opened(door, Options::default(), limits).await;
    let clock = Arc::new(SystemClock::new());
    let client =
        HttpUpstream::new(&address, Arc::new(TcpNetwork), clock, ClientOptions::default()).expect("an address");
    let response = client.call(grpc_post("ModelStreamInfer", grpc_message("iris", "", 9))).await.expect("an answer");
    until("the gateway has cut it off", || world.metric(|m| &m.in_flight) == 0).await;
    drop(response);
    // And one that takes nothing at all from its socket.
    let mut stream = TcpStream::connect(&address).await.expect("connected");
    stream.write_all(b"GET /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    until("its request is under way", || world.metric(|m| &m.in_flight) == 1).await;
    until("the gateway has cut it off", || world.metric(|m| &m.in_flight) == 0).await;
}

#[tokio::test]
async fn how_requests_end_is_counted_by_class() {
    let door = Door::new(|request: Request| async move {
        let status = if request.uri().path().ends_with("ready") { 404 } else { 500 };
        Ok(crate::harness::text(http::StatusCode::from_u16(status).expect("valid"), "words"))
    });
    let world = World::new();
    let at = world.local("a", door);
    world.routes(vec![model("iris", vec![version(1, 1, &[&at])])]);
    world.get("/v2/models/iris/ready").await;
    world.get("/v2/models/iris/infer").await;
    world.get("/v2/models/nobody/infer").await;
    world.get("/v2/health/live").await;
    let rest = |of: fn(&wharf::gateway::Classes) -> &std::sync::atomic::AtomicU64| world.metric(|m| of(&m.rest));
    assert_eq!(
        (rest(|c| &c.ok), rest(|c| &c.client_error), rest(|c| &c.server_error), rest(|c| &c.cancelled)),
        (1, 2, 1, 0)
    );
    assert_eq!(world.metric(|m| &m.unknown_model), 1);
}
