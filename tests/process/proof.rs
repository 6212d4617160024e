//! What a test saw, for the page that shows what was proven: rows of a Markdown table, appended to the file that
//! `WHARF_PROOF` names, and printed.

use std::{
    fs::OpenOptions,
    io::Write as _,
    sync::{Mutex, PoisonError},
};

/// Tests of one process take turns, so that the head of the table comes first.
static TURN: Mutex<()> = Mutex::new(());

/// A line for whoever runs the tests.
#[allow(clippy::print_stdout, reason = "who runs the tests sees what they saw")]
pub fn tell(line: &str) {
    println!("{line}");
}

/// One promise, how it was tried and what was seen.
pub fn proof(promise: &str, seen: &str) {
    let row = format!("| {promise} | {seen} |\n");
    tell(row.trim_end());
    let Ok(path) = std::env::var("WHARF_PROOF") else { return };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
    if file.metadata().unwrap().len() == 0 {
        file.write_all(
            b"# What was proven\n\nEvery row is written by the test that saw it.\n\n| promise | seen |\n|---|---|\n",
        )
        .unwrap();
    }
    file.write_all(row.as_bytes()).unwrap();
}
