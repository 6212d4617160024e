//! An agent finds out what its copies take, says so, and knows what its server does not give back.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    dead_code,
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    reason = "a test stops where it fails, and shares a helper module of which it uses a part"
)]

mod agent_world;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use agent_world::{Server, Session, World, generation, register, rest, unregister};
use wharf::{
    agent::Options,
    domain::{
        copy::Report,
        memory::{Bytes, Resources},
        order::Order,
        residency::Eviction,
        size::{Guesses, Trust},
        version::Generation,
    },
    ports::{Footprint, ServerProcess},
    rpc::proto::agent::agent_message,
};

const SECOND: Duration = Duration::from_secs(1);

/// The fake server's process: what is loaded in it, a bit of its own, and what it does not give back.
#[derive(Debug, Default)]
struct Process {
    server: OnceLock<Arc<Server>>,
    /// What it has with nothing loaded.
    base: AtomicU64,
    kept: AtomicU64,
    /// Runs before this one. It is known what each but the first had when it was empty.
    runs: AtomicU64,
}

impl ServerProcess for Process {
    fn footprint(&self) -> Option<Footprint> {
        let server = self.server.get()?;
        let loaded: u64 = server.0.lock().unwrap().loaded.values().sum();
        let (base, runs) = (self.base.load(SeqCst), self.runs.load(SeqCst));
        let bytes = Bytes(base + loaded + self.kept.load(SeqCst));
        Some(Footprint { run: 7 + runs, bytes, empty: (runs > 0).then_some(Bytes(base)) })
    }
}

/// A replica whose server tells nothing, and whose process is there to look at.
async fn watched(capacity: u64, edit: impl FnOnce(&mut Options)) -> (World, Session, Arc<Process>) {
    let process = Arc::new(Process::default());
    let seen = Arc::clone(&process);
    let (world, session) = World::new(capacity, |options| {
        options.guesses = Guesses::parse("*=3+5");
        options.process = Some(seen);
        edit(options);
    })
    .await;
    process.server.set(Arc::clone(&world.server)).unwrap();
    (world, session, process)
}

async fn measured(session: &mut Session, copy: Generation) -> Option<u64> {
    let report = session.until(copy, |report| matches!(report, Report::Available { .. })).await;
    let Report::Available { measured, .. } = report else { panic!("{report:?}") };
    measured.map(|size| size.bytes.primary.0)
}

/// The order, from a scheduler to which the copy's size is known.
fn known(mut order: Order) -> Order {
    let Order::Register { measured, .. } = &mut order else { panic!("a registration") };
    *measured = true;
    order
}

fn leaked(world: &World) -> u64 {
    let gauges = world.agent.gauges();
    gauges.iter().find(|(name, ..)| *name == "wharf_agent_leaked_bytes").unwrap().2
}

