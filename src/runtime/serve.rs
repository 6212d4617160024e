//! Serving a next hop on a listener, HTTP/1 and HTTP/2 on the same port.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::StatusCode;
use hyper::{rt::Executor, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    forward::{Body, Request, Response, Upstream},
    ports::Listen,
};

/// How many connections are served at once; more wait to be accepted.
const CONNECTIONS: usize = 4096;
/// How long a connection may take to send a request's head.
const HEAD: Duration = Duration::from_secs(30);
/// How long to wait after a connection could not be accepted: the reason is mostly a lack of descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves `upstream` to whoever connects to `listener`. Ends never; dropping the future ends every connection.
pub async fn serve(mut listener: Box<dyn Listen>, upstream: Arc<dyn Upstream>) {
    let tasks = Tasks::default();
    let _owner = Owner(tasks.clone());
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut builder = auto::Builder::new(tasks.clone());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(HEAD).keep_alive_timeout(HEAD);
    let builder = Arc::new(builder);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let io = match listener.accept().await {
            Ok((io, _)) => io,
            Err(error) => {
                tracing::warn!(%error, address = listener.address(), "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (builder, upstream) = (Arc::clone(&builder), Arc::clone(&upstream));
        tasks.execute(async move {
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let upstream = Arc::clone(&upstream);
                async move { answer(&*upstream, request.map(Body::from)).await }
            });
            if let Err(error) = builder.serve_connection(TokioIo::new(io), service).await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(place);
        });
    }
}

async fn answer(upstream: &dyn Upstream, request: Request) -> Result<Response, Infallible> {
    Ok(upstream.call(request).await.unwrap_or_else(|error| {
        let mut response = Response::new(Body::from(error.message));
        *response.status_mut() = if error.timed_out { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::BAD_GATEWAY };
        response
    }))
}

/// The tasks of all connections. Each of them holds this too, so that [`Owner`] has to end them.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

/// Ends all tasks when it is dropped.
struct Owner(Tasks);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tasks")
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}
