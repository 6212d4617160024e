//! Figures, each beside its goal and its rival: printed, kept, and compared with those kept before.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::proc;

/// The median of rounds, and how far half of them are from it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Measure {
    pub(crate) median: f64,
    /// Half the distance between the quartiles, as a share of the median.
    pub(crate) spread: f64,
}

impl Measure {
    /// Of what each round gave. At least one.
    pub(crate) fn of(rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let exact = share * (sorted.len() - 1) as f64;
            let (low, high) = (exact.floor() as usize, exact.ceil() as usize);
            sorted[low] + (sorted[high] - sorted[low]) * exact.fract()
        };
        let median = at(0.5);
        let spread = if median == 0.0 { 0.0 } else { (at(0.75) - at(0.25)) / 2.0 / median.abs() };
        Self { median, spread }
    }

    /// Round by round, so that what disturbs one round disturbs both sides of it.
    pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Self {
        Self::of(&of.iter().zip(to).map(|(of, to)| of / to).collect::<Vec<_>>())
    }
}

/// What a goal bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Bounds {
    /// Wharf's figure itself.
    Value,
    /// Wharf's figure over its rival's.
    Ratio,
}

/// What a figure is to be.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Goal {
    pub(crate) bounds: Bounds,
    pub(crate) at_least: bool,
    pub(crate) bound: f64,
}

impl Goal {
    pub(crate) const fn ratio_at_most(bound: f64) -> Self {
        Self { bounds: Bounds::Ratio, at_least: false, bound }
    }

    pub(crate) const fn at_most(bound: f64) -> Self {
        Self { bounds: Bounds::Value, at_least: false, bound }
    }

    pub(crate) const fn at_least(bound: f64) -> Self {
        Self { bounds: Bounds::Value, at_least: true, bound }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// What it is called in every run.
    pub(crate) id: String,
    /// What it is, for people.
    pub(crate) what: String,
    pub(crate) unit: String,
    pub(crate) wharf: Measure,
    pub(crate) rival: Option<Rival>,
    pub(crate) goal: Option<Goal>,
    /// Whether more of it is better.
    pub(crate) more_is_better: bool,
}

/// Whom a figure is beside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Rival {
    pub(crate) name: String,
    pub(crate) measure: Measure,
    /// Wharf's figure over this one, round by round.
    pub(crate) ratio: Measure,
}

impl Row {
    /// Whether the goal is met; `None` without one.
    pub(crate) fn met(&self) -> Option<bool> {
        let goal = self.goal?;
        let value = match goal.bounds {
            Bounds::Value => self.wharf.median,
            Bounds::Ratio => self.rival.as_ref()?.ratio.median,
        };
        Some(if goal.at_least { value >= goal.bound } else { value <= goal.bound })
    }
}

/// A row for Wharf's `ours` beside `theirs`.
pub(crate) fn row(what: &str, unit: &str, ours: &[f64], rival: Option<(&str, &[f64])>, goal: Option<Goal>) -> Row {
    let rival = rival.map(|(name, theirs)| Rival {
        name: name.to_owned(),
        measure: Measure::of(theirs),
        ratio: Measure::ratio(ours, theirs),
    });
    let id = rival.as_ref().map_or_else(|| what.to_owned(), |rival| format!("{what} / {}", rival.name));
    Row {
        id,
        what: what.to_owned(),
        unit: unit.to_owned(),
        wharf: Measure::of(ours),
        rival,
        goal,
        more_is_better: unit.ends_with("/s"),
    }
}

/// Where figures come from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory: String,
    pub(crate) kernel: String,
}

impl Machine {
    fn here() -> Self {
        Self {
            cpu: proc::field("/proc/cpuinfo", "model name"),
            cores: fs::read_to_string("/proc/cpuinfo").unwrap_or_default().matches("processor\t").count(),
            memory: proc::system_memory("MemTotal")
                .map_or_else(|| "memory unknown".to_owned(), |bytes| format!("{} GiB", bytes >> 30)),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        }
    }
}

