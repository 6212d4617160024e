//! The promise: an inference server that Wharf starts comes back by itself with what it had, harms no model but the one
//! that takes it down, and is never left behind.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so, and has the real clock"
)]

mod process;
mod servers;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::Read as _,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use process::{
    Home, SOON, Spec, Wharf,
    load::{Clients, Protocol},
};
use serde_json::{Value, json};
use wharf::{
    agent::{
        process::{Launch, Models},
        runtimes::{Kind, Runtime as _},
    },
    domain::{names::ReplicaId, upkeep::Patience},
    forward::TcpNetwork,
    ports::SystemClock,
    rpc::proto::wharf::{ModelView, ReplicaView, ServerView},
    settings::registry,
};

/// How long heavy servers may take to start on a machine that is busy.
const LONG: Duration = Duration::from_secs(180);

fn program() -> String {
    format!("{}/tests/servers/oip.py", env!("CARGO_MANIFEST_DIR"))
}

/// A folder of a test: what servers note, and the artifacts.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.notes()).unwrap();
        place
    }

    fn notes(&self) -> PathBuf {
        self.0.path().join("notes")
    }

    /// What was noted in a book.
    fn noted(&self, book: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.notes().join(book)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn pids(&self) -> Vec<u32> {
        self.noted("pids").iter().map(|pid| pid.parse().unwrap()).collect()
    }

    /// An artifact that behaves so.
    fn artifact(&self, behave: &str) -> PathBuf {
        let path = self.0.path().join(if behave.is_empty() { "well" } else { behave });
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("behave"), behave).unwrap();
        path
    }

    fn model(&self, name: &str, behave: &str) -> Spec {
        Spec::at(name, &self.artifact(behave), "py", 1 << 20)
    }

    /// The registry's entry for servers of the test's program.
    fn registry(&self, replicas: u32, more: &str, env: &[&str]) -> String {
        let mut text = format!(
            "[[server]]\nname = \"py\"\nruntime = \"oip\"\ncapabilities = [\"py\"]\nreplicas = {replicas}\nmemory = \"1Gi\"\n\
             command = [\"python3\", {:?}, \"--port\", \"{{http_port}}\", \"--repository\", \"{{repository}}\"]\n{more}\n\
             [server.env]\nNOTES = {:?}\n",
            program(),
            self.notes().display().to_string(),
        );
        for name in env {
            writeln!(text, "{name} = \"1\"").unwrap();
        }
        text
    }

    /// The registry's entry for a process of the test's program for each model.
    fn each(&self) -> String {
        format!(
            "[[server]]\nname = \"each\"\nruntime = \"process\"\ncapabilities = [\"py\"]\nmemory = \"1Gi\"\n\
             health = \"/v2/models/{{model_name}}/ready\"\n\
             command = [\"python3\", {:?}, \"--port\", \"{{port}}\", \"--model\", \"{{model_name}}\", \"--path\", \"{{model_path}}\"]\n\
             [server.env]\nNOTES = {:?}\n",
            program(),
            self.notes().display().to_string(),
        )
    }
}

/// Whether a process runs: one that has ended and was not waited for does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").arg(signal).arg(pid.to_string()).status().unwrap().success());
}

/// Waits until something holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not after {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks a model over REST: status and body.
async fn ask(gateway: &str, model: &str) -> (u16, Value) {
    ask_with(gateway, model, json!({ "id": "ask", "inputs": [] })).await
}

async fn ask_with(gateway: &str, model: &str, body: Value) -> (u16, Value) {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = http::Request::post(format!("http://{gateway}/v2/models/{model}/infer"))
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))
        .unwrap();
    let response = tokio::time::timeout(SOON, client.request(request)).await.unwrap().unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// Asks until the model answers, and says which process did.
