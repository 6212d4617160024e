//! Files of web servers, which the plain HTTP source and the hub have in common.

use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use reqwest::{
    Client, RequestBuilder, Response, StatusCode, Url,
    header::{
        ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
        LAST_MODIFIED, RANGE,
    },
};

use super::{
    refusal::{Asked, Refusal, said},
    transfer::{Answer, Opened, Origin, Trouble, Wanted},
    uri::bad,
};
use crate::domain::{
    copy::Failure,
    secret::{Credentials, Secret},
};

/// Longest silence of a server.
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
pub(super) const CONNECT: Duration = Duration::from_secs(10);
/// Most redirects that are followed.
const REDIRECTS: usize = 5;
/// As much of an error's body is read.
const BODY: usize = 16 << 10;
/// As long as it may take.
const BODY_DEADLINE: Duration = Duration::from_secs(5);

/// A client of web servers.
///
/// # Errors
/// When TLS can't be set up.
pub(super) fn client() -> Result<Client, Failure> {
    // Another part of the process may have chosen already; then that choice stands.
    drop(rustls::crypto::ring::default_provider().install_default());
    Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .redirect(reqwest::redirect::Policy::limited(REDIRECTS))
        // Where a redirect leads is not to learn the URL that it came from, which may be signed.
        .referer(false)
        .build()
        .map_err(|error| bad(format!("HTTP downloads can't be set up: {error}")))
}

/// How a request says who asks.
#[derive(Clone, Debug)]
pub(super) enum Login {
    /// It does not.
    Nobody,
    /// With a token.
    Token(Secret),
    /// With a name and a password.
    User(String, Secret),
}

impl Login {
    pub(super) fn on(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Nobody => request,
            Self::Token(token) => request.bearer_auth(token.expose()),
            Self::User(user, password) => request.basic_auth(user, Some(password.expose())),
        }
    }
}

/// Whether `secret` is for the server of `url`, by its scheme, host and port; nothing when it names no server. Over TLS,
/// where it does not say.
pub(super) fn is_for(secret: &Credentials, url: &Url) -> Option<bool> {
    let place = secret.get(&["url", "host"])?;
    let place = if place.contains("://") { place.to_owned() } else { format!("https://{place}") };
    Some(Url::parse(&place).is_ok_and(|place| place.has_host() && place.origin() == url.origin()))
}

/// Files by their URLs.
#[derive(Debug)]
pub(super) struct Web<'a> {
    pub(super) client: &'a Client,
    pub(super) login: Login,
    /// The tag of the file that is known.
    pub(super) known: Option<&'a str>,
    pub(super) asked: Asked,
    /// Whether these are files of a commit: each has a name of its own in messages, and its URL never means
    /// another content, whatever tags are sent with it.
    pub(super) commit: bool,
}

impl Web<'_> {
    /// The tag of what `response` has of `file`.
    fn tag(&self, file: &Wanted, response: &Response) -> Option<String> {
        if self.commit { file.tag.clone() } else { tag_of(response.headers()) }
    }

    async fn ask(&self, file: &Wanted, from: u64, tag: Option<&str>) -> Result<Opened, Trouble> {
        let asked = Asked { shown: self.shown(file), ..self.asked.clone() };
        let url = Url::parse(&file.at).map_err(|error| bad(format!("{} is not a URL: {error}", asked.shown)))?;
        // Compressed bytes have other numbers.
        let mut get = self.login.on(self.client.get(url)).header(ACCEPT_ENCODING, "identity");
        match (from, tag, self.known) {
            (1.., Some(_), _) if self.commit => get = get.header(RANGE, format!("bytes={from}-")),
            (1.., Some(tag), _) => get = get.header(RANGE, format!("bytes={from}-")).header(IF_RANGE, tag),
            (_, _, Some(known)) => get = get.header(unless(known), known),
            _ => {}
        }
        let response = send(get, &asked).await?;
        let answer = match response.status() {
            StatusCode::NOT_MODIFIED if self.known.is_some() => return Ok(Opened::Unchanged),
            StatusCode::OK => Answer {
                from: 0,
                total: response.content_length(),
                tag: self.tag(file, &response),
                chunks: futures::stream::empty().boxed(),
            },
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
                let (from, total) = range.and_then(range_of).ok_or_else(|| {
                    bad(format!("{} can't be gone on with: the server does not say which part it sent", asked.shown))
                })?;
                Answer { from, total, tag: self.tag(file, &response), chunks: futures::stream::empty().boxed() }
            }
            _ => return Err(refused(response, &asked).await),
        };
        let chunks = response.bytes_stream().map(move |chunk| chunk.map_err(|error| asked.broken(&error))).boxed();
        Ok(Opened::Stream(Answer { chunks, ..answer }))
    }
}