/// All figures of one run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) date: String,
    pub(crate) commit: String,
    /// How long it took, in seconds.
    pub(crate) seconds: f64,
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// An empty one of here and now.
    pub(crate) fn begin() -> Self {
        let git = |words: &[&str]| {
            let said = Command::new("git").args(words).output().ok().filter(|output| output.status.success());
            said.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
        };
        let mut commit = git(&["rev-parse", "--short", "HEAD"]);
        // What the run itself writes does not count.
        let written = [":!benches/results", ":!docs/performance.md", ":!docs/plots", ":!README.md"];
        let changed = git(&[&["status", "--porcelain", "--"], &written[..]].concat());
        if !changed.is_empty() {
            commit += "+";
        }
        let date = jiff::Timestamp::now().strftime("%Y-%m-%dT%H%M%SZ").to_string();
        Self { date, commit, machine: Machine::here(), ..Self::default() }
    }

    /// The table of the rows that are wanted, as Markdown.
    pub(crate) fn table(&self, wanted: impl Fn(&Row) -> bool) -> String {
        let mut text = String::from("| what | Wharf | beside it | ratio | goal | met |\n|---|---|---|---|---|---|\n");
        for row in self.rows.iter().filter(|row| wanted(row)) {
            let (rival, ratio) = row.rival.as_ref().map_or_else(Default::default, |rival| {
                let ratio = format!("{} ±{:.0} %", short(rival.ratio.median), rival.ratio.spread * 100.0);
                (format!("{} {}", rival.name, with_unit(rival.measure, &row.unit)), ratio)
            });
            let goal = row.goal.map_or_else(String::new, |goal| {
                let sign = if goal.at_least { "≥" } else { "≤" };
                match goal.bounds {
                    Bounds::Value => format!("{sign} {} {}", short(goal.bound), row.unit),
                    Bounds::Ratio => format!("ratio {sign} {}", short(goal.bound)),
                }
            });
            let met = row.met().map_or("", |met| if met { "yes" } else { "**no**" });
            let wharf = with_unit(row.wharf, &row.unit);
            text += &format!("| {} | {wharf} | {rival} | {ratio} | {goal} | {met} |\n", row.what);
        }
        text
    }

    /// Where it came from, in one sentence.
    pub(crate) fn origin(&self) -> String {
        let Machine { cpu, cores, memory, kernel } = &self.machine;
        let minutes = self.seconds / 60.0;
        format!(
            "Measured {} at commit {} in {minutes:.0} minutes on {cores} cores of {cpu}, {memory}, Linux {kernel}; \
             ± is half the distance between the quartiles of the rounds.",
            self.date, self.commit
        )
    }

    /// Keeps it in `dir`; answers the file.
    pub(crate) fn keep(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("{}-{}.json", self.date, self.commit));
        fs::write(&path, serde_json::to_string_pretty(self)? + "\n")?;
        Ok(path)
    }

    /// The newest one that is kept in `dir`.
    pub(crate) fn last(dir: &Path) -> anyhow::Result<Option<Self>> {
        let Ok(entries) = fs::read_dir(dir) else { return Ok(None) };
        let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        // Their names begin with the time.
        let newest = files.filter(|path| path.extension().is_some_and(|e| e == "json")).max();
        newest.map(|path| read(&path)).transpose()
    }

    /// How many figures of this can be compared with `before`.
    pub(crate) fn comparable(&self, before: &Self) -> usize {
        self.rows.iter().filter(|row| change(row, before).is_some()).count()
    }

    /// What became worse since `before` by more than both runs' noise: the rows' ids, and what is to be said of them.
    pub(crate) fn worse_than(&self, before: &Self) -> Vec<(String, String)> {
        let changes = self.rows.iter().filter_map(|row| Some((row, change(row, before)?)));
        let worse = changes.filter(|(_, change)| change.times > 1.0 + change.noise);
        let text = |(row, Change { now, then, times, noise }): (&Row, Change)| {
            let of = match &row.rival {
                Some(rival) if row.unit != INSTRUCTIONS => format!("of {}", rival.name),
                _ => "instructions".to_owned(),
            };
            let (what, now, then, worse, noise) =
                (&row.what, short(now), short(then), (times - 1.0) * 100.0, noise * 100.0);
            let text =
                format!("{what}: {now} {of} now, {then} before; worse by {worse:.1} %, the noise is {noise:.0} %");
            (row.id.clone(), text)
        };
        worse.map(text).collect()
    }
}

/// What became of a figure.
struct Change {
    now: f64,
    then: f64,
    /// So many times as bad.
    times: f64,
    /// So much of it may be chance.
    noise: f64,
}

