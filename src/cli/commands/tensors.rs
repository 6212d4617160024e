//! Inference requests and answers as JSON, for the gRPC protocol.
//!
//! Requests are read in protobuf's JSON (`contents` with `fp32_contents`) and also in the REST protocol's
//! (`data`, bare parameters), so that one file serves both. Raw answers are shown as numbers.

use prost::Message as _;
use serde_json::{Map, Value, json};

use crate::{
    cli::json as protojson,
    rpc::proto::inference::{InferTensorContents, ModelInferRequest, ModelInferResponse},
};

/// The request that `text` says, for `model`.
///
/// # Errors
/// One clause that says what does not fit.
pub(in crate::cli) fn request(model: &str, text: &str) -> Result<ModelInferRequest, String> {
    let mut json: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let body = json.as_object_mut().ok_or("it is not a JSON object")?;
    parameters(body);
    for key in ["inputs", "outputs"] {
        for tensor in body.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(tensor) = tensor.as_object_mut() else { continue };
            parameters(tensor);
            if let Some(data) = tensor.remove("data") {
                let datatype = tensor.get("datatype").and_then(Value::as_str).unwrap_or_default();
                let contents = contents(datatype, &data)?;
                tensor.insert("contents".to_owned(), contents);
            }
        }
    }
    let mut request: ModelInferRequest = protojson::read("inference.ModelInferRequest", json)?;
    model.clone_into(&mut request.model_name);
    Ok(request)
}

/// Writes bare parameter values as protobuf's JSON wants them.
fn parameters(of: &mut Map<String, Value>) {
    let Some(parameters) = of.get_mut("parameters").and_then(Value::as_object_mut) else { return };
    for value in parameters.values_mut() {
        let kind = match value {
            Value::Bool(_) => "boolParam",
            Value::String(_) => "stringParam",
            Value::Number(number) if number.is_i64() => "int64Param",
            Value::Number(number) if number.is_u64() => "uint64Param",
            Value::Number(_) => "doubleParam",
            Value::Null | Value::Array(_) | Value::Object(_) => continue,
        };
        *value = json!({ kind: value.take() });
    }
}

/// The REST protocol's `data`, however nested, as protobuf's `contents`.
fn contents(datatype: &str, data: &Value) -> Result<Value, String> {
    let field = match datatype {
        "BOOL" => "boolContents",
        "INT8" | "INT16" | "INT32" => "intContents",
        "INT64" => "int64Contents",
        "UINT8" | "UINT16" | "UINT32" => "uintContents",
        "UINT64" => "uint64Contents",
        "FP32" => "fp32Contents",
        "FP64" => "fp64Contents",
        "BYTES" => "bytesContents",
        other => return Err(format!("data of datatype {other:?} has no form in gRPC's JSON; use raw_input_contents")),
    };
    let mut flat = Vec::new();
    flatten(data, datatype == "BYTES", &mut flat);
    Ok(json!({ field: flat }))
}

fn flatten(data: &Value, bytes: bool, flat: &mut Vec<Value>) {
    match data {
        Value::Array(items) => items.iter().for_each(|item| flatten(item, bytes, flat)),
        Value::String(text) if bytes => flat.push(Value::String(base64(text.as_bytes()))),
        other => flat.push(other.clone()),
    }
}

/// Standard base64, padded.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |n: usize| u32::from(chunk.get(n).copied().unwrap_or(0));
        let group = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4_usize {
            let index = usize::try_from(group >> (18 - 6 * digit) & 63).unwrap_or(0);
            text.push(if digit <= chunk.len() { char::from(DIGITS[index]) } else { '=' });
        }
    }
    text
}

/// The answer as protobuf's JSON, for a person. Raw contents become numbers where their type has a form.
///
/// # Errors
/// When the message can't be written.
pub(super) fn response(mut answer: ModelInferResponse) -> Result<String, String> {
    if answer.raw_output_contents.len() == answer.outputs.len() {
        let typed: Option<Vec<InferTensorContents>> = answer
            .outputs
            .iter()
            .zip(&answer.raw_output_contents)
            .map(|(output, raw)| typed(&output.datatype, raw))
            .collect();
        if let Some(typed) = typed {
            answer.raw_output_contents.clear();
            for (output, contents) in answer.outputs.iter_mut().zip(typed) {
                // Some servers send both; what is there already stands.
                if output.contents.as_ref().is_none_or(|there| there.encoded_len() == 0) {
                    output.contents = Some(contents);
                }
            }
        }
    }
    protojson::pretty("inference.ModelInferResponse", &answer)
}

