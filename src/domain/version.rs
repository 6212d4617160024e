//! Numbers that only grow: versions of a model, and the generations of its copies.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::names::ModelName;

/// One numbered spec of a model, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u32);

impl Version {
    /// The first version of a model that Kubernetes knows at `generation` (0 elsewhere), above `held`, the
    /// highest that an agent may still hold under this name.
    #[must_use]
    pub fn first(generation: i64, held: Option<Self>) -> Self {
        let from_generation = u32::try_from(generation.max(1)).unwrap_or(u32::MAX);
        held.map_or(Self(from_generation), |held| Self(from_generation.max(held.0.saturating_add(1))))
    }

    /// The version after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tells one creation of a model name from another, so that late words about a deleted model mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Uid(pub u64);

/// What every order and report about a copy carries. A copy is one version on at most one replica, ever: to
/// try it elsewhere is a new copy with a new number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// Of the model's creation.
    pub uid: Uid,
    /// The version that the copy is of.
    pub version: Version,
    /// Of the copy, unique within the model.
    pub number: u32,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.uid.0, self.version, self.number)
    }
}

impl std::str::FromStr for Generation {
    type Err = ();

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.splitn(3, '.');
        let mut next = || parts.next().ok_or(());
        Ok(Self {
            uid: Uid(next()?.parse().map_err(drop)?),
            version: Version(next()?.parse().map_err(drop)?),
            number: next()?.parse().map_err(drop)?,
        })
    }
}

/// The name under which an inference server knows a version: `iris_2`. Clients see it in answers, and
/// Seldon's know how to read it.
#[must_use]
pub fn served_name(model: &ModelName, version: Version) -> String {
    format!("{model}_{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_version_follows_the_generation_and_stays_above_what_is_held() {
        assert_eq!(Version::first(0, None), Version(1));
        assert_eq!(Version::first(-3, None), Version(1));
        assert_eq!(Version::first(7, None), Version(7));
        assert_eq!(Version::first(2, Some(Version(4))), Version(5));
        assert_eq!(Version::first(i64::MAX, None), Version(u32::MAX));
    }

    #[test]
    fn a_generation_is_read_back_as_written() {
        let generation = Generation { uid: Uid(u64::MAX), version: Version(3), number: 9 };
        assert_eq!(generation.to_string().parse(), Ok(generation));
        for bad in ["", "1.2", "1.2.x", "1.2.3.4", "a.b.c"] {
            assert!(bad.parse::<Generation>().is_err(), "{bad}");
        }
    }
}
