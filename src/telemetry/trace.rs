//! W3C trace context: <https://www.w3.org/TR/trace-context/>.

use std::fmt;

/// The header that carries a [`TraceContext`].
pub const TRACEPARENT: &str = "traceparent";

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

    /// A span below this one, with its id from `random`.
    #[must_use]
    pub fn child(&self, random: &mut dyn FnMut() -> u64) -> Self {
        Self { span_id: span_id(random), ..*self }
    }
}

fn span_id(random: &mut dyn FnMut() -> u64) -> [u8; 8] {
    random().max(1).to_be_bytes()
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
        span.record("trace_id", hex(&context.trace_id).as_str());
        span.record("parent_span", hex(&context.span_id).as_str());
    }
    span
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Display for TraceContext {
    /// As the header has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, span) = (u128::from_be_bytes(self.trace_id), u64::from_be_bytes(self.span_id));
        write!(f, "00-{trace:032x}-{span:016x}-{:02x}", u8::from(self.sampled))
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
