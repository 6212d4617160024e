//! The page of a role: `/metrics`, `/healthz`, `/readyz`.

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};

use super::metrics::Metrics;

/// One thing that a role needs to do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it is, in a word or two.
    pub name: &'static str,
    /// Why it is not ready, in one sentence; nothing when it is.
    pub problem: Option<String>,
}

impl Check {
    /// Something that is ready.
    #[must_use]
    pub const fn ready(name: &'static str) -> Self {
        Self { name, problem: None }
    }

    /// Something that is not, and why.
    #[must_use]
    pub fn not_ready(name: &'static str, problem: impl Into<String>) -> Self {
        Self { name, problem: Some(problem.into()) }
    }
}

/// Makes the checks of the moment. Called for every request: it must not wait.
pub type Checks = Arc<dyn Fn() -> Vec<Check> + Send + Sync>;

/// The page's routes. `/healthz` says that the process answers; `/readyz` answers 200 when every check is
/// ready, and else 503 with a line for each that is not; `/metrics` is OpenMetrics text.
pub fn router(metrics: Arc<Metrics>, checks: Checks) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async move || ready(&checks())))
        .route("/metrics", get(async move || exposition(metrics).await))
}

fn ready(checks: &[Check]) -> Response {
    let waiting: String =
        checks.iter().filter_map(|check| Some(format!("{}: {}\n", check.name, check.problem.as_ref()?))).collect();
    if waiting.is_empty() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, waiting).into_response()
    }
}

/// On a thread for blocking work: of very many models, to count them by state takes long.
async fn exposition(metrics: Arc<Metrics>) -> Response {
    let text = tokio::task::spawn_blocking(move || metrics.exposition().map_err(|error| error.to_string())).await;
    match text.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(text) => {
            ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
        }
        Err(problem) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{problem}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::{body::Body, http::Request};
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::{super::metrics::Role, *};

    async fn ask(router: &Router, path: &str) -> (StatusCode, String, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let kind = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_page_says_what_is_not_ready() {
        let routes = Arc::new(AtomicBool::new(false));
        let checks: Checks = {
            let routes = Arc::clone(&routes);
            Arc::new(move || {
                let routes = if routes.load(Ordering::SeqCst) {
                    Check::ready("routes")
                } else {
                    Check::not_ready("routes", "no epoch was received yet")
                };
                vec![Check::ready("listener"), routes]
            })
        };
        let router = router(Arc::new(Metrics::new(&[Role::Gateway], false)), checks);
        let (status, _, body) = ask(&router, "/readyz").await;
        assert_eq!((status, body.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "routes: no epoch was received yet\n"));
        assert_eq!(ask(&router, "/healthz").await.0, StatusCode::OK, "it lives all the same");
        routes.store(true, Ordering::SeqCst);
        assert_eq!(ask(&router, "/readyz").await.0, StatusCode::OK);
        let (status, kind, body) = ask(&router, "/metrics").await;
        assert_eq!(status, StatusCode::OK);
        assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
        assert!(body.ends_with("# EOF\n"), "{body}");
    }
}
