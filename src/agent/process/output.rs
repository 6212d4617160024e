//! What a program says, in the agent's log: line by line.
//!
//! The rule of this module: a line is cut at a bound, and nothing in it can be taken for anything but text.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, BufReader};

/// Bytes of a line that are kept.
const LONGEST: usize = 4096;
/// How often a file that a program writes to is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes of such a file, after which it begins anew.
const LARGEST: u64 = 16 << 20;

/// Who speaks, and what was said last.
#[derive(Clone, Debug)]
pub(super) struct Voice {
    /// The replica.
    replica: String,
    /// The model, where a program serves one.
    model: Option<String>,
    last: Arc<Mutex<String>>,
}

impl Voice {
    pub(super) fn new(replica: String, model: Option<String>) -> Self {
        Self { replica, model, last: Arc::default() }
    }

    /// The last line.
    pub(super) fn last(&self) -> String {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn say(&self, line: &[u8]) {
        let line = clean(line);
        if line.is_empty() {
            return;
        }
        match &self.model {
            None => tracing::info!(target: "wharf::server", replica = self.replica, "{line}"),
            Some(model) => tracing::info!(target: "wharf::server", replica = self.replica, model, "{line}"),
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = line;
    }
}

/// A line as text, without what a terminal would obey.
fn clean(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.trim_end().chars();
    while let Some(c) = rest.next() {
        match c {
            // A colour ends with its letter.
            '\u{1b}' => drop(rest.by_ref().find(char::is_ascii_alphabetic)),
            '\t' => clean.push(' '),
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

/// A line as it comes, in pieces.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
    cut: bool,
}

impl Line {
    /// Takes what came, and says each line that is whole.
    fn take(&mut self, mut piece: &[u8], voice: &Voice) {
        while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
            self.add(&piece[..end]);
            self.end(voice);
            piece = &piece[end + 1..];
        }
        self.add(piece);
    }

    fn add(&mut self, piece: &[u8]) {
        let room = LONGEST - self.bytes.len();
        self.cut |= piece.len() > room;
        self.bytes.extend_from_slice(&piece[..piece.len().min(room)]);
    }

    fn end(&mut self, voice: &Voice) {
        if self.cut {
            self.bytes.extend_from_slice(b"...");
        }
        voice.say(&self.bytes);
        *self = Self::default();
    }
}

/// Passes on what comes, to its end.
pub(super) async fn pass_on(from: impl AsyncRead + Unpin, voice: Voice) {
    let mut from = BufReader::new(from);
    let mut line = Line::default();
    loop {
        let length = match from.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(piece) => {
                line.take(piece, &voice);
                piece.len()
            }
        };
        from.consume(length);
    }
    if !line.bytes.is_empty() {
        line.end(&voice);
    }
}

/// Passes on what is added to a file from `at` on, and begins the file anew when it has become large. Never ends.
pub(super) async fn follow(path: PathBuf, mut at: u64, voice: Voice) {
    let mut line = Line::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let Ok(mut file) = tokio::fs::File::options().read(true).write(true).open(&path).await else { continue };
        let length = file.metadata().await.map_or(0, |metadata| metadata.len());
        at = at.min(length);
        if file.seek(std::io::SeekFrom::Start(at)).await.is_err() {
            continue;
        }
        let mut piece = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = file.read(&mut piece).await {
            line.take(&piece[..read], &voice);
            at += read as u64;
        }
        // Its writer appends, so it goes on at the new end. What it wrote since the last reading is lost.
        if at > LARGEST && file.set_len(0).await.is_ok() {
            at = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_clean() {
        let voice = Voice::new("a-0".to_owned(), None);
        let mut line = Line::default();
        line.take(b"one\ntw", &voice);
        assert_eq!(voice.last(), "one");
        line.take(b"o\r\n\n", &voice);
        assert_eq!(voice.last(), "two");
        line.take(&[b'x'; 3 * LONGEST], &voice);
        line.take(b"y\nlast\x1b[31m red\x07\n", &voice);
        assert_eq!(voice.last(), "last red");
        line.take(&[b'x'; LONGEST + 1], &voice);
        line.take(b"\n", &voice);
        assert_eq!(voice.last().len(), LONGEST + 3);
    }

    #[tokio::test]
    async fn the_last_words_need_no_end_of_line() {
        let voice = Voice::new("a-0".to_owned(), Some("m".to_owned()));
        pass_on(&b"first\nlast words"[..], voice.clone()).await;
        assert_eq!(voice.last(), "last words");
    }
}