async fn answered_by(wharf: &Wharf, model: &str) -> u32 {
    let deadline = Instant::now() + SOON;
    loop {
        let (status, body) = ask(&wharf.gateway, model).await;
        if status == 200 {
            return u32::try_from(body["outputs"][0]["data"][0].as_u64().unwrap()).unwrap();
        }
        assert!(Instant::now() < deadline, "{model} does not answer: {status} {body}\n{}", wharf.tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Submits a model with a warm-up.
async fn warmed(wharf: &Wharf, spec: &Spec) {
    let mut model = spec.model();
    model.model_spec.as_mut().unwrap().warmup =
        Some(r#"[{"name":"X","datatype":"FP32","shape":[1],"data":[1]}]"#.to_owned());
    let request = wharf::rpc::proto::scheduler::LoadModelRequest { model: Some(model) };
    wharf.scheduler.clone().load_model(request).await.unwrap();
}

async fn available(wharf: &Wharf, spec: &Spec) {
    wharf.submit(spec).await.unwrap();
    wharf.until_serving(&spec.name, 1).await;
}

// === the shim ===

fn shim(grace: u32, script: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.args(["shim", "--grace", &grace.to_string(), "--", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The numbers that a script says, one on a line.
fn said(shim: &mut Child, lines: usize) -> Vec<u32> {
    use std::io::BufRead as _;
    let out = std::io::BufReader::new(shim.stdout.take().unwrap());
    out.lines().take(lines).map(|line| line.unwrap().trim().parse().unwrap()).collect()
}

/// How a shim ends whose pipe stays open.
fn end_of(mut shim: Child) -> (Option<i32>, String) {
    let pipe = shim.stdin.take();
    let code = shim.wait().unwrap().code();
    drop(pipe);
    let mut words = String::new();
    shim.stderr.unwrap().read_to_string(&mut words).unwrap();
    (code, words)
}

#[test]
fn a_shim_ends_as_its_program_does() {
    assert_eq!(end_of(shim(1000, "exit 7")).0, Some(7));
    assert_eq!(end_of(shim(1000, "kill -9 $$")).0, Some(128 + 9));
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.args(["shim", "--", "/no/such/program"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let (code, words) = end_of(command.spawn().unwrap());
    assert_eq!(code, Some(127));
    assert!(words.contains("can't run /no/such/program"), "{words}");
}

#[tokio::test]
async fn nothing_is_left_when_the_pipe_ends_whatever_ignores_the_signal() {
    // The program and a grandchild ignore the signal; another grandchild has left the group and the session.
    let script = "trap '' TERM; sh -c 'trap \"\" TERM; while :; do sleep 1; done' & setsid sleep 1000 & echo $$; echo $!; \
                  while :; do sleep 1; done";
    let mut shim = shim(300, script);
    let pids = said(&mut shim, 2);
    assert!(pids.iter().all(|pid| runs(*pid)));
    let began = Instant::now();
    drop(shim.stdin.take());
    let status = shim.wait().unwrap();
    assert_eq!(status.code(), Some(128 + 9));
    assert!(began.elapsed() >= Duration::from_millis(300), "the program had its time");
    until("all are gone", || !pids.iter().any(|pid| runs(*pid))).await;
}

#[tokio::test]
async fn what_a_program_leaves_has_no_grace_of_its_own() {
    // The program needs most of the grace, and a child of it ignores the signal.
    let script = "trap 'sleep 2.5; exit 5' TERM; sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & \
                  while :; do sleep 0.01; done";
    let mut shim = shim(3000, script);
    let pids = said(&mut shim, 1);
    let began = Instant::now();
    drop(shim.stdin.take());
    assert_eq!(shim.wait().unwrap().code(), Some(5));
    assert!(began.elapsed() < Duration::from_millis(5400), "one grace for all: {:?}", began.elapsed());
    assert!(!runs(pids[0]));
}

#[tokio::test]
async fn a_program_has_its_time_to_end_well() {
    let mut shim = shim(30_000, "trap 'exit 5' TERM; echo $$; while :; do sleep 0.01; done");
    let pids = said(&mut shim, 1);
    drop(shim.stdin.take());
    assert_eq!(shim.wait().unwrap().code(), Some(5));
    assert!(!runs(pids[0]));
}

#[tokio::test]
async fn a_program_ends_with_its_shim_even_if_that_is_killed_and_signals_do_not_end_a_shim() {
    let mut shim = shim(30_000, "echo $$; while :; do sleep 1; done");
    let pids = said(&mut shim, 1);
    for signal in ["-TERM", "-INT", "-HUP"] {
        kill(shim.id(), signal);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(shim.try_wait().unwrap().is_none() && runs(pids[0]));
    kill(shim.id(), "-9");
    assert_eq!(shim.wait().unwrap().signal(), Some(9));
    until("the program is gone", || !runs(pids[0])).await;
}

// === one server for all models ===

#[tokio::test]
async fn a_server_that_ends_comes_back_with_what_it_had_and_says_what_it_said() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &[]));
    let wharf = home.up().await;
    for name in ["a", "b"] {
        available(&wharf, &place.model(name, "")).await;
    }
    let first = answered_by(&wharf, "a").await;
    assert_eq!(answered_by(&wharf, "b").await, first, "one server holds both");
    // What was used last comes back first.
    answered_by(&wharf, "a").await;
    kill(first, "-9");
    let second = answered_by(&wharf, "a").await;
    assert_ne!(second, first);
    assert_eq!(answered_by(&wharf, "b").await, second);
    assert_eq!(place.noted("loads"), ["a_1", "b_1", "a_1", "b_1"]);
    assert_eq!(wharf.metric("wharf_agent_server_ended_total").await, Some(1.0));
    for name in ["a", "b"] {
        let view = wharf.view(name).await.unwrap();
        assert_eq!(view.versions[0].copies.len(), 1, "it is the same copy: {view:#?}");
    }
    let log = home.log();
    assert!(log.lines().any(|line| line.contains("listening on") && line.contains("py-0")), "{log}");
    wharf.stop().await;
    assert!(!runs(second), "a server ends with its agent");
}

#[tokio::test]
async fn a_server_has_none_of_the_agent_s_credentials_but_those_that_the_registry_gives_it() {
    let place = Place::new();
    let mut home = Home::new(&place.registry(1, "", &["AWS_REGION"])).env("PLAIN", "hunter-plain");
    for name in [
        "WHARF_SECRET_MINIO",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "RCLONE_CONFIG_PASS",
    ] {
        home = home.env(name, "hunter22");
    }
    let wharf = home.up().await;
    until("the server runs", || !place.pids().is_empty()).await;
    let environ = std::fs::read_to_string(format!("/proc/{}/environ", place.pids()[0])).unwrap();
    assert!(!environ.contains("hunter22"), "{}", environ.replace('\0', "\n"));
    assert!(environ.contains("PLAIN=hunter-plain") && environ.split('\0').any(|pair| pair == "AWS_REGION=1"));
    drop(wharf);
}

#[tokio::test]
async fn nothing_is_left_when_the_agent_is_killed() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &["DEAF", "CHILD"])).set("agent.stop_deadline", "200ms");
    let wharf = home.up().await;
    until("the server and its child run", || place.pids().len() == 2).await;
    wharf.kill();
    until("nothing is left", || !place.pids().iter().any(|pid| runs(*pid))).await;
}

fn resident(view: &ModelView) -> usize {
    let copies = view.versions.iter().flat_map(|version| &version.copies);
    copies.filter(|copy| copy.state == "Available" && copy.residency == "resident").count()
}

/// A request that failed: its number, its status, what was answered.
type Failed = (String, u16, Value);

/// Clients that ask the models in turns, one request after the other.
struct Traffic {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<Failed>>>,
    clients: tokio::task::JoinSet<()>,
}

impl Traffic {
    const CLIENTS: usize = 4;

    fn start(wharf: &Wharf, names: [&'static str; 2], inputs: &Value) -> Self {
        let (stop, sent, failed) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::default());
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..Self::CLIENTS {
            let (gateway, inputs) = (wharf.gateway.clone(), inputs.clone());
            let (stop, sent, failed) =
                (Arc::clone(&stop), Arc::clone(&sent), Arc::<Mutex<Vec<Failed>>>::clone(&failed));
            clients.spawn(async move {
                for (turn, name) in names.iter().cycle().enumerate() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let id = format!("{client}-{turn}");
                    let (status, body) = ask_with(&gateway, name, json!({ "id": id, "inputs": inputs })).await;
                    if status != 200 {
                        failed.lock().unwrap().push((id, status, body));
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { stop, sent, failed, clients }
    }

    async fn more(&self, requests: u64) {
        let enough = self.sent.load(Ordering::Relaxed) + requests;
        until("requests", || self.sent.load(Ordering::Relaxed) >= enough).await;
    }

    /// Ends it. Every request that failed is one that was with a server when that was killed, of which there were so many.
    async fn end(mut self, wharf: &Wharf, kills: usize, reached: &BTreeSet<String>) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.clients.join_next().await {
            done.unwrap();
        }
        let failed = std::mem::take(&mut *self.failed.lock().unwrap());
        let sent = self.sent.load(Ordering::Relaxed);
        println!("{sent} requests, {} failed in {kills} kills, each with the server that was killed", failed.len());
        for (id, status, body) in &failed {
            // What was written to the server and not read yet is noted nowhere; it counts as begun all the same.
            let begun = reached.contains(id) || *status == 502 && !body.to_string().contains("could not be reached");
            assert!(begun, "request {id} failed with {status} {body} before it reached a server\n{}", wharf.tail());
        }
        assert!(failed.len() <= kills * Self::CLIENTS, "no more than were under way: {failed:?}");
    }
}

#[tokio::test]
async fn a_killed_server_fails_what_had_reached_it_and_nothing_else() {
    let place = Place::new();
    let home = Home::new(&place.registry(2, "", &[]));
    let wharf = home.up().await;
    let names = ["a", "b"];
    for name in names {
        wharf.submit(&place.model(name, "").replicas(2)).await.unwrap();
        wharf.until(name, "on both replicas", |view| resident(view) == 2).await;
    }
    let traffic = Traffic::start(&wharf, names, &json!([]));
    for _ in 0..3 {
        let before = place.pids().len();
        traffic.more(200).await;
        let victim = *place.pids().iter().rfind(|pid| runs(**pid)).unwrap();
        kill(victim, "-9");
        until("another server", || place.pids().len() > before).await;
        for name in names {
            wharf.until(name, "back on both replicas", |view| resident(view) == 2).await;
        }
    }
    traffic.end(&wharf, 3, &place.noted("requests").into_iter().collect()).await;
}

/// A process's proportional anonymous memory.
fn proportional(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

/// The programs that run below this folder and have these words in their command.
fn below(home: &Home, words: &str) -> Vec<u32> {
    let below = home.path().display().to_string();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&below) && line.contains(words) && !line.contains(" shim ")
    };
    pids.filter(is_one).collect()
}

#[tokio::test]
async fn a_killed_mlserver_comes_back_with_its_copies_and_no_request_fails_that_had_not_reached_it() {
    let _turn = servers::TURN.lock().await;
    let home = Home::new(&format!(
        "[[server]]\nname = \"mlserver\"\nruntime = \"mlserver\"\ncapabilities = [\"sklearn\"]\nreplicas = 2\n\
         memory = \"1Gi\"\ncommand = [{:?}, \"start\", \"{{repository}}\"]\n",
        servers::mlserver().display().to_string(),
    ));
    let wharf = home.up().await;
    let names = ["a", "b"];
    for name in names {
        let spec = Spec::at(name, &servers::trained("sklearn-iris-1"), "sklearn", 1 << 20).replicas(2);
        wharf.submit(&spec).await.unwrap();
        wharf.until_within(LONG, name, "on both replicas", |view| resident(view) == 2).await;
    }
    let flower = json!([{ "name": "X", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2] }]);
    let traffic = Traffic::start(&wharf, names, &flower);
    traffic.more(50).await;
    kill(below(&home, "mlserver start")[0], "-9");
    for name in names {
        wharf.until_within(LONG, name, "on one replica", |view| resident(view) < 2).await;
    }
    for name in names {
        wharf.until_within(LONG, name, "back on both replicas", |view| resident(view) == 2).await;
    }
    traffic.more(20).await;
    traffic.end(&wharf, 1, &BTreeSet::new()).await;
    let pids = below(&home, "mlserver start");
    assert_eq!(pids.len(), 2);
    wharf.kill();
    until("nothing is left", || !pids.iter().any(|pid| runs(*pid))).await;
}

/// Asks a model about a flower by REST and gRPC until both have answered rightly.
async fn answers(wharf: &Wharf, model: &str) {
    let deadline = Instant::now() + SOON;
    let clients = Clients::connect(&wharf.gateway).await;
    for protocol in [Protocol::Rest, Protocol::Grpc] {
        loop {
            match clients.ask(0, model, protocol).await {
                Ok(answer) => break assert_eq!((answer.model, answer.label), (format!("{model}_1"), 0)),
                Err(refused) => assert!(Instant::now() < deadline, "{model}: {refused:?}\n{}", wharf.tail()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test]
async fn triton_is_found_started_and_brought_back_with_what_it_had() {
    let _turn = servers::TURN.lock().await;
    let program = servers::tritonserver();
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let registry =
        "[[server]]\nname = \"triton\"\nruntime = \"triton\"\ncapabilities = [\"triton\"]\nmemory = \"1Gi\"\n";
    let home = Home::new(registry).env("PATH", &path);
    let wharf = home.up().await;
    let spec =
        Spec { artifact_version: Some(1), ..Spec::at("iris", &servers::triton("triton-iris"), "triton", 1 << 20) };
    wharf.submit(&spec).await.unwrap();
    wharf.until_within(LONG, "iris", "in memory", |view| resident(view) == 1).await;
    answers(&wharf, "iris").await;
    let before = below(&home, "bin/tritonserver");
    assert_eq!(before.len(), 1, "{before:?}");
    kill(before[0], "-9");
    until("another one", || below(&home, "bin/tritonserver").iter().any(|pid| !before.contains(pid))).await;
    wharf.until_within(LONG, "iris", "back in memory", |view| resident(view) == 1).await;
    answers(&wharf, "iris").await;
    wharf.kill();
    until("nothing is left", || below(&home, "tritonserver").is_empty()).await;
}

#[tokio::test]
async fn an_agent_of_its_own_starts_its_server_and_takes_it_along() {
    let place = Place::new();
    let agents = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let home = Home::new(&process::onnx(1, "1Mi", 0)).set("scheduler.agents", &agents);
    let wharf = home.up().await;
    let settings = [
        ("scheduler", agents),
        ("server", "py".to_owned()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("http", "127.0.0.1:0".to_owned()),
        ("data_dir", home.path().join("own").display().to_string()),
        ("capabilities", "py".to_owned()),
        ("runtime", "start".to_owned()),
        ("runtime_kind", "oip".to_owned()),
        ("command", format!("python3 {} --port {{http_port}} --repository {{repository}}", program())),
        ("env", format!("NOTES={}", place.notes().display())),
        ("health", "/v2/health/live".to_owned()),
    ];
    let mut command = process::wharf();
    command
        .arg("agent")
        .args(settings.iter().flat_map(|(name, value)| ["--set".into(), format!("agent.{name}={value}")]));
    let mut agent = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    available(&wharf, &place.model("a", "")).await;
    let server = answered_by(&wharf, "a").await;
    kill(server, "-9");
    assert_ne!(answered_by(&wharf, "a").await, server);
    agent.kill().unwrap();
    agent.wait().unwrap();
    until("nothing is left", || !place.pids().iter().any(|pid| runs(*pid))).await;
}

#[tokio::test]
async fn a_model_that_takes_the_server_down_is_kept_out_and_the_others_come_back() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &[])).set("scheduler.retry_first", "100ms");
    let wharf = home.up().await;
    available(&wharf, &place.model("good", "")).await;
    wharf.submit(&place.model("bad", "crash-on-load")).await.unwrap();
    let told = |view: &ModelView| format!("{view:?}").contains("quarantined: the inference server ended 2 times");
    wharf.until("bad", "quarantined", told).await;
    answered_by(&wharf, "good").await;
    let ends = wharf.metric("wharf_agent_server_ended_total").await;
    assert_eq!(ends, Some(2.0), "{}", wharf.tail());
    assert_eq!(wharf.metric("wharf_agent_quarantined_total").await, Some(1.0));
    // Another version may try.
    wharf.submit(&place.model("bad", "")).await.unwrap();
    wharf.until_serving("bad", 2).await;
}

#[tokio::test]
async fn a_model_whose_requests_take_the_server_down_is_kept_out() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &[]));
    let wharf = home.up().await;
    available(&wharf, &place.model("good", "")).await;
    available(&wharf, &place.model("bad", "crash-on-infer")).await;
    let deadline = Instant::now() + SOON;
    while wharf.metric("wharf_agent_quarantined_total").await != Some(1.0) {
        assert!(Instant::now() < deadline, "{}", wharf.tail());
        let (status, _) = ask(&wharf.gateway, "bad").await;
        assert_ne!(status, 200);
    }
    assert_eq!(wharf.metric("wharf_agent_server_ended_total").await, Some(2.0));
    answered_by(&wharf, "good").await;
}

#[tokio::test]
async fn a_model_whose_warm_up_takes_the_server_down_is_kept_out_and_one_that_is_busy_is_not() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &[])).set("scheduler.retry_first", "100ms");
    let wharf = home.up().await;
    available(&wharf, &place.model("good", "")).await;
    let gateway = wharf.gateway.clone();
    let busy = tokio::spawn(async move {
        loop {
            // Some fail with the server.
            ask(&gateway, "good").await;
        }
    });
    warmed(&wharf, &place.model("bad", "crash-on-infer")).await;
    let told = |view: &ModelView| format!("{view:?}").contains("quarantined: the inference server ended 2 times");
    wharf.until("bad", "quarantined", told).await;
    busy.abort();
    answered_by(&wharf, "good").await;
    assert_eq!(wharf.metric("wharf_agent_server_ended_total").await, Some(2.0), "{}", wharf.tail());
    assert_eq!(wharf.metric("wharf_agent_quarantined_total").await, Some(1.0));
}

#[tokio::test]
async fn an_independent_server_outlives_the_agent_and_is_taken_up_without_a_reload() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "lifetime = \"independent\"", &[]));
    let wharf = home.up().await;
    available(&wharf, &place.model("a", "")).await;
    let server = answered_by(&wharf, "a").await;
    // Its environment may have credentials in it.
    let kept = home.path().join("agent/py-0/server.json");
    assert_eq!(std::fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    wharf.kill();
    assert!(runs(server), "it lives on");
    let wharf = home.up().await;
    assert_eq!(answered_by(&wharf, "a").await, server);
    assert_eq!(place.noted("loads"), ["a_1"], "nothing was loaded again");
    // One that was taken up is watched too.
    kill(server, "-9");
    let next = answered_by(&wharf, "a").await;
    assert_ne!(next, server);
    // An agent that stops by itself leaves it running as well; a replica that goes for good takes it along.
    wharf.stop().await;
    assert!(runs(next));
    let wharf = home.up().await;
    wharf.unload("a").await.unwrap();
    home.write_registry("");
    until("it is stopped", || !runs(next)).await;
    drop(wharf);
}

