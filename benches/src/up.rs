//! `wharf up` as people start it: how soon it answers, what it takes when it is idle, and what more models than memory
//! holds cost those who ask.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::LocalSet,
};
use wharf::rpc::{
    client::Connection,
    proto::{
        inference::{InferTensorContents, ModelInferRequest, model_infer_request::InferInputTensor},
        scheduler::{MetaData, Model, ModelSpec},
        wharf::{ListModelsRequest, SubmitModelRequest},
    },
};

use crate::{
    gateway::Places,
    load::{self, Outcome, Plan, Protocol},
    models::{self, Picks, Spread},
    proc::{self, Proc},
    report::{Goal, Report, Row, row},
};

const PATIENCE: Duration = Duration::from_secs(60);
/// The model that is served: an ONNX file of 0.9 MB.
const SAMPLE: &str = "mlp";
/// Models that memory holds, and what each declares.
const HELD: usize = 100;
const MEMORY: u64 = 4 << 20;

/// A running `wharf up`.
#[derive(Debug)]
pub(crate) struct Up {
    pub(crate) process: Proc,
    api: SocketAddr,
    page: SocketAddr,
    pub(crate) gateway: SocketAddr,
    pub(crate) began: Instant,
}

impl Up {
    /// Starts it on `cores` with what `home` has, or anew.
    pub(crate) fn start(places: &Places, home: &Path, cores: &str, registry: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(home)?;
        fs::write(home.join("servers.toml"), registry)?;
        let (api, agents, page, gateway) = (proc::free()?, proc::free()?, proc::free()?, proc::free()?);
        let mut words = vec![places.wharf.display().to_string(), "up".to_owned()];
        for setting in [
            format!("scheduler.listen={api}"),
            format!("scheduler.agents={agents}"),
            format!("scheduler.http={page}"),
            format!("scheduler.data_dir={}", home.join("scheduler").display()),
            format!("scheduler.servers={}", home.join("servers.toml").display()),
            format!("agent.data_dir={}", home.join("agent").display()),
            format!("gateway.listen={gateway}"),
        ] {
            words.extend(["--set".to_owned(), setting]);
        }
        let began = Instant::now();
        let process = Proc::start_on("up", cores, &words, home)?;
        Ok(Self { process, api, page, gateway, began })
    }

