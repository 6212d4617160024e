//! The sample models, and what each answers.
//!
//! The rule of this module: an answer is right when it is what ONNX Runtime answered, which `expected.json` in
//! the models' folder has, floats up to what two engines differ in.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    cli::commands::tensors,
    rpc::proto::inference::{ModelInferRequest, ModelInferResponse},
};

/// How far a float may be off, for each 1 of it.
const TOLERANCE: f64 = 1e-5;

/// A folder with sample models.
#[derive(Debug)]
pub(super) struct Samples {
    folder: PathBuf,
    expected: BTreeMap<String, Value>,
}

impl Samples {
    /// # Errors
    /// When there are none, with the next step.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Self> {
        let step = "run it from Wharf's repository, or name the repository's tests/models with --models DIR";
        let folder =
            folder.canonicalize().map_err(|_| anyhow!("there are no sample models at {}; {step}", folder.display()))?;
        let path = folder.join("expected.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| anyhow!("there are no sample models at {}: {error}; {step}", path.display()))?;
        let expected = serde_json::from_str(&text).with_context(|| format!("{} can't be read", path.display()))?;
        Ok(Self { folder, expected })
    }

    /// Where they are.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a model is, and a request for it with its answer.
    ///
    /// # Errors
    /// When there is no such model.
    pub(super) fn get(&self, name: &str) -> anyhow::Result<(PathBuf, Arc<Case>)> {
        let folder = self.folder.join(name);
        let case = self.expected.get(name).and_then(|cases| cases.get(0));
        let Some(case) = case.filter(|_| folder.is_dir()) else {
            bail!(
                "the sample model {} is missing; `git checkout tests/models` brings Wharf's own back",
                folder.display()
            );
        };
        Ok((folder, Arc::new(Case::of(case).with_context(|| format!("the sample {name} can't be understood"))?)))
    }
}

/// One request, and the answer to it.
#[derive(Debug)]
pub(super) struct Case {
    body: String,
    wanted: BTreeMap<String, (String, Vec<Value>)>,
}

impl Case {
    fn of(case: &Value) -> anyhow::Result<Self> {
        let part = |name: &str| case.get(name).and_then(Value::as_object).ok_or_else(|| anyhow!("it has no {name}"));
        let mut inputs = Vec::new();
        for (name, tensor) in part("inputs")? {
            inputs.push(json!({
                "name": name, "datatype": tensor["datatype"], "shape": tensor["shape"], "data": tensor["data"],
            }));
        }
        let mut wanted = BTreeMap::new();
        for (name, tensor) in part("outputs")? {
            let datatype = tensor["datatype"].as_str().unwrap_or_default().to_owned();
            let data = tensor["data"].as_array().ok_or_else(|| anyhow!("output {name} has no data"))?;
            wanted.insert(name.clone(), (datatype, data.clone()));
        }
        Ok(Self { body: json!({ "inputs": inputs }).to_string(), wanted })
    }

    /// The request as REST has it.
    pub(super) fn rest(&self) -> Bytes {
        Bytes::from(self.body.clone())
    }

    /// The request as gRPC has it.
    ///
    /// # Errors
    /// When gRPC has no word for it.
    pub(super) fn grpc(&self, model: &str) -> anyhow::Result<ModelInferRequest> {
        tensors::request(model, &self.body).map_err(|problem| anyhow!(problem))
    }

    /// Whether this is the answer, and what is wrong with it if not.
    pub(super) fn judge_rest(&self, answer: &[u8]) -> Result<(), String> {
        let answer: Value = serde_json::from_slice(answer).map_err(|error| format!("not JSON: {error}"))?;
        let outputs = answer["outputs"].as_array().ok_or("no outputs")?;
        self.judge(outputs.len(), |name| {
            let output = outputs.iter().find(|output| output["name"] == *name)?;
            output["data"].as_array().cloned()
        })
    }

