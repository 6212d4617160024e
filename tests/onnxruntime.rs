//! ONNX Runtime's library, where it is not what it should be: it is told in words, tract runs the models, and nothing
//! goes down. In a process of its own, since a process keeps the first library that is good.
#![allow(clippy::disallowed_methods, clippy::print_stdout, missing_docs, clippy::unwrap_used)]

use std::{fs, path::Path};

use wharf::runtime::{Library, Onnx};

#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let (onnx, problem) = Onnx::find(Library::At(path));
    assert!(!onnx.is_onnx_runtime());
    let problem = problem.unwrap();
    for word in words.iter().chain(&[&*path.display().to_string()]) {
        assert!(problem.contains(word), "{word} is not in: {problem}");
    }
}

#[test]
fn a_library_that_is_missing_broken_or_another_is_told_and_takes_nothing_down() {
    let folder = tempfile::tempdir().unwrap();
    refused(&folder.path().join("libonnxruntime.so"), &["not a file", "agent.onnx_runtime", "off"]);
    refused(folder.path(), &["not a file"]);
    let text = folder.path().join("text.so");
    fs::write(&text, "no library at all").unwrap();
    refused(&text, &["can't be used", "1.24"]);
    let empty = folder.path().join("empty.so");
    fs::write(&empty, "").unwrap();
    refused(&empty, &["can't be used"]);
    // A library, but of something else.
    let other = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", "/lib64/libm.so.6"];
    if let Some(other) = other.into_iter().map(Path::new).find(|path| path.is_file()) {
        refused(other, &["OrtGetApiBase"]);
    }
}

#[test]
fn a_library_that_is_too_old_is_told() {
    let cache = std::env::var_os("WHARF_CACHE").map(std::path::PathBuf::from);
    let cache = cache.unwrap_or(std::env::home_dir().unwrap().join(".cache/wharf"));
    // Triton's own stub comes with one.
    let lib = cache.join("servers/triton-python/lib");
    let pythons = fs::read_dir(lib).into_iter().flatten().flatten();
    let old = pythons.map(|python| python.path().join("site-packages/onnxruntime/capi/libonnxruntime.so.1.20.1"));
    match old.into_iter().find(|path| path.is_file()) {
        Some(old) => refused(&old, &["1.20.1", "1.24"]),
        None => println!("without an old ONNX Runtime"),
    }
}

#[test]
fn off_is_off_and_a_setting_is_a_path_otherwise() {
    assert!(matches!(Onnx::find(Library::Off), (onnx, None) if !onnx.is_onnx_runtime()));
    assert_eq!(Library::of("off"), Library::Off);
    assert_eq!(Library::of("auto"), Library::Auto);
    assert_eq!(Library::of("/lib/x.so"), Library::At(Path::new("/lib/x.so")));
}
