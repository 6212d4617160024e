//! The promise: the files under `config/` say exactly what the code does, and a mistake in a configuration is
//! told with its place and the fix, all mistakes at once, and changes nothing.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]

use std::{fs, path::Path, time::Duration};

use proptest::prelude::*;
use wharf::{
    domain::memory::Bytes,
    settings::{
        LogFormat, Problems, Settings, SettingsFile,
        registry::{Lifetime, Location, Registry, RegistryChange, RegistryErrors, RegistryWatch, Runtime},
    },
};

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn load(file: &str, environment: Pairs<'_>, overrides: Pairs<'_>) -> Result<Settings, Problems> {
    let owned = |pairs: Pairs<'_>| -> Vec<_> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let file = SettingsFile { name: "wharf.toml", text: file };
    Settings::load(Some(file), owned(environment), owned(overrides))
}

fn problems(file: &str, environment: Pairs<'_>, overrides: Pairs<'_>) -> Vec<String> {
    let problems = load(file, environment, overrides).expect_err("a mistake was let through");
    problems.0.iter().map(ToString::to_string).collect()
}

fn shipped(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)).unwrap()
}

// === settings ===

#[test]
fn the_shipped_file_states_every_setting_with_its_default() {
    if std::env::vars().any(|(name, _)| name == "UPDATE") {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/wharf.toml");
        std::fs::write(path, Settings::reference()).unwrap();
    }
    let shipped = shipped("wharf.toml");
    assert!(
        shipped == Settings::reference(),
        "config/wharf.toml is not what the code says; UPDATE=1 writes it anew. It should be:\n{}",
        Settings::reference()
    );
    assert_eq!(load(&shipped, &[], &[]), Ok(Settings::default()));
    // And so it is with every default written out.
    let written: String = shipped
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.split(' ').nth(1) == Some("=") => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert!(written.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).count() > 40);
    assert_eq!(load(&written, &[], &[]), Ok(Settings::default()));
}

#[test]
fn the_defaults_agree_with_each_other() {
    assert_eq!(Settings::load(None, [], []), Ok(Settings::default()));
}

#[test]
fn later_sources_win() {
    let file = "[scheduler]\nlease = \"10s\"\nheartbeat = \"2s\"\nevents = 500\n[log]\nformat = \"json\"";
    let settings = load(
        file,
        &[("WHARF_SCHEDULER__LEASE", "20s"), ("WHARF_SCHEDULER__EVENTS", "600"), ("HOME", "/x"), ("WHARF_HOST", "h")],
        &[("scheduler.lease", "30s"), ("metrics.per_model", "true")],
    )
    .unwrap();
    assert_eq!(settings.scheduler.lease, Duration::from_secs(30));
    assert_eq!(settings.scheduler.heartbeat, Duration::from_secs(2));
    assert_eq!(settings.scheduler.events, 600);
    assert_eq!(settings.log.format, LogFormat::Json);
    assert!(settings.metrics.per_model);
    assert_eq!(settings.gateway, Settings::default().gateway);
}

#[test]
fn the_library_that_other_programs_use_is_taken_where_no_setting_says_more() {
    let library = ("ORT_DYLIB_PATH", "/lib/ort.so");
    let taken = |file: &str, environment: Pairs<'_>| load(file, environment, &[]).unwrap().agent.onnx_runtime;
    assert_eq!(taken("", &[]), "auto");
    assert_eq!(taken("", &[library]), "/lib/ort.so");
    assert_eq!(taken("", &[("ORT_DYLIB_PATH", "")]), "auto");
    assert_eq!(taken("[agent]\nonnx_runtime = \"off\"", &[library]), "off");
    assert_eq!(taken("", &[library, ("WHARF_AGENT__ONNX_RUNTIME", "/other.so")]), "/other.so");
}

#[test]
fn a_size_may_be_a_number_of_bytes() {
    let settings = load("[gateway]\nbody_limit = 0x10_0000", &[], &[]).unwrap();
    assert_eq!(settings.gateway.body_limit, Bytes(1 << 20));
}

#[test]
fn a_secret_in_the_environment_is_no_setting() {
    assert_eq!(
        load("", &[("WHARF_SECRET_A__B", "token: x"), ("WHARF_SECRET_AGENT_HUB", "x")], &[]),
        Ok(Settings::default())
    );
}

