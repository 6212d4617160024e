//! A world for an agent: an inference server, a scheduler and a network that a test holds in its hands.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes as Raw;
use futures::{FutureExt as _, future::BoxFuture};
use http_body_util::BodyExt as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use wharf::{
    agent::{Agent, Blocking, Deps, Options, artifacts::LocalSource},
    domain::{
        copy::Report,
        memory::{Bytes, Resources},
        names::{ModelName, ReplicaId, ServerName},
        order::Order,
        size::Trust,
        spec::ModelSpec,
        version::{Generation, Uid, Version},
    },
    forward::{Body, COPY, Request, Response, Upstream, UpstreamError},
    ports::{ArtifactSource, BoxIo, Listen, Network, SystemClock},
    rpc::{
        agent_wire::{CopyReport, order_to_wire, report_from_wire},
        proto::agent::{
            AgentMessage, HeartbeatAck, Orders, Recycle, SchedulerMessage, Welcome, agent_hub_server, agent_message,
            scheduler_message,
        },
    },
};

/// Longest wait of a test; its clock is virtual.
pub const PATIENCE: Duration = Duration::from_secs(300);

// === The inference server ===

#[derive(Debug, Default)]
pub struct Server(pub Mutex<ServerState>, pub watch::Sender<bool>);

#[derive(Debug, Default)]
pub struct ServerState {
    pub loaded: BTreeMap<String, u64>,
    pub in_flight: HashMap<String, u32>,
    pub log: Vec<String>,
    pub paths: Vec<String>,
    pub bodies: Vec<Raw>,
    pub most_bytes: u64,
    pub load_time: Duration,
    pub unload_time: Duration,
    pub ready_time: Duration,
    pub refuse_load: HashMap<String, (u16, &'static str)>,
    pub hang_load: bool,
    pub repository: PathBuf,
}

impl Server {
    fn with<T>(&self, edit: impl FnOnce(&mut ServerState) -> T) -> T {
        edit(&mut self.0.lock().unwrap())
    }

    pub fn edit(&self, edit: impl FnOnce(&mut ServerState)) {
        self.with(edit);
    }

    pub fn refuse(&self, served: &str, code: u16, text: &'static str) {
        self.edit(|state| {
            state.refuse_load.insert(served.to_owned(), (code, text));
        });
    }

    pub fn loads_of(&self, served: &str) -> usize {
        let wanted = format!("load {served}");
        self.with(|state| state.log.iter().filter(|line| **line == wanted).count())
    }

    pub fn is_loaded(&self, served: &str) -> bool {
        self.with(|state| state.loaded.contains_key(served))
    }

    /// Whether requests are answered, or wait.
    pub fn answer(&self, yes: bool) {
        self.1.send_replace(!yes);
    }

    async fn serve(&self, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        let grpc = request.headers().get("content-type").is_some_and(|kind| kind == "application/grpc");
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match parts.as_slice() {
            ["v2", "repository", "index"] => {
                let rows: Vec<_> = self.with(|state| {
                    state.loaded.keys().map(|name| serde_json::json!({"name": name, "state": "READY"})).collect()
                });
                Response::new(Body::from(serde_json::to_string(&rows).unwrap()))
            }
            ["v2", "repository", "models", name, "load"] => self.load(name).await,
            ["v2", "repository", "models", name, "unload"] => {
                let time = self.with(|state| {
                    assert_eq!(state.in_flight.get(*name).copied().unwrap_or(0), 0, "unloaded {name} under a hold");
                    state.unload_time
                });
                tokio::time::sleep(time).await;
                self.with(|state| {
                    assert_eq!(state.in_flight.get(*name).copied().unwrap_or(0), 0, "unloaded {name} under a hold");
                    state.log.push(format!("unload {name}"));
                    match state.loaded.remove(*name) {
                        Some(_) => status(200, ""),
                        None => status(404, "not loaded"),
                    }
                })
            }
            ["v2", "models", name, "ready"] => {
                tokio::time::sleep(self.with(|state| state.ready_time)).await;
                if self.is_loaded(name) { status(200, "") } else { status(404, "not loaded") }
            }
            ["v2", "models", name, "infer"] => self.infer(name).await,
            [_, "ModelInfer"] if grpc => {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                self.with(|state| state.bodies.push(body));
                let mut response = Response::new(Body::from("grpc"));
                response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
                response
            }
            _ => status(200, "server"),
        }
    }

