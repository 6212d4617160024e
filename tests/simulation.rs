//! The whole of Wharf in one deterministic process, in virtual time: what is promised holds through crashes,
//! partitions, slow links and refused commits.
//!
//! A failing test names its seed; `WHARF_SEED=N` repeats it. `WHARF_PROVE=1` runs the full counts.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a test stops where it fails, and its clock is virtual"
)]

mod cluster;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use cluster::{Api, Ask, Bounds, Random, Shape, Tolerance, World, count, seeds, simulate, traffic};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn the_thin_path_leaves_nothing_behind() {
    simulate(Shape::new(1), |world| async move {
        let mut api = Api::new();
        api.submit_surely(&Ask::new("iris", "iris-1", 100, 1)).await;
        api.available("iris", PATIENCE).await.unwrap();
        // What status says is true at once, through every gateway.
        let connections = World::connections();
        let answer = world.infer(&connections, 0, "iris").await;
        assert_eq!(answer, Ok((200, "iris-1".to_owned())));
        api.unload("iris").await.unwrap();
        world.until(PATIENCE, what_is_left).await;
    });
}

/// `clients` of each gateway send without a pause from here on.
fn send(world: &Arc<World>, clients: u64, pause_millis: (u64, u64)) {
    for gateway in 0..world.shape.gateways {
        for client in 0..clients {
            let seed = world.shape.seed * 1000 + gateway as u64 * 100 + client;
            tokio::task::spawn_local(traffic(Arc::clone(world), gateway, seed, pause_millis));
        }
    }
}

/// Loads `ask` and has clients send to it.
async fn load(world: &World, api: &mut Api, ask: &Ask) {
    api.submit_surely(ask).await;
    if let Err(problem) = api.available(&ask.name, PATIENCE).await {
        return world.fail(problem);
    }
    world.allow(&ask.name, &ask.label);
}

/// Rolls `ask` out to `rollouts` further versions, one after the other.
async fn roll(world: &World, api: &mut Api, ask: &Ask, rollouts: u64) {
    if let Err(problem) = api.settled(&ask.name, PATIENCE).await {
        return world.fail(problem);
    }
    world.hold_to(Bounds {
        wanted: ask.replicas,
        surge: ask.surge.unwrap_or(1),
        unavailable: ask.unavailable.unwrap_or(0),
    });
    for number in 0..rollouts {
        let label = format!("{}-{number}", ask.name);
        world.allow(&ask.name, &label);
        api.submit_surely(&Ask { label: label.clone(), ..ask.clone() }).await;
        if let Err(problem) = api.settled(&ask.name, PATIENCE).await {
            world.fail(format!("rollout {number}: {problem}"));
        }
        if world.is_broken() {
            return;
        }
        world.only(&ask.name, &label);
    }
    let answered = world.answered.load(Ordering::Relaxed);
    if answered < rollouts {
        world.fail(format!("only {answered} requests were answered in {rollouts} rollouts"));
    }
}

#[test]
fn rollouts_under_traffic_fail_no_request() {
    let rollouts = count(100, 1000);
    let shape = Shape { duration: Duration::from_secs(10 * rollouts), ..Shape::new(1) };
    simulate(shape, move |world| async move {
        let mut api = Api::new();
        let ask = Ask::new("iris", "first", 100, 1);
        load(&world, &mut api, &ask).await;
        send(&world, 3, (1, 20));
        roll(&world, &mut api, &ask, rollouts).await;
    });
}

#[test]
fn rollouts_of_many_copies_through_two_gateways_fail_no_request() {
    for (seed, (surge, unavailable)) in [(1, 0), (0, 1), (2, 1), (3, 2)].into_iter().enumerate() {
        let rollouts = count(8, 100);
        let shape = Shape {
            replicas: vec![1000; 4],
            gateways: 2,
            latency: (Duration::from_millis(1), Duration::from_millis(30)),
            duration: Duration::from_secs(60 * rollouts),
            ..Shape::new(seed as u64 + 1)
        };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            let (surge, unavailable) = (Some(surge), Some(unavailable));
            let ask = Ask { surge, unavailable, ..Ask::new("iris", "first", 100, 3) };
            load(&world, &mut api, &ask).await;
            send(&world, 2, (1, 20));
            roll(&world, &mut api, &ask, rollouts).await;
        });
    }
}

