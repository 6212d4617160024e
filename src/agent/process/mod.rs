//! Inference servers that the agent starts, watches, starts again, and never leaves behind.
//!
//! The rules of this module: a server that ends is started again by `domain::upkeep`, with nothing asked of anyone; while
//! it does not run a request is turned away before anything could start on it, and what was in its memory counts as gone;
//! one that is ended to be started anew has nothing in its memory;
//! however the agent ends, its server ends too, unless it was to live on, and then the next agent finds it.

mod child;
mod crash;
mod guarded;
mod launch;
mod models;
mod output;
mod proc;
mod renew;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    child::{Child, Root},
    launch::Ports,
};
use super::{measure::retry_after, procfs::Listening};
use crate::{
    agent::runtimes::Kind,
    domain::{
        memory::Bytes,
        quarantine::WINDOW,
        time::Instant,
        upkeep::{Event, State, Upkeep},
    },
    forward::{Body, ClientOptions, HttpUpstream, Request, Response, Split, Upstream, UpstreamError},
    ports::{Clock, Footprint, Network, ServerProcess},
    settings::registry::Lifetime,
    telemetry::durations::Durations,
};

pub use child::stop_left;
pub(super) use crash::Tended;
pub(super) use guarded::Guarded;
pub use launch::Launch;
pub use models::Models;
pub use proc::{parent_of, start_of};

/// How long a server may take to say whether it is ready.
const ANSWER: Duration = Duration::from_secs(5);
/// First and longest pause between two such questions.
const ASK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// What an agent runs.
#[derive(Clone, Debug)]
pub enum Started {
    /// One server for all models.
    Server(Arc<Server>),
    /// A process for each.
    Models(Arc<Models>),
}

/// How a server stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It is being started.
    Starting,
    /// It answers; which run of it that is.
    Up(u64),
    /// It ended: how. It is started again.
    Down(String),
    /// It ended too often, and is left alone for a while.
    GivenUp(String),
}

/// Who has to know how a server fares. Called in order, and never while it is up and down at once.
pub(super) trait Tending: Send + Sync {
    /// It ended, and nothing of it is left.
    fn ended(&self, how: &str);
    /// It answers.
    fn ready(&self);
    /// It ended too often.
    fn given_up(&self, why: &str);
}

/// A server that the agent runs.
pub struct Server {
    launch: Launch,
    network: Arc<dyn Network>,
    clock: Arc<dyn Clock>,
    health: watch::Sender<Health>,
    run: ArcSwapOption<Run>,
    /// The last run's number. The first comes from the clock, so that no other agent's runs have it.
    life: AtomicU64,
    /// The run that is to end, so that another begins.
    outworn: watch::Sender<u64>,
    starts: Durations,
    started: AtomicU64,
    /// Until then whatever is loaded is loaded alone.
    careful: AtomicU64,
    /// It is not wanted any more, also if it was to live on.
    retired: AtomicBool,
}

/// A run of the server.
#[derive(Debug)]
struct Run {
    life: u64,
    /// Where it is reached.
    at: Arc<dyn Upstream>,
    /// Where its processes begin.
    root: Option<Root>,
    /// What it had in memory before anything was loaded, if that was seen.
    empty: Option<Bytes>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (replica, model) = (&self.launch.replica, &self.launch.model);
        write!(f, "Server({replica} {model:?} {:?})", *self.health.borrow())
    }
}

/// How a run began.
struct Begun {
    child: Child,
    run: Arc<Run>,
}

/// What came of a start.
enum Start {
    /// It answers.
    Up(Box<Begun>),
    /// It was to stop before that, and nothing of it is left.
    Stopped,
    /// It was to stop before that; what an earlier agent started lives on, for the next one.
    LivesOn,
}

impl Server {
    /// A server that does not run yet.
    #[must_use]
    pub fn new(launch: Launch, network: Arc<dyn Network>, clock: Arc<dyn Clock>) -> Self {
        Self {
            life: AtomicU64::new(clock.now().as_micros()),
            launch,
            network,
            clock,
            health: watch::Sender::new(Health::Starting),
            run: ArcSwapOption::empty(),
            outworn: watch::Sender::new(0),
            starts: Durations::default(),
            started: AtomicU64::new(0),
            careful: AtomicU64::new(0),
            retired: AtomicBool::new(false),
        }
    }

    /// It goes for good with its agent's next stop, whatever its lifetime.
    pub(super) fn retire(&self) {
        self.retired.store(true, SeqCst);
    }

    /// How it stands.
    pub(super) fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    /// The run that answers, if one does.
    pub(super) fn life(&self) -> Option<u64> {
        match *self.health.borrow() {
            Health::Up(life) => Some(life),
            Health::Starting | Health::Down(_) | Health::GivenUp(_) => None,
        }
    }

    /// Waits until it answers; which run that is. The caller sets the deadline.
    pub(super) async fn up(&self) -> u64 {
        let mut health = self.health.subscribe();
        loop {
            if let Health::Up(life) = *health.borrow_and_update() {
                return life;
            }
            // Its sender is here.
            drop(health.changed().await);
        }
    }

