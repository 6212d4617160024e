//! One run of a program: its start, its end, its stop.
//!
//! The rules of this module: a program that is to end with the agent is run through the shim, whose standard input the
//! agent holds, so nothing has to be done for it to end; one that is to outlive the agent is known by its number and its
//! start, which are on disk before it begins.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    process::{Child as Process, ChildStdin, Command},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    launch::{Launch, Ports},
    output::{Voice, follow, pass_on},
    proc::{session, started},
};
use crate::{
    agent::{artifacts::SECRET_PREFIX, disk, procfs::Proc},
    domain::memory::Bytes,
    settings::registry::{self, Lifetime},
};

/// How long the last words of a program may take to come.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How much longer than its program a shim may take to end.
const SHIM: Duration = Duration::from_secs(5);
/// How often it is looked whether a program still runs that is not a child.
const LOOK: Duration = Duration::from_millis(50);

/// How the names of variables begin that are the agent's credentials: secrets, and what opens stores and hubs. A program
/// runs what models bring, and is not to have them.
const PRIVATE: [&str; 7] =
    [SECRET_PREFIX, "AWS_", "AZURE_", "GOOGLE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RCLONE_"];

/// A program that runs, or ran.
#[derive(Debug)]
pub(super) struct Child {
    kind: Kind,
    voice: Voice,
    output: JoinSet<()>,
}

#[derive(Debug)]
enum Kind {
    /// It ends with the agent.
    Bound { shim: Process, pipe: Option<ChildStdin> },
    /// It outlives the agent. Who it is is kept in this folder.
    Alone { who: Identity, child: Option<Process>, folder: PathBuf },
}

/// A process, and no later one of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    pid: i32,
    started: u64,
}

impl Identity {
    fn runs(self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Itself and what it started: the processes of its session, unless its number is another's by now.
    fn session(self) -> Vec<i32> {
        let now = started(self.pid);
        if now.is_some_and(|started| started != self.started) {
            return Vec::new();
        }
        let mut all = session(self.pid);
        // A program that was started just now has no session of its own yet.
        if now.is_some() && !all.contains(&self.pid) {
            all.push(self.pid);
        }
        all
    }

    fn signal(self, signal: Signal) {
        for pid in self.session().into_iter().filter_map(Pid::from_raw) {
            // It may have ended since.
            kill_process(pid, signal).ok();
        }
    }

    async fn gone(self) {
        while self.runs() {
            sleep(LOOK).await;
        }
    }

    async fn all_gone(self) {
        while !self.session().is_empty() {
            sleep(LOOK).await;
        }
    }
}

/// What is kept of a program that outlives the agent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    ports: Ports,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    workdir: Option<PathBuf>,
}

fn kept_at(folder: &Path) -> PathBuf {
    folder.join("server.json")
}

fn number_at(folder: &Path) -> PathBuf {
    folder.join("server.pid")
}

fn empty_at(folder: &Path) -> PathBuf {
    folder.join("server.empty")
}

fn said_at(folder: &Path) -> PathBuf {
    folder.join("server.log")
}

fn kept(ports: &Ports, command: &registry::Command) -> Kept {
    Kept {
        ports: ports.clone(),
        argv: command.argv.clone(),
        env: command.env.clone().into_iter().collect(),
        workdir: command.workdir.clone(),
    }
}

/// The program that an earlier agent left running, if there is one.
fn left_running(folder: &Path) -> Option<Identity> {
    let text = std::fs::read_to_string(number_at(folder)).ok()?;
    let (pid, started) = text.trim().split_once(' ')?;
    let who = Identity { pid: pid.parse().ok()?, started: started.parse().ok()? };
    who.runs().then_some(who)
}

/// What the program is seen to have in memory before anything is loaded, also by an agent that took it up; nothing when
/// that can't be told. Blocks.
fn empty(path: &Path, kind: Option<Identity>, root: Root, adopted: bool) -> Option<Bytes> {
    let Some(Identity { pid, started }) = kind else { return root.memory() };
    let who = format!("{pid} {started} ");
    if adopted {
        let text = std::fs::read_to_string(path).ok()?;
        return text.trim().strip_prefix(&who)?.parse().ok().map(Bytes);
    }
    let bytes = root.memory()?;
    if let Err(error) = std::fs::write(path, format!("{who}{}\n", bytes.0)) {
        tracing::warn!(path = %path.display(), %error, "a file of an inference server can't be written");
    }
    Some(bytes)
}

fn voice(launch: &Launch) -> Voice {
    Voice::new(launch.replica.to_string(), launch.model.clone())
}

