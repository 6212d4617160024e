//! Half an hour of everything at once: traffic, rollouts, deletions, submissions and evictions, on all cores that there
//! are; and what is left of it afterwards.
//!
//! Of ten models eight stay as they are, one is rolled out to another version again and again, and one is deleted and
//! submitted anew. Memory holds nine of ten, and requests follow Zipf, so copies are evicted and come back all the time.
//! Requests go to the models that are never deleted, over connections that are kept, over ones that are not, and by
//! gRPC; none may fail. When all models are deleted the process is to have as many descriptors, tasks, threads and
//! files as before the first of them, but for the artifacts that it keeps.

use std::{
    cell::{Cell, RefCell},
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tokio::{net::TcpStream, task::LocalSet, time::sleep};
use wharf::rpc::{
    client::Connection,
    proto::{
        inference::{ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient},
        scheduler::{ModelReference, UnloadModelRequest},
        wharf::ListModelsRequest,
    },
};

use crate::{
    gateway::Places,
    load,
    models::{self, Picks, Spread},
    proc,
    report::{Goal, Report, row},
    up::{Sample, Up},
};

/// What each model declares.
const MEMORY: u64 = 256 << 10;
const REPLICAS: u64 = 2;
/// The longest that a change, or the end of everything, may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// After this long memory is what it is to stay.
const SETTLED: Duration = Duration::from_secs(300);
/// As many clients of each kind, and the pause that each makes after an answer.
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(15);
/// Those who roll models out, and those who delete them and submit them anew.
const CHANGERS: usize = 2;
const CHANGE_PAUSE: Duration = Duration::from_millis(200);
/// How often it is looked what is left. Each look has a thread of the pool for blocking work scrape the metrics, and they take turns
/// at it: looked at more often, none of them would ever be idle for the ten seconds after which it ends.
const LOOK: Duration = Duration::from_secs(12);

/// What is counted while it runs; all of it on one thread.
#[derive(Debug, Default)]
struct Seen {
    stop: Cell<bool>,
    answered: Cell<u64>,
    failed: Cell<u64>,
    rolled: Cell<u64>,
    deleted: Cell<u64>,
    /// The first few failures.
    problems: RefCell<Vec<String>>,
}

impl Seen {
    fn note(&self, model: &str, outcome: anyhow::Result<()>) {
        match outcome {
            Ok(()) => self.answered.set(self.answered.get() + 1),
            Err(error) => {
                self.failed.set(self.failed.get() + 1);
                self.problem(&format!("{model}: {error:#}"));
            }
        }
    }

    fn problem(&self, problem: &str) {
        let mut problems = self.problems.borrow_mut();
        if problems.len() < 10 {
            println!("{problem}");
            problems.push(problem.to_owned());
        }
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    tasks: u64,
    files: usize,
}

/// Runs for so many minutes with so many models.
pub(crate) fn run(places: &Places, minutes: u64, count: usize, report: &mut Report) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, soak(places, Duration::from_secs(minutes * 60), count, report))
}

