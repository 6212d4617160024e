//! The process that the demo plays with: a `wharf up` of its own, in a folder of its own.
//!
//! The rule of this module: the process ends before the demo does, and its folder goes with it.

use std::{
    fs::{self, File},
    io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};

/// Ports below the range that systems give to connections, so that no connection takes one between a kill and the
/// restart.
const PORTS: std::ops::Range<u16> = 15_000..30_000;
/// Tries to find a free port.
const TRIES: u32 = 1_000;
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(10);
/// Lines of the log that a failure shows.
const SHOWN: usize = 40;

/// The addresses of the process.
#[derive(Clone, Debug)]
pub(super) struct Addresses {
    pub(super) api: String,
    pub(super) agents: String,
    pub(super) page: String,
    pub(super) gateway: String,
}

impl Addresses {
    /// Four addresses where nothing listens now.
    fn free() -> anyhow::Result<Self> {
        // Held until all are found, so that no two are the same.
        let mut held = Vec::new();
        for _ in 0..TRIES {
            let span = u64::from(PORTS.end - PORTS.start);
            let pick = getrandom::u64().context("the system gives no random numbers")? % span;
            let port = PORTS.start + u16::try_from(pick).unwrap_or_default();
            held.extend(TcpListener::bind(("127.0.0.1", port)).ok().map(|listener| (listener, port)));
            if let [(_, api), (_, agents), (_, page), (_, gateway)] = held.as_slice() {
                let at = |port: &u16| format!("127.0.0.1:{port}");
                return Ok(Self { api: at(api), agents: at(agents), page: at(page), gateway: at(gateway) });
            }
        }
        bail!("found no free ports on 127.0.0.1 from {} to {}", PORTS.start, PORTS.end)
    }
}

/// A folder that is removed with this.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        let random = getrandom::u64().context("the system gives no random numbers")?;
        let path = std::env::temp_dir().join(format!("wharf-demo-{}-{random:016x}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("can't create the folder {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nobody is left to tell, and the system clears this folder in the end.
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A process, or the place where it ran and can run again.
#[derive(Debug)]
pub(super) struct Wharf {
    // Before the folder: what is dropped first is the process.
    child: Option<Child>,
    addresses: Addresses,
    folder: Folder,
    /// Settings beyond those that every process of the demo has.
    settings: Vec<(&'static str, String)>,
}

impl Wharf {
    /// A place for a process with these files, and with the settings that follow from where they are; nothing runs yet.
    ///
    /// # Errors
    /// When there is no room for one.
    pub(super) fn new(
        files: &[(&str, String)],
        settings: impl FnOnce(&Path) -> Vec<(&'static str, String)>,
    ) -> anyhow::Result<Self> {
        let mut wharf =
            Self { child: None, addresses: Addresses::free()?, folder: Folder::new()?, settings: Vec::new() };
        wharf.settings = settings(wharf.folder());
        for (name, text) in files {
            let path = wharf.path(name);
            fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
        }
        Ok(wharf)
    }

    pub(super) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder.0
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    /// Starts the process and returns its number.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) fn start(&mut self) -> anyhow::Result<u32> {
        let program = std::env::current_exe().context("can't tell which program this is")?;
        let log = File::options().create(true).append(true).open(self.path("log")).context("can't write a log")?;
        let at = &self.addresses;
        let folder = |name: &str| self.path(name).display().to_string();
        let settings = [
            ("scheduler.listen", at.api.clone()),
            ("scheduler.agents", at.agents.clone()),
            ("scheduler.http", at.page.clone()),
            ("gateway.listen", at.gateway.clone()),
            ("scheduler.servers", folder("servers.toml")),
            ("scheduler.data_dir", folder("scheduler")),
            ("agent.data_dir", folder("agent")),
        ];
        let mut command = Command::new(program);
        command.arg("up").arg("--with-parent").arg(std::process::id().to_string()).args(["--color", "never"]);
        for (name, value) in settings.iter().chain(&self.settings) {
            command.arg("--set").arg(format!("{name}={value}"));
        }
        // The demo is the same wherever it runs: no setting of this shell reaches it.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with(crate::settings::PREFIX) {
                command.env_remove(name);
            }
        }
        command.current_dir(self.folder()).stdin(Stdio::null()).kill_on_drop(true);
        command.stdout(log.try_clone().context("can't write a log")?).stderr(log);
        let child = command.spawn().context("can't start `wharf up`")?;
        let id = child.id().unwrap_or_default();
        self.child = Some(child);
        Ok(id)
    }

    /// How the process ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(status.to_string())
    }

    /// `kill -9`: the signal is sent when this returns.
    ///
    /// # Errors
    /// When it can't be sent.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        let Some(child) = &mut self.child else { return Ok(()) };
        match child.start_kill() {
            // It has ended by itself.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            killed => killed.context("can't kill `wharf up`"),
        }
    }

    /// `kill -9`, and waits until the process is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub(super) async fn end(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let gone = tokio::time::timeout(GONE, child.wait()).await;
        gone.context("`wharf up` does not go")?.context("can't wait for `wharf up`")?;
        Ok(())
    }

    /// The last lines that the process wrote.
    pub(super) fn log(&self) -> Vec<String> {
        let text = fs::read(self.path("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN)..].iter().map(|line| (*line).to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_owner_whatever_is_in_it() {
        let wharf = Wharf::new(&[("servers.toml", "text".to_owned())], |_| Vec::new()).unwrap();
        let folder = wharf.folder().to_owned();
        assert_eq!(fs::read_to_string(folder.join("servers.toml")).unwrap(), "text");
        fs::create_dir_all(folder.join("deep/er")).unwrap();
        drop(wharf);
        assert!(!folder.exists());
    }

    #[test]
    fn addresses_differ() {
        let free = Addresses::free().unwrap();
        let mut all = vec![free.api, free.agents, free.page, free.gateway];
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4);
    }
}
