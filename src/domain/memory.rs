//! Bytes as a type of their own, counted by device, with arithmetic that can't wrap.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::devices::Devices;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// None at all.
    pub const ZERO: Self = Self(0);

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

    /// Reads a Kubernetes quantity: `334000000`, `100Ki`, `1.5Gi`, `1e9`, `2G`. Exact: a quantity that is not
    /// a whole number of bytes (`100m`, `0.3`) is refused, never rounded. The grammar is that of
    /// `k8s.io/apimachinery/pkg/api/resource`: an optional sign, decimal digits with at most one point, then one
    /// of `n u m k M G T P E`, `Ki Mi Gi Ti Pi Ei`, or `e`/`E` and a whole exponent.
    ///
    /// # Errors
    /// Names the quantity and what is wrong with it.
    pub fn from_quantity(text: &str) -> Result<Self, QuantityError> {
        let wrong = |problem| QuantityError { quantity: clip(text), problem };
        let quantity = Quantity::read(text).map_err(wrong)?;
        quantity.bytes().map(Self).map_err(wrong)
    }
}

/// A quantity that is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{quantity:?} is not a number of bytes: {problem}")]
pub struct QuantityError {
    /// What was given, clipped.
    pub quantity: String,
    /// What is wrong with it.
    pub problem: QuantityProblem,
}

/// What can be wrong with a quantity, and the way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum QuantityProblem {
    /// Nothing was given.
    #[error("it is empty; write a number such as 512Mi")]
    Empty,
    /// No number at its start.
    #[error("it does not start with a number; write one such as 512Mi")]
    NoNumber,
    /// More than one decimal point.
    #[error("it has more than one decimal point")]
    TwoPoints,
    /// A unit that does not exist.
    #[error(
        "its unit is not known; units are k, M, G, T, P, E (powers of 1000) and Ki, Mi, Gi, Ti, Pi, Ei (powers of 1024)"
    )]
    Unit,
    /// `e` without a whole number after it.
    #[error("its exponent is not a whole number")]
    Exponent,
    /// Less than nothing.
    #[error("it is negative")]
    Negative,
    /// Part of a byte.
    #[error("it is not a whole number of bytes; m, u and n stand for thousandths, millionths and billionths")]
    Fraction,
    /// Beyond 2^64 - 1.
    #[error("it is more than 16 EiB - 1 byte, the most that can be counted")]
    TooLarge,
}

/// A quantity's value as `digits * 2^twos * 10^tens`.
struct Quantity {
    negative: bool,
    digits: u128,
    twos: i32,
    tens: i32,
}

impl Quantity {
    fn read(text: &str) -> Result<Self, QuantityProblem> {
        if text.is_empty() {
            return Err(QuantityProblem::Empty);
        }
        let negative = text.starts_with('-');
        let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, unit) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') {
            return Err(QuantityProblem::TwoPoints);
        }
        if whole.is_empty() && fraction.is_empty() {
            return Err(QuantityProblem::NoNumber);
        }
        let fraction = fraction.trim_end_matches('0');
        let mut digits = 0_u128;
        for digit in whole.bytes().chain(fraction.bytes()) {
            // 38 significant digits are more than any exact number of countable bytes has: a longer whole part is
            // too large, and a longer fraction cannot come out even.
            let too_long = if fraction.is_empty() { QuantityProblem::TooLarge } else { QuantityProblem::Fraction };
            digits = digits.checked_mul(10).and_then(|d| d.checked_add(u128::from(digit - b'0'))).ok_or(too_long)?;
        }
        let (twos, tens) = unit_of(unit)?;
        let places = i32::try_from(fraction.len()).map_err(|_| QuantityProblem::Fraction)?;
        Ok(Self { negative, digits, twos, tens: tens.saturating_sub(places) })
    }

    /// Divides by five where a power of ten has to be divided by, which a power of two cannot help with.
    fn bytes(self) -> Result<u64, QuantityProblem> {
        let Self { negative, mut digits, mut twos, mut tens } = self;
        if digits == 0 {
            return Ok(0);
        }
        if negative {
            return Err(QuantityProblem::Negative);
        }
        while tens < 0 {
            if !digits.is_multiple_of(5) {
                return Err(QuantityProblem::Fraction);
            }
            digits /= 5;
            twos -= 1;
            tens += 1;
        }
        while twos < 0 {
            if !digits.is_multiple_of(2) {
                return Err(QuantityProblem::Fraction);
            }
            digits /= 2;
            twos += 1;
        }
        // Every step makes it greater, so the first one beyond the bound decides.
        for factor in std::iter::repeat_n(10, usize::try_from(tens).unwrap_or(0))
            .chain(std::iter::repeat_n(2, usize::try_from(twos).unwrap_or(0)))
        {
            digits *= factor;
            if digits > u128::from(u64::MAX) {
                return Err(QuantityProblem::TooLarge);
            }
        }
        u64::try_from(digits).map_err(|_| QuantityProblem::TooLarge)
    }
}