impl Origin for Web<'_> {
    fn open<'a>(&'a self, file: &'a Wanted, from: u64, tag: Option<&'a str>) -> BoxFuture<'a, Result<Opened, Trouble>> {
        self.ask(file, from, tag).boxed()
    }

    fn shown(&self, file: &Wanted) -> String {
        if self.commit { format!("{} of {}", file.path, self.asked.shown) } else { self.asked.shown.clone() }
    }
}

/// Sends a request.
pub(super) async fn send(request: RequestBuilder, asked: &Asked) -> Result<Response, Trouble> {
    request.send().await.map_err(|error| asked.broken(&error))
}

/// The refusal that `response` is.
pub(super) async fn refused(response: Response, asked: &Asked) -> Trouble {
    let status = response.status();
    let header = response.headers().get("x-error-message").and_then(|text| text.to_str().ok()).map(ToOwned::to_owned);
    let text = match header {
        Some(text) => Some(text),
        None => said(&body(response).await),
    };
    let said = text.map_or_else(|| status.to_string(), |text| format!("{status}, {text}"));
    asked.refused(&Refusal::of(status.as_u16()), &said)
}

/// The beginning of a body.
async fn body(response: Response) -> String {
    let mut text = Vec::new();
    let read = async {
        let mut chunks = response.bytes_stream();
        while let Some(Ok(chunk)) = chunks.next().await {
            text.extend_from_slice(&chunk);
            if text.len() >= BODY {
                break;
            }
        }
    };
    // What came by the deadline has to do.
    drop(tokio::time::timeout(BODY_DEADLINE, read).await);
    text.truncate(BODY);
    String::from_utf8_lossy(&text).into_owned()
}

/// What a server says to tell a content from a later one. A weak tag may stand for other bytes, and can't be used
/// to go on from.
fn tag_of(headers: &HeaderMap) -> Option<String> {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    text(&ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| text(&LAST_MODIFIED)).map(ToOwned::to_owned)
}

/// The header that asks for a content only if it is another one than `tag`'s.
fn unless(tag: &str) -> HeaderName {
    if tag.starts_with('"') { IF_NONE_MATCH } else { IF_MODIFIED_SINCE }
}

/// First byte and size of the whole, of `bytes 5-9/10`.
fn range_of(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn ranges_and_tags_are_read() {
        assert_eq!(range_of("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(range_of("bytes 5-9/*"), Some((5, None)));
        assert_eq!(range_of("items 5-9/10"), None);
        let headers = |etag: &'static str| {
            HeaderMap::from_iter([
                (ETAG, HeaderValue::from_static(etag)),
                (LAST_MODIFIED, HeaderValue::from_static("Thu, 26 Nov 2026 15:25:52 GMT")),
            ])
        };
        assert_eq!(tag_of(&headers("\"a\"")).as_deref(), Some("\"a\""));
        assert_eq!(tag_of(&headers("W/\"a\"")).as_deref(), Some("Thu, 26 Nov 2026 15:25:52 GMT"));
    }
    /// One answer to one request, whose head comes back.
    async fn once(answer: String) -> (String, tokio::task::JoinHandle<String>) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut head = String::new();
            while !head.contains("\r\n\r\n") {
                let mut bytes = [0; 1024];
                let read = stream.read(&mut bytes).await.expect("a request");
                head += &String::from_utf8_lossy(&bytes[..read]);
            }
            stream.write_all(answer.as_bytes()).await.expect("answered");
            head.to_ascii_lowercase()
        });
        (address, served)
    }

    #[tokio::test]
    async fn where_a_redirect_leads_learns_neither_the_url_nor_the_login() {
        let (cdn, asked) = once("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()).await;
        let moved = format!("HTTP/1.1 302 Found\r\nlocation: http://{cdn}/m\r\ncontent-length: 0\r\n\r\n");
        let (server, _served) = once(moved).await;
        let login = Login::Token(Secret::new("hunter22"));
        let get = login.on(client().expect("a client").get(format!("http://{server}/m?signature=hunter33")));
        assert_eq!(get.send().await.expect("an answer").status(), StatusCode::OK);
        let head = asked.await.expect("asked");
        assert!(!head.contains("hunter") && !head.contains("referer"), "{head}");
    }
}
