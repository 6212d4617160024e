//! `wharf shim`: stands between an agent and a program that the agent runs, so that the program never outlives it.
//!
//! The rules of this module: the shim's standard input is a pipe whose other end the agent holds and nobody else has.
//! However the agent ends, the pipe ends with it, and then the program's group is asked to stop, waited for, and killed.
//! Nothing that the program started is left: the shim adopts what loses its parent, and ends only when it has no
//! children. It ends as the program did.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    pin::pin,
    process::{Command, ExitCode, ExitStatus, Stdio},
    time::Duration,
};

use clap::Args as ClapArgs;
use rustix::{
    io::Errno,
    process::{
        Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getpid, getppid, kill_process, kill_process_group,
        set_child_subreaper, set_parent_process_death_signal, setsid, wait, waitid,
    },
};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    sync::mpsc::{UnboundedSender, unbounded_channel},
    time::sleep,
};

use super::{Output, failure::Failure};

/// This program, also when its file has been replaced since it started.
const SELF: &str = "/proc/self/exe";
/// How often it is looked whether all children are gone.
const LOOK: Duration = Duration::from_millis(10);
/// What shells answer for a program that is not there, and for one that can't be run.
const NOT_FOUND: u8 = 127;
const NOT_RUNNABLE: u8 = 126;

/// How a program is run for an agent.
#[derive(Debug, ClapArgs)]
pub(crate) struct Shim {
    /// How long the program may take to stop before it is killed, in milliseconds.
    #[arg(long, value_name = "MILLIS", default_value_t = 10_000)]
    pub(crate) grace: u64,
    /// Become the program, which is killed when the shim of this number ends.
    #[arg(long, value_name = "PROCESS", conflicts_with = "detached")]
    pub(crate) bound: Option<i32>,
    /// Become the program, in a session of its own, with this process's number and start written to a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) detached: Option<PathBuf>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// What a shim waits for.
enum Event {
    /// The agent is gone, or wants the program to stop.
    LetGo,
    /// The program ended.
    Ended,
}

/// Runs the program, or becomes it.
pub(super) async fn run(shim: &Shim, output: &Output) -> ExitCode {
    let Some((program, arguments)) = shim.command.split_first() else { return ExitCode::from(NOT_FOUND) };
    let done = match (shim.bound, &shim.detached) {
        (Some(parent), _) => Err(bound(parent, program, arguments)),
        (None, Some(path)) => Err(detached(path, program, arguments)),
        (None, None) => watch(Duration::from_millis(shim.grace), &shim.command).await,
    };
    match done {
        Ok(status) => ExitCode::from(code(status)),
        Err(error) => {
            output.failure(&Failure::Failed(format!("can't run {}: {error}", program.display())));
            ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUNNABLE })
        }
    }
}

/// The status by which a shell tells how a program ended.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal + 128)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// Becomes the program, which the system kills when the shim `parent` ends.
fn bound(parent: i32, program: &OsString, arguments: &[OsString]) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // It may have ended before the system was told.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        return io::Error::other("its shim has ended");
    }
    Command::new(program).args(arguments).exec()
}

/// Becomes the program in a session of its own, which no end of the agent or its terminal reaches. Who it is is on disk
/// before it begins.
fn detached(path: &Path, program: &OsString, arguments: &[OsString]) -> io::Error {
    let kept = setsid().map_err(io::Error::from).and_then(|_| {
        let pid = getpid().as_raw_pid();
        let stat = fs::read_to_string("/proc/self/stat")?;
        let started = crate::agent::process::start_of(&stat).unwrap_or_default();
        let new = path.with_extension("new");
        fs::write(&new, format!("{pid} {started}\n"))?;
        fs::rename(new, path)
    });
    match kept {
        Ok(()) => Command::new(program).args(arguments).exec(),
        Err(error) => error,
    }
}

async fn watch(grace: Duration, command: &[OsString]) -> io::Result<ExitStatus> {
    // Who stops the agent's whole service means the agent, which then lets go of the program when it is ready to.
    let _deaf = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    set_child_subreaper(Some(getpid()))?;
    let me = getpid().as_raw_pid().to_string();
    let mut bound = Command::new(SELF);
    bound.arg0("wharf").args(["shim", "--bound", &me, "--"]).args(command);
    // From this thread, which lives as long as the shim: the program is bound to the thread that made it.
    let mut child = bound.stdin(Stdio::null()).process_group(0).spawn()?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("no number"))?;
    let (send, mut events) = unbounded_channel();
    listen(send.clone());
    heed(send, group);

    let mut ended = matches!(events.recv().await, Some(Event::Ended));
    let asked = !ended;
    // One grace for all of it: the agent waits no longer.
    let mut over = pin!(sleep(grace));
    if asked {
        signal_group(group, Signal::TERM);
        let end = async { while !matches!(events.recv().await, Some(Event::Ended) | None) {} };
        ended = select! {
            () = over.as_mut() => false,
            () = end => true,
        };
    }
    // Until it is waited for, its number is nobody else's.
    if !asked || !ended {
        signal_group(group, Signal::KILL);
    }
    let status = child.wait()?;
    // What it started and left: workers that were asked too, and whoever left the group.
    let mut patient = asked && ended;
    while !childless() {
        if !patient {
            kill_children();
            sleep(LOOK).await;
            continue;
        }
        select! {
            () = over.as_mut() => patient = false,
            () = sleep(LOOK) => {}
        }
    }
    Ok(status)
}

/// Tells when the agent's end of the pipe is closed.
fn listen(events: UnboundedSender<Event>) {
    std::thread::spawn(move || {
        let mut input = io::stdin();
        let mut bytes = [0; 64];
        while matches!(input.read(&mut bytes), Ok(1..)) {}
        // Nobody listens any more when the program ended by itself.
        drop(events.send(Event::LetGo));
    });
}

/// Tells when the program has ended, and leaves it to be waited for.
fn heed(events: UnboundedSender<Event>, program: Pid) {
    std::thread::spawn(move || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while matches!(waitid(WaitId::Pid(program), options), Err(Errno::INTR)) {}
        drop(events.send(Event::Ended));
    });
}

fn signal_group(group: Pid, signal: Signal) {
    // A group in which nobody is left needs no signal.
    kill_process_group(group, signal).ok();
}

/// Waits for what has ended; true when there are no children any more.
fn childless() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// Kills every child; what they leave is adopted, and killed next time.
fn kill_children() {
    let me = getpid().as_raw_pid();
    let Ok(all) = fs::read_dir("/proc") else { return };
    for entry in all.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if crate::agent::process::parent_of(&stat) == Some(me) {
            // It may have ended meanwhile.
            kill_process(pid, Signal::KILL).ok();
        }
    }
}
