//! What the control plane does, as figures: a process for each fleet ([`fleet`](crate::fleet)), then one more that begins
//! where it left its journal.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::ensure;

use crate::{
    fleet::{Fleet, Told},
    gateway::Places,
    proc,
    report::{Goal, Report, Row, row},
};

fn spawn(places: &Places, dir: &Path, fleet: Fleet) -> anyhow::Result<Told> {
    // All cores, though this process has one.
    let mut command = Command::new("taskset");
    command.args(["-c", &proc::all_cores()]).arg(&places.this).arg("control").arg(dir);
    for (name, value) in [
        ("--models", fleet.models.to_string()),
        ("--copies", fleet.copies.to_string()),
        ("--replicas", fleet.replicas.to_string()),
    ] {
        command.args([name, &value]);
    }
    if fleet.again {
        command.arg("--again");
    }
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "a scheduler with {fleet:?} failed");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A fleet's name in the table.
fn called(fleet: Fleet) -> String {
    let copies = if fleet.copies == 1 { "1 copy".to_owned() } else { format!("{} copies", fleet.copies) };
    format!("{} models, {copies}, {} replicas", fleet.models, fleet.replicas)
}

/// What a million models need, in GiB: the goal, and as much again for those who play agents and for what was written and
/// is not on the disk yet.
const MILLION: u64 = 16;

/// All of it; a million models where there is memory for them.
pub(crate) fn measure(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let fleet = |models, copies, replicas| Fleet { models, copies, replicas, again: false };
    let mut fleets = vec![(fleet(10_000, 1, 100), 3), (fleet(10_000, 10, 100), 3)];
    if !quick {
        fleets.extend([(fleet(100_000, 1, 1000), 3), (fleet(100_000, 10, 1000), 1)]);
        let free = proc::system_memory("MemAvailable").unwrap_or_default() >> 30;
        if free >= MILLION {
            fleets.push((fleet(1_000_000, 1, 10_000), 1));
        } else {
            println!("without a million models: {free} GiB are free, and they need {MILLION}");
        }
    }
    for (fleet, rounds) in fleets {
        let mut told = Vec::new();
        let mut again = Vec::new();
        for round in 0..rounds {
            let dir: PathBuf = places.dir.join(format!("control-{}-{}-{round}", fleet.models, fleet.copies));
            fs::create_dir_all(&dir)?;
            told.push(spawn(places, &dir, fleet)?);
            again.push(spawn(places, &dir, Fleet { again: true, ..fleet })?);
            fs::remove_dir_all(&dir)?;
        }
        let rows = rows(fleet, &told, &again);
        for row in &rows {
            println!("{}", crate::line(row));
        }
        report.rows.extend(rows);
    }
    Ok(())
}

fn rows(fleet: Fleet, told: &[Told], again: &[Told]) -> Vec<Row> {
    let name = called(fleet);
    let of = |told: &[Told], what: &dyn Fn(&Told) -> f64| told.iter().map(what).collect::<Vec<f64>>();
    let models = fleet.models as f64;
    let million = fleet.models >= 1_000_000;
    let mib = 1024.0 * 1024.0;
    let mut rows = Vec::new();
    let mut push = |what: &str, unit: &str, values: Vec<f64>, goal: Option<Goal>| {
        rows.push(row(&format!("{name}: {what}"), unit, &values, None, goal));
    };
    let single = fleet.copies == 1;
    push("durable submissions", "models/s", of(told, &|t| models / t.durable), None);
    push(
        "submitted until they answer",
        "models/s",
        of(told, &|t| models / t.answering),
        single.then(|| Goal::at_least(20_000.0)),
    );
    let total = (fleet.models == 10_000 && fleet.copies == 10).then(|| Goal::at_most(0.5));
    push("submitted, journaled, placed, routed", "s", of(told, &|t| t.answering), total);
    push("CPU for each model", "us", of(told, &|t| t.cpu * 1e6 / models), None);
    push(
        "memory for each model",
        "KiB",
        of(told, &|t| t.after.saturating_sub(t.before) as f64 / 1024.0 / models),
        None,
    );
    push("memory", "MiB", of(told, &|t| t.after as f64 / mib), million.then(|| Goal::at_most(8192.0)));
    push("status of all, listed", "s", of(told, &|t| t.listed), None);
    push("status of all, watched", "s", of(told, &|t| t.watched), None);
    push("restart to the API's first answer", "s", of(again, &|t| t.first), million.then(|| Goal::at_most(10.0)));
    push("restart until every copy is known", "s", of(again, &|t| t.known), million.then(|| Goal::at_most(10.0)));
    push(
        "memory after the restart",
        "MiB",
        of(again, &|t| t.after as f64 / mib),
        million.then(|| Goal::at_most(8192.0)),
    );
    push("one more, submitted until a gateway has its route", "ms", of(again, &|t| t.more), None);
    push("slowest status meanwhile", "ms", of(again, &|t| t.meanwhile), Some(Goal::at_most(10.0)));
    push("slowest status afterwards", "ms", of(again, &|t| t.afterwards), Some(Goal::at_most(10.0)));
    rows
}