#[tokio::test]
async fn an_independent_server_whose_replica_went_while_wharf_was_down_is_stopped_at_the_start() {
    let place = Place::new();
    let independent = |replicas| place.registry(replicas, "lifetime = \"independent\"", &[]);
    let home = Home::new(&independent(2));
    let wharf = home.up().await;
    until("both run", || place.pids().len() == 2).await;
    until("both are kept", || (0..2).all(|index| home.path().join(format!("agent/py-{index}/server.pid")).exists()))
        .await;
    wharf.kill();
    home.write_registry(&independent(1));
    let wharf = home.up().await;
    let left = place.pids().into_iter().filter(|pid| runs(*pid)).collect::<Vec<_>>();
    assert_eq!(left.len(), 1, "one replica is one server");
    available(&wharf, &place.model("a", "")).await;
    assert_eq!(answered_by(&wharf, "a").await, left[0], "and it was taken up");
    wharf.kill();
    assert!(runs(left[0]));
    home.write_registry(&process::onnx(1, "1Mi", 0).replace("\"onnx\"\nruntime", "\"py\"\nruntime"));
    drop(home.up().await);
    assert!(!runs(left[0]), "a builtin runtime is no server");
}

#[tokio::test]
async fn an_independent_server_that_does_not_answer_yet_is_not_forgotten() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "lifetime = \"independent\"", &[]));
    let wharf = home.up().await;
    available(&wharf, &place.model("a", "")).await;
    let server = answered_by(&wharf, "a").await;
    wharf.kill();
    let hang = place.notes().join("hang");
    std::fs::write(&hang, "").unwrap();
    home.up().await.stop().await;
    assert!(runs(server), "it lives on");
    std::fs::remove_file(hang).unwrap();
    let wharf = home.up().await;
    assert_eq!(answered_by(&wharf, "a").await, server);
    assert_eq!(place.pids(), [server], "no other was started");
    home.write_registry("");
    wharf.unload("a").await.unwrap();
    until("it is stopped", || !runs(server)).await;
}

