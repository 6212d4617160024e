//! Commands about a journal's file. They ask no scheduler: none may have it open.

use std::{fmt::Display, path::PathBuf};

use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;

use crate::{
    app::process::{journal_options, new_lineage},
    cli::{
        Context, RoleArgs,
        args::Plain,
        failure::Failure,
        output::{clean, counted},
        roles::settings,
    },
    domain::{history, memory::Bytes},
    ports::Store as _,
    store::{Inspected, OpenOptions, inspect, open_existing},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Store {
    /// Show what a journal holds, and change nothing.
    Info {
        #[command(flatten)]
        at: Journal,
        /// How to show it.
        #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
        output: Plain,
    },
    /// Make a restored journal another history: agents obey it, and keep what they hold.
    Adopt {
        #[command(flatten)]
        at: Journal,
    },
}

/// Where the journal is: as for the scheduler that has it.
#[derive(Debug, ClapArgs)]
pub(crate) struct Journal {
    /// The settings file [env: WHARF_CONFIG].
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting by its dotted name; wins over the file and the environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::cli::args::pair)]
    set: Vec<(String, String)>,
    /// Where the data is that wharf was started with; short for --set scheduler.data_dir=...
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl Journal {
    fn resolve(self, context: &Context) -> Result<OpenOptions, Failure> {
        let from_environment = || (context.variable)("WHARF_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let short = self.data_dir.map(|dir| dir.join("scheduler").display().to_string());
        let short = short.map(|dir| ("scheduler.data_dir".to_owned(), dir));
        let set = short.into_iter().chain(self.set).collect();
        let args = RoleArgs { config: self.config.or_else(from_environment), set, ..RoleArgs::default() };
        let settings = settings(&args).map_err(|error| Failure::Usage(format!("{error:#}")))?;
        Ok(journal_options(&settings.scheduler))
    }
}

/// `store ...`.
pub(super) async fn run(context: &Context, command: Store) -> Result<(), Failure> {
    match command {
        Store::Info { at, output } => {
            let options = at.resolve(context)?;
            let path = options.path.clone();
            let found = blocking(move || inspect(&options).map_err(failed)).await?;
            match output {
                Plain::Json => context.output.data(&format!("{:#}", as_json(&path.display().to_string(), &found))),
                Plain::Table => {
                    lines(&path.display().to_string(), &found)
                        .iter()
                        .for_each(|line| context.output.data(&clean(line)));
                }
            }
            Ok(())
        }
        Store::Adopt { at } => {
            let options = at.resolve(context)?;
            let (path, now, lineage) = (options.path.display().to_string(), context.clock.now(), new_lineage());
            let models = blocking(move || {
                let mut store = open_existing(&options).map_err(failed)?;
                let contents = store.load().map_err(failed)?;
                store.begin_lineage(&lineage, &history::another(&contents, now)).map_err(failed)?;
                Ok(contents.models.iter().filter(|model| model.deleted.is_none()).count() as u64)
            });
            let models = counted(models.await?, "model", "models");
            context.output.note(&format!(
                "the journal {path} goes on as another history, with {models}; start wharf: what agents hold is kept"
            ));
            Ok(())
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Failure::Failed(format!("working on the journal stopped: {error}"))))
}

fn failed(error: impl Display) -> Failure {
    Failure::Failed(error.to_string())
}

/// Models that are there, and those that are deleted.
fn models(found: &Inspected) -> (usize, usize) {
    let deleted = found.contents.models.iter().filter(|model| model.deleted.is_some()).count();
    (found.contents.models.len() - deleted, deleted)
}

fn lines(path: &str, found: &Inspected) -> Vec<String> {
    let Inspected { bytes, schema, identity, contents } = found;
    let (models, deleted) = models(found);
    let line = |name: &str, value: &dyn Display| format!("{name:<13} {value}");
    vec![
        line("journal", &path),
        line("size", &Bytes(*bytes)),
        line("schema", schema),
        line("cluster", &identity.cluster),
        line("lineage", &identity.lineage),
        line("leader epoch", &contents.counters.leader_epoch),
        line("models", &format!("{models}, and {deleted} deleted")),
        line("versions", &contents.versions.len()),
        line("copies", &contents.copies.len()),
        line("servers", &contents.servers.len()),
    ]
}

fn as_json(path: &str, found: &Inspected) -> serde_json::Value {
    let (models, deleted) = models(found);
    json!({
        "path": path,
        "bytes": found.bytes,
        "schema": found.schema,
        "cluster": found.identity.cluster,
        "lineage": found.identity.lineage,
        "leader_epoch": found.contents.counters.leader_epoch,
        "models": models,
        "deleted_models": deleted,
        "versions": found.contents.versions.len(),
        "copies": found.contents.copies.len(),
        "servers": found.contents.servers.len(),
    })
}