/// The powers of two and of ten that a quantity's suffix stands for.
fn unit_of(unit: &str) -> Result<(i32, i32), QuantityProblem> {
    Ok(match unit {
        "" => (0, 0),
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        _ => {
            let exponent = unit.strip_prefix(['e', 'E']).ok_or(QuantityProblem::Unit)?;
            let digits = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(QuantityProblem::Exponent);
            }
            // An exponent beyond all counting ends in the same answer as one just beyond it.
            let size = digits.parse().unwrap_or(i32::MAX).min(1_000);
            (0, if exponent.starts_with('-') { -size } else { size })
        }
    })
}

/// As much of what was given as an error message can bear.
fn clip(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
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
    #[serde(default, skip_serializing_if = "Devices::is_empty")]
    pub others: Devices,
}

impl Resources {
    /// Bytes on the primary device only.
    #[must_use]
    pub const fn primary(bytes: Bytes) -> Self {
        Self { primary: bytes, others: Devices::NONE }
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

    /// So many times as much on every device.
    #[must_use]
    pub fn times(&self, count: u32) -> Self {
        let times = |bytes: Bytes| Bytes(bytes.0.saturating_mul(u64::from(count)));
        Self {
            primary: times(self.primary),
            others: self.others.iter().map(|(device, bytes)| (device.clone(), times(*bytes))).collect(),
        }
    }

    /// The smaller of the two on every device.
    #[must_use]
    pub fn min(&self, other: &Self) -> Self {
        self.zip(other, |a, b| Some(a.min(b))).unwrap_or_default()
    }

    /// The greater of the two on every device.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        let mut max = self.clone();
        max.raise(other);
        max
    }

    /// Becomes the greater of the two on every device.
    pub fn raise(&mut self, other: &Self) {
        self.primary = self.primary.max(other.primary);
        for (device, bytes) in &other.others {
            match self.others.get_mut(device) {
                Some(own) => *own = (*own).max(*bytes),
                None => drop(self.others.insert(device.clone(), *bytes)),
            }
        }
    }

    /// Every device that is spoken of, the primary one first and without a name, with its bytes.
    pub fn devices(&self) -> impl Iterator<Item = (Option<&str>, Bytes)> {
        let others = self.others.iter().map(|(device, bytes)| (Some(device.as_str()), *bytes));
        std::iter::once((None, self.primary)).chain(others)
    }

    /// What is missing here of `need`, on each device where anything is.
    pub fn lacks<'a>(&'a self, need: &'a Self) -> impl Iterator<Item = (Option<&'a str>, Bytes)> {
        need.devices().filter_map(|(device, bytes)| {
            let missing = bytes.saturating_sub(self.on(device));
            (missing > Bytes::ZERO).then_some((device, missing))
        })
    }

    fn zip(&self, other: &Self, op: impl Fn(Bytes, Bytes) -> Option<Bytes>) -> Option<Self> {
        let mut both = Self::primary(op(self.primary, other.primary)?);
        for device in self.others.keys().chain(other.others.keys()) {
            if !both.others.contains_key(device) {
                both.others.insert(device.clone(), op(self.on(Some(device)), other.on(Some(device)))?);
            }
        }
        Some(both)
    }
}

/// A sum of resources that can't overflow, so that what is put in can always be taken out again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    primary: u128,
    /// Never holds a zero, so that equal sums are equal values.
    others: BTreeMap<String, u128>,
}

impl Tally {
    /// Adds `resources`.
    pub fn add(&mut self, resources: &Resources) {
        self.primary += u128::from(resources.primary.0);
        for (device, bytes) in &resources.others {
            if *bytes > Bytes::ZERO {
                *self.others.entry(device.clone()).or_default() += u128::from(bytes.0);
            }
        }
    }

    /// Takes out `resources`, which was added before. Never goes below nothing.
    pub fn remove(&mut self, resources: &Resources) {
        self.primary = self.primary.saturating_sub(u128::from(resources.primary.0));
        for (device, bytes) in &resources.others {
            if let Some(sum) = self.others.get_mut(device) {
                *sum = sum.saturating_sub(u128::from(bytes.0));
                if *sum == 0 {
                    self.others.remove(device);
                }
            }
        }
    }

    /// Every device that is spoken of, the primary one first and without a name, with its sum.
    pub fn devices(&self) -> impl Iterator<Item = (Option<&str>, u128)> {
        let others = self.others.iter().map(|(device, bytes)| (Some(device.as_str()), *bytes));
        std::iter::once((None, self.primary)).chain(others)
    }

