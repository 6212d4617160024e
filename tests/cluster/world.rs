//! The hosts, and what a test sees and does from above.

use std::{
    collections::BTreeMap,
    future::Future,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use wharf::{
    actors::{Handle, Spawner, Timing},
    agent::{Agent, Blocking},
    app::{
        self,
        replica::{self, DoorAt},
        scheduler,
    },
    domain::{
        history,
        memory::{Bytes, Resources},
        model::Policy,
        names::{ReplicaId, ServerName},
        time::Instant,
    },
    forward::{ClientOptions, Connections},
    gateway::{self, Gateway},
    ports::{Clock, Identity, Network, Store as _, SystemClock},
    store::MemoryStore,
    telemetry::metrics::{Metrics, Role},
};

use super::{
    log::Log,
    net::Simulated,
    promises::{Bounds, Seen},
    random::Random,
    server::{FakeServer, FakeSource},
    traffic::{Expected, Tolerance},
};

/// When every simulation begins.
const EPOCH: Instant = Instant::from_micros(1_800_000_000_000_000);

/// A step of a millisecond that takes longer than this, by the wall clock, has no end.
const ENDLESS: Duration = Duration::from_secs(60);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) seed: u64,
    /// The capacity of each replica of the server `sim`.
    pub(crate) replicas: Vec<u64>,
    pub(crate) overcommit: u32,
    pub(crate) gateways: usize,
    pub(crate) timing: Timing,
    pub(crate) policy: Policy,
    /// Of a message on the network.
    pub(crate) latency: (Duration, Duration),
    /// The longest that the simulation may take.
    pub(crate) duration: Duration,
    /// What is logged.
    pub(crate) filter: &'static str,
}

impl Shape {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            replicas: vec![1000, 1000],
            overcommit: 0,
            gateways: 1,
            timing: Timing {
                lease: Duration::from_secs(2),
                heartbeat: Duration::from_millis(500),
                grace: Duration::from_secs(10),
                gateway_lease: Duration::from_secs(2),
                drain: Duration::from_secs(10),
                scan: Duration::from_secs(2),
                retention: Duration::from_secs(30),
                ..Timing::default()
            },
            policy: Policy { retry_cap: Duration::from_secs(5), ..Policy::default() },
            latency: (Duration::from_millis(1), Duration::from_millis(4)),
            duration: Duration::from_secs(600),
            filter: "wharf=info",
        }
    }
}

/// What is done to hosts from outside of them.
#[derive(Clone, Debug)]
enum Command {
    Crash(String),
    Bounce(String),
}

/// One replica, seen from above.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) id: ReplicaId,
    pub(crate) server: Arc<FakeServer>,
    agent: Mutex<Weak<Agent>>,
}

impl Seat {
    /// Its agent, while it runs.
    pub(crate) fn agent(&self) -> Option<Arc<Agent>> {
        lock(&self.agent).upgrade()
    }
}

/// The cluster, seen from above.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) shape: Shape,
    pub(crate) seats: Vec<Seat>,
    pub(crate) expected: Mutex<BTreeMap<String, Expected>>,
    pub(crate) tolerance: Mutex<Tolerance>,
    pub(crate) log: Log,
    /// Requests that were sent; each is known by its number.
    pub(super) requests: AtomicU64,
    pub(crate) answered: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) stop: AtomicBool,
    /// Whether hosts crash, links break or models fail to load: then routes and status may be behind for a while.
    pub(crate) faulty: AtomicBool,
    /// What is held to in rollouts, once the first version is there.
    pub(super) bounds: Mutex<Option<Bounds>>,
    pub(super) seen: Mutex<Seen>,
    store: Mutex<Arc<MemoryStore>>,
    scheduler: Mutex<Option<Handle>>,
    gateways: Mutex<BTreeMap<usize, Weak<Gateway>>>,
    commands: Mutex<Vec<Command>>,
    failures: Mutex<Vec<String>>,
    folder: tempfile::TempDir,
}

