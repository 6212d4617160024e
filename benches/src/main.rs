//! What is fast in Wharf, and against whom: `make bench` measures, prints one table, and keeps it.
//!
//! # Method
//!
//! - The programs are those that people run: `wharf` of the release profile and Envoy of its own release, each a process
//!   of its own with its settings at their defaults. Only what stands around them is made here: the load, the backend
//!   that answers with what it was asked, the scheduler's side of the stream of routes ([`routes`]), and a forwarder
//!   that does nothing else ([`floor`]).
//! - What is measured has one core, and everything else the other one. CPU time is what the kernel counted for the
//!   process's threads, not what a clock saw; so it holds on a machine that is busy with other things too.
//! - The load is a closed loop over connections that are kept. A request that fails ends the run.
//! - Contestants take turns, round by round. A figure is the median of its rounds; ± is half the distance between their
//!   quartiles. A ratio is taken round by round too, and has a spread of its own.
//! - Times belong to one machine, so `make bench-quick` compares ratios with the last result that was kept, and fails
//!   where one became worse by more than the noise of both runs.
//! - How many instructions a hot path takes is the same in every run, nearly ([`count`]). These are compared as they are.
//!
//! Results are kept in `benches/results`, by date and commit.

mod backend;
mod control;
mod count;
mod envoy;
mod fleet;
mod floor;
mod gateway;
mod load;
mod placement;
mod plot;
mod proc;
mod report;
mod routes;
mod soak;
mod up;

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use wharf_bench::{bodies, models, raw};

use self::{
    gateway::{Places, Scale},
    report::{Report, Row},
};

/// Set in the environment of the process that is on its core.
const PINNED: &str = "WHARF_BENCH_PINNED";
/// Where results are kept.
const RESULTS: &str = "benches/results";
/// Where people read them, and between which marks.
const PLOTS: &str = "docs/plots";
const PAGE: &str = "docs/performance.md";
const README: &str = "README.md";
const TABLE: &str = "table";
const SOAK: &str = "soak";
/// What is measured, in this order.
const PARTS: [&str; 6] = ["gateway", "placement", "count", "control", "start", "overcommit"];

#[derive(Debug, Parser)]
#[command(about = "What is fast in Wharf, and against whom")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Measures, prints the table, and keeps it.
    Run {
        /// Fewer points and shorter rounds; compares with what was kept, and keeps nothing.
        #[arg(long)]
        quick: bool,
        /// Only these parts.
        #[arg(long, value_delimiter = ',', value_parser = PARTS)]
        only: Vec<String>,
    },
    /// Runs everything at once for half an hour, and looks what is left.
    Soak {
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        #[arg(long, default_value_t = 10_000)]
        models: usize,
    },
    /// Answers with what it was asked.
    #[command(hide = true)]
    Backend { at: SocketAddr },
    /// Plays a scheduler with its agents.
    #[command(hide = true)]
    Control {
        dir: PathBuf,
        #[command(flatten)]
        fleet: fleet::Fleet,
    },
    /// Does one of the functions that are counted, so many times.
    #[command(hide = true)]
    Function { id: String, times: u64 },
    /// Forwards and does nothing else.
    #[command(hide = true)]
    Floor { rest: SocketAddr, grpc: SocketAddr, to: SocketAddr },
}

/// As in the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Run { quick, only } => run(quick, &only),
        Role::Soak { minutes, models } => soak(minutes, models),
        Role::Backend { at } => alone(backend::serve(at)),
        Role::Control { dir, fleet } => self::fleet::play(&dir, fleet),
        Role::Function { id, times } => count::play(&id, times),
        Role::Floor { rest, grpc, to } => alone(floor::serve(rest, grpc, to)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a part that ends with whoever started it, on one thread.
fn alone(part: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    proc::end_with_parent();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, part)
}

