//! One model in a small world of agents that lose messages, fail, fall silent and come back, and of a
//! scheduler that forgets everything but its journal. After every step the rules hold; once the world is
//! quiet again, what is wanted is there and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use proptest::prelude::*;

use super::*;
use crate::domain::{
    copy::{Drain, Event as CopyEvent, FailureClass, Report, Residency},
    memory::Resources,
    names::ServerName,
    placement::{Capabilities, Placement, PlacementRequest, Prefer, ReplicaFacts},
    record::{CopyRow, ModelRow, VersionRow},
    replica::ReplicaState,
    spec::{Definition, DeploymentPatch, Replicas, Strategy as Rollout},
};

const REPLICAS: u32 = 3;
const ROOM: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Fetching,
    Loading,
    Available,
    Failed,
}

#[derive(Clone, Debug)]
enum Act {
    Submit {
        spec: u8,
        replicas: u32,
        rollout: Rollout,
    },
    Scale(u32),
    Delete,
    Rollback,
    /// The oldest message arrives; or it is lost.
    Deliver,
    Lose,
    /// So many messages have arrived while a commit was under way.
    DeliverAtOnce(usize),
    /// An agent looks at its orders and gets on with them.
    Work {
        replica: u32,
        fail: bool,
    },
    /// An agent says all that it holds.
    Inventory(u32),
    Silent(u32),
    Lost(u32),
    Drain(u32),
    /// What the replica holds does not fit there any more.
    Displace(u32),
    Undrain,
    Restart,
    Pass(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let rollout = prop_oneof![
        4 => (0..3_u32, 0..2_u32)
            .prop_filter("a surge or a gap", |(surge, gap)| surge + gap > 0)
            .prop_map(|(max_surge, max_unavailable)| Rollout::RollingUpdate { max_surge, max_unavailable }),
        1 => Just(Rollout::Recreate),
    ];
    prop_oneof![
        3 => (0..4_u8, 0..4_u32, rollout)
            .prop_map(|(spec, replicas, rollout)| Act::Submit { spec, replicas, rollout }),
        1 => (0..4_u32).prop_map(Act::Scale),
        1 => Just(Act::Delete),
        1 => Just(Act::Rollback),
        20 => Just(Act::Deliver),
        1 => Just(Act::Lose),
        4 => (2..8_usize).prop_map(Act::DeliverAtOnce),
        12 => (0..REPLICAS, prop::bool::weighted(0.1)).prop_map(|(replica, fail)| Act::Work { replica, fail }),
        2 => (0..REPLICAS).prop_map(Act::Inventory),
        1 => (0..REPLICAS).prop_map(Act::Silent),
        1 => (0..REPLICAS).prop_map(Act::Lost),
        1 => (0..REPLICAS).prop_map(Act::Drain),
        1 => (0..REPLICAS).prop_map(Act::Displace),
        1 => Just(Act::Undrain),
        1 => Just(Act::Restart),
        2 => (0..10_u64).prop_map(Act::Pass),
    ]
}

/// On its way to the model.
#[derive(Clone, Debug)]
enum Mail {
    Answer(Generation, CopyEvent),
    Report(ReplicaId, Generation, Option<Report>),
    Settled(u64),
}

struct World {
    model: Model,
    policy: Policy,
    now: Instant,
    placement: Placement,
    mail: VecDeque<Mail>,
    /// What each agent is to hold (true) or to let go.
    orders: BTreeMap<(ReplicaId, Generation), bool>,
    agents: BTreeMap<ReplicaId, BTreeMap<Generation, Phase>>,
    /// Copies that agents are asked about without an order.
    asked: BTreeSet<(ReplicaId, Generation)>,
    /// What was reported Available by an agent at least once since it was last absent there.
    reported: BTreeSet<Generation>,
    route: BTreeSet<Generation>,
    settled: u64,
    rows: Rows,
    uid: u64,
    draining: BTreeSet<u32>,
}

#[derive(Default)]
struct Rows {
    model: Option<ModelRow>,
    versions: BTreeMap<Version, VersionRow>,
    copies: BTreeMap<Generation, CopyRow>,
}

fn replica(index: u32) -> ReplicaId {
    ReplicaId::new(ServerName::new("s").expect("valid"), index)
}

impl World {
    fn new() -> Self {
        let now = Instant::from_micros(1);
        let name = ModelName::new("m").expect("valid");
        let mut world = Self {
            model: Model::unborn(name, now),
            policy: Policy { default_memory: Bytes(1), ..Policy::default() },
            now,
            placement: Placement::default(),
            mail: VecDeque::new(),
            orders: BTreeMap::new(),
            agents: (0..REPLICAS).map(|index| (replica(index), BTreeMap::new())).collect(),
            asked: BTreeSet::new(),
            reported: BTreeSet::new(),
            route: BTreeSet::new(),
            settled: 0,
            rows: Rows::default(),
            uid: 0,
            draining: BTreeSet::new(),
        };
        world.replicas();
        world
    }