    /// A connection to the scheduler API, as soon as it is there.
    pub(crate) async fn open(&self) -> anyhow::Result<Connection> {
        let asked = Instant::now();
        loop {
            match Connection::open(&self.api.to_string(), None, Duration::from_secs(1)).await {
                Ok(connection) => return Ok(connection),
                Err(error) => ensure!(asked.elapsed() < PATIENCE, "the API did not come: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Submits the model named `name`.
    pub(crate) async fn submit_one(
        &self,
        connection: &Connection,
        name: &str,
        artifact: &Path,
        memory: u64,
    ) -> anyhow::Result<()> {
        let model = Model {
            meta: Some(MetaData { name: name.to_owned(), ..Default::default() }),
            model_spec: Some(ModelSpec {
                uri: artifact.display().to_string(),
                requirements: vec!["onnx".to_owned()],
                memory_bytes: Some(memory),
                ..Default::default()
            }),
            ..Default::default()
        };
        connection.wharf().submit_model(SubmitModelRequest { model: Some(model), rollout: None }).await?;
        Ok(())
    }

    /// Waits until there are `count` models and all are Available.
    pub(crate) async fn until_all_available(&self, connection: &Connection, count: usize) -> anyhow::Result<()> {
        let asked = Instant::now();
        loop {
            let mut views = connection.wharf().list_models(ListModelsRequest::default()).await?.into_inner();
            let (mut available, mut other) = (0, String::new());
            while let Some(view) = views.message().await? {
                if view.state == "Available" {
                    available += 1;
                } else {
                    other = format!("{} is {}: {}", view.name, view.state, view.reason);
                }
            }
            if available == count {
                return Ok(());
            }
            ensure!(asked.elapsed() < PATIENCE, "{available} of {count} models answer; {other}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Submits `count` models under the names of [`models::name`]; if there are more than one, waits until all answer.
    async fn submit(&self, artifact: &Path, count: usize) -> anyhow::Result<()> {
        let connection = self.open().await?;
        for number in 0..count {
            self.submit_one(&connection, &models::name(number), artifact, MEMORY).await?;
        }
        if count > 1 { self.until_all_available(&connection, count).await } else { Ok(()) }
    }

    /// The sum of a metric over its labels; 0 where nothing was counted.
    pub(crate) async fn metric(&self, name: &str) -> anyhow::Result<u64> {
        let mut io = TcpStream::connect(self.page).await?;
        io.write_all(b"GET /metrics HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").await?;
        let mut said = String::new();
        io.read_to_string(&mut said).await?;
        let values = said.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok()).flatten()
        });
        Ok(values.sum::<f64>() as u64)
    }
}

/// A model of the tests, and requests that it answers.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) folder: PathBuf,
    pub(crate) body: Arc<[u8]>,
    pub(crate) grpc: ModelInferRequest,
}

impl Sample {
    /// Reads the one named `name`.
    pub(crate) fn read(name: &str) -> anyhow::Result<Self> {
        let folder = std::env::current_dir()?.join("tests/models");
        let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json"))?)?;
        let named = expected[name][0]["inputs"].as_object().context("the sample has no inputs")?;
        let (mut inputs, mut tensors) = (Vec::new(), Vec::new());
        for (name, tensor) in named {
            let mut input = tensor.clone();
            input["name"] = name.as_str().into();
            inputs.push(input);
            let numbers = |field: &str| tensor[field].as_array().cloned().unwrap_or_default();
            let values = numbers("data").iter().map(|value| value.as_f64().unwrap_or_default() as f32).collect();
            tensors.push(InferInputTensor {
                name: name.clone(),
                datatype: tensor["datatype"].as_str().unwrap_or_default().to_owned(),
                shape: numbers("shape").iter().filter_map(Value::as_i64).collect(),
                contents: Some(InferTensorContents { fp32_contents: values, ..Default::default() }),
                ..Default::default()
            });
        }
        let body = serde_json::to_vec(&serde_json::json!({ "inputs": inputs }))?.into();
        let grpc = ModelInferRequest { inputs: tensors, ..Default::default() };
        Ok(Self { folder: folder.join(name), body, grpc })
    }
}

fn registry(memory: u64, overcommit: u32, eviction: &str) -> String {
    format!(
        "[[server]]\nname = \"onnx\"\nruntime = \"builtin\"\ncapabilities = [\"onnx\"]\nreplicas = 1\n\
         memory = \"{memory}\"\novercommit_percent = {overcommit}\neviction = \"{eviction}\"\n"
    )
}

/// How soon it answers, and what it takes.
pub(crate) fn start(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let Sample { folder: artifact, body, .. } = Sample::read(SAMPLE)?;
    let registry = registry(1 << 30, 10, "lru");
    let (mut first, mut again, mut more, mut idle) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..if quick { 3 } else { 5 } {
        let home = places.dir.join(format!("up-{round}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let up = Up::start(places, &home, &proc::all_cores(), &registry)?;
        runtime.block_on(up.submit(&artifact, 1))?;
        runtime.block_on(answered(&up, &models::name(0), &body))?;
        first.push(up.began.elapsed().as_secs_f64());
        more.push(runtime.block_on(one_more(&up, &artifact, &body))?);
        drop(up);
        let up = Up::start(places, &home, &proc::all_cores(), &registry)?;
        runtime.block_on(answered(&up, &models::name(0), &body))?;
        again.push(up.began.elapsed().as_secs_f64());
        drop(up);
        let up = Up::start(places, &places.dir.join(format!("idle-{round}")), &proc::all_cores(), &registry)?;
        std::thread::sleep(Duration::from_secs(3));
        idle.push(up.process.memory()? as f64 / 1_048_576.0);
    }
    let binary = [fs::metadata(&places.wharf)?.len() as f64 / 1_048_576.0];
    let rows = [
        row(
            "`wharf up` to the first answer, with a model to submit and load",
            "s",
            &first,
            None,
            Some(Goal::at_most(1.0)),
        ),
        row(
            "`wharf up` to the first answer, with the model in its journal",
            "s",
            &again,
            None,
            Some(Goal::at_most(1.0)),
        ),
        row("one more model, from its submission to its first answer by the gateway", "ms", &more, None, None),
        row("`wharf up`, idle: memory", "MiB", &idle, None, Some(Goal::at_most(50.0))),
        row("the program, stripped", "MiB", &binary, None, Some(Goal::at_most(60.0))),
    ];
    for row in rows {
        println!("{}", crate::line(&row));
        report.rows.push(row);
    }
    Ok(())
}

/// Waits for the first answer of `model`.
async fn answered(up: &Up, model: &str, body: &[u8]) -> anyhow::Result<()> {
    let asked = Instant::now();
    while !load::once(up.gateway, model, body).await.unwrap_or(false) {
        ensure!(asked.elapsed() < PATIENCE, "no answer of {model} within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    Ok(())
}

/// Milliseconds, at the median, from the submission of a model to its first answer by the gateway: it is journaled,
/// placed, loaded and routed in between, its artifact at hand.
async fn one_more(up: &Up, artifact: &Path, body: &[u8]) -> anyhow::Result<f64> {
    let connection = up.open().await?;
    let mut took = Vec::new();
    for number in 1..=30 {
        let (name, began) = (models::name(number), Instant::now());
        up.submit_one(&connection, &name, artifact, MEMORY).await?;
        answered(up, &name, body).await?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    Ok(took[took.len() / 2])
}

/// What more models than memory holds cost.
pub(crate) fn overcommit(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let Sample { folder: artifact, body, .. } = Sample::read(SAMPLE)?;
    let extras: &[usize] = if quick { &[0, 10] } else { &[0, 10, 20, 50] };
    let evictions: &[&str] = if quick { &["lru"] } else { &["lru", "cost"] };
    let rounds = if quick { 3 } else { 5 };
    for &eviction in evictions {
        let mut ups = Vec::new();
        for &extra in extras {
            let home = places.dir.join(format!("over-{eviction}-{extra}"));
            // The server has a core, as in the figures of the gateway, and the load has the other one.
            let registry = registry(HELD as u64 * MEMORY, 60, eviction);
            let up = Up::start(places, &home, &proc::PROXY_CORE.to_string(), &registry)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(up.submit(&artifact, HELD + extra))?;
            ups.push((extra, up));
        }
        for spread in [Spread::Zipf, Spread::Uniform] {
            let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); ups.len()];
            for _ in 0..rounds {
                for ((extra, up), outcomes) in ups.iter().zip(&mut outcomes) {
                    let plan = Plan {
                        to: up.gateway,
                        protocol: Protocol::Rest,
                        picks: Picks::new(HELD + extra, spread),
                        body: body.len(),
                        payload: Some(Arc::clone(&body)),
                        connections: 4,
                        streams: 1,
                        warm_up: Duration::from_millis(500),
                        measure: Duration::from_millis(if quick { 1000 } else { 3000 }),
                    };
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                    let ran = LocalSet::new().block_on(&runtime, load::run(plan, &|| up.process.cpu()));
                    outcomes.push(ran.with_context(|| format!("{extra} % more models, {eviction}"))?);
                }
            }
            let rows = percentiles(&ups, &outcomes, spread, eviction);
            for row in &rows {
                println!("{}", crate::line(row));
            }
            report.rows.extend(rows);
        }
    }
    Ok(())
}

fn percentiles(ups: &[(usize, Up)], outcomes: &[Vec<Outcome>], spread: Spread, eviction: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let of = |which: usize, share: f64| outcomes[which].iter().map(|o| o.latency(share)).collect::<Vec<f64>>();
    for (which, (extra, _)) in ups.iter().enumerate().skip(1) {
        let rates = |which: usize| outcomes[which].iter().map(Outcome::rate).collect::<Vec<f64>>();
        let what = format!("{extra} % more models than memory holds, {}, {eviction}: answers", spread.name());
        rows.push(row(&what, "req/s", &rates(which), Some(("0 %", &rates(0))), None));
        for (share, name) in [(0.5, "p50"), (0.95, "p95"), (0.99, "p99")] {
            let bounded = *extra == 10 && spread == Spread::Zipf && name == "p95";
            let what = format!("{extra} % more models than memory holds, {}, {eviction}: {name}", spread.name());
            let goal = bounded.then(|| Goal::ratio_at_most(2.0));
            rows.push(row(&what, "us", &of(which, share), Some(("0 %", &of(0, share))), goal));
        }
    }
    rows
}
