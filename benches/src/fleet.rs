//! A whole scheduler with its agents, in one process: submissions to answering copies, status, and its start from the
//! journal.
//!
//! The scheduler is the whole one, with its journal on disk, in a process of its own with all cores. Its agents are played
//! in that process: they say at once that what they were ordered answers, and a gateway that acknowledges every
//! epoch at once. What is measured is therefore the scheduler and nothing that it waits for; and the time and the
//! memory that the played agents take are counted as the scheduler's.

use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use futures::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use wharf::{
    actors::{Handle, Timing},
    app::{World, process::actor_threads, scheduler},
    domain::{
        copy::{Report as Said, Residency},
        leader::Leader,
        memory::{Bytes, Resources},
        model::Policy,
        names::{ModelName, ReplicaId, ServerName},
        order::Order,
        record::Owner,
        replica::ReplicaState,
        spec::{Definition, DeploymentPatch, ModelSpec, Passthrough, Replicas},
        time::Instant as Timestamp,
        version::{Generation, Uid, Version},
    },
    forward::TcpNetwork,
    messages::{
        Gate,
        router::{GatewayAcknowledged, GatewayConnected, RouteUpdate},
        server::{AgentConnected, AgentSpoke, Declaration, Declare, Down, Held, Hello, Word},
        supervisor::{Action, OnModel},
    },
    ports::{Identity, SystemClock},
    rpc::{client::Connection, proto::wharf::ListModelsRequest},
    store::{EmbeddedStore, OpenOptions},
    telemetry::metrics::{Metrics, Role},
};

use crate::{models, proc, report::Measure};

/// The longest that any step may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Submissions under way at a time.
const ASKING: usize = 4096;
/// Memory that each copy is said to need.
const NEED: u64 = 1 << 20;
const GATEWAY: &str = "bench";

/// What one process is to do.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Fleet {
    #[arg(long)]
    pub(crate) models: usize,
    #[arg(long)]
    pub(crate) copies: u32,
    #[arg(long)]
    pub(crate) replicas: u32,
    /// Begin from the journal that a fleet of the same size has left.
    #[arg(long)]
    pub(crate) again: bool,
}

/// What it tells.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Told {
    /// Seconds until every submission was durable, and until every copy answered by every gateway's routes.
    pub(crate) durable: f64,
    pub(crate) answering: f64,
    /// CPU seconds until then.
    pub(crate) cpu: f64,
    /// Bytes resident before and after.
    pub(crate) before: u64,
    pub(crate) after: u64,
    /// Seconds to list all models through the API, and seconds until a watch of all has told them all.
    pub(crate) listed: f64,
    pub(crate) watched: f64,
    /// Seconds from the scheduler's start to the API's first answer; and until every copy was known again.
    pub(crate) first: f64,
    pub(crate) known: f64,
    /// The longest that the API took for one model's status, in milliseconds: until all was known, and after.
    pub(crate) meanwhile: f64,
    pub(crate) afterwards: f64,
    /// Milliseconds, at the median, from the submission of one more model until every copy of it answers and the
    /// gateway has acknowledged the route to it.
    pub(crate) more: f64,
}

/// A copy that an agent holds: model, generation, replica.
type Copies = Vec<(ModelName, Generation, u32)>;

/// What agents know when the scheduler comes back: whom they obeyed, and what they hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Knowledge {
    lineage: String,
    leader: (u64, u64),
    /// Model, uid, version, number, replica.
    held: Vec<(String, u64, u32, u32, u32)>,
}

/// What the played agents share.
#[derive(Debug, Default)]
struct Agents {
    held: Mutex<Copies>,
}

/// Runs one scheduler in this process, and prints what it did as JSON.
pub(crate) fn play(dir: &Path, fleet: Fleet) -> anyhow::Result<()> {
    let began = Instant::now();
    proc::end_with_parent();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let told = runtime.block_on(scheduler(dir, fleet, began))?;
    println!("{}", serde_json::to_string(&told)?);
    // Nothing is to be kept of what runs, and a million actors take their time to end.
    std::process::exit(0);
}

