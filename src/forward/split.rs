//! A next hop that speaks REST at one address and gRPC at another.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};

use super::{Request, Response, Upstream, UpstreamError, grpc::is_grpc};

/// One inference server with two addresses: each request goes to the one that speaks its protocol.
#[derive(Debug)]
pub struct Split {
    rest: Arc<dyn Upstream>,
    grpc: Option<Arc<dyn Upstream>>,
}

impl Split {
    /// A server that takes REST at `rest`, and gRPC at `grpc`; without `grpc` it takes none, and who calls it so is
    /// told.
    #[must_use]
    pub fn new(rest: Arc<dyn Upstream>, grpc: Option<Arc<dyn Upstream>>) -> Self {
        Self { rest, grpc }
    }
}

impl Upstream for Split {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
        if !is_grpc(request.headers()) {
            return self.rest.call(request);
        }
        match &self.grpc {
            Some(grpc) => grpc.call(request),
            None => async {
                let status = tonic::Status::unimplemented(
                    "no gRPC address of this inference server is known; the server registry takes it beside the REST \
                     address, as addresses = [{ http = ..., grpc = ... }], and an agent as agent.runtime_grpc",
                );
                Ok(status.into_http::<super::Body>())
            }
            .boxed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::Body;

    #[derive(Debug)]
    struct Named(&'static str);

    impl Upstream for Named {
        fn call(&self, _: Request) -> BoxFuture<'_, Result<Response, UpstreamError>> {
            async { Ok(http::Response::builder().header("name", self.0).body(Body::empty()).expect("a response")) }
                .boxed()
        }
    }

    async fn who(split: &Split, kind: &str) -> Response {
        let request = http::Request::builder().header("content-type", kind).body(Body::empty()).expect("a request");
        split.call(request).await.expect("an answer")
    }

    #[tokio::test]
    async fn each_protocol_has_its_address() {
        let split = Split::new(Arc::new(Named("rest")), Some(Arc::new(Named("grpc"))));
        for (kind, name) in
            [("application/json", "rest"), ("application/grpc", "grpc"), ("application/grpc+proto", "grpc")]
        {
            assert_eq!(who(&split, kind).await.headers()["name"], name);
        }
        let alone = Split::new(Arc::new(Named("rest")), None);
        assert_eq!(who(&alone, "application/json").await.headers()["name"], "rest");
        let refused = who(&alone, "application/grpc").await;
        assert_eq!(refused.headers()["grpc-status"], "12");
    }
}