#[test]
fn a_gateway_that_is_cut_off_from_the_scheduler_holds_unloads_back_for_its_lease() {
    for seed in seeds(3, 30) {
        let shape = Shape { gateways: 2, ..Shape::new(seed) };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            let ask = Ask::new("iris", "first", 100, 1);
            load(&world, &mut api, &ask).await;
            world.until(PATIENCE, |world| world.gateway_lacks("iris")).await;
            send(&world, 2, (1, 20));
            tokio::time::sleep(Duration::from_secs(3)).await;
            for round in 0..5 {
                let label = format!("second-{round}");
                world.allow("iris", &label);
                turmoil::hold("gateway-1", "scheduler");
                api.submit_surely(&Ask { label: label.clone(), ..ask.clone() }).await;
                // Long enough for the new version to be served by the other gateway.
                tokio::time::sleep(Duration::from_millis(1200)).await;
                let unloads = |world: &World| -> usize {
                    let unloads = |line: &String| line.starts_with("unload");
                    world
                        .seats
                        .iter()
                        .map(|seat| seat.server.history().iter().filter(|line| unloads(line)).count())
                        .sum()
                };
                assert_eq!(unloads(&world), round, "a copy was unloaded that a gateway may still send to");
                turmoil::release("gateway-1", "scheduler");
                if let Err(problem) = api.settled("iris", PATIENCE).await {
                    return world.fail(problem);
                }
                assert_eq!(unloads(&world), round + 1);
                world.only("iris", &label);
            }
        });
    }
}

#[test]
fn with_the_scheduler_down_no_request_fails() {
    for seed in seeds(3, 50) {
        let shape = Shape { replicas: vec![1000; 3], overcommit: 50, gateways: 2, ..Shape::new(seed) };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            let mut random = Random::new(world.shape.seed);
            // More than fits at a time: agents evict and bring back.
            for model in 0..12 {
                let ask = Ask::new(&format!("m{model}"), &format!("m{model}-1"), 300, 1);
                load(&world, &mut api, &ask).await;
            }
            world.until(PATIENCE, |world| (0..12).find_map(|model| world.gateway_lacks(&format!("m{model}")))).await;
            send(&world, 3, (1, 50));
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(random.between(1, 4000))).await;
                world.crash("scheduler");
                tokio::time::sleep(Duration::from_millis(random.between(1, 15_000))).await;
                world.bounce("scheduler");
            }
            tokio::time::sleep(Duration::from_secs(20)).await;
        });
    }
}