impl World {
    fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut random = Random::new(shape.seed);
        let begun = Arc::default();
        let seats = (0..).zip(&shape.replicas).map(|(index, capacity)| {
            let repository = folder.path().join(format!("replica-{index}")).join("repository");
            Seat {
                id: ReplicaId::new(ServerName::new("sim").unwrap(), index),
                server: FakeServer::new(*capacity, repository, random.next(), Arc::clone(&begun)),
                agent: Mutex::default(),
            }
        });
        let seats = seats.collect();
        Self {
            seats,
            expected: Mutex::default(),
            tolerance: Mutex::new(Tolerance::Nothing),
            log: Log::default(),
            requests: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            faulty: AtomicBool::new(false),
            bounds: Mutex::default(),
            seen: Mutex::default(),
            store: Mutex::new(Arc::new(journal("one"))),
            scheduler: Mutex::default(),
            gateways: Mutex::default(),
            commands: Mutex::default(),
            failures: Mutex::default(),
            folder,
            shape,
        }
    }

    /// A promise was broken.
    pub(crate) fn fail(&self, what: impl Into<String>) {
        let what = what.into();
        self.log.line(&format!("BROKEN: {what}"));
        lock(&self.failures).push(what);
    }

    /// From now on every model is held to these bounds.
    pub(crate) fn hold_to(&self, bounds: Bounds) {
        *lock(&self.bounds) = Some(bounds);
    }

    pub(crate) fn crash(&self, host: &str) {
        self.log.line(&format!("crash {host}"));
        lock(&self.commands).push(Command::Crash(host.to_owned()));
    }

    pub(crate) fn bounce(&self, host: &str) {
        self.log.line(&format!("bounce {host}"));
        lock(&self.commands).push(Command::Bounce(host.to_owned()));
    }

    /// The scheduler's actors, while it runs.
    pub(crate) fn scheduler(&self) -> Option<Handle> {
        lock(&self.scheduler).clone()
    }

    pub(crate) fn gateway(&self, index: usize) -> Option<Arc<Gateway>> {
        lock(&self.gateways).get(&index).and_then(Weak::upgrade)
    }

    /// Which gateway has no copy of the model to send to.
    pub(crate) fn gateway_lacks(&self, model: &str) -> Option<String> {
        (0..self.shape.gateways).find_map(|index| {
            let Some(gateway) = self.gateway(index) else { return Some(format!("gateway {index} does not run")) };
            let seen = gateway.inspect();
            let routes = seen["routes"].as_array().cloned().unwrap_or_default();
            let route = routes.iter().find(|route| route["model"] == model);
            let sent = route.is_some_and(|route| !route["targets"].as_array().is_none_or(Vec::is_empty));
            (!sent).then(|| format!("gateway {index} has no copy of {model} to send to"))
        })
    }

    /// The journal that is open.
    pub(crate) fn store(&self) -> Arc<MemoryStore> {
        Arc::clone(&lock(&self.store))
    }

    /// The journal is lost: the next scheduler begins with an empty one of another lineage.
    pub(crate) fn lose_journal(&self, lineage: &str) {
        *lock(&self.store) = Arc::new(journal(lineage));
    }

    /// The journal is what it was when `backup` was made; with a lineage, as another history.
    pub(crate) fn restore_journal(&self, backup: &MemoryStore, adopted_as: Option<&str>) {
        let restored = backup.backup();
        if let Some(lineage) = adopted_as {
            let writes = history::another(&restored.load().unwrap(), Self::clock().now());
            restored.begin_lineage(lineage, &writes).unwrap();
        }
        *lock(&self.store) = Arc::new(restored);
    }

    /// All hosts but the clients.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let replicas = (0..self.seats.len()).map(|index| format!("replica-{index}"));
        let gateways = (0..self.shape.gateways).map(|index| format!("gateway-{index}"));
        ["scheduler".to_owned()].into_iter().chain(replicas).chain(gateways).collect()
    }

    /// Waits until nothing is lacking, at most so long.
    pub(crate) async fn until(&self, within: Duration, lacking: impl Fn(&Self) -> Option<String>) {
        let waiting = async {
            while lacking(self).is_some() && !self.is_broken() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(within, waiting).await.is_err() {
            let lacking = lacking(self).unwrap_or_default();
            self.fail(format!("after {within:?}: {lacking}; {}", self.describe()));
        }
    }

    /// Whether a promise was broken.
    pub(crate) fn is_broken(&self) -> bool {
        !lock(&self.failures).is_empty()
    }

    /// What the scheduler's board shows.
    pub(crate) fn describe(&self) -> String {
        let Some(handle) = self.scheduler() else { return "no scheduler runs".to_owned() };
        let mut text = String::new();
        for model in handle.links.board.models() {
            let standing = model.standing();
            text += &format!("\n  {} is {}: {}", model.name, standing.state.name(), standing.sentence());
            for copy in &model.copies {
                text += &format!(
                    "\n    {} {} on {:?}{}",
                    copy.generation,
                    copy.state.name(),
                    copy.state.replica().map(ToString::to_string),
                    if copy.draining { ", to leave" } else { "" }
                );
            }
        }
        for seat in &self.seats {
            text += &format!("\n  {} has in memory: {:?}", seat.id, seat.server.loaded());
        }
        text
    }

    fn clock() -> Arc<dyn Clock> {
        Arc::new(SystemClock::starting_at(EPOCH + turmoil::sim_elapsed().unwrap_or_default()))
    }

    pub(crate) fn stand() -> app::World {
        app::World { network: Arc::new(Simulated), clock: Self::clock() }
    }

    pub(crate) fn connections() -> Arc<Connections> {
        let options = ClientOptions { connect_timeout: Duration::from_secs(1), ..ClientOptions::default() };
        Connections::new(Arc::new(Simulated), Self::clock(), options)
    }

    async fn run_scheduler(self: Arc<Self>) -> turmoil::Result {
        let store = {
            let mut store = lock(&self.store);
            *store = Arc::new(store.reopen());
            Arc::clone(&store)
        };
        let options = scheduler::Options {
            api: "0.0.0.0:9004".to_owned(),
            agents: "0.0.0.0:9005".to_owned(),
            store,
            blocking: false,
            spawner: Spawner::Local,
            policy: self.shape.policy.clone(),
            timing: self.shape.timing.clone(),
            events: 100_000,
            metrics: Arc::new(Metrics::new(&[Role::Scheduler], false)),
        };
        let above = Arc::clone(&self);
        let fatal = Arc::new(move |why: String| {
            above.log.line(&format!("the scheduler exits: {why}"));
            above.crash("scheduler");
            above.bounce("scheduler");
        });
        let running = scheduler::start(&Self::stand(), options, fatal, CancellationToken::new()).await?;
        *lock(&self.scheduler) = Some(running.handle.clone());
        running.stopped().await;
        Ok(())
    }

    async fn run_replica(self: Arc<Self>, index: usize) -> turmoil::Result {
        let seat = &self.seats[index];
        let stand = Self::stand();
        let listener = stand.network.bind("0.0.0.0:9100").await?;
        let capacity = Resources::primary(Bytes(self.shape.replicas[index]));
        let folder = self.folder.path().join(format!("replica-{index}"));
        let mut options = wharf::agent::Options::new(seat.id.clone(), capacity, folder);
        options.blocking = Blocking::Inline;
        options.overcommit_percent = self.shape.overcommit;
        options.capabilities = vec!["sim".to_owned()];
        options.door_address = format!("replica-{index}:9100");
        options.reconnect = (Duration::from_millis(100), Duration::from_secs(1));
        let running = replica::start(
            &stand,
            options,
            Arc::clone(&seat.server) as _,
            vec![Arc::new(FakeSource)],
            DoorAt::Port(listener),
            "scheduler:9005".to_owned(),
            &CancellationToken::new(),
        );
        *lock(&seat.agent) = Arc::downgrade(&running.agent);
        running.stopped().await;
        Ok(())
    }

    async fn run_gateway(self: Arc<Self>, index: usize) -> turmoil::Result {
        let stand = Self::stand();
        let listener = stand.network.bind("0.0.0.0:9000").await?;
        let name = format!("gateway-{index}");
        let options = gateway::Options { name, ..gateway::Options::default() };
        let seed = self.shape.seed.wrapping_add(index as u64);
        let gateway = Gateway::new(options, Self::connections(), Arc::clone(&stand.clock), seed);
        lock(&self.gateways).insert(index, Arc::downgrade(&gateway));
        let network: Arc<dyn Network> = Arc::clone(&stand.network);
        let follow = Arc::clone(&gateway).follow(network, "scheduler:9005".to_owned(), CancellationToken::new());
        tokio::join!(follow, gateway.serve(listener, CancellationToken::new()));
        Ok(())
    }
}

