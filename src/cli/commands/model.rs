//! Commands that show models.

use std::{collections::BTreeMap, io::Read};

use super::{SUBSCRIBER, all, batch, documents, load::wait_for, refused, scheduler, unprintable, view};
use crate::{
    cli::{
        Context,
        args::{Format, ModelList, ModelStatus, Plain, StatusFiles},
        failure::Failure,
        json,
        wait::Goal,
    },
    manifest::{self, Kind},
    rpc::{
        client::Connection,
        proto::{
            scheduler::{ModelReference, ModelStatusRequest, ModelStatusResponse},
            wharf::{ListModelsRequest, ModelView},
        },
        wire,
    },
};

/// `model status`.
pub(super) async fn status(context: &Context, args: ModelStatus) -> Result<(), Failure> {
    let connection = scheduler(context, &args.scheduler).await?;
    if let Some(state) = args.wait {
        let goal = Goal { model: args.name.clone(), state, submission: None };
        wait_for(context, &connection, vec![goal], args.timeout).await?;
        if !context.output.out_is_terminal() {
            return Ok(());
        }
    }
    if args.watch {
        return watch(context, &connection, Some(args.name), true).await;
    }
    show(context, &connection, &args.name, format(context, args.output)).await
}

/// `status`: of every object in the files.
pub(super) async fn status_of_files(
    context: &Context,
    stdin: Box<dyn Read + Send>,
    args: StatusFiles,
) -> Result<(), Failure> {
    let documents = documents(context, stdin, args.files).await?;
    let connection = scheduler(context, &args.scheduler).await?;
    let format = format(context, args.output);
    if args.wait {
        let models = documents.iter().filter_map(|document| match &document.kind {
            Kind::Model(definition) => Some(definition.name.to_string()),
            Kind::Server(_) => None,
        });
        let goals = models.map(|model| Goal { model, state: "ModelAvailable".to_owned(), submission: None }).collect();
        wait_for(context, &connection, goals, args.timeout).await?;
        if !context.output.out_is_terminal() {
            return Ok(());
        }
    }
    for document in documents {
        match document.kind {
            Kind::Model(definition) => show(context, &connection, definition.name.as_str(), format).await?,
            Kind::Server(server) => {
                let plain = match format {
                    Format::Table => Plain::Table,
                    Format::Json => Plain::Json,
                    Format::Yaml => {
                        context.output.warning(&format!("{}: a server is not shown as YAML", document.source));
                        continue;
                    }
                };
                super::server::show(context, &connection, server.name.as_str(), plain).await?;
            }
        }
    }
    Ok(())
}

/// What is shown when nobody says how: a table to a person, Seldon's JSON to a script.
fn format(context: &Context, given: Option<Format>) -> Format {
    given.unwrap_or(if context.output.out_is_terminal() { Format::Table } else { Format::Json })
}

async fn show(context: &Context, connection: &Connection, name: &str, format: Format) -> Result<(), Failure> {
    match format {
        Format::Table => {
            let view = views(connection, Some(name), true).await?.remove(name).ok_or_else(|| unknown(name))?;
            for line in view::model(context, &view) {
                context.output.data(&line);
            }
        }
        Format::Json => {
            for status in statuses(connection, Some(name)).await? {
                let line = json::line("seldon.mlops.scheduler.ModelStatusResponse", &status).map_err(unprintable)?;
                context.output.data(&line);
            }
        }
        Format::Yaml => manifests(context, connection, Some(name)).await?,
    }
    Ok(())
}

/// `model list`.
pub(super) async fn list(context: &Context, args: ModelList) -> Result<(), Failure> {
    let connection = scheduler(context, &args.scheduler).await?;
    if args.watch {
        return watch(context, &connection, None, args.terminated).await;
    }
    match args.output {
        Format::Table => {
            let views = views(&connection, None, args.terminated).await?;
            if views.is_empty() {
                context.output.note("there are no models; load one with `wharf model load -f FILE`");
            }
            view::models(&views).print(&context.output);
        }
        Format::Json => {
            let views = views(&connection, None, args.terminated).await?;
            print_array(context, "wharf.v1.ModelView", views.values())?;
        }
        Format::Yaml => manifests(context, &connection, None).await?,
    }
    Ok(())
}

