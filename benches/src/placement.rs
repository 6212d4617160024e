//! What a decision of the placement costs as the fleet grows: the domain's own function, on one thread, beside itself in
//! a small fleet and beside a scan.
//!
//! The scan is what a scheduler without an index does: it asks every replica whether it is well, capable and has room, and
//! takes the one with the most of it. All that it asks lies side by side in memory; so it is faster than one that asks
//! objects, and it keeps no account of what it decides.

use std::{collections::VecDeque, hint::black_box, time::Instant as Watch};

use anyhow::Context as _;
use wharf::domain::placement::{Placement, PlacementRequest};
use wharf_bench::{
    functions::placement::{CAPACITY, NOW, fleet, request},
    models::Random,
};

use crate::{
    gateway::Places,
    plot,
    report::{Goal, Report, row},
};

/// Microseconds for each of `count` decisions in a fleet of `replicas` that stays as full as it is: each copy is taken
/// away again when as many were placed after it as there are replicas, and that is part of the time.
fn decide(placement: &mut Placement, replicas: usize, count: u64) -> anyhow::Result<f64> {
    let mut random = Random(7);
    let mut spent = std::time::Duration::ZERO;
    let mut placed: VecDeque<PlacementRequest> = VecDeque::with_capacity(replicas + 1);
    for number in 0..count {
        let request = request(number, &mut random)?;
        let oldest = (placed.len() >= replicas).then(|| placed.pop_front()).flatten();
        let began = Watch::now();
        let decision = placement.place(&request, NOW);
        if let Some(oldest) = oldest {
            placement.release(&oldest.model, oldest.generation);
        }
        spent += began.elapsed();
        decision.replica().context("there is room for it")?;
        placed.push_back(request);
    }
    for request in placed {
        placement.release(&request.model, request.generation);
    }
    Ok(spent.as_secs_f64() * 1e6 / count as f64)
}

/// A replica as the scan sees it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    available: bool,
    capabilities: u64,
    room: u64,
}

/// Microseconds for each of `count` decisions by a scan of `replicas`, all of which have room.
fn scan(replicas: usize, count: u64) -> f64 {
    let mut random = Random(replicas as u64);
    let seen: Vec<Seen> =
        (0..replicas).map(|_| Seen { available: true, capabilities: 1, room: CAPACITY + random.below(20) }).collect();
    let mut spent = std::time::Duration::ZERO;
    for _ in 0..count {
        let need = 1 + random.below(10);
        let began = Watch::now();
        let fit = black_box(&seen).iter().enumerate();
        let fit = fit.filter(|(_, seen)| seen.available && seen.capabilities & 1 == 1 && seen.room >= need);
        black_box(fit.max_by_key(|(_, seen)| seen.room));
        spent += began.elapsed();
    }
    spent.as_secs_f64() * 1e6 / count as f64
}

/// All of it.
pub(crate) fn measure(places: &Places, quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let (count, rounds) = if quick { (2000, 5) } else { (20_000, 7) };
    let mut lines = Vec::new();
    let fills = [(0, "empty"), (50, "half full"), (95, "nearly full"), (120, "with copies to be evicted")];
    for (full, name) in fills {
        let sizes: &[usize] = if quick { &[100, 10_000] } else { &[10, 100, 1000, 10_000] };
        let mut fleets = sizes.iter().map(|size| fleet(*size, full)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut times = vec![Vec::new(); sizes.len()];
        let mut scans = times.clone();
        for _ in 0..rounds {
            for (at, fleet) in fleets.iter_mut().enumerate() {
                times[at].push(decide(fleet, sizes[at], count)?);
                scans[at].push(scan(sizes[at], count.min(20_000_000 / sizes[at] as u64)));
            }
        }
        let few = sizes.iter().position(|size| *size == 100).map(|at| times[at].clone()).unwrap_or_default();
        for (size, times) in sizes.iter().zip(&times) {
            let what = format!("a decision among {size} replicas, {name}");
            let goal = (*size == 10_000).then(|| Goal::ratio_at_most(1.5));
            let beside = row(&what, "us", times, Some(("100 replicas", &few)), goal);
            plot::add(&mut lines, &format!("Wharf, {name}"), *size as f64, beside.wharf.median);
            println!("{}", crate::line(&beside));
            report.rows.push(beside);
        }
        for ((size, times), scans) in sizes.iter().zip(&times).zip(&scans) {
            let what = format!("a decision among {size} replicas, {name}");
            let beside = row(&what, "us", times, Some(("a scan", scans)), None);
            if full == 50
                && let Some(rival) = &beside.rival
            {
                plot::add(&mut lines, "a scan", *size as f64, rival.measure.median);
            }
            println!("{}", crate::line(&beside));
            report.rows.push(beside);
        }
    }
    if let Some(plots) = &places.plots {
        let title = "Time per decision by number of replicas";
        plot::draw(&plots.join("placement-cost.svg"), title, "replicas", "us", &lines)?;
    }
    Ok(())
}
