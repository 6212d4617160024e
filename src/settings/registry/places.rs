//! Reads where a server's replicas are: the addresses of running ones, or how they are started.

use std::{collections::BTreeMap, path::PathBuf};

use toml::de::DeValue;

use super::{
    Lifetime, Location, ReplicaAddress, Runtime,
    command::{Command, unknown_blank},
    parse::{Entry, Found, Item},
};
use crate::settings::{
    problem::nearest,
    value::{Address, Raw, Value as _},
};

impl<'a, 'i> Entry<'a, 'i> {
    pub(super) fn location(&self, runtime: Runtime, workers: u32, found: &mut Found<'_>) -> Option<Location> {
        let (addresses, command) = (self.get("addresses"), self.get("command"));
        let started = command.is_some() || (addresses.is_none() && Command::of(runtime, workers).is_some());
        if !started {
            for key in ["env", "workdir", "ports", "lifetime", "health"] {
                if let Some(item) = self.get(key) {
                    self.bad(found, item, key, "it says how a command is started, and there is no command");
                }
            }
        }
        match (addresses, command) {
            (Some(item), None) if runtime == Runtime::Builtin => {
                let problem = "the builtin runtime runs within the agent and has no addresses; remove them, or name \
                               the runtime that listens there";
                self.bad(found, item, "addresses", problem);
                None
            }
            (None, Some(item)) if runtime == Runtime::Builtin => {
                let problem = "the builtin runtime runs within the agent and has no command; remove it, or name the \
                               runtime that it starts";
                self.bad(found, item, "command", problem);
                None
            }
            (None, None) if runtime == Runtime::Builtin => Some(Location::Builtin),
            (Some(item), None) if runtime == Runtime::Process => {
                self.bad(
                    found,
                    item,
                    "addresses",
                    "each model is a process of its own here; write the command instead",
                );
                None
            }
            (Some(_), Some(item)) => {
                self.bad(
                    found,
                    item,
                    "command",
                    "there are addresses too; keep the one that says where the replicas are",
                );
                None
            }
            (Some(item), None) => self.addresses(item, found).map(Location::Addresses),
            (None, Some(item)) => self.command(Some(item), runtime, workers, found).map(Location::Command),
            (None, None) if started => self.command(None, runtime, workers, found).map(Location::Command),
            (None, None) => {
                let problem = format!(
                    "a server of runtime {:?} needs addresses = [\"http://host:port\", ...], one for each replica, or the \
                     command that starts one",
                    runtime.name()
                );
                found.add(self.span.start, &self.key("addresses"), problem);
                None
            }
        }
    }

    fn addresses(&self, item: Item<'a, 'i>, found: &mut Found<'_>) -> Option<Vec<ReplicaAddress>> {
        let before = found.problems.len();
        let wanted = "a list of \"http://host:port\" or { http = \"http://host:port\", grpc = \"http://host:port\" }";
        let mut addresses: Vec<ReplicaAddress> = Vec::new();
        for item in self.list(item, "addresses", wanted, found) {
            let address = match item.get_ref() {
                DeValue::String(_) => self.url(item, found).map(|http| ReplicaAddress { http, grpc: None }),
                DeValue::Table(table) => {
                    for (key, _) in table {
                        if !["http", "grpc"].contains(&key.get_ref().as_ref()) {
                            let key_name = self.key(&format!("addresses.{}", key.get_ref()));
                            found.add(key.span().start, &key_name, "no such key; there are http and grpc");
                        }
                    }
                    let grpc = table.get("grpc").and_then(|item| self.url(item, found));
                    match table.get("http") {
                        Some(item) => self.url(item, found).map(|http| ReplicaAddress { http, grpc }),
                        None => {
                            self.bad(found, item, "addresses", "http is missing; models are loaded over it");
                            None
                        }
                    }
                }
                other => {
                    self.bad(found, item, "addresses", format!("{} came, wanted {wanted}", Raw::Toml(other)));
                    None
                }
            };
            if let Some(address) = address {
                if addresses.iter().any(|other| other.http == address.http) {
                    self.bad(
                        found,
                        item,
                        "addresses",
                        format!("{} is there twice; every replica is one server", address.http),
                    );
                }
                addresses.push(address);
            }
        }
        if addresses.is_empty() && found.problems.len() == before {
            self.bad(found, item, "addresses", "the list is empty; give one address for each replica");
        }
        (found.problems.len() == before).then_some(addresses)
    }

    fn url(&self, item: Item<'_, '_>, found: &mut Found<'_>) -> Option<String> {
        let url = item.get_ref().as_str();
        let sound =
            url.and_then(|url| url.strip_prefix("http://")).and_then(Address::parse).filter(|at| at.port() != 0);
        match sound {
            Some(address) => Some(format!("http://{address}")),
            None => {
                let came = Raw::Toml(item.get_ref());
                self.bad(found, item, "addresses", format!("{came} came, wanted \"http://host:port\""));
                None
            }
        }
    }

