//! The promise: nobody has to know what a model takes. It is measured, remembered, and counted from then on.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test that can't go on says so"
)]

mod process;
mod servers;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use process::{Home, Spec, Wharf, onnx};
use prost::Message as _;
use tokio::time::sleep;
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

/// How long a heavy server may take on a machine that is busy.
const LONG: Duration = Duration::from_secs(180);
/// The allocator gives memory back within ten seconds.
const BACK: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn ten_models_without_a_declared_size_are_learned_within_a_quarter() {
    // What a model left free in the allocator is no part of what the next one takes.
    let home = Home::new(&onnx(1, "2Gi", 0)).env("_RJEM_MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0");
    let models = home.path().join("models");
    let wharf = home.up().await;
    // One that makes the engine do once what it does once.
    write_model(&models.join("first"), 2, 512);
    learned(&wharf, &Spec::at("first", &models.join("first"), "onnx", 0)).await;
    for at in 0..10 {
        let name = format!("m{at}");
        write_model(&models.join(&name), 2 + at, 1024);
        let spec = Spec::at(&name, &models.join(&name), "onnx", 0);
        is_learned_within_a_quarter(&wharf, &spec, || anonymous(wharf.id())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_models_took_goes_back_to_the_system() {
    const MODELS: usize = 4;
    let home = Home::new(&onnx(1, "2Gi", 0));
    let models = home.path().join("models");
    let wharf = home.up().await;
    // One that makes the engine do once what it does once.
    write_model(&models.join("first"), 2, 512);
    learned(&wharf, &Spec::at("first", &models.join("first"), "onnx", 0)).await;
    let before = anonymous(wharf.id());
    let mut taken = 0;
    for at in 0..MODELS {
        let name = format!("m{at}");
        write_model(&models.join(&name), 16, 1024);
        taken += learned(&wharf, &Spec::at(&name, &models.join(&name), "onnx", 0)).await.0;
    }
    assert!(anonymous(wharf.id()) > before + taken / 2, "they were in memory");
    for at in 0..MODELS {
        let name = format!("m{at}");
        wharf.unload(&name).await.unwrap();
        wharf.until_within(LONG, &name, "gone", |view| view.state == "Terminated").await;
    }
    let began = Instant::now();
    while anonymous(wharf.id()) > before + taken / 10 {
        let left = anonymous(wharf.id()).saturating_sub(before);
        assert!(began.elapsed() < BACK, "{left} of {taken} bytes are kept");
        sleep(Duration::from_millis(200)).await;
    }
}

/// Loads a model and waits until it is known what it takes: that, and what counts.
async fn learned(wharf: &Wharf, spec: &Spec) -> (u64, u64) {
    wharf.submit(spec).await.unwrap();
    let measured = |view: &wharf::rpc::proto::wharf::ModelView| {
        let mut copies = view.versions.iter().flat_map(|version| &version.copies);
        view.state == "Available" && copies.any(|copy| copy.measured.is_some())
    };
    let view = wharf.until_within(LONG, &spec.name, "measured", measured).await;
    let copy = &view.versions[0].copies[0];
    (copy.measured.unwrap(), copy.need)
}

/// Loads a model, whose memory is looked at before and after from outside.
async fn is_learned_within_a_quarter(wharf: &Wharf, spec: &Spec, outside: impl Fn() -> u64) {
    let (before, name) = (outside(), &spec.name);
    let (measured, need) = learned(wharf, spec).await;
    let gained = outside().saturating_sub(before);
    println!(
        "{name}: measured {measured}, gained {gained}, off by {} %",
        measured.abs_diff(gained) * 100 / gained.max(1)
    );
    assert_eq!(need, measured, "what was measured counts");
    assert!(measured.abs_diff(gained) * 4 <= gained, "{name}: {measured} is not within a quarter of {gained}");
}

/// Trains nearest neighbours of so many mebibytes into a folder, with the packages that will load them.
fn train(folder: &Path, mebibytes: usize) {
    let script = "import sys, joblib, numpy, pathlib
from sklearn.neighbors import KNeighborsClassifier
folder, mebibytes = pathlib.Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True)
points = numpy.random.default_rng(mebibytes).random((mebibytes * 2048, 64))
classes = numpy.arange(len(points)) % 3
joblib.dump(KNeighborsClassifier(algorithm='brute').fit(points, classes), folder / 'model.joblib')";
    let mut command = Command::new(servers::mlserver().with_file_name("python"));
    let output = command.args(["-c", script]).arg(folder).arg(mebibytes.to_string()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The proportional anonymous memory of every process below `root` whose command line has `word` in it, and of all
/// below those.
fn proportional(root: u32, word: &str) -> u64 {
    let parent = |process: u32| -> Option<u32> {
        let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all: BTreeMap<u32, u32> = all
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|process| Some((process, parent(process)?)))
        .collect();
    let is_meant = |process: &u32| {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(word) && !line.contains(" shim ")
    };
    let lineage =
        |process: u32| std::iter::successors(Some(process), |one| all.get(one).copied().filter(|one| *one > 1));
    let below = |process: &u32| lineage(*process).any(|one| one == root) && lineage(*process).any(|one| is_meant(&one));
    let memory = |process: u32| -> u64 {
        let text = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap_or_default();
        // Each mapping's share, where no file is behind it: its header ends with no path of one.
        let mut sum = 0;
        let mut counts = false;
        for line in text.lines() {
            let first = line.split(' ').next().unwrap_or_default();
            if !first.ends_with(':') {
                counts = !line.split_whitespace().nth(5).is_some_and(|path| path.starts_with('/'));
            } else if counts && first == "Pss:" {
                sum += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024;
            }
        }
        sum
    };
    all.keys().copied().filter(below).map(memory).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_models_of_an_mlserver_that_wharf_starts_are_learned_within_a_quarter() {
    let _turn = servers::TURN.lock().await;
    let home = Home::new(&format!(
        "[[server]]\nname = \"mlserver\"\nruntime = \"mlserver\"\ncapabilities = [\"sklearn\"]\nmemory = \"2Gi\"\n\
         command = [{:?}, \"start\", \"{{repository}}\"]\n[server.env]\nMALLOC_MMAP_THRESHOLD_ = \"65536\"\n",
        servers::mlserver().display().to_string(),
    ));
    let models: PathBuf = home.path().join("models");
    let wharf = home.up().await;
    // One that makes the server read once what it reads once.
    train(&models.join("first"), 1);
    let (first, _) = learned(&wharf, &Spec::at("first", &models.join("first"), "sklearn", 0)).await;
    println!("first: measured {first}");
    for at in 0..10 {
        let name = format!("m{at}");
        train(&models.join(&name), 4 * (at + 1));
        let spec = Spec::at(&name, &models.join(&name), "sklearn", 0);
        is_learned_within_a_quarter(&wharf, &spec, || proportional(wharf.id(), "mlserver start")).await;
    }
}