    fn replicas(&mut self) {
        for index in 0..REPLICAS {
            let facts = ReplicaFacts {
                reported: Some(Resources::primary(Bytes(ROOM))),
                state: ReplicaState::Available,
                ..ReplicaFacts::default()
            };
            self.placement.upsert_replica(&replica(index), facts);
            self.placement.set_cordoned(&replica(index), self.draining.contains(&index)).expect("known");
        }
    }

    fn happen(&mut self, event: Event) {
        let before = self.model.clone();
        let Ok(decision) = self.model.apply(event, &self.policy, self.now) else {
            assert_eq!(self.model, before, "what was refused has changed nothing");
            return;
        };
        self.carry_out(decision);
    }

    fn carry_out(&mut self, decision: Decision) {
        for write in decision.writes {
            match write {
                Write::PutModel(row) => self.rows.model = Some(*row),
                Write::RemoveModel(_) => self.rows = Rows::default(),
                Write::PutVersion(row) => drop(self.rows.versions.insert(row.version, *row)),
                Write::RemoveVersion(_, version) => drop(self.rows.versions.remove(&version)),
                Write::PutCopy(row) => drop(self.rows.copies.insert(row.generation, *row)),
                Write::RemoveCopy(_, generation) => drop(self.rows.copies.remove(&generation)),
                Write::PutSize(_) | Write::RemoveSize(..) => {}
                Write::PutServer(_) | Write::RemoveServer(_) | Write::PutCounters(_) => unreachable!("not a model's"),
            }
        }
        for effect in decision.effects {
            self.perform(effect);
        }
        self.retry();
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Place(wanted) => {
                let request = PlacementRequest {
                    model: self.model.name.clone(),
                    generation: wanted.generation,
                    requirements: Capabilities::default(),
                    server: None,
                    need: wanted.need,
                    spread: wanted.spread,
                    priority: wanted.priority,
                    pinned: wanted.pinned,
                    together: 1,
                    avoid: BTreeMap::new(),
                    prefer: Prefer::default(),
                };
                let decision = self.placement.place(&request, self.now);
                self.answer(wanted.generation, decision);
            }
            Effect::Withdraw(generation) | Effect::Release(generation) => {
                self.placement.release(&self.model.name, generation);
            }
            Effect::Register { on, generation, .. } => drop(self.orders.insert((on, generation), true)),
            Effect::Unregister { on, generation } => {
                assert!(!self.route.contains(&generation), "{generation} is ordered away while it is routed");
                let copy = self.model.copies.iter().find(|copy| copy.generation == generation);
                if let Some(copy) = copy.filter(|copy| copy.left > 0) {
                    assert!(copy.left <= self.settled, "{generation} is ordered away before its route is settled");
                }
                self.orders.insert((on, generation), false);
            }
            Effect::Publish(revision) => {
                let route =
                    self.model.route(|_| Some("door".to_owned()), Outlook { policy: &self.policy, usual: None });
                let endpoints = route.targets.iter().flat_map(|target| &target.endpoints);
                self.route = endpoints.map(|endpoint| endpoint.generation).collect();
                self.mail.push_back(Mail::Settled(revision));
            }
            Effect::Keep(generation) => {
                let kept = self.model.copies.iter().find(|copy| copy.generation == generation).expect("kept");
                let (on, need) = (kept.state.replica().expect("placed"), kept.need.clone());
                self.placement.restore(&self.model.name, generation, on, need).expect("registered nowhere else");
                let pinned = self.model.deployment.pinned;
                self.placement.set_pinned(&self.model.name, generation, pinned).expect("registered");
            }
            Effect::Leave(generation) => {
                self.placement.mark_leaving(&self.model.name, generation).expect("registered");
            }
            Effect::Wake(_) | Effect::Note(_) | Effect::Arrived(_) | Effect::Terminated => {}
        }
    }

    fn answer(&mut self, generation: Generation, decision: crate::domain::placement::Decision) {
        let event = match decision.outcome {
            Ok(placed) => CopyEvent::Placed { on: placed.replica },
            Err(reason) => CopyEvent::Unplaced { reason },
        };
        self.mail.push_back(Mail::Answer(generation, event));
    }

    fn retry(&mut self) {
        loop {
            let retried = self.placement.retry(self.now, 100);
            for (_, generation, decision) in retried.decisions {
                self.answer(generation, decision);
            }
            if !retried.more {
                return;
            }
        }
    }

    fn deliver(&mut self) {
        if let Some(event) = self.arrive() {
            self.happen(event);
        }
    }

    fn deliver_at_once(&mut self, count: usize) {
        let events: Vec<Event> = (0..count).map_while(|_| self.arrive()).collect();
        let decision = self.model.apply_all(events, &self.policy, self.now);
        self.carry_out(decision);
    }