    /// How a replica is started: as `item` says, or as servers of that runtime are.
    fn command(
        &self,
        item: Option<Item<'a, 'i>>,
        runtime: Runtime,
        workers: u32,
        found: &mut Found<'_>,
    ) -> Option<Command> {
        let before = found.problems.len();
        let mut command = Command::of(runtime, workers).unwrap_or_default();
        if let Some(item) = item {
            command.argv = self.argv(item, runtime, found);
        }
        if let Some(item) = self.get("env") {
            command.env.extend(self.env(item, runtime, found));
        }
        command.workdir = self.get("workdir").and_then(|item| self.value::<PathBuf>(item, "workdir", None, found));
        if let Some(item) = self.get("ports") {
            if runtime == Runtime::Process {
                let problem = "each model's process gets a free port of its own, which {port} stands for; remove it";
                self.bad(found, item, "ports", problem);
            }
            // A replica takes three, and the last has to be a port too.
            let first: Option<u32> = self.value(item, "ports", Some(("1", "65000")), found);
            command.ports = first.and_then(|port| u16::try_from(port).ok());
        }
        if let Some(item) = self.get("lifetime") {
            let wanted = "\"agent\" (it ends with the agent) or \"independent\" (it lives on, and is found again)";
            match self.text(item, "lifetime", wanted, found).map(Lifetime::named) {
                Some(Some(Lifetime::Independent)) if runtime == Runtime::Process => {
                    self.bad(found, item, "lifetime", "a process for one model ends with the agent; remove it");
                }
                Some(Some(lifetime)) => command.lifetime = lifetime,
                Some(None) => {
                    self.bad(found, item, "lifetime", format!("{} came, wanted {wanted}", Raw::Toml(item.get_ref())))
                }
                None => {}
            }
        }
        if let Some(item) = self.get("health") {
            let wanted = "the path that answers 200 once it is ready, as in \"/v2/health/ready\"";
            if let Some(path) = self.text(item, "health", wanted, found) {
                if !path.starts_with('/') || path.contains([' ', '#']) {
                    self.bad(found, item, "health", format!("{path:?} came, wanted {wanted}"));
                }
                self.blanks(item, "health", path, runtime, found);
                command.health = path.to_owned();
            }
        }
        (found.problems.len() == before).then_some(command)
    }

    fn argv(&self, item: Item<'a, 'i>, runtime: Runtime, found: &mut Found<'_>) -> Vec<String> {
        let before = found.problems.len();
        let wanted = "the program and its arguments, as in [\"mlserver\", \"start\", \"{repository}\"]";
        let mut argv = Vec::new();
        for item in self.list(item, "command", wanted, found) {
            let Some(argument) = self.text(item, "command", wanted, found) else { continue };
            if argument.contains('\0') {
                self.bad(found, item, "command", "there is a NUL in it, which no argument can hold");
            }
            self.blanks(item, "command", argument, runtime, found);
            argv.push(argument.to_owned());
        }
        if argv.first().is_none_or(String::is_empty) && found.problems.len() == before {
            self.bad(found, item, "command", format!("it names no program; write {wanted}"));
        }
        argv
    }

    fn env(&self, item: Item<'a, 'i>, runtime: Runtime, found: &mut Found<'_>) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        match item.get_ref() {
            DeValue::Table(table) => {
                for (key, item) in table {
                    let name = format!("env.{}", key.get_ref());
                    let value = self.text(item, &name, "text", found);
                    if key.get_ref().is_empty() || key.get_ref().contains(['=', '\0']) {
                        self.bad(found, item, "env", format!("{:?} is no name of a variable", key.get_ref()));
                    }
                    if let Some(value) = value {
                        self.blanks(item, &name, value, runtime, found);
                        env.insert(key.get_ref().to_string(), value.to_owned());
                    }
                }
            }
            other => {
                let problem =
                    format!("{} came, wanted a table of text, as in {{ OMP_NUM_THREADS = \"1\" }}", Raw::Toml(other));
                self.bad(found, item, "env", problem);
            }
        }
        env
    }

    /// Whether every blank is one that is filled.
    fn blanks(&self, item: Item<'_, '_>, key: &str, text: &str, runtime: Runtime, found: &mut Found<'_>) {
        if let Some(unknown) = unknown_blank(text, runtime) {
            let known = Command::blanks(runtime);
            let hint = nearest(unknown, known.iter().copied()).map_or_else(
                || format!("there are {{{}}}", known.join("}, {")),
                |name| format!("did you mean {{{name}}}?"),
            );
            self.bad(found, item, key, format!("nothing fills {{{unknown}}}; {hint}"));
        }
    }
}
