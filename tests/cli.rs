//! What a person and a script see of the command line, against a scheduler and a gateway with canned
//! answers. `UPDATE=1` writes the golden files anew.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on has failed"
)]

mod fake;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use fake::{Fake, available, downloading, serve, serve_rest, version, view};
use wharf::{
    cli::{Environment, Guests, Output, RoleArgs, Roles, Streams, run},
    domain::time::Instant,
    ports::Clock,
};

#[derive(Debug)]
struct Noon;

impl Clock for Noon {
    fn now(&self) -> Instant {
        Instant::from_micros(1_000_000_000_000_000)
    }
}

#[derive(Clone, Debug, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// Remembers which role was started, and how.
#[derive(Debug, Default)]
struct Started(Mutex<Vec<(&'static str, RoleArgs)>>);

impl Started {
    fn note(&self, role: &'static str, args: &RoleArgs) -> anyhow::Result<()> {
        self.0.lock().unwrap().push((role, args.clone()));
        Ok(())
    }
}

impl Roles for Started {
    async fn up(&self, args: &RoleArgs, output: &Output) -> anyhow::Result<()> {
        output.note("up");
        self.note("up", args)
    }
    async fn scheduler(&self, args: &RoleArgs, _: &Output) -> anyhow::Result<()> {
        self.note("scheduler", args)
    }
    async fn agent(&self, args: &RoleArgs, _: &Output) -> anyhow::Result<()> {
        self.note("agent", args)
    }
    async fn gateway(&self, _: &RoleArgs, _: &Output) -> anyhow::Result<()> {
        Err(anyhow::anyhow!("address in use").context("can't listen on 127.0.0.1:9000"))
    }
    async fn demo(&self, models: &Path, _: Option<Guests>, _: &Output) -> anyhow::Result<()> {
        self.note("demo", &RoleArgs { config: Some(models.to_owned()), ..RoleArgs::default() })
    }
}

/// One run of the command line, and what came of it.
struct Cli {
    terminal: bool,
    variables: Vec<(&'static str, String)>,
    stdin: String,
    roles: Started,
}

struct Outcome {
    out: String,
    err: String,
    code: ExitCode,
}

impl Cli {
    fn at(address: &str) -> Self {
        let variables = vec![("WHARF_SCHEDULER_HOST", address.to_owned()), ("SELDON_INFER_HOST", address.to_owned())];
        Self { terminal: false, variables, stdin: String::new(), roles: Started::default() }
    }

    fn terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    fn stdin(mut self, text: &str) -> Self {
        text.clone_into(&mut self.stdin);
        self
    }

    async fn run(&self, line: &str) -> Outcome {
        self.run_args(&line.split(' ').collect::<Vec<_>>()).await
    }

    async fn run_args(&self, args: &[&str]) -> Outcome {
        let (out, err) = (Buffer::default(), Buffer::default());
        let variables = self.variables.clone();
        let environment = Environment {
            variable: Box::new(move |name| variables.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v.clone())),
            stdin: Box::new(io::Cursor::new(self.stdin.clone().into_bytes())),
            stdin_is_terminal: self.stdin.is_empty(),
            streams: Streams {
                out: Box::new(out.clone()),
                err: Box::new(err.clone()),
                out_is_terminal: self.terminal,
                err_is_terminal: self.terminal,
                size: self.terminal.then_some((100, 30)),
            },
            clock: Arc::new(Noon),
        };
        let args = std::iter::once("wharf").chain(args.iter().copied()).map(OsString::from);
        let running = run(args, environment, &self.roles);
        let code = tokio::time::timeout(Duration::from_secs(30), running).await.expect("the command ends");
        // Ports change from run to run.
        let address = self.variables[0].1.clone();
        let steady = |text: String| text.replace(&address, "HOST:PORT");
        Outcome { out: steady(out.text()), err: steady(err.text()), code }
    }
}

fn code(code: u8) -> ExitCode {
    ExitCode::from(code)
}

/// Compares with `tests/golden/NAME.txt`, or writes it when UPDATE is set.
#[expect(clippy::disallowed_methods, reason = "the switch that writes golden files")]
fn golden(name: &str, seen: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    if std::env::var("UPDATE").is_ok() {
        std::fs::write(&path, seen).unwrap();
        return;
    }
    let wanted = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; run with UPDATE=1 to write it", path.display()));
    assert!(wanted == seen, "{name} differs\n--- wanted\n{wanted}\n--- seen\n{seen}");
}

/// All that came of a run, as one text.
fn all(outcome: &Outcome) -> String {
    format!("--- stdout\n{}--- stderr\n{}--- {:?}\n", outcome.out, outcome.err, outcome.code)
}

#[tokio::test]
async fn tables_are_the_same_for_pipes_and_fitted_to_terminals() {
    let (address, _server) = serve(&Fake::default()).await;
    for (name, line) in [
        ("model-list", "model list"),
        ("model-list-terminated", "model list --terminated"),
        ("model-status", "model status iris -o table"),
        ("model-status-unplaced", "model status huge -o table"),
        ("server-list", "server list"),
        ("server-status", "server status mlserver -o table"),
        ("events", "events"),
        ("events-none", "events quiet"),
        ("explain", "explain iris"),
        ("inspect", "inspect"),
    ] {
        let piped = Cli::at(&address).run(line).await;
        assert_eq!(piped.code, ExitCode::SUCCESS, "{line}: {}", piped.err);
        assert!(!piped.out.contains('\u{1b}'), "{line}");
        golden(name, &all(&piped));
        let seen = Cli::at(&address).terminal().variable("NO_COLOR", "1").run(line).await;
        assert!(!seen.out.contains('\u{1b}'), "{line}");
        assert!(seen.out.lines().all(|line| line.chars().count() <= 100), "{}", seen.out);
        golden(&format!("{name}-terminal"), &all(&seen));
    }
}

#[tokio::test]
async fn colour_is_asked_for_or_seen_by_a_person() {
    let (address, _server) = serve(&Fake::default()).await;
    let coloured = |outcome: &Outcome| outcome.out.contains("\u{1b}[32m");
    assert!(coloured(&Cli::at(&address).terminal().run("model list").await));
    assert!(coloured(&Cli::at(&address).run("model list --color always").await));
    assert!(coloured(&Cli::at(&address).variable("NO_COLOR", "1").run("model list --color always").await));
    assert!(!coloured(&Cli::at(&address).run("model list").await));
    assert!(!coloured(&Cli::at(&address).terminal().run("model list --color never").await));
    assert!(!coloured(&Cli::at(&address).terminal().variable("NO_COLOR", "1").run("model list").await));
    assert!(!coloured(&Cli::at(&address).terminal().variable("TERM", "dumb").run("model list").await));
    // What comes from elsewhere never reaches a terminal as a command, coloured or not.
    let evil = Cli::at(&address).terminal().run("model list").await;
    assert!(evil.out.contains("cleared your") && !evil.out.contains("\u{1b}[2J"));
}

#[tokio::test]
async fn scripts_get_seldons_json() {
    let (address, _server) = serve(&Fake::default()).await;
    for (name, line) in [
        ("model-status-json", "model status iris"),
        ("model-status-yaml", "model status iris -o yaml"),
        ("server-status-json", "server status mlserver"),
        ("model-list-json", "model list -o json"),
        ("model-list-yaml", "model list -o yaml"),
        ("server-list-json", "server list -o json"),
        ("events-json", "events -o json"),
        ("explain-json", "explain iris -o json"),
    ] {
        let outcome = Cli::at(&address).run(line).await;
        assert_eq!(outcome.code, ExitCode::SUCCESS, "{line}: {}", outcome.err);
        golden(name, &all(&outcome));
    }
    let yaml = Cli::at(&address).run("model status iris -o yaml").await.out;
    assert_eq!(wharf::manifest::parse("out", &yaml).unwrap().len(), 1);
}

#[tokio::test]
async fn every_error_is_one_sentence_with_the_next_step() {
    let (address, _server) = serve(&Fake::default()).await;
    let (rest, _rest) = serve_rest().await;
    let nowhere = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let mut text = String::new();
    for (at, line, wanted) in [
        (&nowhere, "model list", 3),
        (&nowhere, "model infer iris {}", 3),
        (&nowhere, "model infer iris {} --inference-mode grpc", 3),
        (&nowhere, "model list --scheduler-host nowhere", 2),
        (&address, "model status nothing", 1),
        (&address, "model status nothing -o table", 1),
        (&address, "model status nothing -o yaml", 1),
        (&address, "server status nothing -o table", 1),
        (&address, "server list -o yaml", 2),
        (&address, "model unload unknown", 1),
        (&address, "model load -f /no/such/file", 1),
        (&address, "model load", 2),
        (&rest, "model infer unknown {}", 1),
        (&rest, "model infer busy {}", 1),
        (&rest, "model infer Iris {}", 2),
        (&rest, "model infer iris", 2),
        (&address, "model infer unknown {\"inputs\":[]} --inference-mode grpc", 1),
        (&address, "model infer iris [] --inference-mode grpc", 2),
        (&address, "model lsit", 2),
        (&address, "model status iris -w Happy", 2),
        (&address, "model infer iris {} --header x", 2),
    ] {
        let outcome = Cli::at(at).run(line).await;
        assert_eq!(outcome.code, code(wanted), "{line}: {}", outcome.err);
        assert_eq!(outcome.out, "", "{line}");
        text.push_str(&format!("$ wharf {line}\n{}\n", outcome.err));
    }
    golden("errors", &text);
}

#[tokio::test]
async fn help_is_data() {
    let mut text = String::new();
    for line in [
        "--help",
        "model --help",
        "model load --help",
        "model status --help",
        "model infer --help",
        "server --help",
        "server drain --help",
        "server probe --help",
        "store --help",
        "store adopt --help",
        "up --help",
    ] {
        let outcome = Cli::at("nowhere.invalid:1").run(line).await;
        assert_eq!((outcome.code, outcome.err.as_str()), (ExitCode::SUCCESS, ""), "{line}");
        text.push_str(&format!("$ wharf {line}\n{}\n", outcome.out));
    }
    golden("help", &text);
    let script = Cli::at("nowhere.invalid:1").run("completions bash").await;
    assert!(script.out.contains("_wharf()") && script.err.is_empty());
}

const MODELS: &str = "
apiVersion: mlops.seldon.io/v1alpha1
kind: Server
metadata: {name: mlserver}
spec: {serverConfig: mlserver, replicas: 2}
---
apiVersion: mlops.seldon.io/v1alpha1
kind: Model
metadata: {name: iris}
spec: {storageUri: /m/iris}
---
apiVersion: mlops.seldon.io/v1alpha1
kind: Model
metadata: {name: wine}
spec: {storageUri: /m/wine, dedicated: true}
---
apiVersion: mlops.seldon.io/v1alpha1
kind: Model
metadata: {name: same}
spec: {storageUri: /m/same}
";

#[tokio::test]
async fn load_says_what_became_of_each_model() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let outcome = Cli::at(&address).stdin(MODELS).run("load --force").await;
    golden("load", &all(&outcome));
    assert_eq!(fake.0.lock().unwrap().calls[0], "notify mlserver 2", "servers come first");
    assert_eq!(fake.0.lock().unwrap().calls.len(), 4);
    golden("load-json", &all(&Cli::at(&address).stdin(MODELS).run("model load -f - -o json").await));
    golden("load-terminal", &all(&Cli::at(&address).terminal().stdin(MODELS).run("load").await));
}

#[tokio::test]
async fn one_refused_model_does_not_stop_the_others() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let manifests = MODELS.replace("name: iris", "name: refused");
    let outcome = Cli::at(&address).stdin(&manifests).run("load -f -").await;
    golden("load-refused", &all(&outcome));
    let mut calls = fake.0.lock().unwrap().calls.clone();
    calls.sort();
    assert_eq!(calls, ["notify mlserver 2", "submit refused", "submit same", "submit wine"]);
}

