//! The commands: each asks a scheduler or a gateway, and shows the answer.

mod infer;
mod load;
mod misc;
mod model;
mod probe;
mod server;
pub(super) mod store;
pub(super) mod tensors;
pub(super) mod view;

use std::{io::Read, path::PathBuf, time::Duration};

use futures::FutureExt as _;
use tonic::Streaming;

use super::{
    Context,
    args::{self, Command, Model},
    failure::{Failure, Peer},
};
use crate::{
    manifest::{self, Document},
    rpc::client::{ClientError, Connection},
};

/// The longest wait for a connection, and for an answer that is no stream.
const CALL: Duration = Duration::from_secs(10);
/// What a scheduler knows this program by.
const SUBSCRIBER: &str = "wharf-cli";

/// Runs one command that is no role.
pub(super) async fn run(command: Command, context: &Context, stdin: Box<dyn Read + Send>) -> Result<(), Failure> {
    match command {
        Command::Load(args) | Command::Model(Model::Load(args)) => load::load(context, stdin, args).await,
        Command::Unload(args) => load::unload(context, stdin, Vec::new(), args.files, args.options).await,
        Command::Model(Model::Unload(args)) => load::unload(context, stdin, args.names, args.files, args.options).await,
        Command::Status(args) => model::status_of_files(context, stdin, args).await,
        Command::Model(Model::Status(args)) => model::status(context, args).await,
        Command::Model(Model::List(args)) => model::list(context, args).await,
        Command::Model(Model::Rollback(args)) => load::rollback(context, args).await,
        Command::Model(Model::Scale { name, replicas, waiting, scheduler }) => {
            load::scale(context, name, replicas, waiting, scheduler).await
        }
        Command::Model(Model::Infer(args)) => infer::infer(context, stdin, *args).await,
        Command::Model(Model::Metadata { name, gateway }) => infer::metadata(context, &name, &gateway).await,
        Command::Server(command) => server::run(context, command).await,
        Command::Store(command) => store::run(context, command).await,
        Command::Events(args) => misc::events(context, args).await,
        Command::Explain(args) => misc::explain(context, args).await,
        Command::Inspect(args) => misc::inspect(context, &args.scheduler).await,
        Command::Completions { shell } => {
            misc::completions(context, shell);
            Ok(())
        }
        // Roles never come here: they own the process, and are started above.
        Command::Up(_)
        | Command::Scheduler(_)
        | Command::Agent(_)
        | Command::Gateway(_)
        | Command::Demo { .. }
        | Command::Shim(_) => Ok(()),
    }
}

/// Connects to the scheduler that the arguments and the environment name.
async fn scheduler(context: &Context, args: &args::Scheduler) -> Result<Connection, Failure> {
    let variables = ["WHARF_SCHEDULER_HOST", "SELDON_SCHEDULE_HOST"];
    let address = context.setting(args.scheduler_host.as_deref(), &variables, "127.0.0.1:9004");
    context.output.detail(&format!("scheduler: {address}"));
    Connection::open(&address, args.authority.as_deref(), CALL)
        .await
        .map_err(|error| Failure::of(Peer::Scheduler, error))
}

/// The address of the gateway that the arguments and the environment name.
fn gateway_address(context: &Context, args: &args::Gateway) -> String {
    let variables = ["WHARF_INFERENCE_HOST", "SELDON_INFER_HOST"];
    let address = context.setting(args.inference_host.as_deref(), &variables, "127.0.0.1:9000");
    context.output.detail(&format!("gateway: {address}"));
    address
}

fn refused(error: ClientError) -> Failure {
    Failure::of(Peer::Scheduler, error)
}

/// Every manifest of `files`, or of standard input when there are none. Their notes are told.
async fn documents(
    context: &Context,
    mut stdin: Box<dyn Read + Send>,
    mut files: Vec<PathBuf>,
) -> Result<Vec<Document>, Failure> {
    if files.is_empty() {
        if context.stdin {
            return Err(Failure::Usage(
                "there is nothing to read: name a file with -f, or pipe manifests in".to_owned(),
            ));
        }
        files.push("-".into());
    }
    let documents = tokio::task::spawn_blocking(move || manifest::read(&files, &mut stdin))
        .await
        .map_err(|error| Failure::Failed(format!("reading manifests stopped: {error}")))??;
    for document in &documents {
        for note in &document.notes {
            context.output.warning(&format!("{}: {note}", document.source));
        }
    }
    Ok(documents)
}

/// Everything in a stream that has an end, each message in time.
async fn all<T>(connection: &Connection, mut stream: Streaming<T>) -> Result<Vec<T>, Failure> {
    let mut messages = Vec::new();
    while let Some(message) = connection.call(stream.message()).await.map_err(refused)? {
        messages.push(message);
    }
    Ok(messages)
}

/// The next message of a stream that has no end; none when the reader or the scheduler has gone.
async fn next<T>(context: &Context, connection: &Connection, stream: &mut Streaming<T>) -> Result<Option<T>, Failure> {
    if context.output.is_closed() {
        return Ok(None);
    }
    match stream.message().await {
        Ok(message) => Ok(message),
        Err(status) => Err(refused(connection.classify(&status))),
    }
}

/// All that a stream without an end has to say now, so that a view is drawn once for a whole snapshot. None
/// when it has ended.
async fn batch<T>(context: &Context, connection: &Connection, stream: &mut Streaming<T>) -> Result<Vec<T>, Failure> {
    const MOST: usize = 100_000;
    let mut messages = Vec::from_iter(next(context, connection, stream).await?);
    while !messages.is_empty()
        && messages.len() < MOST
        && let Some(more) = stream.message().now_or_never()
    {
        match more {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => break,
            Err(status) => return Err(refused(connection.classify(&status))),
        }
    }
    Ok(messages)
}

fn unprintable(problem: String) -> Failure {
    Failure::Failed(format!("the answer can't be shown: {problem}"))
}
