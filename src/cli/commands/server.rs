//! Commands about servers and their replicas.

use std::{collections::BTreeMap, time::Duration};

use super::{SUBSCRIBER, all, batch, model, next, refused, scheduler, unprintable, view};
use crate::{
    cli::{
        Context,
        args::{Plain, Replica, Server},
        failure::{Failure, seconds},
        json,
        output::counted,
    },
    rpc::{
        client::Connection,
        proto::{
            scheduler::ServerStatusRequest,
            wharf::{CordonReplicaRequest, DrainProgress, DrainReplicaRequest, ListServersRequest, ServerView},
        },
    },
};

/// How long past its deadline a drain's last word is waited for.
const LAST_WORD: Duration = Duration::from_secs(10);

/// `server ...`.
pub(super) async fn run(context: &Context, command: Server) -> Result<(), Failure> {
    match command {
        Server::List { output, watch, scheduler: at } => {
            let connection = scheduler(context, &at).await?;
            if watch { self::watch(context, &connection, None).await } else { list(context, &connection, output).await }
        }
        Server::Status { name, output, watch, scheduler: at } => {
            let connection = scheduler(context, &at).await?;
            if watch {
                return self::watch(context, &connection, Some(name)).await;
            }
            show(
                context,
                &connection,
                &name,
                output.unwrap_or(if context.output.out_is_terminal() { Plain::Table } else { Plain::Json }),
            )
            .await
        }
        Server::Drain { target, timeout, scheduler: at } => {
            let connection = scheduler(context, &at).await?;
            drain(context, &connection, target, Duration::from_secs(timeout)).await
        }
        Server::Probe(args) => super::probe::run(context, args).await,
        Server::Cordon { target, scheduler: at } => {
            let connection = scheduler(context, &at).await?;
            cordon(context, &connection, target, false).await
        }
        Server::Uncordon { target, scheduler: at } => {
            let connection = scheduler(context, &at).await?;
            cordon(context, &connection, target, true).await
        }
    }
}

async fn views(connection: &Connection, name: Option<&str>) -> Result<BTreeMap<String, ServerView>, Failure> {
    let mut client = connection.wharf();
    let request = ListServersRequest { name: name.map(str::to_owned) };
    let stream = connection.call(client.list_servers(request)).await.map_err(refused)?.into_inner();
    Ok(all(connection, stream).await?.into_iter().map(|view| (view.name.clone(), view)).collect())
}

async fn list(context: &Context, connection: &Connection, output: Plain) -> Result<(), Failure> {
    let views = views(connection, None).await?;
    match output {
        Plain::Table => {
            if views.is_empty() {
                context.output.note("there are no servers yet: none is registered, and no agent has called");
            }
            view::servers(&views).print(&context.output);
            Ok(())
        }
        Plain::Json => model::print_array(context, "wharf.v1.ServerView", views.values()),
    }
}

/// Shows one server.
pub(super) async fn show(context: &Context, connection: &Connection, name: &str, format: Plain) -> Result<(), Failure> {
    match format {
        Plain::Table => {
            let view = views(connection, Some(name)).await?.remove(name).ok_or_else(|| unknown(name))?;
            for line in view::server(context, &view) {
                context.output.data(&line);
            }
            Ok(())
        }
        Plain::Json => {
            let mut client = connection.scheduler();
            let request = ServerStatusRequest { subscriber_name: SUBSCRIBER.to_owned(), name: Some(name.to_owned()) };
            let stream = connection.call(client.server_status(request)).await.map_err(refused)?.into_inner();
            for status in all(connection, stream).await? {
                let line = json::line("seldon.mlops.scheduler.ServerStatusResponse", &status).map_err(unprintable)?;
                context.output.data(&line);
            }
            Ok(())
        }
    }
}

async fn watch(context: &Context, connection: &Connection, name: Option<String>) -> Result<(), Failure> {
    let one = name.is_some();
    let mut client = connection.wharf();
    let mut stream =
        connection.call(client.watch_servers(ListServersRequest { name })).await.map_err(refused)?.into_inner();
    let mut known = BTreeMap::new();
    let mut live = context.output.live_data();
    loop {
        let views = batch(context, connection, &mut stream).await?;
        if views.is_empty() {
            return Ok(());
        }
        if !context.output.out_is_terminal() {
            for view in views {
                context.output.data(&json::line("wharf.v1.ServerView", &view).map_err(unprintable)?);
            }
            continue;
        }
        known.extend(views.into_iter().map(|view| (view.name.clone(), view)));
        let lines = match known.values().next() {
            Some(view) if one => view::server(context, view),
            _ => view::servers(&known).lines(&context.output),
        };
        live.draw(&lines);
    }
}

async fn drain(context: &Context, connection: &Connection, target: Replica, patience: Duration) -> Result<(), Failure> {
    let what = described(&target);
    let mut client = connection.wharf();
    let request = DrainReplicaRequest {
        server: target.name,
        replica: target.replica,
        deadline_millis: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
    };
    let mut stream = connection.call(client.drain_replica(request)).await.map_err(refused)?.into_inner();
    let mut live = context.output.live_progress();
    let mut last = DrainProgress::default();
    let follow = async {
        while let Some(progress) = next(context, connection, &mut stream).await? {
            let line = format!("{what}: {} moved, {} left", copies(progress.moved), progress.left);
            if context.output.err_is_terminal() {
                live.draw(&[line]);
            } else if (progress.moved, progress.left) != (last.moved, last.left) {
                context.output.note(&line);
            }
            last = progress;
        }
        Ok::<_, Failure>(())
    };
    let outcome = tokio::time::timeout(patience + LAST_WORD, follow).await;
    live.clear();
    if let Ok(Err(failure)) = outcome {
        return Err(failure);
    }
    for stuck in &last.stuck {
        context.output.warning(stuck);
    }
    if last.done && last.left == 0 {
        context.output.note(&format!("{what}: drained, {} moved", copies(last.moved)));
        return Ok(());
    }
    let left = format!(
        "{what}: {} left and still serving, {} moved; nothing new is placed there until `wharf server uncordon`",
        copies(last.left),
        last.moved
    );
    // What has nowhere to go is no matter of time.
    if last.stuck.is_empty() {
        return Err(Failure::TimedOut(format!("{left}; not done within {}", seconds(patience))));
    }
    Err(Failure::Failed(left))
}

async fn cordon(context: &Context, connection: &Connection, target: Replica, undo: bool) -> Result<(), Failure> {
    let what = described(&target);
    let mut client = connection.wharf();
    let request = CordonReplicaRequest { server: target.name, replica: target.replica, undo };
    let changed = connection.call(client.cordon_replica(request)).await.map_err(refused)?.into_inner().replicas;
    let done = if undo { "takes new copies again" } else { "takes no new copies" };
    context.output.note(&format!("{what} {done}; {} changed", counted(changed, "replica", "replicas")));
    Ok(())
}

fn copies(count: u32) -> String {
    counted(count, "copy", "copies")
}

fn described(target: &Replica) -> String {
    match target.replica {
        Some(index) => format!("replica {}-{index}", target.name),
        None => format!("server {}", target.name),
    }
}

fn unknown(name: &str) -> Failure {
    Failure::Failed(format!("there is no server {name}; `wharf server list` shows those there are"))
}