impl Child {
    /// Takes up what an earlier agent left running, if it is what is wanted now; stops it if it is not.
    pub(super) async fn adopt(launch: &Launch) -> Option<(Self, Ports)> {
        let folder = launch.data_dir.clone();
        let who = left_running(&folder)?;
        let before: Option<Kept> =
            std::fs::read(kept_at(&folder)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let voice = voice(launch);
        let said = said_at(&folder);
        let length = std::fs::metadata(&said).map_or(0, |metadata| metadata.len());
        let kind = Kind::Alone { who, child: None, folder };
        let mut child = Self { kind, voice: voice.clone(), output: JoinSet::new() };
        let same = before.filter(|before| {
            launch.command.lifetime == Lifetime::Independent
                && launch.filled(&before.ports).is_ok_and(|command| kept(&before.ports, &command) == *before)
        });
        let Some(before) = same else {
            tracing::info!(replica = %launch.replica, pid = who.pid, "the inference server that an earlier agent started is another than the one that is wanted, and is stopped");
            child.stop(launch.grace).await;
            return None;
        };
        child.output.spawn(follow(said, length, voice));
        Some((child, before.ports))
    }

    /// Starts the program.
    ///
    /// # Errors
    /// When there is nothing to start.
    pub(super) fn start(launch: &Launch, ports: &Ports) -> io::Result<Self> {
        let wanted = launch.filled(ports)?;
        if let Some(workdir) = wanted.workdir.as_ref().filter(|workdir| !workdir.is_dir()) {
            return Err(io::Error::other(format!("its workdir {} is no folder", workdir.display())));
        }
        std::fs::create_dir_all(&launch.repository)?;
        let mut command = Command::new(&launch.shim);
        command.arg0("wharf").arg("shim");
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if PRIVATE.iter().any(|begin| text.starts_with(begin)) {
                command.env_remove(&name);
            }
        }
        command.envs(&wanted.env);
        if let Some(workdir) = &wanted.workdir {
            command.current_dir(workdir);
        }
        match wanted.lifetime {
            Lifetime::Agent => Self::bound(launch, command, &wanted.argv),
            Lifetime::Independent => {
                let text = serde_json::to_vec(&kept(ports, &wanted))?;
                disk::write_whole(&kept_at(&launch.data_dir), &text)?;
                Self::alone(launch, command, &wanted.argv)
            }
        }
    }

    fn bound(launch: &Launch, mut command: Command, argv: &[String]) -> io::Result<Self> {
        // No signal of the agent's terminal reaches it.
        command.process_group(0);
        command.arg("--grace").arg(launch.grace.as_millis().to_string()).arg("--").args(argv);
        let mut shim = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (pipe, voice, mut output) = (shim.stdin.take(), voice(launch), JoinSet::new());
        if let Some(out) = shim.stdout.take() {
            output.spawn(pass_on(out, voice.clone()));
        }
        if let Some(err) = shim.stderr.take() {
            output.spawn(pass_on(err, voice.clone()));
        }
        Ok(Self { kind: Kind::Bound { shim, pipe }, voice, output })
    }

    fn alone(launch: &Launch, mut command: Command, argv: &[String]) -> io::Result<Self> {
        let folder = launch.data_dir.clone();
        let path = said_at(&folder);
        let said = std::fs::File::options().create(true).append(true).open(&path)?;
        let length = said.metadata()?.len();
        let number = std::path::absolute(number_at(&folder))?;
        command.arg("--detached").arg(number).arg("--").args(argv);
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
        let child = command.spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        let who = Identity { pid, started: started(pid).unwrap_or_default() };
        let (voice, mut output) = (voice(launch), JoinSet::new());
        output.spawn(follow(path, length, voice.clone()));
        Ok(Self { kind: Kind::Alone { who, child: Some(child), folder }, voice, output })
    }

    /// Waits until it has ended, and says how. Giving the wait up loses nothing.
    pub(super) async fn ended(&mut self) -> String {
        let status = match &mut self.kind {
            Kind::Bound { shim, .. } => shim.wait().await.ok(),
            Kind::Alone { child: Some(child), .. } => child.wait().await.ok(),
            Kind::Alone { who, child: None, .. } => {
                who.gone().await;
                None
            }
        };
        match &self.kind {
            Kind::Bound { .. } => {
                // Its ends of the pipes are closed.
                drop(timeout(LAST_WORDS, async { while self.output.join_next().await.is_some() {} }).await);
            }
            // What it leaves would hold its ports.
            Kind::Alone { who, .. } => who.signal(Signal::KILL),
        }
        let how = match status.map(|status| (status.code(), std::os::unix::process::ExitStatusExt::signal(&status))) {
            // As the shim tells of a signal.
            Some((Some(code @ 129..), _)) => format!("was killed by signal {}", code - 128),
            Some((Some(code), _)) => format!("ended with status {code}"),
            Some((None, Some(signal))) => format!("was killed by signal {signal}"),
            Some((None, None)) | None => "ended".to_owned(),
        };
        match self.voice.last() {
            last if last.is_empty() => how,
            last => format!("{how}; it last said: {last:.200}"),
        }
    }