    /// Waits until it stands otherwise than in its run `life`. The caller sets the deadline.
    pub(super) async fn no_longer(&self, life: u64) {
        let mut health = self.health.subscribe();
        while *health.borrow_and_update() == Health::Up(life) {
            drop(health.changed().await);
        }
    }

    /// Waits until it answers, or until a start has failed: how it stands then. The caller sets the deadline.
    pub(super) async fn settled(&self) -> Health {
        let mut health = self.health.subscribe();
        loop {
            let now = health.borrow_and_update().clone();
            if now != Health::Starting {
                return now;
            }
            drop(health.changed().await);
        }
    }

    /// Why it can't be asked now, and the seconds after which another try makes sense; nothing when it can.
    pub(super) fn down(&self) -> Option<(String, u64)> {
        let why = match &*self.health.borrow() {
            Health::Up(_) => return None,
            Health::Starting => "is being started".to_owned(),
            Health::Down(how) => format!("{how}; it is being started again"),
            Health::GivenUp(why) => why.clone(),
        };
        let elapsed = self.clock.now().since(Instant::from_micros(self.started.load(SeqCst)));
        Some((why, retry_after(self.starts.average(), elapsed)))
    }

    /// Whether it ended lately, so that what is loaded is to be loaded alone.
    pub(super) fn is_careful(&self) -> bool {
        self.clock.now().as_micros() < self.careful.load(SeqCst)
    }

    /// Has its run `life` ended as at a stop, and another begun. Nothing comes of it once that run is over.
    fn renew(&self, life: u64) {
        self.outworn.send_replace(life);
    }

    async fn is_outworn(&self, life: u64) {
        let mut outworn = self.outworn.subscribe();
        while *outworn.borrow_and_update() != life {
            // Its sender is here.
            drop(outworn.changed().await);
        }
    }

