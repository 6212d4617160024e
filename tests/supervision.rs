//! A panic in one model's handler ends that actor and nothing else: it is logged, the actor is rebuilt from
//! the journal, and no request to any other model notices.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test stops where it fails"
)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use http_body_util::BodyExt as _;
use tokio_util::sync::CancellationToken;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt as _};
use wharf::{
    actors::{Spawner, Timing},
    agent::{self, Blocking, artifacts::LocalSource},
    app::{
        World,
        replica::{self, DoorAt},
        scheduler,
    },
    domain::{
        memory::{Bytes, Resources},
        model::Policy,
        names::{ReplicaId, ServerName},
    },
    forward::{Body, ClientOptions, Connections, TcpNetwork, Upstream},
    gateway::{self, Gateway},
    ports::{Clock, Identity, SystemClock},
    rpc::proto::{scheduler as seldon, wharf as wire},
    runtime::{self, Execution, Runtime},
    store::MemoryStore,
    telemetry::metrics::{Metrics, Role},
};

const MODELS: usize = 100;
const VICTIM: &str = "victim";
const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps what is logged, and panics inside the handler that logs a chosen event.
#[derive(Clone, Default)]
struct Log(Arc<LogState>);

#[derive(Default)]
struct LogState {
    lines: Mutex<Vec<BTreeMap<String, String>>>,
    armed: AtomicBool,
}

struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").trim_matches('"').to_owned());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields(BTreeMap::new());
        event.record(&mut fields);
        let line = fields.0;
        let about_the_victim = line.get("subject").is_some_and(|subject| subject == "model/victim");
        self.0.lines.lock().unwrap().push(line);
        if about_the_victim && self.0.armed.swap(false, Ordering::SeqCst) {
            panic!("the test struck here");
        }
    }
}