#[tokio::test]
async fn nothing_is_sent_when_one_manifest_is_wrong() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let outcome = Cli::at(&address).stdin(&MODELS.replace("/m/same}", "/m/same, replica: 3}")).run("load").await;
    assert_eq!(outcome.code, code(1));
    assert!(outcome.err.contains("standard input:20: document 4: spec.replica: no such field; did you mean replicas?"));
    assert!(fake.0.lock().unwrap().calls.is_empty());
}

fn rollout() -> Vec<wharf::rpc::proto::wharf::ModelView> {
    let old = || version(1, "Available", vec![available(1)]);
    let step = |state: &str, copies| view("iris", "Available", Some(1), vec![old(), version(2, state, copies)]);
    let done = view("iris", "Available", Some(2), vec![version(2, "Available", vec![available(2)])]);
    vec![
        view("iris", "Available", Some(1), vec![old()]),
        step("Progressing", vec![downloading(10 << 20, Some(100 << 20))]),
        step("Progressing", vec![downloading(50 << 20, Some(100 << 20))]),
        step("Available", vec![available(2)]),
        done,
    ]
}

const IRIS: &str = "
apiVersion: mlops.seldon.io/v1alpha1
kind: Model
metadata: {name: iris}
spec: {storageUri: /m/iris}
";

