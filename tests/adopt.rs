//! The promise: a journal that is restored from a backup goes on. While it is older than what agents and gateways have
//! seen, they go on as they were, and operators are told what to do; after `wharf store adopt` everything that answers goes
//! on answering, and what users do next is obeyed.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod process;

use std::{
    fs::File,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use process::{
    SOON, artifact,
    load::{Answer, Check, Load, Question, in_turns},
    onnx,
};

/// Every role as a process of its own, each at a port that it keeps.
struct Cluster {
    dir: tempfile::TempDir,
    api: String,
    agents: String,
    gateway: String,
    doors: [String; 2],
}

/// A child that ends with its owner.
struct Role(Child);

impl Drop for Role {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Role {
    /// Asks it to stop, and waits until it has.
    fn stop(mut self) {
        assert!(Command::new("kill").arg(self.0.id().to_string()).status().unwrap().success());
        let deadline = Instant::now() + SOON;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("servers.toml"), onnx(2, "64Mi", 10)).unwrap();
        let held: Vec<TcpListener> = (0..5).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |index: usize| held[index].local_addr().unwrap().to_string();
        Self { api: port(0), agents: port(1), gateway: port(2), doors: [port(3), port(4)], dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }

    /// Starts a role, and gives it back once it says that it is ready.
    fn start(&self, role: &str, name: &str, settings: &[(&str, &str)]) -> Role {
        let from = self.log(name).len();
        let log = File::options().create(true).append(true).open(self.path().join(name)).unwrap();
        let mut command = self.command(&[role]);
        for (name, value) in settings {
            command.arg("--set").arg(format!("{name}={value}"));
        }
        let mut role = Role(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let deadline = Instant::now() + SOON;
        while !self.log(name)[from..].contains("ready; Ctrl-C stops it") {
            let ended = role.0.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{name} is not ready:\n{}", self.log(name));
            std::thread::sleep(Duration::from_millis(5));
        }
        role
    }

    fn scheduler(&self) -> Role {
        let settings = [
            ("scheduler.listen", self.api.as_str()),
            ("scheduler.agents", &self.agents),
            ("scheduler.http", "127.0.0.1:0"),
            ("scheduler.servers", "servers.toml"),
            ("scheduler.grace_period", "10s"),
            ("scheduler.gateway_lease", "1s"),
            ("scheduler.data_dir", "data/scheduler"),
        ];
        self.start("scheduler", "scheduler.log", &settings)
    }

    fn agent(&self, index: usize) -> Role {
        let (number, data) = (index.to_string(), format!("data/agent-{index}"));
        let settings = [
            ("agent.server", "onnx"),
            ("agent.replica", number.as_str()),
            ("agent.scheduler", &self.agents),
            ("agent.listen", &self.doors[index]),
            ("agent.http", "127.0.0.1:0"),
            ("agent.memory", "64Mi"),
            ("agent.data_dir", &data),
        ];
        self.start("agent", &format!("agent-{index}.log"), &settings)
    }

    fn gateway(&self) -> Role {
        let settings = [
            ("gateway.listen", self.gateway.as_str()),
            ("gateway.scheduler", &self.agents),
            ("gateway.http", "127.0.0.1:0"),
        ];
        self.start("gateway", "gateway.log", &settings)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("WHARF_") || name.to_string_lossy().starts_with("SELDON_") {
                command.env_remove(name);
            }
        }
        command.args(args).current_dir(self.path()).env("WHARF_SCHEDULER_HOST", &self.api);
        command
    }

    fn ran(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// What a command says that has to end well.
    fn says(&self, args: &[&str]) -> String {
        let output = self.ran(args);
        let said = process::said(&output);
        assert!(output.status.success(), "wharf {args:?}: {said}\n{}", self.log("scheduler.log"));
        said
    }

    fn load(&self, name: &str, from: &str, replicas: u32) {
        let file = self.path().join(format!("{name}.yaml"));
        let uri = artifact(from);
        let text = format!(
            "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\nspec: {{storageUri: {uri}, \
             requirements: [onnx], memory: 1Mi, replicas: {replicas}}}\n"
        );
        std::fs::write(&file, text).unwrap();
        self.says(&["model", "load", "-w", "-t", "60", "-f", file.to_str().unwrap()]);
    }

    fn unload(&self, name: &str) {
        self.says(&["model", "unload", "-w", "-t", "60", name]);
    }

    fn model(&self, name: &str) -> serde_json::Value {
        let models: serde_json::Value =
            serde_json::from_slice(&self.ran(&["model", "list", "-o", "json"]).stdout).unwrap();
        models.as_array().unwrap().iter().find(|model| model["name"] == name).cloned().unwrap_or_default()
    }

    fn until(&self, what: &str, reached: impl Fn() -> bool) {
        let deadline = Instant::now() + SOON;
        while !reached() {
            assert!(Instant::now() < deadline, "not {what} after {SOON:?}\n{}", self.log("scheduler.log"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn info(&self) -> serde_json::Value {
        let output = self.ran(&["store", "info", "--data-dir", "data", "-o", "json"]);
        assert!(output.status.success(), "{}", process::said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// Asks every model in turns; each has to answer with the artifact that it had before the journal was restored.
fn ask(number: u64) -> Question {
    const MODELS: [(&str, u32, i64); 4] = [("iris", 2, 1), ("keep", 1, 0), ("new", 1, 1), ("twice", 1, 1)];
    let (model, version, label) = MODELS[usize::try_from(number % 4).unwrap()];
    let check: Check = Box::new(move |answer: &Answer| {
        if (answer.version(), answer.label) == (version, label) { Ok(()) } else { Err(format!("{answer:?}")) }
    });
    Question { model: model.to_owned(), protocol: in_turns(number / 4), check }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_goes_on_with_what_agents_hold_and_no_request_fails() {
    let cluster = Cluster::new();
    let journal = cluster.path().join("data/scheduler/journal.redb");
    let backup = cluster.path().join("backup.redb");
    let scheduler = cluster.scheduler();
    let _agents = [cluster.agent(0), cluster.agent(1)];
    let _gateway = cluster.gateway();
    for (name, replicas) in [("iris", 1), ("keep", 2), ("gone", 1), ("twice", 1)] {
        cluster.load(name, "iris-1", replicas);
    }
    scheduler.stop();
    std::fs::copy(&journal, &backup).unwrap();
    let before = cluster.info();

    // What the backup does not know.
    let scheduler = cluster.scheduler();
    cluster.load("iris", "iris-2", 1);
    cluster.load("new", "iris-2", 1);
    cluster.unload("gone");
    cluster.unload("twice");
    cluster.load("twice", "iris-2", 1);
    cluster.until("served by the new version alone", || {
        let versions = cluster.model("iris")["versions"].clone();
        versions.as_array().is_some_and(|all| {
            all.iter().all(|v| v["version"] == 2 || v["copies"].as_array().is_none_or(Vec::is_empty))
        })
    });
    let load = Load::start(&cluster.gateway, 40, ask).await;

    // Restored as it is, it commands nobody, and says what to do.
    scheduler.stop();
    std::fs::copy(&backup, &journal).unwrap();
    load.marks.mark("the journal was restored");
    let scheduler = cluster.scheduler();
    let advice =
        "the journal is older than the agents, as after restoring a backup; stop, run `wharf store adopt`, start";
    cluster.until("told what to do", || {
        let servers = cluster.says(&["server", "list", "-o", "json"]);
        servers.contains("agent onnx-0 obeyed leader epoch") && servers.contains(advice)
    });
    assert!(cluster.log("scheduler.log").contains(advice), "{}", cluster.log("scheduler.log"));
    let refused = cluster.ran(&["store", "adopt", "--data-dir", "data"]);
    let said = process::said(&refused);
    assert!(refused.status.code() == Some(1) && said.contains("is in use by another process"), "{said}");
    scheduler.stop();

    // Adopted, it keeps everything that answers.
    let said = cluster.says(&["store", "adopt", "--data-dir", "data"]);
    assert!(said.contains("goes on as another history, with 4 models"), "{said}");
    let after = cluster.info();
    assert_eq!(after["cluster"], before["cluster"]);
    assert_ne!(after["lineage"], before["lineage"]);
    load.marks.mark("the journal was adopted");
    let scheduler = cluster.scheduler();
    for name in ["iris", "keep", "new", "twice", "gone"] {
        cluster.says(&["model", "status", name, "-w", "-t", "60"]);
    }
    // A user's next wish is obeyed once the gateway follows this history; its number was never given.
    cluster.load("other", "iris-1", 1);
    cluster.until("answering at the gateway", || {
        let body = r#"{"inputs":[{"name":"X","shape":[1,4],"datatype":"FP32","data":[5.1,3.5,1.4,0.2]}]}"#;
        let args = ["model", "infer", "other", body, "--inference-host", &cluster.gateway];
        cluster.ran(&args).status.success()
    });
    for (name, copies) in [("iris", 1), ("keep", 2), ("new", 1), ("twice", 1)] {
        let model = cluster.model(name);
        assert_eq!((model["wanted"].as_u64(), model["available"].as_u64()), (Some(copies), Some(copies)), "{model:#}");
    }
    let account = load.stop().await;
    assert!(account.sent > 100 && account.failed() == 0, "{}\n{:#?}", account.line(), account.shown);
    process::proof::tell(&account.line());
    cluster.load("iris", "iris-1", 1);
    let newest = cluster.model("iris")["serving"].as_u64().unwrap();
    assert!(newest > 1000, "version {newest} may have been given before");
    // What was deleted since the backup is back, until it is deleted again.
    cluster.unload("gone");
    scheduler.stop();
}
