//! An ordered set whose every subtree carries a summary of what is in it, so that "the first one that has room"
//! is found without looking at those before it that have none.
//!
//! A treap whose priorities are hashes of the keys: its shape follows from its content alone, so equal sets
//! are equal values and cost the same to search, whatever happened to them before.

use std::{
    cmp::Ordering,
    hash::{DefaultHasher, Hash, Hasher},
};

/// What a subtree knows of its items.
pub(super) trait Summary: Clone {
    /// Takes in what another part of the subtree holds.
    fn absorb(&mut self, other: &Self);
}

/// An ordered set of keys, each with a value that sums up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tree<K, S> {
    root: Link<K, S>,
    len: u32,
}

type Link<K, S> = Option<Box<Node<K, S>>>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node<K, S> {
    key: K,
    own: S,
    /// Of this node and everything below it.
    total: S,
    priority: u64,
    left: Link<K, S>,
    right: Link<K, S>,
}

impl<K, S> Default for Tree<K, S> {
    fn default() -> Self {
        Self { root: None, len: 0 }
    }
}

impl<K, S> Tree<K, S> {
    /// How many items it holds.
    pub(super) const fn len(&self) -> u32 {
        self.len
    }
}

impl<K: Ord + Hash, S: Summary> Tree<K, S> {
    /// The summary of all items.
    pub(super) fn total(&self) -> Option<&S> {
        self.root.as_ref().map(|root| &root.total)
    }

    /// The first key.
    pub(super) fn first(&self) -> Option<&K> {
        let mut node = self.root.as_deref()?;
        while let Some(left) = node.left.as_deref() {
            node = left;
        }
        Some(&node.key)
    }

    /// Whether `key` is in it.
    pub(super) fn contains(&self, key: &K) -> bool {
        let mut link = self.root.as_deref();
        while let Some(node) = link {
            link = match key.cmp(&node.key) {
                Ordering::Equal => return true,
                Ordering::Less => node.left.as_deref(),
                Ordering::Greater => node.right.as_deref(),
            };
        }
        false
    }

    /// Adds `key`, which is not in it.
    pub(super) fn insert(&mut self, key: K, own: S) {
        // `DefaultHasher::new` has fixed keys: the same key hashes the same in every process.
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let priority = hasher.finish();
        let node = Box::new(Node { key, total: own.clone(), own, priority, left: None, right: None });
        self.root = Some(insert(self.root.take(), node));
        self.len += 1;
    }

    /// Takes `key` out, and says whether it was there.
    pub(super) fn remove(&mut self, key: &K) -> bool {
        let (root, removed) = remove(self.root.take(), key);
        self.root = root;
        self.len -= u32::from(removed);
        removed
    }

    /// Takes in all items of `other`, which has none in common with this.
    pub(super) fn unite(&mut self, other: Self) {
        self.root = unite(self.root.take(), other.root);
        self.len += other.len;
    }

    /// Branch and bound. `bound(summary, low)` is no greater than anything that `leaf` would make of the items of
    /// a subtree with that summary whose keys are all at least `low`, or nothing when no item there will do.
    /// `leaf` puts a better answer into `best`. The subtree with the best bound goes first.
    pub(super) fn search<B: Ord>(
        &self,
        best: &mut Option<B>,
        bound: &dyn Fn(&S, &K) -> Option<B>,
        leaf: &mut dyn FnMut(&K, &S, &mut Option<B>),
    ) {
        if let (Some(root), Some(low)) = (self.root.as_deref(), self.first())
            && let Some(promise) = bound(&root.total, low)
            && improves(&promise, best)
        {
            root.search(low, best, bound, leaf);
        }
    }

    /// The first key after `after` whose item `admits` accepts. What `admits` refuses of a subtree's summary it
    /// must refuse of every item in it.
    pub(super) fn first_after(&self, after: Option<&K>, admits: &dyn Fn(&S) -> bool) -> Option<&K> {
        self.root.as_deref()?.first_after(after, admits)
    }

    /// How many items `leaf` counts, up to `limit`, among those whose subtrees `admits` accepts.
    pub(super) fn count(&self, limit: u32, admits: &dyn Fn(&S) -> bool, leaf: &mut dyn FnMut(&K, &S) -> bool) -> u32 {
        let mut found = 0;
        if let Some(root) = self.root.as_deref() {
            root.count(limit, &mut found, admits, leaf);
        }
        found
    }
}

