//! How an inference server is started, and what the blanks in its command stand for.
//!
//! The rule of this module: what is inside braces and is a word is a blank; everything else stays as it is, so that
//! JSON in an argument needs no escapes.

use std::{collections::BTreeMap, path::PathBuf};

use super::Runtime;
use crate::settings::Agent;

/// Blanks of a server's command.
const OF_SERVERS: [&str; 6] = ["http_port", "grpc_port", "metrics_port", "repository", "replica", "index"];
/// Blanks of a command that serves one model.
const OF_MODELS: [&str; 8] =
    ["port", "grpc_port", "metrics_port", "model_path", "model_name", "repository", "replica", "index"];
/// What servers of the protocol answer once they are ready.
const READY: &str = "/v2/health/ready";

/// How an inference server is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The program and its arguments, with blanks.
    pub argv: Vec<String>,
    /// Variables of its environment, over the agent's own, with blanks.
    pub env: BTreeMap<String, String>,
    /// The directory that it starts in; the agent's own, if none.
    pub workdir: Option<PathBuf>,
    /// The first port of the first replica, each of which takes three. Free ones are found, if none.
    pub ports: Option<u16>,
    /// How long it lives.
    pub lifetime: Lifetime,
    /// The path that answers 200 once it is ready, with blanks.
    pub health: String,
}

impl Default for Command {
    fn default() -> Self {
        Self {
            argv: Vec::new(),
            env: BTreeMap::new(),
            workdir: None,
            ports: None,
            lifetime: Lifetime::Agent,
            health: READY.to_owned(),
        }
    }
}

/// How long a server lives that an agent started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lifetime {
    /// As long as the agent, however that ends.
    Agent,
    /// Until its replica goes for good: the next agent finds it again, with what it has loaded.
    Independent,
}

impl Lifetime {
    /// The lifetime that the registry names so.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Agent, Self::Independent].into_iter().find(|lifetime| lifetime.name() == name)
    }

    /// The lifetime, as the registry names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Independent => "independent",
        }
    }
}

impl Command {
    /// How a server of this runtime is started where nobody says; nothing when it has to be said. `workers` are the
    /// processes of an `MLServer` that each hold every model.
    #[must_use]
    pub fn of(runtime: Runtime, workers: u32) -> Option<Self> {
        let argv: &[&str] = match runtime {
            Runtime::MlServer => &["mlserver", "start", "{repository}"],
            Runtime::Triton => &[
                "tritonserver",
                "--model-repository={repository}",
                "--model-control-mode=explicit",
                "--http-address=127.0.0.1",
                "--http-port={http_port}",
                "--grpc-address=127.0.0.1",
                "--grpc-port={grpc_port}",
                "--metrics-address=127.0.0.1",
                "--metrics-port={metrics_port}",
            ],
            Runtime::Builtin | Runtime::Oip | Runtime::Process => return None,
        };
        let mut env = BTreeMap::new();
        if runtime == Runtime::MlServer {
            // One process holds what it loads; so do none besides the server's own, and that takes less.
            let workers = if workers > 1 { workers } else { 0 };
            let settings = [
                ("HOST", "127.0.0.1".to_owned()),
                ("HTTP_PORT", "{http_port}".to_owned()),
                ("GRPC_PORT", "{grpc_port}".to_owned()),
                ("METRICS_PORT", "{metrics_port}".to_owned()),
                ("LOAD_MODELS_AT_STARTUP", "false".to_owned()),
                ("PARALLEL_WORKERS", workers.to_string()),
            ];
            env.extend(settings.map(|(name, value)| (format!("MLSERVER_{name}"), value)));
        }
        Some(Self { argv: argv.iter().map(|&argument| argument.to_owned()).collect(), env, ..Self::default() })
    }

    /// What the blanks of a command of this runtime are called.
    #[must_use]
    pub const fn blanks(runtime: Runtime) -> &'static [&'static str] {
        match runtime {
            Runtime::Builtin | Runtime::MlServer | Runtime::Triton | Runtime::Oip => &OF_SERVERS,
            Runtime::Process => &OF_MODELS,
        }
    }

    /// Whether the program is told this: the blank is somewhere in its arguments or environment.
    #[must_use]
    pub fn tells(&self, blank: &str) -> bool {
        let mut words = self.argv.iter().chain(self.env.values());
        words.any(|word| parts(word).any(|part| part == Err(blank)))
    }

    /// The command with its blanks filled.
    #[must_use]
    pub fn filled(&self, with: &BTreeMap<&'static str, String>) -> Self {
        Self {
            argv: self.argv.iter().map(|argument| fill(argument, with)).collect(),
            env: self.env.iter().map(|(name, value)| (name.clone(), fill(value, with))).collect(),
            health: fill(&self.health, with),
            ..self.clone()
        }
    }
}

