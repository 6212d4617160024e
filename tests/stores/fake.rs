//! Stores that a test holds in its hands.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::Response,
};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

/// What a store speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// A web server's way, with tags and ranges.
    Http,
    /// S3's XML, to the key `ACCESSKEY1`. Unlike rclone's it sends a part as a part; it looks at no signature.
    S3,
    /// Google's XML, with the token `right`.
    Google,
    /// Azure's, with a shared access signature `right`.
    Azure,
    /// A model hub's, where the token `right` opens `org/gated`.
    Hub,
}

pub struct Fake {
    pub address: String,
    pub files: Files,
    _task: JoinSet<()>,
}

/// Path without its first slash, to content.
pub type Files = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// What a revision stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Fake {
    pub async fn start(speaks: Speaks, files: &[(&str, &[u8])]) -> Self {
        let files: Files =
            Arc::new(Mutex::new(files.iter().map(|(path, content)| ((*path).to_owned(), content.to_vec())).collect()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = axum::Router::new().fallback(answer).with_state((speaks, Arc::clone(&files)));
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, files, _task: task }
    }

    pub fn put(&self, path: &str, content: &[u8]) {
        self.files.lock().unwrap().insert(path.to_owned(), content.to_vec());
    }
}

async fn answer(State((speaks, files)): State<(Speaks, Files)>, request: Request) -> Response {
    let (method, uri, headers) = (request.method(), request.uri(), request.headers());
    let path = uri.path().trim_start_matches('/').replace("%2F", "/");
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let files = files.lock().unwrap();
    match speaks {
        Speaks::Http if path.starts_with("private/") && bearer != "Bearer right" => text(StatusCode::UNAUTHORIZED, ""),
        Speaks::Http => file(method, headers, files.get(&path)),
        Speaks::Google if bearer != "Bearer right" => {
            xml(StatusCode::UNAUTHORIZED, "AuthenticationRequired", "Authentication required.")
        }
        Speaks::S3 if !bearer.starts_with("AWS4-HMAC-SHA256 Credential=ACCESSKEY1/") => {
            xml(StatusCode::FORBIDDEN, "InvalidAccessKeyId", "The key is not known.")
        }
        Speaks::Google | Speaks::S3 => match query(uri, "list-type") {
            Some(_) => google_list(&files, &path, &query(uri, "prefix").unwrap_or_default()),
            None => match files.get(&path) {
                None => xml(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist."),
                found => file(method, headers, found),
            },
        },
        Speaks::Azure if query(uri, "sig").as_deref() != Some("right") => {
            xml(StatusCode::FORBIDDEN, "AuthenticationFailed", "Server failed to authenticate the request.\nTime:now")
        }
        Speaks::Azure => match query(uri, "comp") {
            Some(_) => azure_list(&files, &path, &query(uri, "prefix").unwrap_or_default()),
            None => match files.get(&path) {
                None => xml(StatusCode::NOT_FOUND, "BlobNotFound", "The specified blob does not exist."),
                found => file(method, headers, found),
            },
        },
        Speaks::Hub => hub(&files, method, uri, headers, &path, bearer),
    }
}

fn query(uri: &Uri, name: &str) -> Option<String> {
    let pairs = uri.query()?.split('&');
    let value = pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)?.1;
    Some(value.replace("%2F", "/"))
}

fn text(status: StatusCode, body: &str) -> Response {
    Response::builder().status(status).body(Body::from(body.to_owned())).unwrap()
}

fn xml(status: StatusCode, code: &str, message: &str) -> Response {
    text(status, &format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"))
}

pub fn etag(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    format!("\"{:02x}{:02x}{:02x}{:02x}\"", digest[0], digest[1], digest[2], digest[3])
}

/// A file, whole or from some byte on.
fn file(method: &Method, headers: &HeaderMap, content: Option<&Vec<u8>>) -> Response {
    let Some(content) = content else { return text(StatusCode::NOT_FOUND, "") };
    let get = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    let tag = etag(content);
    if get(header::IF_NONE_MATCH).as_ref() == Some(&tag) {
        return text(StatusCode::NOT_MODIFIED, "");
    }
    if get(header::IF_MATCH).is_some_and(|wanted| wanted != tag) {
        return text(StatusCode::PRECONDITION_FAILED, "");
    }
    let from =
        get(header::RANGE).and_then(|range| range.strip_prefix("bytes=")?.trim_end_matches('-').parse::<usize>().ok());
    let from = from.filter(|_| get(header::IF_RANGE).is_none_or(|wanted| wanted == tag));
    let response = Response::builder()
        .header(header::ETAG, &tag)
        .header(header::LAST_MODIFIED, "Thu, 26 Nov 2026 15:25:52 GMT")
        .header(header::ACCEPT_RANGES, "bytes");
    let (response, part) = match from {
        Some(from) if from < content.len() => {
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            (response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range), &content[from..])
        }
        Some(_) => return text(StatusCode::RANGE_NOT_SATISFIABLE, ""),
        None => (response, &content[..]),
    };
    let response = response.header(header::CONTENT_LENGTH, part.len());
    response.body(if method == Method::HEAD { Body::empty() } else { Body::from(part.to_vec()) }).unwrap()
}

