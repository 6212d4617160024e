//! Holds the tree to the layers that `src/lib.rs` draws: who may use whom, what `domain` never touches, and
//! how long a file may be.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops where it fails, waits in real time, and says what it saw"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Rows from the top; a module may use those of the rows below its own.
const ROWS: [&[&str]; 8] = [
    &["main"],
    &["cli"],
    &["app"],
    &["actors", "store", "agent", "gateway", "runtime", "manifest"],
    &["rpc", "forward"],
    &["messages"],
    &["ports", "settings", "telemetry"],
    &["domain"],
];

/// Uses within a row, each with its reason.
const EXCEPTIONS: [(&str, &str); 0] = [];

/// What no decision may touch.
const BANNED_IN_DOMAIN: [&str; 12] = [
    "async ",
    ".await",
    "tokio",
    "actix",
    "tonic",
    "futures",
    "Instant::now",
    "SystemTime",
    "rand::",
    "HashMap",
    "HashSet",
    "std::fs",
];

/// Lines that a file may have, its tests not counted.
const LINES: usize = 500;

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The top module that a file belongs to.
fn module(path: &Path) -> String {
    let relative = path.strip_prefix(root()).expect("below src");
    let first = relative.components().next().expect("not empty").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The text up to its tests, which end a file.
fn without_tests(text: &str) -> &str {
    let starts = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub(crate) mod tests {"];
    let end = starts.iter().filter_map(|start| text.find(start)).min();
    &text[..end.unwrap_or(text.len())]
}

/// The file without its tests and comments.
fn product(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = without_tests(&text);
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    let name = path.file_stem().expect("a name").to_string_lossy();
    name == "tests" || path.components().any(|part| part.as_os_str() == "tests")
}

/// Every top module that the text uses through `crate::`, braces included.
fn used(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let (mut depth, mut name, mut fresh) = (0_usize, String::new(), true);
            for c in group.chars() {
                match c {
                    '{' => (depth, fresh) = (depth + 1, false),
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => (name, fresh) = (String::new(), true),
                    c if depth == 0 && fresh && (c.is_alphanumeric() || c == '_') => name.push(c),
                    c if c.is_whitespace() => {}
                    _ => fresh = false,
                }
                if depth == 0 && !name.is_empty() && !fresh {
                    found.insert(name.clone());
                }
            }
            if !name.is_empty() {
                found.insert(name);
            }
        } else {
            found.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    found
}

#[test]
fn arrows_point_down_only() {
    let rows: BTreeMap<&str, usize> =
        ROWS.iter().enumerate().flat_map(|(row, names)| names.iter().map(move |name| (*name, row))).collect();
    let mut wrong = Vec::new();
    for path in sources(&root()) {
        let from = module(&path);
        if from == "lib" || is_test(&path) {
            continue;
        }
        let row = *rows.get(from.as_str()).unwrap_or_else(|| panic!("{from} has no row in the design"));
        for to in used(&product(&path)) {
            let Some(below) = rows.get(to.as_str()) else { continue };
            if to != from && *below <= row && !EXCEPTIONS.contains(&(from.as_str(), to.as_str())) {
                wrong.push(format!("{} uses {to}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_scanner_sees_through_braces() {
    let text = "use crate::{domain::{a, b}, ports::Clock, forward};\nuse crate::rpc::x; crate::store::y()";
    let names: Vec<String> = used(text).into_iter().collect();
    assert_eq!(names, ["domain", "forward", "ports", "rpc", "store"]);
}

/// Whether `text` has `word`, and not only as the beginning of a longer one.
fn has_word(text: &str, word: &str) -> bool {
    let goes_on = |at: usize| text[at + word.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let ends_in_letter = word.ends_with(char::is_alphanumeric);
    text.match_indices(word).any(|(at, _)| !(ends_in_letter && goes_on(at)))
}

#[test]
fn what_is_banned_is_found_and_longer_words_are_not() {
    assert!(has_word("x().await?", ".await") && has_word("use tokio::time", "tokio") && has_word("async fn", "async "));
    assert!(!has_word("copy.awaited.is_none()", ".await"));
}

#[test]
fn decisions_touch_nothing_of_the_world() {
    let mut wrong = Vec::new();
    for path in sources(&root().join("domain")) {
        if is_test(&path) {
            continue;
        }
        let text = product(&path);
        wrong.extend(
            BANNED_IN_DOMAIN
                .iter()
                .filter(|word| has_word(&text, word))
                .map(|word| format!("{}: {word}", path.display())),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn rpc_knows_no_actor_but_by_its_messages() {
    for path in sources(&root().join("rpc")) {
        assert!(!product(&path).contains("Addr<"), "{} holds an actor's address", path.display());
    }
}

#[test]
fn no_file_is_too_long_to_read() {
    let long: Vec<String> = sources(&root())
        .iter()
        .filter(|path| !is_test(path))
        .map(|path| {
            let text = fs::read_to_string(path).expect("a source file");
            (without_tests(&text).lines().count(), path)
        })
        .filter(|(lines, _)| *lines > LINES)
        .map(|(lines, path)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}