/// What became of `row` since `before`; nothing where that says nothing.
///
/// Of what is timed only ratios are compared: times belong to a machine. Numbers of instructions belong to the code
/// and its compiler, so these are compared as they are, and a small difference counts. Their ratios are not: a ratio
/// to something that has become cheaper is greater, and nothing is worse. Another compiler, another C library or
/// another kind of CPU may change them too; then a result is to be kept anew.
fn change(row: &Row, before: &Report) -> Option<Change> {
    let before = before.rows.iter().find(|then| then.id == row.id)?;
    if row.unit == INSTRUCTIONS {
        let (now, then) = (row.wharf.median, before.wharf.median);
        return Some(Change { now, then, times: now / then, noise: INSTRUCTIONS_NOISE });
    }
    let [now, then] = [row.rival.as_ref()?.ratio, before.rival.as_ref()?.ratio];
    // A difference of two times that are almost the same may be anything, and so a ratio to it.
    if !(LEAST_RATIO..1.0 / LEAST_RATIO).contains(&then.median) {
        return None;
    }
    let noise = (NOISES * now.spread.hypot(then.spread)).max(LEAST_NOISE);
    let (now, then) = (now.median, then.median);
    Some(Change { now, then, times: if row.more_is_better { then / now } else { now / then }, noise })
}

/// The unit of rows that count instructions.
pub(crate) const INSTRUCTIONS: &str = "instr";
/// The same code differs by less than this.
const INSTRUCTIONS_NOISE: f64 = 0.05;
/// A ratio that is smaller, or as much greater than one, is no measure of what changed a little.
const LEAST_RATIO: f64 = 0.001;
/// As many times the spread of both runs together may a ratio differ.
const NOISES: f64 = 4.0;
/// However calm the rounds were, two runs differ by this much: of one build on one machine, an hour apart, the ratio of
/// the gateway's CPU time to Envoy's was 0.36 and 0.47.
const LEAST_NOISE: f64 = 0.30;

fn read(path: &Path) -> anyhow::Result<Report> {
    let text = fs::read_to_string(path)?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a result that was kept", path.display()))
}

fn with_unit(measure: Measure, unit: &str) -> String {
    format!("{} {unit} ±{:.0} %", short(measure.median), measure.spread * 100.0)
}

/// Three figures that count.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        size if size >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rounds: &[(f64, f64)]) -> Report {
        let (wharf, rival): (Vec<f64>, Vec<f64>) = rounds.iter().copied().unzip();
        let row = Row {
            id: "x".to_owned(),
            what: "x".to_owned(),
            unit: "us".to_owned(),
            wharf: Measure::of(&wharf),
            rival: Some(Rival {
                name: "other".to_owned(),
                measure: Measure::of(&rival),
                ratio: Measure::ratio(&wharf, &rival),
            }),
            goal: Some(Goal::ratio_at_most(0.5)),
            more_is_better: false,
        };
        Report { rows: vec![row], ..Report::default() }
    }

    #[test]
    fn a_slower_machine_is_no_regression_and_a_worse_ratio_is() {
        let before = report(&[(10.0, 30.0), (11.0, 31.0), (10.5, 30.5)]);
        let slower_machine = report(&[(30.0, 90.0), (33.0, 93.0), (31.5, 91.5)]);
        assert_eq!(slower_machine.worse_than(&before), []);
        assert_eq!(slower_machine.comparable(&before), 1);
        let worse = report(&[(15.0, 30.0), (16.0, 31.0), (15.5, 30.5)]);
        assert_eq!(worse.worse_than(&before).len(), 1);
        assert_eq!(before.worse_than(&worse), []);
        let noisy = report(&[(10.0, 30.0), (25.0, 31.0), (16.0, 30.5)]);
        assert_eq!(noisy.worse_than(&before), [], "it is within its own noise");
    }

    #[test]
    fn instructions_are_compared_as_they_are() {
        let counted = |instructions: f64, beside: f64| {
            let mut report = report(&[(instructions, beside)]);
            report.rows[0].unit = INSTRUCTIONS.to_owned();
            report
        };
        let before = counted(1000.0, 900.0);
        assert_eq!(counted(1040.0, 900.0).worse_than(&before), []);
        assert_eq!(counted(1060.0, 1100.0).worse_than(&before).len(), 1, "whatever is beside it");
        assert_eq!(counted(1000.0, 500.0).worse_than(&before), [], "only the other one is cheaper");
        assert_eq!(counted(500.0, 900.0).worse_than(&before), []);
    }

    #[test]
    fn a_goal_is_met_or_missed_by_what_it_bounds() {
        assert_eq!(report(&[(10.0, 30.0)]).rows[0].met(), Some(true));
        assert_eq!(report(&[(20.0, 30.0)]).rows[0].met(), Some(false));
        let mut row = report(&[(20.0, 30.0)]).rows.remove(0);
        row.goal = Some(Goal::at_least(19.0));
        assert_eq!(row.met(), Some(true));
        row.goal = Some(Goal::at_most(19.0));
        assert_eq!(row.met(), Some(false));
    }
}
