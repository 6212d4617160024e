//! What `wharf server probe` finds out of servers that behave oddly. The real servers are asked in `tests/runtimes.rs`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test stops where it fails")]

use std::{
    path::Path,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use axum::{
    Router,
    http::StatusCode,
    response::IntoResponse as _,
    routing::{get, post},
};

/// Serves `router`; its address.
async fn serve(router: Router) -> (String, tokio::task::JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { drop(axum::serve(listener, router).await) });
    (address, tasks)
}

/// A server that gives its index only for a body, and says READY of a model that it has unloaded.
fn liar() -> Router {
    let loaded = Arc::new(AtomicBool::new(true));
    let set = |loaded: &Arc<AtomicBool>, to: bool| {
        let loaded = Arc::clone(loaded);
        move |axum::extract::Path(model): axum::extract::Path<String>| async move {
            if model != "iris" {
                return (StatusCode::NOT_FOUND, format!(r#"{{"error":"no model {model}"}}"#)).into_response();
            }
            loaded.store(to, SeqCst);
            ().into_response()
        }
    };
    let (load, unload) = (set(&loaded, true), set(&loaded, false));
    let index = move |body: String| async move {
        if body.is_empty() {
            return (StatusCode::UNPROCESSABLE_ENTITY, "a body is missing").into_response();
        }
        let state = if loaded.load(SeqCst) { "READY" } else { "UNAVAILABLE" };
        format!(r#"[{{"name":"iris","state":"{state}"}},{{"name":"other"}}]"#).into_response()
    };
    let ready = |axum::extract::Path(model): axum::extract::Path<String>| async move {
        if model == "iris" { StatusCode::OK } else { StatusCode::BAD_REQUEST }
    };
    Router::new()
        .route("/v2", get(|| async { r#"{"name":"odd","version":"7","extensions":["model_repository"]}"# }))
        .route("/v2/health/ready", get(|| async { StatusCode::SERVICE_UNAVAILABLE }))
        .route("/v2/repository/index", post(index))
        .route("/v2/repository/models/{model}/load", post(load))
        .route("/v2/repository/models/{model}/unload", post(unload))
        .route("/v2/models/{model}/ready", get(ready))
}

/// A server of the protocol alone, which has no call to load a model.
fn plain() -> Router {
    Router::new()
        .route("/v2", get(|| async { r#"{"name":"plain","version":"1","extensions":[]}"# }))
        .route("/v2/health/ready", get(|| async { StatusCode::OK }))
}

async fn probe(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.args(["server", "probe"]).args(args);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// All that came of it, the same in every run: addresses and times differ.
fn steady(output: &Output, address: &str) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(address, "HOST:PORT");
    let line = |line: &str| {
        let words = line.split(' ').collect::<Vec<_>>();
        let mut steady: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        for at in 1..words.len() {
            if words[at].starts_with("ms") && words[at - 1].parse::<u64>().is_ok() {
                "N".clone_into(&mut steady[at - 1]);
            }
        }
        steady.join(" ") + "\n"
    };
    let all = |bytes: &[u8]| text(bytes).lines().map(line).collect::<String>();
    format!("--- stdout\n{}--- stderr\n{}--- {}\n", all(&output.stdout), all(&output.stderr), output.status)
}

fn golden(seen: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/probe.txt");
    if std::env::var("UPDATE").is_ok() {
        std::fs::write(&path, seen).unwrap();
        return;
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(wanted == seen, "it differs\n--- wanted\n{wanted}\n--- seen\n{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_servers_are_told_for_what_they_are() {
    let (odd, _odd) = serve(liar()).await;
    let (bare, _bare) = serve(plain()).await;
    let nowhere = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let mut seen = String::new();
    for (what, address, more) in [
        ("one that lies of what it has unloaded", &odd, vec![]),
        ("the same, with a model", &odd, vec!["--model", "iris"]),
        ("a model that it does not have", &odd, vec!["--model", "absent"]),
        ("one without a repository", &bare, vec![]),
        ("nobody", &nowhere, vec![]),
        ("no address", &"nowhere".to_owned(), vec![]),
    ] {
        let url = format!("http://{address}");
        let output = probe(&[&[url.as_str()], more.as_slice()].concat()).await;
        seen.push_str(&format!("=== {what}\n{}", steady(&output, address)));
    }
    golden(&seen);
}
