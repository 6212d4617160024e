//! The rclone program: started at first use, started again when it ended, and never left behind.
//!
//! It listens on a socket in a folder of mode 0700; one that is too old for that, on a port of the loopback
//! interface behind a password. Neither credentials nor the password are on its command line.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Split},
    process::{Child, ChildStderr, ChildStdin, Command},
    sync::mpsc,
    task::JoinSet,
};

use super::call::{Address, CallError, USER};
use crate::domain::{
    copy::{Failure, FailureClass},
    secret::Secret,
};

/// Longest wait for it to come up.
const START: Duration = Duration::from_secs(15);
/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(20);
/// The first and the longest pause before it is started again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Longest path of a socket that every system takes.
const SOCKET: usize = 100;
/// Jobs that wait to be stopped.
const STOPS: usize = 256;

/// Runs what follows it until that ends or standard input does, which is when the agent is gone, however it went.
const GUARD: &str = r#"
exec 3<&0
"$@" </dev/null 3<&- &
child=$!
{ read -r _ <&3; kill "$child"; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
wait "$child"
code=$?
kill "$watch" 2>/dev/null
exit "$code"
"#;

/// What it prints, line by line.
type Said = Split<BufReader<ChildStderr>>;

/// How the program is run.
#[derive(Clone, Debug)]
pub struct RcloneOptions {
    /// Its name or path.
    pub program: String,
    /// Its configuration, with remotes that models may name.
    pub config: Option<PathBuf>,
    /// A folder of the agent's for its socket.
    pub folder: PathBuf,
    /// Variables of the environment that are not for it.
    pub hidden: Vec<String>,
}

/// The program, running or not.
#[derive(Debug)]
pub(super) struct Program {
    options: RcloneOptions,
    parallel: usize,
    /// Bytes a second; 0 sets no bound.
    rate: u64,
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Arc<Running>>,
    child: Option<Child>,
    /// Starts in a row after which it did not stay.
    starts: u32,
}

/// A running program. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) address: Address,
    /// How many jobs have got their names.
    pub(super) jobs: AtomicU64,
    stops: mpsc::Sender<String>,
    /// Closed when dropped, which ends the program.
    _alive: Option<ChildStdin>,
    _tasks: JoinSet<()>,
}

impl Running {
    /// Has the jobs of a group stopped, soon.
    pub(super) fn stop(&self, group: String) {
        if self.stops.try_send(group).is_err() {
            tracing::warn!("a download of rclone's can't be stopped; it goes on until its folder is used again");
        }
    }
}

impl Program {
    pub(super) fn new(options: RcloneOptions, parallel: usize, rate: u64) -> Self {
        Self { options, parallel, rate, state: tokio::sync::Mutex::default() }
    }

    /// The running program; starts it when it does not run.
    pub(super) async fn running(&self) -> Result<Arc<Running>, Failure> {
        let mut state = self.state.lock().await;
        let alive = state.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if let Some(running) = state.running.as_ref().filter(|_| alive) {
            return Ok(Arc::clone(running));
        }
        if state.running.take().is_some() {
            tracing::warn!("rclone ended and is started again");
        }
        if state.starts > 0 {
            let pause = AGAIN.0.saturating_mul(1_u32.checked_shl(state.starts - 1).unwrap_or(u32::MAX));
            tokio::time::sleep(pause.min(AGAIN.1)).await;
        }
        state.starts = state.starts.saturating_add(1);
        let (running, child) = self.start().await?;
        let running = Arc::new(running);
        (state.running, state.child) = (Some(Arc::clone(&running)), Some(child));
        Ok(running)
    }

    /// Is told that it did what it was asked.
    pub(super) async fn proved(&self) {
        self.state.lock().await.starts = 0;
    }

    async fn start(&self) -> Result<(Running, Child), Failure> {
        let folder = std::path::absolute(&self.options.folder).unwrap_or_else(|_| self.options.folder.clone());
        let socket = folder.join("socket");
        let cache = folder.join("cache");
        prepare(&folder, &[&socket, &cache]).map_err(|error| {
            let message = format!("rclone can't be started: the folder {} can't be used: {error}", folder.display());
            failed(message)
        })?;
        if socket.as_os_str().len() <= SOCKET {
            let address = format!("unix://{}", socket.display());
            let (mut child, stdin, mut said) = self.spawn(&folder, &address, None)?;
            match come_up(&mut child, &mut said, |_| Some(Address::Socket(socket.clone()))).await {
                Ok(address) => return Ok((run(address, stdin, said), child)),
                // Before 1.61 it takes a socket's path for a host and a port.
                Err(Start::Ended(words)) if words.contains("start server failed") => {
                    tracing::info!("this rclone can't listen on a socket; it listens on the loopback interface");
                }
                Err(problem) => return Err(self.problem(&problem)),
            }
        }
        let password = password().map_err(|error| failed(format!("rclone can't be started: {error}")))?;
        let (mut child, stdin, mut said) = self.spawn(&folder, "127.0.0.1:0", Some(&password))?;
        let login = Secret::new(basic(USER, password.expose()));
        let found = |line: &str| {
            let port = line.split_once("http://127.0.0.1:")?.1;
            let end = port.find(|c: char| !c.is_ascii_digit()).unwrap_or(port.len());
            Some(Address::Port(port[..end].parse().ok()?, login.clone()))
        };
        let up = come_up(&mut child, &mut said, found).await;
        let address = up.map_err(|problem| self.problem(&problem))?;
        Ok((run(address, stdin, said), child))
    }