async fn soak(places: &Places, length: Duration, count: usize, report: &mut Report) -> anyhow::Result<()> {
    let samples = [Sample::read("iris-1")?, Sample::read("iris-2")?];
    let home = places.dir.join("soak");
    let memory = count as u64 * MEMORY * 9 / 10 / REPLICAS;
    let registry = format!(
        "[[server]]\nname = \"onnx\"\nruntime = \"builtin\"\ncapabilities = [\"onnx\"]\nreplicas = {REPLICAS}\n\
         memory = \"{memory}\"\novercommit_percent = 60\n"
    );
    let up = Rc::new(Up::start(places, &home, &proc::all_cores(), &registry)?);
    let connection = up.open().await?;
    // What is made with the first model is not left over from those that follow.
    up.submit_one(&connection, &models::name(count), &samples[0].folder, MEMORY).await?;
    up.until_all_available(&connection, 1).await?;
    remove(&connection, &models::name(count)).await?;
    let before = at_rest(&up, &home).await?;
    println!("before the first model: {before:?}, {} MiB", mib(&up)?);

    for number in 0..count {
        up.submit_one(&connection, &models::name(number), &samples[0].folder, MEMORY).await?;
    }
    up.until_all_available(&connection, count).await?;
    println!("{count} models answer after {:.1} s: {} MiB", up.began.elapsed().as_secs_f64(), mib(&up)?);

    let seen = Rc::new(Seen::default());
    let mut tasks = Vec::new();
    let kept: Rc<[usize]> = (0..count).filter(|number| number % 10 != 1).collect();
    let picks = Picks::new(kept.len(), Spread::Zipf);
    for client in 0..CLIENTS {
        let turns = Turns { picks: picks.clone(), kept: Rc::clone(&kept), next: client * 7919 };
        let body = Arc::clone(&samples[0].body);
        tasks.push(tokio::task::spawn_local(kept_connection(Rc::clone(&up), turns.clone(), body, Rc::clone(&seen))));
        let body = Arc::clone(&samples[0].body);
        tasks.push(tokio::task::spawn_local(new_connections(Rc::clone(&up), turns.clone(), body, Rc::clone(&seen))));
        let ask = samples[0].grpc.clone();
        tasks.push(tokio::task::spawn_local(by_grpc(Rc::clone(&up), turns, ask, Rc::clone(&seen))));
    }
    let folders = samples.each_ref().map(|sample| sample.folder.clone());
    for changer in 0..CHANGERS {
        let mine = |rest: usize| -> Vec<String> {
            (0..count)
                .filter(|number| number % 10 == rest && number / 10 % CHANGERS == changer)
                .map(models::name)
                .collect()
        };
        let (up, folders) = (Rc::clone(&up), folders.clone());
        tasks.push(tokio::task::spawn_local(roll(Rc::clone(&up), mine(0), folders.clone(), Rc::clone(&seen))));
        tasks.push(tokio::task::spawn_local(renew(up, mine(1), folders, Rc::clone(&seen))));
    }

    let began = Instant::now();
    let (mut settled, mut told) = (None, Duration::ZERO);
    while began.elapsed() < length {
        sleep(Duration::from_secs(10)).await;
        let memory = mib(&up)?;
        if began.elapsed() >= SETTLED.min(length / 2) && settled.is_none() {
            settled = Some(memory);
        }
        if began.elapsed() >= told + Duration::from_secs(60) {
            told = began.elapsed();
            let (evicted, tasks) = (up.metric("seldon_cache_evict_count").await?, up.metric("wharf_tasks").await?);
            println!(
                "{:>5.1} min  {:>8} answered  {} failed  {:>6} rollouts  {:>6} deletions  {evicted:>8} evictions  \
                 {memory:.1} MiB  {tasks} tasks  {} descriptors",
                began.elapsed().as_secs_f64() / 60.0,
                seen.answered.get(),
                seen.failed.get(),
                seen.rolled.get(),
                seen.deleted.get(),
                up.process.descriptors()?
            );
        }
    }
    let (end, evictions) = (mib(&up)?, up.metric("seldon_cache_evict_count").await?);
    seen.stop.set(true);
    for task in tasks {
        tokio::time::timeout(PATIENCE, task).await.context("a client does not end")??;
    }
    up.until_all_available(&connection, count).await?;
    for number in 0..count {
        unload(&connection, &models::name(number)).await?;
    }
    let left = until_as_before(&up, &home, before).await?;
    println!("after the last model: {left:?}, {} MiB", mib(&up)?);

    let name = format!("soak of {:.0} minutes, {count} models", length.as_secs_f64() / 60.0);
    let mut push = |what: &str, unit: &str, value: f64, goal: Option<Goal>| {
        report.rows.push(row(&format!("{name}: {what}"), unit, &[value], None, goal));
    };
    push("requests", "", seen.answered.get() as f64, None);
    push("requests that failed", "", seen.failed.get() as f64, Some(Goal::at_most(0.0)));
    push("rollouts", "", seen.rolled.get() as f64, None);
    push("deletions, each with a submission after it", "", seen.deleted.get() as f64, None);
    push("evictions", "", evictions as f64, None);
    let more = |now: usize, then: usize| now as f64 - then as f64;
    push("descriptors left", "", more(left.descriptors, before.descriptors), Some(Goal::at_most(0.0)));
    push("threads left", "", more(left.threads, before.threads), Some(Goal::at_most(0.0)));
    push("tasks left", "", left.tasks as f64 - before.tasks as f64, Some(Goal::at_most(0.0)));
    push("files left", "", more(left.files, before.files), Some(Goal::at_most(0.0)));
    let settled = settled.context("it ended before memory was looked at")?;
    let memory = row(
        &format!("{name}: memory at the end"),
        "MiB",
        &[end],
        Some(("after 5 minutes", &[settled])),
        Some(Goal::ratio_at_most(1.05)),
    );
    report.rows.push(memory);
    for row in &report.rows {
        println!("{}", crate::line(row));
    }
    Ok(())
}

