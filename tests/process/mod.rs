//! `wharf up` as a process of its own, and what a user does with it: submit, ask, look, kill and start again.
//!
//! The rule of this module: whatever waits has a deadline, and says what it saw when that passes.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of it")]

pub mod load;
pub mod proof;

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use tonic::{Code, Status, transport::Channel};
use wharf::rpc::proto::{
    scheduler::{
        self as seldon, DeploymentSpec, MetaData, Model, ModelReference, ModelSpec, UnloadModelRequest,
        scheduler_client::SchedulerClient,
    },
    wharf::{
        self as wire, ListModelsRequest, ListServersRequest, ModelView, Rollout, ScaleModelRequest, ServerView,
        SubmitModelRequest, SubmitModelResponse, wharf_client::WharfClient,
    },
};

/// How long a thing may take that a user expects at once, on a machine that is busy.
pub const SOON: Duration = Duration::from_secs(60);

/// Whether the full counts are asked for.
pub fn full() -> bool {
    std::env::var("WHARF_PROVE").is_ok_and(|value| value == "1")
}

/// `full` when the full counts are asked for, else `reduced`.
pub fn count(full_count: usize, reduced: usize) -> usize {
    if full() { full_count } else { reduced }
}

/// The directory of a model of the tests.
pub fn artifact(name: &str) -> String {
    format!("{}/tests/models/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// What a fleet of one built-in server is.
pub fn onnx(replicas: u32, memory: &str, overcommit_percent: u32) -> String {
    server("onnx", replicas, memory, overcommit_percent)
}

/// One built-in server, as the registry has it.
pub fn server(name: &str, replicas: u32, memory: &str, overcommit_percent: u32) -> String {
    format!(
        "[[server]]\nname = {name:?}\nruntime = \"builtin\"\ncapabilities = [\"onnx\"]\nreplicas = {replicas}\n\
         memory = {memory:?}\novercommit_percent = {overcommit_percent}\n\n"
    )
}

/// Where a process keeps what it knows, and how it is started.
#[derive(Debug)]
pub struct Home {
    dir: tempfile::TempDir,
    settings: Vec<(String, String)>,
    env: Vec<(String, String)>,
    program: PathBuf,
}

impl Home {
    /// An empty home with this registry.
    pub fn new(registry: &str) -> Self {
        let program = PathBuf::from(env!("CARGO_BIN_EXE_wharf"));
        let home = Self { dir: tempfile::tempdir().unwrap(), settings: Vec::new(), env: Vec::new(), program };
        home.write_registry(registry);
        home
    }

    /// One more setting.
    pub fn set(mut self, name: &str, value: impl ToString) -> Self {
        self.settings.push((name.to_owned(), value.to_string()));
        self
    }

    /// The same with a binary of another profile.
    pub fn program(self, program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), ..self }
    }

    /// One more variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Replaces the registry as an editor does: in one step.
    pub fn write_registry(&self, text: &str) {
        let (new, path) = (self.path().join("servers.new"), self.path().join("servers.toml"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    /// Everything that the processes here have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    /// A command of this binary on this home, `up` unless said otherwise.
    fn command(&self) -> Command {
        let mut command = deaf(&self.program);
        let dir = self.path().display();
        command.arg("up").current_dir(self.path()).envs(self.env.iter().map(|(name, value)| (name, value)));
        let ports = ["scheduler.listen", "scheduler.agents", "scheduler.http", "gateway.listen"];
        let mut settings: Vec<(String, String)> =
            ports.iter().map(|port| ((*port).to_owned(), "127.0.0.1:0".to_owned())).collect();
        settings.push(("scheduler.data_dir".to_owned(), format!("{dir}/scheduler")));
        settings.push(("scheduler.servers".to_owned(), format!("{dir}/servers.toml")));
        settings.push(("agent.data_dir".to_owned(), format!("{dir}/agent")));
        for (name, value) in settings.iter().chain(&self.settings) {
            command.arg("--set").arg(format!("{name}={value}"));
        }
        command
    }

    /// Starts Wharf, and gives it back once it says that it is ready.
    pub async fn up(&self) -> Wharf {
        let from = self.log().len();
        let log = File::options().create(true).append(true).open(self.path().join("log")).unwrap();
        let child = self.command().stdout(Stdio::null()).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let mut process = Process(child);
        let deadline = Instant::now() + SOON;
        let said = loop {
            let said = self.log().split_off(from);
            if said.contains("ready; Ctrl-C stops it") {
                break said;
            }
            if let Some(status) = process.0.try_wait().unwrap() {
                panic!("wharf ended with {status} before it was ready:\n{said}");
            }
            assert!(Instant::now() < deadline, "wharf is not ready after {SOON:?}:\n{said}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let after = |label: &str| {
            let line = said.lines().find_map(|line| line.trim_start().strip_prefix(label));
            let line = line.unwrap_or_else(|| panic!("no line {label:?} in\n{said}"));
            line.trim().trim_start_matches("http://").split([' ', '/']).next().unwrap().to_owned()
        };
        let (api, gateway, page) = (after("scheduler API"), after("inference"), after("operators"));
        let channel = Channel::from_shared(format!("http://{api}")).unwrap().connect().await.unwrap();
        Wharf {
            scheduler: SchedulerClient::new(channel.clone()),
            wharf: WharfClient::new(channel),
            api,
            gateway,
            page,
            log: self.path().join("log"),
            process,
        }
    }

    /// Starts Wharf where it can't start, and gives back how it ended and what it said.
    pub async fn refused(&self) -> (ExitStatus, String) {
        let child = self.command().stdout(Stdio::null()).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut process = Process(child);
        let deadline = Instant::now() + SOON;
        let status = loop {
            if let Some(status) = process.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "wharf goes on where it can't");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let mut said = String::new();
        let mut stderr = process.0.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
        (status, said)
    }
}

/// The binary, deaf to what the environment of the tests says.
pub fn wharf() -> Command {
    deaf(Path::new(env!("CARGO_BIN_EXE_wharf")))
}

fn deaf(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let named = name.to_string_lossy();
        if named.starts_with("WHARF_") || named.starts_with("SELDON_") || named == "ORT_DYLIB_PATH" {
            command.env_remove(name);
        }
    }
    command
}

/// A child that ends with its owner.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What a submission says beyond the artifact.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The model.
    pub name: String,
    /// The artifact.
    pub uri: String,
    /// Which version folder of it.
    pub artifact_version: Option<u32>,
    /// What its server has to be able to serve.
    pub requirement: String,
    /// Memory of one copy, in bytes.
    pub memory: u64,
    /// Copies.
    pub replicas: u32,
    /// Fewest copies.
    pub least: u32,
    /// The server that it has to be on.
    pub server: Option<String>,
    /// What makes a version another without another artifact.
    pub mark: Option<String>,
    /// How a rollout goes.
    pub rollout: Option<Rollout>,
}

impl Spec {
    /// One copy of `artifact` that counts as `memory` bytes.
    pub fn new(name: &str, from: &str, memory: u64) -> Self {
        Self {
            name: name.to_owned(),
            uri: artifact(from),
            artifact_version: None,
            requirement: "onnx".to_owned(),
            memory,
            replicas: 1,
            least: 0,
            server: None,
            mark: None,
            rollout: None,
        }
    }

    /// One copy of the artifact at `uri`, on a server that can serve `requirement`.
    pub fn at(name: &str, uri: &Path, requirement: &str, memory: u64) -> Self {
        let (uri, requirement) = (uri.display().to_string(), requirement.to_owned());
        Self { uri, requirement, ..Self::new(name, "", memory) }
    }

    /// So many copies.
    pub fn replicas(mut self, replicas: u32) -> Self {
        self.replicas = replicas;
        self
    }

    /// Marked, so that it is another version than one marked otherwise.
    pub fn marked(mut self, mark: impl ToString) -> Self {
        self.mark = Some(mark.to_string());
        self
    }

    /// As it goes over the wire.
    pub fn model(&self) -> Model {
        let parameter = |value: &String| seldon::ParameterSpec { name: "mark".to_owned(), value: value.clone() };
        Model {
            meta: Some(MetaData { name: self.name.clone(), ..MetaData::default() }),
            model_spec: Some(ModelSpec {
                uri: self.uri.clone(),
                memory_bytes: Some(self.memory),
                artifact_version: self.artifact_version,
                requirements: vec![self.requirement.clone()],
                server: self.server.clone(),
                parameters: self.mark.iter().map(parameter).collect(),
                ..ModelSpec::default()
            }),
            deployment_spec: Some(DeploymentSpec {
                replicas: self.replicas,
                min_replicas: self.least,
                ..DeploymentSpec::default()
            }),
            ..Model::default()
        }
    }
}

/// A running Wharf. It is killed when dropped.
#[derive(Debug)]
pub struct Wharf {
    /// Seldon's API.
    pub scheduler: SchedulerClient<Channel>,
    /// Wharf's own.
    pub wharf: WharfClient<Channel>,
    /// Where the scheduler API is.
    pub api: String,
    /// Where inference is.
    pub gateway: String,
    /// Where metrics are.
    pub page: String,
    log: PathBuf,
    process: Process,
}

impl Wharf {
    /// Ends it at once: what `kill -9` does.
    pub fn kill(mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }

    /// Asks it to stop, and waits until it has.
    pub async fn stop(mut self) -> ExitStatus {
        let asked = Command::new("kill").arg(self.process.0.id().to_string()).status().unwrap();
        assert!(asked.success());
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.process.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not stop:\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        self.process.0.try_wait().unwrap().is_none()
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.0.id()
    }

    /// The end of what it has said.
    pub fn tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let from = log.lines().count().saturating_sub(60);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// Submits, by Wharf's own API.
    pub async fn submit(&self, spec: &Spec) -> Result<SubmitModelResponse, Status> {
        let request = SubmitModelRequest { model: Some(spec.model()), rollout: spec.rollout };
        let answer = tokio::time::timeout(SOON, self.wharf.clone().submit_model(request)).await;
        Ok(answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))?.into_inner())
    }

    /// Submits as Seldon's clients do.
    pub async fn load(&self, spec: &Spec) -> Result<(), Status> {
        let request = seldon::LoadModelRequest { model: Some(spec.model()) };
        self.scheduler.clone().load_model(request).await.map(drop)
    }

    /// Deletes as Seldon's clients do.
    pub async fn unload(&self, name: &str) -> Result<(), Status> {
        let model = Some(ModelReference { name: name.to_owned(), version: None });
        let request = UnloadModelRequest { model, kubernetes_meta: None };
        self.scheduler.clone().unload_model(request).await.map(drop)
    }

    /// Changes how many copies there are.
    pub async fn scale(&self, name: &str, replicas: u32) -> Result<SubmitModelResponse, Status> {
        let request = ScaleModelRequest { name: name.to_owned(), replicas };
        Ok(self.wharf.clone().scale_model(request).await?.into_inner())
    }

    /// How a model is now; nothing when nobody knows it.
    pub async fn view(&self, name: &str) -> Option<ModelView> {
        let request = ListModelsRequest { name: Some(name.to_owned()), terminated: true };
        match self.wharf.clone().list_models(request).await {
            Ok(mut views) => views.get_mut().next().await.map(Result::unwrap),
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => panic!("{status}\n{}", self.tail()),
        }
    }

    /// How every model is now, deleted ones too.
    pub async fn views(&self) -> Vec<ModelView> {
        let request = ListModelsRequest { name: None, terminated: true };
        let views = self.wharf.clone().list_models(request).await.unwrap().into_inner();
        views.map(Result::unwrap).collect().await
    }

    /// How every server is now.
    pub async fn servers(&self) -> Vec<ServerView> {
        let views = self.wharf.clone().list_servers(ListServersRequest { name: None }).await.unwrap().into_inner();
        views.map(Result::unwrap).collect().await
    }

    /// Waits until `reached` holds for the model, and gives it as it is then.
    pub async fn until(&self, name: &str, what: &str, reached: impl Fn(&ModelView) -> bool) -> ModelView {
        self.until_within(SOON, name, what, reached).await
    }

    /// [`Wharf::until`], with a deadline of its own.
    pub async fn until_within(
        &self,
        within: Duration,
        name: &str,
        what: &str,
        reached: impl Fn(&ModelView) -> bool,
    ) -> ModelView {
        let request = ListModelsRequest { name: Some(name.to_owned()), terminated: true };
        let mut last = None;
        let found = tokio::time::timeout(within, async {
            let mut views = self.wharf.clone().watch_models(request).await.unwrap().into_inner();
            while let Some(view) = views.next().await {
                let view = view.unwrap();
                if reached(&view) {
                    return view;
                }
                last = Some(view);
            }
            panic!("the watch ended")
        });
        match found.await {
            Ok(view) => view,
            Err(_) => panic!("{name} is not {what} after {within:?}; it is {last:#?}\n{}", self.tail()),
        }
    }

    /// Waits until this version serves.
    pub async fn until_serving(&self, name: &str, version: u32) -> ModelView {
        let serves = |view: &ModelView| view.serving == Some(version) && view.state == "Available";
        self.until(name, &format!("served by version {version}"), serves).await
    }

    /// Waits until this version serves and no copy of an earlier one is left, so that none can answer.
    pub async fn until_alone(&self, name: &str, version: u32) -> ModelView {
        let alone = |view: &ModelView| {
            let others = view.versions.iter().filter(|other| other.version != version);
            view.serving == Some(version)
                && view.state == "Available"
                && others.map(|other| other.copies.len()).sum::<usize>() == 0
        };
        self.until(name, &format!("served by version {version} alone"), alone).await
    }

    /// Waits until a condition on the servers holds.
    pub async fn until_servers(&self, what: &str, reached: impl Fn(&[ServerView]) -> bool) -> Vec<ServerView> {
        let deadline = Instant::now() + SOON;
        loop {
            let servers = self.servers().await;
            if reached(&servers) {
                return servers;
            }
            assert!(Instant::now() < deadline, "no {what} after {SOON:?}: {servers:#?}\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What is exported under this name, summed over its labels; nothing when it is not exported.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        sample(&load::get(&self.page, "/metrics").await, name)
    }

    /// Everything that has happened.
    pub async fn events(&self) -> Vec<wire::Event> {
        let request = wire::EventsRequest { model: String::new(), follow: false };
        let events = self.wharf.clone().events(request).await.unwrap().into_inner();
        events.map(Result::unwrap).collect().await
    }

    /// Runs a command of the CLI against it, on a thread that may wait.
    pub async fn cli(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// A command of the CLI against it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = wharf();
        command.args(args).env("WHARF_SCHEDULER_HOST", &self.api).env("WHARF_INFERENCE_HOST", &self.gateway);
        command
    }
}

/// The sum of what a page of metrics has under a name; nothing when it has none.
pub fn sample(page: &str, name: &str) -> Option<f64> {
    let of = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
        rest.rsplit_once(' ')?.1.parse::<f64>().ok()
    });
    of.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// The standard output and error of a command, for a message.
pub fn said(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