    /// Takes the oldest message from the mail.
    fn arrive(&mut self) -> Option<Event> {
        Some(match self.mail.pop_front()? {
            Mail::Answer(generation, event) => Event::Copy(generation, event),
            Mail::Settled(revision) => {
                self.settled = self.settled.max(revision);
                Event::RoutesSettled(revision)
            }
            Mail::Report(on, generation, report) => {
                if matches!(report, Some(Report::Available { .. })) {
                    self.reported.insert(generation);
                }
                if matches!(report, None | Some(Report::Unloaded | Report::Failed { .. })) {
                    self.orders.remove(&(on.clone(), generation));
                    self.asked.remove(&(on.clone(), generation));
                    let failed = self.agents[&on].get(&generation) == Some(&Phase::Failed);
                    if failed {
                        self.agents.get_mut(&on).expect("known").remove(&generation);
                    }
                }
                Event::Reported(on, generation, report)
            }
        })
    }

    /// The agent takes each of its orders one step further and reports.
    fn work(&mut self, index: u32, fail: bool) {
        let on = replica(index);
        let orders: Vec<(Generation, bool)> =
            self.orders.iter().filter(|((to, _), _)| *to == on).map(|((_, g), hold)| (*g, *hold)).collect();
        for (generation, hold) in orders {
            let held = self.agents[&on].get(&generation).copied();
            let next = match (hold, held) {
                (true, None) => Some(Phase::Fetching),
                (true, Some(Phase::Fetching)) if fail => Some(Phase::Failed),
                (true, Some(Phase::Fetching)) => Some(Phase::Loading),
                (true, Some(Phase::Loading)) => Some(Phase::Available),
                (true, Some(phase)) => Some(phase),
                (false, _) => None,
            };
            let agent = self.agents.get_mut(&on).expect("known");
            match next {
                None => drop(agent.remove(&generation)),
                Some(phase) => drop(agent.insert(generation, phase)),
            }
            self.mail.push_back(Mail::Report(on.clone(), generation, Some(report(next))));
        }
    }

    fn inventory(&mut self, index: u32) {
        let on = replica(index);
        for (generation, phase) in self.agents[&on].clone() {
            self.mail.push_back(Mail::Report(on.clone(), generation, Some(report(Some(phase)))));
        }
        for (to, generation) in self.orders.keys().chain(&self.asked).cloned().collect::<Vec<_>>() {
            if to == on && !self.agents[&on].contains_key(&generation) {
                self.mail.push_back(Mail::Report(on.clone(), generation, None));
            }
        }
    }

    fn restart(&mut self) {
        self.mail.clear();
        self.orders.clear();
        self.placement = Placement::default();
        self.replicas();
        let name = self.model.name.clone();
        self.model = match self.rows.model.clone() {
            None => Model::unborn(name, self.now),
            Some(row) => restore(
                row,
                self.rows.versions.values().cloned().collect(),
                self.rows.copies.values().cloned().collect(),
                self.now,
            ),
        };
        self.settled = 0;
        for index in 0..self.model.copies.len() {
            let copy = self.model.copies[index].clone();
            let on = copy.state.replica().expect("restored copies have one").clone();
            self.placement.restore(&self.model.name, copy.generation, &on, copy.need.clone()).expect("once");
            if copy.draining {
                self.asked.insert((on, copy.generation));
            } else {
                self.perform(self.model.register(&copy).expect("has a version"));
            }
        }
        let route = self.model.route(|_| Some("door".to_owned()), Outlook { policy: &self.policy, usual: None });
        self.route =
            route.targets.iter().flat_map(|target| &target.endpoints).map(|endpoint| endpoint.generation).collect();
        let server = ServerName::new("s").expect("valid");
        self.happen(Event::Leaving(server, self.draining.clone()));
        (0..REPLICAS).for_each(|index| self.inventory(index));
    }

    fn take(&mut self, act: Act) {
        let server = ServerName::new("s").expect("valid");
        match act {
            Act::Submit { spec, replicas, rollout } => {
                self.uid += 1;
                let definition = Definition {
                    name: self.model.name.clone(),
                    spec: ModelSpec { uri: format!("/{spec}"), memory: Some(Bytes(1)), ..ModelSpec::default() },
                    deployment: DeploymentPatch {
                        replicas: Some(Replicas { replicas, min: 0, max: 0, log_payloads: false }),
                        strategy: Some(rollout),
                        ..DeploymentPatch::default()
                    },
                    kubernetes: None,
                    passthrough: Passthrough::default(),
                };
                self.happen(Event::Submit(Box::new(definition), Uid(self.uid)));
            }
            Act::Scale(replicas) => self.happen(Event::Scale(replicas)),
            Act::Delete => self.happen(Event::Delete(None)),
            Act::Rollback => self.happen(Event::Rollback(None)),
            Act::Deliver => self.deliver(),
            Act::DeliverAtOnce(count) => self.deliver_at_once(count),
            // Only words of agents are ever lost: the rest is said within the process.
            Act::Lose => {
                if matches!(self.mail.front(), Some(Mail::Report(..))) {
                    self.mail.pop_front();
                }
            }
            Act::Work { replica, fail } => self.work(replica, fail),
            Act::Inventory(index) => self.inventory(index),
            Act::Silent(index) => self.happen(Event::Replica(replica(index), CopyEvent::AgentLost)),
            Act::Lost(index) => {
                // The scheduler gives it up; the agent, for all it knows, still holds everything.
                self.orders.retain(|(on, _), _| *on != replica(index));
                self.happen(Event::Replica(replica(index), CopyEvent::ReplicaLost));
            }
            Act::Drain(index) => {
                self.draining.insert(index);
                self.replicas();
                self.happen(Event::Leaving(server, self.draining.clone()));
            }
            Act::Displace(index) => {
                let on = replica(index);
                let here = |copy: &&Copy| copy.state.replica() == Some(&on);
                let displaced: BTreeSet<Generation> =
                    self.model.copies.iter().filter(here).map(|copy| copy.generation).collect();
                self.displace(displaced);
            }
            Act::Undrain => {
                self.draining.clear();
                self.displace(BTreeSet::new());
                self.replicas();
                self.retry();
                self.happen(Event::Leaving(server, BTreeSet::new()));
            }
            Act::Restart => self.restart(),
            Act::Pass(seconds) => {
                self.now = self.now + Duration::from_secs(seconds);
                self.happen(Event::Reconcile);
            }
        }
    }

