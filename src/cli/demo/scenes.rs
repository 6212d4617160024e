//! The life of a model, scene by scene. Every number that is told was measured in this run.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    ask::{Asker, Outcome, Target, grpc, grpc_request},
    cast::{Cast, HELD, IRIS, REPLICAS},
    child::Wharf,
    cluster::{Cluster, Views, answering, serves},
    samples::{Case, Samples},
    story::{Promise, Story, brief, median},
    traffic::{Account, Traffic},
};
use crate::{
    cli::output::counted,
    domain::{memory::Bytes, time::Instant},
    rpc::proto::wharf::{ReplicaView, ServerView, SubmitModelResponse},
};
use anyhow::{Context as _, anyhow, bail};

/// Requests for a median.
const ASKED: usize = 200;
/// Right answers that traffic gives before and after anything happens to it.
const STEADY: usize = 200;
/// How often every model is asked when memory is short.
const ROUNDS: u32 = 3;
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// Everything on the stage.
#[derive(Debug)]
pub(super) struct Demo {
    pub(super) story: Story,
    pub(super) cast: Cast,
    pub(super) samples: Samples,
    pub(super) wharf: Wharf,
    pub(super) asker: Asker,
    pub(super) targets: BTreeMap<String, Target>,
}

impl Demo {
    pub(super) fn new(story: Story, cast: Cast, samples: Samples, wharf: Wharf) -> Self {
        let asker = Asker::new(&wharf.addresses().gateway);
        Self { story, cast, samples, wharf, asker, targets: BTreeMap::new() }
    }

    /// All scenes, in order.
    ///
    /// # Errors
    /// The first thing after which it can't go on. What is merely not as promised is in the table instead.
    pub(super) async fn play(&mut self) -> anyhow::Result<()> {
        let cluster = self.start().await?;
        self.load(&cluster).await?;
        self.infer().await?;
        self.pack(&cluster).await?;
        self.rollout(&cluster).await?;
        self.drain(&cluster).await?;
        let again = self.kill(cluster).await?;
        if self.cast.has_processes() {
            self.crash(&again).await?;
        }
        self.unload(&again).await
    }

    async fn start(&mut self) -> anyhow::Result<Cluster> {
        self.story.chapter("Start everything in one process");
        let began = self.story.now();
        let id = self.wharf.start()?;
        self.story.tell(&format!("wharf up is process {id}, in {}", self.wharf.folder().display()));
        self.until_ready().await?;
        let at = self.wharf.addresses().clone();
        let cluster = self.connect().await?;
        let server = self.available(&cluster).await?;
        let took = brief(self.story.since(began));
        self.story.tell(&format!("scheduler API {}, inference http://{} (REST and gRPC)", at.api, at.gateway));
        let memory: u64 = server.replicas.iter().map(|replica| replica.capacity).sum();
        let replicas = server.replicas.len();
        self.story.tell(&format!("ready after {took}: {replicas} replicas with {} for models", Bytes(memory)));
        self.story.show(Promise::Start, format!("ready after {took}, {replicas} replicas"), true);
        Ok(cluster)
    }

    /// The process, as its clients see it.
    pub(super) async fn connect(&self) -> anyhow::Result<Cluster> {
        let at = self.wharf.addresses();
        Cluster::connect(&at.api, &at.page, self.asker.clone(), &self.cast).await
    }

