//! Compiles `proto/` without `protoc`, and keeps the descriptors for gRPC reflection.
use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

#[expect(clippy::disallowed_methods, reason = "cargo tells a build script where to write by its environment alone")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let protos = ["scheduler", "wharf", "agent", "routes", "inference", "health"].map(|name| format!("{name}.proto"));
    let descriptors = protox::compile(&protos, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Raw tensor contents pass through as references into the received buffer.
    tonic_prost_build::configure()
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents")
        .include_file("wire.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