/// Whether something as good as `promise` would be better than `best`.
fn improves<B: Ord>(promise: &B, best: &Option<B>) -> bool {
    best.as_ref().is_none_or(|best| promise < best)
}

impl<K: Ord, S: Summary> Node<K, S> {
    fn refresh(&mut self) {
        self.total.clone_from(&self.own);
        for child in [self.left.as_deref(), self.right.as_deref()].into_iter().flatten() {
            self.total.absorb(&child.total);
        }
    }

    fn search<B: Ord>(
        &self,
        low: &K,
        best: &mut Option<B>,
        bound: &dyn Fn(&S, &K) -> Option<B>,
        leaf: &mut dyn FnMut(&K, &S, &mut Option<B>),
    ) {
        #[derive(Clone, Copy)]
        enum Step {
            Left,
            Own,
            Right,
        }
        let left = self.left.as_deref().and_then(|left| bound(&left.total, low));
        // Everything on the right comes after this key, so the key bounds it.
        let right = self.right.as_deref().and_then(|right| bound(&right.total, &self.key));
        let mut steps = [(left, Step::Left), (bound(&self.own, &self.key), Step::Own), (right, Step::Right)];
        steps.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (promise, step) in steps {
            let Some(promise) = promise else { continue };
            if !improves(&promise, best) {
                continue;
            }
            match step {
                Step::Own => leaf(&self.key, &self.own, best),
                Step::Left => {
                    if let Some(left) = self.left.as_deref() {
                        left.search(low, best, bound, leaf);
                    }
                }
                Step::Right => {
                    if let Some(right) = self.right.as_deref() {
                        right.search(&self.key, best, bound, leaf);
                    }
                }
            }
        }
    }

    fn first_after(&self, after: Option<&K>, admits: &dyn Fn(&S) -> bool) -> Option<&K> {
        if !admits(&self.total) {
            return None;
        }
        if after.is_none_or(|after| *after < self.key) {
            if let Some(found) = self.left.as_deref().and_then(|left| left.first_after(after, admits)) {
                return Some(found);
            }
            if admits(&self.own) {
                return Some(&self.key);
            }
        }
        self.right.as_deref().and_then(|right| right.first_after(after, admits))
    }

    fn count(&self, limit: u32, found: &mut u32, admits: &dyn Fn(&S) -> bool, leaf: &mut dyn FnMut(&K, &S) -> bool) {
        if *found >= limit || !admits(&self.total) {
            return;
        }
        if admits(&self.own) && leaf(&self.key, &self.own) {
            *found += 1;
        }
        for child in [self.left.as_deref(), self.right.as_deref()].into_iter().flatten() {
            child.count(limit, found, admits, leaf);
        }
    }
}

fn insert<K: Ord, S: Summary>(link: Link<K, S>, mut new: Box<Node<K, S>>) -> Box<Node<K, S>> {
    let Some(mut node) = link else { return new };
    if above(&new, &node) {
        let (left, right) = split(Some(node), &new.key);
        new.left = left;
        new.right = right;
        new.refresh();
        return new;
    }
    if new.key < node.key {
        node.left = Some(insert(node.left.take(), new));
    } else {
        node.right = Some(insert(node.right.take(), new));
    }
    node.refresh();
    node
}

fn remove<K: Ord, S: Summary>(link: Link<K, S>, key: &K) -> (Link<K, S>, bool) {
    let Some(mut node) = link else { return (None, false) };
    let removed = match key.cmp(&node.key) {
        Ordering::Equal => return (merge(node.left.take(), node.right.take()), true),
        Ordering::Less => {
            let (left, removed) = remove(node.left.take(), key);
            node.left = left;
            removed
        }
        Ordering::Greater => {
            let (right, removed) = remove(node.right.take(), key);
            node.right = right;
            removed
        }
    };
    node.refresh();
    (Some(node), removed)
}

/// Whether `a` belongs above `b`; keys decide between equal hashes, so that the shape stays the content's.
fn above<K: Ord, S>(a: &Node<K, S>, b: &Node<K, S>) -> bool {
    (a.priority, &a.key) > (b.priority, &b.key)
}