#[test]
fn every_problem_is_told_at_once_with_its_place_and_the_fix() {
    let told = problems(
        "[scheduler]\nlease = 5\nheart_beat = \"1s\"\n\n[schedular]\nx = 1\n[gateway]\nlease = \"1s\"\nmax_in_flight = \"9\"\n[metrics]\nper_model = \"yes\"",
        &[("WHARF_AGENT__WAIT_DEADLINE", "soon"), ("WHARF_SCHEDULER_LEASE", "1s"), ("WHARF_AGENT__NONSENSE", "1")],
        &[("agent.artifact_cache", "1"), ("level", "debug")],
    );
    assert_eq!(
        told,
        [
            "wharf.toml:2: scheduler.lease: 5 came, wanted a duration such as \"5s\" or \"250ms\" from 100ms to 10m",
            "wharf.toml:3: scheduler.heart_beat: no such setting; did you mean scheduler.heartbeat?",
            "wharf.toml:6: schedular: no such section; did you mean scheduler?",
            "wharf.toml:8: gateway.lease: no such setting; did you mean scheduler.lease?",
            "wharf.toml:9: gateway.max_in_flight: \"9\" came, wanted a whole number from 1 to 1000000",
            "wharf.toml:11: metrics.per_model: \"yes\" came, wanted true or false",
            "environment variable WHARF_AGENT__NONSENSE: agent.nonsense: no such setting; [agent] has listen, http, \
             scheduler, server, replica, runtime, runtime_grpc, runtime_kind, runtime_workers, command, env, workdir, \
             ports, lifetime, health, start_deadline, stop_deadline, onnx_runtime, capabilities, memory, memory_guess, \
             overcommit_percent, eviction, least_residency, advertise, data_dir, artifact_cache, max_artifact, fetch_deadline, keep_downloads, parallel_downloads, \
             download_bandwidth, secrets_dir, hub, rclone, rclone_program, rclone_config, load_deadline, \
             waiting_requests, wait_deadline, drain_deadline",
            "environment variable WHARF_AGENT__WAIT_DEADLINE: agent.wait_deadline: \"soon\" came, wanted a duration \
             such as \"5s\" or \"250ms\" from 10ms to 1h",
            "environment variable WHARF_SCHEDULER_LEASE: scheduler.lease: it is set by WHARF_SCHEDULER__LEASE, with \
             two underscores",
            "command line, agent.artifact_cache: agent.artifact_cache: \"1\" came, wanted a size such as \"512Mi\" or \
             \"10Gi\" from 1Mi to 1Pi",
            "command line, level: level: no such section; there are scheduler, gateway, agent, log, metrics",
        ]
    );
}

#[test]
fn what_is_no_toml_is_told_with_its_line() {
    for (file, line) in [
        ("[scheduler]\nlease = ", 2),
        ("[scheduler\n", 1),
        ("\n\n[log]\nlevel = \"info\"\nlevel = \"debug\"", 5),
        ("lease = \"1s\"", 1),
        ("[[log]]\n", 1),
    ] {
        let told = problems(file, &[], &[]);
        assert!(told[0].starts_with(&format!("wharf.toml:{line}: ")), "{file:?}: {told:?}");
    }
}

#[test]
fn values_that_contradict_each_other_are_told_all_at_once() {
    let told = problems(
        "[scheduler]\nheartbeat = \"4s\"\nretry_first = \"1h\"\nlisten = \"127.0.0.1:9000\"\n[agent]\nmax_artifact = \"11Gi\"",
        &[],
        &[],
    );
    assert_eq!(told.len(), 4, "{told:#?}");
    for (problem, word) in told.iter().zip(["heartbeat", "retry_first", "max_artifact", "gateway.listen"]) {
        assert!(problem.contains(word), "{problem}");
    }
    // Port 0 takes a free one each time.
    let free = "[scheduler]\nlisten = \"127.0.0.1:0\"\nagents = \"127.0.0.1:0\"";
    assert!(load(free, &[], &[]).is_ok());
}

proptest! {
    #[test]
    fn no_file_makes_loading_panic(text in "(\\[?(scheduler|gateway|log|x)\\]?|[a-z_.]{1,9}|=|\"|\n|[0-9]|\\{|\\}){0,30}") {
        drop(load(&text, &[], &[]));
        drop(Registry::parse(&text, "servers.toml"));
    }

    #[test]
    fn a_mistyped_setting_never_passes(key in "[a-z_]{1,16}") {
        let known = shipped("wharf.toml").contains(&format!("# {key} = "));
        let file = format!("[scheduler]\n{key} = \"x\"");
        prop_assert!(load(&file, &[], &[]).is_err() || known);
    }
}

