//! The page for operators: metrics and health, on a port of its own.

use axum::Router;
use futures::{FutureExt as _, future::BoxFuture};
use tower::ServiceExt as _;

use crate::forward::{Body, Request, Response, Upstream, UpstreamError};

/// A router as the next hop of a port.
#[derive(Clone, Debug)]
pub struct Page(pub Router);

impl Upstream for Page {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        let answer = self.0.clone().oneshot(request.map(axum::body::Body::new));
        async move {
            let Ok(response) = answer.await;
            Ok(response.map(Body::new))
        }
        .boxed()
    }
}
