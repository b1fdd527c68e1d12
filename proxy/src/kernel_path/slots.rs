//! Entries of a kernel table: which are free, and which a predecessor has left.

use std::collections::HashMap;
use std::hash::Hash;

/// Indices from 1 on. An entry that a former process has left keeps its index, and so its counters, for whoever asks for
/// the same key.
#[derive(Debug)]
pub(super) struct Slots<K> {
    free: Vec<u32>,
    left: HashMap<K, u32>,
}

impl<K: Hash + Eq> Slots<K> {
    /// Of a table with so many entries. `key` tells whose an entry is; none: nobody's.
    pub(super) fn new(entries: u32, key: impl Fn(u32) -> Option<K>) -> Self {
        let mut this = Self { free: Vec::new(), left: HashMap::new() };
        for index in (1..entries).rev() {
            match key(index) {
                // The highest of two with one key is dropped: it can only be one that was being given back.
                Some(key) => {
                    if let Some(other) = this.left.insert(key, index) {
                        this.free.push(other);
                    }
                }
                None => this.free.push(index),
            }
        }
        this
    }

    /// An entry for this key; none when there is no room.
    pub(super) fn take(&mut self, key: &K) -> Option<u32> {
        self.left.remove(key).or_else(|| self.free.pop())
    }

    /// Whether a former process has left some that nobody has asked for.
    pub(super) fn are_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// The entry is nobody's any more.
    pub(super) fn give_back(&mut self, index: u32) {
        self.free.push(index);
    }

    /// Those that a former process has left, that nobody has asked for, and that `is_over` says are not in use: they are
    /// free from now on.
    pub(super) fn reclaim(&mut self, mut is_over: impl FnMut(u32) -> bool) {
        let free = &mut self.free;
        self.left.retain(|_, index| {
            let over = is_over(*index);
            if over {
                free.push(*index);
            }
            !over
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_goes_to_whom_it_belonged() {
        let mut slots = Slots::new(5, |index| (index == 3).then_some("old"));
        assert_eq!(slots.take(&"new"), Some(1));
        assert_eq!(slots.take(&"old"), Some(3));
        assert_eq!((slots.take(&"a"), slots.take(&"b"), slots.take(&"c")), (Some(2), Some(4), None));
        slots.give_back(3);
        assert_eq!(slots.take(&"c"), Some(3));
    }

    #[test]
    fn what_nobody_asks_for_is_free_when_it_is_over() {
        let mut slots = Slots::new(4, Some);
        slots.reclaim(|index| index == 2);
        assert_eq!((slots.take(&9), slots.take(&1), slots.take(&8)), (Some(2), Some(1), None));
    }
}