#[tokio::test]
async fn a_server_that_never_answers_is_started_again_and_what_is_wrong_is_told() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "", &["HANG"])).set("agent.start_deadline", "1s");
    let wharf = home.up().await;
    until("it is told", || home.log().contains("did not answer 200 at /v2/health/ready within 1 s")).await;
    until("another start", || place.pids().len() >= 2).await;
    drop(wharf);
    until("nothing is left", || !place.pids().iter().any(|pid| runs(*pid))).await;
}

#[tokio::test]
async fn a_server_in_whose_place_another_program_listens_is_not_taken_for_it() {
    let place = Place::new();
    // It listens somewhere else than it was told.
    let elsewhere = "\"--port\", \"0\", \"--path\", \"{http_port}\"";
    let home = Home::new(&place.registry(1, "", &[]).replace("\"--port\", \"{http_port}\"", elsewhere));
    let wharf = home.up().await;
    until("it runs", || place.pids().len() == 1).await;
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", place.pids()[0])).unwrap();
    let port: u16 = line.split('\0').skip_while(|word| *word != "--path").nth(1).unwrap().parse().unwrap();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let other = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let mut bytes = [0; 4096];
                while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                }
            });
        }
    });
    let told = format!("process {} listens on port {port} of 127.0.0.1 in its place", std::process::id());
    until("it is told", || home.log().contains(&told)).await;
    assert!(!home.log().contains("the inference server is ready"));
    other.abort();
    drop(wharf);
}

