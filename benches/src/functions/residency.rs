//! Which copies leave a replica's memory so that another may enter it: the domain's own function.

use std::{hint::black_box, time::Duration};

use anyhow::bail;
use wharf::domain::{
    memory::{Bytes, Resources},
    residency::{Decision, Occupant, Rules, Standing, decide},
    time::Instant,
    version::{Generation, Uid, Version},
};

use super::Work;
use crate::models::Random;

const EACH: u64 = 1 << 20;

/// Decisions among `copies` that fill the memory. Each makes room for one more.
pub(super) fn decisions(copies: u64) -> anyhow::Result<Work> {
    let mut random = Random(copies);
    let occupants: Vec<Occupant> = (0..copies)
        .map(|number| Occupant {
            copy: Generation { uid: Uid(number + 1), version: Version(1), number: 1 },
            bytes: Resources::primary(Bytes(EACH)),
            last_used: Instant::from_micros(1_000_000 + random.below(1_000_000)),
            idle: None,
            holds: 0,
            standing: Standing::Resident,
            since: Instant::from_micros(0),
            reload: Duration::from_secs(1),
            pinned: false,
        })
        .collect();
    let (capacity, need) = (Resources::primary(Bytes(EACH * copies)), Resources::primary(Bytes(EACH)));
    let rules = Rules { now: Instant::from_micros(3_000_000), ..Rules::default() };
    Ok(Box::new(move |times| {
        for _ in 0..times {
            match decide(black_box(&occupants), &capacity, &need, rules) {
                Decision::Evict(victims) if victims.len() == 1 => {}
                other => bail!("one copy was to leave, not {other:?}"),
            }
        }
        Ok(())
    }))
}
