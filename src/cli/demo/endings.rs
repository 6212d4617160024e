//! How the demo's process and its models end: by `kill -9`, and when they are unloaded.

use std::collections::BTreeMap;

use anyhow::anyhow;

use super::{
    ask::Outcome,
    cast::IRIS,
    cluster::{Cluster, Views, serves},
    scenes::Demo,
    story::{Promise, brief},
    traffic::Account,
};
use crate::{
    cli::output::counted,
    domain::{memory::Bytes, time::Instant},
    rpc::proto::wharf::ServerView,
};

impl Demo {
    pub(super) async fn kill(&mut self, cluster: Cluster) -> anyhow::Result<Cluster> {
        self.story.chapter("kill -9, and recovery");
        let old = self.target(IRIS)?.versions.keys().copied().max().unwrap_or_default();
        let (models, late) = (self.cast.models, self.cast.late);
        let (_, first) = self.samples.get(models[0].1)?;
        self.expect(IRIS, old + 1, first);
        let before =
            cluster.until("all models", |views| models.iter().all(|(name, _)| views.contains_key(*name))).await?;
        let traffic = self.traffic().await?;
        let mut acknowledged: BTreeMap<String, (u64, u32)> = BTreeMap::new();
        for (name, _) in models {
            let view = before.get(name).ok_or_else(|| anyhow!("{name} is gone"))?;
            acknowledged.insert(name.to_owned(), (view.uid, view.serving.unwrap_or_default()));
        }
        let (_, case) = self.samples.get(late.1)?;
        let answers = [self.send(&cluster, IRIS, models[0].1).await?, self.send(&cluster, late.0, late.1).await?];
        let accepted = self.story.now();
        self.wharf.kill()?;
        let killed = self.story.now();
        self.wharf.end().await?;
        let [new, added] = answers;
        self.story.tell(&format!(
            "{IRIS} version {} and {} version {} are acknowledged; killed {} later",
            new.version,
            late.0,
            added.version,
            brief(killed.since(accepted))
        ));
        acknowledged.insert(IRIS.to_owned(), (new.uid, new.version));
        acknowledged.insert(late.0.to_owned(), (added.uid, added.version));
        self.expect(late.0, added.version, case);
        drop(cluster);

        let id = self.wharf.start()?;
        self.story.tell(&format!("wharf up again, as process {id}, on the same folder and ports"));
        self.until_ready().await?;
        let cluster = self.connect().await?;
        let all = |views: &Views| {
            acknowledged.iter().all(|(name, (uid, version))| {
                serves(views, name, *version) && views.get(name).is_some_and(|view| view.uid == *uid)
            })
        };
        let back = cluster.until("everything that was acknowledged", all).await;
        if back.is_ok() {
            self.story.tell(&format!(
                "all {} models are Available {} after the kill",
                acknowledged.len(),
                brief(self.story.since(killed))
            ));
        }
        self.flow(&traffic, self.story.now()).await?;
        let account = traffic.stop().await?;
        self.recovered(&account, killed);
        back?;
        let right = self.ask_all(acknowledged.keys()).await?;
        self.story.tell(&format!("{right} of {} models give their right answer", acknowledged.len()));
        let seen = format!("{right} of {} models back, {IRIS} {} too", acknowledged.len(), new.version);
        self.story.show(Promise::Durable, seen, right == acknowledged.len());
        Ok(cluster)
    }

    /// What became of traffic over a kill: requests fail while nobody is there, and none afterwards.
    fn recovered(&mut self, account: &Account, killed: Instant) {
        self.account(account, true);
        let answers = account.records.iter().filter(|record| record.outcome.is_right() && record.began >= killed);
        let Some(first) = answers.map(|record| record.ended).min() else {
            self.story.show(Promise::Recovered, "no answer".to_owned(), false);
            return;
        };
        let gap = brief(first.since(killed));
        let bad = || account.records.iter().filter(|record| !record.outcome.is_right());
        let later = bad().filter(|record| record.began > first).count();
        let wrong = bad().filter(|record| matches!(record.outcome, Outcome::Wrong(_))).count();
        let without = account.failed() - later;
        self.story
            .tell(&format!("first answer {gap} after the kill; {without} requests failed until then, {later} after"));
        let seen = format!("after {gap}; {without} failed, {later} later");
        self.story.show(Promise::Recovered, seen, later == 0 && wrong == 0);
    }

    /// Asks every model once, and returns how many answered rightly.
    async fn ask_all(&self, names: impl Iterator<Item = &String>) -> anyhow::Result<usize> {
        let mut right = 0;
        for name in names {
            right += usize::from(self.right(&self.asker.rest(self.target(name)?).await));
        }
        Ok(right)
    }

    pub(super) async fn unload(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.story.chapter("Unload everything");
        let names: Vec<String> = self.targets.keys().cloned().collect();
        let began = self.story.now();
        for name in &names {
            cluster.unload(name).await?;
        }
        let ended = |views: &Views| {
            names
                .iter()
                .all(|name| views.get(name).is_some_and(|view| view.deleted && view.state.ends_with("Terminated")))
        };
        cluster.until("the end of all models", ended).await?;
        self.story.tell(&format!("{} models are terminated after {}", names.len(), brief(self.story.since(began))));
        let empty = |server: &ServerView| {
            server.replicas.iter().all(|replica| (replica.copies, replica.registered, replica.resident) == (0, 0, 0))
        };
        let server = cluster.server_until("free memory", empty).await?;
        let resident: u64 = server.replicas.iter().map(|replica| replica.resident).sum();
        let left: u32 = server.replicas.iter().map(|replica| replica.copies).sum();
        let mut unknown = 0;
        for name in &names {
            let outcome = self.asker.rest(self.target(name)?).await;
            unknown += usize::from(matches!(outcome, Outcome::Failed { kind, .. } if kind == "REST 404"));
        }
        let copies = counted(left, "copy", "copies");
        self.story.tell(&format!(
            "{copies} left, {} in use; {unknown} of {} names answer 404",
            Bytes(resident),
            names.len()
        ));
        let seen = format!("{copies}, {} left of {} models", Bytes(resident), names.len());
        self.story.show(Promise::Unload, seen, unknown == names.len() && left == 0 && resident == 0);
        Ok(())
    }
}
