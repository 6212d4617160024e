//! The promise: nobody has to know what a model takes. It is measured, remembered, and counted from then on.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]

mod process;

use std::{fs, path::Path};

use process::{Home, Spec, onnx};
use prost::Message as _;
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    tensor_proto::DataType, tensor_shape_proto, type_proto,
};

fn port(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = |size: &i64| tensor_shape_proto::Dimension {
        value: Some(tensor_shape_proto::dimension::Value::DimValue(*size)),
        ..Default::default()
    };
    let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: DataType::Float as i32, shape };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}

/// Writes a model of `layers` matrices, each `width` wide, into `folder`.
fn write_model(folder: &Path, layers: usize, width: usize) {
    let matrix = |layer: usize| TensorProto {
        dims: vec![width as i64; 2],
        data_type: DataType::Float as i32,
        name: format!("w{layer}"),
        // Not all alike, so that nothing can fold them.
        raw_data: (0..width * width).flat_map(|at| (((at * 31 + layer) % 997) as f32 / 997.0).to_le_bytes()).collect(),
        ..Default::default()
    };
    let value = |layer: usize| if layer == layers { "y".to_owned() } else { format!("x{layer}") };
    let node = |layer: usize| NodeProto {
        op_type: "MatMul".to_owned(),
        name: format!("n{layer}"),
        input: vec![value(layer), format!("w{layer}")],
        output: vec![value(layer + 1)],
        ..Default::default()
    };
    let graph = GraphProto {
        name: "g".to_owned(),
        node: (0..layers).map(node).collect(),
        initializer: (0..layers).map(matrix).collect(),
        input: vec![port("x0", &[1, width as i64])],
        output: vec![port("y", &[1, width as i64])],
        ..Default::default()
    };
    let model = ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto { version: 13, ..Default::default() }],
        graph: Some(graph),
        ..Default::default()
    };
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("model.onnx"), model.encode_to_vec()).unwrap();
}

/// Private and shared anonymous memory of a process, in bytes.
fn anonymous(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap()
    };
    (kib("RssAnon:") + kib("RssShmem:")) * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_models_without_a_declared_size_are_learned_within_a_quarter() {
    // What a model left free in the allocator is no part of what the next one takes.
    let home = Home::new(&onnx(1, "2Gi", 0))
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .env("MALLOC_TRIM_THRESHOLD_", "65536")
        .env("MALLOC_ARENA_MAX", "1");
    let models = home.path().join("models");
    let wharf = home.up().await;
    // One that makes the engine do once what it does once.
    write_model(&models.join("first"), 2, 512);
    let load = async |name: &str| {
        let uri = models.join(name).display().to_string();
        wharf.submit(&Spec { uri, ..Spec::new(name, "", 0) }).await.unwrap();
        wharf
            .until(name, "measured", |view| {
                let mut copies = view.versions.iter().flat_map(|version| &version.copies);
                view.state == "Available" && copies.any(|copy| copy.measured.is_some())
            })
            .await
    };
    load("first").await;
    for at in 0..10 {
        let name = format!("m{at}");
        write_model(&models.join(&name), 2 + at, 1024);
        let before = anonymous(wharf.id());
        let view = load(&name).await;
        let gained = anonymous(wharf.id()).saturating_sub(before);
        let copy = &view.versions[0].copies[0];
        let measured = copy.measured.unwrap();
        let file = fs::metadata(models.join(&name).join("model.onnx")).unwrap().len();
        println!("{name}: file {file}, measured {measured}, gained {gained}, need {}", copy.need);
        assert_eq!(copy.need, measured, "what was measured counts");
        assert!(measured.abs_diff(gained) * 4 <= gained, "{name}: {measured} is not within a quarter of {gained}");
    }
}
