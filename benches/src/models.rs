//! The models that are asked for, and how often each.

use std::sync::Arc;

/// How requests spread over the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Each as often as any other.
    Uniform,
    /// The k-th most wanted 1/k as often as the first.
    Zipf,
}

impl Spread {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
        }
    }
}

/// As many requests before the choices begin anew.
const CHOICES: usize = 1 << 17;

/// The name of the model with this number.
pub fn name(number: usize) -> String {
    format!("model-{number:06}")
}

/// Which models are asked for, one after another.
#[derive(Clone, Debug)]
pub struct Picks {
    names: Arc<[String]>,
    order: Arc<[u32]>,
}

impl Picks {
    /// Choices among `count` models, the same ones in every run.
    pub fn new(count: usize, spread: Spread) -> Self {
        let mut random = Random(0x5eed);
        // Who is wanted most has nothing to do with the order of the names.
        let mut ranks: Vec<u32> = (0..count as u32).collect();
        for at in (1..count).rev() {
            ranks.swap(at, random.below(at as u64 + 1) as usize);
        }
        let weights: Vec<f64> = (0..count)
            .scan(0.0, |sum, rank| {
                *sum += match spread {
                    Spread::Uniform => 1.0,
                    Spread::Zipf => 1.0 / (rank + 1) as f64,
                };
                Some(*sum)
            })
            .collect();
        let all = weights.last().copied().unwrap_or_default();
        let order = (0..CHOICES).map(|_| {
            let drawn = random.share() * all;
            ranks[weights.partition_point(|below| *below <= drawn).min(count - 1)]
        });
        Self { order: order.collect(), names: (0..count).map(name).collect() }
    }

    /// The model of this turn.
    pub fn get(&self, turn: usize) -> &str {
        &self.names[self.number(turn)]
    }

    /// The number of the model of this turn.
    pub fn number(&self, turn: usize) -> usize {
        self.order[turn % self.order.len()] as usize
    }
}

/// The same numbers in every run (SplitMix64).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// From 0 to below 1.
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn counts(spread: Spread) -> Vec<usize> {
        let picks = Picks::new(100, spread);
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for turn in 0..CHOICES {
            *counts.entry(picks.get(turn)).or_default() += 1;
        }
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn uniform_is_even_and_zipf_is_not() {
        let even = counts(Spread::Uniform);
        assert_eq!(even.len(), 100);
        assert!(even[0] < even[99] * 2, "{even:?}");
        let zipf = counts(Spread::Zipf);
        let ratio = zipf[0] as f64 / zipf[9] as f64;
        assert!((8.0..12.0).contains(&ratio), "the first is asked for ten times as often as the tenth, not {ratio}");
    }
}
