//! The roles on this machine: settings, logging, signals, and what a person is told while they run.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use tokio_util::sync::CancellationToken;

use super::{Guests, Output, RoleArgs, Roles};
use crate::{
    app::{
        origins::Origins,
        process::{Places, Process, journal_check, routes_check, session_check, up},
    },
    ports::{Clock as _, SystemClock},
    settings::{LogFormat, Settings, SettingsFile},
    telemetry::{
        log::{Format, LogGuard, LogOptions, init},
        metrics::Role,
    },
};

/// How often it is looked whether the parent is still there.
const PARENT_LOOK: Duration = Duration::from_millis(200);

/// Runs roles in this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThisProcess;

/// What every role starts with.
struct Begun {
    settings: Settings,
    shutdown: CancellationToken,
    fatal: tokio::sync::mpsc::UnboundedReceiver<String>,
    parent: Option<u32>,
    process: Process,
    _log: LogGuard,
}

/// The settings that the arguments, the environment and the file name.
pub(super) fn settings(args: &RoleArgs) -> anyhow::Result<Settings> {
    let text = match &args.config {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path);
            Some(text.with_context(|| format!("can't read the settings file {}", path.display()))?)
        }
    };
    let name = args.config.as_ref().map(|path: &PathBuf| path.display().to_string()).unwrap_or_default();
    let file = text.as_deref().map(|text| SettingsFile { name: &name, text });
    Settings::load(file, std::env::vars(), args.set.iter().cloned()).map_err(|p| anyhow!("{p}"))
}

fn begin(args: &RoleArgs, output: &Output, roles: &[Role]) -> anyhow::Result<Begun> {
    let settings = settings(args)?;
    let format = match settings.log.format {
        LogFormat::Json => Format::Json,
        LogFormat::Text => Format::Text { colours: output.err_is_terminal() },
    };
    let filter = match args.verbose {
        0 => settings.log.level.0.clone(),
        1 => "debug".to_owned(),
        _ => "trace".to_owned(),
    };
    let clock = SystemClock::new();
    let log = init(&LogOptions { filter, format }, Arc::new(move || clock.now()))?;
    let shutdown = CancellationToken::new();
    let (send, fatal) = tokio::sync::mpsc::unbounded_channel();
    let end = move |why: String| drop(send.send(why));
    let process = Process::new(settings.clone(), roles, shutdown.clone(), Arc::new(end));
    let process = process.with_origins(Origins::new(std::env::vars()));
    Ok(Begun { settings, shutdown, fatal, parent: args.parent, process, _log: log })
}

/// Comes back when `parent` is no longer this process's parent; never when there is none to end with.
async fn orphaned(parent: Option<u32>) {
    let Some(parent) = parent else { return std::future::pending().await };
    while std::os::unix::process::parent_id() == parent {
        tokio::time::sleep(PARENT_LOOK).await;
    }
}

/// Waits for the signal to stop, or for what the process can't go on with.
async fn until_stopped(begun: &mut Begun) -> anyhow::Result<()> {
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        signal = tokio::signal::ctrl_c() => Ok(signal?),
        _ = terminated.recv() => Ok(()),
        () = orphaned(begun.parent) => Ok(()),
        Some(why) = begun.fatal.recv() => Err(anyhow!(why)),
    }
}

fn tell(places: &Places, output: &Output) {
    if let Some(api) = &places.api {
        output.note(&format!("scheduler API  {api}"));
    }
    if let Some(gateway) = &places.gateway {
        output.note(&format!("inference      http://{gateway} (REST and gRPC)"));
    }
    for (what, address) in &places.pages {
        output.note(&format!("operators      http://{address}/metrics, /healthz, /readyz ({what})"));
    }
    output.note("ready; Ctrl-C stops it");
}

impl Roles for ThisProcess {
    async fn up(&self, args: &RoleArgs, output: &Output) -> anyhow::Result<()> {
        let mut begun = begin(args, output, &[Role::Scheduler, Role::Gateway, Role::Agent])?;
        let (places, running) = up(&mut begun.process).await?;
        tell(&places, output);
        let ended = until_stopped(&mut begun).await;
        if ended.is_ok() {
            begun.shutdown.cancel();
            begun.process.stopped().await;
            running.stopped().await;
        }
        ended
    }

    async fn scheduler(&self, args: &RoleArgs, output: &Output) -> anyhow::Result<()> {
        let mut begun = begin(args, output, &[Role::Scheduler])?;
        let running = begun.process.scheduler().await?;
        begun.process.registry(&running.handle, None).await?;
        let handle = running.handle.clone();
        let checks = Arc::new(move || vec![journal_check(&handle)]);
        let page = begun.process.page(begun.settings.scheduler.http.as_str(), "scheduler.http", checks).await?;
        let places = Places { api: Some(running.api.clone()), gateway: None, pages: vec![("scheduler", page)] };
        tell(&places, output);
        let ended = until_stopped(&mut begun).await;
        if ended.is_ok() {
            begun.shutdown.cancel();
            begun.process.stopped().await;
            running.stopped().await;
        }
        ended
    }

    async fn agent(&self, args: &RoleArgs, output: &Output) -> anyhow::Result<()> {
        let mut begun = begin(args, output, &[Role::Agent])?;
        let (door, agent) = begun.process.agent().await?;
        let checked = Arc::clone(&agent);
        let checks = Arc::new(move || vec![session_check(&checked)]);
        let page = begun.process.page(begun.settings.agent.http.as_str(), "agent.http", checks).await?;
        output.note(&format!("door           {door}"));
        tell(&Places { api: None, gateway: None, pages: vec![("agent", page)] }, output);
        let ended = until_stopped(&mut begun).await;
        if ended.is_ok() && agent.session_problem().is_none() {
            let patience = begun.settings.agent.drain_deadline;
            let seconds = patience.as_secs();
            output.note(&format!("its models move elsewhere, for at most {seconds} s; interrupt again to stop now"));
            agent.drain();
            tokio::select! {
                // Stopped either way: whether all have moved is seen by whoever looks at the scheduler.
                _ = tokio::time::timeout(patience, agent.drained()) => {}
                again = until_stopped(&mut begun) => again?,
            }
        }
        begun.shutdown.cancel();
        begun.process.stopped().await;
        ended
    }

    async fn gateway(&self, args: &RoleArgs, output: &Output) -> anyhow::Result<()> {
        let mut begun = begin(args, output, &[Role::Gateway])?;
        let scheduler = begun.settings.gateway.scheduler.as_str().to_owned();
        let (address, gateway) = begun.process.gateway(scheduler).await?;
        let checks = Arc::new(move || vec![routes_check(&gateway)]);
        let page = begun.process.page(begun.settings.gateway.http.as_str(), "gateway.http", checks).await?;
        tell(&Places { api: None, gateway: Some(address), pages: vec![("gateway", page)] }, output);
        let ended = until_stopped(&mut begun).await;
        begun.shutdown.cancel();
        begun.process.stopped().await;
        ended
    }

    async fn demo(&self, models: &Path, guests: Option<Guests>, output: &Output) -> anyhow::Result<()> {
        super::demo::run(models, guests, output).await
    }
}
