//! What is registered on one replica: the sum of it, how much of that is pinned, and the largest copy that is not.
//!
//! The rule of pinned copies is kept with these three: what is pinned stays in memory for ever, so all of it has to fit
//! there together, and what it leaves has to be enough for each of the other copies to come in, one at a time.

use std::collections::BTreeMap;

use crate::domain::memory::{Bytes, Resources, Tally};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    all: Tally,
    pinned: Tally,
    /// How many of the other copies need so much, by device; the primary one has no name.
    others: BTreeMap<Option<String>, BTreeMap<Bytes, u32>>,
}

impl Load {
    /// Registers a copy.
    pub(super) fn add(&mut self, need: &Resources, pinned: bool) {
        self.all.add(need);
        if pinned {
            return self.pinned.add(need);
        }
        for (device, bytes) in need.devices().filter(|(_, bytes)| *bytes > Bytes::ZERO) {
            *self.others.entry(device.map(str::to_owned)).or_default().entry(bytes).or_default() += 1;
        }
    }

    /// Takes a copy out that was registered so.
    pub(super) fn remove(&mut self, need: &Resources, pinned: bool) {
        self.all.remove(need);
        if pinned {
            return self.pinned.remove(need);
        }
        for (device, bytes) in need.devices() {
            let device = device.map(str::to_owned);
            let Some(sizes) = self.others.get_mut(&device) else { continue };
            if let Some(count) = sizes.get_mut(&bytes) {
                *count -= 1;
                if *count == 0 {
                    sizes.remove(&bytes);
                }
            }
            if sizes.is_empty() {
                self.others.remove(&device);
            }
        }
    }

    /// The sum of all copies.
    pub(super) const fn all(&self) -> &Tally {
        &self.all
    }

    /// The sum of those that are pinned.
    pub(super) const fn pinned(&self) -> &Tally {
        &self.pinned
    }

    /// What the largest of the others needs; on each device it may be another one.
    pub(super) fn largest(&self) -> Resources {
        let mut largest = Resources::default();
        for (device, sizes) in &self.others {
            let Some((bytes, _)) = sizes.last_key_value() else { continue };
            match device {
                None => largest.primary = *bytes,
                Some(device) => drop(largest.others.insert(device.clone(), *bytes)),
            }
        }
        largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::devices::Devices;

    fn need(primary: u64, gpu: u64) -> Resources {
        let others = if gpu > 0 { [("gpu0".to_owned(), Bytes(gpu))].into() } else { Devices::NONE };
        Resources { primary: Bytes(primary), others }
    }

    #[test]
    fn what_comes_and_goes_leaves_no_trace() {
        let mut load = Load::default();
        load.add(&need(5, 1), false);
        let before = load.clone();
        for (bytes, pinned) in [(need(5, 0), false), (need(3, 7), false), (need(9, 9), true)] {
            load.add(&bytes, pinned);
        }
        assert_eq!((load.largest(), load.pinned().shown()), (need(5, 7), need(9, 9)));
        assert_eq!(load.all().shown(), need(22, 17));
        for (bytes, pinned) in [(need(9, 9), true), (need(5, 0), false), (need(3, 7), false)] {
            load.remove(&bytes, pinned);
        }
        assert_eq!((load.largest(), &load), (need(5, 1), &before));
    }
}
