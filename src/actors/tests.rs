//! What the actors promise each other when one of them panics, or the journal refuses.

use std::{
    collections::BTreeSet,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use actix::{Context, Handler};
use tokio::sync::mpsc;

use super::{
    Handle, Scheduler, Spawner, Timing, model::ModelActor, router::CHANGES, server::ServerActor, start,
    supervisor::Supervisor,
};
use crate::{
    domain::{
        copy::{Report, Residency},
        error::{Code, Refusal},
        leader::Leader,
        memory::{Bytes, Resources},
        model::{Model, Outcome, Policy, Submitted},
        names::{ModelName, ReplicaId, ServerName},
        order::Order,
        record::{Contents, Owner, ServerRow, Write},
        routes::{Absence, Epoch, Route},
        spec::{Definition, DeploymentPatch, ModelSpec, Passthrough, Replicas},
        version::Generation,
    },
    messages::{
        Gate,
        router::{GatewayConnected, Publish, RouteUpdate},
        server::{AgentConnected, AgentSpoke, Declaration, Declare, Down, Hello, Mark, SetMark, Word},
        supervisor::{Action, OnModel},
    },
    ports::{CommitError, Identity, ModelRows, OpenError, Store, SystemClock},
    store::{Fault, MemoryStore},
    telemetry::metrics::{Metrics, Role},
};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Panic;

macro_rules! panics {
    ($($actor:ty),*) => {$(
        impl Handler<Panic> for $actor {
            type Result = ();

            fn handle(&mut self, _: Panic, _: &mut Context<Self>) {
                panic!("the test struck here");
            }
        }
    )*};
}

panics!(ModelActor, ServerActor, Supervisor);

/// A journal whose commits can be held up.
#[derive(Debug)]
struct Slow {
    kept: MemoryStore,
    held: Mutex<Hold>,
    freed: Condvar,
    /// How many copies each commit wrote that wrote any.
    copies: Mutex<Vec<usize>>,
}

/// Which commits are held up.
#[derive(Clone, Copy, Debug)]
enum Hold {
    None,
    All,
    Removals,
}

impl Slow {
    fn hold(&self) {
        *self.held.lock().unwrap() = Hold::All;
    }

    fn hold_removals(&self) {
        *self.held.lock().unwrap() = Hold::Removals;
    }

    fn free(&self) {
        *self.held.lock().unwrap() = Hold::None;
        self.freed.notify_all();
    }
}

impl Store for Slow {
    fn identity(&self) -> Identity {
        self.kept.identity()
    }

    fn load(&self) -> Result<Contents, OpenError> {
        self.kept.load()
    }

    fn load_model(&self, name: &ModelName) -> Result<Option<ModelRows>, OpenError> {
        self.kept.load_model(name)
    }

    fn load_server(&self, name: &ServerName) -> Result<Option<ServerRow>, OpenError> {
        self.kept.load_server(name)
    }

    fn commit(&self, writes: &[Write]) -> Result<(), CommitError> {
        let waits = |held: &mut Hold| match held {
            Hold::None => false,
            Hold::All => true,
            Hold::Removals => writes.iter().any(|write| matches!(write, Write::RemoveModel(_))),
        };
        drop(self.freed.wait_while(self.held.lock().unwrap(), waits).unwrap());
        let copies = writes.iter().filter(|write| matches!(write, Write::PutCopy(_))).count();
        self.copies.lock().unwrap().extend((copies > 0).then_some(copies));
        self.kept.commit(writes)
    }

    fn save_events(&self, events: &[Vec<u8>]) -> Result<(), CommitError> {
        self.kept.save_events(events)
    }

    fn load_events(&self) -> Result<Vec<Vec<u8>>, OpenError> {
        self.kept.load_events()
    }
}

struct World {
    store: Arc<Slow>,
    handle: Handle,
    models: Gate<OnModel, Result<Option<Submitted>, Refusal>>,
    servers: Gate<Declare, Result<(), Refusal>>,
    marks: Gate<SetMark, Result<BTreeSet<u32>, Refusal>>,
    died: Arc<Mutex<Option<String>>>,
}

fn scheduler(store: &Arc<Slow>, died: &Arc<Mutex<Option<String>>>) -> Scheduler {
    let last = Arc::clone(died);
    Scheduler {
        store: Arc::clone(store) as _,
        blocking: true,
        clock: Arc::new(SystemClock::new()),
        policy: Policy::default(),
        timing: Timing {
            lease: Duration::from_millis(200),
            grace: Duration::from_millis(300),
            scan: Duration::from_millis(50),
            retention: Duration::ZERO,
            ..Timing::default()
        },
        spawner: Spawner::Local,
        events: 100,
        metrics: Arc::new(Metrics::new(&[Role::Scheduler], false)),
        fatal: Arc::new(move |why| drop(last.lock().unwrap().replace(why))),
    }
}

/// Runs a scheduler of actors on one thread, and `test` beside it.
fn with<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    actix_rt::System::new().block_on(async {
        let kept = MemoryStore::new(Identity { cluster: "c".to_owned(), lineage: "l".to_owned() });
        let store =
            Arc::new(Slow { kept, held: Mutex::new(Hold::None), freed: Condvar::new(), copies: Mutex::default() });
        let died = Arc::new(Mutex::new(None));
        let handle = start(scheduler(&store, &died)).unwrap();
        test(World {
            models: Gate::new(handle.models(), 5000, PATIENCE),
            servers: Gate::new(handle.servers(), 100, PATIENCE),
            marks: Gate::new(handle.marks(), 100, PATIENCE),
            store,
            handle,
            died,
        })
        .await;
    });
}