    async fn load(&self, name: &str) -> Response {
        let (time, refused, hang) =
            self.with(|state| (state.load_time, state.refuse_load.get(name).copied(), state.hang_load));
        if hang {
            std::future::pending::<()>().await;
        }
        let size = self.with(|state| {
            state.log.push(format!("load {name}"));
            let folder = state.repository.join(name);
            let size = std::fs::read_to_string(folder.join("size")).unwrap_or_default().trim().parse().unwrap_or(0);
            if refused.is_none() {
                state.loaded.insert(name.to_owned(), size);
            }
            state.most_bytes = state.most_bytes.max(state.loaded.values().sum());
            size
        });
        tokio::time::sleep(time).await;
        match refused {
            Some((code, text)) => status(code, text),
            None if size == 0 => status(422, "no size file"),
            None => status(200, ""),
        }
    }

    async fn infer(&self, name: &str) -> Response {
        if !self.is_loaded(name) {
            return status(404, "not loaded");
        }
        self.with(|state| {
            *state.in_flight.entry(name.to_owned()).or_default() += 1;
            state.paths.push(format!("infer {name}"));
        });
        let _done = InFlight(self, name.to_owned());
        let mut closed = self.1.subscribe();
        closed.wait_for(|closed| !closed).await.unwrap();
        status(200, name)
    }
}

struct InFlight<'a>(&'a Server, String);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.with(|state| *state.in_flight.get_mut(&self.1).unwrap() -= 1);
    }
}

fn status(code: u16, text: &str) -> Response {
    http::Response::builder().status(code).body(Body::from(text.to_owned())).unwrap()
}

impl Upstream for Server {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        self.serve(request).map(Ok).boxed()
    }
}

// === The network, in memory ===

#[derive(Debug, Default)]
pub struct Net(Mutex<Option<mpsc::Sender<tokio::io::DuplexStream>>>);

impl Network for Net {
    fn bind<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        async { Err(io::Error::other("an agent does not listen")) }.boxed()
    }

    fn connect<'a>(&'a self, _: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        async {
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let to = self.0.lock().unwrap().clone().ok_or_else(refused)?;
            let (mine, theirs) = tokio::io::duplex(1 << 16);
            to.send(theirs).await.map_err(|_| refused())?;
            Ok(Box::new(mine) as BoxIo)
        }
        .boxed()
    }
}

// === The scheduler ===

/// One session, as the scheduler sees it.
pub struct Session {
    pub hello: wharf::rpc::proto::agent::Hello,
    pub said: mpsc::UnboundedReceiver<agent_message::Message>,
    pub out: mpsc::Sender<Result<SchedulerMessage, tonic::Status>>,
    pub epoch: u64,
}

impl Session {
    pub async fn order(&self, epoch: u64, orders: &[Order]) {
        let orders = orders.iter().map(order_to_wire).collect();
        let message = scheduler_message::Message::Orders(Orders { leader_epoch: epoch, orders });
        // A session that the agent left takes no more orders.
        drop(self.out.send(Ok(SchedulerMessage { message: Some(message) })).await);
    }

    /// Has the run of the inference server ended, by the leader of this epoch.
    pub async fn recycle(&self, epoch: u64, run: u64) {
        let message = scheduler_message::Message::Recycle(Recycle { leader_epoch: epoch, run });
        drop(self.out.send(Ok(SchedulerMessage { message: Some(message) })).await);
    }

