//! The promise: what the README and the reference say works as they say it. Every command in them is run, in the
//! order of the page, against a real process; what they list is compared with what the code has.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on has failed"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use prost::Message as _;
use wharf::{
    ports::{Clock as _, SystemClock},
    rpc::proto::DESCRIPTORS,
    settings::Settings,
    telemetry::metrics::{Metrics, Role},
};

/// Blocks that no test can run as they are, each with where what they say is run all the same.
const NOT_RUN: [(&str, &str); 11] = [
    ("make demo\n", "it builds and runs `wharf demo`, as tests/demo.rs does"),
    ("make demo-mlserver\n", "it builds and runs `wharf demo` with what it installs, as tests/demo.rs does"),
    ("make reload-overhead\n", "it runs tests/overhead.rs in full counts"),
    ("make lint\n", "it is run beside the tests, not within them"),
    ("make bench\n", "it takes the machine for itself, for many minutes"),
    ("make soak\n", "it takes the machine for itself, for half an hour"),
    ("make bench-quick\n", "it takes the machine for itself"),
    ("cargo bench -p wharf-bench\n", "it takes the machine for itself; unit tests run the same functions"),
    ("make test\n", "it is what runs this test"),
    ("cargo install --path .\n", "building is what comes before this test"),
    ("cargo deny check\n", "it needs the advisory database from the network; deny_toml_is_read checks the file"),
];

/// Pages that are written by what runs the commands in them.
const ELSEWHERE: [(&str, &str); 2] =
    [("docs/terminal.md", "what a terminal shows, from real runs"), ("docs/proof.md", "written by `make prove`")];

/// The longest that one page may take.
const PAGE: Duration = Duration::from_secs(120);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every page, by its name from the root.
fn pages() -> Vec<String> {
    let mut names = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned()];
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            names.push(format!("docs/{name}"));
        }
    }
    names.sort();
    names
}

// === running ===

/// Something that a page has its reader type, and what it says comes of it.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    shown: Vec<String>,
    code: String,
    /// Whether it is a whole block.
    whole: bool,
}

/// The commands of a page, in order. A block of `sh` is one command; in a block of `console` each line after `$ ` is
/// one, and what follows it is shown by it. `$ echo $?` shows the exit code of the command before; it is 0 elsewhere.
fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else { continue };
        let block: Vec<(usize, &str)> = lines.by_ref().take_while(|(_, line)| !line.starts_with("```")).collect();
        match kind {
            "sh" => {
                let command: String = block.iter().map(|(_, line)| format!("{line}\n")).collect();
                steps.push(Step { line: number + 2, command, shown: Vec::new(), code: "0".to_owned(), whole: true });
            }
            "console" => {
                let first = steps.len();
                for (number, line) in block {
                    match line.strip_prefix("$ ") {
                        Some(command) => steps.push(Step {
                            line: number + 1,
                            command: command.to_owned(),
                            shown: Vec::new(),
                            code: "0".to_owned(),
                            whole: false,
                        }),
                        None => steps.last_mut().expect("a command comes first").shown.push(line.to_owned()),
                    }
                }
                let mut at = first + 1;
                while at < steps.len() {
                    if steps[at].command == "echo $?" {
                        let echo = steps.remove(at);
                        steps[at - 1].code = echo.shown.concat().trim().to_owned();
                    } else {
                        at += 1;
                    }
                }
            }
            "" | "text" | "toml" | "yaml" | "json" | "http" => {}
            other => panic!("line {}: a block of {other:?}; a command's block is console or sh", number + 1),
        }
    }
    steps
}