/// Which models a client asks for.
#[derive(Clone, Debug)]
struct Turns {
    picks: Picks,
    kept: Rc<[usize]>,
    next: usize,
}

impl Turns {
    fn model(&mut self) -> String {
        self.next += 1;
        models::name(self.kept[self.picks.number(self.next)])
    }
}

async fn kept_connection(up: Rc<Up>, mut turns: Turns, body: Arc<[u8]>, seen: Rc<Seen>) {
    let mut client = None;
    while !seen.stop.get() {
        let model = turns.model();
        let asked = async {
            let mut io: TcpStream = match client.take() {
                Some(io) => io,
                None => TcpStream::connect(up.gateway).await?,
            };
            load::ask(&mut io, &model, &body).await?;
            client = Some(io);
            Ok(())
        };
        let outcome = asked.await;
        seen.note(&model, outcome);
        sleep(PAUSE).await;
    }
}

async fn new_connections(up: Rc<Up>, mut turns: Turns, body: Arc<[u8]>, seen: Rc<Seen>) {
    while !seen.stop.get() {
        let model = turns.model();
        let asked = async {
            let mut io = TcpStream::connect(up.gateway).await?;
            load::ask(&mut io, &model, &body).await
        };
        let outcome = asked.await;
        seen.note(&model, outcome);
        sleep(PAUSE).await;
    }
}

async fn by_grpc(up: Rc<Up>, mut turns: Turns, ask: ModelInferRequest, seen: Rc<Seen>) {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", up.gateway));
    let Ok(channel) = channel else { return seen.problem("the gateway's address is strange") };
    let mut client = GrpcInferenceServiceClient::new(channel.connect_lazy());
    while !seen.stop.get() {
        let model = turns.model();
        let ask = ModelInferRequest { model_name: model.clone(), ..ask.clone() };
        let outcome = client.model_infer(ask).await;
        seen.note(&model, outcome.map(drop).map_err(Into::into));
        sleep(PAUSE).await;
    }
}

/// Rolls `models` out, round and round, to the one artifact and the other.
async fn roll(up: Rc<Up>, models: Vec<String>, artifacts: [PathBuf; 2], seen: Rc<Seen>) {
    let rolled = async {
        let connection = up.open().await?;
        for round in 1.. {
            for model in &models {
                if seen.stop.get() {
                    return anyhow::Ok(());
                }
                up.submit_one(&connection, model, &artifacts[round % 2], MEMORY).await?;
                seen.rolled.set(seen.rolled.get() + 1);
                sleep(CHANGE_PAUSE).await;
            }
        }
        Ok(())
    };
    if let Err(error) = rolled.await {
        seen.failed.set(seen.failed.get() + 1);
        seen.problem(&format!("a rollout: {error:#}"));
    }
}

