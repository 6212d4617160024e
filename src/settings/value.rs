//! What a setting's value can be, and how it is read.

use std::{fmt, path::PathBuf, time::Duration};

use toml::de::DeValue;

use super::registry::{Lifetime, Runtime};
use crate::domain::{
    memory::Bytes,
    residency::Eviction,
    size::{Guesses, Trust},
};

/// A value as it came.
#[derive(Debug)]
pub(super) enum Raw<'a> {
    /// From a file, which knows types.
    Toml(&'a DeValue<'a>),
    /// From the environment or the command line, which don't.
    Text(&'a str),
}

impl fmt::Display for Raw<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Toml(DeValue::String(text)) => write!(f, "{text:?}"),
            Self::Toml(DeValue::Integer(number)) => f.write_str(number.as_str()),
            Self::Toml(DeValue::Float(number)) => f.write_str(number.as_str()),
            Self::Toml(DeValue::Boolean(truth)) => truth.fmt(f),
            Self::Toml(DeValue::Datetime(time)) => time.fmt(f),
            Self::Toml(DeValue::Array(_)) => f.write_str("a list"),
            Self::Toml(DeValue::Table(_)) => f.write_str("a table"),
        }
    }
}

/// How a value is written in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Text,
    Number,
    Truth,
    TextOrNumber,
}

/// A type that a setting can have.
pub(super) trait Value: Sized + PartialOrd {
    /// How a file writes it.
    const FORM: Form;
    /// What is allowed, as in "wanted ...".
    const WANTED: &'static str;

    /// Reads it.
    fn parse(text: &str) -> Option<Self>;
}

/// Reads a value and holds it against its bounds.
pub(super) fn read<T: Value>(raw: &Raw<'_>, bounds: Option<(&str, &str)>) -> Result<T, String> {
    let number;
    let text = match (raw, T::FORM) {
        (Raw::Text(text), _) => Some(*text),
        (Raw::Toml(DeValue::String(text)), Form::Text | Form::TextOrNumber) => Some(text.as_ref()),
        (Raw::Toml(DeValue::Integer(value)), Form::Number | Form::TextOrNumber) => {
            number = i128::from_str_radix(value.as_str(), value.radix()).map(|number| number.to_string());
            number.as_deref().ok()
        }
        (Raw::Toml(DeValue::Boolean(truth)), Form::Truth) => Some(if *truth { "true" } else { "false" }),
        (Raw::Toml(_), _) => None,
    };
    let range = bounds.map_or_else(String::new, |(low, high)| format!(" from {low} to {high}"));
    let within = |value: &T| {
        bounds.is_none_or(|(low, high)| {
            T::parse(low).is_none_or(|low| low <= *value) && T::parse(high).is_none_or(|high| *value <= high)
        })
    };
    text.and_then(T::parse).filter(within).ok_or_else(|| format!("{raw} came, wanted {}{range}", T::WANTED))
}

impl Value for Duration {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "a duration such as \"5s\" or \"250ms\"";

    fn parse(text: &str) -> Option<Self> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let number = text[..digits].parse::<u64>().ok()?;
        let micros = match &text[digits..] {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            _ => return None,
        };
        number.checked_mul(micros).map(Self::from_micros)
    }
}

impl Value for Bytes {
    const FORM: Form = Form::TextOrNumber;
    const WANTED: &'static str = "a size such as \"512Mi\" or \"10Gi\"";

    fn parse(text: &str) -> Option<Self> {
        Self::from_quantity(text).ok()
    }
}

impl Value for u32 {
    const FORM: Form = Form::Number;
    const WANTED: &'static str = "a whole number";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Value for bool {
    const FORM: Form = Form::Truth;
    const WANTED: &'static str = "true or false";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Value for PathBuf {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "a path";

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty() && !text.contains('\0')).then(|| Self::from(text))
    }
}

/// Where to listen or connect: `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(String);

impl Address {
    /// The address as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The port; 0 takes a free one.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Value for Address {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "an address such as \"127.0.0.1:9000\", \"scheduler:9005\" or \"[::1]:9000\"";

    fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        if !port.bytes().all(|byte| byte.is_ascii_digit()) || port.parse::<u16>().is_err() {
            return None;
        }
        let sound = match host.strip_prefix('[').map(|host| host.strip_suffix(']')) {
            Some(v6) => v6.is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
            None => {
                !host.is_empty()
                    && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
            }
        };
        sound.then(|| Self(text.to_owned()))
    }
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogFormat {
    /// A line of text, for people.
    Text,
    /// A JSON object on a line, for machines.
    Json,
}

