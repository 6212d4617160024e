//! What placement promises as a whole, tried with anything that can happen to it.

use std::{collections::BTreeMap, time::Duration};

use proptest::{prelude::*, sample::select};

use super::{explain::best, *};
use crate::domain::{
    invariants,
    memory::{Bytes, Resources},
    names::{ModelName, ReplicaId, ServerName},
    replica::ReplicaState,
    spec::Spread,
    time::Instant,
    version::{Generation, Uid, Version},
};

fn model(number: u8) -> ModelName {
    ModelName::new(&format!("m{number}")).expect("a name")
}

fn generation(version: u32, number: u32) -> Generation {
    Generation { uid: Uid(1), version: Version(version), number }
}

fn on(server: &str, index: u32) -> ReplicaId {
    ReplicaId::new(ServerName::new(server).expect("a name"), index)
}

fn memory(bytes: u64) -> Resources {
    Resources::primary(Bytes(bytes))
}

fn with_gpu(primary: u64, gpu: u64) -> Resources {
    Resources { primary: Bytes(primary), others: [("gpu0".to_owned(), Bytes(gpu))].into() }
}

fn available(bytes: u64) -> ReplicaFacts {
    ReplicaFacts { reported: Some(memory(bytes)), state: ReplicaState::Available, ..ReplicaFacts::default() }
}

fn copy(name: u8, number: u32, need: u64) -> PlacementRequest {
    PlacementRequest::new(model(name), generation(1, number), memory(need))
}

const T0: Instant = Instant::from_micros(1_000_000);

#[derive(Clone, Debug)]
enum Op {
    Server(ServerName, Option<Resources>),
    Replica(ReplicaId, ReplicaFacts),
    RemoveReplica(ReplicaId),
    State(ReplicaId, ReplicaState),
    Cordon(ReplicaId, bool),
    Drain(ReplicaId, bool),
    Reported(ReplicaId, Option<Resources>),
    Place(PlacementRequest),
    PlaceAll(Vec<PlacementRequest>),
    Release(ModelName, Generation),
    KeepOnly(ModelName, Generation),
    Restore(ModelName, Generation, ReplicaId, Resources),
    Resize(ModelName, Generation, Resources),
    Leave(ModelName, Generation),
    Pass(Duration),
    Retry(usize),
}

fn servers() -> impl Strategy<Value = ServerName> {
    select(vec!["a", "b", "c"]).prop_map(|name| ServerName::new(name).expect("a name"))
}

fn replicas() -> impl Strategy<Value = ReplicaId> {
    (servers(), 0_u32..3).prop_map(|(server, index)| ReplicaId::new(server, index))
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![20 => 0_u64..24, 1 => Just(u64::MAX), 1 => Just(u64::MAX / 2), 1 => any::<u64>()]
}

fn resources() -> impl Strategy<Value = Resources> {
    prop_oneof![
        3 => bytes().prop_map(memory),
        1 => (bytes(), bytes()).prop_map(|(primary, gpu)| with_gpu(primary, gpu)),
    ]
}

fn states() -> impl Strategy<Value = ReplicaState> {
    prop_oneof![
        8 => Just(ReplicaState::Available),
        1 => Just(ReplicaState::Pending),
        1 => Just(ReplicaState::Draining),
        1 => Just(ReplicaState::Unknown { since: T0 }),
        1 => Just(ReplicaState::Lost),
    ]
}

fn capabilities() -> impl Strategy<Value = Capabilities> {
    select(vec![vec!["x"], vec!["x"], vec!["x", "y"], vec!["y"], vec![]]).prop_map(Capabilities::new)
}

fn required() -> impl Strategy<Value = Capabilities> {
    select(vec![vec![], vec!["x"], vec![" x "], vec!["y"], vec!["x", "y"], vec!["z"]]).prop_map(Capabilities::new)
}

