//! Bytes that no client library would send, and what comes back.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of it")]

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// The longest that an answer, or an end, is waited for.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What came back on one connection until it ended, at most 64 KiB of it.
#[derive(Debug, Default)]
pub struct Came {
    /// The bytes, as text as far as they are.
    pub text: String,
    /// Whether the server closed the connection within [`PATIENCE`].
    pub ended: bool,
}

impl Came {
    /// The status of an HTTP/1.1 answer.
    pub fn status(&self) -> u16 {
        self.text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }
}

/// Connects.
pub async fn connect(address: &str) -> TcpStream {
    timeout(PATIENCE, TcpStream::connect(address)).await.expect("in time").expect("a connection")
}

/// Reads until the server ends the connection, or an HTTP/1.1 answer with its length is whole.
pub async fn read(io: &mut (impl AsyncRead + Unpin)) -> Came {
    let mut came = Vec::new();
    let ended = timeout(PATIENCE, async {
        let mut piece = [0; 4096];
        loop {
            match io.read(&mut piece).await {
                Ok(0) | Err(_) => return true,
                Ok(read) if came.len() < 64 << 10 => came.extend_from_slice(&piece[..read]),
                Ok(_) => {}
            }
            if whole(&came) {
                return false;
            }
        }
    });
    let ended = ended.await.unwrap_or(false);
    Came { text: String::from_utf8_lossy(&came).into_owned(), ended }
}

fn whole(came: &[u8]) -> bool {
    let text = String::from_utf8_lossy(came).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    length.and_then(|length| length.trim().parse::<usize>().ok()).is_some_and(|length| body.len() >= length)
}

/// Sends `bytes` and reads what comes. What can't be sent because the server has closed already is not missed.
pub async fn exchange(address: &str, bytes: &[u8]) -> Came {
    let mut io = connect(address).await;
    drop(timeout(PATIENCE, io.write_all(bytes)).await.expect("taken or refused in time"));
    read(&mut io).await
}

/// What an HTTP/2 request led to.
#[derive(Debug)]
pub struct Answer {
    /// HTTP's status; 0 when there was no answer at all.
    pub status: u16,
    /// gRPC's status, from headers or trailers.
    pub grpc: Option<i32>,
    /// gRPC's message, the body, or what broke.
    pub message: String,
}

impl Answer {
    /// Whether it says, in any of the protocol's ways, that the request failed, and why.
    pub fn refuses(&self) -> bool {
        self.status >= 400 || self.status == 0 || self.grpc.is_some_and(|code| code != 0)
    }
}

/// One request over HTTP/2, without any help of gRPC's.
pub async fn http2(address: &str, request: http::Request<Full<Bytes>>) -> Answer {
    timeout(PATIENCE, http2_of(address, request)).await.expect("an answer in time")
}

async fn http2_of(address: &str, request: http::Request<Full<Bytes>>) -> Answer {
    let broken = |error: &dyn std::fmt::Debug| Answer { status: 0, grpc: None, message: format!("{error:?}") };
    let io = TokioIo::new(connect(address).await);
    let (mut send, connection) = match hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await {
        Ok(made) => made,
        Err(error) => return broken(&error),
    };
    let connection = tokio::spawn(connection);
    let answer = match send.send_request(request).await {
        Err(error) => broken(&error),
        Ok(response) => {
            let (head, body) = response.into_parts();
            let (trailers, text) = match body.collect().await {
                Ok(body) => (body.trailers().cloned().unwrap_or_default(), body.to_bytes()),
                Err(error) => (http::HeaderMap::new(), Bytes::from(format!("{error:?}"))),
            };
            let field = |name: &str| {
                let value = trailers.get(name).or_else(|| head.headers.get(name))?;
                Some(value.to_str().unwrap_or_default().to_owned())
            };
            Answer {
                status: head.status.as_u16(),
                grpc: field("grpc-status").and_then(|code| code.parse().ok()),
                message: field("grpc-message").unwrap_or_else(|| String::from_utf8_lossy(&text).into_owned()),
            }
        }
    };
    connection.abort();
    answer
}

/// A gRPC request with this body, framing included.
pub fn grpc(address: &str, path: &str, body: impl Into<Bytes>) -> http::Request<Full<Bytes>> {
    http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from(body.into()))
        .expect("a request")
}

/// A gRPC message: flag, length, bytes.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("short");
    [&[0][..], &length.to_be_bytes(), message].concat()
}

/// Numbers that look random and come again with the same seed (xorshift).
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}