impl Value for LogFormat {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "\"text\" or \"json\"";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

impl Value for Trust {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "\"larger\", \"measured\" or \"declared\"";

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|trust| trust.name() == text)
    }
}

impl Value for Eviction {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "\"lru\" or \"cost\"";

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|eviction| eviction.name() == text)
    }
}

impl Value for Guesses {
    const FORM: Form = Form::Text;
    const WANTED: &'static str =
        "names with a factor and a constant, one of them for all others: \"builtin=3+16Mi, *=3+64Mi\"";

    fn parse(text: &str) -> Option<Self> {
        Self::parse(text)
    }
}

/// What kind of inference server is at an address; empty when it is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuntimeKind(pub Option<Runtime>);

impl Value for RuntimeKind {
    const FORM: Form = Form::Text;
    const WANTED: &'static str =
        "\"mlserver\", \"triton\", \"oip\", \"process\", or \"\" for what the server says of itself";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "" => Some(Self(None)),
            name => Runtime::named(name).filter(|kind| *kind != Runtime::Builtin).map(|kind| Self(Some(kind))),
        }
    }
}

/// What is fetched through rclone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RcloneUse {
    /// Whatever it reads.
    Always,
    /// What the agent itself does not read.
    Fallback,
    /// Nothing.
    Never,
}

impl Value for RcloneUse {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "\"always\", \"fallback\" or \"never\"";

    fn parse(text: &str) -> Option<Self> {
        match text {
            "always" => Some(Self::Always),
            "fallback" => Some(Self::Fallback),
            "never" => Some(Self::Never),
            _ => None,
        }
    }
}

impl Value for Lifetime {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "\"agent\" or \"independent\"";

    fn parse(text: &str) -> Option<Self> {
        Self::named(text)
    }
}

/// What is logged: a level, or several by module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogFilter(pub String);

impl Value for LogFilter {
    const FORM: Form = Form::Text;
    const WANTED: &'static str =
        "a level (error, warn, info, debug, trace), or several by module: \"info,wharf::agent=debug\"";

    fn parse(text: &str) -> Option<Self> {
        let level = |level: &str| matches!(level, "off" | "error" | "warn" | "info" | "debug" | "trace");
        let directive = |directive: &str| match directive.split_once('=') {
            Some((target, of)) => {
                !target.is_empty()
                    && target.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b))
                    && level(of)
            }
            None => level(directive),
        };
        text.split(',').all(directive).then(|| Self(text.to_owned()))
    }
}

impl Value for String {
    const FORM: Form = Form::Text;
    const WANTED: &'static str = "text";

    fn parse(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_whole_or_not_at_all() {
        assert_eq!(Duration::parse("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(Duration::parse("0s"), Some(Duration::ZERO));
        assert_eq!(Duration::parse("2d"), Some(Duration::from_secs(172_800)));
        for bad in
            ["", "5", "s", "-5s", "5 s", "1.5s", "5S", "5sec", "99999999999999999999s", "9999999999999999d", "٥s"]
        {
            assert_eq!(Duration::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["127.0.0.1:0", "[::1]:9000", "a-b.c_d:65535", "scheduler:9005"] {
            assert_eq!(Address::parse(good).map(|address| address.to_string()), Some(good.to_owned()));
        }
        for bad in ["", ":1", "a", "a:", "a:65536", "a:+1", "a b:1", "::1:9000", "[::1:9000", "[a]:1", "http://a:1"] {
            assert_eq!(Address::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn log_filters_are_levels_by_module() {
        for good in ["info", "off", "info,wharf::agent=debug"] {
            assert!(LogFilter::parse(good).is_some(), "{good}");
        }
        for bad in ["", "loud", "info,", "=info", "a b=info", "wharf=loud", "INFO "] {
            assert!(LogFilter::parse(bad).is_none(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_reading_panic(text in any::<String>()) {
            let raw = Raw::Text(&text);
            drop((read::<Duration>(&raw, None), read::<Bytes>(&raw, None), read::<bool>(&raw, None)));
            drop(read::<Address>(&raw, Some(("a:1", "b:1"))));
        }

        #[test]
        fn bounds_hold(number: u32, low: u32, high: u32) {
            let (low_text, high_text) = (low.to_string(), high.to_string());
            let read = read::<u32>(&Raw::Text(&number.to_string()), Some((&low_text, &high_text)));
            prop_assert_eq!(read.is_ok(), low <= number && number <= high);
        }
    }
}