#[test]
fn a_drain_under_traffic_fails_no_request_and_says_what_is_stuck() {
    let models = count(100, 1000);
    // All but ten of the models find room elsewhere.
    let shape = Shape {
        replicas: vec![models * 10, models * 10 / 2, models * 10 / 2 - 100],
        duration: Duration::from_secs(3600),
        ..Shape::new(1)
    };
    simulate(shape, move |world| async move {
        let mut api = Api::new();
        world.crash("replica-1");
        world.crash("replica-2");
        for model in 0..models {
            let ask = Ask::new(&format!("m{model}"), &format!("m{model}-1"), 10, 1);
            api.submit_surely(&ask).await;
        }
        let all = async {
            while !api.models().await.is_ok_and(|all| all.iter().all(|model| model.state == "Available")) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(20 * PATIENCE, all).await.expect("all become Available");
        for model in 0..models {
            world.allow(&format!("m{model}"), &format!("m{model}-1"));
        }
        world.bounce("replica-1");
        world.bounce("replica-2");
        tokio::time::sleep(Duration::from_secs(5)).await;
        send(&world, 4, (20, 100));
        let told = api.drain(0, Duration::from_secs(60)).await.unwrap();
        let last = told.last().unwrap();
        assert_eq!(
            (last.left, last.moved, last.stuck.len()),
            (10, u32::try_from(models).unwrap() - 10, 10),
            "{last:?}"
        );
        assert!(last.stuck.iter().all(|stuck| stuck.contains("memory") || stuck.contains("lack")), "{last:?}");
        assert_eq!(world.seats[0].server.loaded().len(), 10);
        tokio::time::sleep(Duration::from_secs(5)).await;
    });
}

/// Each run has a process of its own: tokio numbers the tasks of a whole process (`runtime/task/id.rs`), and by those
/// numbers it decides in which order a runtime that ends, as a host does that crashes, drops its tasks
/// (`runtime/task/list.rs`, `OwnedTasks`: four lists, by the number's remainder). With the tasks go their connections, and
/// each last word on one of them draws its delay from the seed.
#[test]
fn a_seed_decides_everything() {
    const LOG: &str = "WHARF_SIMULATION_LOG";
    if let Ok(file) = std::env::var(LOG) {
        let shape = Shape {
            replicas: vec![1000; 3],
            gateways: 2,
            overcommit: 30,
            filter: "wharf=debug",
            latency: (Duration::from_millis(1), Duration::from_millis(50)),
            ..Shape::new(seeds(1, 1)[0])
        };
        let log = simulate(shape, |world| async move { turbulence(world, 15, true).await });
        std::fs::write(file, log).unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for seed in seeds(1, 20) {
        let run = |name: &str| {
            let file = folder.path().join(name);
            let child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "a_seed_decides_everything"])
                .env("WHARF_SEED", seed.to_string())
                .env(LOG, &file)
                .output()
                .unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
            std::fs::read_to_string(file).unwrap()
        };
        let (one, two) = (run("one"), run("two"));
        if one != two {
            let (a, b) = one.lines().zip(two.lines()).find(|(a, b)| a != b).unwrap_or(("the end", "the end"));
            panic!("seed {seed}: two runs differ:\n{a}\n{b}");
        }
        assert!(one.lines().count() > 100, "{one}");
    }
}

#[test]
fn whatever_happens_what_was_acknowledged_comes_true() {
    for seed in seeds(2, 300) {
        let mut random = Random::new(seed);
        let shape = Shape {
            replicas: (0..random.between(3, 4)).map(|_| random.between(800, 1200)).collect(),
            gateways: 2,
            overcommit: 40,
            latency: (Duration::from_millis(1), Duration::from_millis(random.between(2, 100))),
            ..Shape::new(seed)
        };
        simulate(shape, |world| async move { turbulence(world, 25, true).await });
    }
}

#[test]
fn a_scheduler_that_lost_its_journal_adopts_what_agents_hold_and_unloads_none_of_it() {
    for seed in seeds(1, 50) {
        let shape = Shape { replicas: vec![1000; 3], gateways: 2, ..Shape::new(seed) };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            for model in 0..6 {
                let ask = Ask::new(&format!("m{model}"), &format!("m{model}-1"), 100, 1 + model % 3);
                load(&world, &mut api, &ask).await;
                if let Err(problem) = api.settled(&ask.name, PATIENCE).await {
                    return world.fail(problem);
                }
            }
            world.until(PATIENCE, |world| (0..6).find_map(|model| world.gateway_lacks(&format!("m{model}")))).await;
            send(&world, 2, (1, 30));
            world.crash("scheduler");
            tokio::time::sleep(Duration::from_secs(3)).await;
            world.lose_journal("two");
            world.bounce("scheduler");
            tokio::time::sleep(Duration::from_secs(30)).await;
            for model in 0..6 {
                match api.settled(&format!("m{model}"), PATIENCE).await {
                    Ok(adopted) => assert_eq!(adopted.wanted, 1 + model % 3, "{adopted:?}"),
                    Err(problem) => return world.fail(problem),
                }
            }
            for seat in &world.seats {
                let history = seat.server.history();
                assert!(history.iter().all(|line| !line.starts_with("unload")), "{history:?}");
            }
            // From here on it is a model like any other, also for the next scheduler.
            let ask = Ask { surge: Some(1), ..Ask::new("m1", "m1-2", 100, 2) };
            world.allow("m1", "m1-2");
            api.submit_surely(&ask).await;
            if let Err(problem) = api.settled("m1", PATIENCE).await {
                return world.fail(problem);
            }
            world.only("m1", "m1-2");
            world.crash("scheduler");
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.bounce("scheduler");
            for model in 0..6 {
                if let Err(problem) = api.settled(&format!("m{model}"), PATIENCE).await {
                    return world.fail(problem);
                }
            }
            world.forget("m2");
            api.unload("m2").await.unwrap();
            world
                .until(PATIENCE, |world| {
                    let left =
                        |seat: &cluster::Seat| seat.server.loaded().iter().any(|served| served.starts_with("m2_"));
                    world.seats.iter().any(left).then(|| "m2 is still loaded".to_owned())
                })
                .await;
        });
    }
}

