//! Protobuf's JSON, both ways, driven by the descriptors: camelCase names, defaults left out, 64-bit numbers
//! as text. It is what Seldon's CLI prints.

use std::{io, sync::OnceLock};

use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};

use crate::rpc::proto::DESCRIPTORS;

fn descriptor(name: &str) -> Result<MessageDescriptor, String> {
    static POOL: OnceLock<Option<DescriptorPool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| DescriptorPool::decode(DESCRIPTORS).ok());
    let found = pool.as_ref().and_then(|pool| pool.get_message_by_name(name));
    found.ok_or_else(|| format!("no description of {name} was built in"))
}

/// Compact JSON in which a whole number has no `.0`, as other writers of protobuf's JSON have it.
struct Compact;

impl serde_json::ser::Formatter for Compact {
    fn write_f32<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        write!(writer, "{value}")
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        write!(writer, "{value}")
    }
}

/// `message`, of the full name `name`, on one line.
///
/// # Errors
/// When the message is none of `name`.
pub(crate) fn line<M: Message>(name: &str, message: &M) -> Result<String, String> {
    let mut dynamic = DynamicMessage::new(descriptor(name)?);
    dynamic.transcode_from(message).map_err(|error| error.to_string())?;
    let mut json = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, Compact);
    dynamic.serialize_with_options(&mut serializer, &SerializeOptions::new()).map_err(|error| error.to_string())?;
    String::from_utf8(json).map_err(|error| error.to_string())
}

/// `message`, of the full name `name`, for a person.
///
/// # Errors
/// As [`line`].
pub(crate) fn pretty<M: Message>(name: &str, message: &M) -> Result<String, String> {
    line(name, message).map(|json| indent(&json).unwrap_or(json))
}

/// The message of the full name `name` that `json` says. Unknown fields are errors.
///
/// # Errors
/// One clause that says what does not fit.
pub(crate) fn read<M: Message + Default>(name: &str, json: serde_json::Value) -> Result<M, String> {
    let dynamic = DynamicMessage::deserialize_with_options(descriptor(name)?, json, &DeserializeOptions::new())
        .map_err(|error| error.to_string())?;
    dynamic.transcode_to().map_err(|error| error.to_string())
}

/// `json` over several lines, its names in their order and its numbers digit by digit as they came; absent
/// when it is not JSON.
pub(crate) fn indent(json: &str) -> Option<String> {
    serde_json::from_str::<serde::de::IgnoredAny>(json).ok()?;
    let mut text = String::with_capacity(json.len() * 2);
    let mut depth = 0_usize;
    let (mut in_string, mut escaped, mut opened) = (false, false, false);
    let newline = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("  ", depth));
    };
    for c in json.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
            text.push(c);
            continue;
        }
        if c.is_ascii_whitespace() {
            continue;
        }
        if matches!(c, ']' | '}') {
            depth = depth.saturating_sub(1);
            if !opened {
                newline(&mut text, depth);
            }
            opened = false;
            text.push(c);
            continue;
        }
        if opened {
            newline(&mut text, depth);
            opened = false;
        }
        text.push(c);
        match c {
            '"' => in_string = true,
            '[' | '{' => {
                depth += 1;
                opened = true;
            }
            ',' => newline(&mut text, depth),
            ':' => text.push(' '),
            _ => {}
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rpc::proto::scheduler;

    #[test]
    fn it_is_protobufs_own_json() {
        let status = scheduler::ModelStatusResponse {
            model_name: "iris".into(),
            timestamp: 12,
            versions: vec![scheduler::ModelVersionStatus {
                version: 1,
                server_name: "mlserver".into(),
                kubernetes_meta: Some(scheduler::KubernetesMeta { namespace: String::new(), generation: 3 }),
                model_replica_state: [(0, scheduler::ModelReplicaStatus { state: 9, ..Default::default() })].into(),
                state: Some(scheduler::ModelStatus {
                    state: 2,
                    last_change_timestamp: Some(prost_types::Timestamp { seconds: 1, nanos: 500_000_000 }),
                    ..Default::default()
                }),
                model_defn: None,
            }],
            ..Default::default()
        };
        let json = line("seldon.mlops.scheduler.ModelStatusResponse", &status).unwrap();
        assert_eq!(
            json,
            r#"{"modelName":"iris","versions":[{"version":1,"serverName":"mlserver","kubernetesMeta":{"generation":"3"},"modelReplicaState":{"0":{"state":"Available"}},"state":{"state":"ModelAvailable","lastChangeTimestamp":"1970-01-01T00:00:01.500Z"}}],"timestamp":"12"}"#
        );
        let back: scheduler::ModelStatusResponse =
            read("seldon.mlops.scheduler.ModelStatusResponse", serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(back, status);
    }

    #[test]
    fn a_field_that_is_not_there_is_named() {
        let bad = serde_json::json!({"modelNam": "iris"});
        let error = read::<scheduler::ModelStatusResponse>("seldon.mlops.scheduler.ModelStatusResponse", bad);
        assert!(error.unwrap_err().contains("modelNam"));
    }

    #[test]
    fn indenting_keeps_order_and_digits() {
        let json = r#"{"b":[1,2.50,{}],"a":"x,{}[]:\"\\","c":[],"d":18446744073709551616}"#;
        let wanted = "{\n  \"b\": [\n    1,\n    2.50,\n    {}\n  ],\n  \"a\": \"x,{}[]:\\\"\\\\\",\n  \"c\": [],\n  \"d\": 18446744073709551616\n}";
        assert_eq!(indent(json).unwrap(), wanted);
        assert_eq!(indent("not json"), None);
    }

    proptest! {
        #[test]
        fn indenting_changes_nothing_but_space(text in ".{0,20}", numbers in proptest::collection::vec(any::<i64>(), 0..5)) {
            let value = serde_json::json!({"k": [text, numbers, {"n": null}, {}]});
            let indented = indent(&value.to_string()).unwrap();
            prop_assert_eq!(&indented, &serde_json::to_string_pretty(&value).unwrap());
        }
    }
}