/// Runs `part` on the load's core, with what it needs, and prints the table of what it reports.
fn pinned(
    plots: Option<&str>,
    part: impl FnOnce(&Places, &mut Report) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let this = std::env::current_exe()?;
    if std::env::var_os(PINNED).is_none() {
        let words = std::env::args_os().skip(1);
        let mut pinned = Command::new("taskset");
        pinned.arg("-c").arg(proc::LOAD_CORE.to_string()).arg(&this).args(words).env(PINNED, "1");
        return Err(pinned.exec()).context("can't start taskset (of util-linux)");
    }
    let began = Instant::now();
    ensure!(Path::new("benches/Cargo.toml").exists(), "run it where Wharf's Cargo.toml is");
    let wharf = this.with_file_name("wharf");
    ensure!(wharf.exists(), "{} is not built: cargo build --release", wharf.display());
    let dir = std::env::temp_dir().join(format!("wharf-bench-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let mut report = Report::begin();
    part(&Places { wharf, this, dir: dir.clone(), plots: plots.map(PathBuf::from) }, &mut report)?;
    report.seconds = began.elapsed().as_secs_f64();
    println!("\n{}\n{}", report.table(|_| true), report.origin());
    fs::remove_dir_all(&dir)?;
    Ok(report)
}

fn run(quick: bool, only: &[String]) -> anyhow::Result<()> {
    let results = Path::new(RESULTS);
    let wanted = PARTS.into_iter().filter(|part| only.is_empty() || only.iter().any(|wanted| wanted == part));
    if quick {
        return compare(results, wanted);
    }
    let report = pinned(Some(PLOTS), |places, report| {
        wanted.into_iter().try_for_each(|part| measure(part, places, false, report))
    })?;
    // A part of it is nothing to compare the whole with.
    if only.is_empty() {
        page(Path::new(PAGE), TABLE, &report, |_| true)?;
        page(Path::new(README), TABLE, &report, |row| row.goal.is_some())?;
        println!("kept as {}", report.keep(results)?.display());
    }
    Ok(())
}

/// One of the [`PARTS`].
fn measure(part: &str, places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    match part {
        "gateway" => gateway::measure(places, &if quick { Scale::quick() } else { Scale::full() }, report),
        "placement" => placement::measure(places, quick, report),
        "count" => count::measure(places, report),
        "control" => control::measure(places, quick, report),
        "start" => up::start(places, quick, report),
        "overcommit" => up::overcommit(places, quick, report),
        _ => anyhow::bail!("there is no part {part:?}"),
    }
}

/// Measures these parts in short, and fails where something became worse than in the last result that was kept. What
/// seems to be so is measured again: a neighbour of this machine disturbs a run, and seldom two.
fn compare(results: &Path, parts: impl Iterator<Item = &'static str>) -> anyhow::Result<()> {
    let before = Report::last(results)?;
    let report = pinned(None, |places, report| {
        for part in parts {
            let mut once = Report::default();
            measure(part, places, true, &mut once)?;
            if let Some(before) = &before
                && let worse = once.worse_than(before)
                && !worse.is_empty()
            {
                println!("worse than before, so once more:\n{}", texts(&worse));
                once = Report::default();
                measure(part, places, true, &mut once)?;
                let mut still = once.worse_than(before);
                still.retain(|(id, _)| worse.iter().any(|(known, _)| known == id));
                // At once: what is left to measure may take longer than there is time.
                ensure!(still.is_empty(), "worse than before, twice:\n{}", texts(&still));
            }
            report.rows.append(&mut once.rows);
        }
        Ok(())
    })?;
    let Some(before) = before else {
        println!("nothing to compare with: `make bench` keeps a result");
        return Ok(());
    };
    let compared = report.comparable(&before);
    println!("compared with {} at {}: {compared} of {} figures", before.date, before.commit, report.rows.len());
    ensure!(compared > 0, "nothing that was measured is in the result that was kept");
    println!("no ratio, and no count of instructions, is worse than its noise explains");
    Ok(())
}

fn texts(worse: &[(String, String)]) -> String {
    worse.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n")
}

fn soak(minutes: u64, models: usize) -> anyhow::Result<()> {
    let report = pinned(None, |places, report| soak::run(places, minutes, models, report))?;
    page(Path::new(PAGE), SOAK, &report, |_| true)?;
    println!("kept as {}", report.keep(&Path::new(RESULTS).join("soak"))?.display());
    Ok(())
}

/// One row on one line, while it is measured.
fn line(row: &Row) -> String {
    let rival = row.rival.as_ref().map_or_else(String::new, |rival| {
        format!(
            "{} {:.1}, ratio {:.3} ±{:.1} %",
            rival.name,
            rival.measure.median,
            rival.ratio.median,
            rival.ratio.spread * 100.0
        )
    });
    let met = row.met().map_or("", |met| if met { "met" } else { "MISSED" });
    format!("{:<60} {:>10.1} {:<6} {rival} {met}", row.what, row.wharf.median, row.unit)
}

/// Puts the table of those rows of `report` that are wanted into the page, between the marks named `mark`.
fn page(path: &Path, mark: &str, report: &Report, wanted: impl Fn(&Row) -> bool) -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(()) };
    let (begin, end) = (format!("<!-- {mark} -->\n"), format!("<!-- end of {mark} -->\n"));
    let (Some(from), Some(to)) = (text.find(&begin).map(|at| at + begin.len()), text.find(&end)) else { return Ok(()) };
    let table = format!("\n{}\n\n{}\n", report.origin(), report.table(wanted));
    fs::write(path, format!("{}{table}{}", &text[..from], &text[to..]))?;
    Ok(())
}