impl Log {
    /// Events of the supervision log about the victim's actor.
    fn supervision(&self, event: &str) -> Vec<BTreeMap<String, String>> {
        let lines = self.0.lines.lock().unwrap();
        let wanted = |line: &&BTreeMap<String, String>| {
            line.get("event").is_some_and(|name| name == event)
                && line.get("actor").is_some_and(|actor| actor == "model/victim")
        };
        lines.iter().filter(wanted).cloned().collect()
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

fn request(model: &str) -> wharf::forward::Request {
    let body = r#"{"inputs":[{"name":"X","shape":[1,4],"datatype":"FP32","data":[5.1,3.5,1.4,0.2]}]}"#;
    http::Request::post(format!("/v2/models/{model}/infer"))
        .header("content-type", "application/json")
        .body(Body::from(body))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_panic_in_one_model_is_logged_and_mended_and_no_other_notices() {
    let log = Log::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(log.clone())).unwrap();
    let network = Arc::new(TcpNetwork);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let world = World { network: Arc::clone(&network) as _, clock: Arc::clone(&clock) };
    let shutdown = CancellationToken::new();
    let died = Arc::new(Mutex::new(None));
    let (send, receive) = std::sync::mpsc::channel();
    // Actors on threads of their own, as in the product.
    std::thread::spawn(move || {
        actix_rt::System::new().block_on(async move {
            send.send(Spawner::arbiters(2)).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let metrics = Arc::new(Metrics::new(&[Role::Scheduler], false));
    let options = scheduler::Options {
        api: "127.0.0.1:0".to_owned(),
        agents: "127.0.0.1:0".to_owned(),
        store: Arc::new(MemoryStore::new(Identity { cluster: "c".to_owned(), lineage: "l".to_owned() })),
        blocking: false,
        spawner: receive.recv().unwrap(),
        policy: Policy::default(),
        timing: Timing::default(),
        events: 10_000,
        metrics: Arc::clone(&metrics),
    };
    let last_words = Arc::clone(&died);
    let fatal = Arc::new(move |why: String| drop(last_words.lock().unwrap().replace(why)));
    let running = scheduler::start(&world, options, fatal, shutdown.clone()).await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let connections = Connections::new(Arc::clone(&network) as _, Arc::clone(&clock), ClientOptions::default());
    let id = ReplicaId::new(ServerName::new("onnx").unwrap(), 0);
    let mut options = agent::Options::new(id, Resources::primary(Bytes(1 << 30)), folder.path().to_owned());
    options.capabilities = vec!["onnx".to_owned()];
    let server = Runtime::new(runtime::Options {
        repository: options.repository.clone(),
        execution: Execution::Pool { threads: 2 },
        limits: runtime::Limits::default(),
    });
    let sources: Vec<Arc<dyn wharf::ports::ArtifactSource>> = vec![Arc::new(LocalSource::new(None, Blocking::Pool))];
    let door = DoorAt::InProcess(&connections);
    let _replica = replica::start(&world, options, server, sources, door, running.agents.clone(), &shutdown);
    let gateway = Gateway::new(gateway::Options::default(), connections, clock, 7);
    let following = Arc::clone(&gateway).follow(network, running.agents.clone(), shutdown.clone());
    let following = tokio::spawn(following);

    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", running.api)).unwrap();
    let api = wire::wharf_client::WharfClient::new(endpoint.connect().await.unwrap());
    let names: Vec<String> = (0..MODELS).map(|index| format!("m{index}")).chain([VICTIM.to_owned()]).collect();
    let submit = |name: String| {
        let mut api = api.clone();
        async move {
            let model = seldon::Model {
                meta: Some(seldon::MetaData { name, ..Default::default() }),
                model_spec: Some(seldon::ModelSpec {
                    uri: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/iris-1").to_owned(),
                    requirements: vec!["onnx".to_owned()],
                    memory_bytes: Some(1 << 20),
                    ..Default::default()
                }),
                deployment_spec: Some(seldon::DeploymentSpec { replicas: 1, ..Default::default() }),
                ..Default::default()
            };
            api.submit_model(wire::SubmitModelRequest { model: Some(model), rollout: None }).await.unwrap();
        }
    };
    join_all(names.iter().cloned().map(submit)).await;
    for name in &names {
        eventually(&format!("{name} answers"), async || gateway.call(request(name)).await.unwrap().status() == 200)
            .await;
    }

    // Constant traffic to all the others.
    let (answered, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
    let stop = CancellationToken::new();
    let traffic: Vec<_> = (0..8)
        .map(|worker| {
            let (gateway, stop) = (Arc::clone(&gateway), stop.clone());
            let (answered, failed) = (Arc::clone(&answered), Arc::clone(&failed));
            tokio::spawn(async move {
                let mut turn = worker;
                while !stop.is_cancelled() {
                    turn = (turn + 7) % MODELS;
                    let response = gateway.call(request(&format!("m{turn}"))).await.unwrap();
                    let status = response.status();
                    let body = response.into_body().collect().await.unwrap().to_bytes();
                    if status == 200 {
                        answered.fetch_add(1, Ordering::Relaxed);
                    } else {
                        failed.lock().unwrap().push((status, body));
                        // A refusal comes without a wait: asking on would starve what it waits for.
                        return;
                    }
                }
            })
        })
        .collect();
    eventually("traffic flows", async || answered.load(Ordering::Relaxed) > 200).await;

    log.0.armed.store(true, Ordering::SeqCst);
    // The rescaling makes the victim's actor write about itself, and the log's layer panics there.
    let scaled = api.clone().scale_model(wire::ScaleModelRequest { name: VICTIM.to_owned(), replicas: 2 }).await;
    assert!(scaled.is_err(), "the answer comes after what the panic cut short");
    eventually("the restart is logged", async || !log.supervision("actor_restarted").is_empty()).await;
    let panicked = log.supervision("actor_panicked");
    assert_eq!(panicked.len(), 1, "{panicked:?}");
    assert!(panicked[0]["cause"].starts_with("the test struck here at "), "{panicked:?}");
    let restarted = log.supervision("actor_restarted");
    assert_eq!((restarted.len(), restarted[0]["restarts"].as_str()), (1, "1"), "{restarted:?}");

    // What was durable when it panicked is wanted by the actor that came after it.
    let view = || async {
        let list = wire::ListModelsRequest { name: Some(VICTIM.to_owned()), terminated: false };
        api.clone().list_models(list).await.ok()?.into_inner().message().await.ok()?
    };
    eventually("the rebuilt actor knows what was wanted", async || {
        view().await.is_some_and(|view| view.wanted == 2 && view.available == 1)
    })
    .await;
    assert_eq!(gateway.call(request(VICTIM)).await.unwrap().status(), 200);
    let before = answered.load(Ordering::Relaxed);
    eventually("traffic goes on", async || answered.load(Ordering::Relaxed) > before + 200).await;
    stop.cancel();
    join_all(traffic).await;
    let failed = std::mem::take(&mut *failed.lock().unwrap());
    assert!(failed.is_empty(), "{} requests failed, first {:?}", failed.len(), failed.first());
    assert_eq!(*died.lock().unwrap(), None, "one panic is no reason to exit");
    let page = metrics.exposition().unwrap();
    for line in [
        "wharf_actor_events_total{actor=\"model\",event=\"panicked\"} 1",
        "wharf_actor_events_total{actor=\"model\",event=\"restarted\"} 1",
    ] {
        assert!(page.contains(line), "{page}");
    }
    shutdown.cancel();
    following.await.unwrap();
}
