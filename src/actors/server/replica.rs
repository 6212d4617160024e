//! What a server's actor knows of one replica.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    actors::links::Links,
    domain::{
        copy::{Report, Residency},
        ghost::{Advice, Strain},
        memory::{Bytes, Resources},
        names::ModelName,
        order::Order,
        replica::ReplicaState,
        time::Instant,
        version::Generation,
    },
    messages::{
        placement::ReplicaFacts,
        server::{AgentConnected, Down, Hello, Restated},
    },
};

/// An order that had no visible effect is sent again after this long.
const AGAIN: Duration = Duration::from_secs(2);

pub(super) struct Replica {
    pub(super) state: ReplicaState,
    pub(super) since: Instant,
    pub(super) heard: Instant,
    pub(super) hello: Option<Hello>,
    pub(super) session: u64,
    pub(super) link: Option<mpsc::Sender<Down>>,
    pub(super) resident: Resources,
    /// Why its agent does not obey this scheduler.
    pub(super) outdated: Option<String>,
    /// What its agent could not read.
    pub(super) misread: Option<String>,
    pub(super) strain: Strain,
    /// Which run of the inference server answers, if its agent runs it.
    pub(super) run: Option<u64>,
    /// What is wanted of each copy, and when it was last said.
    wanted: BTreeMap<Generation, Wish>,
    /// Copies of which something else is wanted than was last said.
    unsaid: BTreeSet<Generation>,
    /// Copies that models ask about, until the agent has said whether it holds them.
    asked: BTreeMap<Generation, ModelName>,
    /// What the agent said last of each copy that it holds.
    reported: BTreeMap<Generation, (ModelName, Report)>,
    /// Of those, how many are in memory.
    residents: u32,
    /// Copies of which what is wanted can't be seen to be so.
    unmet: BTreeSet<Generation>,
    /// What the placement was told last.
    pub(super) facts: Option<ReplicaFacts>,
}

const fn is_resident(report: &Report) -> bool {
    matches!(report, Report::Available { residency: Residency::Resident, .. })
}

struct Wish {
    order: Arc<Order>,
    said: Option<Instant>,
}

impl Replica {
    pub(super) const fn new(state: ReplicaState, now: Instant) -> Self {
        Self {
            state,
            since: now,
            heard: now,
            hello: None,
            session: 0,
            link: None,
            outdated: None,
            misread: None,
            resident: Resources::primary(Bytes::ZERO),
            strain: Strain { leaked: Bytes::ZERO, advice: Advice { returns: 0, more: Bytes::ZERO, spared_percent: 0 } },
            run: None,
            wanted: BTreeMap::new(),
            unsaid: BTreeSet::new(),
            asked: BTreeMap::new(),
            reported: BTreeMap::new(),
            residents: 0,
            unmet: BTreeSet::new(),
            facts: None,
        }
    }

    /// Whether nothing is there, nor wanted there, nor may be there as far as a model knows.
    pub(super) fn is_idle(&self) -> bool {
        self.wanted.is_empty() && self.asked.is_empty() && self.reported.is_empty()
    }

    /// Every model that has a copy here, or wants one, or asks after one.
    pub(super) fn models(&self) -> Vec<ModelName> {
        let mut models: Vec<ModelName> = self
            .wanted
            .values()
            .map(|wish| wish.order.model().clone())
            .chain(self.asked.values().cloned())
            .chain(self.reported.values().map(|(model, _)| model.clone()))
            .collect();
        models.sort_unstable();
        models.dedup();
        models
    }

    pub(super) const fn copies_resident(&self) -> u32 {
        self.residents
    }

    /// The door of the agent whose session is open, if it is not the one at `door`.
    pub(super) fn held_by_another(&self, door: &str) -> Option<&str> {
        let open = self.link.as_ref().is_some_and(|link| !link.is_closed());
        let hello = self.hello.as_ref().filter(|_| open)?;
        (hello.door != door).then_some(hello.door.as_str())
    }

    /// A new session replaces the one before it. Gives back each copy that the agent reports, and those that
    /// it should hold and does not.
    pub(super) fn connect(
        &mut self,
        connected: AgentConnected,
        now: Instant,
    ) -> Vec<(ModelName, Generation, Option<Report>)> {
        self.session = connected.session;
        self.link = Some(connected.link);
        self.heard = now;
        self.reported.clear();
        self.residents = 0;
        self.unmet.extend(self.wanted.keys().copied());
        for held in &connected.hello.inventory {
            // Among them are last words about copies that are gone: those are wanted and held no more.
            self.reported(&held.model, held.generation, &held.report);
        }
        let said: BTreeSet<Generation> = connected.hello.inventory.iter().map(|held| held.generation).collect();
        let mut reports: Vec<_> = connected
            .hello
            .inventory
            .iter()
            .map(|held| (held.model.clone(), held.generation, Some(held.report.clone())))
            .collect();
        for (generation, wish) in &mut self.wanted {
            wish.said = None;
            if !said.contains(generation) {
                reports.push((wish.order.model().clone(), *generation, None));
            }
        }
        for (generation, model) in mem::take(&mut self.asked) {
            if !said.contains(&generation) {
                reports.push((model, generation, None));
            }
        }
        self.hello = Some(connected.hello);
        reports
    }

