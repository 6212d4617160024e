//! A process for each model, for programs that can't load and unload: a load starts one, an unload stops it.
//!
//! The rules of this module: a copy's process is supervised as a server is; one that could not be started is not left
//! behind, and one that is given up fails its copy; a request goes to the process of the copy that it is for, and to none when that does not run.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Health, Launch, Server, Tending};
use crate::{
    agent::runtimes::{Indexed, Kind, Layout, Listing, Runtime, Wanted, plain},
    domain::{
        copy::{Failure, FailureClass},
        memory::Resources,
    },
    forward::{Request, Response, Served, Upstream, UpstreamError},
    ports::{Clock, Network, ServerProcess as _},
};

/// See the module.
pub struct Models {
    launch: Launch,
    network: Arc<dyn Network>,
    clock: Arc<dyn Clock>,
    all: Mutex<BTreeMap<String, Arc<One>>>,
}

struct One {
    server: Arc<Server>,
    stop: CancellationToken,
    task: tokio::sync::Mutex<Option<AbortOnDropHandle<()>>>,
}

/// Its process alone has to know: the door sees when it does not answer.
struct Quiet;

impl Tending for Quiet {
    fn ended(&self, _: &str) {}
    fn ready(&self) {}
    fn given_up(&self, _: &str) {}
}

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Models({} of {})", self.lock().len(), self.launch.replica)
    }
}

impl Models {
    /// Nothing yet, each of which will be started as `launch` says.
    #[must_use]
    pub fn new(launch: Launch, network: Arc<dyn Network>, clock: Arc<dyn Clock>) -> Self {
        Self { launch, network, clock, all: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<One>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, served: &str) -> Option<Arc<One>> {
        self.lock().get(served).cloned()
    }

    fn start(&self, served: &str) -> Arc<One> {
        let launch = self.launch.of_model(served);
        let server = Arc::new(Server::new(launch, Arc::clone(&self.network), Arc::clone(&self.clock)));
        let stop = CancellationToken::new();
        let (running, stopping) = (Arc::clone(&server), stop.clone());
        let task = tokio::spawn(async move { running.keep_up(&Quiet, stopping).await });
        let task = tokio::sync::Mutex::new(Some(AbortOnDropHandle::new(task)));
        let one = Arc::new(One { server, stop, task });
        self.lock().insert(served.to_owned(), Arc::clone(&one));
        one
    }

    async fn stop(&self, served: &str) -> Result<(), Failure> {
        let Some(one) = self.find(served) else { return Ok(()) };
        one.stopped().await?;
        let mut all = self.lock();
        if all.get(served).is_some_and(|now| Arc::ptr_eq(now, &one)) {
            all.remove(served);
        }
        Ok(())
    }

    /// Stops all of them.
    pub(in crate::agent) async fn stop_all(&self) {
        let all: Vec<Arc<One>> = self.lock().values().cloned().collect();
        for one in &all {
            one.stop.cancel();
        }
        for one in all {
            if let Err(failure) = one.stopped().await {
                tracing::error!(replica = %self.launch.replica, error = failure.message, "a model's process is left to its shim");
            }
        }
    }
}

impl One {
    async fn stopped(&self) -> Result<(), Failure> {
        self.stop.cancel();
        let mut task = self.task.lock().await;
        if let Some(running) = task.as_mut() {
            let ended = running.await;
            *task = None;
            ended.map_err(|error| failed(format!("its supervisor ended by itself: {error}")))?;
        }
        Ok(())
    }
}

fn failed(message: String) -> Failure {
    Failure { class: FailureClass::Runtime, message }
}

impl Runtime for Models {
    fn kind(&self) -> Kind {
        Kind::Process
    }

    fn reads(&self, _: &str) -> bool {
        false
    }

    fn layout(&self, artifact: &Listing, wanted: &Wanted<'_>) -> Result<Layout, Failure> {
        plain(artifact, wanted)
    }

    fn load<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        async move {
            if let Some(one) = self.find(served) {
                match one.server.health() {
                    Health::Up(_) => return Ok(()),
                    // Another process would have all its ends before it again. The copy fails, and may be placed elsewhere.
                    Health::GivenUp(why) => return Err(failed(why)),
                    Health::Starting | Health::Down(_) => self.stop(served).await?,
                }
            }
            let one = self.start(served);
            match one.server.settled().await {
                Health::Up(_) => Ok(()),
                Health::Starting | Health::Down(_) | Health::GivenUp(_) => {
                    let why = one.server.down().map_or_else(String::new, |(why, _)| why);
                    self.stop(served).await?;
                    let why = why.trim_end_matches("; it is being started again");
                    Err(failed(format!("the model's process {why}")))
                }
            }
        }
        .boxed()
    }

    fn unload<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.stop(served).boxed()
    }

    fn ready<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<bool, Failure>> {
        async move {
            let Some(one) = self.find(served) else { return Ok(false) };
            match one.server.health() {
                Health::Up(_) => Ok(true),
                // Its load says why.
                Health::GivenUp(_) => Ok(false),
                Health::Starting | Health::Down(_) => Err(failed("the model's process is being started".to_owned())),
            }
        }
        .boxed()
    }

    fn index(&self) -> BoxFuture<'_, Result<Vec<Indexed>, Failure>> {
        let all = self.lock();
        let row =
            |(name, one): (&String, &Arc<One>)| Indexed { name: name.clone(), ready: one.server.life().is_some() };
        let index = all.iter().map(row).collect();
        async move { Ok(index) }.boxed()
    }

    fn memory<'a>(&'a self, served: &'a str) -> BoxFuture<'a, Result<Option<Resources>, Failure>> {
        async move {
            let Some(one) = self.find(served) else { return Ok(None) };
            let footprint = tokio::task::spawn_blocking(move || one.server.footprint()).await;
            Ok(footprint.ok().flatten().map(|footprint| Resources::primary(footprint.bytes)))
        }
        .boxed()
    }

    fn loads_block(&self) -> bool {
        false
    }
}

impl Upstream for Models {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        let one = request.extensions().get::<Served>().and_then(|served| self.find(&served.0));
        async move {
            match one {
                Some(one) => one.server.call(request).await,
                None => Err(UpstreamError {
                    started: false,
                    timed_out: false,
                    message: "each model has a process of its own here, and there is none for this request".to_owned(),
                }),
            }
        }
        .boxed()
    }
}