// === the registry ===

const GOOD: &str = r#"
[[server]]
name = "mlserver"
runtime = "mlserver"
capabilities = [" sklearn ", "xgboost"]
memory = "4Gi"
addresses = ["http://127.0.0.1:8080", { http = "http://[::1]:8080", grpc = "http://[::1]:8081" }]
[server.devices]
gpu0 = "16Gi"

[[server]]
name = "builtin"
runtime = "builtin"
memory = 1048576
"#;

fn registry_problems(text: &str) -> Vec<String> {
    let problems: RegistryErrors = Registry::parse(text, "servers.toml").expect_err("a mistake was let through");
    problems.0.iter().map(ToString::to_string).collect()
}

#[test]
fn the_shipped_registry_has_one_builtin_server() {
    let registry = Registry::parse(&shipped("servers.toml"), "servers.toml").unwrap();
    let [server] = &registry.servers[..] else { panic!("{registry:?}") };
    assert_eq!((server.name.as_str(), server.replicas, server.overcommit_percent), ("onnx", 2, 10));
    assert_eq!(server.capabilities, ["onnx"]);
    assert_eq!((server.runtime, &server.location), (Runtime::Builtin, &Location::Builtin));
    assert_eq!(server.capacity.primary, Bytes(1 << 30));
}

