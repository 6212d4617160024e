//! Doors that do as told, and a gateway in front of them.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use http_body_util::BodyExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};
use wharf::{
    domain::{
        names::{ModelName, ReplicaId, ServerName},
        routes::{Absence, Endpoint, Epoch, Route, Snapshot, Target},
        version::{Generation, Uid, Version},
    },
    forward::{
        self, Body, ClientOptions, Connections, Limits, Registration, Request, Response, TcpNetwork, Upstream,
        UpstreamError,
    },
    gateway::{Gateway, Options},
    ports::{BoxIo, Listen, Network, SystemClock},
};

/// Long enough for anything that is to happen at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

type Answer = dyn Fn(Request) -> BoxFuture<'static, Result<Response, UpstreamError>> + Send + Sync;

/// A door that answers with a closure, and counts its calls.
pub(crate) struct Door {
    pub(crate) calls: AtomicUsize,
    answer: Box<Answer>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

impl Door {
    pub(crate) fn new<F, A>(answer: F) -> Arc<Self>
    where
        F: Fn(Request) -> A + Send + Sync + 'static,
        A: Future<Output = Result<Response, UpstreamError>> + Send + 'static,
    {
        Arc::new(Self { calls: AtomicUsize::new(0), answer: Box::new(move |request| Box::pin(answer(request))) })
    }

    /// One that answers with what it was asked: a line for the path and some headers, then the body.
    pub(crate) fn echo() -> Arc<Self> {
        Self::new(|request| async move { Ok(echo(request).await) })
    }

    /// One that refuses with `header`, without reading the body.
    pub(crate) fn refusing(header: http::HeaderName) -> Arc<Self> {
        Self::new(move |_| {
            let header = header.clone();
            async move {
                let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "the door says no");
                response.headers_mut().insert(header, "".parse().expect("valid"));
                Ok(response)
            }
        })
    }

