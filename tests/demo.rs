//! The promise: `wharf demo` plays the life of a model, ends with a table in which everything is ok, and leaves
//! no process and no file behind, however it ends.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on has failed"
)]
#![expect(clippy::disallowed_methods, reason = "a test against a real process has the real clock")]

mod servers;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// The longest that one run may take.
const RUN: Duration = Duration::from_secs(180);
/// The longest that one with heavy servers may take.
const HEAVY: Duration = Duration::from_secs(900);
/// The longest that anything may take to be gone.
const GONE: Duration = Duration::from_secs(20);

const PROMISES: [&str; 11] = [
    "everything in one process",
    "a loaded model answers",
    "REST answers as ONNX Runtime",
    "gRPC answers as ONNX Runtime",
    "more models than memory holds",
    "evicted models come back",
    "rollout without a failure",
    "drain without a failure",
    "kill -9 loses nothing",
    "after kill -9 it answers again",
    "unload leaves nothing behind",
];

/// A demo whose files are all in `folder`.
fn demo(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.arg("demo").args(args).env("TMPDIR", folder).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn until(what: &str, patience: Duration, mut met: impl FnMut() -> bool) {
    let began = Instant::now();
    while !met() {
        assert!(began.elapsed() < patience, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn finish(child: Child) -> Output {
    finish_within(RUN, child)
}

fn finish_within(patience: Duration, mut child: Child) -> Output {
    // What it writes is far less than a pipe holds.
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > patience {
            child.kill().unwrap();
            panic!("the demo had no end in {patience:?}: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// Processes whose command line names `folder`.
fn processes(folder: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&*folder.to_string_lossy()) {
            found.push(id);
        }
    }
    found
}

/// Every descriptor of this process's file system folder: none may be left.
fn left(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn everything_that_the_demo_promises_comes_true_and_nothing_is_left() {
    let folder = TempDir::new().unwrap();
    let output = finish(demo(folder.path(), &[]).spawn().unwrap());
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert_eq!(err, "", "what is told goes to standard output, and there is no log to show");
    assert!(!out.contains('\u{1b}'), "no colour where nobody sees it");
    let table: Vec<&str> = out.lines().skip_while(|line| !line.starts_with("promised")).skip(1).collect();
    for (promise, line) in PROMISES.iter().zip(&table) {
        assert!(line.starts_with(promise) && line.ends_with("  ok"), "{promise}: {line}");
        assert!(line.len() <= 80, "{} columns: {line}", line.len());
    }
    assert_eq!(table.get(PROMISES.len()), Some(&""), "the table ends with the last promise");
    // The numbers are those of this run.
    let seen = |promise: &str| table.iter().find(|line| line.starts_with(promise)).unwrap();
    assert!(seen("more models").contains("8 in memory, 4 on disk"), "{out}");
    for promise in ["rollout", "drain"] {
        let words: Vec<&str> = seen(promise).split_whitespace().collect();
        let at = words.iter().position(|word| *word == "of").unwrap();
        assert_eq!(words[at - 1], "0", "{out}");
        assert!(words[at + 1].parse::<u32>().unwrap() >= 400, "{out}");
    }
    assert_eq!(processes(folder.path()), Vec::<u32>::new());
    assert_eq!(left(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn with_two_mlservers_and_rclone_the_same_comes_true_and_nothing_is_left() {
    // What `make demo-mlserver` installs.
    let installed = servers::install("setup.sh", &["mlserver", "rclone"]);
    let folder = TempDir::new().unwrap();
    let mlserver = installed["mlserver"].with_file_name("mlserver");
    let args = [("--mlserver", &mlserver), ("--rclone", &installed["rclone"]), ("--models", &installed["models"])];
    let args: Vec<&str> = args.into_iter().flat_map(|(name, path)| [name, path.to_str().unwrap()]).collect();
    let output = finish_within(HEAVY, demo(folder.path(), &args).spawn().unwrap());
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    let table: Vec<&str> = out.lines().skip_while(|line| !line.starts_with("promised")).skip(1).collect();
    let promises = [
        ["Wharf and what it starts", PROMISES[1], "REST answers as scikit-learn", "gRPC answers as scikit-learn"]
            .as_slice(),
        &PROMISES[4..10],
        &["a killed server comes back", PROMISES[10]],
    ];
    for (promise, line) in promises.concat().iter().zip(&table) {
        assert!(line.starts_with(promise) && line.ends_with("  ok"), "{promise}: {line}");
        assert!(line.len() <= 80, "{} columns: {line}", line.len());
    }
    assert_eq!(table.get(12), Some(&""), "the table ends with the last promise");
    assert_eq!(processes(folder.path()), Vec::<u32>::new());
    assert_eq!(left(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn without_models_the_demo_says_where_to_find_them() {
    let folder = TempDir::new().unwrap();
    let nowhere = folder.path().join("none");
    let output = finish(demo(folder.path(), &["--models", nowhere.to_str().unwrap()]).spawn().unwrap());
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.starts_with("error: there are no sample models at ") && err.contains("--models DIR"), "{err}");
    assert_eq!(left(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_wrong_answer_fails_the_demo_and_shows_the_log() {
    let folder = TempDir::new().unwrap();
    // The samples with one expected answer turned around.
    let models = folder.path().join("models");
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models");
    for entry in fs::read_dir(&samples).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let copy = models.join(path.file_name().unwrap());
            fs::create_dir_all(&copy).unwrap();
            for file in fs::read_dir(&path).unwrap() {
                let file = file.unwrap().path();
                fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
            }
        }
    }
    let text = fs::read_to_string(samples.join("expected.json")).unwrap();
    let mut expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    expected["add"][0]["outputs"]["sum"]["data"][0] = serde_json::json!(-1.0);
    fs::write(models.join("expected.json"), expected.to_string()).unwrap();
    let own = TempDir::new().unwrap();
    let output = finish(demo(own.path(), &["--models", models.to_str().unwrap()]).spawn().unwrap());
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{out}\n{err}");
    let bad: Vec<&str> = out.lines().filter(|line| line.ends_with("  NOT OK")).collect();
    assert!(bad.iter().any(|line| line.starts_with("more models than memory holds")), "{out}");
    assert!(out.contains("a wrong answer: add version 1: sum is [3.0,5.0,7.0]"), "{out}");
    assert!(err.contains("the last lines of wharf up:"), "{err}");
    assert!(err.ends_with(&format!("error: {} of 11 promises were not kept\n", bad.len())), "{err}");
    assert_eq!(processes(own.path()), Vec::<u32>::new());
    assert_eq!(left(own.path()), Vec::<PathBuf>::new());
}

#[test]
fn an_interrupt_ends_the_demo_and_its_process() {
    let folder = TempDir::new().unwrap();
    let child = demo(folder.path(), &[]).spawn().unwrap();
    until("the demo's process", GONE, || processes(folder.path()).iter().any(|id| *id != child.id()));
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = finish(child);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), err.as_str()), (Some(130), "error: interrupted\n"));
    assert_eq!(processes(folder.path()), Vec::<u32>::new());
    assert_eq!(left(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_demo_that_is_killed_takes_its_process_along() {
    let folder = TempDir::new().unwrap();
    let mut child = demo(folder.path(), &[]).spawn().unwrap();
    until("the demo's process", GONE, || !processes(folder.path()).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    until("the end of the demo's process", GONE, || processes(folder.path()).is_empty());
}