#[tokio::test]
async fn waiting_follows_the_rollout_to_its_end() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    fake.0.lock().unwrap().watched = rollout();
    let piped = Cli::at(&address).stdin(IRIS).run("model load -w ModelAvailable").await;
    assert_eq!((piped.code, piped.out.as_str()), (ExitCode::SUCCESS, "{}\n"), "{}", piped.err);
    golden("wait", &all(&piped));
    let seen = Cli::at(&address).terminal().variable("NO_COLOR", "1").stdin(IRIS).run("model load -w").await;
    golden("wait-terminal", &all(&seen).replace('\u{1b}', "ESC"));
    let status = Cli::at(&address).run("model status iris -w ModelAvailable").await;
    assert_eq!((status.code, status.out.as_str()), (ExitCode::SUCCESS, "{}\n"), "{}", status.err);
}

#[tokio::test]
async fn waiting_ends_at_once_when_it_can_not_come_any_more() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let mut failed = version(2, "Failed", vec![]);
    failed.reason = "artifact failure: gs://bucket/iris: no such object".into();
    let old = version(1, "Available", vec![available(1)]);
    fake.0.lock().unwrap().watched = vec![view("iris", "Available", Some(1), vec![old, failed])];
    let outcome = Cli::at(&address).stdin(IRIS).run("model load -w").await;
    golden("wait-failed", &all(&outcome));
    assert_eq!(outcome.code, code(1));
}

