//! The command line: arguments, calls to a scheduler or a gateway, and what a person or a script reads.
//!
//! The rules of this module: data goes to standard output and everything else to standard error; nothing is
//! written but through [`Output`]; the environment, the clock and the streams come in as arguments, so a
//! test sees exactly what a user would; and every failure ends in one sentence with the next step and one of
//! the codes of `failure`.

mod args;
mod commands;
mod demo;
mod failure;
mod json;
mod output;
mod roles;
mod shim;
mod table;
mod wait;

use std::{
    ffi::OsString,
    fmt,
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Parser as _;

use self::{
    args::{Args, Command},
    failure::Failure,
};
pub use self::{
    demo::Guests,
    output::{Output, Streams},
    roles::ThisProcess,
};
use crate::ports::{Clock, SystemClock};

/// How long work that blocks is waited for when the process ends.
const STOP: Duration = Duration::from_secs(1);

/// Looks up environment variables by their names.
pub type Variables = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// What the process gives a command: everything that a test would want to replace.
pub struct Environment {
    /// Looks up an environment variable.
    pub variable: Variables,
    /// Standard input.
    pub stdin: Box<dyn Read + Send>,
    /// Whether a person types it.
    pub stdin_is_terminal: bool,
    /// Where output goes.
    pub streams: Streams,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

impl Environment {
    /// This process's own.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place of the command line that reads the environment")]
    pub fn of_process() -> Self {
        use std::io::IsTerminal as _;
        Self {
            variable: Box::new(|name| std::env::var(name).ok()),
            stdin: Box::new(std::io::stdin()),
            stdin_is_terminal: std::io::stdin().is_terminal(),
            streams: Streams::of_process(),
            clock: Arc::new(SystemClock::new()),
        }
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").field("streams", &self.streams).finish_non_exhaustive()
    }
}

/// What every role is started with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoleArgs {
    /// The settings file; the built-in defaults alone when absent.
    pub config: Option<PathBuf>,
    /// Settings by their dotted names, which win over the file and the environment, in order.
    pub set: Vec<(String, String)>,
    /// How often `-v` was given.
    pub verbose: u8,
    /// The process that this one is to end with: it stops when that is no longer its parent.
    pub parent: Option<u32>,
}

/// Starts the roles. Each runs until it is told to stop (interrupt or termination signal) or can't go on, and
/// writes for people through `output` only.
pub trait Roles {
    /// Every role in one process.
    fn up(&self, args: &RoleArgs, output: &Output) -> impl Future<Output = anyhow::Result<()>>;
    /// The control plane alone.
    fn scheduler(&self, args: &RoleArgs, output: &Output) -> impl Future<Output = anyhow::Result<()>>;
    /// One replica's agent alone.
    fn agent(&self, args: &RoleArgs, output: &Output) -> impl Future<Output = anyhow::Result<()>>;
    /// One gateway alone.
    fn gateway(&self, args: &RoleArgs, output: &Output) -> impl Future<Output = anyhow::Result<()>>;
    /// The life of a model, played with the sample models in the folder `models`, on the built-in runtime or on what the
    /// guests bring.
    fn demo(&self, models: &Path, guests: Option<Guests>, output: &Output) -> impl Future<Output = anyhow::Result<()>>;
}

/// Runs the command that `args` name, the program's name first, and returns its exit code: 0 done, 1 failed,
/// 2 wrong usage, 3 unreachable, 4 timed out, 130 interrupted.
pub async fn run(args: impl IntoIterator<Item = OsString>, environment: Environment, roles: &impl Roles) -> ExitCode {
    let Environment { variable, stdin, stdin_is_terminal, streams, clock } = environment;
    let output = Output::new(streams, &variable);
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => return output.usage(&error),
    };
    output.configure(args.color, args.verbose);
    let context = Context { output: output.clone(), variable, clock, stdin: stdin_is_terminal };
    let done = match args.command {
        Command::Up(a) => role(roles.up(&a.resolve(&context, args.verbose), &output).await),
        Command::Scheduler(a) => role(roles.scheduler(&a.resolve(&context, args.verbose), &output).await),
        Command::Agent(a) => role(roles.agent(&a.resolve(&context, args.verbose), &output).await),
        Command::Gateway(a) => role(roles.gateway(&a.resolve(&context, args.verbose), &output).await),
        Command::Shim(shim) => return shim::run(&shim, &output).await,
        Command::Demo { models, mlserver, rclone } => {
            let guests = mlserver.zip(rclone).map(|(mlserver, rclone)| Guests { mlserver, rclone });
            role(roles.demo(&models, guests, &output).await)
        }
        command => {
            let endless = command.is_endless();
            let work = commands::run(command, &context, stdin);
            tokio::select! {
                done = work => done,
                signal = tokio::signal::ctrl_c() => match signal {
                    // The only way to end what has no end.
                    Ok(()) if endless => Ok(()),
                    Ok(()) => Err(Failure::Interrupted),
                    Err(error) => Err(Failure::Failed(format!("can't listen for an interrupt: {error}"))),
                },
            }
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.code())
        }
    }
}

/// Runs the command that this process was started with, on a runtime of its own. `main` holds nothing else.
#[must_use]
pub fn main(roles: &impl Roles) -> ExitCode {
    let environment = Environment::of_process();
    let output = Output::new(Streams::of_process(), &environment.variable);
    // A shim waits and does nothing else, and there is one for each program that an agent runs.
    let mut builder = if std::env::args_os().nth(1).is_some_and(|command| command == "shim") {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    match builder.enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(run(std::env::args_os(), environment, roles));
            // A read of standard input can't be called off, and is not waited for.
            runtime.shutdown_timeout(STOP);
            code
        }
        Err(error) => {
            let failure = Failure::Failed(format!("can't start: {error}"));
            output.failure(&failure);
            ExitCode::from(failure.code())
        }
    }
}

/// What every command works with.
struct Context {
    output: Output,
    variable: Variables,
    clock: Arc<dyn Clock>,
    /// Whether standard input is a terminal.
    stdin: bool,
}

impl Context {
    /// `given`, or the first of `variables` that is set, or `default`.
    fn setting(&self, given: Option<&str>, variables: &[&str], default: &str) -> String {
        let from_environment = || variables.iter().find_map(|name| (self.variable)(name).filter(|v| !v.is_empty()));
        given.map(str::to_owned).or_else(from_environment).unwrap_or_else(|| default.to_owned())
    }
}

fn role(ended: anyhow::Result<()>) -> Result<(), Failure> {
    // The whole chain of causes in one sentence, unless it is one already.
    ended.map_err(|error| error.downcast().unwrap_or_else(|error| Failure::Failed(format!("{error:#}"))))
}
