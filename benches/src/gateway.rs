//! What a request costs at the gateway, beside Envoy with the same routes and beside the floor.
//!
//! Each proxy is a process of its own on one core; the load and the backend are on the other one. Throughput and latency
//! are a proxy's own only where its core is busy: where one of the two had less than [`BUSY`] to do, because the load or
//! the backend were dearer than it, they are left out. One round of each contestant follows another, so that what disturbs the
//! machine disturbs all of them; ratios are taken round by round. Metrics, holds and traces are at their defaults.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::task::LocalSet;

use crate::{
    envoy,
    load::{self, Outcome, Plan, Protocol},
    models::{Picks, Spread},
    plot::{self, Line},
    proc::{LOAD_CORE, PROXY_CORE, Proc, free},
    report::{Goal, Measure, Report, Row, row},
    routes,
};

/// In which a proxy must be ready with its routes.
const START: Duration = Duration::from_secs(120);
/// The share of its core's time that a busy proxy has.
const BUSY: f64 = 0.9;
const KIB: usize = 1024;
const SMALL: usize = 200;

/// How much is measured.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measure: Duration,
    /// Numbers of models; the first is one.
    pub(crate) models: Vec<usize>,
    pub(crate) bodies: Vec<usize>,
    pub(crate) spreads: Vec<Spread>,
    /// The number of models with which Wharf is put beside itself with one.
    pub(crate) many: usize,
}

impl Scale {
    pub(crate) fn full() -> Self {
        Self {
            rounds: 7,
            warm_up: Duration::from_millis(300),
            measure: Duration::from_millis(1500),
            models: vec![1, 1000, 10_000, 50_000],
            bodies: vec![SMALL, 64 * KIB, 4 * KIB * KIB],
            spreads: vec![Spread::Uniform, Spread::Zipf],
            many: 100_000,
        }
    }

    pub(crate) fn quick() -> Self {
        Self {
            rounds: 7,
            warm_up: Duration::from_millis(150),
            measure: Duration::from_millis(400),
            models: vec![1, 1000],
            bodies: vec![SMALL, 4 * KIB * KIB],
            spreads: vec![Spread::Uniform],
            many: 100_000,
        }
    }
}

/// Where things are.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The `wharf` program, of the release profile.
    pub(crate) wharf: PathBuf,
    /// This program.
    pub(crate) this: PathBuf,
    /// For files of this run.
    pub(crate) dir: PathBuf,
    /// For plots, where they are kept.
    pub(crate) plots: Option<PathBuf>,
}

/// Who is measured: where it listens, and what it costs.
#[derive(Debug)]
struct Contestant {
    name: String,
    rest: SocketAddr,
    grpc: SocketAddr,
    /// One process for each protocol, or one for both; none is the backend itself.
    process: Vec<Proc>,
}

impl Contestant {
    fn at(&self, protocol: Protocol) -> SocketAddr {
        match protocol {
            Protocol::Rest => self.rest,
            Protocol::Grpc => self.grpc,
        }
    }

    fn process(&self, protocol: Protocol) -> Option<&Proc> {
        match protocol {
            Protocol::Rest => self.process.first(),
            Protocol::Grpc => self.process.last(),
        }
    }

    fn cpu(&self, protocol: Protocol) -> anyhow::Result<Duration> {
        self.process(protocol).map_or(Ok(Duration::ZERO), Proc::cpu)
    }
}

/// The inference server that answers with what it was asked.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) at: SocketAddr,
    _process: Proc,
}

impl Backend {
    pub(crate) fn start(places: &Places) -> anyhow::Result<Self> {
        let at = free()?;
        let words = [places.this.display().to_string(), "backend".into(), at.to_string()];
        let mut process = Proc::start("backend", LOAD_CORE, &words, &places.dir)?;
        process.listening(at, START)?;
        Ok(Self { at, _process: process })
    }
}

