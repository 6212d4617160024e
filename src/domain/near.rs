//! The known name nearest to one that is not known, so that a typing error is answered with its correction.
//!
//! The rule of this module: the work is bounded, however many models there are and whatever a client asks for.

use std::collections::BTreeSet;

use super::names::MAX_NAME;

/// Up to this many names are compared one by one.
const COMPARED: usize = 512;
/// Names longer than this are not corrected: the work grows with the square of their length.
const LONGEST: usize = 64;
/// A name that differs in more places than this is another name.
const FARTHEST: usize = 3;
const ALPHABET: &[u8; 37] = b"abcdefghijklmnopqrstuvwxyz0123456789-";

/// The names that there are.
pub trait Known {
    /// How many.
    fn count(&self) -> usize;
    /// Whether `name` is one of them.
    fn knows(&self, name: &str) -> bool;
    /// Calls `visit` with each, in any order.
    fn each(&self, visit: &mut dyn FnMut(&str));
}

/// The known name nearest to `name`. Of very many only those are found that are one edit away: all of these are tried.
#[must_use]
pub fn nearest(known: &impl Known, name: &str) -> Option<String> {
    if name.len() > LONGEST.min(MAX_NAME) || !name.is_ascii() {
        return None;
    }
    if known.count() > COMPARED {
        return one_edit_away(name).into_iter().find(|candidate| known.knows(candidate));
    }
    let mut best: Option<(usize, String)> = None;
    known.each(&mut |known| {
        if known.len().abs_diff(name.len()) <= FARTHEST {
            let found = (strsim::osa_distance(name, known), known);
            if found.0 <= FARTHEST && best.as_ref().is_none_or(|(far, near)| found < (*far, near.as_str())) {
                best = Some((found.0, known.to_owned()));
            }
        }
    });
    // Three letters off in a name of four is a guess, not a correction.
    best.filter(|(far, near)| far * 2 <= near.len()).map(|(_, near)| near)
}

/// Every name that one insertion, deletion, change or swap makes of `name`; some 80 for each letter.
fn one_edit_away(name: &str) -> BTreeSet<String> {
    let mut edits = BTreeSet::new();
    for at in 0..=name.len() {
        let (before, after) = name.split_at(at);
        let rest = after.get(1..);
        if let Some(rest) = rest {
            edits.insert(format!("{before}{rest}"));
        }
        if after.len() > 1 {
            edits.insert(format!("{before}{}{}{}", &after[1..2], &after[..1], &after[2..]));
        }
        for letter in ALPHABET.iter().map(|letter| char::from(*letter)) {
            edits.insert(format!("{before}{letter}{after}"));
            if let Some(rest) = rest {
                edits.insert(format!("{before}{letter}{rest}"));
            }
        }
    }
    edits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_all_there_and_not_too_many() {
        let edits = one_edit_away("iris");
        for near in ["irs", "iriss", "irjs", "riis", "virus".get(1..).unwrap_or_default()] {
            assert_eq!(edits.contains(near), strsim::osa_distance("iris", near) == 1, "{near}");
        }
        assert!(edits.iter().all(|near| strsim::osa_distance("iris", near) <= 1));
        assert!(one_edit_away(&"a".repeat(LONGEST)).len() < 5000);
    }
}
