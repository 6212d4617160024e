//! As much of HTTP/2 as a client and a door need of each other, and no more.
//!
//! The rule of this module: what is asked and answered is known beforehand, so headers are written without compression, and
//! those that come are not read. Whether an answer is a good one, the gateway's counters say.

use std::ops::Range;

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes before a frame's payload.
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW: u8 = 8;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// Of settings and pings.
const ACK: u8 = 1;

/// Bytes that the peer may send on all streams together before it is told that it may send more.
const ALLOWED: u32 = 1 << 30;

/// A request, but for the number of its stream.
#[derive(Debug)]
pub(super) struct Asked {
    headers: Vec<u8>,
    message: Vec<u8>,
}

impl Asked {
    pub(super) fn new(model: &str, message: &[u8]) -> Self {
        // By their indices in HPACK's static table: the method POST, the scheme http.
        let mut headers = vec![0x83, 0x86];
        named(&mut headers, 4, "/inference.GRPCInferenceService/ModelInfer");
        named(&mut headers, 1, "bench");
        named(&mut headers, 31, "application/grpc");
        literal(&mut headers, "te", "trailers");
        literal(&mut headers, "seldon-model", model);
        Self { headers, message: message.to_vec() }
    }
}

/// A header whose name is in the static table at `index`, which is below 128.
fn named(headers: &mut Vec<u8>, index: u8, value: &str) {
    match index.checked_sub(15) {
        None => headers.push(index),
        Some(rest) => headers.extend([15, rest]),
    }
    text(headers, value);
}

fn literal(headers: &mut Vec<u8>, name: &str, value: &str) {
    headers.push(0);
    text(headers, name);
    text(headers, value);
}

/// Up to 126 bytes.
fn text(headers: &mut Vec<u8>, text: &str) {
    headers.push(text.len() as u8);
    headers.extend_from_slice(text.as_bytes());
}

fn put(bytes: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    bytes.extend([kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Frames {
    io: DuplexStream,
    buffer: Vec<u8>,
    /// What was read and not yet looked at.
    unread: Range<usize>,
    writes: Vec<u8>,
    /// Bytes that came since the peer was told that it may send more.
    came: u32,
    next_stream: u32,
}

/// Data or headers.
#[derive(Debug)]
struct Frame {
    kind: u8,
    ends: bool,
    stream: u32,
    payload: Range<usize>,
}

impl Frames {
    fn new(io: DuplexStream) -> Self {
        let (buffer, writes) = (vec![0; super::PIPE], Vec::new());
        Self { io, buffer, unread: 0..0, writes, came: 0, next_stream: 1 }
    }

    /// The client's end.
    pub(super) async fn client(mut io: DuplexStream) -> anyhow::Result<Self> {
        io.write_all(PREFACE).await?;
        let mut this = Self::new(io);
        this.begin().await?;
        Ok(this)
    }

    async fn begin(&mut self) -> anyhow::Result<()> {
        put(&mut self.writes, SETTINGS, 0, 0, &[]);
        put(&mut self.writes, WINDOW, 0, 0, &ALLOWED.to_be_bytes());
        self.write().await
    }

    async fn write(&mut self) -> anyhow::Result<()> {
        self.io.write_all(&self.writes).await?;
        self.writes.clear();
        Ok(())
    }

    /// Asks, and waits until the answer is over.
    pub(super) async fn ask(&mut self, asked: &Asked) -> anyhow::Result<()> {
        let stream = self.next_stream;
        self.next_stream += 2;
        put(&mut self.writes, HEADERS, END_HEADERS, stream, &asked.headers);
        put(&mut self.writes, DATA, END_STREAM, stream, &asked.message);
        self.write().await?;
        loop {
            let frame = self.next().await?.context("the connection was closed")?;
            ensure!(frame.stream == stream, "stream {} was answered, not {stream}", frame.stream);
            if frame.ends {
                return Ok(());
            }
        }
    }

    /// The next frame of a stream. What concerns the connection is answered.
    async fn next(&mut self) -> anyhow::Result<Option<Frame>> {
        loop {
            let unread = &self.buffer[self.unread.clone()];
            let whole = unread.first_chunk::<HEAD>().and_then(|head| {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                (unread.len() >= HEAD + length).then_some((length, head[3], head[4], stream))
            });
            let Some((length, kind, flags, stream)) = whole else {
                self.buffer.copy_within(self.unread.clone(), 0);
                self.unread = 0..self.unread.len();
                match self.io.read(&mut self.buffer[self.unread.end..]).await? {
                    0 => return Ok(None),
                    read => self.unread.end += read,
                }
                continue;
            };
            let from = self.unread.start + HEAD;
            let payload = from..from + length;
            self.unread.start = payload.end;
            match kind {
                DATA | HEADERS => {
                    if kind == DATA {
                        self.came += u32::try_from(length)?;
                    }
                    if self.came > ALLOWED / 2 {
                        put(&mut self.writes, WINDOW, 0, 0, &self.came.to_be_bytes());
                        self.came = 0;
                        self.write().await?;
                    }
                    return Ok(Some(Frame { kind, ends: flags & END_STREAM != 0, stream, payload }));
                }
                SETTINGS | PING if flags & ACK == 0 => {
                    let echoed = if kind == PING { payload } else { 0..0 };
                    put(&mut self.writes, kind, ACK, 0, &self.buffer[echoed]);
                    self.write().await?;
                }
                RESET | GO_AWAY => bail!("the peer gave up: frame {kind}, {:?}", &self.buffer[payload]),
                _ => {}
            }
        }
    }
}

/// Answers every request with its own message.
pub(super) async fn door(mut io: DuplexStream) -> anyhow::Result<()> {
    let mut preface = [0; PREFACE.len()];
    io.read_exact(&mut preface).await?;
    ensure!(preface == *PREFACE, "the peer does not speak HTTP/2");
    let (mut headers, mut trailers) = (vec![0x88], Vec::new());
    named(&mut headers, 31, "application/grpc");
    literal(&mut headers, "x-wharf-residency", "resident");
    literal(&mut trailers, "grpc-status", "0");
    let mut this = Frames::new(io);
    this.begin().await?;
    let mut message = Vec::new();
    while let Some(frame) = this.next().await? {
        // One request at a time.
        if frame.kind == DATA {
            message.extend_from_slice(&this.buffer[frame.payload]);
        }
        if frame.ends {
            put(&mut this.writes, HEADERS, END_HEADERS, frame.stream, &headers);
            put(&mut this.writes, DATA, 0, frame.stream, &message);
            put(&mut this.writes, HEADERS, END_HEADERS | END_STREAM, frame.stream, &trailers);
            this.write().await?;
            message.clear();
        }
    }
    Ok(())
}
