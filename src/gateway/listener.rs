//! What a request asks for, from its method, path and headers alone.
//!
//! The rule of this module: what is not known is refused by name; nothing is passed on that the path does not
//! clearly say.

use http::{HeaderName, HeaderValue, Method};

use crate::forward::grpc;

/// The header that names the model; it wins over the path.
pub(super) const SELDON_MODEL: HeaderName = HeaderName::from_static("seldon-model");

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked<'a> {
    /// Whether the gateway lives.
    Live,
    /// Whether it has routes.
    Ready,
    /// What it is.
    Metadata,
    /// Something of a model.
    Model(Call<'a>),
    /// The repository extension, which is the scheduler's business.
    Repository,
    /// A gRPC method that there is not.
    NoMethod,
    /// A path that there is not.
    NoPath,
}

/// A request to a model.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Call<'a> {
    /// Its name, unless only the message says it.
    pub(super) model: Option<&'a str>,
    /// The version that the path asks for.
    pub(super) version: Option<&'a str>,
    /// Whether both sides may go on for as long as they like.
    pub(super) streaming: bool,
}

/// Reads a request's head; `named` is its [`SELDON_MODEL`] header.
pub(super) fn classify<'a>(method: &Method, path: &'a str, named: Option<&'a HeaderValue>, is_grpc: bool) -> Asked<'a> {
    // A value that is not text is no name; it reaches the check for names as the empty one.
    let named = named.map(|value| value.to_str().unwrap_or_default());
    if let Some(rpc) = path.strip_prefix(grpc::SERVICE) {
        return grpc_method(rpc, named);
    }
    if is_grpc {
        return Asked::NoMethod;
    }
    let Some(rest) = path.strip_prefix("/v2") else { return Asked::NoPath };
    if rest.starts_with("/repository/") {
        return Asked::Repository;
    }
    if let Some(rest) = rest.strip_prefix("/models/") {
        return rest_model(rest, named).map_or(Asked::NoPath, Asked::Model);
    }
    let asked = match rest {
        "" | "/" => Asked::Metadata,
        "/health/live" => Asked::Live,
        "/health/ready" => Asked::Ready,
        _ => Asked::NoPath,
    };
    if matches!(*method, Method::GET | Method::HEAD) { asked } else { Asked::NoPath }
}

fn grpc_method<'a>(method: &str, named: Option<&'a str>) -> Asked<'a> {
    let call = |streaming| Asked::Model(Call { model: named, version: None, streaming });
    match method {
        "ModelInfer" | "ModelReady" | "ModelMetadata" => call(false),
        "ModelStreamInfer" => call(true),
        "ServerLive" => Asked::Live,
        "ServerReady" => Asked::Ready,
        "ServerMetadata" => Asked::Metadata,
        "RepositoryIndex" | "RepositoryModelLoad" | "RepositoryModelUnload" => Asked::Repository,
        _ => Asked::NoMethod,
    }
}

/// `rest` is what follows `/v2/models/`: `NAME[/versions/VERSION][/ACTION]`.
fn rest_model<'a>(rest: &'a str, named: Option<&'a str>) -> Option<Call<'a>> {
    let (model, mut rest) = segment(rest);
    let mut version = None;
    if let Some(versioned) = rest.strip_prefix("versions/") {
        let (number, action) = segment(versioned);
        version = Some(number);
        rest = action;
    }
    if !rest.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
        return None;
    }
    match named {
        // A version belongs to the model that the path names.
        Some(named) if named != model => Some(Call { model: Some(named), version: None, streaming: is_stream(rest) }),
        _ => Some(Call { model: Some(model), version, streaming: is_stream(rest) }),
    }
}

fn is_stream(action: &str) -> bool {
    action.ends_with("_stream")
}

fn segment(path: &str) -> (&str, &str) {
    path.split_once('/').unwrap_or((path, ""))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn get(path: &str) -> Asked<'_> {
        classify(&Method::GET, path.split('?').next().unwrap_or_default(), None, false)
    }

    fn model<'a>(name: Option<&'a str>, version: Option<&'a str>, streaming: bool) -> Asked<'a> {
        Asked::Model(Call { model: name, version, streaming })
    }

    #[test]
    fn paths_of_the_protocol_are_known() {
        for (path, asked) in [
            ("/v2", Asked::Metadata),
            ("/v2/health/live", Asked::Live),
            ("/v2/health/ready", Asked::Ready),
            ("/v2/models/iris", model(Some("iris"), None, false)),
            ("/v2/models/iris/infer", model(Some("iris"), None, false)),
            ("/v2/models/iris/ready?x=1", model(Some("iris"), None, false)),
            ("/v2/models/iris/infer_stream", model(Some("iris"), None, true)),
            ("/v2/models/iris/generate_stream", model(Some("iris"), None, true)),
            ("/v2/models/iris/versions/3", model(Some("iris"), Some("3"), false)),
            ("/v2/models/iris/versions/3/infer", model(Some("iris"), Some("3"), false)),
            ("/v2/repository/index", Asked::Repository),
            ("/inference.GRPCInferenceService/ModelInfer", model(None, None, false)),
            ("/inference.GRPCInferenceService/ModelStreamInfer", model(None, None, true)),
            ("/inference.GRPCInferenceService/ServerLive", Asked::Live),
            ("/inference.GRPCInferenceService/RepositoryIndex", Asked::Repository),
            ("/inference.GRPCInferenceService/Nope", Asked::NoMethod),
            ("/", Asked::NoPath),
            ("/v3", Asked::NoPath),
            ("/v2/pipelines/p/infer", Asked::NoPath),
            ("/v2/models/iris/../x/infer", Asked::NoPath),
            ("/v2/models/iris/infer/more", Asked::NoPath),
            ("/v2/models/iris/%2e%2e", Asked::NoPath),
        ] {
            assert_eq!(get(path), asked, "{path}");
        }
        assert_eq!(classify(&Method::POST, "/v2/health/live", None, false), Asked::NoPath);
        assert_eq!(classify(&Method::POST, "/other.Service/Method", None, true), Asked::NoMethod);
    }

    #[test]
    fn the_header_wins_and_takes_no_version_of_another_model() {
        let asked = |path, header| {
            let header = HeaderValue::from_static(header);
            format!("{:?}", classify(&Method::POST, path, Some(&header), false))
        };
        let call = |call: Asked<'_>| format!("{call:?}");
        assert_eq!(asked("/v2/models/iris/versions/3/infer", "wine"), call(model(Some("wine"), None, false)));
        assert_eq!(asked("/v2/models/iris/versions/3/infer", "iris"), call(model(Some("iris"), Some("3"), false)));
        assert_eq!(asked("/inference.GRPCInferenceService/ModelInfer", "wine"), call(model(Some("wine"), None, false)));
    }

    proptest! {
        #[test]
        fn no_path_makes_it_panic(path in "/v2/models/[a-z/._%-]{0,40}") {
            if let Asked::Model(call) = get(&path) {
                prop_assert!(!call.model.unwrap_or_default().contains('/'));
            }
        }
    }
}