/// Starts Wharf's gateway with the routes of `count` models.
fn wharf(places: &Places, backend: &Backend, count: usize) -> anyhow::Result<Contestant> {
    let (listen, http, scheduler) = (free()?, free()?, free()?);
    routes::play(scheduler, count, backend.at)?;
    let mut words = vec![places.wharf.display().to_string(), "gateway".to_owned()];
    for setting in
        [format!("gateway.listen={listen}"), format!("gateway.http={http}"), format!("gateway.scheduler={scheduler}")]
    {
        words.extend(["--set".to_owned(), setting]);
    }
    let mut process = Proc::start(&format!("wharf-{count}"), PROXY_CORE, &words, &places.dir)?;
    process.listening(listen, START)?;
    process.until(START, || ready(listen).unwrap_or(false))?;
    Ok(Contestant { name: "Wharf".to_owned(), rest: listen, grpc: listen, process: vec![process] })
}

/// Whether a gateway has its routes.
pub(crate) fn ready(at: SocketAddr) -> std::io::Result<bool> {
    use std::io::{Read as _, Write as _};
    let mut io = std::net::TcpStream::connect(at)?;
    io.set_read_timeout(Some(Duration::from_secs(5)))?;
    io.write_all(b"GET /v2/health/ready HTTP/1.1\r\nhost: bench\r\n\r\n")?;
    let mut first = [0; 12];
    io.read_exact(&mut first)?;
    Ok(first == *b"HTTP/1.1 200")
}

fn floor(places: &Places, backend: &Backend) -> anyhow::Result<Contestant> {
    let (rest, grpc) = (free()?, free()?);
    let mut words = vec![places.this.display().to_string(), "floor".to_owned()];
    words.extend([rest, grpc, backend.at].map(|address| address.to_string()));
    let mut process = Proc::start("floor", PROXY_CORE, &words, &places.dir)?;
    process.listening(rest, START)?;
    Ok(Contestant { name: "floor".to_owned(), rest, grpc, process: vec![process] })
}

fn envoy(places: &Places, program: &std::path::Path, backend: &Backend, count: usize) -> anyhow::Result<Contestant> {
    let mut at = Vec::new();
    let mut process = Vec::new();
    for protocol in [Protocol::Rest, Protocol::Grpc] {
        let listen = free()?;
        let words = envoy::command(program, &places.dir, protocol, count, (listen, backend.at))?;
        let mut started = Proc::start(&format!("envoy-{protocol:?}-{count}"), PROXY_CORE, &words, &places.dir)?;
        started.listening(listen, START)?;
        process.push(started);
        at.push(listen);
    }
    Ok(Contestant { name: "Envoy".to_owned(), rest: at[0], grpc: at[1], process })
}

/// What is asked for in one comparison.
#[derive(Clone, Copy, Debug)]
struct Point {
    protocol: Protocol,
    body: usize,
    models: usize,
    spread: Spread,
    connections: usize,
    streams: usize,
}

impl Point {
    const fn new(protocol: Protocol, body: usize, models: usize, spread: Spread) -> Self {
        let (connections, streams) = match protocol {
            // Streams share a connection turn by turn, so that large ones would all end at once, and seldom.
            _ if body > KIB * KIB => (4, 1),
            Protocol::Rest => (32, 1),
            Protocol::Grpc => (4, 8),
        };
        Self { protocol, body, models, spread, connections, streams }
    }

    fn id(&self) -> String {
        let protocol = self.protocol.name();
        let models = if self.models == 1 { "1 model".to_owned() } else { format!("{} models", self.models) };
        let spread = if self.models == 1 { "" } else { self.spread.name() };
        format!("{protocol} {} {models} {spread}", size(self.body)).trim_end().to_owned()
    }
}

fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes / KIB),
        _ => format!("{} MiB", bytes / KIB / KIB),
    }
}

