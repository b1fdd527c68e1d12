//! Choosing a filter chain by source address in connect(2): the layout, and the choice itself.
//!
//! Each filter chain is a service of its own. A listener with several of them has one more, whose block is a *selector*:
//! a [`ServiceHead`] without clusters, then [`RANGE_WORDS`] words for each range of addresses,
//! in ascending order. A range ends where the next one starts; the first one starts at `::`.

use crate::Addr;
use crate::balance::{ServiceHead, Table};

/// Ranges of a selector. The search takes a step for each bit.
pub const MAX_RANGES: u32 = 1 << 10;
/// Words of a range.
pub const RANGE_WORDS: u32 = 3;

/// Sources with the same filter chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first of them.
    pub first: Addr,
    /// Index of the service; 0: the proxy takes them.
    pub service: u32,
}

impl Range {
    /// As words.
    pub const fn encode(self) -> [u64; RANGE_WORDS as usize] {
        let [upper, lower] = self.first.halves();
        [upper, lower, self.service as u64]
    }
}

/// The service for connections from this address ([`Addr::halves`]); 0: the proxy takes them. None: the block is no
/// selector.
#[inline(always)]
pub fn select(table: &impl Table, [upper, lower]: [u64; 2]) -> Option<u32> {
    let ranges = ServiceHead::decode(table.word(0)?).total;
    // The last range that does not start after the address.
    let (mut low, mut high) = (0, ranges);
    for _ in 0..MAX_RANGES.ilog2() {
        let middle = u32::midpoint(low, high);
        if middle == low {
            break;
        }
        let at = 1 + middle * RANGE_WORDS;
        let start = table.word(at)?;
        // The lower half counts where the upper ones are equal.
        let is_after = if start == upper { table.word(at + 1)? > lower } else { start > upper };
        if is_after {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(table.word(1 + low * RANGE_WORDS + 2)? as u32)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::net::IpAddr;
    use std::{vec, vec::Vec};

    use super::*;

    struct Words(Vec<u64>);

    impl Table for Words {
        fn word(&self, offset: u32) -> Option<u64> {
            self.0.get(offset as usize).copied()
        }
        fn random(&self) -> u32 {
            unreachable!("nothing is drawn")
        }
        fn turn(&self) -> u32 {
            unreachable!("nobody takes turns")
        }
        fn active(&self, _host: u32) -> u64 {
            unreachable!("nobody is compared")
        }
        fn hash(&self) -> u64 {
            unreachable!("nothing is hashed")
        }
    }

    fn selector(ranges: &[(&str, u32)]) -> Words {
        let mut words = vec![ServiceHead { clusters: 0, total: ranges.len() as u32 }.encode()];
        for (first, service) in ranges {
            let first = first.parse::<IpAddr>().unwrap().into();
            words.extend(Range { first, service: *service }.encode());
        }
        assert_eq!(ServiceHead::decode(words[0]).words() as usize, words.len());
        Words(words)
    }

    fn found(table: &Words, source: &str) -> Option<u32> {
        select(table, Addr::from(source.parse::<IpAddr>().unwrap()).halves())
    }

    #[test]
    fn a_range_goes_from_its_first_address_to_the_next_range() {
        let table = selector(&[
            ("::", 1),
            ("::5", 2),
            ("10.0.0.0", 3),
            ("10.0.0.1", 4),
            ("10.0.1.0", 0),
            ("2001:db8::", 5),
            ("2001:db8:0:1::", 6),
        ]);
        for (source, service) in [
            ("::", 1),
            ("::4", 1),
            ("::5", 2),
            ("9.255.255.255", 2),
            ("10.0.0.0", 3),
            ("10.0.0.1", 4),
            ("10.0.0.255", 4),
            ("10.0.1.0", 0),
            ("255.255.255.255", 0),
            ("2001:db7::ffff", 0),
            ("2001:db8::", 5),
            ("2001:db8::ffff:0:0:1", 5),
            ("2001:db8:0:1::", 6),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 6),
        ] {
            assert_eq!(found(&table, source), Some(service), "{source}");
        }
    }

    #[test]
    fn every_range_is_found_however_many_there_are() {
        for count in (1..40).chain([MAX_RANGES - 1, MAX_RANGES]) {
            let mut words = vec![ServiceHead { clusters: 0, total: count }.encode()];
            let first = |range: u32| Addr::from_words([0, 0, (range * 2).to_be(), 0]);
            words.extend(
                (0..count).flat_map(|range| Range { first: first(range), service: range + 1 }.encode()),
            );
            let table = Words(words);
            for range in 0..count {
                let [upper, lower] = first(range).halves();
                assert_eq!(select(&table, [upper, lower]), Some(range + 1));
                assert_eq!(select(&table, [upper, lower + (1 << 33) - 1]), Some(range + 1));
            }
        }
    }

    #[test]
    fn a_broken_block_is_none() {
        let mut table = selector(&[("::", 1), ("::5", 2)]);
        table.0.truncate(4);
        assert_eq!(found(&table, "::9"), None);
        table.0.clear();
        assert_eq!(found(&table, "::9"), None);
    }
}
