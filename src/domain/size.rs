//! What a model takes in memory: what its manifest declares, what an agent estimates from its artifact, and what was
//! measured.
//!
//! The rules of this module: no size is ever nothing; what was measured is worth more than what was guessed; what was
//! declared is worth more than both, unless the operator decided otherwise.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::memory::{Bytes, Resources};

/// What a measured size holds for: the same files in the same runtime, configured in the same way, take the same
/// memory on every replica.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SizeKey {
    /// The digest of the artifact.
    pub artifact: String,
    /// What serves it, by its name in the registry.
    pub runtime: String,
    /// How many times the runtime holds it, and the digest of its parameters if it has any: `2`, `1+9f86d081`.
    pub configuration: String,
}

/// What a copy takes in memory, and what that holds for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// What else is of this size.
    pub key: SizeKey,
    /// Its bytes, of all instances together.
    pub bytes: Resources,
}

/// What is made of a declared size once another was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// The larger of the two counts.
    Larger,
    /// What was measured counts.
    Measured,
    /// What was declared counts, and what was measured is only shown.
    #[default]
    Declared,
}

impl Trust {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Larger, Self::Measured, Self::Declared];

    /// As the configuration names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Larger => "larger",
            Self::Measured => "measured",
            Self::Declared => "declared",
        }
    }
}

/// What is known of the memory that a version takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// Declared, for all instances that were declared with it.
    pub declared: Option<Bytes>,
    /// Measured, if it was.
    pub measured: Option<&'a Resources>,
    /// Estimated from the artifact, once that was on a replica's disk.
    pub estimated: Option<&'a Resources>,
}

impl Known<'_> {
    /// The memory that counts; `default` where nothing is known. Never nothing.
    #[must_use]
    pub fn counts(&self, trust: Trust, default: Bytes) -> Resources {
        let declared = self.declared.filter(|bytes| *bytes != Bytes::ZERO).map(Resources::primary);
        let measured = self.measured.filter(|bytes| !bytes.is_zero());
        let estimated = self.estimated.filter(|bytes| !bytes.is_zero());
        let known = match (declared, measured) {
            (Some(declared), Some(measured)) => match trust {
                Trust::Larger => declared.max(measured),
                Trust::Measured => measured.clone(),
                Trust::Declared => declared,
            },
            (Some(declared), None) => declared,
            (None, Some(measured)) => measured.clone(),
            (None, None) => estimated.cloned().unwrap_or_else(|| Resources::primary(default)),
        };
        known.max(&Resources::primary(Bytes(1)))
    }
}

/// A difference that nobody has to do anything about, however large the factor.
const SMALL: Bytes = Bytes(16 << 20);

/// Whether what was declared and what was measured differ by more than this factor, in percent: at 200, when one is
/// more than twice the other. A few megabytes are no difference.
#[must_use]
pub fn differ(declared: Bytes, measured: Bytes, percent: u32) -> bool {
    let (low, high) = (declared.min(measured), declared.max(measured));
    high.saturating_sub(low) > SMALL && u128::from(high.0) * 100 > u128::from(low.0) * u128::from(percent)
}

/// How much memory an artifact of a given size takes at most, as a guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Guess {
    /// How many percent of the artifact's bytes.
    pub percent: u32,
    /// And how many bytes on top of that, whatever its size.
    pub constant: Bytes,
}

impl Guess {
    /// The guess for an artifact of `bytes` that is held `instances` times. Never nothing.
    #[must_use]
    pub fn of(self, bytes: Bytes, instances: u32) -> Bytes {
        let once = u128::from(bytes.0) * u128::from(self.percent) / 100 + u128::from(self.constant.0);
        let all = once.saturating_mul(u128::from(instances.max(1))).max(1);
        Bytes(u64::try_from(all).unwrap_or(u64::MAX))
    }
}

/// The guesses by runtime or capability.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Guesses {
    by_name: Vec<(String, Guess)>,
    otherwise: Guess,
}

/// The entry of [`Guesses`] for whatever has none of its own.
const OTHERWISE: &str = "*";

impl Guesses {
    /// Reads `name=factor+constant`, separated by commas: `builtin=2.5+16Mi, *=3+64Mi`. The factor has at most two
    /// decimals. An entry `*` has to be there, and no name comes twice.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut by_name: Vec<(String, Guess)> = Vec::new();
        for part in text.split(',') {
            let (name, guess) = part.trim().split_once('=')?;
            let (factor, constant) = guess.trim().split_once('+')?;
            let guess =
                Guess { percent: percent(factor.trim())?, constant: Bytes::from_quantity(constant.trim()).ok()? };
            let name = name.trim();
            if name.is_empty() || by_name.iter().any(|(other, _)| other == name) {
                return None;
            }
            by_name.push((name.to_owned(), guess));
        }
        let at = by_name.iter().position(|(name, _)| name == OTHERWISE)?;
        let (_, otherwise) = by_name.remove(at);
        by_name.sort_unstable();
        Some(Self { by_name, otherwise })
    }

    /// The guess for a model that asks for `capabilities` and is served by `runtime`: that of a capability is closer to
    /// the model than that of the runtime, and of several capabilities' the one that comes to most counts.
    #[must_use]
    pub fn guess(&self, runtime: &str, capabilities: &[String], bytes: Bytes, instances: u32) -> Bytes {
        let named = |wanted: &str| self.by_name.iter().find(|(name, _)| name == wanted).map(|(_, guess)| *guess);
        let of = |guess: Guess| guess.of(bytes, instances);
        let largest = capabilities.iter().filter_map(|one| named(one.trim())).map(of).max();
        largest.unwrap_or_else(|| of(named(runtime).unwrap_or(self.otherwise)))
    }
}

