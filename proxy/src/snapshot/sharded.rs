//! A map that is cheap to copy, and cheap to change after it was copied.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// How many parts there are. A change after a copy copies one part, and this many pointers: with 10,000 entries some
/// 40 entries and 256 pointers.
const SHARDS: usize = 256;

/// A hash map in parts that copies share until they differ.
#[derive(Clone, Debug)]
pub(super) struct Sharded<K, V> {
    shards: Arc<Vec<Arc<HashMap<K, V>>>>,
    hasher: RandomState,
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        // All of them the same empty one: the first entry of each makes its own.
        Self { shards: Arc::new(vec![Arc::default(); SHARDS]), hasher: RandomState::new() }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Sharded<K, V> {
    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.index(key)].get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        let index = self.index(&key);
        Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[index]).insert(key, value);
    }

    /// Copies nothing if there is no such entry.
    pub(super) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        let index = self.index(key);
        if self.shards[index].contains_key(key) {
            Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[index]).remove(key);
        }
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    fn index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The low bits choose the bucket within the part.
        (self.hasher.hash_one(key) >> 32) as usize % SHARDS
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_map_and_copies_are_independent(
            changes in prop::collection::vec((0u16..300, prop::option::of(any::<u8>())), 0..600),
            copy_at in 0usize..600,
        ) {
            let (mut sharded, mut plain) = (Sharded::default(), HashMap::new());
            let mut copy = None;
            for (at, (key, value)) in changes.into_iter().enumerate() {
                if at == copy_at {
                    copy = Some((sharded.clone(), plain.clone()));
                }
                match value {
                    Some(value) => {
                        sharded.insert(key, value);
                        plain.insert(key, value);
                    }
                    None => {
                        sharded.remove(&key);
                        plain.remove(&key);
                    }
                }
            }
            for (sharded, plain) in copy.iter().map(|(s, p)| (s, p)).chain([(&sharded, &plain)]) {
                for key in 0..300u16 {
                    prop_assert_eq!(sharded.get(&key), plain.get(&key));
                }
                prop_assert_eq!(sharded.values().count(), plain.len());
            }
        }
    }

    #[test]
    fn a_copy_shares_all_but_what_changed() {
        let mut map = Sharded::default();
        (0..5_000u32).for_each(|key| map.insert(key, ()));
        let copy = map.clone();
        map.insert(0, ());
        let shared = map.shards.iter().zip(copy.shards.iter()).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, SHARDS - 1);
    }
}