fn facts() -> impl Strategy<Value = ReplicaFacts> {
    let percent = prop_oneof![4 => Just(0), 4 => 0_u32..60, 1 => any::<u32>()];
    (prop::option::weighted(0.9, resources()), percent, capabilities(), states()).prop_map(
        |(reported, overcommit_percent, capabilities, state)| ReplicaFacts {
            reported,
            overcommit_percent,
            capabilities,
            runtime: "mlserver".to_owned(),
            state,
        },
    )
}

fn generations() -> impl Strategy<Value = (ModelName, Generation)> {
    (0_u8..4, 1_u32..3, 0_u32..4).prop_map(|(name, version, number)| (model(name), generation(version, number)))
}

fn requests() -> impl Strategy<Value = PlacementRequest> {
    let avoid = prop::collection::btree_map(replicas(), (0_u64..40).prop_map(|s| T0 + Duration::from_secs(s)), 0..3);
    let prefer = (prop::collection::btree_set(replicas(), 0..3), prop::collection::btree_set(replicas(), 0..3))
        .prop_map(|(resident_on, artifact_on)| Prefer { resident_on, artifact_on });
    (
        generations(),
        required(),
        prop::option::weighted(0.2, servers()),
        resources(),
        (any::<bool>(), -1_i32..2, 0_u32..5),
        (avoid, prefer),
    )
        .prop_map(
            |((model, generation), requirements, server, need, (spread, priority, together), (avoid, prefer))| {
                PlacementRequest {
                    requirements,
                    server,
                    spread: if spread { Spread::Servers } else { Spread::OneServer },
                    priority,
                    together,
                    avoid,
                    prefer,
                    ..PlacementRequest::new(model, generation, need)
                }
            },
        )
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        1 => (servers(), prop::option::of(resources())).prop_map(|(server, declared)| Op::Server(server, declared)),
        6 => (replicas(), facts()).prop_map(|(id, facts)| Op::Replica(id, facts)),
        1 => replicas().prop_map(Op::RemoveReplica),
        2 => (replicas(), states()).prop_map(|(id, state)| Op::State(id, state)),
        1 => (replicas(), any::<bool>()).prop_map(|(id, to)| Op::Cordon(id, to)),
        1 => (replicas(), any::<bool>()).prop_map(|(id, to)| Op::Drain(id, to)),
        1 => (replicas(), prop::option::of(resources())).prop_map(|(id, to)| Op::Reported(id, to)),
        12 => requests().prop_map(Op::Place),
        1 => prop::collection::vec(requests(), 0..5).prop_map(Op::PlaceAll),
        4 => generations().prop_map(|(model, generation)| Op::Release(model, generation)),
        1 => generations().prop_map(|(model, generation)| Op::KeepOnly(model, generation)),
        2 => (generations(), replicas(), resources()).prop_map(|((m, g), id, need)| Op::Restore(m, g, id, need)),
        1 => (generations(), resources()).prop_map(|((m, g), need)| Op::Resize(m, g, need)),
        1 => generations().prop_map(|(m, g)| Op::Leave(m, g)),
        1 => (0_u64..20).prop_map(|s| Op::Pass(Duration::from_secs(s))),
        2 => (0_usize..6).prop_map(Op::Retry),
    ]
}

/// The indexed decision is what judging every replica comes to, and its explanation says the same.
fn agrees(ledger: &Ledger, request: &PlacementRequest, now: Instant) -> Result<(), TestCaseError> {
    let decision = ledger.decide(request, now);
    let report = ledger.explain(request, now);
    if ledger.copy(&request.model, request.generation).is_some() {
        // The report is about the copy as if it had no place yet; the decision is not.
        return Ok(());
    }
    match &decision.outcome {
        Ok(placed) => {
            prop_assert_eq!(placed.score.as_ref(), best(&report.candidates));
            prop_assert_eq!(Some(&placed.replica), report.chosen.as_ref());
            prop_assert_eq!(report.unplaced, None);
        }
        Err(unplaced) => {
            prop_assert_eq!(report.chosen, None);
            prop_assert_eq!(Some(unplaced), report.unplaced.as_ref());
            prop_assert!(!unplaced.summary().is_empty());
            let counted: u32 = unplaced.findings().rejected.values().sum();
            prop_assert!(request.need.is_zero() || counted as usize == ledger.replicas().count());
        }
    }
    Ok(())
}

