//! `wharf up` as a process of its own, seen from outside: its ports, its memory, its open files.
//!
//! The rule of this module: whatever waits has a deadline, and says what it saw when that passes.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of it")]

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// How long a thing may take that a user expects at once, on a machine that is busy.
pub const SOON: Duration = Duration::from_secs(60);

/// One built-in server of two replicas.
pub const REGISTRY: &str = "[[server]]\nname = \"onnx\"\nruntime = \"builtin\"\ncapabilities = [\"onnx\"]\n\
                            replicas = 2\nmemory = \"1Gi\"\novercommit_percent = 10\n";

/// The folder of test models.
pub fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models")
}

/// The binary, deaf to what the environment of the tests says.
pub fn wharf() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WHARF_") || name.to_string_lossy().starts_with("SELDON_") {
            command.env_remove(name);
        }
    }
    command
}

/// A running Wharf in a directory of its own. It is killed when dropped.
#[derive(Debug)]
pub struct Up {
    /// Where the scheduler API is.
    pub api: String,
    /// Where agents and gateways call.
    pub agents: String,
    /// Where inference is.
    pub gateway: String,
    /// Where metrics are.
    pub page: String,
    dir: tempfile::TempDir,
    child: Child,
}

impl Up {
    /// Starts it with [`REGISTRY`] and these settings, and waits until it says that it is ready.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("servers.toml"), REGISTRY).unwrap();
        // The port for agents is not printed, so it is chosen here; somebody may take it in between.
        for _ in 0..5 {
            let agents = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
            let mut child = spawn(dir.path(), &agents, settings);
            if let Some((api, gateway, page)) = places(&mut child, &dir.path().join("log")) {
                return Self { api, agents, gateway, page, dir, child };
            }
        }
        panic!("wharf does not start:\n{}", log(dir.path()));
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Everything that it has said.
    pub fn log(&self) -> String {
        log(self.path())
    }

    /// Fails, with what it said last, unless it runs.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("wharf ended with {status}:\n{}", self.tail());
        }
        assert!(!self.log().contains("panicked"), "something panicked:\n{}", self.tail());
    }

    /// The end of what it has said.
    pub fn tail(&self) -> String {
        let log = self.log();
        let from = log.lines().count().saturating_sub(40);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// A command of the CLI against it.
    pub fn cli(&self, args: &[&str]) -> Output {
        let mut command = wharf();
        command.args(args).env("WHARF_SCHEDULER_HOST", &self.api).env("WHARF_INFERENCE_HOST", &self.gateway);
        command.current_dir(self.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// The standard output of a command that has to succeed.
    pub fn says(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        assert!(output.status.success(), "wharf {args:?}: {}\n{}", said(&output), self.tail());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Submits a test model and waits until it is available.
    pub fn load(&self, name: &str, artifact: &Path) {
        let manifest = self.manifest(name, &artifact.display().to_string());
        let output = self.cli(&["model", "load", "-f", manifest.to_str().unwrap(), "-w", "ModelAvailable", "-t", "60"]);
        assert!(output.status.success(), "{}\n{}", said(&output), self.tail());
    }

    /// Writes a manifest for an artifact.
    pub fn manifest(&self, name: &str, uri: &str) -> PathBuf {
        let path = self.path().join(format!("{}.yaml", name.replace('/', "_")));
        let text = format!(
            "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata:\n  name: {name:?}\nspec:\n  \
             storageUri: {uri:?}\n  requirements: [onnx]\n  memory: 1Mi\n"
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Open file descriptors.
    pub fn files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Memory in use, in MiB.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A command's end, output and error.
pub fn said(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("log")).unwrap_or_default()
}

fn spawn(dir: &Path, agents: &str, settings: &[(&str, &str)]) -> Child {
    let mut command = wharf();
    command.arg("up").current_dir(dir);
    for port in ["scheduler.listen", "scheduler.http", "gateway.listen"] {
        command.arg("--set").arg(format!("{port}=127.0.0.1:0"));
    }
    let shown = dir.display();
    command.arg("--set").arg(format!("scheduler.agents={agents}"));
    command.arg("--set").arg(format!("scheduler.data_dir={shown}/scheduler"));
    command.arg("--set").arg(format!("scheduler.servers={shown}/servers.toml"));
    command.arg("--set").arg(format!("agent.data_dir={shown}/agent"));
    for (name, value) in settings {
        command.arg("--set").arg(format!("{name}={value}"));
    }
    let log = File::create(dir.join("log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// The ports that it prints; nothing if one was taken.
fn places(child: &mut Child, log: &Path) -> Option<(String, String, String)> {
    let deadline = Instant::now() + SOON;
    loop {
        let said = std::fs::read_to_string(log).unwrap_or_default();
        if said.contains("ready; Ctrl-C stops it") {
            let after = |label: &str| {
                let line = said.lines().find_map(|line| line.trim_start().strip_prefix(label)).unwrap();
                line.trim().trim_start_matches("http://").split([' ', '/']).next().unwrap().to_owned()
            };
            return Some((after("scheduler API"), after("inference"), after("operators")));
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(said.contains("can't listen"), "wharf ended with {status}:\n{said}");
            return None;
        }
        assert!(Instant::now() < deadline, "wharf is not ready after {SOON:?}:\n{said}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
