//! A decision of the placement: the domain's own function.

use anyhow::Context as _;
use wharf::domain::{
    memory::{Bytes, Resources},
    names::{ModelName, ReplicaId, ServerName},
    placement::{Capabilities, Placement, PlacementRequest, ReplicaFacts},
    replica::ReplicaState,
    time::Instant,
    version::{Generation, Uid, Version},
};

use super::Work;
use crate::models::Random;

/// Replicas in each server.
const SERVER: usize = 10;
/// Bytes of each replica; copies take from 1 to 10.
pub const CAPACITY: u64 = 1000;
/// As many requests, one after another.
const REQUESTS: u64 = 1024;

/// When all of it happens.
pub const NOW: Instant = Instant::from_micros(1_800_000_000_000_000);

/// How much more than its memory may be registered on a replica, in percent, where memory alone is not enough.
const OVERCOMMIT: u32 = 50;

/// A fleet of whose memory `full` percent are registered; more than all of it, where copies will have to be evicted.
///
/// # Errors
/// When a name is none.
pub fn fleet(replicas: usize, full: u64) -> anyhow::Result<Placement> {
    let mut placement = Placement::default();
    let capabilities = Capabilities::new(["onnx"]);
    let mut random = Random(replicas as u64);
    for number in 0..replicas {
        let server = ServerName::new(&format!("server-{:05}", number / SERVER))?;
        if number % SERVER == 0 {
            placement.upsert_server(server.clone(), None);
        }
        let id = ReplicaId::new(server, (number % SERVER) as u32);
        let facts = ReplicaFacts {
            reported: Some(Resources::primary(Bytes(CAPACITY))),
            capabilities: capabilities.clone(),
            state: ReplicaState::Available,
            runtime: "bench".to_owned(),
            overcommit_percent: if full < 100 { 0 } else { OVERCOMMIT },
        };
        placement.upsert_replica(&id, facts);
        // A few large copies; how full it is differs from replica to replica.
        let target = full * CAPACITY / 100;
        let mut left = target.saturating_sub(random.below(20) * u64::from(target > 100));
        for part in 0..4 {
            let need = if part == 3 { left } else { left / 2 };
            left -= need;
            if need > 0 {
                let copy = (number * 4 + part) as u64;
                let model = ModelName::new(&format!("held-{copy}"))?;
                let generation = Generation { uid: Uid(copy + 1), version: Version(1), number: 1 };
                placement.restore(&model, generation, &id, Resources::primary(Bytes(need)))?;
            }
        }
    }
    Ok(placement)
}

/// A copy that is to be placed.
///
/// # Errors
/// When a name is none.
pub fn request(number: u64, random: &mut Random) -> anyhow::Result<PlacementRequest> {
    let generation = Generation { uid: Uid((1 << 40) + number), version: Version(1), number: 1 };
    let need = Resources::primary(Bytes(1 + random.below(10)));
    let model = ModelName::new(&format!("asks-{number}"))?;
    Ok(PlacementRequest { requirements: Capabilities::new(["onnx"]), ..PlacementRequest::new(model, generation, need) })
}

/// Decisions among `replicas`, half of whose memory is taken. Each copy is taken away again.
pub(super) fn decisions(replicas: usize) -> anyhow::Result<Work> {
    let mut placement = fleet(replicas, 50)?;
    let mut random = Random(7);
    let requests = (0..REQUESTS).map(|number| request(number, &mut random)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut turn = 0;
    Ok(Box::new(move |times| {
        for _ in 0..times {
            let request = &requests[turn % requests.len()];
            turn += 1;
            placement.place(request, NOW).replica().context("there is room for it")?;
            placement.release(&request.model, request.generation).context("it was placed")?;
        }
        Ok(())
    }))
}
