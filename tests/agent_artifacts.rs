//! Artifacts arrive whole, once, checked and within their bounds.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    dead_code,
    reason = "a test stops where it fails, and shares a helper module"
)]

mod agent_world;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use agent_world::{World, entries, generation, register, unregister};
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::Semaphore;
use wharf::{
    agent::artifacts::{HttpSource, Patience, Transfers},
    domain::copy::{Failure, FailureClass, Progress, Report},
    ports::{ArtifactSource, FetchLimits, FetchRequest, Fetched, FetchedFile, ProgressSink, SystemClock},
};

const SECOND: Duration = Duration::from_secs(1);

/// A source whose fetches a test counts and lets go.
#[derive(Debug)]
struct Slow {
    fetches: AtomicUsize,
    go: Semaphore,
    path: &'static str,
}

impl ArtifactSource for Slow {
    fn schemes(&self) -> &[&str] {
        &["slow"]
    }

    fn fetch(&self, request: FetchRequest, progress: ProgressSink) -> BoxFuture<'_, Result<Fetched, Failure>> {
        async move {
            self.fetches.fetch_add(1, SeqCst);
            progress(Progress { done: 1, total: Some(2) });
            self.go.acquire().await.unwrap().forget();
            std::fs::write(request.into.join("size"), "3").unwrap();
            // SHA-256 of "3".
            let sha256 = "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce".to_owned();
            Ok(Fetched::Files { tag: None, files: vec![FetchedFile { path: self.path.to_owned(), bytes: 1, sha256 }] })
        }
        .boxed()
    }
}

fn slow(path: &'static str) -> Arc<Slow> {
    Arc::new(Slow { fetches: AtomicUsize::new(0), go: Semaphore::new(0), path })
}