#[test]
fn the_examples_in_the_shipped_registry_are_valid() {
    let text: String = shipped("servers.toml")
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(example) if example.starts_with("[[") || example.split(' ').nth(1) == Some("=") => {
                format!("{example}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    assert_eq!(Registry::parse(&text, "servers.toml").unwrap().servers.len(), 2);
}

#[test]
fn a_registry_is_read_whole() {
    let registry = Registry::parse(GOOD, "servers.toml").unwrap();
    let [builtin, mlserver] = &registry.servers[..] else { panic!("{registry:?}") };
    assert_eq!((builtin.replicas, builtin.capacity.primary), (1, Bytes(1 << 20)));
    assert_eq!(builtin.capabilities, ["onnx"]);
    assert_eq!((mlserver.replicas, mlserver.overcommit_percent), (2, 10));
    assert_eq!(mlserver.capabilities, ["sklearn", "xgboost"]);
    assert_eq!(mlserver.capacity.on(Some("gpu0")), Bytes(16 << 30));
    let Location::Addresses(addresses) = &mlserver.location else { panic!("{mlserver:?}") };
    assert_eq!(addresses[1].grpc.as_deref(), Some("http://[::1]:8081"));
    assert_eq!(Registry::parse("", "servers.toml"), Ok(Registry::default()));
}

#[test]
fn every_problem_of_a_registry_is_told_with_its_line_and_the_fix() {
    let told = registry_problems(
        r#"[[server]]
name = "Bad_Name"
runtime = "mlservr"
memry = "1Gi"
memory = "0"

[[server]]
name = "twice"
runtime = "builtin"
memory = "1Gi"
addresses = ["http://a:1"]
overcommit_percent = -1

[[server]]
name = "twice"
runtime = "triton"
capabilities = ["a", " a", ""]
replicas = 3
memory = "1Gi"
addresses = ["http://a:1", "http://b:2"]

[[server]]
name = "empty"
runtime = "oip"
memory = "1 gig"
addresses = ["https://a:1", "http://a:1/v2", "http://a", 5]
env = { A = "b" }

[[server]]
name = "started"
runtime = "mlserver"
capabilities = ["a"]
memory = "1Gi"
command = ["mlserver", "start", "."]
[server.env]
OMP = 1
"#,
    );
    let expected = [
        (2, "only lower-case letters"),
        (3, "did you mean \"mlserver\"?"),
        (4, "did you mean memory?"),
        (5, "it is zero"),
        (11, "has no addresses"),
        (12, "-1 came, wanted a whole number from 0 to 1000"),
        (17, "\"a\" is there twice"),
        (17, "a capability is empty"),
        (18, "it is 3, and there are 2 addresses"),
        (22, "capabilities: it is missing"),
        (25, "\"1 gig\" came, wanted a size"),
        (26, "\"https://a:1\" came"),
        (26, "\"http://a:1/v2\" came"),
        (26, "\"http://a\" came"),
        (26, "5 came"),
        (27, "there is no command"),
        (36, "1 came, wanted text"),
    ];
    for (problem, (line, words)) in told.iter().zip(expected) {
        assert!(
            problem.starts_with(&format!("servers.toml:{line}: ")) && problem.contains(words),
            "{line} {words}: {told:#?}"
        );
    }
    assert_eq!(told.len(), expected.len(), "{told:#?}");
}

#[test]
fn a_name_is_taken_once() {
    let two = "[[server]]\nname = \"a\"\nruntime = \"builtin\"\nmemory = \"1Gi\"\n".repeat(2);
    let told = registry_problems(&two);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("servers.toml:5: ") && told[0].contains("line 1"), "{told:?}");
}

fn started(runtime: &str, more: &str) -> String {
    format!("[[server]]\nname = \"a\"\nruntime = {runtime:?}\ncapabilities = [\"x\"]\nmemory = \"1Gi\"\n{more}\n")
}

#[test]
fn a_port_is_taken_once() {
    let two = |first: u16, replicas: u32, second: u16| {
        let a = started("mlserver", &format!("ports = {first}\nreplicas = {replicas}"));
        a + &started("triton", &format!("ports = {second}")).replace("\"a\"", "\"b\"")
    };
    for (first, replicas, second) in [(8000, 2, 8005), (8005, 1, 8003), (8000, 1, 8000)] {
        let told = registry_problems(&two(first, replicas, second));
        assert_eq!(told.len(), 1, "{told:?}");
        let names = told[0].contains("server b: ports: ") && told[0].contains("those of server a");
        assert!(names && told[0].starts_with("servers.toml:8: "), "{told:?}");
    }
    for (first, replicas, second) in [(8000, 2, 8006), (8003, 1, 8000), (8000, 0, 8000)] {
        Registry::parse(&two(first, replicas, second), "servers.toml").unwrap();
    }
}

#[test]
fn a_server_is_started_as_the_registry_says_or_as_its_kind_is() {
    let command = |runtime: &str, more: &str| {
        let registry = Registry::parse(&started(runtime, more), "servers.toml").unwrap();
        let Location::Command(command) = registry.servers[0].location.clone() else { panic!("{registry:?}") };
        command
    };
    let usual = command("mlserver", "parallel_workers = 2");
    assert_eq!(usual.argv, ["mlserver", "start", "{repository}"]);
    assert_eq!(usual.env["MLSERVER_PARALLEL_WORKERS"], "2");
    assert_eq!((usual.lifetime, usual.ports, usual.health.as_str()), (Lifetime::Agent, None, "/v2/health/ready"));
    let own = command(
        "mlserver",
        "command = [\"/opt/mlserver\", \"start\", \"{repository}\"]\nworkdir = \"/opt\"\nports = 8080\n\
         lifetime = \"independent\"\nenv = { MLSERVER_HOST = \"::1\", NAME = \"{replica}\" }",
    );
    assert_eq!(own.argv[0], "/opt/mlserver");
    assert_eq!((own.lifetime, own.ports), (Lifetime::Independent, Some(8080)));
    let env = |name: &str| own.env[name].as_str();
    assert_eq!([env("MLSERVER_HOST"), env("MLSERVER_GRPC_PORT"), env("NAME")], ["::1", "{grpc_port}", "{replica}"]);
    let each = command("process", "command = [\"serve\", \"{port}\"]\nhealth = \"/v2/models/{model_name}/ready\"");
    assert_eq!(each.health, "/v2/models/{model_name}/ready");
}

#[test]
fn a_command_that_can_not_be_obeyed_is_told_with_its_line() {
    for (runtime, more, line, words) in [
        ("oip", "", 1, "or the command that starts one"),
        ("oip", "command = []", 6, "it names no program"),
        ("oip", "command = [\"a\", \"{http_prot}\"]", 6, "did you mean {http_port}?"),
        ("oip", "command = [\"a\", \"{model_name}\"]", 6, "nothing fills {model_name}"),
        ("oip", "command = [\"a\"]\nenv = { A = \"{nothing}\" }", 7, "nothing fills {nothing}"),
        ("oip", "command = [\"a\"]\nports = 65001", 7, "wanted a whole number from 1 to 65000"),
        ("oip", "command = [\"a\"]\nlifetime = \"ever\"", 7, "\"agent\" (it ends with the agent)"),
        ("oip", "command = [\"a\"]\nhealth = \"ready\"", 7, "wanted the path"),
        ("oip", "addresses = [\"http://a:1\"]\nports = 7", 7, "there is no command"),
        ("oip", "addresses = [\"http://a:1\"]\ncommand = [\"a\"]", 7, "there are addresses too"),
        ("process", "command = [\"a\"]\nports = 7", 7, "a free port of its own"),
        ("process", "command = [\"a\"]\nlifetime = \"independent\"", 7, "ends with the agent"),
        ("process", "addresses = [\"http://a:1\"]", 6, "each model is a process of its own"),
        ("builtin", "command = [\"a\"]", 6, "has no command"),
    ] {
        let told = registry_problems(&started(runtime, more));
        let place = format!("servers.toml:{line}: ");
        assert!(told.len() == 1 && told[0].starts_with(&place) && told[0].contains(words), "{more}: {told:?}");
    }
}

#[test]
fn an_agent_of_its_own_starts_a_server_as_its_settings_say() {
    let load = |settings: &[(&str, &str)]| {
        let set = settings.iter().map(|(name, value)| (format!("agent.{name}"), (*value).to_owned()));
        Settings::load(None, [], set.chain([("agent.runtime".to_owned(), "start".to_owned())]))
    };
    let usual = load(&[("runtime_kind", "mlserver"), ("ports", "8080")]).unwrap().agent.started().unwrap();
    assert_eq!((usual.argv[0].as_str(), usual.ports), ("mlserver", Some(8080)));
    let own = load(&[("command", "serve --port {http_port}"), ("env", "A=1 B={replica}"), ("lifetime", "independent")]);
    let own = own.unwrap().agent.started().unwrap();
    assert_eq!((own.argv.len(), own.env["B"].as_str(), own.lifetime), (3, "{replica}", Lifetime::Independent));
    for (settings, words) in [
        (&[][..], "agent.command: it is empty"),
        (&[("command", "serve {prot}")], "agent.command: nothing fills {prot}"),
        (&[("command", "serve"), ("env", "A")], "agent.env: \"A\" came"),
        (&[("command", "serve"), ("runtime_kind", "process"), ("ports", "1")], "agent.ports: a process for one model"),
    ] {
        let problems = load(settings).expect_err(words).to_string();
        assert!(problems.contains(words), "{words}: {problems}");
    }
}

fn with(edit: impl Fn(&mut Registry)) -> Registry {
    let mut registry = Registry::parse(GOOD, "servers.toml").unwrap();
    edit(&mut registry);
    registry
}

#[test]
fn a_difference_between_registries_is_data() {
    let old = with(|_| ());
    assert_eq!(Registry::diff(&old, &old), []);
    let resized = with(|registry| {
        registry.servers[0].replicas = 3;
        registry.servers[1].replicas = 1;
        if let Location::Addresses(addresses) = &mut registry.servers[1].location {
            addresses.pop();
        }
    });
    let changes = Registry::diff(&old, &resized);
    assert!(
        matches!(&changes[..], [
            RegistryChange::Resized { from: 1, server: one },
            RegistryChange::Resized { from: 2, server: two },
        ] if one.replicas == 3 && two.replicas == 1),
        "{changes:?}"
    );
    // The one that stays is another now: that is no mere resize.
    let moved = with(|registry| {
        registry.servers[1].replicas = 1;
        if let Location::Addresses(addresses) = &mut registry.servers[1].location {
            addresses.remove(0);
        }
    });
    let changes = Registry::diff(&old, &moved);
    assert!(matches!(&changes[..], [RegistryChange::Changed { .. }]), "{changes:?}");
    let other = with(|registry| {
        registry.servers.remove(1);
        registry.servers[0].capacity.primary = Bytes(5);
        let mut new = registry.servers[0].clone();
        new.name = "zz".parse().unwrap();
        registry.servers.push(new);
    });
    let changes = Registry::diff(&old, &other);
    assert!(
        matches!(&changes[..], [
            RegistryChange::Changed { .. },
            RegistryChange::Removed(removed),
            RegistryChange::Added(added),
        ] if removed.as_str() == "mlserver" && added.name.as_str() == "zz"),
        "{changes:?}"
    );
}

// === following the registry ===

const INTERVAL: Duration = Duration::from_secs(2);

#[tokio::test(start_paused = true)]
async fn an_edit_is_followed_once_and_a_bad_one_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("servers.toml");
    fs::write(&path, GOOD).unwrap();
    let (mut watch, first) = RegistryWatch::start(&path, INTERVAL);
    let good = first.unwrap();
    // A comment is no change; the next answer is about the next edit.
    fs::write(&path, format!("# a comment\n{GOOD}")).unwrap();
    assert!(tokio::time::timeout(INTERVAL * 20, watch.next()).await.is_err(), "nothing changed");
    fs::write(&path, "[[server]]\nname = 5").unwrap();
    let problems = watch.next().await.expect_err("a bad edit");
    assert!(problems.to_string().contains("servers.toml:2: "), "{problems}");
    assert!(tokio::time::timeout(INTERVAL * 20, watch.next()).await.is_err(), "a bad edit is told once");
    // Taking it back is told too, so that whoever shows the problem can stop showing it.
    fs::write(&path, GOOD).unwrap();
    assert_eq!(watch.next().await, Ok(good.clone()));
    fs::remove_file(&path).unwrap();
    assert!(watch.next().await.expect_err("gone").to_string().contains("can't be read"));
    let more = format!("{GOOD}replicas = 7\n");
    fs::write(&path, &more).unwrap();
    assert_eq!(watch.next().await.unwrap().servers[0].replicas, 7);
    assert_eq!(good, Registry::parse(GOOD, "x").unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_edit_caught_half_way_is_waited_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("servers.toml");
    fs::write(&path, GOOD).unwrap();
    let (mut watch, first) = RegistryWatch::start(&path, INTERVAL);
    first.unwrap();
    let more = format!("{GOOD}replicas = 7\n");
    // An editor empties the file and then writes it. An empty registry would be valid, and drop every server.
    let (answer, ()) = tokio::join!(watch.next(), async {
        fs::write(&path, "").unwrap();
        tokio::time::sleep(INTERVAL + INTERVAL / 2).await;
        fs::write(&path, &more).unwrap();
    });
    assert_eq!(answer.unwrap().servers.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_was_bad_at_the_start_is_followed_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("servers.toml");
    let (mut watch, first) = RegistryWatch::start(&path, INTERVAL);
    assert!(first.is_err());
    fs::write(&path, GOOD).unwrap();
    assert_eq!(watch.next().await.unwrap().servers.len(), 2);
}

#[test]
fn only_an_mlserver_has_parallel_workers() {
    let text = |runtime: &str, workers: &str| {
        format!(
            "[[server]]\nname = \"s\"\nruntime = {runtime:?}\ncapabilities = [\"a\"]\nmemory = \"1Gi\"\n\
             addresses = [\"http://a:1\"]\nparallel_workers = {workers}\n"
        )
    };
    let workers = |workers| Registry::parse(&text("mlserver", workers), "f").unwrap().servers[0].workers;
    assert_eq!((workers("0"), workers("4")), (0, 4));
    let problems = registry_problems(&text("triton", "4"));
    assert!(problems.len() == 1 && problems[0].starts_with("servers.toml:7: "), "{problems:?}");
    assert!(registry_problems(&text("mlserver", "-1"))[0].contains("from 0 to 1000"));
}

#[test]
fn a_server_that_is_spoken_to_otherwise_is_another_place() {
    let place = |runtime: &str, more: &str| {
        let text = format!(
            "[[server]]\nname = \"s\"\nruntime = {runtime:?}\ncapabilities = [\"a\"]\nmemory = \"1Gi\"\n{more}\n"
        );
        Registry::parse(&text, "f").unwrap().servers[0].place(0)
    };
    let at = r#"addresses = ["http://a:1"]"#;
    let before = place("mlserver", at);
    assert_eq!(before, place("mlserver", &format!("{at}\novercommit_percent = 5")));
    for (runtime, more) in [
        ("triton", at.to_owned()),
        ("mlserver", format!("{at}\nparallel_workers = 2")),
        ("mlserver", r#"addresses = [{ http = "http://a:1", grpc = "http://a:2" }]"#.to_owned()),
    ] {
        assert_ne!(before, place(runtime, &more), "{runtime} {more}");
    }
}