/// Raw little-endian values as typed ones; absent when their type has no form, or their length is off.
fn typed(datatype: &str, raw: &[u8]) -> Option<InferTensorContents> {
    fn values<const N: usize, T>(raw: &[u8], of: fn([u8; N]) -> T) -> Option<Vec<T>> {
        let (values, []) = raw.as_chunks::<N>() else { return None };
        Some(values.iter().map(|value| of(*value)).collect())
    }
    let empty = InferTensorContents::default();
    Some(match datatype {
        "BOOL" => InferTensorContents { bool_contents: raw.iter().map(|byte| *byte != 0).collect(), ..empty },
        "INT8" => InferTensorContents { int_contents: values(raw, |v| i8::from_le_bytes(v).into())?, ..empty },
        "INT16" => InferTensorContents { int_contents: values(raw, |v| i16::from_le_bytes(v).into())?, ..empty },
        "INT32" => InferTensorContents { int_contents: values(raw, i32::from_le_bytes)?, ..empty },
        "INT64" => InferTensorContents { int64_contents: values(raw, i64::from_le_bytes)?, ..empty },
        "UINT8" => InferTensorContents { uint_contents: values(raw, |v| u8::from_le_bytes(v).into())?, ..empty },
        "UINT16" => InferTensorContents { uint_contents: values(raw, |v| u16::from_le_bytes(v).into())?, ..empty },
        "UINT32" => InferTensorContents { uint_contents: values(raw, u32::from_le_bytes)?, ..empty },
        "UINT64" => InferTensorContents { uint64_contents: values(raw, u64::from_le_bytes)?, ..empty },
        "FP32" => InferTensorContents { fp32_contents: values(raw, f32::from_le_bytes)?, ..empty },
        "FP64" => InferTensorContents { fp64_contents: values(raw, f64::from_le_bytes)?, ..empty },
        "BYTES" => InferTensorContents { bytes_contents: strings(raw)?, ..empty },
        _ => return None,
    })
}

/// Byte strings, each after its length in four bytes.
fn strings(mut raw: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut strings = Vec::new();
    while let Some((length, rest)) = raw.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (string, rest) = rest.split_at_checked(length)?;
        strings.push(string.to_vec());
        raw = rest;
    }
    raw.is_empty().then_some(strings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::proto::inference::model_infer_response::InferOutputTensor;

    #[test]
    fn seldons_grpc_form_is_read() {
        let text = r#"{"model_name":"other","inputs":[{"name":"predict","contents":{"fp32_contents":[1,2,3,4]},
            "datatype":"FP32","shape":[1,4]}]}"#;
        let request = request("iris", text).unwrap();
        assert_eq!(request.model_name, "iris");
        assert_eq!(request.inputs[0].contents.as_ref().unwrap().fp32_contents, [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(request.inputs[0].shape, [1, 4]);
    }

    #[test]
    fn the_rest_form_is_read_too() {
        let text = r#"{"id":"7","parameters":{"content_type":"np","n":3,"deep":true},"inputs":[
            {"name":"a","datatype":"INT64","shape":[2,2],"data":[[1,2],[3,4]]},
            {"name":"b","datatype":"BYTES","shape":[3],"data":["a","bc","def"]}]}"#;
        let request = request("m", text).unwrap();
        assert_eq!(request.inputs[0].contents.as_ref().unwrap().int64_contents, [1, 2, 3, 4]);
        let strings = &request.inputs[1].contents.as_ref().unwrap().bytes_contents;
        assert_eq!(strings.iter().map(|s| String::from_utf8_lossy(s)).collect::<Vec<_>>(), ["a", "bc", "def"]);
        assert_eq!(request.parameters.len(), 3);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        for (text, said) in [
            ("[", "not JSON"),
            ("[]", "not a JSON object"),
            (r#"{"inptus":[]}"#, "inptus"),
            (r#"{"inputs":[{"datatype":"FP16","data":[1]}]}"#, "FP16"),
            (r#"{"inputs":[{"datatype":"INT32","data":["x"]}]}"#, ""),
        ] {
            let error = request("m", text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn raw_answers_become_numbers() {
        let output = |name: &str, datatype: &str| InferOutputTensor {
            name: name.into(),
            datatype: datatype.into(),
            shape: vec![2],
            ..Default::default()
        };
        let raw = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut answer = ModelInferResponse {
            model_name: "m_1".into(),
            outputs: vec![output("a", "FP32"), output("b", "BYTES")],
            raw_output_contents: vec![raw(&[1.5, 2.0]).into(), b"\x01\0\0\0x\x02\0\0\0yz".to_vec().into()],
            ..Default::default()
        };
        let text = response(answer.clone()).unwrap();
        assert!(text.contains("fp32Contents") && !text.contains("rawOutputContents"), "{text}");
        answer.outputs[0].datatype = "FP16".into();
        assert!(response(answer.clone()).unwrap().contains("rawOutputContents"));
        answer.outputs[0].datatype = "FP32".into();
        answer.raw_output_contents[0] = vec![0_u8; 5].into();
        assert!(response(answer).unwrap().contains("rawOutputContents"));
    }

    #[test]
    fn base64_is_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }
}