/// Free ports of this machine, none twice.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// What a role means to the script: a reader has another terminal for it, and Ctrl-C.
const PROLOGUE: &str = r#"
pids=
stop() {
  if [ -n "$pids" ]; then kill $pids 2> /dev/null; wait $pids; pids=; fi
}
# Every role runs on, in a terminal of its own: it is waited for until it is ready. Another scheduler takes the place of
# all that run.
role() {
  case $1 in up | scheduler) stop ;; esac
  # What the one before it said is not to be taken for its words.
  : > "$1.log"
  command wharf "$@" > "$1.log" 2>&1 &
  local pid=$!
  for _ in $(seq 600); do
    if grep -q 'ready;' "$1.log"; then pids="$pids $pid"; cat "$1.log"; return 0; fi
    if ! kill -0 "$pid" 2> /dev/null; then cat "$1.log"; wait "$pid"; return; fi
    sleep 0.05
  done
  kill "$pid"; cat "$1.log"; return 1
}
trap 'stop; kill $(jobs -p) 2> /dev/null; wait' EXIT
trap 'exit 143' TERM
# The journal's file is worked with once nobody has it.
wharf() { case $1 in up | scheduler | agent | gateway) role "$@" ;; store) stop; command wharf "$@" ;; *) command wharf "$@" ;; esac; }
"#;

