//! The request that a copy must answer before it counts as Available.
//!
//! The rules of this module: a warm-up is told in words and numbers, and nothing that a model says of itself makes it
//! larger than a known size.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Bytes of the inputs that a manifest gives.
pub const LONGEST: usize = 64 * 1024;
/// Elements of all inputs that are made from a model's metadata.
const ELEMENTS: u64 = 16 << 20;

/// Which request that is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Warmup {
    /// None: a copy that is loaded and says that it is ready is Available.
    #[default]
    None,
    /// One that is made from what the model says that it takes.
    Auto,
    /// One with these inputs, a list as an inference request has it, in JSON.
    Inputs(String),
}

impl Warmup {
    /// What `text` asks for: `none`, `auto`, or inputs in JSON.
    ///
    /// # Errors
    /// What is wrong with it and what is wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" | "none" => return Ok(Self::None),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        if text.len() > LONGEST {
            return Err(format!("it has {} bytes, {LONGEST} are allowed", text.len()));
        }
        let value: Value = serde_json::from_str(text)
            .map_err(|_| "it is none of none, auto and a list of inputs as an inference request has it".to_owned())?;
        let inputs = value.as_array().filter(|inputs| !inputs.is_empty()).ok_or("it is not a list of inputs")?;
        for (place, input) in inputs.iter().enumerate() {
            let whole = |length: &Value| length.as_u64().is_some();
            let complete = input["name"].is_string()
                && input["datatype"].is_string()
                && input["shape"].as_array().is_some_and(|shape| shape.iter().all(whole))
                && input["data"].is_array();
            if !complete {
                return Err(format!("input {place} is not complete; it needs name, datatype, shape and data"));
            }
        }
        Ok(Self::Inputs(value.to_string()))
    }

    /// The text that [`parse`](Self::parse) reads; nothing where there is no warm-up.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::Auto => Some("auto"),
            Self::Inputs(inputs) => Some(inputs),
        }
    }
}

/// Inputs for a model with this metadata: zeros, false and empty texts, 1 along each axis of any length.
///
/// # Errors
/// What the metadata lacks, or that it asks for too much.
pub fn inputs_for(metadata: &Value) -> Result<String, String> {
    let inputs = metadata["inputs"].as_array().ok_or("its metadata names no inputs; give them in the manifest")?;
    let mut left = ELEMENTS;
    let made = inputs.iter().map(|input| {
        let name = input["name"].as_str().ok_or("its metadata has an input without a name")?;
        let datatype = input["datatype"].as_str().unwrap_or_default();
        let shape = input["shape"].as_array().map(Vec::as_slice).unwrap_or_default();
        let shape: Vec<u64> = shape.iter().map(|length| length.as_u64().unwrap_or(1)).collect();
        let count = shape.iter().try_fold(1_u64, |count, length| count.checked_mul(*length));
        let count = count.filter(|count| *count <= left).ok_or_else(|| {
            format!("input {name:?} of shape {shape:?} is too large to be made up; give inputs in the manifest")
        })?;
        left -= count;
        let element = match datatype {
            "BYTES" => json!(""),
            "BOOL" => json!(false),
            _ => json!(0),
        };
        let data = vec![element; usize::try_from(count).unwrap_or_default()];
        Ok(json!({ "name": name, "datatype": datatype, "shape": shape, "data": data }))
    });
    made.collect::<Result<Vec<_>, String>>().map(|inputs| Value::Array(inputs).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_the_rest_is_refused() {
        let inputs = r#"[{"name":"x","datatype":"FP32","shape":[1,2],"data":[0,1]}]"#;
        for text in ["none", "auto", inputs] {
            let warmup = Warmup::parse(text).unwrap();
            assert_eq!(Warmup::parse(warmup.text().unwrap_or_default()), Ok(warmup));
        }
        assert_eq!(Warmup::parse(""), Ok(Warmup::None));
        for (bad, words) in [
            ("maybe", "none, auto"),
            ("[]", "not a list"),
            ("{}", "not a list"),
            (r#"[{"name":"x"}]"#, "input 0"),
            (r#"[{"name":"x","datatype":"FP32","shape":[-1],"data":[]}]"#, "input 0"),
        ] {
            let problem = Warmup::parse(bad).unwrap_err();
            assert!(problem.contains(words), "{bad}: {problem}");
        }
        assert!(Warmup::parse(&" ".repeat(LONGEST + 1).replacen(' ', "[", 1)).unwrap_err().contains("65536"));
    }

    #[test]
    fn inputs_are_made_of_what_a_model_says_that_it_takes() {
        let metadata = json!({ "inputs": [
            { "name": "a", "datatype": "FP32", "shape": [-1, 2] },
            { "name": "b", "datatype": "BYTES", "shape": [-1] },
            { "name": "c", "datatype": "BOOL", "shape": [] },
        ] });
        let made: Value = serde_json::from_str(&inputs_for(&metadata).unwrap()).unwrap();
        assert_eq!(
            made,
            json!([
                { "name": "a", "datatype": "FP32", "shape": [1, 2], "data": [0, 0] },
                { "name": "b", "datatype": "BYTES", "shape": [1], "data": [""] },
                { "name": "c", "datatype": "BOOL", "shape": [], "data": [false] },
            ])
        );
        assert!(inputs_for(&json!({})).is_err());
        for shape in [json!([1_u64 << 40]), json!([u64::MAX, u64::MAX])] {
            let metadata = json!({ "inputs": [{ "name": "a", "datatype": "FP32", "shape": shape }] });
            assert!(inputs_for(&metadata).unwrap_err().contains("too large"));
        }
    }
}
