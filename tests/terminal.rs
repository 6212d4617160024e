//! The promise: what a terminal shows is readable by someone who knows nothing of the inside, and
//! `docs/terminal.md` shows it as it is. The screens are those of a real terminal, by `tests/terminal/capture.sh`.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on has failed"
)]
#![expect(clippy::print_stderr, reason = "a test that could not look says so")]

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// Where a screen is told apart from the next: its command, its columns, its lines.
#[derive(Debug)]
struct Screen<'a> {
    command: &'a str,
    columns: usize,
    lines: Vec<&'a str>,
}

fn screens(page: &str) -> Vec<Screen<'_>> {
    let mut screens: Vec<Screen<'_>> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if let Some((command, size)) = line.strip_prefix('`').and_then(|line| line.split_once("` (")) {
            let columns = size.split(' ').next().unwrap().parse().unwrap();
            screens.push(Screen { command, columns, lines: Vec::new() });
        } else if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            screens.last_mut().unwrap().lines.push(line);
        }
    }
    screens
}

#[test]
fn a_terminal_shows_what_the_page_says_and_every_failure_names_its_reason_and_the_next_step() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !Command::new("tmux").arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        eprintln!("tmux is not installed: no terminal was looked at");
        return;
    }
    let output =
        Command::new(root.join("tests/terminal/capture.sh")).arg(env!("CARGO_BIN_EXE_wharf")).output().unwrap();
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{page}\n{}", String::from_utf8_lossy(&output.stderr));
    let seen = screens(&page);

    let documented = std::fs::read_to_string(root.join("docs/terminal.md")).unwrap();
    let commands =
        |screens: &[Screen<'_>]| screens.iter().map(|s| (s.command.to_owned(), s.columns)).collect::<Vec<_>>();
    assert_eq!(commands(&screens(&documented)), commands(&seen), "run tests/terminal/capture.sh > docs/terminal.md");
    for screen in &seen {
        assert!(!screen.lines.is_empty(), "{}: nothing is shown", screen.command);
        for line in &screen.lines {
            assert!(line.chars().count() <= screen.columns, "{}: {line}", screen.command);
        }
    }

    let text = |command: &str| {
        let screen = seen.iter().find(|screen| screen.command == command).unwrap();
        screen.lines.join(" ")
    };
    for (command, reason, step) in [
        ("wharf model load -f nowhere.yaml -w", "models/nowhere does not exist", "correct storageUri"),
        ("wharf model load -f broken.yaml -w", "is not an ONNX model", "correct storageUri or what is there"),
        ("wharf model load -f gpu.yaml -w -t 2", "no server has the capability cuda", "`wharf explain segmenter`"),
        ("wharf model load -f huge.yaml -w -t 2", "smaller than the 64 GiB it needs", "`wharf explain huge`"),
        ("wharf model list --scheduler-host 127.0.0.1:9", "connection refused", "set --scheduler-host"),
    ] {
        let text = text(command);
        assert!(text.contains("error: ") && text.contains(reason) && text.contains(step), "{command}: {text}");
    }
    let status = text("wharf server status onnx");
    assert!(!status.contains("reason") && status.contains("capacity"), "{status}");
}