fn journal(lineage: &str) -> MemoryStore {
    MemoryStore::new(Identity { cluster: "sim".to_owned(), lineage: lineage.to_owned() })
}

/// Runs a cluster of this shape, and `driver` as a client of it, until that ends. Gives back the log.
///
/// # Panics
/// With the seed, and what the cluster did at last, when a promise was broken or anything panicked.
pub(crate) fn simulate<D, F>(shape: Shape, driver: D) -> String
where
    D: FnOnce(Arc<World>) -> F,
    F: Future<Output = ()> + 'static,
{
    let seed = shape.seed;
    let world = Arc::new(World::new(shape));
    let kept = world.log.keep(world.shape.filter);
    let ended = catch_unwind(AssertUnwindSafe(|| run(&world, driver)));
    drop(kept);
    let mut broken = lock(&world.failures).clone();
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => broken.push(format!("the simulation ended badly: {error}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            broken.push(format!("a panic: {}", text.unwrap_or_default()));
        }
    }
    let log = world.log.text();
    if let Some(line) = log.lines().find(|line| line.contains("actor_panicked") || line.contains("contradicts itself"))
    {
        broken.push(line.to_owned());
    }
    if !broken.is_empty() {
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(60)..].join("\n");
        let file = std::env::temp_dir().join(format!("wharf-sim-{seed}.log"));
        let saved = std::fs::write(&file, &log).map(|()| format!("; the whole log is {}", file.display()));
        broken.truncate(5);
        panic!(
            "seed {seed} (repeat with WHARF_SEED={seed}){}\n{}\nlast of the log:\n{last}",
            saved.unwrap_or_default(),
            broken.join("\n")
        );
    }
    log
}