fn place(placement: &mut Placement, request: &PlacementRequest, now: Instant) -> Result<(), TestCaseError> {
    agrees(placement.ledger(), request, now)?;
    let decision = placement.place(request, now);
    prop_assert_eq!(invariants::decision(placement.ledger(), request, &decision), None);
    prop_assert_eq!(placement.waits(&request.model, request.generation).is_some(), decision.outcome.is_err());
    Ok(())
}

fn apply(placement: &mut Placement, op: Op, now: &mut Instant) -> Result<(), TestCaseError> {
    match op {
        Op::Server(server, declared) => placement.upsert_server(server, declared),
        Op::Replica(id, facts) => placement.upsert_replica(&id, facts),
        Op::RemoveReplica(id) => drop(placement.remove_replica(&id)),
        Op::State(id, state) => drop(placement.set_state(&id, state)),
        Op::Cordon(id, to) => drop(placement.set_cordoned(&id, to)),
        Op::Drain(id, to) => drop(placement.set_draining(&id, to)),
        Op::Reported(id, to) => drop(placement.set_reported(&id, to)),
        Op::Place(request) => place(placement, &request, *now)?,
        Op::PlaceAll(requests) => {
            let decisions = placement.place_all(&requests, *now);
            prop_assert_eq!(decisions.len(), requests.len());
        }
        Op::Release(model, generation) => drop(placement.release(&model, generation)),
        Op::KeepOnly(model, generation) => {
            placement.keep_only(&model, &[generation].into());
            prop_assert!(placement.ledger().copies_of(&model).all(|(kept, _)| *kept == generation));
            let waits = |entry: &&Waiting| entry.request.model == model && entry.request.generation != generation;
            prop_assert_eq!(placement.waiting().filter(waits).count(), 0);
        }
        Op::Restore(model, generation, id, need) => drop(placement.restore(&model, generation, &id, need)),
        Op::Resize(model, generation, need) => drop(placement.resize(&model, generation, need)),
        Op::Leave(model, generation) => drop(placement.mark_leaving(&model, generation)),
        Op::Pass(time) => *now = *now + time,
        Op::Retry(limit) => drop(placement.retry(*now, limit)),
    }
    Ok(())
}

/// The same state, built in another order.
fn rebuilt(ledger: &Ledger) -> Ledger {
    let mut fresh = Ledger::default();
    let mut replicas: Vec<&Replica> = ledger.replicas().collect();
    replicas.reverse();
    for replica in &replicas {
        for (model, generation) in replica.copies() {
            let copy = ledger.copy(model, *generation).expect("it is registered");
            fresh.restore(model, *generation, replica.id(), copy.need.clone()).expect("once");
            if copy.leaving {
                fresh.mark_leaving(model, *generation).expect("it is registered");
            }
        }
    }
    for replica in replicas {
        fresh.upsert_replica(replica.id(), replica.facts().clone());
        fresh.set_cordoned(replica.id(), replica.cordoned).expect("it is known");
        fresh.set_draining(replica.id(), replica.draining).expect("it is known");
    }
    for (server, declared) in ledger.declared() {
        fresh.upsert_server(server.clone(), declared.clone());
    }
    fresh
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_the_books_add_up_and_no_limit_is_passed(
        steps in prop::collection::vec(ops(), 1..80),
        probe in requests(),
    ) {
        let mut placement = Placement::default();
        let mut now = T0;
        for op in steps {
            apply(&mut placement, op.clone(), &mut now)?;
            prop_assert_eq!(invariants::placement(&placement), vec![], "after {:?}", op);
        }
        agrees(placement.ledger(), &probe, now)?;

        // Equal states give equal answers, and at an equal cost.
        let twin = rebuilt(placement.ledger());
        prop_assert_eq!(&twin, placement.ledger());
        prop_assert_eq!(twin.decide(&probe, now), placement.ledger().decide(&probe, now));

        // What is placed and released leaves no trace.
        let mut ledger = placement.ledger().clone();
        if ledger.copy(&probe.model, probe.generation).is_none() && ledger.place(&probe, now).outcome.is_ok() {
            prop_assert_ne!(&ledger, placement.ledger());
            ledger.release(&probe.model, probe.generation);
            prop_assert_eq!(&ledger, placement.ledger());
        }

        // When all has been offered, nobody waits who could be placed; and asking again does nothing.
        let mut rounds = 0;
        while placement.retry(now, 7).more {
            rounds += 1;
            prop_assert!(rounds < 1_000, "it never comes to an end");
        }
        prop_assert_eq!(invariants::placement(&placement), vec![]);
        for entry in placement.waiting() {
            let decision = placement.ledger().decide(&entry.request, now);
            prop_assert_eq!(decision.replica(), None, "{:?} waits in vain", entry);
        }
        prop_assert!(placement.retry(now, 100).decisions.is_empty());
    }
}

