//! Room for blocks. What was replaced is not used again before every program that may still read it has ended.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tidegate_common::FIRST_BLOCK;

/// How long a block that was replaced is left alone. A program runs for a microsecond; one that is held up for seconds
/// notices that its block was replaced.
const REST: Duration = Duration::from_secs(2);

/// A block: where it starts, and its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) start: u32,
    pub(super) len: u32,
}

/// First fit; neighbours that are free are one.
#[derive(Debug)]
pub(super) struct Arena {
    /// Length by start.
    free: BTreeMap<u32, u32>,
    resting: VecDeque<(Instant, Block)>,
}

impl Arena {
    /// All of it is free, except what is before [`FIRST_BLOCK`], and what a predecessor has in use.
    pub(super) fn new(words: u32, in_use: impl IntoIterator<Item = Block>) -> Self {
        let mut used: Vec<Block> = in_use.into_iter().collect();
        used.sort_unstable_by_key(|block| block.start);
        let mut this = Self { free: BTreeMap::new(), resting: VecDeque::new() };
        let mut from = FIRST_BLOCK;
        for block in used {
            if block.start > from {
                this.free.insert(from, block.start - from);
            }
            from = from.max(block.start.saturating_add(block.len));
        }
        if words > from {
            this.free.insert(from, words - from);
        }
        this
    }

    /// Room for so many words; none when there isn't any.
    pub(super) fn allocate(&mut self, len: u32, now: Instant) -> Option<Block> {
        self.wake(now);
        let (start, room) =
            self.free.iter().find(|(_, room)| **room >= len).map(|(at, room)| (*at, *room))?;
        self.free.remove(&start);
        if room > len {
            self.free.insert(start + len, room - len);
        }
        Some(Block { start, len })
    }

    /// Nobody finds it from now on.
    pub(super) fn retire(&mut self, block: Block, now: Instant) {
        self.retire_all([block], now);
    }

    /// The same for all of these.
    pub(super) fn retire_all(&mut self, blocks: impl IntoIterator<Item = Block>, now: Instant) {
        self.resting.extend(blocks.into_iter().map(|block| (now, block)));
    }

    /// It was never found by anybody.
    pub(super) fn give_back(&mut self, block: Block) {
        let Block { mut start, mut len } = block;
        if let Some((before, room)) = self.free.range(..start).next_back().map(|(at, room)| (*at, *room))
            && before + room == start
        {
            self.free.remove(&before);
            (start, len) = (before, len + room);
        }
        if let Some(room) = self.free.remove(&(start + len)) {
            len += room;
        }
        self.free.insert(start, len);
    }

    fn wake(&mut self, now: Instant) {
        while let Some((since, block)) = self.resting.front().copied()
            && now.saturating_duration_since(since) >= REST
        {
            self.resting.pop_front();
            self.give_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_blocks_rest_before_they_are_used_again() {
        let now = Instant::now();
        let mut arena = Arena::new(FIRST_BLOCK + 10, []);
        let a = arena.allocate(5, now).unwrap();
        let b = arena.allocate(5, now).unwrap();
        assert_eq!((a.start, b.start), (FIRST_BLOCK, FIRST_BLOCK + 5));
        assert_eq!(arena.allocate(1, now), None);
        arena.retire(a, now);
        assert_eq!(arena.allocate(1, now + REST / 2), None);
        arena.retire(b, now + REST / 2);
        assert_eq!(arena.allocate(5, now + REST), Some(a));
        assert_eq!(arena.allocate(5, now + REST), None);
        assert_eq!(arena.allocate(5, now + 2 * REST), Some(b));
    }

    #[test]
    fn neighbours_are_joined_in_any_order() {
        let now = Instant::now();
        for order in [[0_usize, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]] {
            let mut arena = Arena::new(FIRST_BLOCK + 30, []);
            let blocks = [10, 10, 10].map(|len| arena.allocate(len, now).unwrap());
            for i in order {
                arena.give_back(blocks[i]);
            }
            assert_eq!(arena.allocate(30, now), Some(Block { start: FIRST_BLOCK, len: 30 }));
        }
    }

    #[test]
    fn what_a_predecessor_uses_is_taken() {
        let used = [Block { start: 20, len: 5 }, Block { start: 4, len: 6 }];
        let mut arena = Arena::new(30, used);
        let now = Instant::now();
        let mut got: Vec<_> =
            std::iter::from_fn(|| arena.allocate(1, now)).map(|block| block.start).collect();
        got.sort_unstable();
        let want: Vec<u32> = (FIRST_BLOCK..4).chain(10..20).chain(25..30).collect();
        assert_eq!(got, want);
    }
}