#[tokio::test]
async fn waiting_too_long_says_where_it_stands() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let mut nowhere = view("iris", "ScheduleFailed", None, vec![version(2, "ScheduleFailed", vec![])]);
    nowhere.reason = "no replica has 64 GiB free".into();
    fake.0.lock().unwrap().watched = vec![nowhere];
    let outcome = Cli::at(&address).stdin(IRIS).run("model load -w -t 1").await;
    golden("wait-timeout", &all(&outcome));
    assert_eq!(outcome.code, code(4));
}

#[tokio::test]
async fn commands_that_change_things_send_what_they_say() {
    let fake = Fake::default();
    let (address, _server) = serve(&fake).await;
    let mut text = String::new();
    for line in [
        "model unload iris wine",
        "model rollback iris",
        "model rollback iris --to 1",
        "model scale iris 4",
        "server cordon mlserver --replica 1",
        "server uncordon mlserver",
        "server drain mlserver",
        "server drain mlserver --replica 1",
    ] {
        text.push_str(&format!("$ wharf {line}\n{}\n", all(&Cli::at(&address).run(line).await)));
    }
    golden("changes", &text);
    assert_eq!(
        fake.0.lock().unwrap().calls,
        [
            "unload iris",
            "unload wine",
            "rollback iris None",
            "rollback iris Some(1)",
            "scale iris 4",
            "cordon mlserver Some(1) false",
            "cordon mlserver None true",
            "drain mlserver None",
            "drain mlserver Some(1)",
        ]
    );
}

