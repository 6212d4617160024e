//! Bodies, headers and connections that are too large, too slow, cut off, or no protocol at all.

use std::{
    convert::Infallible,
    io,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream;
use http_body::Frame;
use http_body_util::StreamBody;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet, time::timeout};

use crate::{
    FLOWER, Tried,
    raw::{Came, Dice, PATIENCE, connect, exchange, framed, grpc, http2, read},
    up::said,
};

const TEN_GIB: u64 = 10 << 30;
const PIECE: usize = 64 << 10;
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// The gateway's limit in these tests.
const LIMIT: (&str, &str) = ("gateway.body_limit", "16Mi");

#[tokio::test]
async fn ten_gib_announced() {
    let tried = Tried::start(&[LIMIT]);
    let gateway = &tried.up.gateway;
    let head = format!("POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {TEN_GIB}\r\n\r\n");
    let came = exchange(gateway, head.as_bytes()).await;
    assert_eq!(came.status(), 413, "{came:?}");
    assert!(came.text.contains("limit") && came.text.contains("{\"error\":\""), "{came:?}");
    // 4 GiB is the most that one gRPC message can announce.
    let announced = [&[0, 0xff, 0xff, 0xff, 0xff][..], &framed(&[0x0a, 4, b'i', b'r', b'i', b's'])[5..]].concat();
    for (name, address) in tried.ports() {
        for path in [INFER, "/seldon.mlops.scheduler.Scheduler/LoadModel", "/wharf.agent.v1.AgentHub/Session"] {
            let answer = http2(address, grpc(address, path, announced.clone())).await;
            assert!(answer.refuses(), "{name} {path}: {answer:?}");
        }
    }
    tried.unharmed("10 GiB announced").await;
}

/// Sends up to 10 GiB in chunks until the server answers and ends; gives back what came, and how much it took.
async fn pour(address: &str, path: &str) -> (Came, u64) {
    let mut io = connect(address).await;
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    let (mut from, mut to) = io.into_split();
    let pouring = tokio::spawn(async move {
        let chunk = [format!("{PIECE:x}\r\n").as_bytes(), &[b' '; PIECE], b"\r\n"].concat();
        let mut taken = 0;
        while taken < TEN_GIB {
            match timeout(PATIENCE, to.write_all(&chunk)).await {
                Ok(Ok(())) => taken += PIECE as u64,
                Ok(Err(_)) => break,
                Err(_) => panic!("after {taken} bytes the server neither reads nor ends"),
            }
        }
        taken
    });
    let came = read(&mut from).await;
    drop(from);
    (came, pouring.await.unwrap())
}

/// The same over HTTP/2, in one gRPC message without an end.
async fn pour_http2(address: &str, path: &str) -> (String, u64) {
    let io = TokioIo::new(connect(address).await);
    let (mut send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let connection = tokio::spawn(connection);
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&taken);
    let piece = Bytes::from(vec![b' '; PIECE]);
    let body = stream::unfold(false, move |begun| {
        let (piece, count) = (piece.clone(), std::sync::Arc::clone(&count));
        async move {
            let sent = count.fetch_add(PIECE as u64, std::sync::atomic::Ordering::Relaxed);
            let data = if begun {
                piece
            } else {
                Bytes::from_static(&[
                    0, 0xff, 0xff, 0xff, 0xff, 0x0a, 4, b'i', b'r', b'i', b's', 0x3a, 0xff, 0xff, 0xff, 0xff, 0x0f,
                ])
            };
            (sent < TEN_GIB).then(|| (Ok::<_, Infallible>(Frame::data(data)), true))
        }
    });
    let request = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(Box::pin(body)))
        .unwrap();
    let answer = match timeout(PATIENCE, send.send_request(request)).await.expect("an answer in time") {
        Ok(response) => format!("{} {:?}", response.status(), response.headers()),
        Err(error) => format!("{error:?}"),
    };
    connection.abort();
    (answer, taken.load(std::sync::atomic::Ordering::Relaxed))
}

