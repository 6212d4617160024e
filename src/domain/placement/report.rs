//! What a placement found: kept as data, printed by whoever is asked.

/// Why no replica could be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unplaced {}

impl Unplaced {
    /// One sentence.
    #[must_use]
    pub fn summary(&self) -> String {
        "no replica fits".to_owned()
    }
}