// === a server that leaks ===

/// Ends what is left of servers that outlive their agent.
struct Leftovers<'a>(&'a Place);

impl Drop for Leftovers<'_> {
    fn drop(&mut self) {
        for pid in self.0.pids().into_iter().filter(|pid| runs(*pid)) {
            drop(Command::new("kill").arg("-9").arg(pid.to_string()).status());
        }
    }
}

/// What was told of the server's recycling.
async fn told(wharf: &Wharf) -> Vec<String> {
    let events = wharf.events().await.into_iter();
    events.map(|event| event.kind).filter(|kind| kind.contains("ecycl")).collect()
}

/// Waits until every replica takes copies, and none leaks so that it is told.
async fn all_well(wharf: &Wharf) {
    wharf
        .until_servers("servers that are well", |servers| {
            let replicas = servers.iter().flat_map(|server| &server.replicas);
            let well = |replica: &ReplicaView| replica.state == "Available";
            servers.iter().all(|server| server.conditions.is_empty()) && replicas.into_iter().all(well)
        })
        .await;
}

fn leaked(servers: &[ServerView]) -> Vec<u64> {
    servers.iter().flat_map(|server| &server.replicas).map(|replica| replica.leaked).collect()
}

fn says(servers: &[ServerView], what: &str) -> bool {
    servers.iter().flat_map(|server| &server.conditions).any(|condition| condition.contains(what))
}