#[tokio::test]
async fn ten_gib_sent() {
    let tried = Tried::start(&[LIMIT]);
    for path in ["/v2/models/iris/infer", "/v2/models/nope/infer", "/v2/health/live", "/nowhere"] {
        let (came, taken) = pour(&tried.up.gateway, path).await;
        let wanted: &[u16] = if path.contains("iris") { &[413] } else { &[404, 413] };
        assert!(wanted.contains(&came.status()), "{path}: {came:?} after {taken} bytes");
        assert!(taken < 64 << 20, "{path}: {taken} bytes of a body were taken");
    }
    let (came, taken) = pour(&tried.up.page, "/metrics").await;
    assert!(came.status() >= 400 && taken < 64 << 20, "page: {came:?} after {taken} bytes");
    for (address, path) in [
        (&tried.up.gateway, INFER),
        (&tried.up.api, "/seldon.mlops.scheduler.Scheduler/LoadModel"),
        (&tried.up.agents, "/wharf.routes.v1.Routes/Watch"),
        (&tried.up.agents, "/wharf.agent.v1.AgentHub/Session"),
    ] {
        let (answer, taken) = pour_http2(address, path).await;
        assert!(answer.contains("grpc-status") || answer.contains("Error"), "{path}: {answer}");
        assert!(taken < 300 << 20, "{path}: {taken} bytes of a message were taken; {answer}");
    }
    tried.unharmed("10 GiB sent").await;
}

#[tokio::test]
async fn a_header_of_a_mebibyte() {
    let tried = Tried::start(&[]);
    let value = "x".repeat(1 << 20);
    for (name, address) in tried.ports() {
        let one = format!("GET /v2/models/iris/ready HTTP/1.1\r\nhost: x\r\nseldon-model: {value}\r\n\r\n");
        let many = (0..5000).map(|n| format!("h{n}: {}\r\n", "x".repeat(200))).collect::<String>();
        let many = format!("GET /metrics HTTP/1.1\r\nhost: x\r\n{many}\r\n");
        let path = format!("GET /v2/models/{value}/ready HTTP/1.1\r\nhost: x\r\n\r\n");
        for request in [one, many, path] {
            let came = exchange(address, request.as_bytes()).await;
            if matches!(name, "gateway" | "page") {
                // The end of the connection may overtake the answer, since much of the request is never read.
                assert!(matches!(came.status(), 414 | 431) || came.ended, "{name}: {came:?}");
            } else {
                assert!(came.ended, "{name} speaks HTTP/2 only: {came:?}");
            }
        }
        let mut request = grpc(address, INFER, framed(b""));
        request.headers_mut().insert("seldon-model", value.parse().unwrap());
        let answer = http2(address, request).await;
        assert!(answer.refuses(), "{name}: {answer:?}");
    }
    tried.unharmed("a header of 1 MiB").await;
}