fn resident(world: &World) -> u64 {
    world.agent.inspect()["resident"]["primary"].as_u64().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_guessed_then_measured_and_the_memory_that_counts_follows() {
    let (world, mut session, _process) = watched(1000, |_| {}).await;
    world.server.edit(|state| state.load_time = SECOND);
    let copy = generation(1, 1, 1);
    // The scheduler knows nothing: it counts 300. The artifact has two bytes, and takes 40.
    let order = register("iris", copy, 300, &world.artifact(40));
    session.obeyed(&[order]).await;
    let report = session.until(copy, |report| matches!(report, Report::Loading { .. })).await;
    let Report::Loading { estimate: Some(guess) } = report else { panic!("{report:?}") };
    assert_eq!(guess.bytes, Resources::primary(Bytes(2 * 3 + 5)));
    assert_eq!(measured(&mut session, copy).await, Some(40));
    assert_eq!(resident(&world), 40);

    // Another model of the same files is known by now.
    let other = generation(2, 1, 1);
    session.obeyed(&[register("iris2", other, 300, &world.artifact(40))]).await;
    let report = session.until(other, |report| matches!(report, Report::Loading { .. })).await;
    let Report::Loading { estimate: Some(known) } = report else { panic!("{report:?}") };
    assert_eq!((known.bytes, known.key), (Resources::primary(Bytes(40)), guess.key));
}

#[tokio::test(start_paused = true)]
async fn first_loads_that_are_measured_are_alone_and_what_is_known_survives_a_restart() {
    let (mut world, mut session, _process) = watched(10_000, |_| {}).await;
    world.server.edit(|state| state.load_time = SECOND);
    let began = tokio::time::Instant::now();
    let copies: Vec<Generation> = (1..=3).map(|uid| generation(uid, 1, 1)).collect();
    let orders: Vec<_> = copies
        .iter()
        .map(|copy| register(&format!("m{}", copy.uid.0), *copy, 300, &world.artifact(100 * copy.uid.0)))
        .collect();
    session.obeyed(&orders).await;
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let message = session.said.recv().await.unwrap();
        if let agent_message::Message::Reports(reports) = message {
            for report in reports.reports {
                let report = wharf::rpc::agent_wire::report_from_wire(report).unwrap();
                if let Report::Available { measured: Some(size), .. } = report.report {
                    seen.push((report.generation, size.bytes.primary.0));
                }
            }
        }
    }
    seen.sort_unstable();
    // Each second of loading belongs to one of them, so none has the memory of another.
    assert_eq!(seen, copies.iter().map(|copy| (*copy, 100 * copy.uid.0)).collect::<Vec<_>>());
    assert!(began.elapsed() >= 3 * SECOND, "{:?}", began.elapsed());

    let session = world.restart_agent().await;
    for one in session.inventory() {
        let Report::Available { measured: Some(size), .. } = one.report else { panic!("{one:?}") };
        assert_eq!(size.bytes.primary.0, 100 * one.generation.uid.0);
    }
    assert_eq!(resident(&world), 600);
}

#[tokio::test(start_paused = true)]
async fn a_measured_load_that_takes_long_keeps_no_other_copy_waiting_for_long() {
    let (world, mut session, _process) = watched(100, |_| {}).await;
    let copies = [generation(1, 1, 1), generation(2, 1, 1), generation(3, 1, 1)];
    session.obeyed(&[register("first", copies[0], 60, &world.artifact(60))]).await;
    assert_eq!(measured(&mut session, copies[0]).await, Some(60));
    world.server.edit(|state| state.load_time = 200 * SECOND);
    session.obeyed(&[register("slow", copies[1], 30, &world.artifact(30))]).await;
    world.until(|world| world.server.is_loaded("slow_1")).await;
    world.server.edit(|state| state.load_time = Duration::ZERO);
    // The third is as large as the scheduler says, so the first is to leave for it.
    let began = tokio::time::Instant::now();
    session.obeyed(&[known(register("third", copies[2], 60, &world.artifact(61)))]).await;
    session.available(copies[2]).await;
    assert!(began.elapsed() <= 10 * SECOND, "{:?}", began.elapsed());
    // Nobody waits again for what is no measurement any more.
    let began = tokio::time::Instant::now();
    assert_eq!(world.infer("first", copies[0]).await.status().as_u16(), 200);
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    let slow = session.until(copies[1], |report| matches!(report, Report::Available { .. }));
    let Ok(Report::Available { measured: None, .. }) = tokio::time::timeout(300 * SECOND, slow).await else {
        panic!("it was disturbed")
    };
}

#[tokio::test(start_paused = true)]
async fn a_load_that_used_what_the_process_had_left_is_no_measure() {
    let (mut world, mut session, process) = watched(1000, |_| {}).await;
    let copy = generation(1, 1, 1);
    process.kept.store(50, SeqCst);
    world.server.edit(|state| state.load_time = SECOND);
    session.obeyed(&[register("iris", copy, 300, &world.artifact(40))]).await;
    session.until(copy, |report| matches!(report, Report::Loading { .. })).await;
    // It takes its 40 from the 50 that the process had kept: nothing is gained.
    world.until(|world| world.server.is_loaded("iris_1")).await;
    process.kept.store(10, SeqCst);
    assert_eq!(measured(&mut session, copy).await, None);
    assert_eq!(resident(&world), 11, "the guess goes on counting");
    // Over a restart as well, and it is told whoever did not hear it before.
    let session = world.restart_agent().await;
    let [one] = <[_; 1]>::try_from(session.inventory()).expect("one copy");
    let Report::Available { measured: None, estimate: Some(guess), .. } = one.report else { panic!("{one:?}") };
    assert_eq!((guess.bytes, resident(&world)), (Resources::primary(Bytes(11)), 11));
}