impl World {
    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let waiting = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
    }

    async fn ask(&self, name: &str, action: Action) -> Result<Option<Submitted>, Refusal> {
        self.models.ask(OnModel { name: model(name), action }).await?
    }

    async fn declare(&self, owner: Owner, replicas: u32, memory: u64) -> Result<(), Refusal> {
        let declaration = Declaration {
            replicas,
            bounds: (0, u32::MAX),
            kubernetes: None,
            capacity: Some(Resources::primary(Bytes(memory))),
            overcommit_percent: None,
            capabilities: None,
            emptied: BTreeSet::new(),
        };
        self.servers.ask(Declare { owner, server: server("s"), declaration: Some(declaration) }).await?
    }

    async fn mark(&self, replica: u32, mark: Mark) -> Result<BTreeSet<u32>, Refusal> {
        self.marks.ask(SetMark { server: server("s"), replica: Some(replica), mark }).await?
    }

    /// The observable state of every actor.
    async fn inspect(&self) -> serde_json::Value {
        Gate::new(self.handle.inspect(), 1, PATIENCE).ask(()).await.unwrap()
    }

    fn panic_model(&self, name: &str) {
        assert!(self.handle.links.tell_model(&model(name), Panic));
    }

    /// An agent calls; gives its end of the session.
    fn call(&self, index: u32) -> mpsc::Receiver<Down> {
        let (link, down) = mpsc::channel(64);
        let hello = Hello {
            replica: ReplicaId::new(server("s"), index),
            capacity: Resources::primary(Bytes(1000)),
            capabilities: Vec::new(),
            overcommit_percent: 0,
            runtime: "test".to_owned(),
            door: format!("door-{index}"),
            lineage: String::new(),
            leader: Leader::default(),
            inventory: Vec::new(),
            version: "test".to_owned(),
        };
        self.handle.agents().0.do_send(AgentConnected { hello, session: 1, link });
        down
    }

    fn says(&self, index: u32, word: Word) {
        self.handle.agents().1.do_send(AgentSpoke { replica: ReplicaId::new(server("s"), index), session: 1, word });
    }
}

/// The copies that an agent is ordered to hold next.
async fn ordered(down: &mut mpsc::Receiver<Down>) -> Vec<Generation> {
    let order = async {
        loop {
            if let Down::Orders(orders) = down.recv().await.expect("the session is open") {
                return orders.iter().map(Order::generation).collect();
            }
        }
    };
    tokio::time::timeout(PATIENCE, order).await.expect("an order in time")
}

fn answers(name: &str, copies: Vec<Generation>) -> Word {
    let available = Report::Available { residency: Residency::Resident, measured: None, estimate: None, pinned: false };
    Word::Reports(copies.into_iter().map(|copy| (model(name), copy, available.clone())).collect())
}

fn model(name: &str) -> ModelName {
    ModelName::new(name).unwrap()
}

fn server(name: &str) -> ServerName {
    ServerName::new(name).unwrap()
}

fn submit(name: &str) -> Action {
    submit_as(name, DeploymentPatch::default())
}

fn submit_as(name: &str, deployment: DeploymentPatch) -> Action {
    let spec = ModelSpec { uri: format!("/models/{name}"), memory: Some(Bytes(10)), ..ModelSpec::default() };
    Action::Submit(Box::new(Definition {
        name: model(name),
        spec,
        deployment,
        kubernetes: None,
        passthrough: Passthrough::default(),
    }))
}