/// Sends `first`, then a byte of `drip` each 200 ms, until the server ends the connection; how long it took.
async fn drip(address: String, first: Vec<u8>, drip: Vec<u8>) -> Result<Duration, String> {
    let started = Instant::now();
    let mut io = connect(&address).await;
    drop(io.write_all(&first).await);
    let (mut from, mut to) = io.into_split();
    let dripping = async {
        for byte in drip.iter().cycle() {
            if to.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let came = if drip.is_empty() {
        read(&mut from).await
    } else {
        tokio::select! {
            came = read(&mut from) => came,
            () = dripping => Came { ended: true, ..Came::default() },
        }
    };
    if came.ended || came.status() >= 400 {
        Ok(started.elapsed())
    } else {
        Err(format!("{address} still holds a connection that sent {:?}: {came:?}", String::from_utf8_lossy(&first)))
    }
}

#[tokio::test]
async fn slow_clients() {
    let settings = [("gateway.header_deadline", "2s"), ("gateway.request_deadline", "2s")];
    let tried = Tried::start(&settings);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut slow = JoinSet::new();
    for (_, address) in tried.ports() {
        for _ in 0..10 {
            // Nothing; a header that never ends; half a preface; a preface and no more; a body that never ends.
            slow.spawn(drip(address.to_owned(), Vec::new(), Vec::new()));
            slow.spawn(drip(address.to_owned(), b"GET /v2 HTTP/1.1\r\nhost: x\r\nx-slow: ".to_vec(), b"a".to_vec()));
            slow.spawn(drip(address.to_owned(), preface[..10].to_vec(), Vec::new()));
            slow.spawn(drip(address.to_owned(), preface.to_vec(), Vec::new()));
        }
    }
    let body = b"POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{".to_vec();
    for _ in 0..10 {
        slow.spawn(drip(tried.up.gateway.clone(), body.clone(), b" ".to_vec()));
        slow.spawn(drip(tried.up.gateway.clone(), body.clone(), Vec::new()));
    }
    // Meanwhile others are served.
    crate::infer(&tried.up);
    while let Some(ended) = slow.join_next().await {
        ended.unwrap().unwrap();
    }
    tried.unharmed("slow clients").await;
}

#[tokio::test]
async fn sessions_that_say_nothing() {
    let tried = Tried::start(&[]);
    let mut silent = JoinSet::new();
    for path in ["/wharf.agent.v1.AgentHub/Session", "/wharf.routes.v1.Routes/Watch"] {
        for _ in 0..20 {
            let address = tried.up.agents.clone();
            silent.spawn(async move {
                let io = TokioIo::new(connect(&address).await);
                let (mut send, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
                let connection = tokio::spawn(connection);
                let body = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
                let request = http::Request::post(format!("http://{address}{path}"))
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(body)
                    .unwrap();
                let answer = timeout(PATIENCE, send.send_request(request)).await.expect("an answer in time").unwrap();
                connection.abort();
                (path, answer.headers().get("grpc-status").cloned(), answer.headers().get("grpc-message").cloned())
            });
        }
    }
    while let Some(ended) = silent.join_next().await {
        let (path, status, message) = ended.unwrap();
        assert_eq!(status.as_ref().map(|status| status.as_bytes()), Some(&b"4"[..]), "{path}: {message:?}");
    }
    tried.unharmed("sessions that say nothing").await;
}

#[tokio::test]
async fn random_bytes() {
    let tried = Tried::start(&[]);
    let mut dice = Dice(0x5eed);
    let preface: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let count = if std::env::var("WHARF_PROVE").is_ok_and(|value| value == "1") { 3000 } else { 300 };
    for (_, address) in tried.ports() {
        let mut flying = JoinSet::new();
        for turn in 0..count {
            let mut bytes = match turn % 3 {
                0 => Vec::new(),
                1 => preface.to_vec(),
                _ => b"POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\n".to_vec(),
            };
            if turn % 3 == 1 {
                // Frames with a right length, and everything else wrong.
                for _ in 0..dice.below(8) {
                    let payload = dice.below(200);
                    let length = u32::try_from(payload).unwrap().to_be_bytes();
                    bytes.extend([length[1], length[2], length[3], dice.bytes(1)[0] % 12, dice.bytes(1)[0]]);
                    bytes.extend([0, 0, 0, dice.bytes(1)[0] % 8]);
                    bytes.extend(dice.bytes(payload));
                }
            } else {
                let more = dice.below(2000);
                bytes.extend(dice.bytes(more));
            }
            let address = address.to_owned();
            flying.spawn(async move {
                let mut io = connect(&address).await;
                drop(io.write_all(&bytes).await);
                // Whoever sends noise goes away soon, whether answered or not.
                drop(io.shutdown().await);
                drop(timeout(Duration::from_millis(500), read(&mut io)).await);
            });
            if flying.len() == 50 {
                flying.join_next().await.unwrap().unwrap();
            }
        }
        while let Some(ended) = flying.join_next().await {
            ended.unwrap();
        }
        crate::infer(&tried.up);
    }
    tried.unharmed("random bytes").await;
}

/// Asks and goes away: in the middle of the request, or before the answer.
async fn hang_up(address: String, turn: usize) -> io::Result<()> {
    let mut io: TcpStream = connect(&address).await;
    let head = |length: usize| {
        format!(
            "POST /v2/models/iris/infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    match turn % 3 {
        0 => io.write_all(format!("{}{FLOWER}", head(1_000_000)).as_bytes()).await?,
        1 => io.write_all(format!("{}{FLOWER}", head(FLOWER.len())).as_bytes()).await?,
        _ => io.write_all(head(100).as_bytes()).await?,
    }
    if turn.is_multiple_of(2) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Whatever is still unread makes this a reset, as of a client that was killed.
    Ok(())
}

#[tokio::test]
async fn clients_that_hang_up_hold_nothing() {
    let tried = Tried::start(&[("scheduler.drain_deadline", "1h")]);
    let mut clients = JoinSet::new();
    for turn in 0..100 {
        clients.spawn(hang_up(tried.up.gateway.clone(), turn));
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap().unwrap();
    }
    // A hold that is left would keep the copy for an hour.
    let output = tried.up.cli(&["model", "unload", "iris", "-w", "-t", "30"]);
    assert!(output.status.success(), "{}\n{}", said(&output), tried.up.tail());
    tried.up.load("iris", &crate::models().join("iris-1"));
    crate::infer(&tried.up);
}
