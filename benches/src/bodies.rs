//! What is asked: tensors of any size, by REST and by gRPC.

use bytes::Bytes;
use prost::Message as _;
use wharf::rpc::proto::inference::{ModelInferRequest, model_infer_request::InferInputTensor};

/// What tensors are made of.
static ZEROS: Bytes = Bytes::from_static(&[0; 4 << 20]);

/// A tensor of about `bytes` bytes as JSON.
#[must_use]
pub fn json(bytes: usize) -> Bytes {
    let (before, after) = (r#"{"inputs":[{"name":"x","datatype":"UINT8","shape":[1,N],"data":["#, "1]}]}");
    let numbers = "7,".repeat(bytes.saturating_sub(before.len() + after.len()) / 2);
    [before, &numbers, after].concat().into()
}

/// A message for `model` with a tensor of `bytes` bytes, at most 4 MiB, as gRPC frames it.
///
/// # Errors
/// When it is too long for a frame.
pub fn message(model: &str, bytes: usize) -> anyhow::Result<Bytes> {
    let message = ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "UINT8".to_owned(),
            shape: vec![1, bytes as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![ZEROS.slice(..bytes)],
        ..Default::default()
    };
    let length = message.encoded_len();
    let mut framed = Vec::with_capacity(length + 5);
    framed.push(0);
    framed.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
    message.encode(&mut framed)?;
    Ok(framed.into())
}