/// Messages as one JSON array, each on its own lines.
pub(super) fn print_array<'a, M: prost::Message + 'a>(
    context: &Context,
    name: &str,
    messages: impl Iterator<Item = &'a M>,
) -> Result<(), Failure> {
    let items: Result<Vec<String>, String> = messages.map(|message| json::line(name, message)).collect();
    let array = format!("[{}]", items.map_err(unprintable)?.join(","));
    context.output.data(&json::indent(&array).unwrap_or(array));
    Ok(())
}

/// Models by name, as the scheduler sees them now.
async fn views(
    connection: &Connection,
    name: Option<&str>,
    terminated: bool,
) -> Result<BTreeMap<String, ModelView>, Failure> {
    let mut client = connection.wharf();
    let request = ListModelsRequest { name: name.map(str::to_owned), terminated };
    let stream = connection.call(client.list_models(request)).await.map_err(refused)?.into_inner();
    let views = all(connection, stream).await?;
    // A name may be told twice, deleted and created again: the newest creation counts.
    let mut newest: BTreeMap<String, ModelView> = BTreeMap::new();
    for view in views {
        match newest.get(&view.name) {
            Some(known) if known.uid > view.uid => {}
            _ => drop(newest.insert(view.name.clone(), view)),
        }
    }
    Ok(newest)
}

async fn statuses(connection: &Connection, name: Option<&str>) -> Result<Vec<ModelStatusResponse>, Failure> {
    let mut client = connection.scheduler();
    let request = ModelStatusRequest {
        subscriber_name: SUBSCRIBER.to_owned(),
        model: name.map(|name| ModelReference { name: name.to_owned(), version: None }),
        all_versions: false,
    };
    let stream = connection.call(client.model_status(request)).await.map_err(refused)?.into_inner();
    all(connection, stream).await
}

/// The manifests that would submit what is there.
async fn manifests(context: &Context, connection: &Connection, name: Option<&str>) -> Result<(), Failure> {
    let views = views(connection, name, false).await?;
    let mut first = true;
    for status in statuses(connection, name).await? {
        let newest = status.versions.into_iter().max_by_key(|version| version.version);
        let (false, Some(model)) = (status.deleted, newest.and_then(|version| version.model_defn)) else { continue };
        let rollout = views.get(&status.model_name).and_then(|view| view.rollout);
        let definition =
            wire::definition_from_wire(Some(model), rollout).map_err(|refusal| unprintable(refusal.message))?;
        if !first {
            context.output.data("---");
        }
        first = false;
        context.output.raw(manifest::to_yaml(&definition).as_bytes());
    }
    match (first, name) {
        (true, Some(name)) => Err(unknown(name)),
        _ => Ok(()),
    }
}

/// Shows models again whenever one changes: over itself on a terminal, one line per change elsewhere.
async fn watch(
    context: &Context,
    connection: &Connection,
    name: Option<String>,
    terminated: bool,
) -> Result<(), Failure> {
    let one = name.is_some();
    let mut client = connection.wharf();
    let request = ListModelsRequest { name, terminated };
    let mut stream = connection.call(client.watch_models(request)).await.map_err(refused)?.into_inner();
    let mut known = BTreeMap::new();
    let mut live = context.output.live_data();
    loop {
        let views = batch(context, connection, &mut stream).await?;
        if views.is_empty() {
            return Ok(());
        }
        if !context.output.out_is_terminal() {
            for view in views {
                context.output.data(&json::line("wharf.v1.ModelView", &view).map_err(unprintable)?);
            }
            continue;
        }
        for view in views {
            if view.deleted && !terminated {
                known.remove(&view.name);
            } else {
                known.insert(view.name.clone(), view);
            }
        }
        let lines = match known.values().next() {
            Some(view) if one => view::model(context, view),
            _ => view::models(&known).lines(&context.output),
        };
        live.draw(&lines);
    }
}

fn unknown(name: &str) -> Failure {
    Failure::Failed(format!("there is no model {name}; `wharf model list` shows those there are"))
}
