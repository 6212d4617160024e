//! The `wharf` program.

use std::process::ExitCode;

/// Requests and messages are many small pieces that one thread makes and another frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    wharf::cli::main(&wharf::cli::ThisProcess)
}
