//! A journal that goes on as another history: what was given since it was copied is not given again.
//!
//! The rule of this module: a backup doesn't know what the time after it has given. Every number that could
//! have been given is left out, by a jump that no lost time fills.

use std::collections::BTreeMap;

use super::{
    names::ModelName,
    record::{Contents, Counters, ModelRow, Write},
    time::Instant,
    version::Version,
};

/// Copies of one model, or versions of it, that the lost time can have made at most.
pub const COPIES: u32 = 1 << 20;
/// See [`COPIES`].
pub const VERSIONS: u32 = 1000;
/// Model uids that it can have given: those of some thousand starts, each of which reserves a block.
const UIDS: u64 = 1 << 44;

/// What to write into a journal that is to be another history from now on.
#[must_use]
pub fn another(contents: &Contents, now: Instant) -> Vec<Write> {
    let mut newest: BTreeMap<&ModelName, Version> = BTreeMap::new();
    let versions = contents.versions.iter().map(|row| (&row.model, row.version));
    let copies = contents.copies.iter().map(|row| (&row.model, row.generation.version));
    for (model, version) in versions.chain(copies) {
        let known = newest.entry(model).or_insert(version);
        *known = version.max(*known);
    }
    let mut writes: Vec<Write> = Vec::with_capacity(contents.models.len() + 1);
    for row in &contents.models {
        let newest = newest.get(&row.name).copied().unwrap_or(Version(0));
        writes.push(Write::PutModel(Box::new(ModelRow {
            number_bound: row.number_bound.saturating_add(COPIES),
            version_floor: beyond(newest).max(row.version_floor),
            ..row.clone()
        })));
    }
    let uid = contents.counters.uid.max(now.as_micros()).saturating_add(UIDS);
    writes.push(Write::PutCounters(Counters { uid, ..contents.counters.clone() }));
    writes
}

/// The first version that was surely not given after `newest`.
#[must_use]
pub const fn beyond(newest: Version) -> Version {
    Version(newest.0.saturating_add(VERSIONS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        record::VersionRow,
        spec::{Deployment, ModelSpec, Passthrough},
        version::Uid,
    };

    #[test]
    fn every_number_jumps_and_nothing_else_changes() {
        let name = ModelName::new("iris").expect("valid");
        let row = ModelRow {
            name: name.clone(),
            uid: Uid(5),
            created: Instant::from_micros(1),
            deployment: Deployment::default(),
            kubernetes: None,
            serving: Some(Version(2)),
            number_bound: 64,
            version_floor: Version(0),
            deleted: None,
        };
        let version = |number| VersionRow {
            model: name.clone(),
            uid: Uid(5),
            version: Version(number),
            created: Instant::from_micros(1),
            spec: ModelSpec::default(),
            passthrough: Passthrough::default(),
            failed: None,
        };
        let contents = Contents {
            models: vec![row.clone()],
            versions: vec![version(1), version(3), version(2)],
            counters: Counters { leader_epoch: 4, route_epoch: 9, uid: 100, ..Counters::default() },
            ..Contents::default()
        };
        let wanted = ModelRow { number_bound: 64 + COPIES, version_floor: Version(3 + VERSIONS), ..row };
        let counters = Counters { uid: 7000 + UIDS, ..contents.counters.clone() };
        assert_eq!(
            another(&contents, Instant::from_micros(7000)),
            [Write::PutModel(Box::new(wanted)), Write::PutCounters(counters)]
        );
    }

    #[test]
    fn a_second_jump_goes_on_from_the_first() {
        let contents = Contents { counters: Counters { uid: 1 << 50, ..Counters::default() }, ..Contents::default() };
        let Some(Write::PutCounters(first)) = another(&contents, Instant::from_micros(7)).pop() else {
            panic!("the counters come last")
        };
        let again = Contents { counters: first.clone(), ..Contents::default() };
        let counters = Counters { uid: first.uid + UIDS, ..first };
        assert_eq!(another(&again, Instant::from_micros(7)), [Write::PutCounters(counters)]);
    }
}