#[tokio::test(start_paused = true)]
async fn what_is_declared_counts_in_memory_while_it_is_more_than_what_was_measured() {
    let (world, mut session, _process) = watched(1000, |_| {}).await;
    let mut order = register("iris", generation(1, 1, 1), 70, &world.artifact(40));
    let Order::Register { spec, .. } = &mut order else { panic!("a registration") };
    Arc::make_mut(spec).memory = Some(Bytes(70));
    session.obeyed(&[order]).await;
    assert_eq!(measured(&mut session, generation(1, 1, 1)).await, Some(40));
    assert_eq!(resident(&world), 70);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_is_measured_when_it_comes_back_is_known_after_a_restart() {
    let (mut world, mut session, process) = watched(100, |_| {}).await;
    let (copy, other) = (generation(1, 1, 1), generation(2, 1, 1));
    process.kept.store(50, SeqCst);
    world.server.edit(|state| state.load_time = SECOND);
    session.obeyed(&[register("iris", copy, 90, &world.artifact(40))]).await;
    world.until(|world| world.server.is_loaded("iris_1")).await;
    process.kept.store(10, SeqCst);
    assert_eq!(measured(&mut session, copy).await, None);
    session.obeyed(&[known(register("other", other, 95, &world.artifact(41)))]).await;
    session.available(other).await;
    assert_eq!(world.infer("iris", copy).await.status().as_u16(), 200);
    assert_eq!(resident(&world), 40);
    let session = world.restart_agent().await;
    let inventory = session.inventory();
    let one = inventory.iter().find(|one| one.generation == copy).expect("it is kept");
    let Report::Available { measured: Some(size), .. } = &one.report else { panic!("{one:?}") };
    assert_eq!(size.bytes, Resources::primary(Bytes(40)));
}

#[tokio::test(start_paused = true)]
async fn where_what_is_declared_is_to_count_a_measurement_keeps_no_copy_out_of_memory() {
    let (world, mut session, _process) = watched(100, |_| {}).await;
    // It takes more than it declares, and two of them more than there is.
    for uid in 1..=2 {
        let copy = generation(uid, 1, 1);
        let mut order = register(&format!("m{uid}"), copy, 50, &world.artifact(80));
        let Order::Register { spec, trust, .. } = &mut order else { panic!("a registration") };
        Arc::make_mut(spec).memory = Some(Bytes(50));
        *trust = Trust::Declared;
        session.obeyed(&[order]).await;
        assert_eq!(measured(&mut session, copy).await, Some(80));
    }
    assert_eq!(resident(&world), 100);
}

#[tokio::test(start_paused = true)]
async fn a_measurement_that_requests_may_be_part_of_is_not_taken() {
    let (world, mut session, process) = watched(1000, |_| {}).await;
    let copies = [generation(1, 1, 1), generation(2, 1, 1), generation(3, 1, 1)];
    session.obeyed(&[register("busy", copies[0], 300, &world.artifact(40))]).await;
    assert_eq!(measured(&mut session, copies[0]).await, Some(40));
    world.server.edit(|state| state.load_time = SECOND);
    session.obeyed(&[register("second", copies[1], 300, &world.artifact(50))]).await;
    world.until(|world| world.server.is_loaded("second_1")).await;
    // It is over before the load is, and what it took is still there.
    assert_eq!(world.infer("busy", copies[0]).await.status().as_u16(), 200);
    process.kept.store(700, SeqCst);
    assert_eq!(measured(&mut session, copies[1]).await, None);
    // Without any it is taken; and is never more than the memory.
    process.kept.store(0, SeqCst);
    session.obeyed(&[register("third", copies[2], 300, &world.artifact(60))]).await;
    world.until(|world| world.server.is_loaded("third_1")).await;
    process.kept.store(5000, SeqCst);
    assert_eq!(measured(&mut session, copies[2]).await, Some(1000));
}

#[tokio::test(start_paused = true)]
async fn a_measurement_that_is_more_than_there_is_room_for_evicts() {
    let (world, mut session, _process) = watched(100, |_| {}).await;
    // Time passes from one to the next, so that none seems to be used while another one is loaded.
    world.server.edit(|state| state.load_time = SECOND);
    let copies = [generation(1, 1, 1), generation(2, 1, 1)];
    session.obeyed(&[register("first", copies[0], 90, &world.artifact(60))]).await;
    assert_eq!(measured(&mut session, copies[0]).await, Some(60));
    // Its guess fits beside the first one, and what it takes does not.
    session.obeyed(&[register("second", copies[1], 90, &world.artifact(80))]).await;
    assert_eq!(measured(&mut session, copies[1]).await, Some(80));
    world.until(|world| world.phase(copies[0]).as_deref() == Some("Evicted")).await;
    assert_eq!(resident(&world), 80);
}

#[tokio::test(start_paused = true)]
async fn what_was_measured_is_forgotten_with_the_last_copy_that_it_holds_for() {
    let (world, mut session, process) = watched(1000, |_| {}).await;
    world.server.edit(|state| state.load_time = SECOND);
    let copies = [generation(1, 1, 1), generation(2, 1, 1), generation(3, 1, 1)];
    session.obeyed(&[register("first", copies[0], 300, &world.artifact(40))]).await;
    world.until(|world| world.server.is_loaded("first_1")).await;
    // Something that is not the model's own.
    process.kept.store(60, SeqCst);
    assert_eq!(measured(&mut session, copies[0]).await, Some(100));
    session.obeyed(&[register("second", copies[1], 300, &world.artifact(40))]).await;
    assert_eq!(measured(&mut session, copies[1]).await, Some(100));
    session.obeyed(&[unregister("first", copies[0], SECOND), unregister("second", copies[1], SECOND)]).await;
    session.unloaded(copies[1]).await;
    session.obeyed(&[register("third", copies[2], 300, &world.artifact(40))]).await;
    assert_eq!(measured(&mut session, copies[2]).await, Some(40));
}

#[tokio::test(start_paused = true)]
async fn a_measurement_that_a_restart_fell_into_is_not_taken() {
    let (world, mut session, process) = watched(1000, |_| {}).await;
    let copy = generation(1, 1, 1);
    world.server.edit(|state| state.load_time = SECOND);
    session.obeyed(&[register("iris", copy, 300, &world.artifact(40))]).await;
    session.until(copy, |report| matches!(report, Report::Loading { .. })).await;
    tokio::time::sleep(SECOND / 2).await;
    process.runs.store(1, SeqCst);
    assert_eq!(measured(&mut session, copy).await, None);
    assert_eq!(resident(&world), 11, "the guess goes on counting");
}

#[tokio::test(start_paused = true)]
async fn another_run_of_the_server_has_leaked_nothing_yet_and_is_measured_against_its_own_beginning() {
    let (world, mut session, process) = watched(1000, |_| {}).await;
    let copies = [generation(1, 1, 1), generation(2, 1, 1)];
    session.obeyed(&[register("a", copies[0], 60, &world.artifact(40))]).await;
    assert_eq!(measured(&mut session, copies[0]).await, Some(40));
    session.obeyed(&[unregister("a", copies[0], SECOND)]).await;
    session.unloaded(copies[0]).await;
    // It leaks without a load or an unload, and that is seen all the same.
    process.kept.store(30, SeqCst);
    world.until(|world| leaked(world) == 30).await;
    process.runs.store(1, SeqCst);
    process.kept.store(0, SeqCst);
    world.until(|world| leaked(world) == 0).await;
    session.obeyed(&[register("b", copies[1], 60, &world.artifact(45))]).await;
    assert_eq!(measured(&mut session, copies[1]).await, Some(45));
    // With a copy in it from the start.
    process.runs.store(2, SeqCst);
    process.kept.store(20, SeqCst);
    world.until(|world| leaked(world) == 20).await;
}

#[tokio::test(start_paused = true)]
async fn where_memory_is_in_units_of_its_own_nothing_leaks() {
    let (world, mut session, process) = watched(100, |_| {}).await;
    process.base.store(100, SeqCst);
    process.runs.store(1, SeqCst);
    process.kept.store(90, SeqCst);
    // All of it is room: both are in memory at once.
    for uid in [1, 2] {
        let copy = generation(uid, 1, 1);
        session.obeyed(&[register(&format!("m{uid}"), copy, 50, &world.artifact(50))]).await;
        session.available(copy).await;
    }
    tokio::time::sleep(60 * SECOND).await;
    assert_eq!((leaked(&world), resident(&world)), (0, 100));
}

#[tokio::test(start_paused = true)]
async fn what_a_request_takes_for_a_while_has_not_leaked() {
    let (world, _session, process) = watched(1000, |_| {}).await;
    tokio::time::sleep(30 * SECOND).await;
    let mut highest = 0;
    for second in 0..120 {
        // More for nine seconds, at one look at most.
        process.kept.store(if second % 20 < 9 { 50 } else { 0 }, SeqCst);
        tokio::time::sleep(SECOND).await;
        highest = highest.max(leaked(&world));
    }
    assert_eq!(highest, 0);
}

#[tokio::test(start_paused = true)]
async fn what_the_server_does_not_give_back_is_told_and_is_room_that_is_not_there() {
    let (world, mut session, process) = watched(100, |_| {}).await;
    let copies = [generation(1, 1, 1), generation(2, 1, 1), generation(3, 1, 1)];
    // The first look at the process, with nothing in it, was taken before the process was there.
    session.obeyed(&[register("a", copies[0], 60, &world.artifact(40))]).await;
    assert_eq!(measured(&mut session, copies[0]).await, Some(40));
    session.obeyed(&[unregister("a", copies[0], SECOND)]).await;
    session.unloaded(copies[0]).await;
    session.obeyed(&[register("b", copies[1], 60, &world.artifact(45))]).await;
    assert_eq!(measured(&mut session, copies[1]).await, Some(45));
    session.obeyed(&[unregister("b", copies[1], SECOND)]).await;
    world.until(|world| world.server.is_loaded("b_1")).await;
    process.kept.store(30, SeqCst);
    session.unloaded(copies[1]).await;
    world.until(|world| leaked(world) == 30).await;
    let told = async {
        loop {
            if let agent_message::Message::Heartbeat(beat) = session.said.recv().await.unwrap()
                && beat.leaked > 0
            {
                return beat.leaked;
            }
        }
    };
    assert_eq!(tokio::time::timeout(agent_world::PATIENCE, told).await.unwrap(), 30);
}

#[tokio::test(start_paused = true)]
async fn by_cost_the_copy_that_spares_little_leaves_and_what_more_memory_would_spare_is_told() {
    let (world, mut session) = World::new(1000, |options| options.eviction = Eviction::Cost).await;
    let (small, large) = (generation(1, 1, 1), generation(2, 1, 1));
    session.obeyed(&[world.register("small", small, 10)]).await;
    session.available(small).await;
    session.obeyed(&[register("large", large, 900, &world.artifact(900))]).await;
    session.available(large).await;
    for round in 0..3 {
        // The small one was used longest ago, and stays: it takes so much less.
        for (model, copy) in [("small", small), ("large", large)] {
            let answer = world.door.call(rest(model, Some(copy))).await.unwrap();
            assert_eq!(answer.status().as_u16(), 200);
        }
        let third = generation(10 + round, 1, 1);
        session.obeyed(&[world.register(&format!("new{round}"), third, 95)]).await;
        session.available(third).await;
        assert_eq!(world.phase(small).as_deref(), Some("Resident"));
        assert_eq!(world.phase(large).as_deref(), Some("Evicted"));
        session.obeyed(&[unregister(&format!("new{round}"), third, SECOND)]).await;
        session.unloaded(third).await;
    }
    let gauges = world.agent.gauges();
    let gauge = |wanted: &str| gauges.iter().find(|(name, ..)| *name == wanted).unwrap().2;
    assert_eq!((gauge("wharf_agent_returns_last_hour"), gauge("wharf_agent_more_memory_bytes")), (2, 900));
    assert_eq!(gauge("wharf_agent_more_memory_spares_percent"), 100);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_has_just_come_stays_for_its_time() {
    let (world, mut session) = World::new(10, |options| options.least_residency = 20 * SECOND).await;
    let (first, second) = (generation(1, 1, 1), generation(2, 1, 1));
    session.obeyed(&[world.register("first", first, 6)]).await;
    session.available(first).await;
    let began = tokio::time::Instant::now();
    session.obeyed(&[register("second", second, 6, &world.artifact(6))]).await;
    session.available(second).await;
    assert!(began.elapsed() >= 19 * SECOND, "{:?}", began.elapsed());
    assert_eq!(world.phase(first).as_deref(), Some("Evicted"));
}
