//! The arguments, as clap reads them.

mod role;

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub(crate) use role::Role;

use super::{commands::store::Store, shim::Shim, wait::is_state};

/// Packs many machine-learning models onto few inference servers, and keeps every one answering.
#[derive(Debug, Parser)]
#[command(name = "wharf", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 unreachable, 4 timed out, 130 interrupted.")]
pub(crate) struct Args {
    /// When to use colour: auto, always or never.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN", hide_possible_values = true)]
    #[arg(help_heading = "Common")]
    pub(crate) color: Color,
    /// Say more about what is done, on standard error.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Common")]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    // On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the scheduler, a gateway and the agents that the settings name, all in this process.
    Up(Role),
    /// Run the scheduler alone.
    Scheduler(Role),
    /// Run one replica's agent, beside its inference server.
    Agent(Role),
    /// Run one gateway.
    Gateway(Role),
    /// Play the life of a model with sample models, and check what is promised.
    Demo {
        /// The folder with the sample models.
        #[arg(long, value_name = "DIR", default_value = "tests/models")]
        models: PathBuf,
        /// Play with two MLServers of this program instead of the built-in runtime.
        #[arg(long, value_name = "PROGRAM", requires = "rclone")]
        mlserver: Option<PathBuf>,
        /// The rclone program that fetches their artifacts.
        #[arg(long, value_name = "PROGRAM", requires = "mlserver")]
        rclone: Option<PathBuf>,
    },
    /// Submit every manifest of a file, a folder or standard input.
    Load(Load),
    /// Delete every model that a file, a folder or standard input names.
    Unload(UnloadFiles),
    /// Show how every object of a file, a folder or standard input stands.
    Status(StatusFiles),
    /// Work with models.
    #[command(subcommand)]
    Model(Model),
    /// Work with servers and their replicas.
    #[command(subcommand)]
    Server(Server),
    /// Work with the journal's file while no scheduler has it.
    #[command(subcommand)]
    Store(Store),
    /// Show what happened, oldest first.
    Events(Events),
    /// Show why a model is where it is, or nowhere.
    Explain(Explain),
    /// Show the state of everything inside the scheduler, as JSON.
    Inspect(Inspect),
    /// Write a shell's completion script.
    Completions { shell: Shell },
    /// Run a program for an agent, and end it with the agent.
    #[command(hide = true)]
    Shim(Shim),
}

impl Command {
    /// Whether only the user ends it.
    pub(crate) const fn is_endless(&self) -> bool {
        match self {
            Self::Model(Model::Status(args)) => args.watch,
            Self::Model(Model::List(args)) => args.watch,
            Self::Server(Server::List { watch, .. } | Server::Status { watch, .. }) => *watch,
            Self::Events(args) => args.follow,
            _ => false,
        }
    }
}

/// Where the scheduler is.
#[derive(Debug, ClapArgs)]
pub(crate) struct Scheduler {
    /// The scheduler's address [env: WHARF_SCHEDULER_HOST, SELDON_SCHEDULE_HOST] [default: 127.0.0.1:9004].
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) scheduler_host: Option<String>,
    /// The authority that the scheduler is to see.
    #[arg(long, value_name = "NAME")]
    pub(crate) authority: Option<String>,
}

/// Where the gateway is.
#[derive(Debug, ClapArgs)]
pub(crate) struct Gateway {
    /// The gateway's address [env: WHARF_INFERENCE_HOST, SELDON_INFER_HOST] [default: 127.0.0.1:9000].
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) inference_host: Option<String>,
    /// The authority that the gateway is to see.
    #[arg(long, value_name = "NAME")]
    pub(crate) authority: Option<String>,
}

