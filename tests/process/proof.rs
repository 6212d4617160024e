//! What a test saw, for the page that shows what was proven: Markdown lines, appended to the file that
//! `WHARF_PROOF` names, and printed.

use std::{fs::OpenOptions, io::Write as _};

/// One promise, how it was tried and what was seen.
pub fn proof(promise: &str, seen: &str) {
    let line = format!("| {promise} | {seen} |\n");
    print!("{line}");
    if let Ok(path) = std::env::var("WHARF_PROOF") {
        let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}
