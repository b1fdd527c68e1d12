//! Hosts whose connects succeed less often than those of the others.

/// How a host did in an interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Of the host, in the caller's list.
    pub(super) host: usize,
    /// Connects.
    pub(super) attempts: u32,
    /// Percent of them that succeeded.
    pub(super) rate: f64,
}

/// The average success rate of the hosts, and below what a host is an outlier; in percent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// The mean.
    pub average: f64,
    /// The mean less some standard deviations. May be negative.
    pub ejection: f64,
}

impl Threshold {
    /// Of at least one sample. `stdev_factor` is in thousandths.
    pub(super) fn of(samples: &[Sample], stdev_factor: u32) -> Self {
        let count = samples.len() as f64;
        let average = samples.iter().map(|sample| sample.rate).sum::<f64>() / count;
        let variance = samples.iter().map(|sample| (sample.rate - average).powi(2)).sum::<f64>() / count;
        Self { average, ejection: average - variance.sqrt() * f64::from(stdev_factor) / 1000.0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples(rates: &[f64]) -> Vec<Sample> {
        rates.iter().enumerate().map(|(host, rate)| Sample { host, attempts: 100, rate: *rate }).collect()
    }

    #[test]
    fn one_bad_host_among_good_ones_is_below_the_threshold() {
        let threshold = Threshold::of(&samples(&[100.0, 100.0, 100.0, 100.0, 50.0]), 1900);
        // Standard deviation 20.
        assert!((threshold.average - 90.0).abs() < 1e-9);
        assert!((threshold.ejection - 52.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn hosts_alike_are_no_outliers(rate in 0.0..=100.0f64, count in 1..50usize, factor in 0..5000u32) {
            let threshold = Threshold::of(&samples(&vec![rate; count]), factor);
            prop_assert!(rate >= threshold.ejection - 1e-9);
        }

        #[test]
        fn somebody_is_always_above(rates in prop::collection::vec(0.0..=100.0f64, 1..50), factor in 0..5000u32) {
            let threshold = Threshold::of(&samples(&rates), factor);
            prop_assert!(rates.iter().any(|rate| *rate >= threshold.ejection - 1e-9));
        }
    }
}