/// How data is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// How data is shown that has no manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Plain {
    Table,
    Json,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Waiting {
    /// Wait until the model is in this state.
    #[arg(short, long, value_name = "STATE", num_args = 0..=1, default_missing_value = "ModelAvailable", value_parser = state)]
    pub(crate) wait: Option<String>,
    /// The longest wait, in seconds.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Load {
    /// A file, a folder, or - for standard input; may be given again. Standard input when left out.
    #[arg(short = 'f', long = "file-path", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
    /// Print what happened as JSON, one line per model.
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Plain>,
    /// Accepted for scripts written for Seldon's CLI; nothing here needs it.
    #[arg(long, hide = true)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct UnloadFiles {
    /// A file, a folder, or - for standard input; may be given again. Standard input when left out.
    #[arg(short = 'f', long = "file-path", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) options: UnloadOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct UnloadOptions {
    /// Wait until nothing of the models is left.
    #[arg(short, long)]
    pub(crate) wait: bool,
    /// The longest wait, in seconds.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// Accepted for scripts written for Seldon's CLI; nothing here needs it.
    #[arg(long, hide = true)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StatusFiles {
    /// A file, a folder, or - for standard input; may be given again. Standard input when left out.
    #[arg(short = 'f', long = "file-path", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Wait until every model is available.
    #[arg(short, long)]
    pub(crate) wait: bool,
    /// The longest wait, in seconds.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// How to show it; a table on a terminal and JSON elsewhere when left out.
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Model {
    /// Submit models, and say what became of each.
    Load(Load),
    /// Delete models by name, or those that files name.
    Unload(ModelUnload),
    /// Show one model with its versions and copies.
    Status(ModelStatus),
    /// Show every model.
    List(ModelList),
    /// Send inference requests.
    Infer(Box<Infer>),
    /// Show what a model takes and gives.
    Metadata {
        /// The model.
        name: String,
        #[command(flatten)]
        gateway: Gateway,
    },
    /// Submit an old version again, as a new one.
    Rollback(Rollback),
    /// Change how many copies a model has.
    Scale {
        /// The model.
        name: String,
        /// Copies wanted.
        replicas: u32,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        scheduler: Scheduler,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ModelUnload {
    /// The models.
    #[arg(required_unless_present = "files")]
    pub(crate) names: Vec<String>,
    /// A file, a folder, or - for standard input; may be given again.
    #[arg(short = 'f', long = "file-path", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) options: UnloadOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ModelStatus {
    /// The model.
    pub(crate) name: String,
    /// Wait until the model is in this state.
    #[arg(short, long, value_name = "STATE", num_args = 0..=1, default_missing_value = "ModelAvailable", value_parser = state)]
    pub(crate) wait: Option<String>,
    /// The longest wait, in seconds.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// How to show it; a table on a terminal and Seldon's JSON elsewhere when left out. YAML is its manifest.
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,
    /// Show it again whenever it changes.
    #[arg(long, conflicts_with = "wait")]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ModelList {
    /// How to show them. YAML is their manifests.
    #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Format,
    /// Deleted models too.
    #[arg(long)]
    pub(crate) terminated: bool,
    /// Show them again whenever one changes.
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    Rest,
    Grpc,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Infer {
    /// The model.
    pub(crate) name: String,
    /// The request, as JSON; from standard input when this and --file-path are left out.
    pub(crate) data: Option<String>,
    /// A file with the request, or - for standard input.
    #[arg(short = 'f', long = "file-path", value_name = "FILE", conflicts_with = "data")]
    pub(crate) file: Option<PathBuf>,
    /// The protocol to ask by.
    #[arg(long, value_enum, default_value = "rest", value_name = "MODE")]
    pub(crate) inference_mode: Mode,
    /// How often to ask.
    #[arg(short, long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) iterations: u64,
    /// Ask again and again for so many seconds; 0 counts iterations instead.
    #[arg(short = 't', long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) seconds: u64,
    /// The longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) request_timeout: u64,
    /// Show the headers of request and answer, on standard error.
    #[arg(long)]
    pub(crate) show_headers: bool,
    /// Show the request, on standard error.
    #[arg(short = 'r', long)]
    pub(crate) show_request: bool,
    /// Show the answer.
    #[arg(short = 'o', long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    pub(crate) show_response: bool,
    /// A header to send; may be given again.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) header: Vec<(String, String)>,
    /// Stay on the version that answered first, for as long as this command runs.
    #[arg(short, long)]
    pub(crate) sticky_session: bool,
    #[command(flatten)]
    pub(crate) gateway: Gateway,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Rollback {
    /// The model.
    pub(crate) name: String,
    /// The version to go back to; the one before the newest when left out.
    #[arg(long, value_name = "VERSION")]
    pub(crate) to: Option<u32>,
    #[command(flatten)]
    pub(crate) waiting: Waiting,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Server {
    /// Show every server.
    List {
        /// How to show them.
        #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
        output: Plain,
        /// Show them again whenever one changes.
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        scheduler: Scheduler,
    },
    /// Show one server with its replicas.
    Status {
        /// The server.
        name: String,
        /// How to show it; a table on a terminal and Seldon's JSON elsewhere when left out.
        #[arg(short, long, value_enum, value_name = "FORMAT")]
        output: Option<Plain>,
        /// Show it again whenever it changes.
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        scheduler: Scheduler,
    },
    /// Move every copy off a server or one of its replicas, without a failed request.
    Drain {
        #[command(flatten)]
        target: Replica,
        /// The longest wait, in seconds.
        #[arg(short, long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
        #[command(flatten)]
        scheduler: Scheduler,
    },
    /// Find out what a running inference server is, and print the registry's entry for it.
    Probe(Probing),
    /// Place nothing new on a server or one of its replicas.
    Cordon {
        #[command(flatten)]
        target: Replica,
        #[command(flatten)]
        scheduler: Scheduler,
    },
    /// Take back a cordon or a drain.
    Uncordon {
        #[command(flatten)]
        target: Replica,
        #[command(flatten)]
        scheduler: Scheduler,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Replica {
    /// The server.
    pub(crate) name: String,
    /// One replica of it, by its index; all of them when left out.
    #[arg(long, value_name = "INDEX")]
    pub(crate) replica: Option<u32>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Probing {
    /// Its REST address.
    pub(crate) url: String,
    /// Its gRPC address, if it has another.
    #[arg(long, value_name = "URL")]
    pub(crate) grpc: Option<String>,
    /// Load and unload this model of its repository, to see how it does that; nothing is loaded otherwise.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// How long that load may take, in seconds.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Events {
    /// Events of this model only.
    pub(crate) model: Option<String>,
    /// Go on with what happens from now.
    #[arg(long)]
    pub(crate) follow: bool,
    /// How to show them; JSON is one line per event.
    #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Plain,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Explain {
    /// The model.
    pub(crate) model: String,
    /// How to show it.
    #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Plain,
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) scheduler: Scheduler,
}

pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.to_owned())),
        _ => Err("wanted NAME=VALUE".to_owned()),
    }
}

fn state(text: &str) -> Result<String, String> {
    if is_state(text) {
        Ok(text.to_owned())
    } else {
        Err("wanted a model's state, such as ModelAvailable, ModelFailed, ScheduleFailed or ModelTerminated".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_make_sense_to_clap() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_seldons_users_type_is_understood() {
        for line in [
            "wharf model load -f iris.yaml --scheduler-host 0.0.0.0:9004 --force",
            "wharf model load -f ./models -w ModelAvailable -t 60",
            "wharf model status iris -w ModelAvailable",
            "wharf model status iris -w ModelAvailable -t 20 --authority x -v",
            "wharf model unload iris --force",
            "wharf model unload -f iris.yaml",
            "wharf model infer iris {} --inference-host 0.0.0.0:9000 -i 50 -s",
            "wharf model infer iris {} --inference-mode grpc -t 5 --show-headers --header a=b --header c=d -r",
            "wharf model infer iris {} -o false",
            "wharf load -f x.yaml",
            "wharf load",
            "wharf status -f x.yaml -w",
            "wharf unload -f -",
            "wharf server list",
            "wharf server status mlserver -o json",
            "wharf events --follow",
        ] {
            if let Err(error) = Args::try_parse_from(line.split(' ')) {
                panic!("{line}: {error}");
            }
        }
        for line in
            ["wharf", "wharf model status iris -w Happy", "wharf model infer iris --header x", "wharf model unload"]
        {
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