    /// Asks it to stop, waits for `grace`, and kills it. Nothing of it is left when this returns, and nothing is kept of it
    /// for the next agent.
    pub(super) async fn stop(&mut self, grace: Duration) {
        match &mut self.kind {
            Kind::Bound { shim, pipe } => {
                drop(pipe.take());
                if timeout(grace + SHIM, shim.wait()).await.is_err() {
                    tracing::warn!("a shim does not end, and is killed");
                    // What it runs is bound to it.
                    drop(shim.start_kill());
                    drop(timeout(SHIM, shim.wait()).await);
                }
            }
            Kind::Alone { who, child, folder } => {
                who.signal(Signal::TERM);
                let mut gone = timeout(grace, who.all_gone()).await.is_ok();
                if !gone {
                    who.signal(Signal::KILL);
                    gone = timeout(SHIM, who.all_gone()).await.is_ok();
                }
                if let Some(child) = child {
                    drop(timeout(SHIM, child.wait()).await);
                }
                if gone {
                    forget(folder);
                } else {
                    tracing::error!(
                        pid = who.pid,
                        "an inference server can't be killed, and is left to the next agent"
                    );
                }
            }
        }
    }

    /// What it had in memory when it was ready and nothing was loaded. To be asked for when it is ready, and has not
    /// been asked to load anything, unless it was `adopted`.
    pub(super) async fn empty(&self, launch: &Launch, adopted: bool) -> Option<Bytes> {
        let (path, root) = (empty_at(&launch.data_dir), self.root()?);
        let who = match &self.kind {
            Kind::Bound { .. } => None,
            Kind::Alone { who, .. } => Some(*who),
        };
        tokio::task::spawn_blocking(move || empty(&path, who, root, adopted)).await.ok().flatten()
    }

    /// Where its processes begin, while it runs.
    pub(super) fn root(&self) -> Option<Root> {
        match &self.kind {
            Kind::Bound { shim, .. } => shim.id().map(Root::Shim),
            Kind::Alone { who, .. } => u32::try_from(who.pid).ok().map(Root::Program),
        }
    }
}

/// The first of a program's processes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Root {
    /// Its parent.
    Shim(u32),
    /// Itself.
    Program(u32),
}

impl Root {
    /// Its number.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Shim(pid) | Self::Program(pid) => pid,
        }
    }

    /// The memory of the program and of what it started, while it runs. Blocks.
    pub(super) fn memory(self) -> Option<Bytes> {
        match self {
            Self::Shim(pid) => Proc::default().below(pid),
            Self::Program(pid) => Proc::default().whole(pid),
        }
    }
}

/// Stops the inference server that an earlier agent left running for the replica of this folder, if there is one, and
/// forgets it. It has `grace` to stop by itself.
pub async fn stop_left(folder: &Path, grace: Duration) {
    let Some(who) = left_running(folder) else { return };
    tracing::info!(folder = %folder.display(), pid = who.pid, "an inference server that an earlier agent started is not wanted any more, and is stopped");
    let kind = Kind::Alone { who, child: None, folder: folder.to_owned() };
    let mut child = Child { kind, voice: Voice::new(String::new(), None), output: JoinSet::new() };
    child.stop(grace).await;
}

/// Forgets the program that was kept for the next agent.
fn forget(folder: &Path) {
    for path in [number_at(folder), kept_at(folder), empty_at(folder)] {
        remove(&path);
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file of an inference server can't be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_has_no_session_of_its_own_yet_is_stopped_all_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(number_at(folder.path()), "1 1").expect("written");
        let child = Command::new("sleep").arg("1000").kill_on_drop(true).spawn().expect("started");
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).expect("it runs");
        let who = Identity { pid, started: started(pid).expect("it runs") };
        let kind = Kind::Alone { who, child: Some(child), folder: folder.path().to_owned() };
        let mut alone = Child { kind, voice: Voice::new("a-0".to_owned(), None), output: JoinSet::new() };
        alone.stop(Duration::from_secs(60)).await;
        assert!(!who.runs(), "it was told to stop");
        assert!(!number_at(folder.path()).exists(), "and is forgotten");
    }
}