async fn scheduler(dir: &Path, fleet: Fleet, began: Instant) -> anyhow::Result<Told> {
    let kept = dir.join("agents.json");
    let knowledge: Knowledge =
        if fleet.again { serde_json::from_slice(&fs::read(&kept)?)? } else { Knowledge::default() };
    // The agents' own knowledge is not the scheduler's work.
    let began = if fleet.again { Instant::now() } else { began };
    let world = World { network: Arc::new(TcpNetwork), clock: Arc::new(SystemClock::new()) };
    let open = OpenOptions { path: dir.join("journal.redb"), cache_bytes: 64 << 20 };
    let identity = || Identity { cluster: "bench".to_owned(), lineage: "bench".to_owned() };
    let address = proc::free()?.to_string();
    let done = Arc::new(AtomicBool::new(false));
    let prober = fleet.again.then(|| probe(address.clone(), fleet.models, began, Arc::clone(&done)));
    let options = scheduler::Options {
        api: address.clone(),
        agents: "127.0.0.1:0".to_owned(),
        store: Arc::new(EmbeddedStore::open(&open, identity)?),
        blocking: true,
        spawner: actor_threads(),
        policy: Policy::default(),
        timing: Timing::default(),
        events: 10_000,
        metrics: Arc::new(Metrics::new(&[Role::Scheduler], false)),
    };
    let fatal = Arc::new(|why: String| {
        eprintln!("the scheduler can't go on: {why}");
        std::process::exit(1);
    });
    let running = scheduler::start(&world, options, fatal, CancellationToken::new()).await?;
    let handle = running.handle.clone();
    let mut told = Told::default();
    let agents = Arc::new(Agents::default());
    let server = ServerName::new("bench")?;
    if !fleet.again {
        declare(&handle, &server, fleet).await?;
    }
    gateway(&handle);
    call_all(&handle, &server, fleet, &agents, knowledge)?;
    if fleet.again {
        until_known(&handle, fleet).await?;
        told.known = began.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        if let Some(prober) = prober {
            (told.first, told.meanwhile, told.afterwards) =
                prober.join().map_err(|_| anyhow!("the prober panicked"))??;
        }
        told.after = proc::memory(std::process::id())?;
        told.more = one_more(&handle, fleet).await?;
        return Ok(told);
    }
    until(|| servers_ready(&handle, fleet)).await.context("the agents did not come")?;
    told.before = proc::memory(std::process::id())?;
    let (cpu, started) = (proc::cpu(std::process::id())?, Instant::now());
    submit(&handle, fleet, 0..fleet.models).await?;
    told.durable = started.elapsed().as_secs_f64();
    until_known(&handle, fleet).await?;
    told.answering = started.elapsed().as_secs_f64();
    told.cpu = (proc::cpu(std::process::id())? - cpu).as_secs_f64();
    told.after = proc::memory(std::process::id())?;
    let started = Instant::now();
    ensure!(list(&address, fleet.models, false).await? == fleet.models, "the list is not whole");
    told.listed = started.elapsed().as_secs_f64();
    let started = Instant::now();
    ensure!(list(&address, fleet.models, true).await? == fleet.models, "the watch is not whole");
    told.watched = started.elapsed().as_secs_f64();
    let held = agents.held.lock().unwrap_or_else(PoisonError::into_inner);
    let rows = held
        .iter()
        .map(|(model, copy, on)| (model.to_string(), copy.uid.0, copy.version.0, copy.number, *on))
        .collect();
    let identity = &handle.links.identity;
    let knowledge = Knowledge {
        lineage: identity.lineage.clone(),
        leader: (identity.leader.epoch, identity.leader.started.as_micros()),
        held: rows,
    };
    fs::write(&kept, serde_json::to_vec(&knowledge)?)?;
    Ok(told)
}

async fn declare(handle: &Handle, server: &ServerName, fleet: Fleet) -> anyhow::Result<()> {
    let declaration = Declaration {
        replicas: fleet.replicas,
        bounds: (0, u32::MAX),
        kubernetes: None,
        capacity: None,
        overcommit_percent: None,
        capabilities: None,
        emptied: BTreeSet::new(),
    };
    let declare = Declare { owner: Owner::File, server: server.clone(), declaration: Some(declaration) };
    let servers = Gate::new(handle.servers(), 1, PATIENCE);
    servers.ask(declare).await.and_then(|answer| answer).map_err(|refusal| anyhow!("{}", refusal.message))
}

/// One gateway that acknowledges at once.
fn gateway(handle: &Handle) {
    let (connected, acknowledged, _) = handle.gateways();
    let (updates, mut told) = mpsc::channel(1024);
    connected.do_send(GatewayConnected {
        gateway: GATEWAY.to_owned(),
        session: 1,
        holds: None,
        foreign: false,
        updates,
    });
    tokio::spawn(async move {
        while let Some(update) = told.recv().await {
            let (RouteUpdate::Table(epoch, _) | RouteUpdate::Changes(epoch, _) | RouteUpdate::Ping(epoch)) = update;
            acknowledged.do_send(GatewayAcknowledged { gateway: GATEWAY.to_owned(), session: 1, epoch });
        }
    });
}

