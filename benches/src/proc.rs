//! Processes that are measured: each on one core, with what the kernel says it has used.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

/// One core for the load and the backends, another one for what is measured.
pub(crate) const LOAD_CORE: usize = 0;
/// See [`LOAD_CORE`].
pub(crate) const PROXY_CORE: usize = 1;

/// What a file of the system says of `name`; empty where it says nothing.
pub(crate) fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_once(':').map_or("", |(_, value)| value.trim()).to_owned()
}

/// Memory of this machine in bytes: `MemTotal`, or `MemAvailable` for what is not in use.
pub(crate) fn system_memory(which: &str) -> Option<u64> {
    let kibibytes: u64 = field("/proc/meminfo", which).trim_end_matches(" kB").parse().ok()?;
    Some(kibibytes << 10)
}

/// A process that ends with this value.
#[derive(Debug)]
pub(crate) struct Proc {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Proc {
    /// Starts `command` on `core`; what it says goes to a file in `dir`.
    pub(crate) fn start(name: &str, core: usize, command: &[String], dir: &Path) -> anyhow::Result<Self> {
        Self::start_on(name, &core.to_string(), command, dir)
    }

    /// The same on any `cores`, as `taskset -c` has them.
    pub(crate) fn start_on(name: &str, cores: &str, command: &[String], dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log)?;
        // `taskset` becomes the program, so the process that is started here is the one that is measured.
        let child = Command::new("taskset")
            .arg("-c")
            .arg(cores)
            .args(command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("can't start {name} with taskset (of util-linux)"))?;
        Ok(Self { child, name: name.to_owned(), log })
    }

    /// Waits until `address` takes connections.
    pub(crate) fn listening(&mut self, address: SocketAddr, within: Duration) -> anyhow::Result<()> {
        self.until(within, || TcpStream::connect(address).is_ok())
    }

    /// Waits until `ready`.
    pub(crate) fn until(&mut self, within: Duration, mut ready: impl FnMut() -> bool) -> anyhow::Result<()> {
        let began = Instant::now();
        while !ready() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || began.elapsed() > within {
                let said = fs::read_to_string(&self.log).unwrap_or_default();
                let said: String = said.chars().rev().take(2000).collect::<Vec<_>>().into_iter().rev().collect();
                bail!("{} is not ready ({ended:?}); it said:\n{said}", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The CPU time of all its threads that live.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu(self.child.id())
    }

    /// Open file descriptors.
    pub(crate) fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Threads.
    pub(crate) fn threads(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/task", self.child.id()))?.count())
    }

    /// Bytes of memory that are resident.
    pub(crate) fn memory(&self) -> anyhow::Result<u64> {
        memory(self.child.id())
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The CPU time of all threads of process `id`, exact to the kernel's clock.
pub(crate) fn cpu(id: u32) -> anyhow::Result<Duration> {
    let mut total = 0_u64;
    for task in fs::read_dir(format!("/proc/{id}/task"))? {
        // A thread may end between the two.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).context("schedstat is strange")?;
    }
    ensure!(total > 0, "the kernel has no schedstat; it needs CONFIG_SCHED_INFO");
    Ok(Duration::from_nanos(total))
}

/// Bytes of memory of process `id` that are resident.
pub(crate) fn memory(id: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// All cores of this machine, whatever this process may use.
pub(crate) fn all_cores() -> String {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    if online.trim().is_empty() { format!("{LOAD_CORE}-{PROXY_CORE}") } else { online.trim().to_owned() }
}

/// An address of loopback that was free a moment ago.
pub(crate) fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Ends this process when the one that started it is gone.
pub(crate) fn end_with_parent() {
    let parent = std::os::unix::process::parent_id();
    std::thread::spawn(move || {
        while std::os::unix::process::parent_id() == parent {
            std::thread::sleep(Duration::from_secs(1));
        }
        std::process::exit(0);
    });
}

/// Lets this thread run whenever it has something to do, before all others of the machine. It stands for a client on another
/// machine: the wait for a core of this one would be its own, and none of whom it asks. Where that is not allowed, to others
/// than root, it waits like all, and `chrt` says so.
pub(crate) fn come_first() {
    let here = fs::read_link("/proc/thread-self").unwrap_or_default();
    if let Some(thread) = here.file_name() {
        // Its words go where errors go: what this process says is read by the one that started it.
        let chrt = Command::new("chrt").args(["--fifo", "--pid", "1"]).arg(thread).stdout(Stdio::null()).status();
        if let Err(error) = chrt {
            eprintln!("can't start chrt (of util-linux), so who asks for status waits for a core too: {error}");
        }
    }
}