    pub(crate) fn failing(started: bool) -> Arc<Self> {
        Self::new(move |_| async move {
            Err(UpstreamError { started, timed_out: false, message: "the door is broken".into() })
        })
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

impl Upstream for Door {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        (self.answer)(request)
    }
}

pub(crate) async fn echo(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let header = |name: &str| parts.headers.get(name).map_or("-", |v| v.to_str().expect("text")).to_owned();
    let head = format!(
        "{} {} copy={} served={} secret={}\n",
        parts.method,
        parts.uri.path_and_query().expect("a path"),
        header("x-wharf-copy"),
        header("seldon-internal-model"),
        header("x-wharf-secret"),
    );
    match body.collect().await {
        Ok(body) => text(StatusCode::OK, &(head + &String::from_utf8_lossy(&body.to_bytes()))),
        Err(error) => text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

pub(crate) fn text(status: StatusCode, text: &str) -> Response {
    let mut response = Response::new(Body::from(text.to_owned()));
    *response.status_mut() = status;
    response
}

/// A gateway and what it stands on.
pub(crate) struct World {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) doors: Arc<Connections>,
    registrations: Mutex<Vec<Registration>>,
    epoch: AtomicUsize,
    stop: Vec<DropGuard>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        Self::over(Arc::new(TcpNetwork), ClientOptions::default(), options)
    }

    pub(crate) fn over(network: Arc<dyn Network>, client: ClientOptions, options: Options) -> Self {
        let clock = Arc::new(SystemClock::new());
        let doors = Connections::new(network, Arc::clone(&clock) as _, client);
        let gateway = Gateway::new(options, Arc::clone(&doors), clock, 7);
        Self { gateway, doors, registrations: Mutex::default(), epoch: AtomicUsize::new(1), stop: Vec::new() }
    }

    /// Registers `door` in this process; answers its address.
    pub(crate) fn local(&self, name: &str, door: Arc<Door>) -> String {
        self.registrations.lock().expect("no panic").push(self.doors.register(name, door));
        format!("inproc:{name}")
    }

    /// Serves `door` on a socket; answers its address.
    pub(crate) async fn remote(&mut self, door: Arc<dyn Upstream>) -> String {
        let listener = TcpNetwork.bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.address();
        let stop = CancellationToken::new();
        self.stop.push(stop.clone().drop_guard());
        tokio::spawn(forward::serve(listener, door, Limits::default(), stop));
        address
    }

    /// Serves the gateway on a socket; answers its address.
    pub(crate) async fn open(&mut self) -> String {
        let listener = TcpNetwork.bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.address();
        let stop = CancellationToken::new();
        self.stop.push(stop.clone().drop_guard());
        tokio::spawn(Arc::clone(&self.gateway).serve(listener, stop));
        address
    }

    /// Replaces the table.
    pub(crate) fn routes(&self, routes: Vec<Route>) {
        let epoch = Epoch(self.epoch.fetch_add(1, Ordering::SeqCst) as u64);
        self.gateway.table().replace(Snapshot { epoch, routes });
    }

    pub(crate) async fn ask(&self, request: Request) -> Answered {
        let response = tokio::time::timeout(PATIENCE, self.gateway.call(request)).await.expect("an answer in time");
        Answered::read(response.expect("a gateway always answers")).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answered {
        self.ask(get(path)).await
    }

    pub(crate) fn metric(&self, of: impl Fn(&wharf::gateway::Metrics) -> &std::sync::atomic::AtomicU64) -> u64 {
        of(self.gateway.metrics()).load(Ordering::SeqCst)
    }
}

pub(crate) fn get(path: &str) -> Request {
    http::Request::get(path).body(Body::empty()).expect("a request")
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request {
    http::Request::post(path).body(body.into()).expect("a request")
}

/// A response, read whole.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: String,
}

impl Answered {
    pub(crate) async fn read(response: Response) -> Self {
        let (parts, body) = response.into_parts();
        let body = tokio::time::timeout(PATIENCE, body.collect()).await.expect("a body in time").expect("a good body");
        let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        Self { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

pub(crate) fn model(name: &str, targets: Vec<Target>) -> Route {
    Route { model: ModelName::new(name).expect("valid"), targets, absence: Absence::default() }
}

/// A version with a copy at each of `doors`, numbered from 1.
pub(crate) fn version(version: u32, weight: u32, doors: &[&str]) -> Target {
    let endpoints = doors.iter().zip(1..).map(|(door, number)| endpoint(version, number, door));
    Target { version: Version(version), weight, endpoints: endpoints.collect() }
}

pub(crate) fn endpoint(version: u32, number: u32, door: &str) -> Endpoint {
    Endpoint {
        generation: Generation { uid: Uid(9), version: Version(version), number },
        replica: ReplicaId::new(ServerName::new("mlserver").expect("valid"), number - 1),
        door: door.to_owned(),
        resident: true,
    }
}

/// One gRPC message with its prefix, of a request whose model is `name`.
pub(crate) fn grpc_message(name: &str, version: &str, payload: usize) -> Bytes {
    use prost::Message as _;
    let request = wharf::rpc::proto::inference::ModelInferRequest {
        model_name: name.into(),
        model_version: version.into(),
        raw_input_contents: vec![vec![5; payload].into()],
        ..Default::default()
    };
    let message = request.encode_to_vec();
    let mut bytes = vec![0];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    bytes.into()
}

pub(crate) fn grpc_post(method: &str, body: impl Into<Body>) -> Request {
    http::Request::post(format!("/inference.GRPCInferenceService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body.into())
        .expect("a request")
}

/// Waits until `done` holds.
pub(crate) async fn until(what: &str, done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("it never came about that {what}"));
}

/// A network with an address that is never reached.
#[derive(Debug)]
pub(crate) struct HalfDead;

impl Network for HalfDead {
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        TcpNetwork.bind(address)
    }

    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        if address == "black.hole:1" { Box::pin(std::future::pending()) } else { TcpNetwork.connect(address) }
    }
}