/// Rounds of all contestants, one after another; answers the outcomes of each.
fn rounds(
    scale: &Scale,
    point: Point,
    contestants: &[&Contestant],
    picks: &[Picks],
) -> anyhow::Result<Vec<Vec<Outcome>>> {
    let mut outcomes = vec![Vec::new(); contestants.len()];
    for round in 0..scale.rounds {
        for turn in 0..contestants.len() {
            // Each is first as often as the others.
            let which = (turn + round) % contestants.len();
            let contestant = contestants[which];
            let plan = Plan {
                to: contestant.at(point.protocol),
                protocol: point.protocol,
                picks: picks[which.min(picks.len() - 1)].clone(),
                body: point.body,
                payload: None,
                connections: point.connections,
                streams: point.streams,
                warm_up: scale.warm_up,
                measure: scale.measure,
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let local = LocalSet::new();
            let outcome = local.block_on(&runtime, load::run(plan, &|| contestant.cpu(point.protocol)));
            let outcome = outcome.map_err(|error| error.context(format!("{} with {}", contestant.name, point.id())))?;
            outcomes[which].push(outcome);
        }
    }
    Ok(outcomes)
}

fn each(outcomes: &[Outcome], what: impl Fn(&Outcome) -> f64) -> Vec<f64> {
    outcomes.iter().map(what).collect()
}

/// Compares at one point; answers the rows, and each contestant's CPU time per request.
fn compare(scale: &Scale, point: Point, contestants: &[&Contestant]) -> anyhow::Result<(Vec<Row>, Vec<f64>)> {
    let picks = Picks::new(point.models, point.spread);
    let outcomes = rounds(scale, point, contestants, &[picks])?;
    let id = point.id();
    let mut rows = Vec::new();
    let ours = &outcomes[0];
    for (contestant, theirs) in contestants.iter().zip(&outcomes).skip(1) {
        let name = contestant.name.as_str();
        let cpu = (each(ours, Outcome::cpu_micros), each(theirs, Outcome::cpu_micros));
        rows.push(row(&format!("{id}: CPU"), "us", &cpu.0, Some((name, &cpu.1)), goal(point, name)));
        let busy = |outcomes: &[Outcome]| Measure::of(&each(outcomes, Outcome::busy)).median >= BUSY;
        if name == "floor" || !busy(ours) || !busy(theirs) {
            continue;
        }
        let rate = (each(ours, Outcome::rate), each(theirs, Outcome::rate));
        rows.push(row(&format!("{id}: throughput"), "req/s", &rate.0, Some((name, &rate.1)), None));
        for (share, percent) in [(0.5, "p50"), (0.99, "p99")] {
            let (a, b) = (each(ours, |o| o.latency(share)), each(theirs, |o| o.latency(share)));
            rows.push(row(
                &format!("{id}: {percent}, {} at a time", point.connections * point.streams),
                "us",
                &a,
                Some((name, &b)),
                None,
            ));
        }
        let resident = |contestant: &Contestant| contestant.process(point.protocol).map(Proc::memory).transpose();
        if let (Some(a), Some(b)) = (resident(contestants[0])?, resident(contestant)?) {
            let mib = |bytes: u64| [bytes as f64 / 1_048_576.0];
            rows.push(row(&format!("{id}: memory"), "MiB", &mib(a), Some((name, &mib(b))), None));
        }
    }
    for row in &rows {
        println!("{}", crate::line(row));
    }
    let cpu = outcomes.iter().map(|outcomes| Measure::of(&each(outcomes, Outcome::cpu_micros)).median);
    Ok((rows, cpu.collect()))
}

fn goal(point: Point, rival: &str) -> Option<Goal> {
    let small = point.body == SMALL && point.spread == Spread::Uniform;
    match (rival, point.protocol, point.models) {
        ("Envoy", Protocol::Rest, 1) if small => Some(Goal::ratio_at_most(0.45)),
        ("Envoy", Protocol::Grpc, 1) if small => Some(Goal::ratio_at_most(0.6)),
        ("Envoy", Protocol::Rest, 50_000) if small => Some(Goal::ratio_at_most(0.01)),
        // One copy of a body would cost a quarter of what the floor does with it, and more.
        ("floor", _, 1) if point.body > KIB * KIB => Some(Goal::ratio_at_most(1.1)),
        _ => None,
    }
}

/// All of it.
pub(crate) fn measure(places: &Places, scale: &Scale, report: &mut Report) -> anyhow::Result<()> {
    let program = envoy::install();
    if let Err(error) = &program {
        println!("without Envoy: {error:#}");
    }
    let backend = Backend::start(places)?;
    let floor = floor(places, &backend)?;
    let mut lines: Vec<Line> = Vec::new();
    for &count in &scale.models {
        let wharf = wharf(places, &backend, count)?;
        let envoy = program.as_ref().ok().map(|program| envoy(places, program, &backend, count)).transpose()?;
        let contestants: Vec<&Contestant> =
            [Some(&wharf), Some(&floor), envoy.as_ref()].into_iter().flatten().collect();
        for protocol in [Protocol::Rest, Protocol::Grpc] {
            let spreads = if count == 1 { &[Spread::Uniform][..] } else { &scale.spreads };
            for &spread in spreads {
                for &body in if count == 1 { &scale.bodies[..] } else { &[SMALL][..] } {
                    let point = Point::new(protocol, body, count, spread);
                    let (rows, cpu) = compare(scale, point, &contestants)?;
                    report.rows.extend(rows);
                    if body == SMALL && spread == Spread::Uniform {
                        for (contestant, cpu) in contestants.iter().zip(cpu) {
                            let name = format!("{} {}", contestant.name, protocol.name());
                            plot::add(&mut lines, &name, count as f64, cpu);
                        }
                    }
                }
            }
        }
        if count == 1 {
            report.rows.extend(added(scale, &contestants, &backend)?);
        }
    }
    report.rows.extend(alike(places, scale, &backend)?);
    if let Some(plots) = &places.plots {
        let title = "CPU time per request by number of models";
        plot::draw(&plots.join("gateway-cost.svg"), title, "models", "us", &lines)?;
    }
    Ok(())
}

/// What the median of one request at a time is above asking the backend itself.
fn added(scale: &Scale, contestants: &[&Contestant], backend: &Backend) -> anyhow::Result<Vec<Row>> {
    let direct = Contestant { name: "direct".to_owned(), rest: backend.at, grpc: backend.at, process: Vec::new() };
    let mut all = contestants.to_vec();
    all.push(&direct);
    let mut rows = Vec::new();
    for protocol in [Protocol::Rest, Protocol::Grpc] {
        let point = Point { connections: 1, streams: 1, ..Point::new(protocol, SMALL, 1, Spread::Uniform) };
        let outcomes = rounds(scale, point, &all, &[Picks::new(1, Spread::Uniform)])?;
        let p50 = |which: usize| each(&outcomes[which], |outcome| outcome.latency(0.5));
        let base = p50(all.len() - 1);
        let above =
            |which: usize| p50(which).iter().zip(&base).map(|(with, without)| with - without).collect::<Vec<_>>();
        let ours = above(0);
        for (which, contestant) in contestants.iter().enumerate().skip(1) {
            let theirs = above(which);
            let what = format!("{}: added p50, one at a time", point.id());
            let goal = (which == 1).then(|| Goal::at_most(60.0));
            rows.push(row(&what, "us", &ours, Some((&contestant.name, &theirs)), goal));
        }
    }
    for row in &rows {
        println!("{}", crate::line(row));
    }
    Ok(rows)
}

/// Wharf with many models beside Wharf with one.
fn alike(places: &Places, scale: &Scale, backend: &Backend) -> anyhow::Result<Vec<Row>> {
    let many = wharf(places, backend, scale.many)?;
    let mut one = wharf(places, backend, 1)?;
    one.name = "Wharf with 1 model".to_owned();
    let mut rows = Vec::new();
    for protocol in [Protocol::Rest, Protocol::Grpc] {
        let point = Point::new(protocol, SMALL, scale.many, Spread::Uniform);
        let picks = [Picks::new(scale.many, Spread::Uniform), Picks::new(1, Spread::Uniform)];
        let outcomes = rounds(scale, point, &[&many, &one], &picks)?;
        let cpu = |which: usize| each(&outcomes[which], Outcome::cpu_micros);
        let what = format!("{}: CPU", point.id());
        rows.push(row(&what, "us", &cpu(0), Some((&one.name, &cpu(1))), Some(Goal::ratio_at_most(1.05))));
    }
    for row in &rows {
        println!("{}", crate::line(row));
    }
    Ok(rows)
}