    /// Orders as they come off the wire, whatever is in them.
    pub async fn order_raw(&self, orders: Vec<wharf::rpc::proto::agent::Order>) {
        let message = scheduler_message::Message::Orders(Orders { leader_epoch: self.epoch, orders });
        drop(self.out.send(Ok(SchedulerMessage { message: Some(message) })).await);
    }

    /// Reads until the agent says that it can't read an order, and gives its words.
    pub async fn misread(&mut self) -> String {
        let waiting = async {
            loop {
                let message = self.said.recv().await.expect("the session goes on");
                if let agent_message::Message::Misread(misread) = message {
                    return misread.problem;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("said")
    }

    pub async fn obeyed(&self, orders: &[Order]) {
        self.order(self.epoch, orders).await;
    }

    /// Reads until a report of `generation` is as wanted.
    pub async fn until(&mut self, generation: Generation, wanted: impl Fn(&Report) -> bool) -> Report {
        let waiting = async {
            loop {
                let message = self.said.recv().await.expect("the session goes on");
                if let agent_message::Message::Reports(reports) = message {
                    for report in reports.reports {
                        let report = report_from_wire(report).unwrap();
                        if report.generation == generation && wanted(&report.report) {
                            return report.report;
                        }
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("reported")
    }

    pub async fn available(&mut self, generation: Generation) {
        self.until(generation, |report| matches!(report, Report::Available { .. })).await;
    }

    pub async fn failed(&mut self, generation: Generation) -> wharf::domain::copy::Failure {
        match self.until(generation, |report| matches!(report, Report::Failed { freed: true, .. })).await {
            Report::Failed { failure, .. } => failure,
            other => panic!("{other:?}"),
        }
    }

    pub async fn unloaded(&mut self, generation: Generation) {
        self.until(generation, |report| *report == Report::Unloaded).await;
    }

    pub fn inventory(&self) -> Vec<CopyReport> {
        self.hello.inventory.iter().map(|one| report_from_wire(one.clone()).unwrap()).collect()
    }
}

#[derive(Clone)]
struct Hub {
    sessions: mpsc::UnboundedSender<Session>,
    leader: Arc<Mutex<(String, u64)>>,
    lease: Duration,
}

#[tonic::async_trait]
impl agent_hub_server::AgentHub for Hub {
    type SessionStream = ReceiverStream<Result<SchedulerMessage, tonic::Status>>;

    async fn session(
        &self,
        request: tonic::Request<tonic::Streaming<AgentMessage>>,
    ) -> Result<tonic::Response<Self::SessionStream>, tonic::Status> {
        let mut messages = request.into_inner();
        let Some(agent_message::Message::Hello(hello)) = messages.message().await?.and_then(|one| one.message) else {
            return Err(tonic::Status::invalid_argument("no hello"));
        };
        let (out, answers) = mpsc::channel(64);
        let (tell, said) = mpsc::unbounded_channel();
        let (lineage, epoch) = self.leader.lock().unwrap().clone();
        let welcome = Welcome {
            cluster: "test".to_owned(),
            lineage,
            leader_epoch: epoch,
            leader_started: 0,
            lease_millis: self.lease.as_millis() as u64,
            heartbeat_millis: 500,
        };
        let message = scheduler_message::Message::Welcome(welcome);
        out.send(Ok(SchedulerMessage { message: Some(message) })).await.unwrap();
        let acks = out.downgrade();
        tokio::spawn(async move {
            while let Ok(Some(AgentMessage { message: Some(message) })) = messages.message().await {
                if let agent_message::Message::Heartbeat(beat) = &message {
                    let ack = HeartbeatAck { sequence: beat.sequence, leader_epoch: epoch };
                    let message = scheduler_message::Message::Heartbeat(ack);
                    let Some(acks) = acks.upgrade() else { return };
                    drop(acks.send(Ok(SchedulerMessage { message: Some(message) })).await);
                }
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        drop(self.sessions.send(Session { hello, said, out, epoch }));
        Ok(tonic::Response::new(ReceiverStream::new(answers)))
    }
}

// === All of it ===

pub struct World {
    pub folder: tempfile::TempDir,
    pub server: Arc<Server>,
    pub agent: Arc<Agent>,
    pub door: Arc<dyn Upstream>,
    pub options: Options,
    net: Arc<Net>,
    leader: Arc<Mutex<(String, u64)>>,
    sessions: mpsc::UnboundedReceiver<Session>,
    hub: Hub,
    listening: Option<DropGuard>,
    stop: Option<DropGuard>,
    sources: Vec<Arc<dyn ArtifactSource>>,
}

impl World {
    /// A world whose replica has `capacity` bytes.
    pub async fn new(capacity: u64, edit: impl FnOnce(&mut Options)) -> (Self, Session) {
        let source = LocalSource::new(None, Blocking::Inline);
        Self::with_sources(capacity, edit, vec![Arc::new(source)]).await
    }

    pub async fn with_sources(
        capacity: u64,
        edit: impl FnOnce(&mut Options),
        sources: Vec<Arc<dyn ArtifactSource>>,
    ) -> (Self, Session) {
        Self::with_lease(capacity, edit, sources, Duration::from_secs(2)).await
    }

    /// A world whose scheduler may be silent so long; in real time the machine may be busy.
    pub async fn with_lease(
        capacity: u64,
        edit: impl FnOnce(&mut Options),
        sources: Vec<Arc<dyn ArtifactSource>>,
        lease: Duration,
    ) -> (Self, Session) {
        let folder = tempfile::tempdir().unwrap();
        let replica = ReplicaId::new(ServerName::new("mlserver").unwrap(), 0);
        let mut options = Options::new(replica, Resources::primary(Bytes(capacity)), folder.path().join("data"));
        options.blocking = Blocking::Inline;
        edit(&mut options);
        let server = Arc::new(Server::default());
        server.edit(|state| state.repository = options.repository.clone());
        let (tell, sessions) = mpsc::unbounded_channel();
        let leader = Arc::new(Mutex::new(("lineage-a".to_owned(), 5)));
        let hub = Hub { sessions: tell, leader: Arc::clone(&leader), lease };
        let net = Arc::new(Net::default());
        let agent = agent(&options, &net, &server, &sources);
        let door = agent.door();
        let mut world = Self {
            folder,
            server,
            agent,
            door,
            options,
            net,
            leader,
            sessions,
            hub,
            listening: None,
            stop: None,
            sources,
        };
        world.listen();
        world.start();
        let session = world.session().await;
        (world, session)
    }

    /// The scheduler comes up.
    pub fn listen(&mut self) {
        let (to, accepted) = mpsc::channel(4);
        *self.net.0.lock().unwrap() = Some(to);
        let stop = CancellationToken::new();
        let service = agent_hub_server::AgentHubServer::new(self.hub.clone());
        let incoming = tokio_stream::StreamExt::map(ReceiverStream::new(accepted), Ok::<_, io::Error>);
        let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                served = serving => served.unwrap(),
            }
        });
        self.listening = Some(stop.drop_guard());
    }

    /// The scheduler dies, with the session that the test holds.
    pub fn hang_up(&mut self, session: Session) {
        *self.net.0.lock().unwrap() = None;
        self.listening = None;
        drop(session);
    }

    pub fn leader(&self, lineage: &str, epoch: u64) {
        *self.leader.lock().unwrap() = (lineage.to_owned(), epoch);
    }

    fn start(&mut self) {
        let stop = CancellationToken::new();
        let (agent, stopped) = (Arc::clone(&self.agent), stop.clone());
        tokio::spawn(async move { agent.run("scheduler:9005".to_owned(), stopped).await.unwrap() });
        self.stop = Some(stop.drop_guard());
    }

    /// The agent dies without a word, and another takes its place.
    pub async fn restart_agent(&mut self) -> Session {
        self.stop = None;
        self.agent = agent(&self.options, &self.net, &self.server, &self.sources);
        self.door = self.agent.door();
        self.start();
        self.session().await
    }

    /// The next session.
    pub async fn session(&mut self) -> Session {
        tokio::time::timeout(PATIENCE, self.sessions.recv()).await.expect("the agent calls").expect("the hub lives")
    }

    /// No session comes for a while.
    pub async fn no_session(&mut self) {
        assert!(tokio::time::timeout(Duration::from_millis(50), self.sessions.recv()).await.is_err());
    }

    /// An artifact that takes `size` bytes of memory.
    pub fn artifact(&self, size: u64) -> String {
        let folder = self.folder.path().join(format!("artifact-{size}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("size"), size.to_string()).unwrap();
        folder.display().to_string()
    }

    /// The same, with settings for an `MLServer`.
    pub fn artifact_with_settings(&self, size: u64, settings: &str) -> String {
        let folder = self.folder.path().join(format!("with-settings-{size}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("size"), size.to_string()).unwrap();
        std::fs::write(folder.join("model-settings.json"), settings).unwrap();
        folder.display().to_string()
    }

    pub fn register(&self, model: &str, generation: Generation, size: u64) -> Order {
        register(model, generation, size, &self.artifact(size))
    }

    /// Registers `sizes.len()` models `m0`, `m1`, ... and waits until all are available.
    pub async fn all_available(&self, session: &mut Session, sizes: &[u64]) -> Vec<Generation> {
        let mut generations = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let generation = generation(index as u64 + 1, 1, 1);
            session.obeyed(&[self.register(&format!("m{index}"), generation, *size)]).await;
            session.available(generation).await;
            generations.push(generation);
        }
        generations
    }

    pub async fn infer(&self, model: &str, generation: Generation) -> Response {
        self.door.call(rest(model, Some(generation))).await.unwrap()
    }

    pub fn folder_of(&self, served: &str) -> PathBuf {
        self.options.repository.join(served)
    }

    pub fn phase(&self, generation: Generation) -> Option<String> {
        let all = self.agent.inspect();
        let copies = all["copies"].as_array().unwrap();
        let wanted = generation.to_string();
        copies.iter().find(|one| one["generation"] == wanted).map(|one| one["phase"].as_str().unwrap().to_owned())
    }

    /// Waits until `condition` holds.
    pub async fn until(&self, condition: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("never happened: {}", self.agent.inspect());
        }
    }
}

fn agent(options: &Options, net: &Arc<Net>, server: &Arc<Server>, sources: &[Arc<dyn ArtifactSource>]) -> Arc<Agent> {
    let deps = Deps {
        clock: Arc::new(SystemClock::new()),
        network: Arc::clone(net) as Arc<dyn Network>,
        server: Arc::clone(server) as Arc<dyn Upstream>,
        sources: sources.to_vec(),
    };
    Agent::new(options.clone(), deps)
}

pub fn generation(uid: u64, version: u32, number: u32) -> Generation {
    Generation { uid: Uid(uid), version: Version(version), number }
}

pub fn register(model: &str, generation: Generation, size: u64, uri: &str) -> Order {
    Order::Register {
        model: ModelName::new(model).unwrap(),
        generation,
        spec: Arc::new(ModelSpec { uri: uri.to_owned(), ..ModelSpec::default() }),
        need: Resources::primary(Bytes(size)),
        attempt: 0,
        measured: false,
        trust: Trust::Larger,
    }
}

pub fn unregister(model: &str, generation: Generation, drain: Duration) -> Order {
    Order::Unregister { model: ModelName::new(model).unwrap(), generation, drain }
}

pub fn rest(model: &str, copy: Option<Generation>) -> Request {
    let mut request = http::Request::post(format!("/v2/models/{model}/infer"));
    if let Some(copy) = copy {
        request = request.header(COPY, copy.to_string());
    }
    request.body(Body::from("{}")).unwrap()
}

pub async fn text(response: Response) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

pub fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|one| one.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
