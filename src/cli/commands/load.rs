//! Commands that change what is wanted of models.

use std::{io::Read, path::PathBuf, time::Duration};

use futures::{StreamExt as _, stream};

use super::{documents, refused, scheduler};
use crate::{
    cli::{
        Context,
        args::{self, Load, Plain, Rollback, UnloadOptions, Waiting},
        failure::Failure,
        wait::{Goal, wait},
    },
    domain::spec::{Definition, KubernetesMeta},
    manifest::{Kind, ServerManifest, Source},
    rpc::{
        client::{ClientError, Connection},
        proto::{
            scheduler::{ModelReference, ServerNotify, ServerNotifyRequest, UnloadModelRequest},
            wharf::{
                RollbackModelRequest, ScaleModelRequest, SubmitModelRequest, SubmitModelResponse,
                submit_model_response::Outcome,
            },
        },
        wire,
    },
};

/// How many submissions are on their way at once: the scheduler commits them in groups.
const AT_ONCE: usize = 32;

/// `load` and `model load`.
pub(super) async fn load(context: &Context, stdin: Box<dyn Read + Send>, args: Load) -> Result<(), Failure> {
    let documents = documents(context, stdin, args.files).await?;
    let connection = scheduler(context, &args.scheduler).await?;
    let (mut models, mut servers) = (Vec::new(), Vec::new());
    for document in documents {
        match document.kind {
            Kind::Model(definition) => models.push((document.source, definition)),
            Kind::Server(server) => servers.push((document.source, server)),
        }
    }
    // Servers first: the models may be meant for them.
    for (source, server) in servers {
        notify(context, &connection, &server).await.map_err(|error| at(&source, refused(error)))?;
    }
    let report = Report { context, output: args.output, waits: args.waiting.wait.is_some() };
    let mut goals = Vec::new();
    let mut failures = Failures::of(models.len());
    let mut answers = stream::iter(models.into_iter().map(|(source, definition)| {
        let connection = &connection;
        async move {
            let answer = submit(connection, &definition).await;
            (source, definition, answer)
        }
    }))
    .buffered(AT_ONCE);
    while let Some((source, definition, answer)) = answers.next().await {
        let name = definition.name.as_str();
        match answer {
            Ok(answer) => {
                report.say(name, &answer);
                goals.push(Goal {
                    model: name.to_owned(),
                    state: args.waiting.wait.clone().unwrap_or_default(),
                    submission: Some((answer.uid, answer.version)),
                });
            }
            Err(error) => failures.add(context, at(&source, named(name, refused(error))))?,
        }
    }
    drop(answers);
    if args.waiting.wait.is_some() && !goals.is_empty() {
        wait_for(context, &connection, goals, args.waiting.timeout).await?;
    }
    failures.end()
}

async fn submit(connection: &Connection, definition: &Definition) -> Result<SubmitModelResponse, ClientError> {
    let (model, rollout) = wire::definition_to_wire(definition);
    let mut client = connection.wharf();
    let request = SubmitModelRequest { model: Some(model), rollout };
    connection.call(client.submit_model(request)).await.map(tonic::Response::into_inner)
}

/// Tells the scheduler how many replicas a server is to have.
async fn notify(context: &Context, connection: &Connection, server: &ServerManifest) -> Result<(), ClientError> {
    let notify = ServerNotify {
        name: server.name.to_string(),
        expected_replicas: server.replicas,
        shared: true,
        kubernetes_meta: server.kubernetes.as_ref().map(wire::kubernetes_to_wire),
        min_replicas: server.min,
        // Seldon's own word for no bound.
        max_replicas: server.max.unwrap_or(u32::MAX),
    };
    let mut client = connection.scheduler();
    connection.call(client.server_notify(ServerNotifyRequest { servers: vec![notify], is_first_sync: false })).await?;
    context.output.note(&format!("server {}: {} replicas expected", server.name, server.replicas));
    Ok(())
}

/// `unload` and `model unload`.
pub(super) async fn unload(
    context: &Context,
    stdin: Box<dyn Read + Send>,
    names: Vec<String>,
    files: Vec<PathBuf>,
    options: UnloadOptions,
) -> Result<(), Failure> {
    let mut targets: Vec<(String, Option<KubernetesMeta>)> = names.into_iter().map(|name| (name, None)).collect();
    if targets.is_empty() || !files.is_empty() {
        for document in documents(context, stdin, files).await? {
            match document.kind {
                Kind::Model(definition) => targets.push((definition.name.to_string(), definition.kubernetes)),
                Kind::Server(server) => context.output.warning(&format!(
                    "{}: server {} is left alone; empty it with `wharf server drain {}`",
                    document.source, server.name, server.name
                )),
            }
        }
    }
    let connection = scheduler(context, &options.scheduler).await?;
    let mut failures = Failures::of(targets.len());
    let mut goals = Vec::new();
    let mut answers = stream::iter(targets.into_iter().map(|(name, kubernetes)| {
        let mut client = connection.scheduler();
        let connection = &connection;
        async move {
            let request = UnloadModelRequest {
                model: Some(ModelReference { name: name.clone(), version: None }),
                kubernetes_meta: kubernetes.as_ref().map(wire::kubernetes_to_wire),
            };
            let answer = connection.call(client.unload_model(request)).await;
            (name, answer)
        }
    }))
    .buffered(AT_ONCE);
    while let Some((name, answer)) = answers.next().await {
        match answer {
            Ok(_) => {
                context.output.note(&format!("{name}: deleted"));
                if !context.output.out_is_terminal() && !options.wait {
                    context.output.data("{}");
                }
                goals.push(Goal { model: name, state: "ModelTerminated".to_owned(), submission: None });
            }
            Err(error) => failures.add(context, named(&name, refused(error)))?,
        }
    }
    drop(answers);
    if options.wait && !goals.is_empty() {
        wait_for(context, &connection, goals, options.timeout).await?;
    }
    failures.end()
}