    fn displace(&mut self, displaced: BTreeSet<Generation>) {
        for copy in &self.model.copies {
            // One without a place has none to move from.
            let moves = displaced.contains(&copy.generation);
            drop(self.placement.set_displaced(&self.model.name, copy.generation, moves));
        }
        self.happen(Event::Displaced(displaced));
    }

    fn check(&self) {
        self.placement.consistency_check().unwrap_or_else(|wrong| panic!("{wrong:?}"));
        let rows: BTreeSet<Generation> = self.rows.copies.keys().copied().collect();
        for copy in &self.model.copies {
            let generation = copy.generation;
            if matches!(copy.state, State::Available { .. }) {
                assert!(self.reported.contains(&generation), "{generation} is Available and no agent said so");
                assert!(copy.routed != copy.draining);
            }
            if copy.routed {
                assert!(matches!(copy.state, State::Available { .. } | State::Unknown { .. }), "{copy:?}");
            }
            let placed = self.placement.ledger().copy(&self.model.name, generation).is_some();
            if copy.state.replica().is_some() {
                assert!(placed, "{generation} has a replica and no reservation");
                assert!(rows.contains(&generation), "{generation} has a replica and no row");
            }
            if matches!(copy.state, State::Draining { phase: Drain::Unloading, .. }) {
                assert!(!self.route.contains(&generation));
            }
        }
        let routed: BTreeSet<Generation> =
            self.model.copies.iter().filter(|copy| copy.routed).map(|copy| copy.generation).collect();
        assert_eq!(routed, self.route, "the published route is the model's");
        let held = self.model.copies.iter().map(|copy| copy.generation).collect::<BTreeSet<_>>();
        for generation in rows {
            assert!(held.contains(&generation), "{generation} has a row and is not known");
        }
    }

    /// Everyone is back, nothing is lost, nothing fails: time passes until nothing changes any more.
    fn calm(&mut self) {
        self.take(Act::Undrain);
        for _ in 0..60 {
            (0..REPLICAS).for_each(|index| self.inventory(index));
            for _ in 0..4 {
                (0..REPLICAS).for_each(|index| self.work(index, false));
                while !self.mail.is_empty() {
                    self.deliver();
                    self.check();
                }
            }
            self.take(Act::Pass(400));
        }
    }
}

fn report(phase: Option<Phase>) -> Report {
    match phase {
        Some(Phase::Fetching) => Report::Downloading(copy::Progress::default()),
        Some(Phase::Loading) => Report::Loading { estimate: None },
        Some(Phase::Available) => {
            Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false }
        }
        Some(Phase::Failed) => Report::Failed {
            failure: Failure { class: FailureClass::Runtime, message: "it broke".to_owned() },
            freed: true,
        },
        None => Report::Unloaded,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn the_rules_hold_after_every_step_and_what_is_wanted_comes(acts in prop::collection::vec(act(), 1..160)) {
        let mut world = World::new();
        for act in acts {
            world.take(act);
            world.check();
        }
        world.calm();
        world.check();
        let model = &world.model;
        let held: usize = world.agents.values().map(BTreeMap::len).sum();
        prop_assert_eq!(held, model.copies.iter().filter(|copy| copy.state.replica().is_some()).count());
        if !model.is_born() || model.deleted.is_some() || model.deployment.replicas == 0 {
            prop_assert!(model.copies.is_empty(), "{:?}", model.copies);
            prop_assert!(world.rows.copies.is_empty());
            prop_assert_eq!(world.placement.ledger().copy_count(), 0);
        } else {
            let latest = model.latest().expect("born");
            // A rollout that was given up stays so until it is resubmitted.
            let version = if latest.failed.is_some() { model.serving.expect("serves") } else { latest.version };
            let standing = model.version_standing(version);
            prop_assert_eq!(model.standing().available, model.deployment.replicas, "{:?}", model.copies);
            prop_assert_eq!(standing.available, model.deployment.replicas, "{:?}", model.copies);
            prop_assert_eq!(model.copies.len(), model.deployment.replicas as usize);
        }
    }

    #[test]
    fn a_rollout_never_goes_below_its_floor(
        replicas in 1..4_u32,
        (surge, gap) in (0..3_u32, 0..2_u32).prop_filter("a surge or a gap", |(surge, gap)| surge + gap > 0),
        order in prop::collection::vec((0..REPLICAS, any::<bool>()), 0..200),
    ) {
        let rollout = Rollout::RollingUpdate { max_surge: surge, max_unavailable: gap };
        let mut world = World::new();
        world.take(Act::Submit { spec: 0, replicas, rollout });
        world.calm();
        world.take(Act::Submit { spec: 1, replicas, rollout });
        let floor = replicas.saturating_sub(gap);
        for (replica, deliver) in order {
            world.take(if deliver { Act::Deliver } else { Act::Work { replica, fail: false } });
            let staying = world.model.copies.iter().filter(|copy| !copy.draining).count();
            prop_assert!(world.route.len() >= floor as usize, "{} of {floor} answer", world.route.len());
            prop_assert!(staying <= (replicas + surge) as usize, "{staying} copies of {replicas} + {surge}");
        }
    }
}