#[test]
fn a_restored_backup_commands_nobody_until_it_is_adopted_and_then_keeps_what_agents_hold() {
    for seed in seeds(1, 50) {
        let shape = Shape { replicas: vec![1000; 3], gateways: 2, ..Shape::new(seed) };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            for model in 0..4 {
                let ask = Ask::new(&format!("m{model}"), &format!("m{model}-1"), 100, 1 + model % 3);
                load(&world, &mut api, &ask).await;
            }
            world.crash("scheduler");
            tokio::time::sleep(Duration::from_secs(1)).await;
            let backup = world.store().backup();
            world.bounce("scheduler");
            // A later version, other copies, and a model of which the backup does not know.
            for (model, label, copies) in [("m0", "m0-2", 1), ("m1", "m1-1", 3), ("m4", "m4-1", 2)] {
                world.allow(model, label);
                api.submit_surely(&Ask::new(model, label, 100, copies)).await;
                if let Err(problem) = api.settled(model, PATIENCE).await {
                    return world.fail(problem);
                }
            }
            world.only("m0", "m0-2");
            world.until(PATIENCE, |world| (0..5).find_map(|model| world.gateway_lacks(&format!("m{model}")))).await;
            send(&world, 1, (10, 100));
            // Restored as it is, and started more often than the original was.
            world.crash("scheduler");
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.restore_journal(&backup, None);
            for _ in 0..3 {
                world.bounce("scheduler");
                tokio::time::sleep(Duration::from_secs(40)).await;
                world.crash("scheduler");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            // It learned nothing that the backup lacks, and goes on as another history.
            world.restore_journal(&world.store(), Some("two"));
            world.bounce("scheduler");
            tokio::time::sleep(Duration::from_secs(45)).await;
            for (model, copies) in [("m0", 1), ("m1", 3), ("m2", 3), ("m3", 1), ("m4", 2)] {
                match api.settled(model, PATIENCE).await {
                    Ok(adopted) => assert_eq!(adopted.wanted, copies, "{adopted:?}"),
                    Err(problem) => return world.fail(problem),
                }
            }
            // From here on it is a model like any other.
            world.allow("m4", "m4-2");
            api.submit_surely(&Ask { surge: Some(1), ..Ask::new("m4", "m4-2", 100, 2) }).await;
            if let Err(problem) = api.settled("m4", PATIENCE).await {
                return world.fail(problem);
            }
            world.only("m4", "m4-2");
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
    }
}

#[test]
fn a_replica_that_was_given_up_comes_back_and_lets_go_of_what_is_elsewhere_by_then() {
    for seed in seeds(1, 20) {
        let shape = Shape { replicas: vec![1000; 3], gateways: 2, ..Shape::new(seed) };
        simulate(shape, move |world| async move {
            let mut api = Api::new();
            let ask = Ask::new("iris", "iris-1", 100, 2);
            load(&world, &mut api, &ask).await;
            if let Err(problem) = api.settled("iris", PATIENCE).await {
                return world.fail(problem);
            }
            world.until(PATIENCE, |world| world.gateway_lacks("iris")).await;
            send(&world, 2, (1, 30));
            let holders = |world: &World| -> Vec<usize> {
                (0..world.seats.len()).filter(|index| !world.seats[*index].server.loaded().is_empty()).collect()
            };
            let [first, _] = holders(&world)[..] else { return world.fail("two replicas have the copies") };
            let host = format!("replica-{first}");
            turmoil::partition(host.as_str(), "scheduler");
            world.until(PATIENCE, |world| (holders(world).len() < 3).then(|| "no third copy".to_owned())).await;
            turmoil::repair(host.as_str(), "scheduler");
            let kept = |world: &World| holders(world).contains(&first).then(|| format!("{host} keeps its copy"));
            world.until(PATIENCE, kept).await;
            if let Err(problem) = api.settled("iris", PATIENCE).await {
                world.fail(problem);
            }
            world.until(PATIENCE, World::disagreement).await;
        });
    }
}

/// What the user last had acknowledged of a model.
#[derive(Clone, Debug)]
struct Acknowledged {
    label: String,
    /// Of every version since the model was created.
    labels: Vec<String>,
    replicas: u32,
    /// A call whose outcome is not known: it may have been taken.
    maybe: Option<(String, u32)>,
}

/// Users and faults at random, for `rounds` of each; then everything heals and is compared with what was acknowledged.
async fn turbulence(world: Arc<World>, rounds: u64, faulty: bool) {
    let mut api = Api::new();
    let mut random = Random::new(world.shape.seed ^ 0xfa17);
    world.tolerate(Tolerance::Refusals);
    world.faulty.store(faulty, Ordering::Relaxed);
    send(&world, 2, (1, 50));
    let faults = tokio::task::spawn_local(faults(Arc::clone(&world), if faulty { rounds } else { 0 }));
    let mut wanted: std::collections::BTreeMap<String, Acknowledged> = std::collections::BTreeMap::new();
    for round in 0..rounds {
        let name = format!("m{}", random.below(10));
        let label = format!("{name}-{round}");
        let (bytes, replicas) = (random.between(50, 300), u32::try_from(random.between(1, 2)).unwrap());
        match (wanted.get(&name).cloned(), random.below(10)) {
            (Some(known), 0 | 1) => {
                world.forget(&name);
                // Repeated until it is acknowledged: it may be taken at any try.
                while api.unload(&name).await.is_err_and(|status| status.code() != tonic::Code::FailedPrecondition) {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                drop(known);
                wanted.remove(&name);
            }
            (Some(known), 2 | 3) => {
                if api.scale(&name, replicas).await.is_ok() {
                    wanted.insert(name, Acknowledged { replicas, maybe: None, ..known });
                } else {
                    wanted.insert(name, Acknowledged { maybe: Some((known.label.clone(), replicas)), ..known });
                }
            }
            _ => {
                let ask = Ask::new(&name, &label, bytes, replicas);
                if world.is_expected(&name) {
                    world.allow(&name, &label);
                }
                api.submit_surely(&ask).await;
                let mut labels = wanted.remove(&name).map(|known| known.labels).unwrap_or_default();
                labels.push(label.clone());
                wanted.insert(name, Acknowledged { label, labels, replicas, maybe: None });
            }
        }
        tokio::time::sleep(Duration::from_millis(random.between(1, 1500))).await;
        for model in api.models().await.unwrap_or_default() {
            // Clients ask for what status says is there.
            if let Some(known) = wanted.get(&model.name)
                && (model.state == "Available" || model.state == "ModelAvailable")
                && world.gateway_lacks(&model.name).is_none()
            {
                known.labels.iter().for_each(|label| world.allow(&model.name, label));
            }
        }
    }
    faults.await.unwrap();
    world.store().heal();
    // Everything heals: what is wanted becomes true within a bounded time.
    for (name, known) in &wanted {
        if let Some((_, replicas)) = &known.maybe {
            while api.scale(name, *replicas).await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
    for (name, known) in &mut wanted {
        if let Some((_, replicas)) = known.maybe.take() {
            known.replicas = replicas;
        }
        world.log.line(&format!("wanted: {name} {known:?}"));
    }
    let deadline = tokio::time::Instant::now() + 2 * PATIENCE;
    for (name, known) in &wanted {
        let left = deadline - tokio::time::Instant::now();
        match api.settled(name, left).await {
            Ok(model) => {
                let newest = model.versions.iter().max_by_key(|version| version.version).unwrap();
                let uri = &newest.spec.as_ref().unwrap().uri;
                if !uri.starts_with(&format!("sim://{}/", known.label)) || model.wanted != known.replicas {
                    world.fail(format!("{name} was acknowledged as {known:?} and is {model:?}"));
                }
                world.only(name, &known.label);
            }
            Err(problem) => return world.fail(format!("{problem}; {}", world.describe())),
        }
    }
    let names: Vec<String> = wanted.keys().cloned().collect();
    let listed = api.models().await.unwrap();
    if let Some(model) = listed.iter().find(|model| !wanted.contains_key(&model.name)) {
        world.fail(format!("{} was deleted and is listed: {model:?}", model.name));
    }
    world.until(PATIENCE, |world| names.iter().find_map(|name| world.gateway_lacks(name))).await;
    world.until(PATIENCE, |world| what_is_loaded_and_unwanted(world, &wanted)).await;
    world.until(PATIENCE, World::disagreement).await;
    // A request whose bytes were lost with a link is given up by its client; nobody sends them again here, as TCP would.
    let before = world.answered.load(Ordering::Relaxed);
    let unheard = |world: &World| {
        let answered = world.answered.load(Ordering::Relaxed) - before;
        (answered < 50).then(|| format!("only {answered} requests were answered"))
    };
    if !wanted.is_empty() {
        world.until(PATIENCE, unheard).await;
    }
    // And now not one request fails any more.
    world.tolerate(Tolerance::Nothing);
    world.faulty.store(false, Ordering::Relaxed);
    let before = world.answered.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let answered = world.answered.load(Ordering::Relaxed) - before;
    if !wanted.is_empty() && answered < 50 {
        world.fail(format!("only {answered} requests were answered in peace"));
    }
    // What is deleted leaves nothing behind, whatever has happened to it.
    for name in &names {
        world.forget(name);
        if let Err(status) = api.unload(name).await {
            world.fail(format!("{name} can't be deleted: {status}"));
        }
    }
    world.until(PATIENCE, what_is_left).await;
    if let Some(left) = what_actors_keep(&world).await {
        world.fail(left);
    }
}

/// What the actors still know of deleted models, after their retention.
async fn what_actors_keep(world: &World) -> Option<String> {
    let asked = world.scheduler()?.inspect();
    let (reply, answer) = tokio::sync::oneshot::channel();
    asked.do_send(wharf::messages::Ask { question: (), reply });
    let seen = answer.await.unwrap();
    let zeros = [
        "/supervisor/models",
        "/supervisor/terminated",
        "/supervisor/absent",
        "/placement/copies",
        "/placement/waiting",
        "/router/routes",
        "/router/unreached",
        "/router/unsettled",
        "/journal/waiting",
        "/server~1sim/waiting",
    ];
    let kept = zeros.iter().find(|path| seen.pointer(path) != Some(&serde_json::json!(0)));
    if let Some(path) = kept {
        return Some(format!("the actors keep something at {path}: {seen}"));
    }
    let replicas = seen["server/sim"]["replicas"].as_object()?;
    let kept = replicas.iter().find(|(_, replica)| ["wanted", "reported", "asked"].iter().any(|of| replica[of] != 0));
    kept.map(|(index, replica)| format!("the server's actor keeps something of replica {index}: {replica}"))
}

fn what_is_loaded_and_unwanted(
    world: &World,
    wanted: &std::collections::BTreeMap<String, Acknowledged>,
) -> Option<String> {
    world.seats.iter().find_map(|seat| {
        let unwanted = |served: &String| {
            let name = served.rsplit_once('_').unwrap().0;
            !wanted.contains_key(name)
        };
        seat.server.loaded().into_iter().find(unwanted).map(|served| format!("{} still has {served}", seat.id))
    })
}

/// Faults at random, each of which heals after a while.
async fn faults(world: Arc<World>, rounds: u64) {
    let mut random = Random::new(world.shape.seed ^ 0xbad);
    let hosts = world.hosts();
    for _ in 0..rounds / 2 {
        tokio::time::sleep(Duration::from_millis(random.between(1, 2000))).await;
        // Some last longer than the scheduler's patience with a silent replica.
        let (least, most) = if random.percent(20) { (12_000, 20_000) } else { (1, 6000) };
        let lasting = Duration::from_millis(random.between(least, most));
        let (one, other) = (random.one(&hosts).unwrap().clone(), random.one(&hosts).unwrap().clone());
        match random.below(6) {
            0 | 1 if one != other => {
                world.log.line(&format!("partition {one} from {other}"));
                turmoil::partition(one.as_str(), other.as_str());
                tokio::time::sleep(lasting).await;
                world.log.line(&format!("repair {one} with {other}"));
                turmoil::repair(one.as_str(), other.as_str());
            }
            2 if one != other => {
                world.log.line(&format!("hold {one} from {other}"));
                turmoil::hold(one.as_str(), other.as_str());
                tokio::time::sleep(lasting).await;
                world.log.line(&format!("release {one} to {other}"));
                turmoil::release(one.as_str(), other.as_str());
            }
            3 => {
                world.log.line("the next commits fail");
                for _ in 0..random.between(1, 5) {
                    let crash = wharf::store::Fault::Crash { kept: random.percent(50) };
                    let fault = if random.percent(30) { crash } else { wharf::store::Fault::Failed };
                    world.store().inject(fault);
                }
            }
            4 => {
                let seat = random.one(&world.seats).unwrap();
                seat.server.fail(50);
                tokio::time::sleep(lasting).await;
                seat.server.fail(0);
            }
            _ => {
                world.crash(&one);
                if let Some(seat) = one.strip_prefix("replica-")
                    && random.percent(50)
                {
                    world.seats[seat.parse::<usize>().unwrap()].server.die();
                }
                tokio::time::sleep(lasting).await;
                world.bounce(&one);
            }
        }
    }
}

/// What a deleted model left, after its retention.
fn what_is_left(world: &World) -> Option<String> {
    let links = world.scheduler()?.links;
    if let Some(model) = links.board.models().first() {
        return Some(format!("{} is listed", model.name));
    }
    let store: &dyn wharf::ports::Store = &*world.store();
    let contents = store.load().unwrap();
    if !contents.models.is_empty() || !contents.versions.is_empty() || !contents.copies.is_empty() {
        return Some(format!("{contents:?}"));
    }
    for seat in &world.seats {
        if links.board.registered(&seat.id).copies > 0 {
            return Some(format!("{} has copies registered", seat.id));
        }
        if !seat.server.loaded().is_empty() {
            return Some(format!("{} has models loaded", seat.id));
        }
        let seen = seat.agent()?.inspect();
        // Artifacts stay on disk within the cache's bound, for a rollback.
        if seen["copies"] != serde_json::json!([]) || seen["resident"]["primary"] != 0 {
            return Some(format!("the agent of {} holds {seen}", seat.id));
        }
    }
    (0..world.shape.gateways).find_map(|index| {
        let seen = world.gateway(index)?.inspect();
        (seen["models"] != 0).then(|| format!("gateway {index} has routes: {seen}"))
    })
}