#[tokio::test]
async fn inference_by_rest_shows_the_answer_or_counts_them() {
    let (address, _server) = serve_rest().await;
    let cli = Cli::at(&address);
    golden("infer", &all(&cli.run_args(&["model", "infer", "iris", r#"[1, 2.50]"#]).await));
    let both = cli.run("model infer iris [1] -i 10").await;
    assert_eq!(both.out, "Success: map[:iris_1::5 :iris_2::5]\n", "{}", both.err);
    let sticky = cli.run("model infer iris [1] -i 10 -s").await;
    assert_eq!(sticky.out.matches("iris").count(), 1, "{}", sticky.out);
    let failing = cli.run("model infer busy [1] -i 3").await;
    golden("infer-counts-errors", &all(&failing));
    assert_eq!(failing.code, code(1));
    let timed = cli.run("model infer iris [1] -t 1").await;
    assert!(timed.code == ExitCode::SUCCESS && timed.out.starts_with("Success: map[:iris_1::"), "{}", timed.out);
    let headers = cli.run("model infer iris [1] --show-headers --header X-Team=a -r -o false").await;
    assert!(headers.err.contains("> x-team: a") && headers.err.contains("< x-seldon-route: :iris_"), "{}", headers.err);
    assert_eq!(headers.out, "");
    let piped = Cli::at(&address).stdin("[3]").run("model infer iris").await;
    assert!(piped.out.contains('3'), "{}", piped.out);
    golden("metadata", &all(&cli.run("model metadata iris").await));
}

#[tokio::test]
async fn inference_by_grpc_takes_both_forms_of_json() {
    let (address, _server) = serve(&Fake::default()).await;
    let cli = Cli::at(&address);
    for data in [
        r#"{"model_name":"iris","inputs":[{"name":"predict","contents":{"fp32_contents":[1,2]},"datatype":"FP32","shape":[1,2]}]}"#,
        r#"{"inputs":[{"name":"predict","data":[[1,2]],"datatype":"FP32","shape":[1,2]}]}"#,
    ] {
        let outcome = cli.run_args(&["model", "infer", "iris", data, "--inference-mode", "grpc"]).await;
        golden("infer-grpc", &all(&outcome));
        let many = cli.run_args(&["model", "infer", "iris", data, "--inference-mode", "grpc", "-i", "5"]).await;
        assert_eq!(many.out, "Success: map[:iris_1::5]\n", "{}", many.err);
    }
}

#[tokio::test]
async fn roles_are_started_with_what_was_asked_for() {
    let cli = Cli::at("nowhere.invalid:1").variable("WHARF_CONFIG", "from-env.toml");
    assert_eq!(cli.run("up").await.code, ExitCode::SUCCESS);
    assert_eq!(cli.run("scheduler -c wharf.toml --set a.b=1 --set c=d=e -vv").await.code, ExitCode::SUCCESS);
    let failed = cli.run("gateway").await;
    assert_eq!(failed.err, "error: can't listen on 127.0.0.1:9000: address in use\n");
    assert_eq!(failed.code, code(1));
    let started = cli.roles.0.lock().unwrap();
    assert_eq!(started[0], ("up", RoleArgs { config: Some("from-env.toml".into()), ..RoleArgs::default() }));
    let set = vec![("a.b".to_owned(), "1".to_owned()), ("c".to_owned(), "d=e".to_owned())];
    assert_eq!(
        started[1],
        ("scheduler", RoleArgs { config: Some("wharf.toml".into()), set, verbose: 2, parent: None })
    );
}

#[tokio::test]
async fn a_watch_is_drawn_over_itself_on_a_terminal_and_is_lines_elsewhere() {
    let (address, _server) = serve(&Fake::default()).await;
    let lines = Cli::at(&address).run("server list --watch").await;
    assert_eq!(lines.out.lines().count(), 1, "{}", lines.out);
    assert!(serde_json::from_str::<serde_json::Value>(&lines.out).is_ok());
    let drawn = Cli::at(&address).terminal().variable("NO_COLOR", "1").run("server list --watch").await;
    assert!(drawn.out.ends_with('\n') && drawn.out.contains("mlserver"), "{}", drawn.out);
}