/// `count` replicas of `servers` servers, each with `bytes`.
fn fleet(servers: u32, count: u32, bytes: u64, overcommit_percent: u32) -> Placement {
    let mut placement = Placement::default();
    for number in 0..count {
        let id = on(&format!("s{:04}", number % servers), number / servers);
        placement.upsert_replica(&id, ReplicaFacts { overcommit_percent, ..available(bytes) });
    }
    placement
}

/// The most that any of `requests` looked at.
fn most_examined(placement: &mut Placement, requests: impl Iterator<Item = PlacementRequest>) -> u32 {
    requests.map(|request| placement.place(&request, T0).examined).max().unwrap_or(0)
}

#[test]
fn a_hundred_times_the_replicas_are_a_few_looks_more() {
    type Wish = fn(PlacementRequest) -> PlacementRequest;
    let wishes: [(&str, Wish); 5] = [
        ("refused by the best", |request| PlacementRequest {
            avoid: (0..12).map(|n| (on(&format!("s{:04}", n % 4), n / 4), T0 + Duration::from_secs(1))).collect(),
            ..request
        }),
        ("plain", |request| request),
        ("several that share a server", |request| PlacementRequest { together: 3, ..request }),
        ("spread over servers", |request| PlacementRequest { spread: Spread::Servers, ..request }),
        ("pinned", |request| PlacementRequest { server: Some(on("s0001", 0).server), ..request }),
    ];
    for (what, wish) in wishes {
        for servers in [4, 50] {
            let examined = |replicas| {
                let mut placement = fleet(servers, replicas, 1_000, 20);
                let sizes = (0..300).map(|n| wish(copy((n % 200) as u8, n, u64::from(n % 37 * 10 + 1))));
                let filled = most_examined(&mut placement, sizes);
                // A copy that fits nowhere is refused without asking every replica.
                filled.max(placement.place(&copy(201, 0, 5_000), T0).examined)
            };
            let (few, many) = (examined(100), examined(10_000));
            assert!(many <= 3 * few + 60, "{what}: {few} looks among 100 replicas, {many} among 10,000");
        }
    }
}

#[test]
fn a_full_fleet_with_one_gap_is_searched_in_a_few_looks() {
    let mut placement = fleet(10, 10_000, 100, 0);
    for (at, id) in placement.ledger().replicas().map(|r| r.id().clone()).collect::<Vec<_>>().into_iter().enumerate() {
        let need = if at == 7_777 { 50 } else { 60 + at as u64 % 40 };
        placement.restore(&model(0), generation(1, at as u32), &id, memory(need)).expect("once");
    }
    let gap = placement.ledger().replicas().nth(7_777).expect("there").id().clone();
    let decision = placement.place(&copy(1, 0, 45), T0);
    assert_eq!(decision.replica(), Some(&gap));
    assert!(decision.examined < 200, "{} looks", decision.examined);
}