    /// Takes what the agent says of the replica since its hello.
    pub(super) fn restate(&mut self, restated: Restated, now: Instant) {
        self.heard = now;
        if let Some(hello) = &mut self.hello {
            let Restated { capacity, capabilities, overcommit_percent, runtime } = restated;
            hello.capacity = capacity;
            hello.capabilities = capabilities;
            hello.overcommit_percent = overcommit_percent;
            hello.runtime = runtime;
        }
    }

    /// Takes what is wanted of a copy. Gives back what the agent has said of it already, if it has spoken and that says
    /// something: who lets a copy go waits for its end, and would answer any other word with the same order again.
    #[expect(clippy::option_option, reason = "no word at all is not the word that it is not there")]
    pub(super) fn set(&mut self, order: Order) -> Option<Option<Report>> {
        let generation = order.generation();
        let known = self.reported.get(&generation).map(|(_, report)| report.clone());
        let wished = self.wanted.get(&generation);
        // What was never ordered and never reported is not there. An order to hold it may still be on its way,
        // though: then only the agent can say that its memory is free.
        let lets_go = matches!(order, Order::Unregister { .. });
        let gone = lets_go && known.is_none() && wished.is_none();
        if gone && self.link.is_some() {
            return Some(None);
        }
        if wished.is_none_or(|wish| *wish.order != order) {
            self.wanted.insert(generation, Wish { order: Arc::new(order), said: None });
            self.unsaid.insert(generation);
            self.look(generation);
        }
        known.filter(|_| !lets_go).map(Some)
    }

    /// What the agent has said of a copy; nothing until it has called, and then it will be answered.
    #[expect(clippy::option_option, reason = "no word at all is not the word that it is not there")]
    pub(super) fn ask(&mut self, model: ModelName, generation: Generation) -> Option<Option<Report>> {
        if self.link.is_none() {
            self.asked.insert(generation, model);
            return None;
        }
        Some(self.reported.get(&generation).map(|(_, report)| report.clone()))
    }

    pub(super) fn reported(&mut self, model: &ModelName, generation: Generation, report: &Report) {
        let before = if matches!(report, Report::Unloaded | Report::Failed { freed: true, .. }) {
            self.wanted.remove(&generation);
            self.reported.remove(&generation)
        } else {
            self.residents += u32::from(is_resident(report));
            self.reported.insert(generation, (model.clone(), report.clone()))
        };
        self.residents -= u32::from(before.is_some_and(|(_, report)| is_resident(&report)));
        self.look(generation);
    }

    /// Notes whether what is wanted of a copy can be seen to be so.
    fn look(&mut self, generation: Generation) {
        let reported = self.reported.get(&generation).map(|(_, report)| report);
        if self.wanted.get(&generation).is_some_and(|wish| !is_met(&wish.order, reported)) {
            self.unmet.insert(generation);
        } else {
            self.unmet.remove(&generation);
        }
    }

    /// A copy of a model that nobody knows: it is to go.
    pub(super) fn stray(&mut self, model: ModelName, generation: Generation, drain: Duration) {
        if self.reported.contains_key(&generation) {
            let order = Arc::new(Order::Unregister { model, generation, drain });
            self.wanted.insert(generation, Wish { order, said: None });
            self.look(generation);
        }
    }

    /// Says again what is wanted and can't be seen to be so.
    pub(super) fn repeat(&mut self, now: Instant, links: &Links) {
        self.unsaid.clear();
        let is_due = |wish: &Wish| wish.said.is_none_or(|said| now.since(said) >= AGAIN);
        let is_due = |generation: &&Generation| self.wanted.get(generation).is_some_and(is_due);
        let due = self.unmet.iter().filter(is_due).copied().collect();
        self.say(due, now, links);
    }

    /// Says what is wanted since the last time, all of it in one message.
    pub(super) fn say_new(&mut self, now: Instant, links: &Links) {
        let new = mem::take(&mut self.unsaid).into_iter().collect();
        self.say(new, now, links);
    }

    fn say(&mut self, which: Vec<Generation>, now: Instant, links: &Links) {
        let Some(link) = &self.link else { return };
        let mut orders = Vec::new();
        for generation in which {
            let Some(wish) = self.wanted.get_mut(&generation) else { continue };
            let reported = self.reported.get(&generation).map(|(_, report)| report);
            // Gateways of the scheduler before this one may still send there.
            if matches!(*wish.order, Order::Unregister { .. }) && now < links.unloads_from() {
                continue;
            }
            if !is_met(&wish.order, reported) {
                orders.push(wish.order.as_ref().clone());
            }
            wish.said = Some(now);
        }
        if !orders.is_empty() && link.try_send(Down::Orders(orders)).is_err() {
            // It does not read: the session ends, and the next one is told everything.
            self.link = None;
        }
    }