#[test]
fn a_rollout_that_fails_leaves_the_old_version_serving_until_it_is_resubmitted() {
    let rollout = Rollout::default();
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout });
    world.calm();
    world.take(Act::Submit { spec: 1, replicas: 1, rollout });
    for _ in 0..20 {
        (0..REPLICAS).for_each(|index| world.work(index, true));
        while !world.mail.is_empty() {
            world.deliver();
            world.check();
        }
        world.take(Act::Pass(10));
    }
    assert!(world.model.latest().expect("born").failed.is_some());
    assert_eq!(world.model.serving, Some(Version(1)));
    assert_eq!(world.model.standing().state, ModelState::Available);
    let told = world.model.standing().sentence();
    assert!(told.starts_with("version 2 does not take over: rollout given up"), "{told}");
    assert_eq!(world.model.version_standing(Version(2)).state, ModelState::Failed);
    world.take(Act::Submit { spec: 1, replicas: 1, rollout });
    world.calm();
    assert_eq!(world.model.serving, Some(Version(2)));
    assert_eq!(world.model.version_standing(Version(2)).state, ModelState::Available);
    assert_eq!(world.model.standing().sentence(), "");
}

#[test]
fn resubmitting_the_same_spec_changes_nothing_and_another_number_of_copies_is_no_new_version() {
    let rollout = Rollout::default();
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout });
    world.calm();
    let before = world.model.clone();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout });
    assert_eq!(world.model, before);
    world.take(Act::Submit { spec: 0, replicas: 2, rollout });
    world.calm();
    assert_eq!(world.model.versions.len(), 1);
    assert_eq!(world.model.standing().available, 2);
}

#[test]
fn what_no_time_would_mend_is_tried_again_when_it_is_submitted_again() {
    let mut world = World::new();
    let submit = Act::Submit { spec: 0, replicas: 1, rollout: Rollout::default() };
    world.take(submit.clone());
    world.calm();
    let (given, on) = {
        let copy = &world.model.copies[0];
        (copy.generation, copy.state.replica().expect("placed").clone())
    };
    let failure = Failure { class: FailureClass::Incompatible, message: "its agent is too old".to_owned() };
    world.happen(Event::Reported(on, given, Some(Report::Failed { failure, freed: true })));
    world.happen(Event::Reconcile);
    assert!(matches!(world.model.copies[0].state, State::Failed { .. }), "{:?}", world.model.copies);
    world.take(submit);
    let [copy] = world.model.copies.as_slice() else { panic!("{:?}", world.model.copies) };
    assert!(copy.generation != given && world.model.versions.len() == 1, "{copy:?}");
}

#[test]
fn a_drain_asks_for_one_new_copy_and_keeps_it() {
    one_new_copy_is_asked_for_and_kept(Act::Drain);
}

#[test]
fn a_copy_that_does_not_fit_any_more_moves_as_in_a_drain() {
    one_new_copy_is_asked_for_and_kept(Act::Displace);
}

fn one_new_copy_is_asked_for_and_kept(because: fn(u32) -> Act) {
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout: Rollout::default() });
    world.calm();
    let from = world.model.copies[0].state.replica().expect("placed").index;
    let given = world.model.next_number;
    world.take(because(from));
    for _ in 0..20 {
        // Whatever happens in between, and however often.
        world.take(Act::Pass(1));
        (0..REPLICAS).for_each(|index| world.inventory(index));
        assert!(!world.route.is_empty(), "a copy answers all the time");
        (0..REPLICAS).for_each(|index| world.work(index, false));
        world.deliver();
        world.check();
    }
    for _ in 0..4 {
        (0..REPLICAS).for_each(|index| world.work(index, false));
        while !world.mail.is_empty() {
            world.deliver();
        }
    }
    assert_eq!(world.model.next_number, given + 1, "one new copy, and not one per event");
    let [copy] = world.model.copies.as_slice() else { panic!("{:?}", world.model.copies) };
    assert!(matches!(copy.state, State::Available { .. }) && copy.routed, "{copy:?}");
    assert_ne!(copy.state.replica().expect("placed").index, from);
}