#[tokio::test]
async fn a_server_that_leaks_is_recycled_under_traffic_and_no_request_fails() {
    let place = Place::new();
    let home = Home::new(&place.registry(2, "lifetime = \"independent\"", &[]))
        .set("scheduler.leak_percent", 5)
        .set("scheduler.recycle_after", "1s")
        .set("agent.memory_guess", "*=1+1Mi");
    let wharf = home.up().await;
    let _leftovers = Leftovers(&place);
    for name in ["a", "b"] {
        available(&wharf, &place.model(name, "")).await;
    }
    let before = [answered_by(&wharf, "a").await, answered_by(&wharf, "b").await];
    assert_ne!(before[0], before[1], "each replica has one of them");
    let traffic = Traffic::start(&wharf, ["a", "b"], &json!([]));
    traffic.more(100).await;
    available(&wharf, &place.model("leaky", "leak")).await;
    wharf.unload("leaky").await.unwrap();
    wharf.until_servers("leak", |servers| says(servers, "its server is started anew once its copies")).await;
    until("another run", || place.pids().len() == 3).await;
    all_well(&wharf).await;
    assert_eq!(told(&wharf).await, ["Recycling", "Recycled"]);
    assert_eq!(wharf.metric("wharf_agent_server_recycled_total").await, Some(1.0));
    assert_eq!(wharf.metric("wharf_agent_server_ended_total").await, Some(0.0), "that is no end of its own");
    let left: Vec<u32> = place.pids().into_iter().filter(|pid| runs(*pid)).collect();
    assert_eq!(left.len(), 2, "the run that leaked is over");
    traffic.more(100).await;
    traffic.end(&wharf, 0, &BTreeSet::new()).await;
    // It takes copies again.
    wharf.submit(&place.model("c", "").replicas(2)).await.unwrap();
    wharf.until("c", "on both replicas", |view| resident(view) == 2).await;
    for name in ["a", "b", "c"] {
        wharf.unload(name).await.unwrap();
    }
    home.write_registry("");
    until("nothing is left", || !place.pids().iter().any(|pid| runs(*pid))).await;
}

#[tokio::test]
async fn a_server_that_leaks_goes_on_where_nothing_else_has_room_and_says_so() {
    let place = Place::new();
    let home = Home::new(&place.registry(1, "lifetime = \"independent\"", &[]))
        .set("scheduler.leak_percent", 5)
        .set("scheduler.recycle_after", "1s")
        .set("agent.memory_guess", "*=1+1Mi");
    let wharf = home.up().await;
    let _leftovers = Leftovers(&place);
    available(&wharf, &place.model("a", "")).await;
    let server = answered_by(&wharf, "a").await;
    available(&wharf, &place.model("leaky", "leak")).await;
    wharf.unload("leaky").await.unwrap();
    wharf.until_servers("condition", |servers| says(servers, "1 of them find no other place: a: ")).await;
    assert_eq!(answered_by(&wharf, "a").await, server);
    // After a while it takes copies again, as it is.
    wharf.until_servers("condition", |servers| says(servers, "nothing else has room for its copies")).await;
    assert_eq!(told(&wharf).await, ["Recycling", "NotRecycled"]);
    available(&wharf, &place.model("b", "")).await;
    assert_eq!(answered_by(&wharf, "b").await, server);
    assert_eq!(place.pids().len(), 1);
    // The next agent knows of the leak too.
    wharf.kill();
    let wharf = home.up().await;
    wharf.until_servers("condition", |servers| says(servers, "leaks: its server keeps")).await;
    assert_eq!(answered_by(&wharf, "b").await, server);
}

