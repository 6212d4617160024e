//! Reads a registry file.

use std::{collections::BTreeMap, ops::Range};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    BUILTIN_CAPABILITY, DEFAULT_OVERCOMMIT_PERCENT, Location, MAX_OVERCOMMIT_PERCENT, MAX_REPLICAS, MAX_WORKERS,
    Registry, RegistryErrors, Runtime, ServerDecl,
};
use crate::{
    domain::{
        memory::{Bytes, Resources},
        names::ServerName,
    },
    settings::{
        problem::{Problem, line_of, nearest},
        value::{Raw, read},
    },
};

const KEYS: [&str; 16] = [
    "name",
    "replicas",
    "capabilities",
    "memory",
    "devices",
    "overcommit_percent",
    "eviction",
    "runtime",
    "parallel_workers",
    "addresses",
    "command",
    "env",
    "workdir",
    "ports",
    "lifetime",
    "health",
];

/// The problems found so far, by where they stand.
pub(super) struct Found<'a> {
    text: &'a str,
    file: &'a str,
    pub(super) problems: Vec<(usize, Problem)>,
}

impl Found<'_> {
    pub(super) fn add(&mut self, offset: usize, key: &str, problem: impl Into<String>) {
        let place = format!("{}:{}", self.file, line_of(self.text, offset));
        self.problems.push((offset, Problem::new(key, problem.into()).at(place)));
    }
}

/// One `[[server]]`.
pub(super) struct Entry<'a, 'i> {
    table: &'a DeTable<'i>,
    pub(super) span: Range<usize>,
    label: String,
}

pub(super) type Item<'a, 'i> = &'a Spanned<DeValue<'i>>;

pub(super) fn registry(text: &str, file: &str) -> Result<Registry, RegistryErrors> {
    let mut found = Found { text, file, problems: Vec::new() };
    let mut servers: Vec<(ServerDecl, usize)> = Vec::new();
    match DeTable::parse(text) {
        Err(error) => found.add(error.span().map_or(0, |span| span.start), "", error.message()),
        Ok(document) => {
            for (key, value) in document.get_ref() {
                if key.get_ref() != "server" {
                    let hint = "a registry holds [[server]] tables and nothing else";
                    found.add(key.span().start, key.get_ref(), format!("no such key; {hint}"));
                    continue;
                }
                let DeValue::Array(entries) = value.get_ref() else {
                    found.add(key.span().start, "server", "write [[server]], with double brackets");
                    continue;
                };
                for entry in entries.iter() {
                    let at = entry.span().start;
                    let Some(table) = entry.get_ref().as_table() else {
                        found.add(at, "server", "write each server as a [[server]] table");
                        continue;
                    };
                    if let Some(server) = Entry::new(table, entry.span()).read(&mut found) {
                        if let Some((_, first)) = servers.iter().find(|(other, _)| other.name == server.name) {
                            let line = line_of(text, *first);
                            let key = format!("server {}", server.name);
                            found.add(
                                at,
                                &key,
                                format!("the name is taken by the server of line {line}; choose another"),
                            );
                        }
                        servers.push((server, at));
                    }
                }
            }
        }
    }
    for (at, (server, offset)) in servers.iter().enumerate() {
        let Some(ports) = server.ports() else { continue };
        let other = servers[..at].iter().find_map(|(other, _)| {
            let theirs =
                other.ports().filter(|theirs| theirs.start() <= ports.end() && ports.start() <= theirs.end())?;
            Some((&other.name, theirs))
        });
        if let Some((other, theirs)) = other {
            let problem = format!(
                "its replicas take ports {} to {}, and those of server {other} {} to {}; choose others, or leave ports out to \
                 have free ones found",
                ports.start(),
                ports.end(),
                theirs.start(),
                theirs.end()
            );
            found.add(*offset, &format!("server {}: ports", server.name), problem);
        }
    }
    if found.problems.is_empty() {
        let mut servers: Vec<ServerDecl> = servers.into_iter().map(|(server, _)| server).collect();
        servers.sort_by(|a, b| a.name.cmp(&b.name));
        return Ok(Registry { servers });
    }
    found.problems.sort_by_key(|(offset, _)| *offset);
    Err(super::super::problem::Problems(found.problems.into_iter().map(|(_, problem)| problem).collect()))
}