#[test]
fn a_place_that_is_told_twice_is_kept_and_one_for_a_copy_that_is_gone_is_given_back() {
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout: Rollout::default() });
    world.calm();
    let (given, on) = {
        let copy = &world.model.copies[0];
        (copy.generation, copy.state.replica().expect("placed").clone())
    };
    let mut told = |generation: Generation, on: &ReplicaId| {
        let told = Event::Copy(generation, CopyEvent::Placed { on: on.clone() });
        let decision = world.model.apply(told, &world.policy, world.now).expect("nobody asked");
        let about = |effect: &Effect| matches!(effect, Effect::Release(_) | Effect::Keep(_));
        decision.effects.into_iter().filter(about).collect::<Vec<_>>()
    };
    assert_eq!(told(given, &on), [], "its memory is in use");
    let elsewhere = replica((on.index + 1) % REPLICAS);
    assert_eq!(told(given, &elsewhere), [Effect::Release(given), Effect::Keep(given)], "it stays where it is");
    let gone = Generation { number: given.number + 1000, ..given };
    assert_eq!(told(gone, &on), [Effect::Release(gone)]);
}

#[test]
fn a_wanted_copy_that_is_on_its_way_out_is_ordered_again_once_it_is_gone_and_not_before() {
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 1, rollout: Rollout::default() });
    world.calm();
    let (given, on) = {
        let copy = &world.model.copies[0];
        (copy.generation, copy.state.replica().expect("placed").clone())
    };
    let mut orders = |report: Report| {
        let said = Event::Reported(on.clone(), given, Some(report));
        let decision = world.model.apply(said, &world.policy, world.now).expect("nobody asked");
        decision.effects.iter().filter(|effect| matches!(effect, Effect::Register { .. })).count()
    };
    assert_eq!(orders(Report::Draining { holds: 1 }), 0, "an answer to every answer would never end");
    assert_eq!(orders(Report::Draining { holds: 0 }), 0);
    assert_eq!(orders(Report::Unloaded), 1);
}

#[test]
fn copies_of_a_lost_journal_are_adopted_as_they_are() {
    let mut old = World::new();
    old.take(Act::Submit { spec: 0, replicas: 2, rollout: Rollout::default() });
    old.calm();
    let mut model = Model::unborn(old.model.name.clone(), old.now);
    for copy in &old.model.copies {
        let on = copy.state.replica().expect("placed").clone();
        let spec = Arc::clone(&old.model.latest().expect("born").spec);
        let report =
            Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false };
        let (generation, need) = (copy.generation, copy.need.clone());
        let found = Found { on, generation, spec, need, pinned: true, report };
        for _ in 0..2 {
            let adopted = Event::Adopt(Box::new(found.clone()));
            let decision = model.apply(adopted, &old.policy, old.now).expect("nobody asked");
            assert!(!decision.effects.iter().any(|effect| matches!(effect, Effect::Unregister { .. })), "{decision:?}");
        }
    }
    let held = |model: &Model| -> Vec<_> {
        model.copies.iter().map(|copy| (copy.generation, copy.routed, copy.state.replica().cloned())).collect()
    };
    assert_eq!(held(&model), held(&old.model));
    assert_eq!((model.uid, model.deployment.replicas, model.deployment.pinned), (old.model.uid, 2, true));
    assert_eq!(model.standing().available + model.standing().unavailable, 2);
    // What a user has deleted since is not taken up again.
    model.apply(Event::Delete(None), &old.policy, old.now).expect("it is there");
    let copy = &old.model.copies[0];
    let spec = Arc::clone(&old.model.latest().expect("born").spec);
    let on = copy.state.replica().expect("placed").clone();
    let generation = Generation { number: 77, ..copy.generation };
    let (need, report) = (copy.need.clone(), Report::Loading { estimate: None });
    let found = Found { on, generation, spec, need, pinned: false, report };
    let decision = model.apply(Event::Adopt(Box::new(found)), &old.policy, old.now).expect("nobody asked");
    assert!(decision.effects.iter().any(|effect| matches!(effect, Effect::Unregister { .. })), "{decision:?}");
}

