//! What is looked at between the steps of a simulation: the rules that never break, as far as they can be seen from
//! outside.
//!
//! An inference server notes by itself what it is asked against the rules: memory over its capacity (3), a version
//! loaded in its own place (4), an unload under a request and an inference without a model (5), a request that is
//! sent twice (13). Everything else is compared here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
};

use serde_json::Value;
use wharf::{domain::copy::State, ports::Store as _};

use super::world::{World, lock};

/// How often the promises are checked, in steps; less often when there are many copies to look at.
const CHECK: u64 = 10;
/// Copies that are looked at that often.
const FEW: u64 = 30;

/// What was seen at earlier steps.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The next step after which to look.
    next: u64,
    /// The commits that were looked at.
    commits: Option<u64>,
    /// Every copy that the journal ever had, with its replica.
    journaled: BTreeSet<(String, String)>,
    /// The highest leader epoch that the journal ever had, by lineage.
    leaders: BTreeMap<String, u64>,
    /// The highest leader epoch that each agent obeyed, by replica and lineage.
    obeyed: BTreeMap<(String, String), u64>,
}

/// How much of each model may be there, while no fault is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) wanted: u32,
    pub(crate) surge: u32,
    pub(crate) unavailable: u32,
}

/// The copies of every agent that runs: by replica and generation, the state that is reported.
type Held = BTreeMap<String, BTreeMap<String, String>>;

impl World {
    /// Looks for broken promises after a step, when it is time to, or at the end.
    pub(super) fn check(&self, step: u64, over: bool) {
        if step < lock(&self.seen).next && !over {
            return;
        }
        for seat in &self.seats {
            for breach in seat.server.breaches() {
                self.fail(format!("at {}: {breach}", seat.id));
            }
        }
        let agents: BTreeMap<String, Value> =
            self.seats.iter().filter_map(|seat| Some((seat.id.to_string(), seat.agent()?.inspect()))).collect();
        let held: Held = agents.iter().map(|(replica, seen)| (replica.clone(), copies(seen))).collect();
        let many = held.values().map(|copies| copies.len() as u64).sum::<u64>();
        lock(&self.seen).next = step + CHECK * (1 + many / FEW);
        self.check_journal(&agents, &held);
        if !self.faulty.load(Ordering::Relaxed) {
            self.check_routes(&held);
            self.check_status(&held);
        }
    }

    /// Rules 1, 2, 3 and 7: nothing that is not in the journal has reached an agent, what is registered stays within
    /// the limit, and no agent goes back to an older leader.
    fn check_journal(&self, agents: &BTreeMap<String, Value>, held: &Held) {
        let store = self.store();
        let mut seen = lock(&self.seen);
        if seen.commits != Some(store.commits()) {
            // One that stopped within a commit can't be read before it is opened again.
            let Ok(contents) = store.load() else { return };
            seen.commits = Some(store.commits());
            let leader = seen.leaders.entry(store.identity().lineage).or_default();
            *leader = contents.counters.leader_epoch.max(*leader);
            let mut registered: BTreeMap<String, u64> = BTreeMap::new();
            for copy in &contents.copies {
                seen.journaled.insert((copy.replica.to_string(), copy.generation.to_string()));
                *registered.entry(copy.replica.to_string()).or_default() += copy.need.primary.0;
            }
            for (seat, capacity) in self.seats.iter().zip(&self.shape.replicas) {
                let limit = capacity * u64::from(100 + self.shape.overcommit) / 100;
                let bytes = registered.get(&seat.id.to_string()).copied().unwrap_or_default();
                if bytes > limit {
                    self.fail(format!("{bytes} bytes are registered on {}, whose limit is {limit}", seat.id));
                }
            }
        }
        for (replica, copies) in held {
            for generation in copies.keys() {
                if !seen.journaled.contains(&(replica.clone(), generation.clone())) {
                    self.fail(format!("{replica} was ordered to hold {generation}, which the journal never had"));
                }
            }
        }
        for (replica, agent) in agents {
            let session = &agent["session"];
            let lineage = session["lineage"].as_str().unwrap_or_default().to_owned();
            let epoch = session["leaderEpoch"].as_u64().unwrap_or_default();
            if lineage.is_empty() {
                continue;
            }
            if seen.leaders.get(&lineage).is_none_or(|leader| *leader < epoch) {
                self.fail(format!("{replica} obeys leader {epoch} of {lineage}, who never was"));
            }
            let before = seen.obeyed.insert((replica.clone(), lineage.clone()), epoch).unwrap_or_default();
            if before > epoch {
                self.fail(format!("{replica} obeys leader {epoch} of {lineage} after leader {before}"));
            }
        }
    }