/// Runs the steps of a page in one shell, in a folder that is like the repository, and compares.
fn run(page: &str, steps: &[Step]) {
    let folder = tempfile::tempdir().unwrap();
    for model in ["iris-1", "iris-2"] {
        let from = root().join("tests/models").join(model).join("model.onnx");
        let to = folder.path().join("tests/models").join(model);
        fs::create_dir_all(&to).unwrap();
        fs::copy(from, to.join("model.onnx")).unwrap();
    }
    fs::create_dir(folder.path().join("config")).unwrap();
    for name in ["servers.toml", "wharf.toml"] {
        fs::copy(root().join("config").join(name), folder.path().join("config").join(name)).unwrap();
    }
    // The ports that the pages speak of, and those that are used here.
    let ports: Vec<(u16, u16)> = [9000, 9001, 9004, 9005, 9006, 9007, 9008].into_iter().zip(free_ports(7)).collect();
    let here = |text: &str| {
        ports.iter().fold(text.to_owned(), |text, (written, used)| {
            ["localhost", "127.0.0.1"]
                .iter()
                .fold(text, |text, host| text.replace(&format!("{host}:{written}"), &format!("{host}:{used}")))
        })
    };
    let mut script = PROLOGUE.to_owned();
    if !steps.iter().any(|step| step.command.trim_start().starts_with("wharf up")) {
        script.push_str("wharf up > /dev/null\n");
    }
    for (number, step) in steps.iter().enumerate() {
        fs::write(folder.path().join(format!(".{number}.sh")), here(&step.command)).unwrap();
        // Of a block of sh every command must end well; one that does not ends the shell, and the step has no code.
        let (strict, lax) = if step.whole { ("set -e; ", "; set +e") } else { ("", "") };
        script.push_str(&format!(
            "{strict}. ./.{number}.sh > .{number}.out 2>&1 < /dev/null; echo $? > .{number}.code{lax}\n"
        ));
    }
    fs::write(folder.path().join(".script.sh"), script).unwrap();
    let port = |written| format!("127.0.0.1:{}", ports.iter().find(|(w, _)| *w == written).unwrap().1);
    let binary = Path::new(env!("CARGO_BIN_EXE_wharf"));
    let path = std::env::vars().find(|(name, _)| name == "PATH").unwrap().1;
    let mut shell = Command::new("bash");
    shell
        .arg(".script.sh")
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env("PATH", format!("{}:{path}", binary.parent().unwrap().display()))
        .env("NO_COLOR", "1")
        .env("WHARF_SCHEDULER_HOST", port(9004))
        .env("WHARF_INFERENCE_HOST", port(9000));
    for (setting, written) in [
        ("SCHEDULER__LISTEN", 9004),
        ("SCHEDULER__AGENTS", 9005),
        ("SCHEDULER__HTTP", 9008),
        ("GATEWAY__LISTEN", 9000),
        ("GATEWAY__HTTP", 9007),
        ("GATEWAY__SCHEDULER", 9005),
        ("AGENT__LISTEN", 9001),
        ("AGENT__HTTP", 9006),
        ("AGENT__SCHEDULER", 9005),
    ] {
        shell.env(format!("WHARF_{setting}"), port(written));
    }
    let mut shell = shell.spawn().unwrap();
    let clock = SystemClock::new();
    let began = clock.now();
    let late = loop {
        if shell.try_wait().unwrap().is_some() {
            break false;
        }
        if clock.now().since(began) > PAGE {
            // Its trap ends what it started.
            Command::new("kill").arg(shell.id().to_string()).status().unwrap();
            shell.wait().unwrap();
            break true;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let said = |number: usize, what: &str| {
        fs::read_to_string(folder.path().join(format!(".{number}.{what}"))).unwrap_or_default()
    };
    for (number, step) in steps.iter().enumerate() {
        let (code, output) = (said(number, "code"), said(number, "out"));
        let place = format!("{page}:{}: {}", step.line, step.command.trim_end());
        assert!(!code.is_empty(), "{place}\ndid not end{}: {output}", if late { " in time" } else { "" });
        assert_eq!(code.trim(), step.code, "{place}\nended with another code than the page says, and said:\n{output}");
        for shown in step.shown.iter().filter(|shown| shown.trim() != "...") {
            assert!(
                output.lines().any(|line| is_like(&here(shown), line)),
                "{place}\ndoes not show a line like\n{shown}\nbut:\n{output}"
            );
        }
    }
    assert!(!late, "{page} took longer than {PAGE:?}");
}

/// Whether a line says what the page shows: all its words, in that order. Numbers, times and what `...` stands for may
/// differ.
fn is_like(shown: &str, line: &str) -> bool {
    let number = |word: &str| word.bytes().any(|byte| byte.is_ascii_digit()) && !word.contains(['/', ':']);
    let mut rest = line;
    shown.split([' ', '\t']).filter(|word| !word.is_empty()).all(|word| {
        word.split("...").filter(|part| !part.is_empty() && !number(part)).all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    })
}

#[test]
fn every_command_of_every_page_does_what_the_page_says() {
    let mut skipped: BTreeMap<&str, bool> = NOT_RUN.iter().map(|(block, _)| (*block, false)).collect();
    let mut work: Vec<(String, Vec<Step>)> = Vec::new();
    for page in pages() {
        if ELSEWHERE.iter().any(|(name, _)| *name == page) {
            continue;
        }
        let mut steps = steps(&read(&page));
        steps.retain(|step| match skipped.get_mut(step.command.as_str()) {
            Some(seen) => {
                *seen = true;
                false
            }
            None => true,
        });
        if !steps.is_empty() {
            work.push((page, steps));
        }
    }
    for (block, seen) in skipped {
        assert!(seen, "no page has the block {block:?} any more; take it off the list");
    }
    assert!(work.len() >= 6, "hardly any page has commands: {:?}", work.iter().map(|(p, _)| p).collect::<Vec<_>>());
    // One after the other: each has a whole cluster of its own.
    let failed: Vec<String> = work
        .iter()
        .filter_map(|(page, steps)| std::panic::catch_unwind(|| run(page, steps)).err())
        .map(|why| why.downcast::<String>().map_or_else(|_| "a panic without words".to_owned(), |text| *text))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn a_line_is_like_another_when_its_words_are_there_in_order() {
    for (shown, line) in [
        ("iris   Available  1", "iris  Available  2        1/1"),
        ("error: x.yaml:6: no such field", "error: x.yaml:6: no such field; did you mean y?"),
        ("... is Available", "2026-11-22T15:21:19Z replica 0 is Available"),
        ("waited 0.5 s", "waited 12 s"),
    ] {
        assert!(is_like(shown, line), "{shown} / {line}");
    }
    for (shown, line) in [("iris Available", "iris  Failed"), ("b a", "a b"), ("x.yaml:6: no", "x.yaml:7: no")] {
        assert!(!is_like(shown, line), "{shown} / {line}");
    }
}

// === what pages list ===

/// Words of a page that stand between backquotes.
fn quoted(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| !line.starts_with("```"))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_link_within_the_repository_leads_somewhere() {
    for page in pages() {
        // What stands between backquotes is no link.
        let text: String = read(&page).split('`').step_by(2).collect();
        let folder = root().join(&page);
        let folder = folder.parent().unwrap();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            if target.starts_with("http") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { root().join(&page) } else { folder.join(file) };
            if ELSEWHERE.iter().any(|(made, _)| path.ends_with(made)) && !path.exists() {
                continue; // It is being made.
            }
            assert!(path.exists(), "{page} links to {target}, and there is no such file");
            if !anchor.is_empty() {
                let slug = |line: &str| -> String {
                    let line = line.trim_start_matches('#').trim().to_lowercase();
                    let kept = line.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
                    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
                };
                let there = fs::read_to_string(&path).unwrap();
                let found = there.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == anchor);
                assert!(found, "{page} links to {target}, and that page has no such heading");
            }
        }
    }
    for page in pages().iter().filter(|page| page.starts_with("docs/")) {
        let name = page.strip_prefix("docs/").unwrap();
        let from_readme = read("README.md").contains(page.as_str()) || read("docs/README.md").contains(name);
        assert!(from_readme, "no reader finds {page}: link to it in docs/README.md");
    }
}

#[test]
fn the_page_of_settings_is_what_the_code_declares() {
    let text = read("docs/configuration.md");
    let block = text.split("```toml\n").nth(1).expect("a block of toml").split("```").next().unwrap();
    let reference = Settings::reference();
    if block != reference && std::env::vars().any(|(name, _)| name == "UPDATE") {
        fs::write(root().join("docs/configuration.md"), text.replacen(block, &reference, 1)).unwrap();
        return;
    }
    assert!(block == reference, "docs/configuration.md is not what the code declares; UPDATE=1 writes it anew");
}

#[test]
fn the_page_of_the_api_names_every_method_of_every_service() {
    let page = read("docs/api.md");
    let files = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let mut methods = 0;
    for file in files.file {
        for service in file.service {
            let name = format!("{}.{}", file.package.clone().unwrap_or_default(), service.name());
            assert!(page.contains(&format!("`{name}`")), "docs/api.md lacks the service {name}");
            for method in service.method {
                methods += 1;
                let said = quoted(&page).contains(method.name());
                assert!(said, "docs/api.md lacks the method {} of {name}", method.name());
            }
        }
    }
    assert!(methods > 30, "only {methods} methods were looked for");
}

#[test]
fn the_page_of_the_command_line_names_every_command_and_no_other() {
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_wharf")).args(args).arg("--help").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let commands = |text: &str| -> Vec<String> {
        let after = text.split("Commands:\n").nth(1).unwrap_or_default();
        let lines = after.lines().take_while(|line| line.starts_with("  "));
        // A command begins in the third column; what goes on does so further right.
        lines
            .filter(|line| !line.starts_with("   "))
            .map(|line| line.split_whitespace().next().unwrap().to_owned())
            .collect()
    };
    let page = read("docs/cli.md");
    let top = commands(&help(&[]));
    assert!(top.len() > 10, "{top:?}");
    let mut all = Vec::new();
    for command in &top {
        let below = commands(&help(&[command]));
        if below.is_empty() {
            all.push(command.clone());
        }
        all.extend(below.into_iter().map(|sub| format!("{command} {sub}")));
    }
    for command in &all {
        let said = quoted(&page).iter().any(|words| {
            let words = words.strip_prefix("wharf ").unwrap_or(words);
            words == command || words.starts_with(&format!("{command} "))
        });
        assert!(said, "docs/cli.md lacks `{command}`");
    }
}