#[test]
fn a_model_is_pinned_and_unpinned_where_it_is_and_no_version_follows() {
    let mut world = World::new();
    world.take(Act::Submit { spec: 0, replicas: 2, rollout: Rollout::default() });
    world.calm();
    for wanted in [true, false] {
        let definition = Definition {
            name: world.model.name.clone(),
            spec: world.model.latest().expect("born").spec.as_ref().clone(),
            deployment: DeploymentPatch { pinned: Some(wanted), ..DeploymentPatch::default() },
            kubernetes: None,
            passthrough: Passthrough::default(),
        };
        let submit = Event::Submit(Box::new(definition), Uid(99));
        let decision = world.model.apply(submit, &world.policy, world.now).expect("sound");
        let answer = decision.submitted.map(|answer| (answer.version, answer.outcome));
        assert_eq!(answer, Some((Version(1), Outcome::Rescaled)));
        let orders = decision
            .effects
            .iter()
            .filter(|effect| matches!(effect, Effect::Register { pinned, .. } if *pinned == wanted));
        assert_eq!(orders.count(), 2, "{:?}", decision.effects);
        let kept = decision.effects.iter().filter(|effect| matches!(effect, Effect::Keep(_)));
        assert_eq!(kept.count(), 2, "the ledger has to follow");
        let saved = decision
            .writes
            .iter()
            .any(|write| matches!(write, Write::PutModel(row) if row.deployment.pinned == wanted));
        assert!(saved, "{:?}", decision.writes);
    }
}

#[test]
fn a_later_event_replaces_those_that_say_no_more_and_no_user_is_passed_over() {
    let on = |index| ReplicaId::new(ServerName::new("s").unwrap(), index);
    let lost = |index, event| Event::Replica(on(index), event);
    let leaving = |server: &str, index| Event::Leaving(ServerName::new(server).unwrap(), [index].into());
    assert!(Event::Reconcile.replaces(&Event::Reconcile));
    assert!(leaving("s", 1).replaces(&leaving("s", 2)) && !leaving("s", 1).replaces(&leaving("t", 1)));
    assert!(Event::RoutesSettled(2).replaces(&Event::RoutesReached(2)));
    assert!(Event::RoutesSettled(2).replaces(&Event::RoutesSettled(1)));
    assert!(!Event::RoutesReached(2).replaces(&Event::RoutesSettled(1)), "it says less");
    assert!(!Event::RoutesReached(1).replaces(&Event::RoutesReached(2)), "it is older");
    assert!(lost(1, copy::Event::AgentLost).replaces(&lost(1, copy::Event::AgentLost)));
    assert!(!lost(1, copy::Event::AgentLost).replaces(&lost(1, copy::Event::ReplicaLost)));
    assert!(!Event::Scale(1).replaces(&Event::Scale(1)) && !Event::Reconcile.replaces(&Event::Delete(None)));
}

/// What an agent on `replica` says that it holds, and answers.
fn held(replica: u32, generation: Generation, uri: &str) -> Event {
    let spec = Arc::new(ModelSpec { uri: uri.to_owned(), ..ModelSpec::default() });
    let report = Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false };
    let on = ReplicaId::new(ServerName::new("s").expect("valid"), replica);
    Event::Adopt(Box::new(Found { on, generation, spec, need: Resources::primary(Bytes(1)), pinned: false, report }))
}

/// A model as a restored journal has it: one version, `wanted` copies on the replicas from 0 on.
fn restored(uri: &str, wanted: u32, deleted: bool) -> Model {
    let name = ModelName::new("m").expect("valid");
    let at = Instant::from_micros(1);
    let row = ModelRow {
        name: name.clone(),
        uid: Uid(5),
        created: at,
        deployment: crate::domain::spec::Deployment { replicas: wanted, ..Default::default() },
        kubernetes: None,
        serving: Some(Version(1)),
        number_bound: 64,
        version_floor: Version(1001),
        deleted: deleted.then_some(at),
    };
    let version = VersionRow {
        model: name.clone(),
        uid: Uid(5),
        version: Version(1),
        created: at,
        spec: ModelSpec { uri: uri.to_owned(), ..ModelSpec::default() },
        passthrough: Passthrough::default(),
        failed: None,
    };
    let copy = |number| CopyRow {
        model: name.clone(),
        generation: numbered(5, 1, number),
        replica: ReplicaId::new(ServerName::new("s").expect("valid"), number),
        need: Resources::primary(Bytes(1)),
        routed: true,
        draining: false,
    };
    let copies = if deleted { Vec::new() } else { (0..wanted).map(copy).collect() };
    restore(row, vec![version], copies, at)
}

fn numbered(uid: u64, version: u32, number: u32) -> Generation {
    Generation { uid: Uid(uid), version: Version(version), number }
}

fn take(model: &mut Model, event: Event) -> Vec<Effect> {
    let decision = model.apply(event, &Policy::default(), Instant::from_micros(9)).expect("nobody asked");
    decision.effects.into_iter().filter(|effect| matches!(effect, Effect::Unregister { .. })).collect()
}

fn lacking(replica: u32, generation: Generation) -> Event {
    Event::Reported(ReplicaId::new(ServerName::new("s").expect("valid"), replica), generation, None)
}

/// The copies that answer.
fn answering(model: &Model) -> Vec<Generation> {
    let routed = model.copies.iter().filter(|copy| copy.routed && matches!(copy.state, State::Available { .. }));
    routed.map(|copy| copy.generation).collect()
}

