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
use tokio::task::LocalSet;
use wharf::rpc::{
    client::Connection,
    proto::{
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
struct Up {
    process: Proc,
    api: SocketAddr,
    gateway: SocketAddr,
    began: Instant,
}

impl Up {
    /// Starts it on `cores` with what `home` has, or anew.
    fn start(places: &Places, home: &Path, cores: &str, registry: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(home)?;
        fs::write(home.join("servers.toml"), registry)?;
        let (api, agents, http, gateway) = (proc::free()?, proc::free()?, proc::free()?, proc::free()?);
        let mut words = vec![places.wharf.display().to_string(), "up".to_owned()];
        for setting in [
            format!("scheduler.listen={api}"),
            format!("scheduler.agents={agents}"),
            format!("scheduler.http={http}"),
            format!("scheduler.data_dir={}", home.join("scheduler").display()),
            format!("scheduler.servers={}", home.join("servers.toml").display()),
            format!("agent.data_dir={}", home.join("agent").display()),
            format!("gateway.listen={gateway}"),
        ] {
            words.extend(["--set".to_owned(), setting]);
        }
        let began = Instant::now();
        let process = Proc::start_on("up", cores, &words, home)?;
        Ok(Self { process, api, gateway, began })
    }

    /// Submits `count` models under the names of [`models::name`].
    async fn submit(&self, artifact: &Path, count: usize) -> anyhow::Result<()> {
        let connection = loop {
            match Connection::open(&self.api.to_string(), None, Duration::from_secs(1)).await {
                Ok(connection) => break connection,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
            ensure!(self.began.elapsed() < PATIENCE, "the API did not come");
        };
        let mut client = connection.wharf();
        for number in 0..count {
            let model = Model {
                meta: Some(MetaData { name: models::name(number), ..Default::default() }),
                model_spec: Some(ModelSpec {
                    uri: artifact.display().to_string(),
                    requirements: vec!["onnx".to_owned()],
                    memory_bytes: Some(MEMORY),
                    ..Default::default()
                }),
                ..Default::default()
            };
            client.submit_model(SubmitModelRequest { model: Some(model), rollout: None }).await?;
        }
        if count > 1 {
            loop {
                let mut views = client.list_models(ListModelsRequest::default()).await?.into_inner();
                let mut available = 0;
                while let Some(view) = views.message().await? {
                    available += usize::from(view.state == "Available");
                }
                if available == count {
                    break;
                }
                ensure!(self.began.elapsed() < PATIENCE, "{available} of {count} models answer");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }
}

/// The folder of the sample, and a request that it answers.
fn sample() -> anyhow::Result<(PathBuf, Arc<[u8]>)> {
    let folder = std::env::current_dir()?.join("tests/models");
    let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json"))?)?;
    let inputs = expected[SAMPLE][0]["inputs"].as_object().context("the sample has no inputs")?;
    let inputs: Vec<Value> = inputs
        .iter()
        .map(|(name, tensor)| {
            let mut tensor = tensor.clone();
            tensor["name"] = name.as_str().into();
            tensor
        })
        .collect();
    let body = serde_json::to_vec(&serde_json::json!({ "inputs": inputs }))?;
    Ok((folder.join(SAMPLE), body.into()))
}

fn registry(memory: u64, overcommit: u32, eviction: &str) -> String {
    format!(
        "[[server]]\nname = \"onnx\"\nruntime = \"builtin\"\ncapabilities = [\"onnx\"]\nreplicas = 1\n\
         memory = \"{memory}\"\novercommit_percent = {overcommit}\neviction = \"{eviction}\"\n"
    )
}

/// How soon it answers, and what it takes.
pub(crate) fn start(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let (artifact, body) = sample()?;
    let registry = registry(1 << 30, 10, "lru");
    let (mut first, mut again, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..if quick { 3 } else { 5 } {
        let home = places.dir.join(format!("up-{round}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let up = Up::start(places, &home, &proc::all_cores(), &registry)?;
        runtime.block_on(up.submit(&artifact, 1))?;
        first.push(runtime.block_on(answered(&up, &body))?);
        drop(up);
        let up = Up::start(places, &home, &proc::all_cores(), &registry)?;
        again.push(runtime.block_on(answered(&up, &body))?);
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
        row("`wharf up`, idle: memory", "MiB", &idle, None, Some(Goal::at_most(50.0))),
        row("the program, stripped", "MiB", &binary, None, Some(Goal::at_most(60.0))),
    ];
    for row in rows {
        println!("{}", crate::line(&row));
        report.rows.push(row);
    }
    Ok(())
}

/// Seconds from the start of the process to the first answer of the model.
async fn answered(up: &Up, body: &[u8]) -> anyhow::Result<f64> {
    while up.began.elapsed() < PATIENCE {
        if load::once(up.gateway, &models::name(0), body).await.unwrap_or(false) {
            return Ok(up.began.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    anyhow::bail!("no answer within {PATIENCE:?}")
}

/// What more models than memory holds cost.
pub(crate) fn overcommit(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let (artifact, body) = sample()?;
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
        for (share, name) in [(0.5, "p50"), (0.95, "p95"), (0.99, "p99")] {
            let bounded = *extra == 10 && spread == Spread::Zipf && name == "p95";
            let what = format!("{extra} % more models than memory holds, {}, {eviction}: {name}", spread.name());
            let goal = bounded.then(|| Goal::ratio_at_most(2.0));
            rows.push(row(&what, "us", &of(which, share), Some(("0 %", &of(0, share))), goal));
        }
    }
    rows
}