    /// Waits until the process says that it is ready, and as long as it is there.
    pub(super) async fn until_ready(&mut self) -> anyhow::Result<()> {
        let page = self.wharf.addresses().page.clone();
        let began = self.story.now();
        while !Cluster::ready(&self.asker, &page).await {
            if let Some(status) = self.wharf.ended() {
                bail!("wharf up ended: {status}");
            }
            if self.story.since(began) > self.cast.patience {
                bail!("wharf up is not ready after {} s", self.cast.patience.as_secs());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    pub(super) async fn available(&self, cluster: &Cluster) -> anyhow::Result<ServerView> {
        let all = usize::try_from(REPLICAS)?;
        let met =
            |server: &ServerView| server.replicas.iter().filter(|replica| replica.state == "Available").count() == all;
        cluster.server_until("all replicas", met).await
    }

    /// Submits a sample under a name. Returns the version, and when it was submitted.
    async fn submit(&mut self, cluster: &Cluster, name: &str, sample: &'static str) -> anyhow::Result<(u32, Instant)> {
        let (_, case) = self.samples.get(sample)?;
        let began = self.story.now();
        let version = self.send(cluster, name, sample).await?.version;
        self.expect(name, version, case);
        Ok((version, began))
    }

    /// Submits a sample under a name, and returns once that is durable.
    pub(super) async fn send(
        &self,
        cluster: &Cluster,
        name: &str,
        sample: &'static str,
    ) -> anyhow::Result<SubmitModelResponse> {
        let (folder, _) = self.samples.get(sample)?;
        let uri = self.cast.uri(sample, &folder);
        cluster.submit(name, &uri, self.cast.requirement(sample), self.cast.need.0).await
    }

    pub(super) fn expect(&mut self, name: &str, version: u32, case: Arc<Case>) {
        match self.targets.get_mut(name) {
            Some(target) => drop(target.versions.insert(version, case)),
            None => drop(self.targets.insert(name.to_owned(), Target::new(name, version, case))),
        }
    }

    pub(super) fn target(&self, name: &str) -> anyhow::Result<&Target> {
        self.targets.get(name).ok_or_else(|| anyhow!("{name} was not submitted"))
    }

    async fn load(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.story.chapter("Load models");
        let (mut seen, mut kept) = (String::new(), true);
        for (name, sample) in self.cast.models.into_iter().take(2) {
            let (version, began) = self.submit(cluster, name, sample).await?;
            let views = cluster.until(name, |views| serves(views, name, version)).await?;
            let took = brief(self.story.since(began));
            let outcome = self.asker.rest(self.target(name)?).await;
            let answered = brief(self.story.since(began));
            let places = places(&views, name);
            self.story.tell(&format!("{name} version {version}: Available on {places} {took} after it was submitted"));
            kept &= self.right(&outcome);
            if seen.is_empty() {
                seen = format!("{name} {version} on {places}, answer after {answered}");
            }
        }
        self.story.show(Promise::Load, seen, kept);
        Ok(())
    }

    /// Whether the outcome is the right answer; it is told if not.
    pub(super) fn right(&self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Right(_) => {}
            Outcome::Wrong(wrong) => self.story.complain(&format!("a wrong answer: {wrong}")),
            Outcome::Failed { kind, said } => self.story.complain(&format!("a failed request: {kind} {said}")),
        }
        outcome.is_right()
    }

    async fn infer(&mut self) -> anyhow::Result<()> {
        self.story.chapter("Ask by REST and by gRPC");
        let connection = self.asker.connect().await?;
        for promise in [Promise::Rest, Promise::Grpc] {
            let protocol = if promise == Promise::Rest { "REST" } else { "gRPC" };
            let (mut took, mut wrong) = (Vec::new(), 0);
            for (name, _) in self.cast.models.into_iter().take(2) {
                let target = self.target(name)?;
                let request = grpc_request(target)?;
                let mut own = Vec::new();
                for _ in 0..ASKED / 2 {
                    let began = self.story.now();
                    let outcome = match promise {
                        Promise::Rest => self.asker.rest(target).await,
                        _ => grpc(&connection, target, request.clone()).await,
                    };
                    own.push(self.story.since(began));
                    wrong += usize::from(!self.right(&outcome));
                }
                let middle = median(own.clone()).map_or_else(String::new, brief);
                self.story.tell(&format!("{protocol}: {} requests to {name}, median {middle}", own.len()));
                took.extend(own);
            }
            let (all, middle) = (took.len(), median(took).map_or_else(String::new, brief));
            self.story.show(promise, format!("{} of {all} right, median {middle}", all - wrong), wrong == 0);
        }
        Ok(())
    }

    async fn pack(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        let holds = HELD * u64::from(REPLICAS);
        self.story.chapter(&format!("{} models where memory holds {holds}", self.cast.models.len()));
        let began = self.story.now();
        let mut submitted = BTreeMap::new();
        for (name, sample) in self.cast.models.into_iter().skip(2) {
            submitted.insert(name, self.submit(cluster, name, sample).await?.0);
        }
        cluster.until("all models", |views| submitted.iter().all(|(name, v)| serves(views, name, *v))).await?;
        self.story.tell(&format!(
            "{} more models: Available {} after the first was submitted",
            submitted.len(),
            brief(self.story.since(began))
        ));
        let (misses, evictions) = counters(cluster).await?;
        let (mut resident, mut reloaded, mut wrong, mut before) = (Vec::new(), Vec::new(), 0, misses);
        for _ in 0..ROUNDS {
            for (name, _) in self.cast.models {
                let target = self.target(name)?;
                let began = self.story.now();
                let outcome = self.asker.rest(target).await;
                let took = self.story.since(began);
                wrong += usize::from(!self.right(&outcome));
                let (after, _) = counters(cluster).await?;
                if after > before {
                    reloaded.push(took)
                } else {
                    resident.push(took)
                }
                before = after;
            }
        }
        let asked = resident.len() + reloaded.len();
        let (misses, evictions) = {
            let after = counters(cluster).await?;
            (after.0 - misses, after.1 - evictions)
        };
        let copies = u32::try_from(self.cast.models.len())?;
        let held = u32::try_from(holds)?;
        let met = |server: &ServerView| {
            let sum = |of: fn(&ReplicaView) -> u32| server.replicas.iter().map(of).sum::<u32>();
            sum(|replica| replica.copies) == copies && sum(|replica| replica.copies_resident) == held
        };
        let server = cluster.server_until(&format!("{held} of {copies} copies in memory"), met).await?;
        let within = server.replicas.iter().all(|replica| replica.resident <= replica.capacity);
        for replica in &server.replicas {
            self.story.tell(&format!(
                "{}-{}: {} placed, {} in memory: {} of {}",
                self.cast.server,
                replica.index,
                counted(replica.copies, "model", "models"),
                replica.copies_resident,
                Bytes(replica.resident),
                Bytes(replica.capacity)
            ));
        }
        let seen = format!("{} of {asked} right; {held} in memory, {} on disk", asked - wrong, copies - held);
        self.story.show(Promise::Packed, seen, wrong == 0 && within);
        self.story.tell(&format!(
            "{asked} requests, each model in turn: {misses} brought a model back, {evictions} evictions"
        ));
        let slow = median(reloaded).map_or_else(String::new, brief);
        self.story.tell(&format!("median of the answers that brought a model back: {slow}"));
        if let Some(fast) = median(resident) {
            self.story.tell(&format!("median of the others: {fast}", fast = brief(fast)));
        }
        let seen = format!("{misses} reloads, {evictions} evictions, median {slow}");
        self.story.show(Promise::Reload, seen, misses > 0 && evictions > 0 && wrong == 0);
        Ok(())
    }

    /// Traffic to the models that something happens to.
    pub(super) async fn traffic(&self) -> anyhow::Result<Traffic> {
        let names = self.cast.models.iter().take(2);
        let targets = names.map(|(name, _)| self.target(name).cloned()).collect::<Result<Vec<_>, _>>()?;
        let traffic = Traffic::start(&self.asker, &self.story.clock(), &targets).await?;
        self.flow(&traffic, self.story.now()).await?;
        Ok(traffic)
    }

    /// Waits until traffic has flowed for a while since `then`, without a failure after it.
    pub(super) async fn flow(&self, traffic: &Traffic, then: Instant) -> anyhow::Result<()> {
        let began = self.story.now();
        loop {
            let failure = traffic.last_failure();
            let steady = failure.as_ref().map_or(then, |(at, _)| then.max(*at));
            if traffic.right_since(steady) >= STEADY {
                return Ok(());
            }
            if self.story.since(began) > self.cast.patience {
                let last = failure.map_or_else(String::new, |(_, outcome)| format!("; the last failure: {outcome:?}"));
                bail!("no {STEADY} right answers without a failure in {} s{last}", self.cast.patience.as_secs());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Tells what became of traffic, of which some may fail or none.
    pub(super) fn account(&self, account: &Account, may_fail: bool) {
        let (sent, failed) = (account.sent(), account.failed());
        let by_version = |model: &str| {
            let versions = account.versions(model);
            let each = versions.iter().map(|(version, count)| format!("version {version} gave {count}"));
            each.collect::<Vec<_>>().join(", ")
        };
        self.story
            .tell(&format!("{sent} requests by REST and gRPC, {failed} failed; slowest {}", brief(account.slowest())));
        self.story.tell(&format!("answers of {IRIS}: {}", by_version(IRIS)));
        for (kind, count) in account.kinds() {
            let line = format!("{count} x {kind}");
            if may_fail { self.story.tell(&line) } else { self.story.complain(&line) }
        }
    }

    async fn rollout(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.story.chapter("Roll out a new version under traffic");
        // What the clients know before it comes: the second version will answer differently.
        let (_, case) = self.samples.get(self.cast.second)?;
        let old = self.target(IRIS)?.versions.keys().copied().max().unwrap_or_default();
        self.expect(IRIS, old + 1, case);
        let traffic = self.traffic().await?;
        let (version, began) = self.submit(cluster, IRIS, self.cast.second).await?;
        self.story.tell(&format!("{IRIS} version {version} is submitted, version {old} answers"));
        cluster.until("the new version", |views| serves(views, IRIS, version)).await?;
        let took = brief(self.story.since(began));
        self.story.tell(&format!("{IRIS} version {version} has taken over after {took}"));
        let gone = |views: &Views| {
            views.get(IRIS).is_some_and(|view| {
                let old = view.versions.iter().filter(|v| v.version != version);
                old.flat_map(|version| &version.copies).all(|copy| copy.state == "Unloaded")
            })
        };
        cluster.until("the old version's end", gone).await?;
        self.story.tell(&format!("{IRIS} version {old} is unloaded after {}", brief(self.story.since(began))));
        self.flow(&traffic, self.story.now()).await?;
        let account = traffic.stop().await?;
        self.account(&account, false);
        let versions = account.versions(IRIS);
        let both = versions.contains_key(&old) && versions.contains_key(&version) && versions.len() == 2;
        let seen = format!("{} of {} failed; {old} -> {version} in {took}", account.failed(), account.sent());
        self.story.show(Promise::Rollout, seen, account.failed() == 0 && both);
        Ok(())
    }

    async fn drain(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.story.chapter("Drain a replica under traffic");
        let views = cluster.until("a place", |views| views.contains_key(IRIS)).await?;
        let from = views.get(IRIS).and_then(|view| answering(view).next()).map(|copy| copy.replica);
        let from = from.ok_or_else(|| anyhow!("no copy of {IRIS} answers"))?;
        let traffic = self.traffic().await?;
        let began = self.story.now();
        self.story.tell(&format!("draining {}-{from}, where {IRIS} answers", self.cast.server));
        let last = cluster.drain(from).await?;
        let took = brief(self.story.since(began));
        self.story.tell(&format!(
            "{} moved in {took}, {} left",
            counted(last.moved, "copy", "copies"),
            counted(last.left, "copy", "copies")
        ));
        for stuck in &last.stuck {
            self.story.complain(stuck);
        }
        let empty = |server: &ServerView| {
            server
                .replicas
                .iter()
                .any(|replica| replica.index == from && replica.copies == 0 && replica.registered == 0)
        };
        cluster.server_until("an empty replica", empty).await?;
        self.flow(&traffic, self.story.now()).await?;
        let account = traffic.stop().await?;
        self.account(&account, false);
        let views = cluster
            .until("all models", |views| self.cast.models.iter().all(|(name, _)| views.contains_key(*name)))
            .await?;
        let elsewhere = self.cast.models.iter().filter(|(name, _)| {
            let copies = views.get(*name).into_iter().flat_map(answering);
            copies.filter(|copy| copy.replica != from).count() == 1
        });
        let elsewhere = elsewhere.count();
        self.story.tell(&format!("{elsewhere} of {} models answer on the other replica", self.cast.models.len()));
        cluster.uncordon(from).await?;
        let kept = account.failed() == 0 && last.moved > 0 && last.left == 0 && elsewhere == self.cast.models.len();
        let moved = counted(last.moved, "copy", "copies");
        let seen = format!("{} of {} failed; {moved} in {took}", account.failed(), account.sent());
        self.story.show(Promise::Drain, seen, kept);
        Ok(())
    }
}

/// How often a request found its copy evicted, and how often a copy was evicted.
async fn counters(cluster: &Cluster) -> anyhow::Result<(u64, u64)> {
    let misses = cluster.counter("seldon_cache_miss_count").await.context("counting reloads")?;
    Ok((misses, cluster.counter("seldon_cache_evict_count").await.context("counting evictions")?))
}

fn places(views: &Views, name: &str) -> String {
    let copies = views.get(name).into_iter().flat_map(answering);
    copies.map(|copy| format!("{}-{}", copy.server, copy.replica)).collect::<Vec<_>>().join(", ")
}
