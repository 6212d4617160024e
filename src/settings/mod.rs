//! Settings: defaults, then the file, then the environment, then the command line, each over the one before.
//!
//! The rule of this module: a setting is declared once, in [`keys`](self), with its meaning, its default and
//! what is allowed; `config/wharf.toml`, the errors and the structures all come from that declaration. Nothing
//! unknown is passed over, and every problem is told at once. Nothing here reads the environment or a clock.

mod keys;
mod problem;
pub mod registry;
mod value;

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};

pub use keys::{Agent, Gateway, Log, Metrics, Scheduler};
pub use problem::{Problem, Problems};
pub use value::{Address, LogFilter, LogFormat, RcloneUse, RuntimeKind};

use keys::{Refused, Section};
use problem::{line_of, nearest};
use value::Raw;

/// What a variable of the environment starts with to be a setting: `WHARF_SCHEDULER__LEASE`.
pub const PREFIX: &str = "WHARF_";
/// What `agent.runtime` says of an inference server that the agent starts.
pub const STARTED: &str = "start";

/// What a variable starts with that is a secret of the agent's, whatever follows.
const SECRET: &str = "WHARF_SECRET_";
/// The variable that other programs too take for the path of ONNX Runtime's library.
const ONNX_RUNTIME: &str = "ORT_DYLIB_PATH";

/// Every setting.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// The scheduler's.
    pub scheduler: Scheduler,
    /// The gateway's.
    pub gateway: Gateway,
    /// The agent's.
    pub agent: Agent,
    /// How events are logged.
    pub log: Log,
    /// What is counted.
    pub metrics: Metrics,
}

/// A settings file that was read.
#[derive(Clone, Copy, Debug)]
pub struct SettingsFile<'a> {
    /// Its name, for errors.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
}

impl Settings {
    /// The settings that the sources make together. `environment` is all of the process's, of which the
    /// variables `WHARF_SECTION__KEY` count, and `ORT_DYLIB_PATH` where no setting says more about ONNX Runtime;
    /// `overrides` are pairs of `section.key` and value.
    ///
    /// # Errors
    /// Every problem of every source, or else every contradiction between the values.
    pub fn load(
        file: Option<SettingsFile<'_>>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Problems> {
        let mut settings = Self::default();
        let mut problems = Vec::new();
        if let Some(file) = file {
            settings.read_file(file, &mut problems);
        }
        let mut library = None;
        // Sorted, so that the same environment always makes the same message.
        for (variable, value) in environment.into_iter().collect::<BTreeMap<_, _>>() {
            if variable == ONNX_RUNTIME && !value.is_empty() {
                library = Some(value);
                continue;
            }
            let Some(name) = variable.strip_prefix(PREFIX).filter(|_| !variable.starts_with(SECRET)) else { continue };
            let place = format!("environment variable {variable}");
            match name.to_ascii_lowercase().split_once("__") {
                Some((section, key)) => {
                    settings.set(section, key, &Raw::Text(&value)).unwrap_or_else(|p| problems.push(p.at(place)));
                }
                // Other variables of this prefix are the command line's; only a near miss is a mistake.
                None => problems.extend(near_miss(&name.to_ascii_lowercase()).map(|problem| problem.at(place))),
            }
        }
        for (path, value) in overrides {
            let place = format!("command line, {path}");
            let (section, key) = path.split_once('.').unwrap_or((path.as_str(), ""));
            settings.set(section, key, &Raw::Text(&value)).unwrap_or_else(|p| problems.push(p.at(place)));
        }
        if let Some(library) = library
            && settings.agent.onnx_runtime == Agent::default().onnx_runtime
        {
            settings.agent.onnx_runtime = library;
        }
        if problems.is_empty() {
            settings.check(&mut problems);
        }
        if problems.is_empty() { Ok(settings) } else { Err(Problems(problems)) }
    }

    /// The text of `config/wharf.toml`: every setting with its meaning, its default commented out.
    #[must_use]
    pub fn reference() -> String {
        let mut text = "# Every setting of wharf, with its default.\n\
             #\n\
             # A value is taken from here, unless the environment (WHARF_SECTION__KEY, say\n\
             # WHARF_SCHEDULER__LEASE=10s) or the command line (--set section.key=value) has another.\n\
             # Durations are written \"250ms\", \"5s\", \"1m\", \"24h\"; sizes as in Kubernetes: \"512Mi\", \"10Gi\".\n"
            .to_owned();
        Self::default().each(&mut |section| {
            text.push('\n');
            for line in section.about() {
                text.push_str(&format!("#{line}\n"));
            }
            text.push_str(&format!("[{}]\n", section.name()));
            for key in section.keys() {
                text.push('\n');
                for line in key.meaning {
                    text.push_str(&format!("#{line}\n"));
                }
                if let Some((low, high)) = key.bounds {
                    text.push_str(&format!("# From {low} to {high}.\n"));
                }
                let quote = if key.quoted { "\"" } else { "" };
                text.push_str(&format!("# {} = {quote}{}{quote}\n", key.name, key.default));
            }
        });
        text
    }

    fn each(&mut self, visit: &mut dyn FnMut(&mut dyn Section)) {
        visit(&mut self.scheduler);
        visit(&mut self.gateway);
        visit(&mut self.agent);
        visit(&mut self.log);
        visit(&mut self.metrics);
    }