    /// The sum; on a device with more than can be shown, the most that can.
    #[must_use]
    pub fn shown(&self) -> Resources {
        let shown = |bytes: u128| Bytes(u64::try_from(bytes).unwrap_or(u64::MAX));
        Resources {
            primary: shown(self.primary),
            others: self.others.iter().map(|(device, bytes)| (device.clone(), shown(*bytes))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantities_mean_what_kubernetes_says() {
        for (text, bytes) in [
            ("0", 0),
            ("-0", 0),
            ("1", 1),
            ("+5", 5),
            ("007", 7),
            ("334000000", 334_000_000),
            ("100Ki", 102_400),
            ("1Mi", 1 << 20),
            ("1.5Gi", 1_610_612_736),
            ("0.5Ki", 512),
            (".5Ki", 512),
            ("1.Ki", 1024),
            ("2Ti", 1 << 41),
            ("100Ti", 100 << 40),
            ("3Pi", 3 << 50),
            ("15Ei", 15 << 60),
            ("1k", 1_000),
            ("1.5M", 1_500_000),
            ("2G", 2_000_000_000),
            ("1T", 1_000_000_000_000),
            ("1P", 1_000_000_000_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("1e3", 1_000),
            ("1E3", 1_000),
            ("1.25e+2", 125),
            ("5000e-3", 5),
            ("1000m", 1),
            ("3000000000n", 3),
            ("1.000000000000000000000000000000000000000000000000Ki", 1024),
            ("0.0009765625Ki", 1),
            ("0.000000000931322574615478515625Gi", 1),
            ("18446744073709551615", u64::MAX),
            ("0e99999999999999999999", 0),
        ] {
            assert_eq!(Bytes::from_quantity(text), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_of_bytes_is_refused_by_name() {
        use QuantityProblem as P;
        for (text, problem) in [
            ("", P::Empty),
            ("Gi", P::NoNumber),
            ("-", P::NoNumber),
            (".", P::NoNumber),
            (" 1Gi", P::NoNumber),
            ("abc", P::NoNumber),
            ("1.2.3Gi", P::TwoPoints),
            ("1K", P::Unit),
            ("1KiB", P::Unit),
            ("1GB", P::Unit),
            ("1 Gi", P::Unit),
            ("1gi", P::Unit),
            ("0x10", P::Unit),
            ("1\u{0663}", P::Unit),
            ("1e", P::Exponent),
            ("1e+", P::Exponent),
            ("1e1.5", P::Exponent),
            ("1e--3", P::Exponent),
            ("-1", P::Negative),
            ("-1Gi", P::Negative),
            ("100m", P::Fraction),
            ("2500000u", P::Fraction),
            ("0.5", P::Fraction),
            ("0.3Ki", P::Fraction),
            ("1e-1", P::Fraction),
            ("1e-999999999999", P::Fraction),
            ("0.00000000000000000000000000000000000000000001Gi", P::Fraction),
            ("16Ei", P::TooLarge),
            ("18446744073709551616", P::TooLarge),
            ("99999999999999999999999999999999999999999999", P::TooLarge),
            ("1e20", P::TooLarge),
            ("1e999999999999", P::TooLarge),
        ] {
            assert_eq!(Bytes::from_quantity(text).expect_err(text).problem, problem, "{text}");
        }
        let error = Bytes::from_quantity(&"x".repeat(9_000)).expect_err("no number").to_string();
        assert!(error.len() < 200, "{error}");
        assert_eq!(
            Bytes::from_quantity("100m").expect_err("fraction").to_string(),
            "\"100m\" is not a number of bytes: it is not a whole number of bytes; m, u and n stand for thousandths, \
             millionths and billionths"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            drop(Bytes::from_quantity(&text));
        }

        #[test]
        fn tenths_of_a_unit_are_exact(tenths in 0_u64..1_000_000, unit in 0_usize..6) {
            let units = [("", 1), ("k", 1_000), ("Ki", 1 << 10), ("M", 1_000_000), ("Mi", 1 << 20), ("Gi", 1 << 30)];
            let (name, size) = units[unit];
            let text = format!("{}.{}{name}", tenths / 10, tenths % 10);
            let exact = u128::from(tenths) * size;
            match Bytes::from_quantity(&text) {
                Ok(Bytes(bytes)) => prop_assert_eq!(u128::from(bytes) * 10, exact),
                Err(error) => {
                    prop_assert_eq!(error.problem, QuantityProblem::Fraction);
                    prop_assert!(!exact.is_multiple_of(10));
                }
            }
        }
    }

    #[test]
    fn a_tally_gives_back_what_was_put_in() {
        let huge = Resources { primary: Bytes(u64::MAX), others: [("gpu0".to_owned(), Bytes(u64::MAX))].into() };
        let mut tally = Tally::default();
        tally.add(&Resources::primary(Bytes(7)));
        let before = tally.clone();
        tally.add(&huge);
        tally.add(&huge);
        assert_eq!(tally.shown().on(Some("gpu0")), Bytes(u64::MAX));
        tally.remove(&huge);
        tally.remove(&huge);
        assert_eq!(tally, before);
    }

    #[test]
    fn what_is_lacking_is_told_by_device() {
        let need = Resources { primary: Bytes(5), others: [("gpu0".to_owned(), Bytes(7))].into() };
        let have = Resources { primary: Bytes(9), others: [("gpu0".to_owned(), Bytes(4))].into() };
        assert_eq!(have.lacks(&need).collect::<Vec<_>>(), [(Some("gpu0"), Bytes(3))]);
        assert_eq!(need.max(&have).devices().collect::<Vec<_>>(), [(None, Bytes(9)), (Some("gpu0"), Bytes(7))]);
    }

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
