//! Inference servers that are processes of their own: what becomes of models when one is killed, and that none is left.
//!
//! The rule of this module: a process is the demo's if its command line names the demo's folder, and no other is touched.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::{
    cast::{IRIS, REPLICAS},
    cluster::{Cluster, Views, answering},
    scenes::Demo,
    story::{Promise, brief},
};

/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long processes may take to be gone after the one that they end with.
const GONE: Duration = Duration::from_secs(30);

/// Processes whose command line names this path, with their command lines.
fn naming(path: &Path) -> Vec<(i32, String)> {
    let path = path.display().to_string();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let lines = pids.filter_map(|pid| {
        // One that has ended has no command line, or none any more.
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(&path)).collect()
}

impl Demo {
    /// The process of a replica's inference server, while it runs.
    fn server_of(&self, replica: u32) -> Option<i32> {
        let folder = self.wharf.folder().join("agent").join(format!("{}-{replica}", self.cast.server));
        // Beside it runs what ends it with its agent.
        let server = naming(&folder).into_iter().find(|(_, line)| !line.contains(" shim "));
        server.map(|(pid, _)| pid)
    }

    /// SIGKILL of one inference server under traffic, while the other has copies too.
    pub(super) async fn crash(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.story.chapter("SIGKILL of an inference server, and its return");
        let asked: Vec<&str> = self.cast.models.iter().take(2).map(|(name, _)| *name).collect();
        // Whose copy is asked has it in memory; the other one comes with its load.
        let traffic = self.traffic().await?;
        for name in &asked {
            cluster.scale(name, REPLICAS).await?;
        }
        let resident = |views: &Views, name: &str| {
            let copies = views.get(name).into_iter().flat_map(answering);
            u32::try_from(copies.filter(|copy| copy.residency == "resident").count()).unwrap_or(u32::MAX)
        };
        let on_both = |views: &Views| asked.iter().all(|name| resident(views, name) == REPLICAS);
        cluster.until("copies on both replicas", on_both).await?;
        let victim = self.server_of(0).ok_or_else(|| anyhow!("no process of {}-0 is found", self.cast.server))?;
        let killed = self.story.now();
        kill_process(Pid::from_raw(victim).context("no number of a process")?, Signal::KILL)?;
        self.story.tell(&format!("{}-0, process {victim}, is killed; {IRIS} has a copy on each", self.cast.server));
        cluster.until("a copy that is gone", |views| resident(views, IRIS) < REPLICAS).await?;
        cluster.until("both copies", on_both).await?;
        let back = brief(self.story.since(killed));
        let again = self.server_of(0).filter(|again| *again != victim);
        let again = again.ok_or_else(|| anyhow!("{}-0 is back, and no process of it is found", self.cast.server))?;
        self.story.tell(&format!("it is back after {back}, as process {again}, with its copies in memory"));
        self.flow(&traffic, self.story.now()).await?;
        let clients = traffic.clients();
        let account = traffic.stop().await?;
        self.account(&account, true);
        // Whoever asks one thing after another had one request with the server at most.
        self.story.tell(&format!("{clients} clients: so many requests at most were with the server that was killed"));
        let seen = format!("{} of {} failed; back in {back}", account.failed(), account.sent());
        self.story.show(Promise::Restarted, seen, account.failed() <= clients);
        Ok(())
    }

    /// `kill -9` of the process, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When something does not go.
    pub(super) async fn end(&mut self) -> anyhow::Result<()> {
        self.wharf.end().await?;
        let began = self.story.now();
        loop {
            let left = naming(self.wharf.folder());
            let Some((pid, line)) = left.first() else { return Ok(()) };
            if self.story.since(began) > GONE {
                bail!("{} processes do not go; the first is {pid}: {line}", left.len());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