#[tokio::test(start_paused = true)]
async fn who_wants_the_same_artifact_shares_its_fetch() {
    let source = slow("size");
    let (world, mut session) = World::with_sources(20, |_| {}, vec![Arc::clone(&source) as _]).await;
    let copies: Vec<_> = (1..=3).map(|uid| generation(uid, 1, 1)).collect();
    for (index, copy) in copies.iter().enumerate() {
        session.obeyed(&[register(&format!("m{index}"), *copy, 3, "slow://a")]).await;
    }
    session.until(copies[2], |report| matches!(report, Report::Downloading(_))).await;
    tokio::time::sleep(SECOND).await;
    assert_eq!(source.fetches.load(SeqCst), 1);
    // One of them gives up; the fetch goes on for the others.
    session.obeyed(&[unregister("m0", copies[0], SECOND)]).await;
    session.unloaded(copies[0]).await;
    source.go.add_permits(1);
    world.until(|world| copies[1..].iter().all(|copy| world.phase(*copy).as_deref() == Some("Resident"))).await;
    assert_eq!(source.fetches.load(SeqCst), 1);
    assert_eq!(world.agent.inspect()["artifacts"]["count"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_nobody_wants_any_more_ends() {
    let source = slow("size");
    let (_world, mut session) = World::with_sources(20, |_| {}, vec![Arc::clone(&source) as _]).await;
    let copy = generation(1, 1, 1);
    session.obeyed(&[register("m", copy, 3, "slow://a")]).await;
    session.until(copy, |report| matches!(report, Report::Downloading(_))).await;
    session.obeyed(&[unregister("m", copy, SECOND)]).await;
    session.unloaded(copy).await;
    source.go.add_permits(1);
    tokio::time::sleep(SECOND).await;
    assert_eq!(source.go.available_permits(), 1, "nobody took it");
    let again = generation(1, 1, 2);
    session.obeyed(&[register("m", again, 3, "slow://a")]).await;
    session.available(again).await;
    assert_eq!(source.fetches.load(SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_source_can_not_write_outside_of_its_artifact() {
    let source = slow("../../escaped");
    source.go.add_permits(1);
    let (world, mut session) = World::with_sources(20, |_| {}, vec![Arc::clone(&source) as _]).await;
    let copy = generation(1, 1, 1);
    session.obeyed(&[register("m", copy, 3, "slow://a")]).await;
    assert_eq!(session.failed(copy).await.class, FailureClass::Artifact);
    assert!(entries(&world.options.repository).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_cache_keeps_to_its_bytes_and_never_drops_what_is_used() {
    let (world, mut session) = World::new(100, |options| options.artifact_cache.0 = 4).await;
    // Each artifact is one file of one or two bytes: its size in digits.
    let copies = world.all_available(&mut session, &[10, 20]).await;
    let third = generation(3, 1, 1);
    session.obeyed(&[world.register("m2", third, 30)]).await;
    let failure = session.failed(third).await;
    assert!(failure.message.contains("cache larger"), "{}", failure.message);
    // What nobody uses any more makes room.
    session.obeyed(&[unregister("m0", copies[0], SECOND)]).await;
    session.unloaded(copies[0]).await;
    let fourth = generation(4, 1, 1);
    session.obeyed(&[world.register("m3", fourth, 30)]).await;
    session.available(fourth).await;
    let inspected = world.agent.inspect();
    assert_eq!(
        (inspected["artifacts"]["count"].as_u64(), inspected["artifacts"]["bytes"].as_u64()),
        (Some(2), Some(4))
    );
    assert_eq!(entries(&world.options.data_dir.join("artifacts/blobs")).len(), 2);
    assert_eq!(world.agent.metrics().artifacts_dropped.get(), 1);
}

// === HTTP ===

#[derive(Clone)]
struct Web(Arc<AtomicUsize>);

async fn model(State(web): State<Web>, headers: HeaderMap) -> Response {
    if headers.get(header::IF_NONE_MATCH).is_some_and(|tag| tag == "\"one\"") {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    web.0.fetch_add(1, SeqCst);
    ([(header::ETAG, "\"one\"")], "abc").into_response()
}

async fn web() -> (String, Arc<AtomicUsize>) {
    let served = Arc::new(AtomicUsize::new(0));
    let router = Router::new()
        .route("/a/m.onnx", get(model))
        .route("/secret/m.onnx", get(|| async { StatusCode::FORBIDDEN }))
        .route("/broken/m.onnx", get(|| async { StatusCode::INTERNAL_SERVER_ERROR }))
        .route("/large/m.onnx", get(|| async { vec![0_u8; 200] }))
        .route("/moved/m.onnx", get(|| async { axum::response::Redirect::temporary("/a/m.onnx") }))
        .with_state(Web(Arc::clone(&served)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (format!("http://{address}"), served)
}

fn http() -> HttpSource {
    let patience = Patience { tries: 2, first: Duration::from_millis(1), most: Duration::from_millis(1) };
    HttpSource::new(Arc::new(Transfers::new(4, 0, Arc::new(SystemClock::new())).with_patience(patience))).unwrap()
}

async fn fetch(uri: &str, known: Option<&str>) -> Result<Fetched, Failure> {
    let (into, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let request = FetchRequest {
        uri: uri.to_owned(),
        credentials: None,
        known: known.map(ToOwned::to_owned),
        into: into.path().to_owned(),
        notes: notes.path().to_owned(),
        limits: FetchLimits { bytes: 100, files: 1 },
    };
    let fetched = http().fetch(request, Arc::new(|_| {})).await?;
    if let Fetched::Files { files, .. } = &fetched {
        assert_eq!(std::fs::read(into.path().join(&files[0].path)).unwrap(), b"abc");
    }
    Ok(fetched)
}

#[tokio::test]
async fn a_file_is_fetched_over_http_and_known_by_its_tag() {
    let (base, served) = web().await;
    for path in ["/a/m.onnx", "/moved/m.onnx?token=t"] {
        let Fetched::Files { tag, files } = fetch(&format!("{base}{path}"), None).await.unwrap() else {
            panic!("fetched")
        };
        assert_eq!((tag.as_deref(), files[0].path.as_str(), files[0].bytes), (Some("\"one\""), "m.onnx", 3));
        assert_eq!(files[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
    assert_eq!(fetch(&format!("{base}/a/m.onnx"), Some("\"one\"")).await, Ok(Fetched::Unchanged));
    assert_eq!(served.load(SeqCst), 2);
}

#[tokio::test]
async fn what_the_web_refuses_is_told_apart() {
    let (base, _) = web().await;
    let failing = async |path: &str| fetch(&format!("{base}{path}"), None).await.expect_err(path);
    assert_eq!(failing("/secret/m.onnx?sig=hidden").await.class, FailureClass::Authorisation);
    assert!(!failing("/secret/m.onnx?sig=hidden").await.message.contains("hidden"));
    assert_eq!(failing("/nothing.onnx").await.class, FailureClass::Artifact);
    assert_eq!(failing("/broken/m.onnx").await.class, FailureClass::Artifact);
    assert!(failing("/large/m.onnx").await.message.contains("limit of 100 bytes"));
    assert!(failing("/folder/").await.message.contains("file name"));
    let unused = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    assert_eq!(fetch(&format!("http://{unused}/m"), None).await.expect_err("closed").class, FailureClass::Artifact);
}

#[tokio::test]
async fn a_pinned_digest_is_enforced() {
    let (base, _) = web().await;
    let source = http();
    let (world, mut session) = World::with_sources(20, |_| {}, vec![Arc::new(source)]).await;
    let right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let copy = generation(1, 1, 1);
    session.obeyed(&[register("m", copy, 3, &format!("{base}/a/m.onnx#sha256={}", "0".repeat(64)))]).await;
    let failure = session.failed(copy).await;
    assert!(failure.message.contains("not what was pinned"), "{}", failure.message);
    // The fake server finds no size in it; what counts is that it came so far.
    let second = generation(2, 1, 1);
    session.obeyed(&[register("n", second, 3, &format!("{base}/a/m.onnx#sha256={right}"))]).await;
    assert!(session.failed(second).await.message.contains("refused to load"));
    assert_eq!(world.agent.metrics().fetched.get(), 1);
}
