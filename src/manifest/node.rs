//! A YAML document as a tree in which every key and value knows its line.
//!
//! The rule of this module: reading is bounded in size, depth and expansion before anything is believed, so
//! that no file can take more than a known amount of memory and time.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// The largest file, or standard input, that is read, in bytes.
pub(crate) const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// The most YAML nodes in one file: some 100,000 models.
const MAX_NODES: usize = 5_000_000;
/// The most documents in one file.
const MAX_DOCUMENTS: usize = 100_000;
/// The most nodes that aliases may stand for in one file.
const MAX_REPLAYED: usize = 100_000;
/// How deep mappings and lists may lie in each other.
const MAX_DEPTH: usize = 64;

/// A value and the line that it starts on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// From 1.
    pub(crate) line: u64,
    /// What it is.
    pub(crate) value: Value,
}

/// What YAML makes of a value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key and the line that it stands on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    pub(crate) line: u64,
    pub(crate) name: String,
}

/// A problem and the line that it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) line: Option<u64>,
    pub(crate) message: String,
}

impl Problem {
    pub(crate) fn at(line: u64, message: impl Into<String>) -> Self {
        Self { line: Some(line), message: message.into() }
    }
}

/// Every document in `text` that is not empty.
pub(crate) fn documents(text: &str) -> Result<Vec<Node>, Problem> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: MAX_NODES * 2,
            max_nodes: MAX_NODES,
            max_documents: MAX_DOCUMENTS,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_recorded_anchor_events: MAX_REPLAYED,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_REPLAYED,
        },
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
        let error = error.without_snippet();
        let line = error.location().map(|location| location.line()).filter(|line| *line > 0);
        let message = error.to_string();
        // The place is told beside the message, not in it.
        let bare = message.split(" at line ").next().unwrap_or_default().lines().next().unwrap_or_default();
        Problem { line, message: format!("not readable as YAML: {bare}") }
    })
}

impl Value {
    /// What it is, for an error message.
    pub(crate) const fn what(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Int(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

impl Value {
    /// The same as JSON, which has no lines and no numbers that are none.
    pub(crate) fn into_json(self) -> serde_json::Value {
        use serde_json::Value as Json;
        match self {
            Self::Null => Json::Null,
            Self::Bool(value) => value.into(),
            Self::Int(value) => match (i64::try_from(value), u64::try_from(value)) {
                (Ok(value), _) => value.into(),
                (Err(_), Ok(value)) => value.into(),
                // JSON's numbers are no better.
                (Err(_), Err(_)) => (value as f64).into(),
            },
            Self::Float(value) => value.into(),
            Self::Text(value) => value.into(),
            Self::List(items) => items.into_iter().map(|node| node.value.into_json()).collect(),
            Self::Map(entries) => entries.into_iter().map(|(key, node)| (key.name, node.value.into_json())).collect(),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let key = Key { line: key.referenced.line(), name: key.value };
            map.push((key, entries.next_value()?));
        }
        Ok(Value::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_and_value_knows_its_line() {
        let documents = documents("a: 1\nb:\n  - x\n  - {c: true}\n---\n\nd: ~\n").unwrap();
        assert_eq!(documents.len(), 2);
        let Value::Map(map) = &documents[0].value else { panic!("{documents:?}") };
        assert_eq!((map[0].0.line, &map[0].1.value), (1, &Value::Int(1)));
        assert_eq!(map[1].0.line, 2);
        let Value::List(list) = &map[1].1.value else { panic!("{map:?}") };
        assert_eq!((list[0].line, list[1].line), (3, 4));
        let Value::Map(second) = &documents[1].value else { panic!("{documents:?}") };
        assert_eq!((second[0].0.line, &second[0].1.value), (7, &Value::Null));
    }

    #[test]
    fn what_is_not_yaml_says_where() {
        for bad in ["a: [1, 2", "a: b: c", "a: 1\na: 2", "a: *nowhere", "a: 'open"] {
            let problem = documents(bad).unwrap_err();
            assert!(problem.line.is_some(), "{bad:?}: {problem:?}");
            assert!(!problem.message.contains("line "), "{problem:?}");
        }
    }

    #[test]
    fn bombs_go_out() {
        let laughs: String =
            (1..30).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 9].join(","))).collect();
        let bomb = format!("a0: &a0 [lol,lol,lol,lol]\n{laughs}");
        assert!(documents(&bomb).is_err());
        assert!(documents(&"[".repeat(100_000)).is_err());
        assert!(documents(&format!("{}x", "- ".repeat(10_000))).is_err());
        assert!(documents(&"--- 1\n".repeat(MAX_DOCUMENTS + 1)).is_err());
    }
}
