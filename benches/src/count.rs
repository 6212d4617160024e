//! How many instructions each hot path takes, counted by Valgrind.
//!
//! Time is another in every run and on every machine; instructions are the same in both, but for the seeds of hash maps.
//! So a change of a few percent is seen here that no clock would show. What they say nothing of is what instructions
//! wait for: memory, locks, the kernel.
//!
//! Each function runs twice in processes of their own, once and then twice as often. The difference is what it costs:
//! what is done once, from the process's start to its end, is in both.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use wharf_bench::functions::{self, Function};

use crate::{
    gateway::Places,
    report::{Goal, INSTRUCTIONS, Report, row},
};

/// Does the function with this id so often, in this process.
pub(crate) fn play(id: &str, times: u64) -> anyhow::Result<()> {
    let function = Function::find(id).with_context(|| format!("there is no function {id:?}"))?;
    function.make()?(times)
}

/// All of it; nothing where Valgrind is not installed.
pub(crate) fn measure(places: &Places, report: &mut Report) -> anyhow::Result<()> {
    if !is_there() {
        println!("without counts of instructions: valgrind is not installed");
        return Ok(());
    }
    let mut counted: BTreeMap<&str, f64> = BTreeMap::new();
    for function in &functions::ALL {
        let [once, twice] = [1, 2].map(|often| instructions(places, function, function.times * often));
        let each = (twice? - once?) / function.times as f64;
        counted.insert(function.id, each);
        let beside = function.beside.and_then(|beside| Some((beside, [*counted.get(beside.id)?])));
        let rival = beside.as_ref().map(|(beside, counted)| (beside.name, &counted[..]));
        let goal = function.beside.and_then(|beside| beside.at_most).map(Goal::ratio_at_most);
        let row = row(function.what, INSTRUCTIONS, &[each], rival, goal);
        println!("{}", crate::line(&row));
        report.rows.push(row);
    }
    Ok(())
}

fn is_there() -> bool {
    let said = Command::new("valgrind").arg("--version").stdin(Stdio::null()).output();
    said.is_ok_and(|output| output.status.success())
}

/// What a process executes that does `function` so often.
fn instructions(places: &Places, function: &Function, times: u64) -> anyhow::Result<f64> {
    let file = places.dir.join(format!("callgrind-{}-{times}", function.id));
    let mut command = Command::new("valgrind");
    command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", file.display()));
    command.arg(&places.this).args(["function", function.id, &times.to_string()]).stdin(Stdio::null());
    let output = command.output().context("can't start valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed under valgrind:\n{said}", function.id);
    total(&file)
}

fn total(file: &Path) -> anyhow::Result<f64> {
    let text = fs::read_to_string(file).with_context(|| format!("valgrind did not write {}", file.display()))?;
    read_total(&text).with_context(|| format!("{} has no total", file.display()))
}

/// The total that a file of Callgrind ends with.
fn read_total(text: &str) -> Option<f64> {
    text.lines().rev().find_map(|line| line.strip_prefix("totals:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_found() {
        let text = "# callgrind format\nevents: Ir\nsummary: 1\n\nfn=(0) main\n0 17\n\ntotals: 123456\n";
        assert_eq!(read_total(text), Some(123_456.0));
        assert_eq!(read_total("events: Ir\n"), None);
    }
}