#[test]
fn a_newer_version_that_a_restored_journal_does_not_know_serves_on() {
    let mut model = restored("/one", 1, false);
    assert_eq!(take(&mut model, held(0, numbered(5, 2, 70), "/two")), []);
    assert_eq!(take(&mut model, lacking(0, numbered(5, 1, 0))), []);
    assert_eq!((answering(&model), model.serving), (vec![numbered(5, 2, 70)], Some(Version(2))));
    assert_eq!((model.deployment.replicas, model.copies.len()), (1, 1));
    // Whatever the lost time called its versions, the next one is another.
    let definition = Definition {
        name: model.name.clone(),
        spec: ModelSpec { uri: "/three".to_owned(), ..ModelSpec::default() },
        deployment: DeploymentPatch::default(),
        kubernetes: None,
        passthrough: Passthrough::default(),
    };
    take(&mut model, Event::Submit(Box::new(definition), Uid(900)));
    let newest = model.copies.iter().map(|copy| copy.generation).max().expect("a new copy");
    assert_eq!((newest.uid, newest.version), (Uid(5), Version(1001)));
    assert!(newest.number > 70, "{newest}");
}

#[test]
fn as_many_copies_as_are_found_are_wanted_and_those_that_have_moved_count_once() {
    // It was scaled up: all are kept, whoever calls first.
    let mut model = restored("/one", 1, false);
    assert_eq!(take(&mut model, held(1, numbered(5, 1, 7), "/one")), []);
    assert_eq!(take(&mut model, held(0, numbered(5, 1, 0), "/one")), []);
    assert_eq!((model.deployment.replicas, answering(&model).len()), (2, 2));
    // It was moved: its agent lacks the one that the journal knows.
    let mut model = restored("/one", 1, false);
    assert_eq!(take(&mut model, held(1, numbered(5, 1, 7), "/one")), []);
    take(&mut model, lacking(0, numbered(5, 1, 0)));
    assert_eq!((model.deployment.replicas, answering(&model)), (1, vec![numbered(5, 1, 7)]));
    // What is lost later, after it was there, is wanted as before.
    let mut model = restored("/one", 1, false);
    take(&mut model, held(1, numbered(5, 1, 7), "/one"));
    take(&mut model, held(0, numbered(5, 1, 0), "/one"));
    take(&mut model, lacking(0, numbered(5, 1, 0)));
    assert_eq!(model.deployment.replicas, 2);
    // A user says how many there are to be.
    take(&mut model, Event::Scale(1));
    assert_eq!(model.deployment.replicas, 1);
}

#[test]
fn a_name_that_was_created_again_since_is_the_later_creation() {
    for deleted in [false, true] {
        let mut model = restored("/one", 1, deleted);
        assert_eq!(take(&mut model, held(1, numbered(8, 1, 0), "/two")), [], "deleted: {deleted}");
        assert_eq!((model.uid, model.deleted, model.serving), (Uid(8), None, Some(Version(1))));
        assert_eq!(answering(&model), [numbered(8, 1, 0)]);
        if !deleted {
            take(&mut model, lacking(0, numbered(5, 1, 0)));
        }
        assert_eq!(model.copies.len(), 1, "{:?}", model.copies);
        assert_eq!(model.latest().expect("it is there").spec.uri, "/two");
        // An earlier creation, and one that was deleted, are not taken up.
        let earlier = take(&mut model, held(2, numbered(5, 1, 0), "/one"));
        assert_eq!(earlier.len(), 1);
    }
}

#[test]
fn another_spec_under_a_number_of_the_journal_is_never_taken_for_it() {
    // The journal gave version 1 and copy 0 to something that no agent has; one holds something else by these numbers.
    for replica in [0, 1] {
        let mut model = restored("/journal", 1, false);
        let effects = take(&mut model, held(replica, numbered(5, 1, 0), "/found"));
        let let_go =
            effects.iter().filter(|effect| matches!(effect, Effect::Unregister { on, .. } if on.index == replica));
        assert_eq!(let_go.count(), 0, "what answers is not ordered away: {effects:?}");
        assert_eq!(answering(&model), [numbered(5, 1, 0)], "replica {replica}");
        assert_eq!(model.entry(Version(1)).expect("kept").spec.uri, "/found");
        // What users submitted is the newest version, and takes over as any does.
        let latest = model.latest().expect("it is there");
        assert_eq!((latest.version, latest.spec.uri.as_str()), (Version(1001), "/journal"));
        assert_eq!(model.serving, Some(Version(1)));
        assert!(model.copies.iter().any(|copy| copy.generation.version == Version(1001)), "{:?}", model.copies);
        // Only one copy has the generation, where it was found.
        let same = model.copies.iter().filter(|copy| copy.generation == numbered(5, 1, 0));
        let places: Vec<_> = same.filter_map(|copy| copy.state.replica().map(|on| on.index)).collect();
        assert_eq!(places, [replica]);
    }
    // An agent has what the journal means: the other one has to go.
    let mut model = restored("/journal", 1, false);
    assert_eq!(take(&mut model, held(0, numbered(5, 1, 0), "/journal")), []);
    assert_eq!(take(&mut model, held(1, numbered(5, 1, 9), "/found")).len(), 1);
    assert_eq!((answering(&model), model.versions.len()), (vec![numbered(5, 1, 0)], 1));
}