/// Connects an agent for each replica, with the copies that it holds.
fn call_all(
    handle: &Handle,
    server: &ServerName,
    fleet: Fleet,
    agents: &Arc<Agents>,
    knowledge: Knowledge,
) -> anyhow::Result<()> {
    let mut inventories: Vec<Vec<Held>> = (0..fleet.replicas).map(|_| Vec::new()).collect();
    for (model, uid, version, number, replica) in knowledge.held {
        let generation = Generation { uid: Uid(uid), version: Version(version), number };
        let model = ModelName::new(&model)?;
        inventories[replica as usize].push(Held { model, generation, report: answers(), order: None });
    }
    // Twice as much as there has to be.
    let each = (fleet.models as u64 * u64::from(fleet.copies)).div_ceil(u64::from(fleet.replicas)) * 2 + 16;
    let leader = Leader { epoch: knowledge.leader.0, started: Timestamp::from_micros(knowledge.leader.1) };
    let (connected, spoke) = handle.agents();
    for (index, inventory) in inventories.into_iter().enumerate() {
        let replica = ReplicaId::new(server.clone(), index as u32);
        let hello = Hello {
            replica: replica.clone(),
            capacity: Resources::primary(Bytes(each * NEED)),
            capabilities: vec!["onnx".to_owned()],
            overcommit_percent: 0,
            runtime: "bench".to_owned(),
            door: format!("127.0.0.1:{}", 1 + index % 60_000),
            lineage: knowledge.lineage.clone(),
            leader,
            inventory,
            version: "bench".to_owned(),
        };
        let (link, mut down) = mpsc::channel(1024);
        connected.do_send(AgentConnected { hello, session: 1, link });
        let (spoke, agents) = (spoke.clone(), Arc::clone(agents));
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(Timing::default().heartbeat);
            let mut sequence = 0;
            loop {
                let word = tokio::select! {
                    down = down.recv() => match down {
                        Some(Down::Orders(orders)) => Word::Reports(obey(&agents, index as u32, &orders)),
                        Some(Down::Refused { reason, .. }) => return eprintln!("an agent was refused: {reason}"),
                        Some(Down::Welcome { .. } | Down::Heard(_) | Down::Recycle(_)) => continue,
                        None => return,
                    },
                    _ = beat.tick() => {
                        sequence += 1;
                        Word::Heartbeat {
                            sequence,
                            resident: Resources::default(),
                            strain: Default::default(),
                            run: None,
                        }
                    }
                };
                spoke.do_send(AgentSpoke { replica: replica.clone(), session: 1, word });
            }
        });
    }
    Ok(())
}

/// What is said of a copy that answers.
const fn answers() -> Said {
    Said::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false }
}

/// Does what is ordered, at once.
fn obey(agents: &Agents, index: u32, orders: &[Order]) -> Vec<(ModelName, Generation, Said)> {
    let mut held = agents.held.lock().unwrap_or_else(PoisonError::into_inner);
    let said = orders.iter().map(|order| match order {
        Order::Register { model, generation, .. } => {
            held.push((model.clone(), *generation, index));
            (model.clone(), *generation, answers())
        }
        Order::Unregister { model, generation, .. } => (model.clone(), *generation, Said::Unloaded),
    });
    said.collect()
}

async fn submit(handle: &Handle, fleet: Fleet, numbers: Range<usize>) -> anyhow::Result<()> {
    let models = Gate::new(handle.models(), ASKING, PATIENCE);
    let asked = stream::iter(numbers).map(|number| {
        let models = models.clone();
        async move {
            let name = ModelName::new(&models::name(number))?;
            let spec = ModelSpec {
                uri: format!("s3://models/{name}"),
                requirements: vec!["onnx".to_owned()],
                memory: Some(Bytes(NEED)),
                ..ModelSpec::default()
            };
            let replicas = Replicas { replicas: fleet.copies, min: 0, max: 0, log_payloads: false };
            let definition = Definition {
                name: name.clone(),
                spec,
                deployment: DeploymentPatch { replicas: Some(replicas), ..DeploymentPatch::default() },
                kubernetes: None,
                passthrough: Passthrough::default(),
            };
            let answer = models.ask(OnModel { name, action: Action::Submit(Box::new(definition)) }).await;
            answer.and_then(|answer| answer).map_err(|refusal| anyhow!("{}", refusal.message))
        }
    });
    let mut asked = asked.buffer_unordered(ASKING);
    while let Some(answer) = asked.next().await {
        answer?;
    }
    Ok(())
}

