//! As much of HTTP/1.1 as the load and the backend need of each other, and no more.

use anyhow::{Context as _, bail};

/// The head of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its bytes, with the empty line.
    pub length: usize,
    /// Bytes of the body.
    pub content: u64,
}

impl Head {
    /// Reads the head that `bytes` begin with; `None` when it is not whole yet.
    pub fn read(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
        let mut content = 0;
        for line in bytes[..end].split(|b| *b == b'\n').skip(1) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if let Some(value) = header(line, b"content-length") {
                content = std::str::from_utf8(value)?.trim().parse().context("a strange content-length")?;
            } else if header(line, b"transfer-encoding").is_some() {
                bail!("a body of unknown length; the benches need one that is known");
            }
        }
        Ok(Some(Self { length: end + 4, content }))
    }
}

fn header<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (first, rest) = line.split_at_checked(name.len())?;
    if !first.eq_ignore_ascii_case(name) { None } else { rest.strip_prefix(b":") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_when_it_is_whole() {
        assert_eq!(Head::read(b"HTTP/1.1 200 OK\r\nContent-Le").unwrap(), None);
        let whole = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 12\r\n\r\n{}";
        assert_eq!(Head::read(whole).unwrap(), Some(Head { length: whole.len() - 2, content: 12 }));
        assert!(Head::read(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
    }
}
