//! What a placement found: kept as data, printed by whoever is asked.

/// Why no replica could be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unplaced {}
