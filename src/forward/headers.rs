//! Headers that end at a hop, and the deadline that gRPC sends as one.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, header::CONNECTION};
use smallvec::SmallVec;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// What the headers of Wharf's own hops begin with.
const INTERNAL: &str = "x-wharf-";

/// Removes what ends at a hop: what concerns one connection only (RFC 9110, 7.6.1), and what Wharf's own parts speak to
/// each other with. `te: trailers` stays: gRPC asks for it end to end.
pub fn strip_ending(headers: &mut HeaderMap) {
    // Most of it is not there. To look at each name costs less than to ask for each of those.
    let ending: SmallVec<[HeaderName; 4]> =
        headers.iter().filter(|(name, value)| ends_here(name, value)).map(|(name, _)| name.clone()).collect();
    for name in ending {
        if name == CONNECTION {
            let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
            let listed: SmallVec<[HeaderName; 4]> =
                values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
            for name in listed {
                headers.remove(name);
            }
        }
        headers.remove(name);
    }
}

fn ends_here(name: &HeaderName, value: &HeaderValue) -> bool {
    match name.as_str() {
        "connection"
        | "keep-alive"
        | "proxy-connection"
        | "proxy-authenticate"
        | "proxy-authorization"
        | "transfer-encoding"
        | "upgrade"
        | "trailer" => true,
        "te" => value != "trailers",
        name => name.starts_with(INTERNAL),
    }
}

/// The time that a gRPC client gives for a call.
#[must_use]
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("valid"))).collect()
    }

    #[test]
    fn what_ends_here_is_removed_and_nothing_else() {
        let mut map = headers(&[
            ("connection", "close, X-Mine"),
            ("connection", "x-other"),
            ("x-mine", "1"),
            ("x-other", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "trailers"),
            ("accept", "*/*"),
            ("x-wharf-copy", "1.1.1"),
            ("x-wharf-not-here", ""),
        ]);
        strip_ending(&mut map);
        assert_eq!(map, headers(&[("te", "trailers"), ("accept", "*/*")]));
        let mut map = headers(&[("te", "gzip")]);
        strip_ending(&mut map);
        assert!(map.is_empty());
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let read = |value: &'static str| grpc_timeout(&headers(&[("grpc-timeout", value)]));
        assert_eq!(read("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "S", "1", "1x", "-1S", "123456789S", "1.5S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
