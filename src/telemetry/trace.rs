//! W3C trace context: <https://www.w3.org/TR/trace-context/>.

use std::fmt;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

/// The header that carries a [`TraceContext`].
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Where a request stands in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never all zeros.
    pub trace_id: [u8; 16],
    /// The span; never all zeros.
    pub span_id: [u8; 8],
    /// Whether whoever began the trace records it.
    pub sampled: bool,
}

impl TraceContext {
    /// Reads a `traceparent`. One that the standard calls invalid is none, and the request begins a trace of
    /// its own. Of a version after 00 only what 00 has is read, as the standard asks.
    #[must_use]
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.splitn(5, '-');
        let mut next = |digits: usize| {
            let part = parts.next()?;
            let lower = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            (part.len() == digits && lower).then_some(part)
        };
        let (version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
        let more = parts.next().is_some();
        if version == "ff" || (version == "00" && more) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?.to_be_bytes();
        let span_id = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?.to_be_bytes();
        let flags = u8::from_str_radix(flags, 16).ok()?;
        Some(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }

    /// Begins a trace with ids from `random`.
    pub fn root(random: &mut dyn FnMut() -> u64, sampled: bool) -> Self {
        let id = u128::from(random()) << 64 | u128::from(random());
        Self { trace_id: id.max(1).to_be_bytes(), span_id: span_id(random), sampled }
    }

    /// As the header has it.
    #[must_use]
    pub fn header(&self) -> HeaderValue {
        let mut text = Vec::with_capacity(55);
        text.extend(b"00-");
        digits(&mut text, &self.trace_id);
        text.push(b'-');
        digits(&mut text, &self.span_id);
        text.push(b'-');
        digits(&mut text, &[u8::from(self.sampled)]);
        unique(text)
    }

    /// A span below this one, with its id from `random`.
    #[must_use]
    pub fn child(&self, random: &mut dyn FnMut() -> u64) -> Self {
        Self { span_id: span_id(random), ..*self }
    }
}

fn span_id(random: &mut dyn FnMut() -> u64) -> [u8; 8] {
    random().max(1).to_be_bytes()
}

/// Sixteen random bytes, as the value of a header.
pub fn random_id(random: &mut dyn FnMut() -> u64) -> HeaderValue {
    let mut text = Vec::with_capacity(32);
    for _ in 0..2 {
        digits(&mut text, &random().to_be_bytes());
    }
    unique(text)
}

/// A value that no other request has. HTTP/2 keeps values of earlier requests in a table, to refer to them; this
/// one would only take the place of others there, so it is marked as one to leave out.
fn unique(digits: Vec<u8>) -> HeaderValue {
    let mut value = HeaderValue::from_maybe_shared(Bytes::from(digits)).unwrap_or(HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

/// Adds two digits for each byte.
fn digits(text: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
}

/// The span of a request at one hop, with the trace that its headers name. Spans are made at debug level:
/// a process that does not log them pays nothing.
#[must_use]
pub fn request_span(hop: &'static str, headers: &http::HeaderMap) -> tracing::Span {
    let span = tracing::debug_span!(
        target: "wharf::request",
        "request",
        hop,
        trace_id = tracing::field::Empty,
        parent_span = tracing::field::Empty
    );
    if !span.is_disabled()
        && let Some(context) = headers.get(TRACEPARENT).and_then(|value| TraceContext::parse(value.to_str().ok()?))
    {
        let text = context.to_string();
        span.record("trace_id", &text[3..35]);
        span.record("parent_span", &text[36..52]);
    }
    span
}

impl fmt::Display for TraceContext {
    /// As the header has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.header().to_str().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_the_standard_calls_invalid_is_none() {
        let context = TraceContext::parse(GOOD).expect("valid");
        assert!(context.sampled);
        assert_eq!(context.to_string(), GOOD);
        let later = TraceContext::parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-what-ever");
        assert_eq!(later, Some(TraceContext { sampled: false, ..context }));
        for bad in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-+0f067aa0ba902b7-01",
            "0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_context_is_read_back_as_written(numbers: [u64; 3], sampled: bool) {
            let mut numbers = numbers.into_iter().cycle();
            let mut random = move || numbers.next().unwrap_or_default();
            let root = TraceContext::root(&mut random, sampled);
            let child = root.child(&mut random);
            prop_assert_eq!(child.trace_id, root.trace_id);
            for context in [root, child] {
                prop_assert_eq!(TraceContext::parse(&context.to_string()), Some(context));
            }
        }

        #[test]
        fn whatever_is_read_is_valid(header in "([0-9a-f]{2}-)?[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?|.*") {
            if let Some(context) = TraceContext::parse(&header) {
                prop_assert_eq!(TraceContext::parse(&context.to_string()), Some(context));
            }
        }
    }
}