#[test]
fn a_model_that_panics_is_rebuilt_with_the_commit_that_was_on_its_way() {
    with(|world| async move {
        let created = world.ask("m", submit("m")).await.unwrap().unwrap();
        world.store.hold();
        let scaled = world.ask("m", Action::Scale(3));
        let struck = async {
            world
                .until("the commit is on its way", || {
                    world.handle.links.models.get(&model("m")).is_some_and(|addr| addr.connected())
                })
                .await;
            while world.inspect().await["journal"]["committing"] != true {}
            world.panic_model("m");
            world
                .until("its actor is gone", || {
                    world.handle.links.models.get(&model("m")).is_some_and(|addr| !addr.connected())
                })
                .await;
            // Nobody waits for the disk: the supervisor answers, and the model is no stranger to anybody.
            assert_eq!(world.inspect().await["supervisor"]["absent"], 1);
        };
        let (scaled, ()) = tokio::join!(scaled, struck);
        assert_eq!(scaled.unwrap_err().code, Code::Unavailable, "its answer went with the actor");
        let again = world.ask("m", submit("m"));
        let freed = async {
            // The submission waits for the actor that is to come.
            assert_eq!(world.inspect().await["supervisor"]["absent"], 1);
            world.store.free();
        };
        let (again, ()) = tokio::join!(again, freed);
        let again = again.unwrap().unwrap();
        assert_eq!((again.uid, again.outcome), (created.uid, Outcome::Unchanged), "it is the same model");
        let view = world.handle.links.board.model(&model("m")).unwrap();
        assert_eq!(view.deployment.replicas, 3, "what was durable is what the rebuilt actor begins with");
        let rows = world.store.load().unwrap();
        assert_eq!((rows.models.len(), rows.models[0].deployment.replicas), (1, 3));
        assert_eq!(*world.died.lock().unwrap(), None);
    });
}

#[test]
fn copies_that_are_placed_at_once_are_one_commit_and_those_that_answer_at_once_one_route() {
    with(|world| async move {
        world.declare(Owner::File, 4, 1000).await.unwrap();
        let mut agents: Vec<_> = (0..4).map(|index| world.call(index)).collect();
        let replicas = Replicas { replicas: 4, min: 0, max: 0, log_payloads: false };
        world
            .ask("m", submit_as("m", DeploymentPatch { replicas: Some(replicas), ..Default::default() }))
            .await
            .unwrap();
        let mut copies = Vec::new();
        for down in &mut agents {
            copies.push(ordered(down).await);
        }
        assert_eq!(*world.store.copies.lock().unwrap(), [4]);
        let epoch = world.inspect().await["router"]["epoch"].as_u64().unwrap();
        for (index, copies) in (0..).zip(copies) {
            world.says(index, answers("m", copies));
        }
        let routed = |model: &Model| model.copies.iter().filter(|copy| copy.routed).count();
        world
            .until("all answer", || {
                world.handle.links.board.model(&model("m")).is_some_and(|model| routed(&model) == 4)
            })
            .await;
        assert_eq!(world.inspect().await["router"]["epoch"], epoch + 1);
    });
}

#[test]
fn what_an_agent_reported_is_told_before_what_became_of_it() {
    with(|world| async move {
        world.declare(Owner::File, 1, 1000).await.unwrap();
        let mut down = world.call(0);
        world.ask("m", submit("m")).await.unwrap();
        let copies = ordered(&mut down).await;
        let epoch = world.inspect().await["router"]["epoch"].as_u64().unwrap();
        world.says(0, answers("m", copies.clone()));
        // At once its session ends, and the agent that calls next has nothing.
        let mut down = world.call(0);
        assert_eq!(ordered(&mut down).await, copies);
        let left = async {
            // One epoch with the copy, and one without it.
            while world.inspect().await["router"]["epoch"].as_u64().unwrap() < epoch + 2 {}
        };
        tokio::time::timeout(PATIENCE, left).await.expect("the routes leave it in time");
        let view = world.handle.links.board.model(&model("m")).unwrap();
        assert_eq!(view.copies.iter().map(|copy| copy.state.name()).collect::<Vec<_>>(), ["Scheduled"]);
    });
}