    fn read_file(&mut self, file: SettingsFile<'_>, problems: &mut Vec<Problem>) {
        let at = |offset: usize| format!("{}:{}", file.name, line_of(file.text, offset));
        let document = match DeTable::parse(file.text) {
            Ok(document) => document,
            Err(error) => {
                let place = at(error.span().map_or(0, |span| span.start));
                problems.push(Problem::new("", error.message().to_owned()).at(place));
                return;
            }
        };
        let mut found = Vec::new();
        for (section, table) in document.get_ref() {
            let DeValue::Table(table) = table.get_ref() else {
                let problem = format!("settings stand in sections; write [{}] above them", section.get_ref());
                found.push((section.span().start, Problem::new(section.get_ref(), problem)));
                continue;
            };
            if table.is_empty()
                && let Err(problem) = known_section(section.get_ref())
            {
                found.push((section.span().start, problem));
            }
            for (key, value) in table {
                if let Err(problem) = self.set(section.get_ref(), key.get_ref(), &Raw::Toml(value.get_ref())) {
                    found.push((key.span().start, problem));
                }
            }
        }
        found.sort_by_key(|(offset, _)| *offset);
        problems.extend(found.into_iter().map(|(offset, problem)| problem.at(at(offset))));
    }

    fn set(&mut self, section: &str, key: &str, raw: &Raw<'_>) -> Result<(), Problem> {
        known_section(section)?;
        let mut outcome = Ok(());
        self.each(&mut |candidate| {
            if candidate.name() == section {
                outcome = candidate.set(key, raw);
            }
        });
        outcome.map_err(|refused| {
            let path = format!("{section}.{key}");
            match refused {
                Refused::Value(problem) => Problem::new(&path, problem),
                Refused::Key => Problem::new(&path, unknown_key(section, key)),
            }
        })
    }

    /// What the values say together.
    fn check(&self, problems: &mut Vec<Problem>) {
        let mut problem = |key: &str, text: String| problems.push(Problem::new(key, text).at("settings".to_owned()));
        let (scheduler, agent) = (&self.scheduler, &self.agent);
        if scheduler.heartbeat * 2 > scheduler.lease {
            problem(
                "scheduler.heartbeat",
                format!(
                    "{:?} is more than half of scheduler.lease, {:?}: one lost heartbeat would end the lease",
                    scheduler.heartbeat, scheduler.lease
                ),
            );
        }
        if scheduler.retry_first > scheduler.retry_most {
            problem(
                "scheduler.retry_first",
                format!("{:?} is more than scheduler.retry_most, {:?}", scheduler.retry_first, scheduler.retry_most),
            );
        }
        if agent.max_artifact > agent.artifact_cache {
            problem(
                "agent.max_artifact",
                format!("{} is more than agent.artifact_cache, {}", agent.max_artifact, agent.artifact_cache),
            );
        }
        if agent.runtime == STARTED
            && let Err((key, wrong)) = agent.started()
        {
            problem(key, wrong);
        }
        let addresses = [
            ("scheduler.listen", &scheduler.listen),
            ("scheduler.agents", &scheduler.agents),
            ("scheduler.http", &scheduler.http),
            ("gateway.listen", &self.gateway.listen),
            ("gateway.http", &self.gateway.http),
            ("agent.listen", &agent.listen),
            ("agent.http", &agent.http),
        ];
        for (index, (key, address)) in addresses.iter().enumerate() {
            if let Some((other, _)) =
                addresses[..index].iter().find(|(_, taken)| taken == address && address.port() != 0)
            {
                problem(key, format!("{address} is the address of {other} too; give each its own"));
            }
        }
    }
}

fn sections() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut sections = Vec::new();
    Settings::default().each(&mut |section| {
        sections.push((section.name(), section.keys().iter().map(|key| key.name).collect()));
    });
    sections
}

fn known_section(section: &str) -> Result<(), Problem> {
    let sections = sections();
    if sections.iter().any(|(name, _)| *name == section) {
        return Ok(());
    }
    let names = sections.iter().map(|(name, _)| *name);
    let hint = nearest(section, names.clone()).map_or_else(
        || format!("there are {}", names.collect::<Vec<_>>().join(", ")),
        |name| format!("did you mean {name}?"),
    );
    Err(Problem::new(section, format!("no such section; {hint}")))
}

fn unknown_key(section: &str, key: &str) -> String {
    let sections = sections();
    let here = sections.iter().filter(|(name, _)| *name == section).flat_map(|(_, keys)| keys.iter().copied());
    if let Some((elsewhere, _)) = sections.iter().find(|(name, keys)| *name != section && keys.contains(&key)) {
        return format!("no such setting; did you mean {elsewhere}.{key}?");
    }
    match nearest(key, here.clone()) {
        Some(name) => format!("no such setting; did you mean {section}.{name}?"),
        None => format!("no such setting; [{section}] has {}", here.collect::<Vec<_>>().join(", ")),
    }
}

/// `SCHEDULER_LEASE` for `SCHEDULER__LEASE`.
fn near_miss(name: &str) -> Option<Problem> {
    sections().into_iter().find_map(|(section, keys)| {
        let key = name.strip_prefix(section)?.strip_prefix('_')?;
        let key = keys.into_iter().find(|known| *known == key)?;
        let variable = format!("{PREFIX}{}__{}", section.to_ascii_uppercase(), key.to_ascii_uppercase());
        Some(Problem::new(&format!("{section}.{key}"), format!("it is set by {variable}, with two underscores")))
    })
}
