//! `server probe`: what a running inference server is, and how the registry has to name it.

use std::{sync::Arc, time::Duration};

use super::CALL;
use crate::{
    agent::{
        probe::{Findings, Index, Missing, Patience, Probe, Trial},
        runtimes::Kind,
    },
    cli::{
        Context,
        args::Probing,
        failure::{Failure, seconds},
        output::{clean, counted},
    },
    forward::{ClientOptions, HttpUpstream, TcpNetwork},
    rpc::{client::Connection, proto::inference::ServerMetadataRequest},
};

/// Runs it. What is printed is an entry of the registry, with what was found out as comments before it.
pub(super) async fn run(context: &Context, args: Probing) -> Result<(), Failure> {
    let address = host_and_port(&args.url);
    let (network, clock) = (Arc::new(TcpNetwork), Arc::clone(&context.clock));
    let options = ClientOptions { connect_timeout: CALL, ..ClientOptions::default() };
    let server = HttpUpstream::new(address, network, Arc::clone(&clock), options)
        .map_err(|error| Failure::Usage(format!("{error}; write http://HOST:PORT")))?;
    let patience = Patience { load: Duration::from_secs(args.timeout), ..Patience::default() };
    let probe = Probe::new(Arc::new(server), clock, patience);
    let found = probe.run(args.model.as_deref()).await.map_err(|problem| {
        Failure::Unreachable(format!("{problem}; is {address} the REST address of an inference server?"))
    })?;
    let grpc = match &args.grpc {
        None => None,
        Some(grpc) => Some(spoken(host_and_port(grpc)).await),
    };
    for line in told(address, &found, args.model.as_deref()) {
        context.output.data(&format!("# {}", clean(&line)));
    }
    if let Some(grpc) = &grpc {
        let line = match grpc {
            Ok(who) => format!("over gRPC it calls itself {who}"),
            Err(problem) => format!("over gRPC: {problem}"),
        };
        context.output.data(&format!("# {}", clean(&line)));
    }
    if !found.missing.repository {
        return Err(Failure::Failed(format!(
            "{address} has no calls to load and unload models (the model repository extension), so Wharf can't keep \
             models in it"
        )));
    }
    let grpc = args.grpc.as_deref().filter(|_| grpc.is_some_and(|spoken| spoken.is_ok())).map(host_and_port);
    for line in entry(address, grpc, found.kind) {
        context.output.data(&line);
    }
    match found.trial {
        Some(Err(problem)) => Err(Failure::Failed(clean(&problem))),
        Some(Ok(_)) | None => Ok(()),
    }
}

fn host_and_port(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_prefix("http://").unwrap_or(url)
}

/// What the server calls itself over gRPC.
async fn spoken(address: &str) -> Result<String, String> {
    let connection = Connection::open(address, None, CALL).await.map_err(|error| error.to_string())?;
    let mut client = connection.inference();
    let asked = connection.call(client.server_metadata(ServerMetadataRequest {})).await;
    let said = asked.map_err(|error| error.to_string())?.into_inner();
    Ok(format!("{} {}", said.name, said.version))
}

/// What was found, in sentences.
fn told(address: &str, found: &Findings, model: Option<&str>) -> Vec<String> {
    let name = if found.name.is_empty() { "a server that does not say what it is" } else { &found.name };
    let ready = if found.ready { "ready" } else { "not ready" };
    let mut lines = vec![format!("http://{address} is {name} {}, {ready}", found.version)];
    if !found.extensions.is_empty() {
        lines.push(format!("extensions: {}", found.extensions.join(", ")));
    }
    lines.push(match found.index {
        None => "it gives no index of its models".to_owned(),
        Some(Index { models, loaded, needs_body }) => format!(
            "its index, {}, has {}, {loaded} in memory",
            if needs_body { "given only to a request with a body" } else { "given to any request" },
            counted(models as u64, "model", "models"),
        ),
    });
    let Missing { ready, metadata, load, unload, repository: _ } = found.missing;
    lines.push(format!(
        "of a model that is not there it says: ready {ready}, metadata {metadata}, load {load}, unload {unload}"
    ));
    if let (Some(Ok(trial)), Some(model)) = (&found.trial, model) {
        lines.extend(tried(model, trial));
    }
    lines
}

fn tried(model: &str, trial: &Trial) -> Vec<String> {
    let Trial { load, ready_at_once, unload, in_index, still_ready, was_loaded } = trial;
    let millis = |duration: &Duration| format!("{} ms", duration.as_millis());
    let at_once = if *ready_at_once { "ready then" } else { "not ready yet" };
    let mut lines = vec![
        format!("{model}: its load answered after {}, and it was {at_once}", millis(load)),
        format!(
            "{model}: its unload answered after {}, and it {}",
            millis(unload),
            match in_index {
                Some(Duration::ZERO) => "had left the index".to_owned(),
                Some(after) => format!("left the index {} after that", millis(after)),
                None => format!("was still in the index {} after that", seconds(Patience::default().after_unload)),
            }
        ),
    ];
    lines.push(match still_ready {
        Some(Duration::ZERO) => format!("{model}: it was not said to be ready any more after its unload"),
        Some(after) => format!("{model}: it was said to be ready for {} after its unload", millis(after)),
        None => format!("{model}: it is still said to be READY after its unload: its readiness means nothing"),
    });
    if *was_loaded {
        lines.push(format!("{model}: it was in memory before, and was loaded again"));
    }
    lines
}

/// The registry's entry.
fn entry(address: &str, grpc: Option<&str>, kind: Kind) -> Vec<String> {
    let runtime = kind.name();
    let addresses = match grpc {
        Some(grpc) => format!("{{ http = \"http://{address}\", grpc = \"http://{grpc}\" }}"),
        None => format!("\"http://{address}\""),
    };
    let mut lines = vec![
        "[[server]]".to_owned(),
        format!("name = \"{runtime}\""),
        format!("runtime = \"{runtime}\""),
        format!("capabilities = [\"{runtime}\"] # what your models name as requirements"),
        "memory = \"1Gi\" # what each replica has for models".to_owned(),
        format!("addresses = [{addresses}]"),
    ];
    if kind == Kind::MlServer {
        lines.push("parallel_workers = 1 # as in MLServer's own settings".to_owned());
    }
    lines
}