#[test]
fn a_version_goes_to_a_server_that_can_take_all_its_copies() {
    let mut placement = Placement::default();
    placement.upsert_replica(&on("large", 0), available(1_000));
    for index in 0..3 {
        placement.upsert_replica(&on("small", index), available(100));
    }
    let requests: Vec<_> = (0..3).map(|n| PlacementRequest { together: 3, ..copy(0, n, 60) }).collect();
    let decisions = placement.place_all(&requests, T0);
    assert!(decisions.iter().all(|d| d.replica().is_some_and(|id| id.server.as_str() == "small")), "{decisions:?}");
    assert_eq!(placement.place(&copy(1, 0, 60), T0).replica(), Some(&on("large", 0)));
}

#[test]
fn what_fits_is_placed_and_the_rest_follows_by_priority_and_wait() {
    let mut placement = Placement::default();
    placement.upsert_replica(&on("a", 0), available(100));
    let low = copy(0, 0, 60);
    let high = PlacementRequest { priority: 1, ..copy(1, 0, 60) };
    let small = copy(2, 0, 30);
    let decisions = placement.place_all(&[low, high.clone(), small], T0);
    let placed: Vec<bool> = decisions.iter().map(|decision| decision.outcome.is_ok()).collect();
    assert_eq!(placed, [false, true, true]);

    // Another one that waits no less urgently, but since later; and one that waits more urgently still.
    let later = T0 + Duration::from_secs(1);
    placement.place(&copy(3, 0, 60), later);
    placement.place(&PlacementRequest { priority: 2, ..copy(4, 0, 61) }, later);
    placement.release(&high.model, high.generation);
    let order = |placement: &mut Placement| -> Vec<ModelName> {
        placement.retry(later, 100).decisions.into_iter().map(|(model, _, _)| model).collect()
    };
    assert_eq!(order(&mut placement), [model(4)]);
    placement.release(&model(4), generation(1, 0));
    assert_eq!(order(&mut placement), [model(0)]);
}

#[test]
fn a_byte_that_comes_free_disturbs_nobody_whom_it_cannot_serve() {
    let mut placement = fleet(1, 1, 1_000, 0);
    let filler = copy(0, 0, 1_000);
    placement.place(&filler, T0);
    for number in 0..20_000_u32 {
        let name = ModelName::new(&format!("w{number}")).expect("a name");
        placement.place(&PlacementRequest::new(name, generation(1, 0), memory(500 + u64::from(number))), T0);
    }
    while placement.retry(T0, 1_000).more {}
    placement.resize(&filler.model, filler.generation, memory(501)).expect("it is registered");
    let retried = placement.retry(T0, 10);
    assert_eq!((retried.decisions.len(), retried.more), (0, false), "499 bytes are too few for anybody");
    placement.resize(&filler.model, filler.generation, memory(500)).expect("it is registered");
    let retried = placement.retry(T0, 10);
    let placed: Vec<_> =
        retried.decisions.iter().map(|(model, _, decision)| (model.as_str(), decision.outcome.is_ok())).collect();
    assert_eq!((placed, retried.more), (vec![("w0", true)], false));
}

#[test]
fn copies_that_wait_for_a_replica_are_not_asked_when_memory_comes_free() {
    let mut placement = fleet(1, 1, 1 << 40, 0);
    for number in 0..1_000_u32 {
        let name = ModelName::new(&format!("w{number}")).expect("a name");
        for copy in 0..2 {
            placement.place(&PlacementRequest::new(name.clone(), generation(1, copy), memory(10)), T0);
        }
    }
    assert_eq!(placement.waiting_count(), 1_000);
    while placement.retry(T0, 5_000).more {}
    placement.place(&copy(0, 0, 10), T0);
    placement.release(&model(0), generation(1, 0));
    assert!(!placement.retry(T0, 3).more, "the second copies wait for another replica, not for memory");
    placement.upsert_replica(&on("s0000", 1), available(1 << 40));
    while placement.retry(T0, 100).more {}
    assert_eq!(placement.waiting_count(), 0);
}