/// `model rollback`.
pub(super) async fn rollback(context: &Context, args: Rollback) -> Result<(), Failure> {
    let connection = scheduler(context, &args.scheduler).await?;
    let mut client = connection.wharf();
    let request = RollbackModelRequest { name: args.name.clone(), to: args.to };
    let answer = connection.call(client.rollback_model(request)).await.map_err(refused)?.into_inner();
    changed(context, &connection, args.name, &answer, args.waiting).await
}

/// `model scale`.
pub(super) async fn scale(
    context: &Context,
    name: String,
    replicas: u32,
    waiting: Waiting,
    args: args::Scheduler,
) -> Result<(), Failure> {
    let connection = scheduler(context, &args).await?;
    let mut client = connection.wharf();
    let request = ScaleModelRequest { name: name.clone(), replicas };
    let answer = connection.call(client.scale_model(request)).await.map_err(refused)?.into_inner();
    changed(context, &connection, name, &answer, waiting).await
}

async fn changed(
    context: &Context,
    connection: &Connection,
    name: String,
    answer: &SubmitModelResponse,
    waiting: Waiting,
) -> Result<(), Failure> {
    Report { context, output: None, waits: waiting.wait.is_some() }.say(&name, answer);
    match waiting.wait {
        None => Ok(()),
        Some(state) => {
            let goal = Goal { model: name, state, submission: Some((answer.uid, answer.version)) };
            wait_for(context, connection, vec![goal], waiting.timeout).await
        }
    }
}

/// Waits, then says so: `{}` for each model to a script, as Seldon's CLI does.
pub(super) async fn wait_for(
    context: &Context,
    connection: &Connection,
    goals: Vec<Goal>,
    patience: u64,
) -> Result<(), Failure> {
    for view in wait(context, connection, goals, Duration::from_secs(patience)).await? {
        if context.output.out_is_terminal() {
            context.output.note(&super::view::arrived(&view));
        } else {
            context.output.data("{}");
        }
    }
    Ok(())
}

/// Says what became of submissions.
struct Report<'a> {
    context: &'a Context,
    output: Option<Plain>,
    /// Whether a wait follows, which ends the story.
    waits: bool,
}

impl Report<'_> {
    fn say(&self, name: &str, answer: &SubmitModelResponse) {
        let output = &self.context.output;
        let version = answer.version;
        output.note(&match answer.outcome() {
            Outcome::Created => format!("{name}: created, version {version}"),
            Outcome::NewVersion => format!("{name}: version {version}"),
            Outcome::Rescaled => format!("{name}: rescaled, still version {version}"),
            Outcome::Unchanged => format!("{name}: unchanged, version {version}"),
        });
        if self.output == Some(Plain::Json) {
            // Written whole: a default means something here, and protobuf's JSON leaves it out.
            let (name, uid) = (serde_json::Value::from(name), answer.uid);
            let outcome = answer.outcome().as_str_name();
            output.data(&format!(r#"{{"name":{name},"uid":"{uid}","version":{version},"outcome":"{outcome}"}}"#));
        } else if !output.out_is_terminal() && !self.waits {
            output.data("{}");
        }
    }
}

/// Failures of some of many: each is told when it comes, and the command fails in the end. That of a single
/// one is the command's own.
#[derive(Debug)]
struct Failures {
    all: usize,
    count: usize,
}

impl Failures {
    const fn of(all: usize) -> Self {
        Self { all, count: 0 }
    }

    /// # Errors
    /// When there is no point in going on.
    fn add(&mut self, context: &Context, failure: Failure) -> Result<(), Failure> {
        match failure {
            Failure::Failed(message) if self.all > 1 => {
                self.count += 1;
                context.output.warning(&message);
                Ok(())
            }
            final_one => Err(final_one),
        }
    }

    fn end(self) -> Result<(), Failure> {
        match self.count {
            0 => Ok(()),
            count => Err(Failure::Failed(format!("{count} of {} models were refused", self.all))),
        }
    }
}

fn named(name: &str, failure: Failure) -> Failure {
    match failure {
        // Most messages name the model already.
        Failure::Failed(message) if !message.contains(name) => Failure::Failed(format!("{name}: {message}")),
        other => other,
    }
}

fn at(source: &Source, failure: Failure) -> Failure {
    match failure {
        Failure::Failed(message) => Failure::Failed(format!("{source}: {message}")),
        other => other,
    }
}