    /// Rules 5, 6 and 8: while nothing breaks, each copy that some gateway may send to is one that its agent holds.
    fn check_routes(&self, held: &Held) {
        for index in 0..self.shape.gateways {
            let Some(gateway) = self.gateway(index) else { continue };
            let table = gateway.inspect();
            let targets = list(&table["routes"]).flat_map(|route| list(&route["targets"]));
            for endpoint in targets.flat_map(|target| list(&target["endpoints"])) {
                let (replica, copy) = (text(&endpoint["replica"]), text(&endpoint["copy"]));
                let Some(copies) = held.get(replica) else { continue };
                let state = copies.get(copy).map_or("gone", String::as_str);
                if state != "Available" {
                    self.fail(format!("gateway {index} may send to {copy} on {replica}, which is {state} there"));
                }
            }
        }
    }

    /// Rules 4 and 8: what status says is there is there, and a rollout stays within its bounds.
    fn check_status(&self, held: &Held) {
        let Some(handle) = self.scheduler() else { return };
        let bounds = *lock(&self.bounds);
        for model in handle.links.board.models() {
            let (mut live, mut answering) = (0, 0);
            for copy in model.copies.iter().filter(|copy| !copy.draining) {
                live += 1;
                let State::Available { on, .. } = &copy.state else { continue };
                answering += 1;
                let Some(copies) = held.get(&on.to_string()) else { continue };
                let state = copies.get(&copy.generation.to_string()).map_or("gone", String::as_str);
                if state != "Available" {
                    self.fail(format!("{} is said to be Available on {on}, and is {state}", copy.generation));
                }
            }
            let Some(Bounds { wanted, surge, unavailable }) = bounds else { continue };
            if live > wanted + surge || answering + unavailable < wanted {
                self.fail(format!("{live} copies of {} are there, and {answering} answer: {bounds:?}", model.name));
            }
        }
    }

    /// Where journal, scheduler, agents and gateways differ. Once all is quiet they are one.
    pub(crate) fn disagreement(&self) -> Option<String> {
        let handle = self.scheduler()?;
        let mut decided: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for model in handle.links.board.models() {
            for copy in &model.copies {
                let Some(on) = copy.state.replica() else {
                    return Some(format!("{} has no place", copy.generation));
                };
                decided.entry(on.to_string()).or_default().insert(copy.generation.to_string());
            }
        }
        let mut written: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for row in self.store().load().ok()?.copies {
            written.entry(row.replica.to_string()).or_default().insert(row.generation.to_string());
        }
        if decided != written {
            return Some(format!("the scheduler has {decided:?}, its journal {written:?}"));
        }
        for seat in &self.seats {
            let id = seat.id.to_string();
            let decided = decided.remove(&id).unwrap_or_default();
            let held: BTreeSet<String> = copies(&seat.agent()?.inspect()).into_keys().collect();
            if decided != held {
                return Some(format!("{id} is to have {decided:?}, and has {held:?}"));
            }
            let registered = handle.links.board.registered(&seat.id).copies as usize;
            if registered != decided.len() {
                return Some(format!("{id} is to have {decided:?}, and {registered} copies are registered"));
            }
        }
        None
    }
}

fn copies(agent: &Value) -> BTreeMap<String, String> {
    list(&agent["copies"]).map(|copy| (text(&copy["generation"]).to_owned(), text(&copy["state"]).to_owned())).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