    /// What is to be seen of it.
    pub(super) fn observe(&self) -> serde_json::Value {
        serde_json::json!({
            "state": self.state.name(),
            "session": self.session,
            "connected": self.link.is_some(),
            "wanted": self.wanted.len(),
            "reported": self.reported.len(),
            "asked": self.asked.len(),
        })
    }

    pub(super) fn tell(&mut self, word: Down) {
        if self.link.as_ref().is_some_and(|link| link.try_send(word).is_err()) {
            self.link = None;
        }
    }

    /// The replica is lost, and what was wanted there is wanted elsewhere.
    pub(super) fn forget(&mut self) {
        self.wanted.clear();
        self.unsaid.clear();
        self.asked.clear();
        self.reported.clear();
        self.residents = 0;
        self.unmet.clear();
        self.link = None;
        self.resident = Resources::default();
        self.strain = Strain::default();
        self.run = None;
    }
}

/// Whether what an agent says of a copy is on the way to what is wanted of it.
const fn is_met(order: &Order, reported: Option<&Report>) -> bool {
    match (order, reported) {
        (Order::Register { pinned, .. }, Some(Report::Available { pinned: said, .. })) => *pinned == *said,
        (Order::Register { .. }, reported) => reported.is_some(),
        (Order::Unregister { .. }, reported) => matches!(reported, Some(Report::Draining { .. })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        size::Trust,
        version::{Uid, Version},
    };

    fn numbered(number: u32) -> Generation {
        Generation { uid: Uid(1), version: Version(1), number }
    }

    fn letting_go(number: u32) -> Order {
        let model = ModelName::new("m").unwrap();
        Order::Unregister { model, generation: numbered(number), drain: Duration::ZERO }
    }

    #[test]
    fn only_what_can_not_be_seen_to_be_so_is_said_again_and_what_is_in_memory_is_counted() {
        let name = ModelName::new("m").unwrap();
        let mut replica = Replica::new(ReplicaState::Available, Instant::default());
        let resident =
            Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false };
        for number in 0..3 {
            replica.reported(&name, numbered(number), &resident);
            replica.reported(&name, numbered(number), &resident);
        }
        assert_eq!((replica.copies_resident(), replica.unmet.len()), (3, 0));
        assert_eq!(replica.set(letting_go(0)), None);
        replica.stray(name.clone(), numbered(1), Duration::ZERO);
        assert_eq!(replica.unmet, [numbered(0), numbered(1)].into());
        replica.reported(&name, numbered(0), &Report::Draining { holds: 1 });
        replica.reported(&name, numbered(1), &Report::Unloaded);
        assert_eq!((replica.copies_resident(), replica.unmet.len()), (1, 0));
        replica.reported(&name, numbered(0), &resident);
        assert_eq!(replica.unmet, [numbered(0)].into(), "it was not let go after all");
        replica.forget();
        assert_eq!((replica.copies_resident(), replica.unmet.len()), (0, 0));
    }

    const NOW: Instant = Instant::from_micros(1);

    fn model() -> ModelName {
        ModelName::new("iris").expect("valid")
    }

    fn generation() -> Generation {
        Generation { uid: Uid(1), version: Version(1), number: 1 }
    }

    fn register() -> Order {
        let (model, generation) = (model(), generation());
        Order::Register {
            model,
            generation,
            spec: Arc::default(),
            need: Resources::default(),
            attempt: 0,
            measured: false,
            trust: Trust::Larger,
            pinned: false,
        }
    }

    fn unregister() -> Order {
        Order::Unregister { model: model(), generation: generation(), drain: Duration::from_secs(1) }
    }

    fn replica() -> (Replica, mpsc::Receiver<Down>) {
        let (link, orders) = mpsc::channel(8);
        let mut replica = Replica::new(ReplicaState::Available, NOW);
        replica.link = Some(link);
        (replica, orders)
    }

    fn available() -> Report {
        Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false }
    }

    #[test]
    fn an_order_to_let_go_is_answered_with_nothing_but_the_end() {
        let (mut replica, _orders) = replica();
        // A copy that its model does not know: each word about it is answered with an order to let it go. Were that
        // answered with the same word again, the two would never end.
        replica.reported(&model(), generation(), &available());
        assert_eq!(replica.set(unregister()), None);
        assert_eq!(replica.set(unregister()), None);
        replica.reported(&model(), generation(), &Report::Unloaded);
        assert_eq!(replica.set(unregister()), Some(None), "it is gone");
    }

    #[test]
    fn an_order_to_hold_is_answered_with_what_is_known() {
        let (mut replica, _orders) = replica();
        assert_eq!(replica.set(register()), None, "its agent has not spoken of it");
        replica.reported(&model(), generation(), &available());
        // Perhaps it was told to an actor that is no more.
        assert_eq!(replica.set(register()), Some(Some(available())));
    }
}