#[test]
fn a_replica_over_its_limit_takes_nothing_new_and_says_so() {
    let mut placement = Placement::default();
    let id = on("a", 0);
    placement.upsert_server(id.server.clone(), Some(memory(150)));
    placement.upsert_replica(&id, ReplicaFacts { overcommit_percent: 10, ..available(100) });
    placement.restore(&model(0), generation(1, 0), &id, memory(120)).expect("what is there is there");
    let replica = placement.ledger().replica(&id).expect("known");
    let conditions: Vec<String> = replica.conditions().iter().map(ToString::to_string).collect();
    assert_eq!(
        conditions,
        [
            "capacity differs: 150 B declared, 100 B reported; the smaller counts",
            "over its limit: 120 B registered, 110 B allowed; nothing new is placed here"
        ]
    );
    let decision = placement.place(&copy(1, 0, 1), T0);
    let unplaced = decision.outcome.expect_err("nothing new");
    assert_eq!(unplaced.summary(), "1 replica matches, and it is over the memory limit");
    placement.release(&model(0), generation(1, 0));
    assert_eq!(placement.retry(T0, 10).decisions.len(), 1);
    assert_eq!(placement.waiting_count(), 0);
}

#[test]
fn a_copy_larger_than_all_the_memory_never_goes_there() {
    let mut placement = fleet(1, 2, 100, 50);
    let unplaced = placement.place(&copy(0, 0, 120), T0).outcome.expect_err("it could never be resident");
    assert_eq!(unplaced.rejected(Filter::TooBig), 2);
    assert_eq!(unplaced.summary(), "2 replicas match, each is smaller than the 120 B it needs; the nearest is s0000-0");
    assert!(placement.place(&copy(1, 0, 100), T0).outcome.is_ok());
    assert!(placement.place(&copy(2, 0, 100), T0).outcome.is_ok());
    assert!(placement.place(&copy(3, 0, 50), T0).outcome.is_ok(), "overcommit is for several together");
}

#[test]
fn the_order_of_preference_is_the_policy() {
    let mut placement = Placement::default();
    for index in 0..4 {
        placement.upsert_replica(&on("a", index), ReplicaFacts { overcommit_percent: 100, ..available(100) });
    }
    for (index, need) in [(0, 90), (1, 80), (2, 30), (3, 10)] {
        placement.restore(&model(9), generation(index + 1, 0), &on("a", index), memory(need)).expect("once");
    }
    let resident_on = [on("a", 0)].into();
    let artifact_on = [on("a", 0), on("a", 1)].into();
    let mut request = PlacementRequest { prefer: Prefer { resident_on, artifact_on }, ..copy(0, 0, 60) };
    let chosen = |request: &PlacementRequest| placement.ledger().decide(request, T0).replica().cloned();
    assert_eq!(chosen(&request), Some(on("a", 0)), "in memory beats everything");
    request.prefer.resident_on.clear();
    assert_eq!(chosen(&request), Some(on("a", 1)), "on disk beats evictions, and then the emptier");
    request.prefer.artifact_on.remove(&on("a", 1));
    assert_eq!(chosen(&request), Some(on("a", 0)));
    request.prefer.artifact_on.clear();
    assert_eq!(chosen(&request), Some(on("a", 3)), "the emptiest");
    request.avoid = [(on("a", 3), T0 + Duration::from_secs(1))].into();
    assert_eq!(chosen(&request), Some(on("a", 2)), "it failed on the emptiest");
    request.avoid.insert(on("a", 2), T0 + Duration::from_secs(1));
    assert_eq!(chosen(&request), Some(on("a", 1)), "evictions rather than nothing");
}

#[test]
fn a_larger_replica_is_better_than_an_emptier_one_that_has_to_evict() {
    let mut placement = Placement::default();
    for (server, bytes, used) in [("large", 1_000, 900), ("small", 60, 10)] {
        let facts = ReplicaFacts { overcommit_percent: 50, ..available(bytes) };
        placement.upsert_replica(&on(server, 0), facts);
        placement.restore(&model(9), generation(1, bytes as u32), &on(server, 0), memory(used)).expect("once");
    }
    let chosen = |need| placement.ledger().decide(&copy(0, 0, need), T0).replica().cloned();
    assert_eq!(chosen(60), Some(on("large", 0)));
    assert_eq!(chosen(50), Some(on("small", 0)));
}

