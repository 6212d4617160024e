//! How long each hot path takes: the functions of which `wharf-bench run` counts the instructions, timed by Criterion.

use std::time::{Duration, Instant};

use criterion::Criterion;
use wharf_bench::functions;

/// As in the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    for function in &functions::ALL {
        let (mut made, mut failed) = (None, None);
        criterion.bench_function(function.id, |bencher| {
            // Only what is asked for on the command line comes here, more than once, and is made once.
            let work = made.get_or_insert_with(|| function.make());
            bencher.iter_custom(|times| {
                let began = Instant::now();
                if let Err(error) = work.as_mut().map_or(Ok(()), |work| work(times)) {
                    failed.get_or_insert(error);
                }
                // Criterion divides by it.
                began.elapsed().max(Duration::from_nanos(1))
            });
        });
        if let Some(error) = made.and_then(Result::err).or(failed) {
            return Err(error.context(function.what));
        }
    }
    criterion.final_summary();
    Ok(())
}
