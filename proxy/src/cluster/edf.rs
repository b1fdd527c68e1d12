//! Earliest deadline first: each pick takes the entry whose deadline is next and sets its following one a step of
//! 1 / weight later, which spreads the picks of every entry evenly over time. Ties go to whoever waited longest.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A schedule over indices of a list.
#[derive(Clone, Debug)]
pub(super) struct Edf<D: Ord>(BinaryHeap<Reverse<Entry<D>>>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry<D> {
    deadline: D,
    index: u32,
}

impl<D: Ord> Edf<D> {
    /// A schedule of the entries 0, 1, … with their first deadlines.
    pub(super) fn new(deadlines: impl IntoIterator<Item = D>) -> Self {
        let entry = |(index, deadline)| Reverse(Entry { deadline, index: index as u32 });
        Self(deadlines.into_iter().enumerate().map(entry).collect())
    }

    /// The index that is due. `next` gives its following deadline from its index and the deadline it had.
    pub(super) fn pick(&mut self, next: impl FnOnce(u32, &D) -> D) -> Option<u32> {
        // Changed in place and re-sorted when `top` is dropped: one sift down instead of a removal and an insertion.
        let mut top = self.0.peek_mut()?;
        let Reverse(entry) = &mut *top;
        entry.deadline = next(entry.index, &entry.deadline);
        Some(entry.index)
    }
}

/// `picks / weight` as an exact fraction, so that shares stay exact however long a schedule runs.
///
/// On a tie the lighter one goes first: its turns are further apart, so it has waited longer. That makes the order
/// of all turns a fixed one, whatever the schedule's start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    picks: u64,
    weight: u32,
}

impl Turn {
    fn cross(self, other: Self) -> (u128, u128) {
        (u128::from(self.picks) * u128::from(other.weight), u128::from(other.picks) * u128::from(self.weight))
    }

    /// The deadline after this one.
    pub(super) fn following(self) -> Self {
        Self { picks: self.picks + 1, ..self }
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> Ordering {
        let (a, b) = self.cross(*other);
        a.cmp(&b).then(self.weight.cmp(&other.weight))
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}

/// The weighted round robin over entries with these weights (at least 1), as it stands after `picks` picks. Workers
/// start at different places, so that together they don't send their first connections to one endpoint.
///
/// After P picks each entry was picked at least ⌊P·w/W⌋ times; those are set at once and only the rest, fewer
/// than there are entries, is played.
pub(super) fn weighted(weights: &[u32], picks: u64) -> Edf<Turn> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let floor = |weight: u32| (u128::from(picks) * u128::from(weight)).checked_div(total).unwrap_or(0) as u64;
    let done: u64 = weights.iter().map(|weight| floor(*weight)).sum();
    let mut edf = Edf::new(weights.iter().map(|weight| Turn { picks: floor(*weight) + 1, weight: *weight }));
    for _ in done..picks {
        edf.pick(|_, turn| turn.following());
    }
    edf
}

/// A deadline on a clock that weights which change from pick to pick advance (LEAST_REQUEST).
#[derive(Clone, Copy, Debug)]
pub(super) struct Instant(pub(super) f64);

impl Ord for Instant {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Instant {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Instant {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Instant {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn picks(edf: &mut Edf<Turn>, count: u64) -> Vec<u32> {
        (0..count).map(|_| edf.pick(|_, turn| turn.following()).unwrap()).collect()
    }

    /// Weighted round robin as it is defined: whoever's next turn is soonest, first in line on a tie.
    fn naive(weights: &[u32], count: u64) -> Vec<u32> {
        let mut turns: Vec<(u64, u64)> = (0..weights.len()).map(|index| (1, index as u64)).collect();
        let mut out = Vec::new();
        for pick in 0..count {
            let mut best = 0;
            for index in 1..weights.len() {
                let (a, b) = (
                    u128::from(turns[index].0) * u128::from(weights[best]),
                    u128::from(turns[best].0) * u128::from(weights[index]),
                );
                if a < b || (a == b && turns[index].1 < turns[best].1) {
                    best = index;
                }
            }
            turns[best] = (turns[best].0 + 1, weights.len() as u64 + pick);
            out.push(best as u32);
        }
        out
    }

    fn gcd(a: u64, b: u64) -> u64 {
        if b == 0 { a } else { gcd(b, a % b) }
    }

    fn period(weights: &[u32]) -> (u64, u64) {
        let divisor = weights.iter().fold(0, |sum, weight| gcd(sum, u64::from(*weight)));
        (weights.iter().map(|weight| u64::from(*weight)).sum::<u64>() / divisor, divisor)
    }

    #[test]
    fn picks_are_spread_and_not_bunched() {
        assert_eq!(picks(&mut weighted(&[2, 1, 1], 0), 4), [0, 1, 2, 0]);
        assert_eq!(picks(&mut weighted(&[5, 1], 0), 12), [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(Edf::<Turn>::new([]).pick(|_, turn| *turn), None);
    }

    #[test]
    fn large_weights_and_late_starts_stay_exact() {
        let weights = [u32::MAX, 1, u32::MAX / 3];
        let mut edf = weighted(&weights, u64::MAX / 2);
        assert_eq!(picks(&mut edf, 1000).iter().filter(|index| **index == 1).count(), 0);
    }

    proptest! {
        #[test]
        fn follows_the_definition(weights in prop::collection::vec(1..40u32, 1..8), count in 1..300u64) {
            prop_assert_eq!(picks(&mut weighted(&weights, 0), count), naive(&weights, count));
        }

        #[test]
        fn shares_are_exact_over_a_period_from_any_start(
            weights in prop::collection::vec(1..40u32, 1..8),
            start in 0..500u64,
        ) {
            let (period, divisor) = period(&weights);
            let mut edf = weighted(&weights, start);
            for _ in 0..3 {
                let mut shares = vec![0u64; weights.len()];
                for index in picks(&mut edf, period) {
                    shares[index as usize] += 1;
                }
                let expected: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) / divisor).collect();
                prop_assert_eq!(shares, expected);
            }
        }

        #[test]
        fn nobody_waits_longer_than_its_share_allows(
            weights in prop::collection::vec(1..1000u32, 1..8),
            start in 0..10_000u64,
        ) {
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let mut edf = weighted(&weights, start);
            let drawn = picks(&mut edf, total.min(3000) * 2);
            for (index, weight) in weights.iter().enumerate() {
                let bound = total.div_ceil(u64::from(*weight)) as usize + weights.len();
                let mut gap = 0;
                for pick in &drawn {
                    gap = if *pick as usize == index { 0 } else { gap + 1 };
                    prop_assert!(gap <= bound, "{} waited {} of {}", index, gap, bound);
                }
            }
        }

        #[test]
        fn a_jump_ahead_is_where_playing_leads(
            weights in prop::collection::vec(1..40u32, 1..8),
            start in 0..300u64,
        ) {
            let mut played = weighted(&weights, 0);
            picks(&mut played, start);
            prop_assert_eq!(picks(&mut weighted(&weights, start), 100), picks(&mut played, 100));
        }
    }
}
