//! The `wharf` program.

use std::process::ExitCode;

/// Requests and messages are many small pieces that one thread makes and another frees; what an evicted model took goes
/// back to the system within seconds.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    wharf::cli::main(&wharf::cli::ThisProcess)
}