#[test]
fn many_routes_that_change_at_once_are_several_epochs_and_none_is_lost() {
    with(|world| async move {
        let (updates, mut told) = mpsc::channel(16);
        let gateway = GatewayConnected { gateway: "g".to_owned(), session: 1, holds: None, foreign: false, updates };
        world.handle.gateways().0.do_send(gateway);
        assert!(matches!(told.recv().await, Some(RouteUpdate::Table(Epoch(0), routes)) if routes.is_empty()));
        let names: Vec<_> = (0..2 * CHANGES + 2).map(|number| model(&format!("m{number:05}"))).collect();
        for (revision, name) in (1..).zip(&names) {
            // One in two was there for a moment only.
            let route = Route { model: name.clone(), targets: Vec::new(), absence: Absence::default() };
            let route = (revision % 2 == 0).then_some(route);
            world.handle.links.router.tell(Publish { model: name.clone(), revision, route });
        }
        let mut seen = Vec::new();
        for epoch in 1..=3 {
            let update = tokio::time::timeout(PATIENCE, told.recv()).await.expect("an epoch in time");
            let Some(RouteUpdate::Changes(of, changes)) = update else { panic!("the routes change") };
            let (routes, removed) = &*changes;
            assert!(of == Epoch(epoch) && routes.len() + removed.len() <= CHANGES);
            seen.extend(routes.iter().map(|route| (route.model.clone(), true)));
            seen.extend(removed.iter().map(|name| (name.clone(), false)));
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(names.into_iter().zip([false, true].into_iter().cycle())));
    });
}

#[test]
fn more_requests_than_are_kept_for_an_absent_actor_are_told_to_come_again() {
    with(|world| async move {
        world.ask("m", submit("m")).await.unwrap();
        world.store.hold();
        let scaled = world.ask("m", Action::Scale(3));
        let struck = async {
            while world.inspect().await["journal"]["committing"] != true {}
            world.panic_model("m");
            while world.inspect().await["supervisor"]["absent"] != 1 {}
        };
        drop(tokio::join!(scaled, struck));
        let asked = (0..1500).map(|number| world.ask("m", Action::Scale(number % 7)));
        let freed = async {
            while world.inspect().await["supervisor"]["absent"] != 1 {}
            world.store.free();
        };
        let (answers, ()) = tokio::join!(futures::future::join_all(asked), freed);
        let taken = answers.iter().filter(|answer| answer.is_ok()).count();
        let full = |answer: &&Result<_, Refusal>| answer.as_ref().is_err_and(|refusal| refusal.code == Code::Exhausted);
        assert_eq!((taken, answers.iter().filter(full).count()), (1000, 500), "each has an answer");
    });
}

#[test]
fn a_model_that_the_journal_does_not_let_go_is_removed_later_and_what_waits_is_told() {
    with(|world| async move {
        world.ask("m", submit("m")).await.unwrap();
        world.store.hold_removals();
        world.ask("m", Action::Delete(None)).await.unwrap();
        while world.inspect().await["supervisor"]["absent"] != 1 {}
        world
            .until("its actor has ended", || {
                world.handle.links.models.get(&model("m")).is_some_and(|addr| !addr.connected())
            })
            .await;
        world.store.kept.inject(Fault::Failed);
        let again = world.ask("m", submit("m"));
        let freed = async {
            world.inspect().await;
            world.store.free();
        };
        let (again, ()) = tokio::join!(again, freed);
        assert_eq!(again.unwrap_err().code, Code::Unavailable, "the journal refused");
        world
            .until("it is removed with a later scan", || {
                let known = world.handle.links.board.model(&model("m")).is_some();
                !known && world.store.load().unwrap().models.is_empty() && world.handle.links.models.is_empty()
            })
            .await;
        assert_eq!(world.ask("m", submit("m")).await.unwrap().unwrap().outcome, Outcome::Created);
    });
}

#[test]
fn a_refused_commit_of_a_server_takes_nothing_with_it_and_leaves_nothing_behind() {
    with(|world| async move {
        world.declare(Owner::File, 2, 10).await.unwrap();
        world.store.hold();
        world.store.kept.inject(Fault::Failed);
        let first = world.mark(0, Mark::Cordon);
        let then = async {
            while world.inspect().await["server/s"]["committing"] != true {}
            let second = world.mark(1, Mark::Drain);
            let freed = async {
                while world.inspect().await["server/s"]["waiting"] != 1 {}
                world.store.free();
            };
            tokio::join!(second, freed).0
        };
        let (first, second) = tokio::join!(first, then);
        assert_eq!(first.unwrap_err().code, Code::Unavailable);
        assert_eq!(second.unwrap(), [1].into());
        let rows = world.store.load().unwrap().servers;
        assert_eq!((rows[0].cordoned.len(), &rows[0].draining), (0, &[1].into()), "nothing of the refused mark");
        assert_eq!(world.handle.links.board.server(&server("s")).unwrap().row, rows[0]);
    });
}