impl<'a, 'i> Entry<'a, 'i> {
    fn new(table: &'a DeTable<'i>, span: Range<usize>) -> Self {
        let label = match table.get("name").and_then(|name| name.get_ref().as_str()) {
            Some(name) => format!("server {name:.64}"),
            None => "server".to_owned(),
        };
        Self { table, span, label }
    }

    pub(super) fn key(&self, key: &str) -> String {
        format!("{}: {key}", self.label)
    }

    pub(super) fn get(&self, key: &str) -> Option<Item<'a, 'i>> {
        self.table.get(key)
    }

    pub(super) fn bad(&self, found: &mut Found<'_>, item: Item<'_, '_>, key: &str, problem: impl Into<String>) {
        found.add(item.span().start, &self.key(key), problem);
    }

    fn read(&self, found: &mut Found<'_>) -> Option<ServerDecl> {
        let before = found.problems.len();
        for (key, _) in self.table {
            if !KEYS.contains(&key.get_ref().as_ref()) {
                let hint = nearest(key.get_ref(), KEYS)
                    .map_or_else(|| format!("there are {}", KEYS.join(", ")), |known| format!("did you mean {known}?"));
                found.add(key.span().start, &self.key(key.get_ref()), format!("no such key; {hint}"));
            }
        }
        let name = self.name(found);
        let runtime = self.runtime(found);
        let workers = self.workers(runtime, found);
        let location = runtime.and_then(|runtime| self.location(runtime, workers, found));
        let replicas = self.replicas(location.as_ref(), found);
        let capabilities = self.capabilities(runtime, found);
        let capacity = self.capacity(found);
        let overcommit_percent = match self.get("overcommit_percent") {
            None => DEFAULT_OVERCOMMIT_PERCENT,
            Some(item) => {
                let most = MAX_OVERCOMMIT_PERCENT.to_string();
                self.value(item, "overcommit_percent", Some(("0", &most)), found).unwrap_or_default()
            }
        };
        let eviction =
            self.get("eviction").and_then(|item| self.value(item, "eviction", None, found)).unwrap_or_default();
        if found.problems.len() > before {
            return None;
        }
        Some(ServerDecl {
            name: name?,
            replicas: replicas?,
            capabilities,
            capacity: capacity?,
            overcommit_percent,
            eviction,
            runtime: runtime?,
            workers,
            location: location?,
        })
    }

    pub(super) fn value<T: crate::settings::value::Value>(
        &self,
        item: Item<'_, '_>,
        key: &str,
        bounds: Option<(&str, &str)>,
        found: &mut Found<'_>,
    ) -> Option<T> {
        read::<T>(&Raw::Toml(item.get_ref()), bounds).map_err(|problem| self.bad(found, item, key, problem)).ok()
    }

    pub(super) fn text(&self, item: Item<'a, 'i>, key: &str, wanted: &str, found: &mut Found<'_>) -> Option<&'a str> {
        let text = item.get_ref().as_str();
        if text.is_none() {
            self.bad(found, item, key, format!("{} came, wanted {wanted}", Raw::Toml(item.get_ref())));
        }
        text
    }

    pub(super) fn list(
        &self,
        item: Item<'a, 'i>,
        key: &str,
        wanted: &str,
        found: &mut Found<'_>,
    ) -> &'a [Spanned<DeValue<'i>>] {
        match item.get_ref() {
            DeValue::Array(items) => items,
            other => {
                self.bad(found, item, key, format!("{} came, wanted {wanted}", Raw::Toml(other)));
                &[]
            }
        }
    }

    fn name(&self, found: &mut Found<'_>) -> Option<ServerName> {
        let Some(item) = self.get("name") else {
            found.add(self.span.start, &self.key("name"), "it is missing; every server needs a name of its own");
            return None;
        };
        let name = self.text(item, "name", "a name such as \"mlserver\"", found)?;
        ServerName::new(name).map_err(|error| self.bad(found, item, "name", error.to_string())).ok()
    }

    fn runtime(&self, found: &mut Found<'_>) -> Option<Runtime> {
        let names = Runtime::ALL.map(Runtime::name);
        let wanted = format!("one of {}", names.map(|name| format!("{name:?}")).join(", "));
        let Some(item) = self.get("runtime") else {
            found.add(self.span.start, &self.key("runtime"), format!("it is missing; write {wanted}"));
            return None;
        };
        let name = self.text(item, "runtime", &wanted, found)?;
        let runtime = Runtime::named(name);
        if runtime.is_none() {
            let hint = nearest(name, names).map_or_else(String::new, |known| format!("; did you mean {known:?}?"));
            self.bad(found, item, "runtime", format!("{name:?} came, wanted {wanted}{hint}"));
        }
        runtime
    }

