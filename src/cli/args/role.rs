//! The arguments of a role, and the settings that they are short for.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::pair;
use crate::cli::{Context, RoleArgs};

#[derive(Debug, ClapArgs)]
pub(crate) struct Role {
    /// The settings file [env: WHARF_CONFIG].
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting by its dotted name; wins over the file and the environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// How to log: text for people, json for machines; short for --set log.format=...
    #[arg(long, value_name = "FORMAT")]
    log: Option<String>,
    /// Where to keep data: the journal, artifacts; short for --set scheduler.data_dir=... and agent.data_dir=...
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The server registry; short for --set scheduler.servers=...
    #[arg(long, value_name = "FILE")]
    servers: Option<PathBuf>,
    /// Stop when the process of this number is no longer the parent.
    #[arg(long, value_name = "PROCESS", hide = true)]
    with_parent: Option<u32>,
}

impl Role {
    pub(crate) fn resolve(self, context: &Context, verbose: u8) -> RoleArgs {
        let from_environment = || (context.variable)("WHARF_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let short = |name: &str, value: String| (name.to_owned(), value);
        let mut set = Vec::new();
        set.extend(self.log.map(|format| short("log.format", format)));
        if let Some(data) = self.data_dir {
            let below = |name: &str| data.join(name).display().to_string();
            set.push(short("scheduler.data_dir", below("scheduler")));
            set.push(short("agent.data_dir", below("agent")));
        }
        set.extend(self.servers.map(|path| short("scheduler.servers", path.display().to_string())));
        // What is said in full wins over what is said in short.
        set.extend(self.set);
        RoleArgs { config: self.config.or_else(from_environment), set, verbose, parent: self.with_parent }
    }
}