    fn spawn(
        &self,
        folder: &Path,
        address: &str,
        password: Option<&Secret>,
    ) -> Result<(Child, Option<ChildStdin>, Said), Failure> {
        let mut command = Command::new("sh");
        command.args(["-c", GUARD, "sh", &self.options.program, "rcd", "--rc-addr", address, "--log-level", "NOTICE"]);
        command.args(["--use-json-log=false", "--transfers", &self.parallel.to_string()]);
        command.arg("--cache-dir").arg(folder.join("cache"));
        command.arg("--config").arg(self.options.config.as_deref().unwrap_or(Path::new("/dev/null")));
        if self.rate > 0 {
            command.args(["--bwlimit", &format!("{}B", self.rate)]);
        }
        match password {
            None => command.arg("--rc-no-auth"),
            Some(password) => command.env("RCLONE_RC_USER", USER).env("RCLONE_RC_PASS", password.expose()),
        };
        // rclone 1.60 reaches no S3 while this is set.
        command.env_remove("AWS_CA_BUNDLE");
        for name in &self.options.hidden {
            command.env_remove(name);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed(format!("rclone can't be started: sh: {error}")))?;
        let stdin = child.stdin.take();
        let stderr = child
            .stderr
            .take()
            .ok_or_else(|| failed("rclone can't be started: it has no standard error".to_owned()))?;
        Ok((child, stdin, BufReader::new(stderr).split(b'\n')))
    }

    fn problem(&self, problem: &Start) -> Failure {
        let program = &self.options.program;
        failed(match problem {
            Start::Missing => format!(
                "rclone is needed for this URI, and the program {program} was not found on the agent's machine; install \
                 rclone 1.60 or later there, or set agent.rclone_program"
            ),
            Start::Ended(words) if words.is_empty() => format!("rclone can't be started: {program} ended at once"),
            Start::Ended(words) => format!("rclone can't be started: {program} ended at once and said: {words}"),
            Start::Silent => format!("rclone can't be started: {program} was not there within {} s", START.as_secs()),
        })
    }
}

/// Why it did not come up.
enum Start {
    Missing,
    Ended(String),
    Silent,
}

/// Waits until the program answers. `found` tells its address from a line that it printed.
async fn come_up(
    child: &mut Child,
    said: &mut Said,
    found: impl Fn(&str) -> Option<Address>,
) -> Result<Address, Start> {
    let waiting = async {
        let mut last = String::new();
        let mut address = found("");
        let text = |line: Vec<u8>| String::from_utf8_lossy(&line).trim().to_owned();
        loop {
            tokio::select! {
                biased;
                ended = child.wait() => {
                    // What it said last comes after it.
                    while let Ok(Ok(Some(line))) = tokio::time::timeout(LOOK, said.next_segment()).await {
                        last = text(line);
                    }
                    let missing = ended.is_ok_and(|status| matches!(status.code(), Some(126 | 127)));
                    return Err(if missing { Start::Missing } else { Start::Ended(last) });
                }
                read = said.next_segment() => {
                    if let Ok(Some(line)) = read {
                        last = text(line);
                        address = address.or_else(|| found(&last));
                    } else {
                        tokio::time::sleep(LOOK).await;
                    }
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            if let Some(address) = &address
                && address.call("rc/noop", &json!({})).await.is_ok()
            {
                return Ok(address.clone());
            }
        }
    };
    tokio::time::timeout(START, waiting).await.unwrap_or(Err(Start::Silent))
}

fn run(address: Address, alive: Option<ChildStdin>, mut said: Said) -> Running {
    let (stops, mut stopping) = mpsc::channel(STOPS);
    let mut tasks = JoinSet::new();
    // What it prints is read, or it would stop; it is not passed on, as there may be addresses with secrets in it.
    tasks.spawn(async move { while let Ok(Some(_)) = said.next_segment().await {} });
    let at = address.clone();
    tasks.spawn(async move {
        while let Some(group) = stopping.recv().await {
            let input = json!({ "group": group });
            let first = at.call("job/stopgroup", &input).await;
            // The call that started it may have been on its way.
            tokio::time::sleep(LOOK).await;
            let stopped = at.call("job/stopgroup", &input).await.or(first);
            if let Err(CallError::Gone(problem) | CallError::Failed(problem)) = stopped {
                tracing::warn!(problem, "a download of rclone's can't be stopped");
            }
        }
    });
    Running { address, jobs: AtomicU64::new(0), stops, _alive: alive, _tasks: tasks }
}

fn failed(message: String) -> Failure {
    Failure { class: FailureClass::Runtime, message }
}

/// Makes the folder the agent's alone, and removes what an earlier program left there.
fn prepare(folder: &Path, left: &[&Path]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    left.iter().try_for_each(|path| crate::agent::disk::remove(path))
}

fn password() -> Result<Secret, String> {
    let half = || getrandom::u64().map_err(|error| error.to_string());
    Ok(Secret::new(format!("{:016x}{:016x}", half()?, half()?)))
}

/// What HTTP wants of a user and a password.
fn basic(user: &str, password: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let text = format!("{user}:{password}");
    let mut out = String::from("Basic ");
    for three in text.as_bytes().chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or_default());
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            out.push(if digit <= three.len() as u32 { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    out
}

/// A value of an answer, by its name.
pub(super) fn number(value: &Value, name: &str) -> Option<u64> {
    value.get(name)?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_written_as_http_wants_it() {
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("u", "p"), "Basic dTpw");
    }
}