/// Deletes `models` and submits them anew, round and round.
async fn renew(up: Rc<Up>, models: Vec<String>, artifacts: [PathBuf; 2], seen: Rc<Seen>) {
    let renewed = async {
        let connection = up.open().await?;
        for round in 0.. {
            for model in &models {
                if seen.stop.get() {
                    return anyhow::Ok(());
                }
                remove(&connection, model).await?;
                up.submit_one(&connection, model, &artifacts[round % 2], MEMORY).await?;
                seen.deleted.set(seen.deleted.get() + 1);
                sleep(CHANGE_PAUSE).await;
            }
        }
        Ok(())
    };
    if let Err(error) = renewed.await {
        seen.failed.set(seen.failed.get() + 1);
        seen.problem(&format!("a deletion: {error:#}"));
    }
}

async fn unload(connection: &Connection, model: &str) -> anyhow::Result<()> {
    let model = Some(ModelReference { name: model.to_owned(), version: None });
    connection.scheduler().unload_model(UnloadModelRequest { model, ..Default::default() }).await?;
    Ok(())
}

/// Deletes `model`, and waits until it is gone.
async fn remove(connection: &Connection, model: &str) -> anyhow::Result<()> {
    unload(connection, model).await?;
    let began = Instant::now();
    let ask = || ListModelsRequest { name: Some(model.to_owned()), terminated: false };
    loop {
        let there = match connection.wharf().list_models(ask()).await {
            Ok(views) => views.into_inner().message().await,
            Err(status) => Err(status),
        };
        match there {
            Ok(None) => return Ok(()),
            // It is remembered for a while.
            Ok(Some(view)) if view.state == "Terminated" => return Ok(()),
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(()),
            Err(status) => return Err(status.into()),
            Ok(Some(view)) => ensure!(began.elapsed() < PATIENCE, "{model} is still {}: {}", view.state, view.reason),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn held(up: &Up, home: &Path) -> anyhow::Result<Held> {
    let tasks = up.metric("wharf_tasks").await?;
    let files = files(&home.join("agent"))?;
    Ok(Held { descriptors: up.process.descriptors()?, threads: up.process.threads()?, tasks, files })
}

/// What it holds once that stays the same for a second.
async fn at_rest(up: &Up, home: &Path) -> anyhow::Result<Held> {
    let began = Instant::now();
    let mut last = held(up, home).await?;
    loop {
        sleep(Duration::from_secs(1)).await;
        let now = held(up, home).await?;
        if now == last {
            return Ok(now);
        }
        ensure!(began.elapsed() < PATIENCE, "it does not come to rest: {last:?}, then {now:?}");
        last = now;
    }
}

/// Waits until it holds no more than `before`; what it holds at last.
async fn until_as_before(up: &Up, home: &Path, before: Held) -> anyhow::Result<Held> {
    let began = Instant::now();
    loop {
        let now = held(up, home).await?;
        let done = now.descriptors <= before.descriptors
            && now.threads <= before.threads
            && now.tasks <= before.tasks
            && now.files <= before.files;
        if done || began.elapsed() > PATIENCE {
            return Ok(now);
        }
        sleep(LOOK).await;
    }
}

/// Files in `folder`, all the way down, but for artifacts, which are kept for whoever wants them next.
fn files(folder: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    let Ok(entries) = fs::read_dir(folder) else { return Ok(0) };
    for entry in entries {
        let entry = entry?;
        let kept = entry.file_name() == "artifacts";
        count += match entry.file_type()?.is_dir() {
            true if kept => 0,
            true => files(&entry.path())?,
            false => 1,
        };
    }
    Ok(count)
}

fn mib(up: &Up) -> anyhow::Result<f64> {
    Ok(up.process.memory()? as f64 / 1_048_576.0)
}