/// What is before `key`, and what is after it.
fn split<K: Ord, S: Summary>(link: Link<K, S>, key: &K) -> (Link<K, S>, Link<K, S>) {
    let Some(mut node) = link else { return (None, None) };
    if node.key < *key {
        let (left, right) = split(node.right.take(), key);
        node.right = left;
        node.refresh();
        (Some(node), right)
    } else {
        let (left, right) = split(node.left.take(), key);
        node.left = right;
        node.refresh();
        (left, Some(node))
    }
}

/// One tree of two, every key of `left` being before every key of `right`.
fn merge<K: Ord, S: Summary>(left: Link<K, S>, right: Link<K, S>) -> Link<K, S> {
    match (left, right) {
        (None, other) | (other, None) => other,
        (Some(mut left), Some(mut right)) => {
            if above(&left, &right) {
                left.right = merge(left.right.take(), Some(right));
                left.refresh();
                Some(left)
            } else {
                right.left = merge(Some(left), right.left.take());
                right.refresh();
                Some(right)
            }
        }
    }
}

/// One tree of two that may lie within each other.
fn unite<K: Ord, S: Summary>(one: Link<K, S>, other: Link<K, S>) -> Link<K, S> {
    match (one, other) {
        (None, tree) | (tree, None) => tree,
        (Some(one), Some(other)) => {
            let (mut root, rest) = if above(&one, &other) { (one, other) } else { (other, one) };
            let (left, right) = split(Some(rest), &root.key);
            root.left = unite(root.left.take(), left);
            root.right = unite(root.right.take(), right);
            root.refresh();
            Some(root)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Most(u8);

    impl Summary for Most {
        fn absorb(&mut self, other: &Self) {
            self.0 = self.0.max(other.0);
        }
    }

    fn built<'a>(items: impl IntoIterator<Item = (&'a u16, &'a u8)>) -> Tree<u16, Most> {
        let mut tree = Tree::default();
        for (key, size) in items {
            tree.insert(*key, Most(*size));
        }
        tree
    }

    proptest! {
        #[test]
        fn it_answers_as_a_plain_map_does(
            steps in prop::collection::vec((any::<bool>(), 0_u16..64, any::<u8>()), 0..200),
            after in prop::option::of(0_u16..64),
            least: u8,
            limit in 0_u32..10,
        ) {
            let mut map = BTreeMap::new();
            let mut tree = Tree::default();
            for (add, key, size) in steps {
                if add && !map.contains_key(&key) {
                    map.insert(key, size);
                    tree.insert(key, Most(size));
                } else {
                    prop_assert_eq!(tree.remove(&key), map.remove(&key).is_some());
                }
            }
            prop_assert_eq!(&tree, &built(map.iter().rev()), "the shape follows from the content");
            prop_assert_eq!(tree.len() as usize, map.len());
            prop_assert!((0..64).all(|key| tree.contains(&key) == map.contains_key(&key)));
            prop_assert_eq!(tree.first(), map.keys().next());
            prop_assert_eq!(tree.total().map(|most| most.0), map.values().copied().max());
            let admits = |most: &Most| most.0 >= least;
            let fitting: Vec<u16> = map.iter().filter(|(_, size)| **size >= least).map(|(key, _)| *key).collect();
            let next = fitting.iter().find(|key| after.is_none_or(|after| **key > after));
            prop_assert_eq!(tree.first_after(after.as_ref(), &admits), next);
            let count = tree.count(limit, &admits, &mut |key, _| key % 2 == 0);
            let even = fitting.iter().filter(|key| **key % 2 == 0).count();
            prop_assert_eq!(count as usize, even.min(limit as usize));
            let mut best = None;
            tree.search(
                &mut best,
                &|most, low| admits(most).then_some(*low),
                &mut |key, _, best| if improves(key, best) { *best = Some(*key) },
            );
            prop_assert_eq!(best.as_ref(), fitting.first());
        }

        #[test]
        fn united_it_is_as_if_it_had_been_one(map in prop::collection::btree_map(any::<u16>(), any::<u8>(), 0..80)) {
            let (odd, even): (Vec<_>, Vec<_>) = map.iter().partition(|(key, _)| **key % 3 == 0);
            let mut tree = built(odd);
            tree.unite(built(even));
            prop_assert_eq!(tree, built(&map));
        }
    }
}
