//! gRPC framing: whose message is it, without reading more of it than its first fields.
//!
//! The rule of this module: tensors are neither parsed nor copied; a message's fields are looked at only up to
//! the name and version of the model, which every encoder writes first.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::StreamBody;

use super::{Response, body::Body};

/// Length of what stands before every message: a flag for compression, and four bytes of length.
pub const PREFIX: usize = 5;

/// Path of the inference service, up to its methods.
pub const SERVICE: &str = "/inference.GRPCInferenceService/";

/// Whether `headers` are those of a gRPC request or response.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Follows the boundaries of messages in a stream of bytes.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    prefix: [u8; PREFIX],
    have: usize,
    left: u64,
}

impl Messages {
    /// The greatest length among the messages of which `chunk` holds a part, as far as their prefixes are complete.
    pub fn largest(&mut self, mut chunk: &[u8]) -> u64 {
        let mut largest = 0;
        while !chunk.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(chunk.len() as u64);
                chunk = &chunk[skipped as usize..];
                self.left -= skipped;
            } else {
                let taken = (PREFIX - self.have).min(chunk.len());
                self.prefix[self.have..self.have + taken].copy_from_slice(&chunk[..taken]);
                self.have += taken;
                chunk = &chunk[taken..];
                if self.have == PREFIX {
                    self.have = 0;
                    self.left = length(&self.prefix);
                    largest = largest.max(self.left);
                }
            }
        }
        largest
    }
}

/// The length that a message's prefix announces.
pub(super) fn length(prefix: &[u8; PREFIX]) -> u64 {
    u64::from(u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]))
}

/// What the beginning of a request says about its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peeked {
    /// The model's name and version, each empty when absent.
    Named {
        /// Field 1.
        name: String,
        /// Field 2.
        version: String,
    },
    /// The message is compressed.
    Compressed,
    /// It is not a message of this service; one sentence.
    Malformed(&'static str),
}

/// Looks for a model's name and version at the start of `bytes`, a first message with its prefix. `None` when more
/// bytes are needed; `most` is how many there will be at most.
#[must_use]
pub fn peek_model(bytes: &[u8], most: usize) -> Option<Peeked> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
    match prefix[0] {
        0 => {}
        1 => return Some(Peeked::Compressed),
        _ => return Some(Peeked::Malformed("the message's prefix is not one of gRPC")),
    }
    let length = usize::try_from(length(prefix)).unwrap_or(usize::MAX);
    let whole = rest.len() >= length;
    let mut fields = Fields { bytes: &rest[..rest.len().min(length)], at: 0 };
    let (mut name, mut version) = (None, None);
    let short = |fields: &Fields<'_>| {
        if whole {
            Some(Peeked::Malformed("the message ends within a field"))
        } else if fields.at.saturating_add(PREFIX) >= most {
            Some(Peeked::Malformed("model_name does not come early enough in the message; send it as its first field"))
        } else {
            None
        }
    };
    loop {
        if fields.at == length || (name.is_some() && version.is_some()) {
            break;
        }
        let Some((number, kind)) = fields.tag() else { return short(&fields) };
        if name.is_some() && number > 2 {
            break;
        }
        if matches!(number, 1 | 2) {
            if kind != 2 {
                return Some(Peeked::Malformed("the model's name or version is not a string"));
            }
            let Some(text) = fields.delimited() else { return short(&fields) };
            let Ok(text) = std::str::from_utf8(text) else {
                return Some(Peeked::Malformed("the model's name or version is not UTF-8"));
            };
            *(if number == 1 { &mut name } else { &mut version }) = Some(text.to_owned());
        } else {
            match fields.skip(kind) {
                Some(true) => {}
                Some(false) => return Some(Peeked::Malformed("the message has a field of unknown type")),
                None => return short(&fields),
            }
        }
    }
    Some(Peeked::Named { name: name.unwrap_or_default(), version: version.unwrap_or_default() })
}

/// Walks over the top-level fields of a message. After a `None`, `at` is where the bytes would have to reach.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte < 0x80 {
                return Some(value);
            }
        }
        Some(u64::MAX)
    }

    fn tag(&mut self) -> Option<(u64, u8)> {
        let tag = self.varint()?;
        Some((tag >> 3, (tag & 7) as u8))
    }

    fn advance(&mut self, by: u64) -> Option<&'a [u8]> {
        let from = self.at;
        self.at = from.saturating_add(usize::try_from(by).unwrap_or(usize::MAX));
        self.bytes.get(from..self.at)
    }

    fn delimited(&mut self) -> Option<&'a [u8]> {
        let length = self.varint()?;
        self.advance(length)
    }

    /// `Some(false)` when there is no such type of field.
    fn skip(&mut self, kind: u8) -> Option<bool> {
        match kind {
            0 => self.varint().map(drop)?,
            1 => self.advance(8).map(drop)?,
            2 => self.delimited().map(drop)?,
            5 => self.advance(4).map(drop)?,
            _ => return Some(false),
        }
        Some(true)
    }
}