/// The files of `bucket`, which is the first part of their paths.
fn listed<'a>(files: &'a BTreeMap<String, Vec<u8>>, bucket: &'a str, prefix: &'a str) -> Vec<(&'a str, &'a Vec<u8>)> {
    let within = |path: &'a str| path.strip_prefix(bucket)?.strip_prefix('/').filter(|key| key.starts_with(prefix));
    files.iter().filter_map(|(path, content)| Some((within(path)?, content))).collect()
}

fn google_list(files: &BTreeMap<String, Vec<u8>>, bucket: &str, prefix: &str) -> Response {
    let known = files.keys().any(|path| path.starts_with(&format!("{bucket}/")));
    if !known {
        return xml(StatusCode::NOT_FOUND, "NoSuchBucket", "The specified bucket does not exist.");
    }
    let mut body = "<ListBucketResult>".to_owned();
    for (key, content) in listed(files, bucket, prefix) {
        write!(
            body,
            "<Contents><Key>{key}</Key><Size>{}</Size><LastModified>2026-11-26T15:25:52.000Z</LastModified><ETag>{}</ETag></Contents>",
            content.len(),
            etag(content)
        )
        .unwrap();
    }
    text(StatusCode::OK, &(body + "</ListBucketResult>"))
}

fn azure_list(files: &BTreeMap<String, Vec<u8>>, container: &str, prefix: &str) -> Response {
    let mut body = "<?xml version=\"1.0\"?><EnumerationResults><Blobs>".to_owned();
    for (key, content) in listed(files, container, prefix) {
        write!(
            body,
            "<Blob><Name>{key}</Name><Properties><Last-Modified>Thu, 26 Nov 2026 15:25:52 GMT</Last-Modified><Content-Length>{}\
             </Content-Length><Content-Type>x</Content-Type><Etag>{}</Etag></Properties></Blob>",
            content.len(),
            etag(content)
        )
        .unwrap();
    }
    text(StatusCode::OK, &(body + "</Blobs><NextMarker /></EnumerationResults>"))
}

fn hub(
    files: &BTreeMap<String, Vec<u8>>,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    path: &str,
    bearer: &str,
) -> Response {
    let parts: Vec<&str> = path.split('/').collect();
    if parts.contains(&"gated") && bearer != "Bearer right" {
        let message = "Access to model org/gated is restricted. You must be authenticated to access it.";
        let mut response = text(StatusCode::UNAUTHORIZED, "");
        response.headers_mut().insert("x-error-message", message.parse().unwrap());
        return response;
    }
    match parts.as_slice() {
        ["api", "models", org, name, "revision", _]
            if files.keys().any(|path| path.starts_with(&format!("{org}/{name}/"))) =>
        {
            text(StatusCode::OK, &format!("{{\"sha\":\"{COMMIT}\"}}"))
        }
        ["api", "models", org, name, "tree", commit] if *commit == COMMIT => {
            // One file on a page, so that there is a next one.
            let page: usize = query(uri, "page").and_then(|page| page.parse().ok()).unwrap_or(0);
            let bucket = format!("{org}/{name}");
            let all = listed(files, &bucket, "");
            let entries: Vec<String> = all
                .iter()
                .skip(page)
                .take(1)
                .map(|(key, content)| {
                    let sha256: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
                    let size = content.len();
                    // What the last byte says is broken has another digest than is announced.
                    let sha256 = if content.ends_with(b"!") { "0".repeat(64) } else { sha256 };
                    format!(
                        "{{\"type\":\"file\",\"path\":\"{key}\",\"size\":{size},\"oid\":{:?},\"lfs\":{{\"oid\":\"{sha256}\",\"size\":{size}}}}}",
                        etag(content).trim_matches('"')
                    )
                })
                .collect();
            let mut response = text(StatusCode::OK, &format!("[{}]", entries.join(",")));
            if page + 1 < all.len() {
                let host = headers[header::HOST].to_str().unwrap();
                let next = format!("<http://{host}/{path}?recursive=true&page={}>; rel=\"next\"", page + 1);
                response.headers_mut().insert(header::LINK, next.parse().unwrap());
            }
            response
        }
        [org, name, "resolve", commit, rest @ ..] if *commit == COMMIT => {
            let to = format!("/cdn/{org}/{name}/{}", rest.join("/"));
            Response::builder().status(StatusCode::FOUND).header(header::LOCATION, to).body(Body::empty()).unwrap()
        }
        ["cdn", rest @ ..] => file(method, headers, files.get(&rest.join("/"))),
        _ => {
            let mut response = text(StatusCode::NOT_FOUND, "{\"error\":\"Repository not found\"}");
            response.headers_mut().insert("x-error-message", "Repository not found".parse().unwrap());
            response
        }
    }
}