impl Agent {
    /// How the one server is started that the settings name.
    ///
    /// # Errors
    /// The setting that is wrong, and what is wrong with it.
    pub fn started(&self) -> Result<Command, (&'static str, String)> {
        let runtime = self.runtime_kind.0.unwrap_or(Runtime::Oip);
        let mut command = Command::of(runtime, self.runtime_workers).unwrap_or_default();
        if !self.command.trim().is_empty() {
            command.argv = self.command.split_ascii_whitespace().map(str::to_owned).collect();
        }
        if command.argv.is_empty() {
            let problem = "it is empty; write the program and its arguments, or give runtime_kind = \"mlserver\" or \
                           \"triton\", which are started as they usually are";
            return Err(("agent.command", problem.to_owned()));
        }
        for pair in self.env.split_ascii_whitespace() {
            let pair = pair.split_once('=').filter(|(name, _)| !name.is_empty());
            let (name, value) = pair
                .ok_or_else(|| ("agent.env", format!("{:?} came, wanted NAME=VALUE, separated by spaces", self.env)))?;
            command.env.insert(name.to_owned(), value.to_owned());
        }
        let words = command.argv.iter().map(|word| ("agent.command", word));
        let words = words.chain(command.env.values().map(|value| ("agent.env", value)));
        for (key, word) in words.chain([("agent.health", &self.health)]) {
            if let Some(unknown) = unknown_blank(word, runtime) {
                let known = Command::blanks(runtime).join("}, {");
                return Err((key, format!("nothing fills {{{unknown}}}; there are {{{known}}}")));
            }
        }
        if runtime == Runtime::Process && (self.ports > 0 || self.lifetime == Lifetime::Independent) {
            let problem = "a process for one model has a free port and ends with the agent; remove it";
            return Err((if self.ports > 0 { "agent.ports" } else { "agent.lifetime" }, problem.to_owned()));
        }
        if !self.health.is_empty() {
            command.health.clone_from(&self.health);
        }
        command.workdir = Some(PathBuf::from(&self.workdir)).filter(|workdir| !workdir.as_os_str().is_empty());
        command.ports = u16::try_from(self.ports).ok().filter(|port| *port > 0);
        command.lifetime = self.lifetime;
        Ok(command)
    }
}

/// The first blank of `text` that nothing fills.
#[must_use]
pub(super) fn unknown_blank(text: &str, runtime: Runtime) -> Option<&str> {
    let known = Command::blanks(runtime);
    parts(text).find_map(|part| part.err().filter(|name| !known.contains(name)))
}

fn fill(text: &str, with: &BTreeMap<&'static str, String>) -> String {
    let mut filled = String::new();
    for part in parts(text) {
        match part {
            Ok(text) => filled += text,
            Err(name) => match with.get(name) {
                Some(value) => filled += value,
                None => filled.extend(["{", name, "}"]),
            },
        }
    }
    filled
}

/// The text in parts: as it is, or the name of a blank.
fn parts(text: &str) -> impl Iterator<Item = Result<&str, &str>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let blank = |at: usize| {
            let name = &rest[at + 1..];
            let end = name.find(|c: char| !c.is_ascii_lowercase() && c != '_')?;
            (end > 0 && name[end..].starts_with('}')).then(|| &name[..end])
        };
        let found = rest.match_indices('{').find_map(|(at, _)| blank(at).map(|name| (at, name)));
        let part = match found {
            Some((0, name)) => {
                rest = &rest[name.len() + 2..];
                Err(name)
            }
            Some((at, _)) => {
                let (before, after) = rest.split_at(at);
                rest = after;
                Ok(before)
            }
            None => Ok(std::mem::take(&mut rest)),
        };
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blanks_are_filled_and_the_rest_stays() {
        let with = BTreeMap::from([("http_port", "81".to_owned()), ("replica", "a-0".to_owned())]);
        for (text, filled) in [
            ("--port={http_port}", "--port=81"),
            ("{http_port}{replica}", "81a-0"),
            (r#"{"x": {"y": "{replica}"}}"#, r#"{"x": {"y": "a-0"}}"#),
            ("{}{ }{Up}{{replica}}", "{}{ }{Up}{a-0}"),
            ("{http_port", "{http_port"),
        ] {
            assert_eq!(fill(text, &with), filled);
        }
        assert_eq!(unknown_blank("{http_port} {prot}", Runtime::Oip), Some("prot"));
        assert_eq!(unknown_blank("{port}", Runtime::Process), None);
        assert_eq!(unknown_blank("{port}", Runtime::Oip), Some("port"));
    }

    #[test]
    fn known_servers_need_no_command_and_have_no_unknown_blanks() {
        for runtime in [Runtime::MlServer, Runtime::Triton] {
            let command = Command::of(runtime, 3).expect("known");
            for text in command.argv.iter().chain(command.env.values()).chain([&command.health]) {
                assert_eq!(unknown_blank(text, runtime), None, "{text}");
            }
        }
        assert_eq!(Command::of(Runtime::MlServer, 1).expect("known").env["MLSERVER_PARALLEL_WORKERS"], "0");
        assert_eq!(Command::of(Runtime::MlServer, 3).expect("known").env["MLSERVER_PARALLEL_WORKERS"], "3");
        assert_eq!(Command::of(Runtime::Oip, 1), None);
    }

    proptest! {
        #[test]
        fn any_text_is_its_parts(text in "[{}a-b_A\"]{0,20}") {
            let joined: String = parts(&text)
                .map(|part| part.map_or_else(|name| format!("{{{name}}}"), str::to_owned))
                .collect();
            prop_assert_eq!(joined, text);
        }
    }
}
