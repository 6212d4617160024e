//! What an ONNX file says besides its weights, read without a copy of these.

use std::{collections::BTreeSet, fs, path::Path};

use prost::Message as _;

/// `ModelProto`, as far as it is of interest here. Fields that are not named are passed over.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Model {
    #[prost(message, optional, tag = "7")]
    pub(super) graph: Option<Graph>,
}

/// `GraphProto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Graph {
    #[prost(message, repeated, tag = "1")]
    node: Vec<Node>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<Constant>,
    #[prost(message, repeated, tag = "11")]
    pub(super) input: Vec<Value>,
}

/// `NodeProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Node {
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<Attribute>,
}

/// `AttributeProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Attribute {
    #[prost(message, optional, tag = "5")]
    tensor: Option<Constant>,
    #[prost(message, optional, tag = "6")]
    graph: Option<Graph>,
    #[prost(message, repeated, tag = "10")]
    tensors: Vec<Constant>,
    #[prost(message, repeated, tag = "11")]
    graphs: Vec<Graph>,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Constant {
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<Entry>,
}

/// `StringStringEntryProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// `ValueInfoProto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Value {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(message, optional, tag = "2")]
    r#type: Option<Type>,
}

/// `TypeProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Type {
    #[prost(message, optional, tag = "1")]
    tensor: Option<TensorType>,
}

/// `TypeProto.Tensor`.
#[derive(Clone, PartialEq, prost::Message)]
struct TensorType {
    #[prost(message, optional, tag = "2")]
    shape: Option<Empty>,
}

/// A message whose presence is all that counts.
#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

impl Value {
    /// Whether it says how many axes it has.
    pub(super) fn has_shape(&self) -> bool {
        let tensor = self.r#type.as_ref().and_then(|of| of.tensor.as_ref());
        tensor.is_none_or(|tensor| tensor.shape.is_some())
    }
}

/// Reads the head of the artifact in `file`, and how many bytes it has together with the files that it keeps weights
/// in. Blocks.
///
/// # Errors
/// What is wrong, as the end of a sentence that begins with the artifact.
pub(super) fn read(file: &Path) -> Result<(Graph, u64), String> {
    let bytes = fs::read(file).map_err(|error| format!("can't be read: {error}"))?;
    let model = Model::decode(&*bytes).map_err(|error| format!("is not an ONNX model: {error}"))?;
    let graph = model.graph.ok_or("is not an ONNX model: it has no graph")?;
    let mut files = BTreeSet::new();
    let mut graphs = vec![&graph];
    while let Some(graph) = graphs.pop() {
        let attributes = || graph.node.iter().flat_map(|node| node.attribute.iter());
        graphs.extend(attributes().flat_map(|attribute| attribute.graph.iter().chain(&attribute.graphs)));
        let inner = attributes().flat_map(|attribute| attribute.tensor.iter().chain(&attribute.tensors));
        let entries = graph.initializer.iter().chain(inner).flat_map(|constant| &constant.external_data);
        files.extend(entries.filter(|entry| entry.key == "location").map(|entry| entry.value.as_str()));
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    // One that is not there is the engine's to tell.
    let sizes = files.into_iter().filter_map(|name| fs::metadata(folder.join(name)).ok());
    let bytes = sizes.map(|metadata| metadata.len()).sum::<u64>() + bytes.len() as u64;
    Ok((graph, bytes))
}