/// A unary answer of one message, given encoded.
#[must_use]
pub fn reply(message: &[u8]) -> Response {
    let mut data = Vec::with_capacity(PREFIX + message.len());
    data.push(0);
    data.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend_from_slice(message);
    let frames = [Frame::data(Bytes::from(data)), Frame::trailers(status_trailers(0, ""))];
    let body = StreamBody::new(futures::stream::iter(frames.map(Ok::<_, std::convert::Infallible>)));
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The trailers that end a gRPC answer with `status`.
#[must_use]
pub fn status_trailers(status: u8, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert("grpc-status", HeaderValue::from(u16::from(status)));
    if !message.is_empty() {
        trailers.insert("grpc-message", percent_encoded(message));
    }
    trailers
}

/// `message` as `grpc-message` has it: printable ASCII as it is, everything else and `%` percent-encoded.
#[must_use]
pub fn percent_encoded(message: &str) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut encoded = Vec::with_capacity(message.len());
    for byte in message.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(byte);
        } else {
            encoded.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    HeaderValue::from_bytes(&encoded).unwrap_or(HeaderValue::from_static("error"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    /// The fields of the protocol's message that matter here.
    #[derive(Clone, PartialEq, prost::Message)]
    struct ModelInferRequest {
        #[prost(string, tag = "1")]
        model_name: String,
        #[prost(string, tag = "2")]
        model_version: String,
        #[prost(string, tag = "3")]
        id: String,
        #[prost(bytes = "bytes", repeated, tag = "7")]
        raw_input_contents: Vec<Bytes>,
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((message.len() as u32).to_be_bytes());
        bytes.extend(message);
        bytes
    }

    fn named(name: &str, version: &str) -> Option<Peeked> {
        Some(Peeked::Named { name: name.into(), version: version.into() })
    }

    #[test]
    fn the_name_is_found_without_the_tensors() {
        let request = ModelInferRequest {
            model_name: "iris".into(),
            model_version: "3".into(),
            id: "x".into(),
            raw_input_contents: vec![vec![7; 100_000].into()],
        };
        let bytes = framed(&request.encode_to_vec());
        assert_eq!(peek_model(&bytes[..40], 65_536), named("iris", "3"));
        for end in 0..14 {
            assert_eq!(peek_model(&bytes[..end], 65_536), None, "{end} bytes");
        }
    }

    #[test]
    fn a_message_without_a_name_has_an_empty_one() {
        assert_eq!(peek_model(&framed(&[]), 100), named("", ""));
        let ready = ModelInferRequest { model_name: "a".into(), ..Default::default() };
        assert_eq!(peek_model(&framed(&ready.encode_to_vec()), 100), named("a", ""));
    }

    #[test]
    fn other_fields_may_come_first_within_the_bound() {
        let mut message = vec![0x1a, 3, b'i', b'd', b'1', 0x48, 0x05, 0x35, 1, 2, 3, 4, 0x31, 1, 2, 3, 4, 5, 6, 7, 8];
        message.extend([0x0a, 4]);
        message.extend(b"iris");
        assert_eq!(peek_model(&framed(&message), 100), named("iris", ""));
        let huge = [&[0x3a, 0x80, 0x80, 0x80, 0x40][..], &[0; 50]].concat();
        let mut bytes = vec![0];
        bytes.extend(200_000_000_u32.to_be_bytes());
        bytes.extend(huge);
        assert!(matches!(peek_model(&bytes, 65_536), Some(Peeked::Malformed(why)) if why.contains("first field")));
    }

    #[test]
    fn what_is_not_a_message_is_said_so() {
        assert_eq!(peek_model(&[1, 0, 0, 0, 9, 1], 100), Some(Peeked::Compressed));
        for bad in [
            &[7, 0, 0, 0, 0][..],
            &framed(&[0x08, 1]),
            &framed(&[0x0a, 9, b'x']),
            &framed(&[0x0a, 1, 0xff]),
            &framed(&[0x0f, 1]),
        ] {
            assert!(matches!(peek_model(bad, 100), Some(Peeked::Malformed(_))), "{bad:?}");
        }
    }

    #[test]
    fn only_grpc_is_grpc() {
        let is =
            |value: &'static str| is_grpc(&HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))]));
        assert!(is("application/grpc") && is("application/grpc+proto") && is("application/grpc;x=1"));
        assert!(!is("application/grpc-web") && !is("application/json") && !is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn messages_are_percent_encoded() {
        assert_eq!(percent_encoded("50% of \u{e9}\n"), "50%25 of %C3%A9%0A");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), most in 0..300_usize) {
            let framed = framed(&bytes);
            drop(peek_model(&bytes, most));
            drop(peek_model(&framed[..framed.len() / 2], most));
            // A whole message always has an answer.
            prop_assert!(peek_model(&framed, most).is_some());
        }

        #[test]
        fn boundaries_are_found_however_it_is_cut(
            lengths in prop::collection::vec(0..200_usize, 1..6), cut in 1..50_usize,
        ) {
            let stream: Vec<u8> = lengths.iter().flat_map(|n| framed(&vec![9; *n])).collect();
            let mut messages = Messages::default();
            let largest = stream.chunks(cut).map(|chunk| messages.largest(chunk)).max();
            prop_assert_eq!(largest, lengths.iter().max().map(|n| *n as u64));
            prop_assert_eq!((messages.have, messages.left), (0, 0));
        }
    }
}