/// The rows of the first table after `heading` in a page: the words of their first cell.
fn first_cells(text: &str, heading: &str) -> BTreeSet<String> {
    let after = text.split(heading).nth(1).unwrap_or_else(|| panic!("no heading {heading}"));
    after
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split(',').map(|word| word.trim().trim_matches('`').to_owned()).collect::<Vec<_>>())
        .collect()
}

/// Every source of the product, without its tests.
fn product(folder: &Path, text: &mut String) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            product(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            text.push_str(fs::read_to_string(path).unwrap().split("#[cfg(test)]\nmod tests {").next().unwrap());
        }
    }
}

#[test]
fn the_page_of_metrics_names_what_is_exported_and_nothing_else() {
    let page = read("docs/metrics.md");
    let named: BTreeSet<String> = ["## Every process", "## The scheduler", "## A gateway", "## An agent"]
        .iter()
        .filter(|heading| page.contains(**heading))
        .flat_map(|heading| first_cells(&page, heading))
        .collect();
    let mut sources = String::new();
    product(&root().join("src"), &mut sources);
    for name in &named {
        let base = name.strip_suffix("_total").unwrap_or(name);
        let known = [name.as_str(), base].iter().any(|name| sources.contains(&format!("\"{name}\"")));
        assert!(known, "docs/metrics.md has {name}, and nothing exports it");
    }
    // Every name of a metric that the code has, whether or not anything was counted yet.
    let mut exported: BTreeSet<String> = sources
        .split('"')
        .skip(1)
        .filter(|word| {
            let prefixed = word.starts_with("wharf_") || word.starts_with("seldon_");
            prefixed && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') && word.matches('_').count() >= 1
        })
        .map(str::to_owned)
        .collect();
    let text = Metrics::new(&[Role::Scheduler, Role::Gateway, Role::Agent], true).exposition().unwrap();
    exported.extend(text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned)));
    assert!(exported.len() > 30, "{exported:?}");
    for name in exported {
        let said = named.contains(&name) || named.contains(&format!("{name}_total"));
        assert!(said, "docs/metrics.md lacks {name}");
    }
}