#[test]
fn room_that_comes_free_during_a_round_is_offered_to_those_before_it() {
    let mut placement = fleet(1, 1, 100, 0);
    placement.place_all(&[copy(0, 0, 60), copy(1, 0, 40)], T0);
    let urgent = PlacementRequest { priority: 1, ..copy(2, 0, 60) };
    placement.place_all(&[urgent, copy(3, 0, 40), copy(4, 0, 70)], T0);
    while placement.retry(T0, 10).more {}
    placement.release(&model(1), generation(1, 0));
    let first = placement.retry(T0, 1);
    assert_eq!((first.decisions[0].0.clone(), first.more), (model(3), true));
    placement.release(&model(0), generation(1, 0));
    while placement.retry(T0, 1).more {}
    assert!(placement.waits(&model(2), generation(1, 0)).is_none(), "it waits in vain");
}

#[test]
fn copies_of_a_version_stay_on_one_server_unless_they_may_spread() {
    let mut placement = fleet(2, 4, 100, 0);
    let first = placement.place(&copy(0, 0, 10), T0).replica().cloned().expect("placed");
    let second = placement.place(&copy(0, 1, 10), T0).replica().cloned().expect("placed");
    assert_eq!(first.server, second.server);
    assert_ne!(first, second);
    let third = placement.place(&copy(0, 2, 10), T0);
    assert_eq!(
        third.outcome.expect_err("its server is used up").summary(),
        "2 replicas match on server s0000, where its other copies are, each already holds this version"
    );
    // Once they leave, the third may go elsewhere.
    placement.mark_leaving(&model(0), generation(1, 0)).expect("registered");
    placement.mark_leaving(&model(0), generation(1, 1)).expect("registered");
    let retried = placement.retry(T0, 10);
    let (_, _, decision) = retried.decisions.first().expect("tried");
    assert_eq!(decision.replica().map(|id| id.server.as_str()), Some("s0001"));

    let spread = |number| PlacementRequest { spread: Spread::Servers, ..copy(1, number, 10) };
    let mut servers: BTreeMap<String, u32> = BTreeMap::new();
    for number in 0..4 {
        let id = placement.place(&spread(number), T0).replica().cloned().expect("placed");
        *servers.entry(id.server.to_string()).or_default() += 1;
    }
    assert_eq!(servers.into_values().collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn a_copy_bound_to_two_servers_is_tried_when_one_lets_go() {
    let mut placement = fleet(2, 2, 100, 0);
    placement.restore(&model(0), generation(1, 0), &on("s0001", 0), memory(10)).expect("once");
    let pinned = PlacementRequest { server: Some(on("s0000", 0).server), ..copy(0, 1, 10) };
    assert_eq!(
        placement.place(&pinned, T0).outcome.expect_err("it can't be on both").summary(),
        "it is to be on server s0000, but its other copies are on server s0001 and it stays on one"
    );
    while placement.retry(T0, 10).more {}
    placement.set_state(&on("s0001", 0), ReplicaState::Lost).expect("known");
    let retried = placement.retry(T0, 10);
    assert_eq!(retried.decisions.first().and_then(|(_, _, d)| d.replica()), Some(&on("s0000", 0)));
}

#[test]
fn a_copy_that_failed_somewhere_is_tried_there_again_in_time() {
    let mut placement = fleet(1, 1, 100, 0);
    let until = T0 + Duration::from_secs(30);
    let request = PlacementRequest { avoid: [(on("s0000", 0), until)].into(), ..copy(0, 0, 10) };
    let unplaced = placement.place(&request, T0).outcome.expect_err("avoided");
    assert_eq!(unplaced.summary(), "1 replica matches, and it failed to load it of late");
    assert_eq!(placement.next_retry(), Some(until));
    while placement.retry(T0, 10).more {}
    assert!(placement.retry(until, 10).decisions.iter().all(|(_, _, decision)| decision.outcome.is_ok()));
    assert_eq!((placement.waiting_count(), placement.next_retry()), (0, None));
}

#[test]
fn a_copy_of_no_known_size_is_not_placed() {
    let mut placement = fleet(1, 1, 100, 0);
    let unplaced = placement.place(&copy(0, 0, 0), T0).outcome.expect_err("no size");
    assert!(unplaced.summary().contains("size is not known"), "{unplaced}");
}

#[test]
fn a_request_that_comes_twice_reserves_once() {
    let mut placement = fleet(1, 2, 100, 0);
    let first = placement.place(&copy(0, 0, 60), T0);
    let before = placement.ledger().clone();
    let second = placement.place(&copy(0, 0, 60), T0);
    assert_eq!(first.replica(), second.replica());
    assert_eq!(&before, placement.ledger());
    let elsewhere = placement.restore(&model(0), generation(1, 0), &on("s0000", 1), memory(60));
    assert!(matches!(elsewhere, Err(LedgerError::Elsewhere { .. })), "{elsewhere:?}");
}

#[test]
fn a_request_that_comes_again_with_another_need_has_its_place_hold_that_much() {
    let mut placement = fleet(1, 1, 100, 0);
    placement.place(&copy(0, 0, 60), T0);
    placement.place(&copy(1, 0, 30), T0);
    let again = placement.place(&copy(0, 0, 90), T0);
    assert_eq!(again.replica(), Some(&on("s0000", 0)), "it is there, whether or not it may");
    let replica = placement.ledger().replica(&on("s0000", 0)).expect("known");
    assert_eq!((replica.registered(), replica.over_limit()), (memory(120), Some((None, Bytes(20)))));
    assert_eq!(placement.ledger().consistency_check(), Ok(()));
}

#[test]
fn an_explanation_names_every_replica_and_the_nearest_miss() {
    let mut placement = fleet(2, 4, 100, 0);
    placement.place(&copy(9, 0, 100), T0);
    for index in 0..2 {
        for server in ["s0000", "s0001"] {
            let copy = (model(8), generation(1, index + if server == "s0000" { 10 } else { 20 }));
            placement.restore(&copy.0, copy.1, &on(server, index), memory(60)).expect("once");
        }
    }
    placement.set_cordoned(&on("s0001", 1), true).expect("known");
    let report = placement.explain(&copy(0, 0, 60), T0);
    assert_eq!(
        report.to_string(),
        "m0 copy 0 needs 60 B\n\
         server s0000\n\
         \u{20} s0000-0: is 60 B over its limit; lacks 60 B\n\
         \u{20} s0000-1: lacks 20 B\n\
         server s0001\n\
         \u{20} s0001-0: lacks 20 B\n\
         \u{20} s0001-1: is cordoned; lacks 20 B\n\
         not placed: 4 replicas match: 1 is cordoned, 1 is over the memory limit, 2 lack at least 20 B; the nearest is \
         s0000-1\n\
         it needs 20 B more on any of 2 replicas (s0000-1, s0001-0)"
    );
    let fits = placement.explain(&copy(0, 0, 40), T0);
    assert!(fits.to_string().contains("* s0000-1: fits: 60.0 % used by 1 copy"), "{fits}");
    assert!(serde_json::to_string(&report).is_ok_and(|json| json.contains("\"filter\":\"cordoned\"")));
}

#[test]
fn where_a_copy_failed_is_better_than_nowhere_and_worse_than_anywhere_else() {
    let mut placement = Placement::default();
    placement.upsert_replica(&on("s", 0), available(10));
    let avoiding = |number| {
        let mut request = copy(number, 0, 6);
        request.avoid = [(on("s", 0), T0 + Duration::from_secs(100))].into();
        request
    };
    assert!(placement.place(&avoiding(0), T0).outcome.is_err());
    assert_eq!(placement.place_at_last(avoiding(0), T0).replica(), Some(&on("s", 0)));
    assert_eq!(placement.waiting_count(), 0);
    placement.upsert_replica(&on("s", 1), available(10));
    placement.release(&model(0), generation(1, 0));
    assert_eq!(placement.place_at_last(avoiding(1), T0).replica(), Some(&on("s", 1)));
}