    /// In how many processes each model is held.
    fn workers(&self, runtime: Option<Runtime>, found: &mut Found<'_>) -> u32 {
        let Some(item) = self.get("parallel_workers") else { return 1 };
        if runtime.is_some_and(|runtime| runtime != Runtime::MlServer) {
            let problem = "only an MLServer has parallel workers; remove it";
            self.bad(found, item, "parallel_workers", problem);
        }
        self.value(item, "parallel_workers", Some(("0", &MAX_WORKERS.to_string())), found).unwrap_or(1)
    }

    fn replicas(&self, location: Option<&Location>, found: &mut Found<'_>) -> Option<u32> {
        let listed = match location {
            Some(Location::Addresses(addresses)) => u32::try_from(addresses.len()).ok(),
            _ => None,
        };
        let Some(item) = self.get("replicas") else { return Some(listed.unwrap_or(1)) };
        let replicas = self.value(item, "replicas", Some(("0", &MAX_REPLICAS.to_string())), found)?;
        if let Some(listed) = listed.filter(|listed| *listed != replicas) {
            let problem = format!(
                "it is {replicas}, and there are {listed} addresses; leave replicas out, or list one address for each"
            );
            self.bad(found, item, "replicas", problem);
        }
        Some(replicas)
    }

    fn capabilities(&self, runtime: Option<Runtime>, found: &mut Found<'_>) -> Vec<String> {
        let wanted = "a list such as [\"sklearn\", \"xgboost\"]";
        let Some(item) = self.get("capabilities") else {
            if runtime.is_some_and(|runtime| runtime != Runtime::Builtin) {
                let problem = format!("it is missing; say what the server can serve with {wanted}");
                found.add(self.span.start, &self.key("capabilities"), problem);
            }
            return vec![BUILTIN_CAPABILITY.to_owned()];
        };
        let before = found.problems.len();
        let mut capabilities = Vec::new();
        for item in self.list(item, "capabilities", wanted, found) {
            let Some(capability) = self.text(item, "capabilities", wanted, found).map(str::trim) else { continue };
            if capability.is_empty() {
                self.bad(found, item, "capabilities", "a capability is empty; remove it, or write what was meant");
            } else if capabilities.iter().any(|other| other == capability) {
                self.bad(found, item, "capabilities", format!("{capability:?} is there twice; remove one"));
            } else {
                capabilities.push(capability.to_owned());
            }
        }
        if capabilities.is_empty() && found.problems.len() == before {
            self.bad(
                found,
                item,
                "capabilities",
                format!("the list is empty, so nothing could be placed here; write {wanted}"),
            );
        }
        capabilities.sort();
        capabilities
    }

    fn capacity(&self, found: &mut Found<'_>) -> Option<Resources> {
        let primary = match self.get("memory") {
            Some(item) => self.bytes(item, "memory", found),
            None => {
                let problem = "it is missing; say how much memory each replica has for models, as in memory = \"4Gi\"";
                found.add(self.span.start, &self.key("memory"), problem);
                None
            }
        };
        let mut others = BTreeMap::new();
        if let Some(item) = self.get("devices") {
            match item.get_ref() {
                DeValue::Table(devices) => {
                    for (device, item) in devices {
                        let name = device.get_ref();
                        let key = format!("devices.{name}");
                        if name.is_empty()
                            || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                        {
                            self.bad(
                                found,
                                item,
                                &key,
                                "a device goes by lower-case letters, digits and '-', as in gpu0",
                            );
                        }
                        others.extend(self.bytes(item, &key, found).map(|bytes| (name.to_string(), bytes)));
                    }
                }
                other => {
                    let problem = format!("{} came, wanted a table such as {{ gpu0 = \"16Gi\" }}", Raw::Toml(other));
                    self.bad(found, item, "devices", problem);
                }
            }
        }
        Some(Resources { primary: primary?, others: others.into() })
    }

    fn bytes(&self, item: Item<'_, '_>, key: &str, found: &mut Found<'_>) -> Option<Bytes> {
        let bytes: Bytes = self.value(item, key, None, found)?;
        if bytes == Bytes::ZERO {
            self.bad(found, item, key, "it is zero, so nothing could be placed there; say how much there is");
            return None;
        }
        Some(bytes)
    }
}
