//! Bytes by the name of a device, of which there are hardly ever any.
//!
//! The rule of this module: none at all takes one word and no look elsewhere. The placement keeps such sums by the
//! million, in trees of which every decision reads and writes a path.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    ops::{Deref, DerefMut},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::memory::Bytes;

type Map = BTreeMap<String, Bytes>;

/// A map that takes a word while nothing is in it.
#[derive(Clone, Default)]
pub struct Devices(Option<Box<Map>>);

impl Devices {
    /// No device.
    pub const NONE: Self = Self(None);

    /// Whether there is no device.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|map| map.is_empty())
    }
}

impl Deref for Devices {
    type Target = Map;

    fn deref(&self) -> &Map {
        static NONE: Map = Map::new();
        self.0.as_deref().unwrap_or(&NONE)
    }
}

impl DerefMut for Devices {
    fn deref_mut(&mut self) -> &mut Map {
        self.0.get_or_insert_default()
    }
}

impl From<Map> for Devices {
    fn from(map: Map) -> Self {
        Self((!map.is_empty()).then(|| Box::new(map)))
    }
}

impl FromIterator<(String, Bytes)> for Devices {
    fn from_iter<I: IntoIterator<Item = (String, Bytes)>>(devices: I) -> Self {
        let mut devices = devices.into_iter().peekable();
        if devices.peek().is_none() { Self::NONE } else { Map::from_iter(devices).into() }
    }
}

impl<const N: usize> From<[(String, Bytes); N]> for Devices {
    fn from(devices: [(String, Bytes); N]) -> Self {
        devices.into_iter().collect()
    }
}

impl<'a> IntoIterator for &'a Devices {
    type Item = (&'a String, &'a Bytes);
    type IntoIter = std::collections::btree_map::Iter<'a, String, Bytes>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl PartialEq for Devices {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Devices {}

impl PartialOrd for Devices {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Devices {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl Hash for Devices {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl Serialize for Devices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (**self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Map::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((any::<bool>(), "[a-c]", 0_u64..3), 0..20)) {
            let (mut devices, mut map) = (Devices::NONE, Map::new());
            for (add, name, bytes) in steps {
                if add {
                    prop_assert_eq!(devices.insert(name.clone(), Bytes(bytes)), map.insert(name, Bytes(bytes)));
                } else {
                    prop_assert_eq!(devices.remove(&name), map.remove(&name));
                }
                prop_assert_eq!(&*devices, &map);
                prop_assert_eq!(devices.is_empty(), map.is_empty());
                // What was emptied is as what never held anything.
                let fresh = Devices::from(map.clone());
                prop_assert_eq!(&devices, &fresh);
                prop_assert_eq!(devices.cmp(&fresh), Ordering::Equal);
                let said = serde_json::to_string(&devices).expect("a map can be written");
                prop_assert_eq!(&said, &serde_json::to_string(&map).expect("a map can be written"));
                prop_assert_eq!(&serde_json::from_str::<Devices>(&said).expect("it was written so"), &devices);
            }
        }
    }
}
