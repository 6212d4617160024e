//! A model as the journal has it: every copy Unknown until its agent speaks.

use std::{collections::BTreeSet, sync::Arc};

use super::{Entry, Model};
use crate::domain::{
    copy::{Copy, State},
    record::{CopyRow, ModelRow, VersionRow},
    time::Instant,
};

/// Rebuilds a model from its rows. Copies that were routed stay so, and their memory stays reserved.
#[must_use]
pub fn restore(row: ModelRow, versions: Vec<VersionRow>, copies: Vec<CopyRow>, now: Instant) -> Model {
    let mut versions: Vec<Entry> = versions
        .into_iter()
        .map(|row| Entry {
            version: row.version,
            uid: row.uid,
            spec: Arc::new(row.spec),
            created: row.created,
            passthrough: row.passthrough,
            failed: row.failed,
        })
        .collect();
    versions.sort_by_key(|entry| entry.version);
    let mut copies: Vec<Copy> = copies
        .into_iter()
        .map(|row| Copy {
            generation: row.generation,
            state: State::Unknown { on: row.replica },
            since: now,
            need: row.need,
            attempts: 0,
            ordered: None,
            avoid: Vec::new(),
            left: 0,
            awaited: None,
            draining: row.draining,
            routed: row.routed,
        })
        .collect();
    copies.sort_by_key(|copy| (copy.generation.uid, copy.generation.number));
    Model {
        name: row.name,
        uid: row.uid,
        created: row.created,
        deployment: row.deployment,
        kubernetes: row.kubernetes,
        serving: row.serving,
        deleted: row.deleted,
        versions,
        copies,
        changed: now,
        revision: 0,
        next_number: row.number_bound,
        number_bound: row.number_bound,
        version_floor: row.version_floor,
        raised: None,
        way: None,
        leaving: BTreeSet::new(),
        displaced: BTreeSet::new(),
        sizes: super::Sizes::default(),
    }
}