/// Ends the process when one step does not end: no time passes within it, so no deadline of the simulation can. The
/// steps that are done are counted in what this gives back; it watches until the sender is dropped.
fn watch(world: &Arc<World>) -> (Arc<AtomicU64>, mpsc::Sender<()>) {
    let steps = Arc::new(AtomicU64::new(0));
    let (running, over) = mpsc::channel();
    let (seed, log, counted) = (world.shape.seed, world.log.clone(), Arc::clone(&steps));
    std::thread::spawn(move || {
        let mut before = None;
        while over.recv_timeout(ENDLESS) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = counted.load(Ordering::Relaxed);
            if before == Some(now) {
                let log = log.text();
                let lines: Vec<&str> = log.lines().collect();
                let last = lines[lines.len().saturating_sub(60)..].join("\n");
                let text = format!("seed {seed} (repeat with WHARF_SEED={seed}): step {now} has no end\n{last}\n");
                // What is printed in a test that does not end is not seen.
                drop(std::io::stderr().write_all(text.as_bytes()));
                std::process::abort();
            }
            before = Some(now);
        }
    });
    (steps, running)
}

fn run<D, F>(world: &Arc<World>, driver: D) -> turmoil::Result
where
    D: FnOnce(Arc<World>) -> F,
    F: Future<Output = ()> + 'static,
{
    let shape = &world.shape;
    let mut sim = turmoil::Builder::new()
        .rng_seed(shape.seed)
        .enable_random_order()
        .simulation_duration(shape.duration)
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(shape.latency.0)
        .max_message_latency(shape.latency.1)
        .tcp_capacity(1 << 16)
        .build();
    let one = Arc::clone(world);
    sim.host("scheduler", move || Arc::clone(&one).run_scheduler());
    for index in 0..world.seats.len() {
        let one = Arc::clone(world);
        sim.host(format!("replica-{index}"), move || Arc::clone(&one).run_replica(index));
    }
    for index in 0..shape.gateways {
        let one = Arc::clone(world);
        sim.host(format!("gateway-{index}"), move || Arc::clone(&one).run_gateway(index));
    }
    let (driving, one) = (driver(Arc::clone(world)), Arc::clone(world));
    sim.client("driver", async move {
        driving.await;
        one.stop.store(true, Ordering::Relaxed);
        Ok(())
    });
    let (steps, _running) = watch(world);
    for step in 0_u64.. {
        let over = sim.step()?;
        steps.store(step + 1, Ordering::Relaxed);
        let commands = std::mem::take(&mut *lock(&world.commands));
        for command in commands {
            match command {
                Command::Crash(host) => {
                    if host == "scheduler" {
                        lock(&world.scheduler).take();
                    }
                    sim.crash(host);
                }
                Command::Bounce(host) => sim.bounce(host),
            }
        }
        world.check(step, over);
        if over || !lock(&world.failures).is_empty() {
            return Ok(());
        }
    }
    Ok(())
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
