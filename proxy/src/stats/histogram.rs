//! Histograms with Envoy's default buckets, kept exactly (no sampling).

use std::sync::Arc;

use super::block::Block;

/// Upper bounds of Envoy's default buckets (milliseconds for times), inclusive.
pub(super) const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Buckets, the one above all bounds included.
pub(super) const BUCKETS: usize = BOUNDS.len() + 1;

/// Cells of a histogram: the buckets, then the sum of all values.
pub(super) const CELLS: usize = BUCKETS + 1;

/// Quantiles of Envoy's summaries, percent.
pub(super) const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

/// A histogram of the hot path.
#[derive(Clone, Copy)]
pub struct Histogram<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) cell: u16,
}

/// The bucket that counts `value`.
pub(super) fn bucket_of(value: u64) -> usize {
    let value = value as f64;
    BOUNDS.partition_point(|bound| *bound < value)
}

/// A histogram as it stood when it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HistogramValue {
    /// Values per bucket (not cumulative); the last is above all bounds.
    pub buckets: [u64; BUCKETS],
    /// Sum of all values.
    pub sum: u64,
}

impl HistogramValue {
    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Values at or below each bound; the last entry is the count.
    pub fn cumulative(&self) -> [u64; BUCKETS] {
        let mut sum = 0;
        self.buckets.map(|count| {
            sum += count;
            sum
        })
    }

    /// The quantile, in percent, interpolated inside its bucket; 0 when nothing was counted. Above the last
    /// bound it is that bound.
    pub fn quantile(&self, percent: f64) -> f64 {
        let count = self.count();
        if count == 0 {
            return 0.0;
        }
        let rank = percent / 100.0 * count as f64;
        let mut below = 0.0;
        for (bucket, in_bucket) in self.buckets.iter().enumerate().filter(|(_, n)| **n > 0) {
            let lower = if bucket == 0 { 0.0 } else { BOUNDS[bucket - 1] };
            let Some(upper) = BOUNDS.get(bucket).copied() else { return lower };
            let in_bucket = *in_bucket as f64;
            if below + in_bucket >= rank {
                // Whole milliseconds: what is at or below half a one was 0.
                let width = if bucket == 0 { 0.0 } else { upper - lower };
                let value = lower + width * ((rank - below) / in_bucket).clamp(0.0, 1.0);
                // An estimate has no more digits than this.
                return (value * 1e3).round() / 1e3;
            }
            below += in_bucket;
        }
        BOUNDS[BOUNDS.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive() {
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(1), 1);
        assert_eq!(bucket_of(2), 2);
        assert_eq!(bucket_of(5), 2);
        assert_eq!(bucket_of(6), 3);
        assert_eq!(bucket_of(3_600_000), 18);
        assert_eq!(bucket_of(3_600_001), 19);
        assert_eq!(bucket_of(u64::MAX), 19);
    }

    #[test]
    fn quantiles_lie_in_their_bucket() {
        let mut value = HistogramValue::default();
        (1..=100).for_each(|v| value.buckets[bucket_of(v)] += 1);
        for percent in QUANTILES {
            let estimate = value.quantile(percent);
            let exact = (percent.ceil() as u64).max(1);
            let bucket = bucket_of(exact);
            let lower = if bucket == 0 { 0.0 } else { BOUNDS[bucket - 1] };
            assert!(estimate >= lower && estimate <= BOUNDS[bucket], "P{percent} = {estimate}");
        }
        assert!((value.quantile(50.0) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn an_empty_histogram_and_one_above_all_bounds() {
        assert!(HistogramValue::default().quantile(50.0).abs() < 1e-9);
        let mut value = HistogramValue::default();
        value.buckets[BUCKETS - 1] = 3;
        assert!((value.quantile(99.0) - 3_600_000.0).abs() < 1e-9);
    }
}