async fn one_more(handle: &Handle, fleet: Fleet) -> anyhow::Result<f64> {
    const TIMES: usize = 100;
    let feed = handle.links.board.watch_models();
    let mut took = Vec::with_capacity(TIMES);
    for number in fleet.models..fleet.models + TIMES {
        let (name, began) = (ModelName::new(&models::name(number))?, Instant::now());
        submit(handle, fleet, number..number + 1).await?;
        let answers = async {
            loop {
                let model = feed.next().await;
                if model.name == name && model.standing().available >= fleet.copies {
                    return;
                }
            }
        };
        timeout(PATIENCE, answers).await.with_context(|| format!("{name} does not answer"))?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Measure::of(&took).median)
}

fn servers_ready(handle: &Handle, fleet: Fleet) -> bool {
    let servers = handle.links.board.servers();
    let states = servers.iter().flat_map(|view| view.replicas.iter().map(|replica| replica.state));
    let available = states.filter(|state| *state == ReplicaState::Available).count();
    available == fleet.replicas as usize
}

/// Waits until every copy of every model answers, and every gateway has the routes to it.
async fn until_known(handle: &Handle, fleet: Fleet) -> anyhow::Result<()> {
    let board = &handle.links.board;
    let count = || {
        let known = AtomicU64::new(0);
        // Nothing is so: only the count is wanted, and no name of a million.
        let names = board.models_that(|model| {
            known.fetch_add(u64::from(model.standing().available >= fleet.copies), Ordering::Relaxed);
            false
        });
        drop(names);
        known.into_inner()
    };
    let known = until(|| count() == fleet.models as u64).await;
    known.with_context(|| format!("only {} of {} models have all their copies", count(), fleet.models))
}

/// Waits; a look may cost at most a tenth of the time.
async fn until(mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let looked = Instant::now();
        if holds() {
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}");
        tokio::time::sleep((looked.elapsed() * 10).max(Duration::from_millis(5))).await;
    }
}

/// Reads the status of all models through the API; answers how many there were.
async fn list(address: &str, count: usize, watch: bool) -> anyhow::Result<usize> {
    let connection = Connection::open(address, None, PATIENCE).await?;
    let mut client = connection.wharf();
    let mut views = if watch {
        client.watch_models(ListModelsRequest::default()).await?.into_inner()
    } else {
        client.list_models(ListModelsRequest::default()).await?.into_inner()
    };
    // A watch tells of some again.
    let mut seen = BTreeSet::new();
    while seen.len() < count
        && let Some(view) = views.message().await?
    {
        seen.insert(view.name);
    }
    Ok(seen.len())
}

type Probed = anyhow::Result<(f64, f64, f64)>;

/// Asks for one model's status again and again, from before there is anybody who answers.
fn probe(address: String, models: usize, began: Instant, done: Arc<AtomicBool>) -> std::thread::JoinHandle<Probed> {
    std::thread::spawn(move || {
        proc::come_first();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let connection = loop {
                match Connection::open(&address, None, Duration::from_secs(5)).await {
                    Ok(connection) => break connection,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
                ensure!(began.elapsed() < PATIENCE, "the API did not come");
            };
            let mut client = connection.wharf();
            let mut ask = async |number: usize| {
                let asked = Instant::now();
                let name = Some(models::name(number));
                let mut views = client.list_models(ListModelsRequest { name, terminated: false }).await?.into_inner();
                ensure!(views.message().await?.is_some(), "a model is not there");
                anyhow::Ok(asked.elapsed().as_secs_f64() * 1e3)
            };
            ask(0).await?;
            let first = began.elapsed().as_secs_f64();
            let (mut meanwhile, mut afterwards, mut number) = (0.0_f64, 0.0_f64, 0);
            let mut left = 100;
            while left > 0 {
                number = (number + 7919) % models;
                let took = ask(number).await?;
                if done.load(Ordering::Relaxed) {
                    afterwards = afterwards.max(took);
                    left -= 1;
                } else {
                    meanwhile = meanwhile.max(took);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok((first, meanwhile, afterwards))
        })
    })
}
