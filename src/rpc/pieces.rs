//! What is much, sent in pieces.

/// Cuts `all` into pieces of at most `most`, and says of each whether it is the last. A piece is taken out only when it is
/// asked for, so that neither making messages of all nor letting go of it is one long piece of work. Of nothing there is one
/// piece, without anything.
pub(super) fn pieces<T>(all: Vec<T>, most: usize) -> impl Iterator<Item = (Vec<T>, bool)> {
    let (mut rest, mut over) = (all.into_iter(), false);
    std::iter::from_fn(move || {
        if over {
            return None;
        }
        let piece = rest.by_ref().take(most).collect();
        over = rest.len() == 0;
        Some((piece, over))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn all_of_it_comes_a_piece_at_a_time_and_in_order() {
        for count in [0, 1, 9, 10, 11, 30] {
            let all: Vec<_> = (0..count).map(Arc::new).collect();
            let mut cut = pieces(all.clone(), 10);
            let mut told = Vec::new();
            loop {
                let held = all.iter().filter(|one| Arc::strong_count(one) > 1).count();
                assert_eq!(held, count - told.len(), "what has not come yet is all that is held");
                let Some((piece, last)) = cut.next() else { break };
                assert!(piece.len() <= 10);
                told.extend(piece.iter().map(|one| **one));
                assert_eq!(last, told.len() == count);
            }
            assert!(told.into_iter().eq(0..count));
        }
    }
}