#[tokio::test]
async fn a_leak_is_only_told_where_no_server_is_to_be_ended_for_it() {
    let place = Place::new();
    let home = Home::new(&place.registry(2, "", &[]))
        .set("scheduler.leak_percent", 5)
        .set("scheduler.recycle_after", "1s")
        .set("agent.memory_guess", "*=1+1Mi")
        .set("scheduler.recycle", false);
    let wharf = home.up().await;
    available(&wharf, &place.model("leaky", "leak")).await;
    wharf.unload("leaky").await.unwrap();
    wharf.until_servers("condition", |servers| says(servers, "drain it and restart the server")).await;
    assert_eq!(told(&wharf).await, Vec::<String>::new());
}

/// A model whose runtime keeps a part of each load for ever.
fn leaky(place: &Place) -> PathBuf {
    let folder = place.0.path().join("leaky");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("model-settings.json"), r#"{ "name": "leaky", "implementation": "leaky.Leaky" }"#)
        .unwrap();
    let runtime = r#"
from mlserver import MLModel
from mlserver.types import InferenceResponse

kept = []


class Leaky(MLModel):
    async def load(self) -> bool:
        kept.append(b"x" * (100 << 20))
        return True

    async def predict(self, payload):
        return InferenceResponse(model_name=self.name, outputs=[])
"#;
    std::fs::write(folder.join("leaky.py"), runtime).unwrap();
    folder
}

