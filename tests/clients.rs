//! Programs that others wrote work with Wharf unchanged: grpcio with code from the same protos against the
//! scheduler, tritonclient against the gateway. Needs python3 with venv and pip; without them it fails.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops where it fails, waits in real time, and says what it saw"
)]

#[path = "clients/up.rs"]
mod up;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use up::{Up, models, said};

/// The Python of the foreign clients, and the folder of generated code.
fn python() -> &'static (PathBuf, PathBuf) {
    static MADE: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    MADE.get_or_init(|| {
        let setup = here().join("setup.sh");
        let output = Command::new(&setup).output().unwrap_or_else(|error| panic!("{}: {error}", setup.display()));
        assert!(output.status.success(), "the foreign clients can't be made: {}", said(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines().map(PathBuf::from);
        (lines.next().unwrap(), lines.next().unwrap())
    })
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

fn run(up: &mut Up, script: &str, addresses: &[&str]) {
    let (python, code) = python();
    let output = Command::new(python)
        .arg(here().join(script))
        .args(addresses)
        .arg(models())
        .env("PYTHONPATH", code)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        // Some environments send even loopback calls to a proxy.
        .env("no_proxy", "127.0.0.1,localhost")
        .env("GRPC_VERBOSITY", "ERROR")
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}: {}\n--- wharf ---\n{}", said(&output), up.tail());
    println!("{}", String::from_utf8_lossy(&output.stdout));
    up.assert_alive();
}

#[test]
fn grpcio_drives_the_scheduler() {
    let mut up = Up::start(&[]);
    let api = up.api.clone();
    run(&mut up, "scheduler.py", &[&api]);
}

#[test]
fn tritonclient_drives_the_gateway() {
    let mut up = Up::start(&[]);
    let (api, gateway) = (up.api.clone(), up.gateway.clone());
    run(&mut up, "gateway.py", &[&api, &gateway]);
}
