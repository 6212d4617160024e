//! Bytes as a type of their own, counted by device, with arithmetic that can't wrap.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// None at all.
    pub const ZERO: Self = Self(0);

    /// Reads a Kubernetes quantity of whole bytes: `512Mi`, `1.5G`, `1048576`.
    ///
    /// # Errors
    /// Says what a quantity looks like.
    pub fn from_quantity(text: &str) -> Result<Self, String> {
        const UNITS: [(&str, u128); 13] = [
            ("Ki", 1 << 10),
            ("Mi", 1 << 20),
            ("Gi", 1 << 30),
            ("Ti", 1 << 40),
            ("Pi", 1 << 50),
            ("Ei", 1 << 60),
            ("k", 1_000),
            ("M", 1_000_000),
            ("G", 1_000_000_000),
            ("T", 1_000_000_000_000),
            ("P", 1_000_000_000_000_000),
            ("E", 1_000_000_000_000_000_000),
            ("", 1),
        ];
        let wanted = || format!("{text:?} is not a size; write one such as \"512Mi\", \"1.5Gi\" or \"2G\"");
        let (number, unit) =
            UNITS.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit))).ok_or_else(wanted)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        let digits = |text: &str| text.len() <= 18 && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || (whole.is_empty() && part.is_empty()) || number.ends_with('.') {
            return Err(wanted());
        }
        let value = |text: &str| text.parse::<u128>().unwrap_or(0);
        let scale = 10_u128.pow(u32::try_from(part.len()).unwrap_or(0));
        let bytes = value(whole) * unit + (value(part) * unit).div_ceil(scale);
        u64::try_from(bytes).map(Self).map_err(|_| wanted())
    }

    /// The sum, unless it is more than can be counted.
    #[must_use]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The difference, unless it is less than nothing.
    #[must_use]
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(difference) => Some(Self(difference)),
            None => None,
        }
    }

    /// The difference, or nothing.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// This many bytes and `percent` more of them, rounded down.
    #[must_use]
    pub fn plus_percent(self, percent: u32) -> Self {
        let total = u128::from(self.0) * (100 + u128::from(percent)) / 100;
        Self(u64::try_from(total).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Bytes {
    /// In binary units with at most one decimal: `512 B`, `1.5 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        // Tenths of the unit, rounded half up; whole numbers show no decimal.
        let mut unit = 0;
        let mut size = u128::from(self.0);
        let mut scale = 1024_u128;
        while size >= scale * 1024 && unit + 1 < UNITS.len() {
            scale *= 1024;
            unit += 1;
        }
        size = (size * 10 + scale / 2) / scale;
        let text = match size % 10 {
            0 => format!("{} {}", size / 10, UNITS[unit]),
            tenth => format!("{}.{tenth} {}", size / 10, UNITS[unit]),
        };
        f.pad(&text)
    }
}

/// Bytes by device. The primary device is the one that a server's `memory` and a manifest's `memory` speak
/// of; the others go by name (`gpu0`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// On the primary device.
    pub primary: Bytes,
    /// On every other device; one that is absent has or needs nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, Bytes>,
}

impl Resources {
    /// Bytes on the primary device only.
    #[must_use]
    pub const fn primary(bytes: Bytes) -> Self {
        Self { primary: bytes, others: BTreeMap::new() }
    }

    /// Bytes on `device`, or on the primary one.
    #[must_use]
    pub fn on(&self, device: Option<&str>) -> Bytes {
        device.map_or(self.primary, |device| self.others.get(device).copied().unwrap_or_default())
    }

    /// Whether there is nothing on any device.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.primary == Bytes::ZERO && self.others.values().all(|bytes| *bytes == Bytes::ZERO)
    }

    /// Whether every device here holds at least what `need` asks of it.
    #[must_use]
    pub fn covers(&self, need: &Self) -> bool {
        self.primary >= need.primary && need.others.iter().all(|(device, bytes)| self.on(Some(device)) >= *bytes)
    }

    /// The sum by device, unless one is more than can be counted.
    #[must_use]
    pub fn checked_add(&self, other: &Self) -> Option<Self> {
        self.zip(other, Bytes::checked_add)
    }

    /// The difference by device, unless one is less than nothing.
    #[must_use]
    pub fn checked_sub(&self, other: &Self) -> Option<Self> {
        self.zip(other, Bytes::checked_sub)
    }

    /// The difference by device, nothing where it would be less.
    #[must_use]
    pub fn saturating_sub(&self, other: &Self) -> Self {
        self.zip(other, |a, b| Some(a.saturating_sub(b))).unwrap_or_default()
    }

    /// This and `percent` more of it on every device.
    #[must_use]
    pub fn plus_percent(&self, percent: u32) -> Self {
        Self {
            primary: self.primary.plus_percent(percent),
            others: self.others.iter().map(|(device, bytes)| (device.clone(), bytes.plus_percent(percent))).collect(),
        }
    }

    /// The smaller of the two on every device.
    #[must_use]
    pub fn min(&self, other: &Self) -> Self {
        self.zip(other, |a, b| Some(a.min(b))).unwrap_or_default()
    }

    fn zip(&self, other: &Self, op: impl Fn(Bytes, Bytes) -> Option<Bytes>) -> Option<Self> {
        let primary = op(self.primary, other.primary)?;
        let mut others = BTreeMap::new();
        for device in self.others.keys().chain(other.others.keys()) {
            if !others.contains_key(device) {
                others.insert(device.clone(), op(self.on(Some(device)), other.on(Some(device)))?);
            }
        }
        Some(Self { primary, others })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_refuses_to_wrap() {
        assert_eq!(Bytes(u64::MAX).checked_add(Bytes(1)), None);
        assert_eq!(Bytes(1).checked_sub(Bytes(2)), None);
        assert_eq!(Bytes(u64::MAX).plus_percent(10), Bytes(u64::MAX));
        assert_eq!(Bytes(1000).plus_percent(20), Bytes(1200));
    }

    #[test]
    fn a_device_that_is_not_there_holds_nothing() {
        let gpu = Resources { primary: Bytes(5), others: [("gpu0".to_owned(), Bytes(7))].into() };
        assert!(!Resources::primary(Bytes(100)).covers(&gpu));
        assert!(gpu.covers(&Resources::primary(Bytes(5))));
        assert_eq!(Resources::primary(Bytes(9)).checked_sub(&gpu), None);
        assert_eq!(gpu.min(&Resources::primary(Bytes(9))).on(Some("gpu0")), Bytes::ZERO);
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (334_000_000, "318.5 MiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