#[test]
fn the_page_of_events_names_every_kind_and_nothing_else() {
    let page = read("docs/events.md");
    let named: BTreeSet<String> =
        ["## Of a model", "## Of a server"].iter().flat_map(|heading| first_cells(&page, heading)).collect();
    let mut sources = String::new();
    product(&root().join("src"), &mut sources);
    for kind in &named {
        assert!(sources.contains(&format!("\"{kind}\"")), "docs/events.md has {kind}, and nothing publishes it");
    }
    let noted = sources.split("note(").skip(1).filter_map(|after| {
        let (word, _) = after.trim_start().strip_prefix('"')?.split_once('"')?;
        (!word.is_empty() && word.bytes().all(|b| b.is_ascii_alphabetic())).then(|| word.to_owned())
    });
    for kind in noted {
        assert!(named.contains(&kind), "docs/events.md lacks {kind}");
    }
}

#[test]
fn deny_toml_is_read_and_says_why() {
    let text = read("deny.toml");
    let table: toml::Table = text.parse().unwrap();
    for section in ["advisories", "licenses", "bans", "sources"] {
        assert!(table.contains_key(section), "deny.toml has no [{section}]");
    }
    for ban in table["bans"]["deny"].as_array().unwrap() {
        assert!(ban["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{ban:?} is banned without a reason");
    }
    let allowed: Vec<&str> =
        table["licenses"]["allow"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(allowed.contains(&"Apache-2.0"));
    // What is banned is not there.
    let lock: toml::Table = read("Cargo.lock").parse().unwrap();
    let packages = lock["package"].as_array().unwrap();
    for ban in table["bans"]["deny"].as_array().unwrap() {
        let name = ban["crate"].as_str().unwrap();
        let is = |package: &&toml::Value| package["name"].as_str() == Some(name);
        let uses = |package: &&toml::Value| {
            let all = package.get("dependencies").and_then(toml::Value::as_array);
            all.is_some_and(|all| all.iter().any(|one| one.as_str().unwrap().split(' ').next() == Some(name)))
        };
        let users: Vec<&str> = packages.iter().filter(uses).map(|package| package["name"].as_str().unwrap()).collect();
        // Or only what may bring it does.
        let wrappers = ban.get("wrappers").and_then(toml::Value::as_array);
        let allowed = |user: &str| wrappers.is_some_and(|all| all.iter().any(|one| one.as_str() == Some(user)));
        let there = packages.iter().any(|package| is(&package));
        assert!(
            !there || (!users.is_empty() && users.iter().all(|user| allowed(user))),
            "{name} is banned, and in Cargo.lock for {users:?}"
        );
    }
}