    /// Runs it until `stop`, and stops it then. To be called once.
    pub(super) async fn keep_up(&self, tending: &dyn Tending, stop: CancellationToken) {
        let patience = self.launch.patience;
        let name = self.launch.model.clone().unwrap_or_else(|| self.launch.replica.to_string());
        let mut upkeep = Upkeep::new(&patience);
        let mut running: Option<(Child, u64)> = None;
        let mut how = String::new();
        let mut adopts = true;
        while !stop.is_cancelled() {
            let event = match upkeep.state {
                State::Starting => match self.begin(std::mem::take(&mut adopts), &stop).await {
                    Ok(Start::Up(begun)) => {
                        let life = begun.run.life;
                        running = Some((begun.child, life));
                        self.run.store(Some(begun.run));
                        self.health.send_replace(Health::Up(life));
                        tending.ready();
                        tracing::info!(replica = %self.launch.replica, name, life, "the inference server is ready");
                        Event::Answered
                    }
                    Ok(Start::Stopped) => break,
                    Ok(Start::LivesOn) => {
                        tracing::info!(replica = %self.launch.replica, "the inference server lives on");
                        return;
                    }
                    Err(problem) => {
                        how = problem;
                        Event::Ended
                    }
                },
                State::Ready { .. } => {
                    let Some((child, life)) = running.as_mut() else { break };
                    let outworn = tokio::select! {
                        biased;
                        () = stop.cancelled() => break,
                        ended = child.ended() => {
                            how = ended;
                            false
                        }
                        () = self.is_outworn(*life) => true,
                    };
                    let now = self.clock.now();
                    if outworn {
                        self.started.store(now.as_micros(), SeqCst);
                        self.health.send_replace(Health::Starting);
                    }
                    self.run.store(None);
                    if outworn {
                        child.stop(self.launch.grace).await;
                    } else {
                        self.careful.store((now + WINDOW).as_micros(), SeqCst);
                        tending.ended(&how);
                    }
                    running = None;
                    if outworn { Event::Renewed } else { Event::Ended }
                }
                State::BackingOff { until } | State::Failed { until } => {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => break,
                        () = sleep(until.since(self.clock.now())) => Event::Passed,
                    }
                }
            };
            upkeep = upkeep.step(event, self.clock.now(), &patience);
            if event == Event::Ended {
                self.tell(&name, &how, &upkeep, tending);
            }
        }
        self.run.store(None);
        let Some((mut child, _)) = running else {
            // It may have been told so before it had taken up what runs.
            if self.retired.load(SeqCst) && self.launch.model.is_none() {
                stop_left(&self.launch.data_dir, self.launch.grace).await;
            }
            return;
        };
        if self.launch.command.lifetime == Lifetime::Agent || self.retired.load(SeqCst) {
            child.stop(self.launch.grace).await;
        } else {
            tracing::info!(replica = %self.launch.replica, "the inference server lives on");
        }
    }

    /// Says that it ended, and what becomes of it.
    fn tell(&self, name: &str, how: &str, upkeep: &Upkeep, tending: &dyn Tending) {
        let (now, replica) = (self.clock.now(), &self.launch.replica);
        match upkeep.state {
            State::BackingOff { until } => {
                let pause = until.since(now);
                tracing::warn!(%replica, name, how, ?pause, "the inference server does not run, and is started again");
                self.health.send_replace(Health::Down(how.to_owned()));
            }
            State::Failed { until } => {
                let (ends, rest) = (upkeep.ends(), until.since(now));
                let why = format!(
                    "the inference server ended {ends} times within {} s and is left alone for {} s: it {how}",
                    self.launch.patience.window.as_secs(),
                    rest.as_secs()
                );
                tracing::error!(%replica, name, problem = why, "the inference server is given up for a while");
                self.health.send_replace(Health::GivenUp(why.clone()));
                tending.given_up(&why);
            }
            State::Starting | State::Ready { .. } => {}
        }
    }

    /// Starts it, or takes it up, and waits until it is ready.
    async fn begin(&self, adopts: bool, stop: &CancellationToken) -> Result<Start, String> {
        let began = self.clock.now();
        self.started.store(began.as_micros(), SeqCst);
        let launch = &self.launch;
        let found = if adopts && launch.model.is_none() { Child::adopt(launch).await } else { None };
        let adopted = found.is_some();
        let (mut child, ports) = match found {
            Some(found) => found,
            None => {
                let ports = Ports::choose(launch).map_err(|error| format!("can't be started: {error}"))?;
                let child = Child::start(launch, &ports).map_err(|error| format!("can't be started: {error}"))?;
                (child, ports)
            }
        };
        let at = self.reach(&ports)?;
        let path = launch.filled(&ports).map_err(|error| error.to_string())?.health;
        let root = child.root();
        let answers = async {
            until_ready(&at, &path).await;
            usurper(root, ports.http).await
        };
        let how = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            how = child.ended() => Some(how),
            other = answers => match other {
                None => {
                    self.is_ready(adopted, began);
                    let empty = child.empty(launch, adopted).await;
                    let life = self.life.fetch_add(1, SeqCst) + 1;
                    return Ok(Start::Up(Box::new(Begun { child, run: Arc::new(Run { life, at, root, empty }) })));
                }
                Some(other) => Some(format!(
                    "can't be reached: process {other} listens on port {} of 127.0.0.1 in its place", ports.http
                )),
            },
            () = sleep(launch.start) => {
                Some(format!("did not answer 200 at {path} within {} s", launch.start.as_secs_f64()))
            }
        };
        if how.is_none() && adopted && !self.retired.load(SeqCst) {
            return Ok(Start::LivesOn);
        }
        child.stop(launch.grace).await;
        how.map_or(Ok(Start::Stopped), Err)
    }

    /// It answers; it was begun with at `began`.
    fn is_ready(&self, adopted: bool, began: Instant) {
        if adopted {
            tracing::info!(replica = %self.launch.replica, "the inference server that an earlier agent started is taken up");
        } else {
            self.starts.record(self.clock.now().since(began));
        }
    }

    fn reach(&self, ports: &Ports) -> Result<Arc<dyn Upstream>, String> {
        let at = |port: u16| -> Result<Arc<dyn Upstream>, String> {
            let (network, clock) = (Arc::clone(&self.network), Arc::clone(&self.clock));
            let upstream = HttpUpstream::new(&format!("127.0.0.1:{port}"), network, clock, ClientOptions::default());
            Ok(Arc::new(upstream.map_err(|error| error.to_string())?))
        };
        match self.launch.runtime {
            Kind::Process if !self.launch.command.tells("grpc_port") => at(ports.http),
            Kind::Process | Kind::Builtin | Kind::MlServer | Kind::Triton | Kind::Oip => {
                Ok(Arc::new(Split::new(at(ports.http)?, Some(at(ports.grpc)?))))
            }
        }
    }
}

/// The process that listens in the place of the program that begins at `root`, if one does for certain.
async fn usurper(root: Option<Root>, port: u16) -> Option<u32> {
    let root = root?.number();
    // It reads the whole of /proc.
    tokio::task::spawn_blocking(move || Listening::on(port).usurper(root)).await.ok().flatten()
}

async fn until_ready(at: &Arc<dyn Upstream>, path: &str) {
    let mut pause = ASK.0;
    loop {
        let request = http::Request::get(path).body(Body::empty());
        if let Ok(request) = request
            && let Ok(Ok(response)) = timeout(ANSWER, at.call(request)).await
            && response.status().is_success()
        {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(ASK.1);
    }
}

impl ServerProcess for Server {
    fn footprint(&self) -> Option<Footprint> {
        let run = self.run.load_full()?;
        Some(Footprint { run: run.life, bytes: run.root?.memory()?, empty: run.empty })
    }
}

impl Upstream for Server {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        match self.run.load_full() {
            Some(run) => async move { run.at.call(request).await }.boxed(),
            None => {
                let why = self.down().map_or_else(|| "is stopping".to_owned(), |(why, _)| why);
                let message = format!("the inference server {why}");
                async { Err(UpstreamError { started: false, timed_out: false, message }) }.boxed()
            }
        }
    }
}