impl Default for Guesses {
    fn default() -> Self {
        Self { by_name: Vec::new(), otherwise: Guess { percent: 300, constant: Bytes(64 << 20) } }
    }
}

impl fmt::Display for Guesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let write = |f: &mut fmt::Formatter<'_>, name: &str, guess: Guess| {
            write!(f, "{name}={}.{:02}+{}", guess.percent / 100, guess.percent % 100, guess.constant.0)
        };
        for (name, guess) in &self.by_name {
            write(f, name, *guess)?;
            f.write_str(", ")?;
        }
        write(f, OTHERWISE, self.otherwise)
    }
}

/// A factor with at most two decimals, in percent.
fn percent(factor: &str) -> Option<u32> {
    let (whole, fraction) = factor.split_once('.').unwrap_or((factor, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 2 {
        return None;
    }
    let hundredths: u32 = format!("{fraction:0<2}").parse().ok()?;
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths)
}

/// Memory that a replica's server keeps although nothing that is loaded accounts for it: what it has beyond its
/// baseline and the copies in it.
#[must_use]
pub const fn leaked(has: Bytes, baseline: Bytes, resident: Bytes) -> Bytes {
    has.saturating_sub(baseline).saturating_sub(resident)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(bytes: u64) -> Resources {
        Resources::primary(Bytes(bytes))
    }

    #[test]
    fn the_larger_of_declared_and_measured_counts_unless_the_operator_says_otherwise() {
        let counts = |trust, declared: u64, measured: u64| {
            let measured = size(measured);
            let known = Known { declared: Some(Bytes(declared)), measured: Some(&measured), estimated: None };
            known.counts(trust, Bytes(1000)).primary.0
        };
        assert_eq!((counts(Trust::Larger, 10, 20), counts(Trust::Larger, 20, 10)), (20, 20));
        assert_eq!((counts(Trust::Measured, 10, 20), counts(Trust::Measured, 20, 10)), (20, 10));
        assert_eq!((counts(Trust::Declared, 10, 20), counts(Trust::Declared, 20, 10)), (10, 20));
    }

    #[test]
    fn a_measurement_beats_an_estimate_and_that_the_default() {
        let (measured, estimated) = (size(30), size(40));
        let known = Known { declared: None, measured: Some(&measured), estimated: Some(&estimated) };
        assert_eq!(known.counts(Trust::Declared, Bytes(50)), measured);
        assert_eq!(Known { measured: None, ..known }.counts(Trust::Larger, Bytes(50)), estimated);
        assert_eq!(Known::default().counts(Trust::Larger, Bytes(50)), size(50));
    }

    #[test]
    fn guesses_are_read_and_the_closest_one_is_taken() {
        let guesses = Guesses::parse("builtin=2.5+16Mi, sklearn=4+100, *=3+0").expect("sound");
        let guess = |runtime, capabilities: &[&str]| {
            let capabilities: Vec<String> = capabilities.iter().map(|one| (*one).to_owned()).collect();
            guesses.guess(runtime, &capabilities, Bytes(1000), 2).0
        };
        assert_eq!(guess("builtin", &["onnx"]), 2 * (2500 + (16 << 20)));
        assert_eq!(guess("mlserver", &["sklearn"]), 2 * 4100);
        assert_eq!(guess("mlserver", &[]), 2 * 3000);
        assert_eq!(Guesses::parse(&guesses.to_string()), Some(guesses));
        for bad in [
            "",
            "builtin=2+1",
            "*=2",
            "*=x+1",
            "*=1.234+1",
            "*=1+1, *=2+1",
            "a=1+1,a=1+1,*=1+1",
            "=1+1,*=1+1",
            "*=-1+1",
        ] {
            assert_eq!(Guesses::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_difference_counts_from_the_factor_on_whichever_is_larger() {
        let mebibytes = |declared: u64, measured: u64| differ(Bytes(declared << 20), Bytes(measured << 20), 200);
        assert!(!mebibytes(100, 200) && !mebibytes(200, 100));
        assert!(mebibytes(100, 201) && mebibytes(201, 100));
        assert!(!mebibytes(16, 0) && mebibytes(17, 0), "a few megabytes are no difference");
    }

    proptest! {
        #[test]
        fn nothing_ever_counts_for_nothing(
            declared in proptest::option::of(0..3_u64), measured in proptest::option::of(0..3_u64),
            estimated in proptest::option::of(0..3_u64), trust in 0..3_usize, bytes in 0..3_u64, default in 0..2_u64,
        ) {
            let (measured, estimated) = (measured.map(size), estimated.map(size));
            let known = Known {
                declared: declared.map(Bytes), measured: measured.as_ref(), estimated: estimated.as_ref(),
            };
            prop_assert!(!known.counts(Trust::ALL[trust], Bytes(default)).is_zero());
            let guess = Guess { percent: 0, constant: Bytes::ZERO };
            prop_assert!(guess.of(Bytes(bytes), 0) > Bytes::ZERO);
        }
    }
}
