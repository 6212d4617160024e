//! The real inference servers, as processes of the tests.
//!
//! The rule of this module: where a server can't be installed the test fails and says why; one heavy server runs at a
//! time, and none outlives its test.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of it")]

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use wharf::{
    forward::{self, ClientOptions, HttpUpstream, Limits, Split, TcpNetwork, Upstream},
    ports::{Network as _, SystemClock},
    runtime,
    settings::registry::Runtime as Kind,
};

/// How long a server may take to start.
const START: Duration = Duration::from_secs(120);

/// Held by each test with a server of its own.
pub static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// What a script of this folder installs, by name.
fn install(script: &str, what: &[&str]) -> BTreeMap<String, PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(script);
    let output = Command::new("sh").arg(&script).args(what).output().unwrap();
    assert!(
        output.status.success(),
        "{} can't install what tests use, and without it nothing is proved: {}\n{}",
        script.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.map(|(name, path)| (name.to_owned(), path.into())).collect()
}

/// The inference servers.
fn installed() -> &'static BTreeMap<String, PathBuf> {
    static INSTALLED: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    INSTALLED.get_or_init(|| install("setup.sh", &["mlserver", "triton"]))
}

/// The library of ONNX Runtime.
pub fn onnx_runtime() -> PathBuf {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    INSTALLED.get_or_init(|| install("onnxruntime.sh", &[])["onnxruntime"].clone()).clone()
}

/// A model that the setup trained for `MLServer`.
pub fn trained(name: &str) -> PathBuf {
    installed()["models"].join(name)
}

/// The program `mlserver`.
pub fn mlserver() -> PathBuf {
    installed()["mlserver"].with_file_name("mlserver")
}

/// The program `tritonserver`.
pub fn tritonserver() -> PathBuf {
    installed()["triton"].clone()
}

/// A model of the tests for Triton.
pub fn triton(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/models").join(name)
}

/// A running inference server. It is killed when dropped.
#[derive(Debug)]
pub struct Server {
    pub kind: Kind,
    /// Its REST address, `host:port`.
    pub http: String,
    /// Its gRPC address, `host:port`.
    pub grpc: String,
    /// Where it looks for models.
    pub repository: PathBuf,
    child: Option<Child>,
    tasks: tokio::task::JoinSet<()>,
    log: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    /// Starts one over an empty `repository`, with its own files in `home`.
    pub async fn start(kind: Kind, repository: &Path, home: &Path) -> Self {
        std::fs::create_dir_all(repository).unwrap();
        let repository = repository.canonicalize().unwrap();
        let log = home.join(format!("{}.log", kind.name()));
        let mut tasks = tokio::task::JoinSet::new();
        let (child, http, grpc) = match kind {
            Kind::Builtin => {
                let listener = TcpNetwork.bind("127.0.0.1:0").await.unwrap();
                let address = listener.address();
                let options = runtime::Options {
                    repository: repository.clone(),
                    execution: runtime::Execution::Pool { threads: 2 },
                    limits: runtime::Limits::default(),
                };
                let server = runtime::Runtime::new(options);
                tasks.spawn(forward::serve(listener, server, Limits::default(), Default::default()));
                (None, address.clone(), address)
            }
            Kind::MlServer => {
                let (http, grpc, metrics) = (free_port(), free_port(), free_port());
                let mut command = Command::new(installed()["mlserver"].with_file_name("mlserver"));
                // The folder that is its argument is its repository, whatever its settings say.
                command.arg("start").arg(&repository).current_dir(home).env("MLSERVER_HOST", "127.0.0.1");
                for (name, value) in
                    [("HTTP_PORT", http), ("GRPC_PORT", grpc), ("METRICS_PORT", metrics), ("PARALLEL_WORKERS", 0)]
                {
                    command.env(format!("MLSERVER_{name}"), value.to_string());
                }
                command.env("MLSERVER_LOAD_MODELS_AT_STARTUP", "false");
                (Some(spawn(command, &log)), format!("127.0.0.1:{http}"), format!("127.0.0.1:{grpc}"))
            }
            Kind::Triton => {
                let (http, grpc) = (free_port(), free_port());
                let mut command = Command::new(&installed()["triton"]);
                command
                    .arg(format!("--model-repository={}", repository.display()))
                    .args(["--model-control-mode=explicit", "--allow-metrics=false"])
                    .args(["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"])
                    .arg(format!("--http-port={http}"))
                    .arg(format!("--grpc-port={grpc}"))
                    .current_dir(home);
                (Some(spawn(command, &log)), format!("127.0.0.1:{http}"), format!("127.0.0.1:{grpc}"))
            }
            Kind::Oip | Kind::Process => panic!("there is no program of that kind"),
        };
        let mut server = Self { kind, http, grpc, repository, child, tasks, log };
        server.until_live().await;
        server
    }

    async fn until_live(&mut self) {
        let deadline = Instant::now() + START;
        let upstream = self.upstream();
        loop {
            let request = http::Request::get("/v2/health/live").body(forward::Body::empty()).unwrap();
            if upstream.call(request).await.is_ok_and(|response| response.status().is_success()) {
                return;
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().unwrap()
            {
                panic!("{} ended with {status}:\n{}", self.kind.name(), self.tail());
            }
            assert!(Instant::now() < deadline, "{} is not live after {START:?}:\n{}", self.kind.name(), self.tail());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The server as an agent reaches it.
    pub fn upstream(&self) -> Arc<dyn Upstream> {
        let at = |address: &str| -> Arc<dyn Upstream> {
            let clock = Arc::new(SystemClock::new());
            Arc::new(HttpUpstream::new(address, Arc::new(TcpNetwork), clock, ClientOptions::default()).unwrap())
        };
        Arc::new(Split::new(at(&self.http), Some(at(&self.grpc))))
    }

    /// How many processes it has beside itself: of Triton's Python backend, one for each model in memory.
    pub fn children(&self) -> usize {
        let Some(child) = &self.child else { return 0 };
        let tasks = format!("/proc/{0}/task", child.id());
        let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let children: Vec<String> = std::fs::read_dir(tasks).unwrap().map(|task| of(task.unwrap())).collect();
        children.iter().flat_map(|children| children.split_whitespace()).count()
    }

    /// The end of what it has said.
    pub fn tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let from = log.lines().count().saturating_sub(40);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }
}

fn spawn(mut command: Command, log: &Path) -> Child {
    let log = File::create(log).unwrap();
    // Some environments send even loopback calls to a proxy.
    command.env("no_proxy", "127.0.0.1,localhost").stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

/// The registry's entry for a server, in the words of its operator.
pub fn entry(name: &str, server: &Server, memory: &str, overcommit_percent: u32) -> String {
    let kind = server.kind.name();
    let capabilities = match server.kind {
        Kind::MlServer => "[\"sklearn\", \"xgboost\"]",
        Kind::Triton => "[\"triton\"]",
        Kind::Builtin | Kind::Oip | Kind::Process => "[\"onnx\"]",
    };
    let place = if server.kind == Kind::Builtin {
        String::new()
    } else {
        format!("addresses = [{{ http = \"http://{}\", grpc = \"http://{}\" }}]\n", server.http, server.grpc)
    };
    format!(
        "[[server]]\nname = {name:?}\nruntime = {kind:?}\ncapabilities = {capabilities}\nmemory = {memory:?}\n\
         overcommit_percent = {overcommit_percent}\n{place}"
    )
}