#[test]
fn a_server_that_panics_is_rebuilt_as_its_owner_wanted_it_and_not_as_another_did() {
    with(|world| async move {
        world.declare(Owner::File, 2, 10).await.unwrap();
        assert_eq!(world.declare(Owner::Api, 3, 99).await.unwrap_err().code, Code::PermissionDenied);
        world.store.hold();
        let marked = world.mark(1, Mark::Drain);
        let struck = async {
            while world.inspect().await["server/s"]["committing"] != true {}
            assert!(world.handle.links.tell_server(&server("s"), Panic));
            while world.inspect().await["supervisor"]["absent"] != 1 {}
        };
        let (marked, ()) = tokio::join!(marked, struck);
        assert_eq!(marked.unwrap_err().code, Code::Unavailable);
        // An operator's word waits for the actor that is to come.
        let cordoned = world.mark(0, Mark::Cordon);
        let freed = async {
            world.inspect().await;
            world.store.free();
        };
        let (cordoned, ()) = tokio::join!(cordoned, freed);
        assert_eq!(cordoned.unwrap(), [0].into());
        let view = world.handle.links.board.server(&server("s")).unwrap();
        assert_eq!((view.row.owner, &view.row.draining, &view.row.cordoned), (Owner::File, &[1].into(), &[0].into()));
        assert_eq!(view.replicas.len(), 2);
        assert!(view.replicas.iter().all(|replica| replica.capacity.primary == Bytes(10)), "{view:?}");
    });
}

#[test]
fn a_server_that_is_being_taken_away_goes_on_going_after_a_panic() {
    with(|world| async move {
        world.declare(Owner::File, 1, 10).await.unwrap();
        let down = world.call(0);
        world.until("its agent is heard", || world.handle.links.door(&ReplicaId::new(server("s"), 0)).is_some()).await;
        let removal = Declare { owner: Owner::File, server: server("s"), declaration: None };
        world.servers.ask(removal).await.unwrap().unwrap();
        assert!(world.handle.links.tell_server(&server("s"), Panic));
        drop(down);
        world
            .until("nothing is left", || {
                world.handle.links.board.servers().is_empty()
                    && world.handle.links.servers.is_empty()
                    && world.store.load().unwrap().servers.is_empty()
            })
            .await;
        world.declare(Owner::Api, 1, 10).await.unwrap();
    });
}

#[test]
fn a_server_that_only_an_agent_named_is_forgotten_when_the_agent_stays_away() {
    with(|world| async move {
        let down = world.call(7);
        let durable = || world.store.load().unwrap().servers.iter().any(|row| row.doors.contains_key(&7));
        world.until("its door is in the journal", durable).await;
        drop(down);
        world.says(7, Word::Gone);
        let clock = Arc::clone(&world.handle.links.clock);
        let since = clock.now();
        world
            .until("nothing is left of it", || {
                let links = &world.handle.links;
                links.board.servers().is_empty()
                    && links.servers.is_empty()
                    && links.doors.is_empty()
                    && world.store.load().unwrap().servers.is_empty()
            })
            .await;
        assert!(clock.now().since(since) >= Duration::from_millis(600), "once to be Lost and once to be forgotten");
        let seen = world.inspect().await;
        assert_eq!((&seen["placement"]["replicas"], &seen["supervisor"]["servers"]), (&0.into(), &0.into()), "{seen}");
        // The name is as good as new.
        let _down = world.call(7);
        world.until("it is there again", || world.handle.links.board.server(&server("s")).is_some()).await;
    });
}

#[test]
fn status_knows_every_model_of_the_journal_before_anybody_is_answered() {
    with(|world| async move {
        for number in 0..50 {
            let name = format!("m{number}");
            world.ask(&name, submit(&name)).await.unwrap();
        }
        let again = start(scheduler(&world.store, &world.died)).unwrap();
        assert!(again.links.board.models().is_empty(), "nothing was read yet");
        again.known().await;
        assert_eq!(again.links.board.models().len(), 50);
    });
}

#[test]
fn a_first_submission_that_is_refused_leaves_no_actor() {
    with(|world| async move {
        let Action::Submit(mut wrong) = submit("m") else { unreachable!() };
        wrong.deployment.replicas =
            Some(crate::domain::spec::Replicas { replicas: 1, min: 3, max: 2, log_payloads: false });
        let answer = world.ask("m", Action::Submit(wrong)).await;
        assert!(answer.is_err(), "{answer:?}");
        world.until("nothing of it is left", || world.handle.links.models.is_empty()).await;
    });
}

#[test]
fn without_its_supervisor_the_process_exits() {
    with(|world| async move {
        world.inspect().await;
        world.handle.links.supervisor.tell(Panic);
        world.until("it exits", || world.died.lock().unwrap().is_some()).await;
        let why = world.died.lock().unwrap().clone().unwrap();
        assert!(why.starts_with("the supervisor panicked (the test struck here"), "{why}");
    });
}