    /// As [`judge_rest`](Self::judge_rest).
    pub(super) fn judge_grpc(&self, answer: &ModelInferResponse) -> Result<(), String> {
        self.judge(answer.outputs.len(), |name| {
            let at = answer.outputs.iter().position(|output| output.name == *name)?;
            let output = &answer.outputs[at];
            if let Some(raw) = answer.raw_output_contents.get(at) {
                return numbers(&output.datatype, raw);
            }
            let contents = output.contents.as_ref()?;
            match output.datatype.as_str() {
                "FP32" => Some(contents.fp32_contents.iter().map(|value| json!(value)).collect()),
                "INT64" => Some(contents.int64_contents.iter().map(|value| json!(value)).collect()),
                _ => None,
            }
        })
    }

    fn judge(&self, outputs: usize, data: impl Fn(&String) -> Option<Vec<Value>>) -> Result<(), String> {
        if outputs != self.wanted.len() {
            return Err(format!("{outputs} outputs instead of {}", self.wanted.len()));
        }
        for (name, (datatype, wanted)) in &self.wanted {
            let came = data(name).ok_or_else(|| format!("no data of output {name}"))?;
            let same = came.len() == wanted.len()
                && came.iter().zip(wanted).all(|(came, wanted)| close(datatype, came, wanted));
            if !same {
                return Err(format!("{name} is {} instead of {}", json!(came), json!(wanted)));
            }
        }
        Ok(())
    }
}

fn close(datatype: &str, came: &Value, wanted: &Value) -> bool {
    match (datatype.starts_with("FP"), came.as_f64(), wanted.as_f64()) {
        (true, Some(came), Some(wanted)) => (came - wanted).abs() <= TOLERANCE * wanted.abs().max(1.0),
        _ => came == wanted,
    }
}

/// Raw bytes as numbers, for the datatypes that the demo asks for by gRPC.
fn numbers(datatype: &str, raw: &[u8]) -> Option<Vec<Value>> {
    match datatype {
        "FP32" => {
            let (values, []) = raw.as_chunks::<4>() else { return None };
            Some(values.iter().map(|value| json!(f32::from_le_bytes(*value))).collect())
        }
        "INT64" => {
            let (values, []) = raw.as_chunks::<8>() else { return None };
            Some(values.iter().map(|value| json!(i64::from_le_bytes(*value))).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Case {
        let wanted = json!({
            "inputs": {"x": {"datatype": "FP32", "shape": [1], "data": [1.0]}},
            "outputs": {
                "label": {"datatype": "INT64", "shape": [1], "data": [2]},
                "y": {"datatype": "FP32", "shape": [2], "data": [0.5, 100.0]},
            },
        });
        Case::of(&wanted).unwrap()
    }

    #[test]
    fn only_the_right_answer_is_right() {
        let rest = |label: i64, y: &[f64]| {
            let outputs = json!({"outputs": [{"name": "y", "data": y}, {"name": "label", "data": [label]}]});
            case().judge_rest(outputs.to_string().as_bytes())
        };
        assert_eq!(rest(2, &[0.500_001, 100.0001]), Ok(()));
        assert_eq!(rest(1, &[0.5, 100.0]), Err("label is [1] instead of [2]".to_owned()));
        assert_eq!(rest(2, &[0.5, 101.0]), Err("y is [0.5,101.0] instead of [0.5,100.0]".to_owned()));
        assert!(rest(2, &[0.5]).is_err());
        assert!(case().judge_rest(b"{}").is_err());
        assert!(case().judge_rest(b"nothing").is_err());
    }

    #[test]
    fn numbers_come_whole_or_not_at_all() {
        assert_eq!(numbers("FP32", &[0, 0, 128, 63]), Some(vec![json!(1.0)]));
        assert_eq!(numbers("FP32", &[0, 0, 128]), None);
        assert_eq!(numbers("INT64", &[1, 0, 0, 0, 0, 0, 0, 0]), Some(vec![json!(1)]));
    }

    #[test]
    fn a_folder_without_models_is_refused_with_the_next_step() {
        let refused = |folder: &Path| Samples::open(folder).unwrap_err().to_string();
        assert!(refused(Path::new("/nowhere/at/all")).contains("--models DIR"));
        assert!(refused(&std::env::temp_dir()).contains("expected.json"));
    }
}