#[tokio::test]
async fn an_mlserver_that_leaks_is_recycled_under_traffic_and_no_request_fails() {
    let _turn = servers::TURN.lock().await;
    let place = Place::new();
    let home = Home::new(&format!(
        "[[server]]\nname = \"mlserver\"\nruntime = \"mlserver\"\ncapabilities = [\"sklearn\"]\nreplicas = 2\n\
         memory = \"1Gi\"\ncommand = [{:?}, \"start\", \"{{repository}}\"]\n",
        servers::mlserver().display().to_string(),
    ))
    .set("scheduler.leak_percent", 8)
    .set("scheduler.recycle_after", "2s")
    .set("agent.memory_guess", "*=1+1Mi");
    let wharf = home.up().await;
    for name in ["a", "b"] {
        let spec = Spec::at(name, &servers::trained("sklearn-iris-1"), "sklearn", 1 << 20);
        wharf.submit(&spec).await.unwrap();
        wharf.until_within(LONG, name, "in memory", |view| resident(view) == 1).await;
    }
    let before: BTreeSet<u32> = below(&home, "mlserver start").into_iter().collect();
    let flower = json!([{ "name": "X", "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2] }]);
    let traffic = Traffic::start(&wharf, ["a", "b"], &flower);
    traffic.more(50).await;
    let spec = Spec::at("leaky", &leaky(&place), "sklearn", 1 << 20);
    wharf.submit(&spec).await.unwrap();
    wharf.until_within(LONG, "leaky", "in memory", |view| resident(view) == 1).await;
    wharf.unload("leaky").await.unwrap();
    let servers = wharf.until_servers("leak", |servers| says(servers, "its server is started anew once")).await;
    println!("leaked: {:?}", leaked(&servers));
    assert!(leaked(&servers).iter().any(|bytes| *bytes > 90 << 20), "{servers:#?}");
    let ended = || before.iter().any(|pid| !runs(*pid));
    until("the server that leaked is ended", ended).await;
    all_well(&wharf).await;
    let servers = wharf.servers().await;
    println!("leaked after it was recycled: {:?}", leaked(&servers));
    assert!(leaked(&servers).iter().all(|bytes| *bytes < 30 << 20), "{servers:#?}");
    let after: BTreeSet<u32> = below(&home, "mlserver start").into_iter().collect();
    assert_eq!((after.len(), after.intersection(&before).count()), (2, 1), "one of the two is another");
    traffic.more(50).await;
    traffic.end(&wharf, 0, &BTreeSet::new()).await;
    assert_eq!(told(&wharf).await, ["Recycling", "Recycled"]);
}

// === a process for each model ===

#[tokio::test]
async fn each_model_is_a_process_that_is_started_watched_and_stopped() {
    let place = Place::new();
    let home = Home::new(&place.each());
    let wharf = home.up().await;
    for name in ["a", "b"] {
        available(&wharf, &place.model(name, "")).await;
    }
    let (a, b) = (answered_by(&wharf, "a").await, answered_by(&wharf, "b").await);
    assert_ne!(a, b);
    let view = wharf.view("a").await.unwrap();
    let (measured, takes) = (view.versions[0].copies[0].measured.unwrap(), proportional(a));
    println!("measured {measured}, takes {takes}");
    assert!(measured.abs_diff(takes) * 4 <= takes, "{measured} is not within a quarter of {takes}");
    kill(a, "-9");
    let again = answered_by(&wharf, "a").await;
    assert_ne!(again, a);
    assert_eq!(answered_by(&wharf, "b").await, b, "the other one was not touched");
    let log = home.log();
    assert!(log.lines().any(|line| line.contains("listening on") && line.contains("a_1")), "{log}");
    wharf.unload("a").await.unwrap();
    until("its process is gone", || !runs(again)).await;
    wharf.kill();
    until("nothing is left", || !place.pids().iter().any(|pid| runs(*pid))).await;
}

#[tokio::test]
async fn a_warm_up_reaches_the_process_of_its_model() {
    let place = Place::new();
    let wharf = Home::new(&place.each());
    let wharf = wharf.up().await;
    warmed(&wharf, &place.model("a", "")).await;
    wharf.until_serving("a", 1).await;
    assert_eq!(place.noted("requests").len(), 1, "the warm-up was asked");
}

#[tokio::test]
async fn a_model_whose_process_is_given_up_fails_and_is_not_started_again_for_it() {
    let place = Place::new();
    let argv = ["python3", &program(), "--port", "{port}", "--model", "{model_name}"];
    let command = registry::Command {
        argv: argv.map(str::to_owned).to_vec(),
        env: [("NOTES".to_owned(), place.notes().display().to_string())].into(),
        health: "/v2/models/{model_name}/ready".to_owned(),
        ..registry::Command::default()
    };
    let replica = ReplicaId::new("each".parse().unwrap(), 0);
    let mut launch = Launch::new(replica, Kind::Process, command, place.0.path().to_owned());
    launch.shim = env!("CARGO_BIN_EXE_wharf").into();
    launch.patience = Patience { restarts: 0, rest: Duration::from_secs(3600), ..Patience::default() };
    let models = Models::new(launch, Arc::new(TcpNetwork), Arc::new(SystemClock::new()));
    models.load("a_1").await.unwrap();
    kill(place.pids()[0], "-9");
    let deadline = Instant::now() + SOON;
    while models.ready("a_1").await != Ok(false) {
        assert!(Instant::now() < deadline, "it is not given up");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..2 {
        let failure = models.load("a_1").await.unwrap_err();
        assert!(failure.message.contains("is left alone for 3"), "{failure:?}");
    }
    assert_eq!(place.pids().len(), 1, "it rests");
    models.unload("a_1").await.unwrap();
    models.load("a_1").await.unwrap();
    models.unload("a_1").await.unwrap();
}

#[tokio::test]
async fn a_model_whose_process_can_not_start_says_why() {
    let place = Place::new();
    let registry = "[[server]]\nname = \"each\"\nruntime = \"process\"\ncapabilities = [\"py\"]\nmemory = \"1Gi\"\n\
                    command = [\"/no/such/program\", \"{port}\"]\n";
    let wharf = Home::new(registry);
    let wharf = wharf.up().await;
    wharf.submit(&place.model("a", "")).await.unwrap();
    let told = |view: &ModelView| format!("{view:?}").contains("can't run /no/such/program");
    wharf.until("a", "told what is wrong", told).await;
}

#[tokio::test]
async fn a_process_for_each_model_answers_grpc_at_a_port_of_its_own() {
    let _turn = servers::TURN.lock().await;
    let home = Home::new(&format!(
        "[[server]]\nname = \"each\"\nruntime = \"process\"\ncapabilities = [\"sklearn\"]\nmemory = \"1Gi\"\n\
         command = [{:?}, \"start\", \"{{model_path}}\"]\n\
         health = \"/v2/models/{{model_name}}/ready\"\n\
         [server.env]\nMLSERVER_HTTP_PORT = \"{{port}}\"\nMLSERVER_GRPC_PORT = \"{{grpc_port}}\"\n\
         MLSERVER_METRICS_PORT = \"{{metrics_port}}\"\nMLSERVER_HOST = \"127.0.0.1\"\nMLSERVER_PARALLEL_WORKERS = \"0\"\n",
        servers::mlserver().display().to_string(),
    ));
    // Its settings name no model: MLServer then calls it as its folder is called.
    let artifact = home.path().join("artifact");
    std::fs::create_dir(&artifact).unwrap();
    std::fs::copy(servers::trained("sklearn-iris-1").join("iris.joblib"), artifact.join("model.joblib")).unwrap();
    let settings = r#"{"implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"uri": "./model.joblib"}}"#;
    std::fs::write(artifact.join("model-settings.json"), settings).unwrap();
    let wharf = home.up().await;
    for name in ["a", "b"] {
        wharf.submit(&Spec::at(name, &artifact, "sklearn", 1 << 20)).await.unwrap();
        wharf.until_within(LONG, name, "in memory", |view| resident(view) == 1).await;
    }
    for name in ["a", "b"] {
        answers(&wharf, name).await;
    }
    wharf.kill();
    until("nothing is left", || below(&home, "mlserver start").is_empty()).await;
}
