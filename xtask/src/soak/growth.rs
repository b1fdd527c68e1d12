//! Whether something grows: the rule, and the bounds of each quantity.
//!
//! Only quiet samples count: after every round all load is gone, so that what is left is what the process keeps. The first
//! quarter of them is left out, at least three (warm-up: buffers, pools and the allocator's arenas reach their size). Of the others:
//!
//! - the *slope* is the median of the slopes between all pairs of samples (Theil and Sen). A third of the samples may be
//!   outliers without moving it, which is why no single one counts;
//! - the *growth* is slope times time: what a straight line through the samples rises from the first to the last;
//! - the *step* is the median of the last third minus the median of the first third.
//!
//! Something grows when both growth and step are above its bound. Growth alone is noise round a line, step alone may
//! be one event in the middle that does not come again. Bounds are in the quantity's own unit, over the whole run: what
//! is counted (descriptors, threads, map entries) has to stay where it was, memory has the room that the allocator needs.

use serde::Serialize;

/// Samples that are judged, at least.
const ENOUGH: usize = 6;

/// Left out at the start, at least.
const WARM_UP: usize = 3;

/// One quiet sample of one quantity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// Since the start of the run.
    pub(super) seconds: f64,
    pub(super) value: f64,
}

/// What was found about one quantity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Verdict {
    /// Samples that were judged.
    pub(super) judged: usize,
    pub(super) first: f64,
    pub(super) last: f64,
    /// By the slope, over the time that was judged.
    pub(super) growth: f64,
    /// Median of the last third minus median of the first.
    pub(super) step: f64,
    pub(super) bound: f64,
    pub(super) grows: bool,
}

/// Judges the samples of one quantity; none when they are too few to tell.
pub(super) fn judge(points: &[Point], bound: f64) -> Option<Verdict> {
    let points = points.get((points.len() / 4).max(WARM_UP)..)?;
    if points.len() < ENOUGH {
        return None;
    }
    let (first, last) = (points.first()?, points.last()?);
    let growth = slope(points) * (last.seconds - first.seconds);
    let third = points.len() / 3;
    let step = median(points[points.len() - third..].iter().map(|point| point.value))
        - median(points[..third].iter().map(|point| point.value));
    Some(Verdict {
        judged: points.len(),
        first: first.value,
        last: last.value,
        growth,
        step,
        bound,
        grows: growth > bound && step > bound,
    })
}

/// How many rounds it takes to judge.
pub(super) const fn rounds() -> usize {
    ENOUGH + WARM_UP
}

/// Per second.
fn slope(points: &[Point]) -> f64 {
    let pairs = points.iter().enumerate().flat_map(|(index, from)| {
        points[index + 1..].iter().map(move |to| (to.value - from.value) / (to.seconds - from.seconds))
    });
    median(pairs.filter(|slope| slope.is_finite()))
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        length if length % 2 == 1 => values[length / 2],
        length => f64::midpoint(values[length / 2 - 1], values[length / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: impl IntoIterator<Item = f64>) -> Vec<Point> {
        let values = values.into_iter().enumerate();
        values.map(|(index, value)| Point { seconds: index as f64 * 10.0, value }).collect()
    }

    /// Reproducible noise between -1 and 1.
    fn noise(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 2001) as f64 / 1000.0 - 1.0
        }
    }

    fn grows(values: impl IntoIterator<Item = f64>, bound: f64) -> bool {
        judge(&points(values), bound).expect("enough samples").grows
    }

    #[test]
    fn one_descriptor_per_round_is_growth() {
        assert!(grows((0..12).map(|round| 40.0 + f64::from(round)), 0.5));
        assert!(!grows((0..12).map(|_| 40.0), 0.5));
    }

    #[test]
    fn a_descriptor_every_third_round_is_growth() {
        assert!(grows((0..30).map(|round| 40.0 + f64::from(round / 3)), 0.5));
    }

    #[test]
    fn noise_is_no_growth() {
        for seed in 0..200 {
            let mut noise = noise(seed);
            // RSS of 20 MiB that goes up and down by half of its bound.
            assert!(!grows((0..20).map(|_| 20e6 + noise() * 0.5e6), 1e6), "seed {seed}");
        }
    }

    #[test]
    fn growth_under_noise_is_growth() {
        for seed in 0..200 {
            let mut noise = noise(seed);
            // 200 KB a round, under the same noise.
            let values = (0..20).map(|round| 20e6 + f64::from(round) * 0.2e6 + noise() * 0.5e6);
            assert!(grows(values, 1e6), "seed {seed}");
        }
    }

    #[test]
    fn the_warm_up_is_not_judged() {
        // An allocator that reaches its size in the first quarter.
        assert!(!grows((0..20).map(|round| if round < 5 { f64::from(round) * 5e6 } else { 25e6 }), 1e6));
    }

    #[test]
    fn outliers_and_what_shrinks_again_do_not_count() {
        assert!(!grows((0..20).map(|round| if round % 4 == 1 { 90.0 } else { 40.0 }), 0.5));
        assert!(!grows((0..20).map(|round| 100.0 - f64::from(round)), 0.5));
        // Up in the middle, and down again.
        assert!(!grows((0..20).map(|round| if (9..13).contains(&round) { 60.0 } else { 40.0 }), 0.5));
    }

    #[test]
    fn only_growth_and_step_together_count() {
        // One event, and never again: two thirds of the pairs see nothing.
        let once = (0..20).map(|round| if round < 16 { 40.0 } else { 60.0 });
        let verdict = judge(&points(once), 0.5).expect("enough samples");
        assert!(verdict.step > 0.5 && verdict.growth < 0.5 && !verdict.grows, "{verdict:?}");
        // A line of 11, whose last third is 8 above its first.
        let line = || (0..16).map(f64::from);
        let verdict = judge(&points(line()), 9.5).expect("enough samples");
        assert!(verdict.growth > 9.5 && verdict.step < 9.5 && !verdict.grows, "{verdict:?}");
        assert!(grows(line(), 7.9));
        assert!(!grows(line(), 8.0), "what reaches the bound is within it");
        assert!(!grows(line(), f64::INFINITY), "what is only shown");
    }

    #[test]
    fn a_verdict_tells_what_was_judged() {
        let verdict = judge(&points((0..16).map(f64::from)), 0.5).expect("enough samples");
        let wanted =
            Verdict { judged: 12, first: 4.0, last: 15.0, growth: 11.0, step: 8.0, bound: 0.5, grows: true };
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(verdict.growth, wanted.growth), "{verdict:?}");
        assert_eq!(Verdict { growth: wanted.growth, ..verdict }, wanted);
    }

    #[test]
    fn time_counts_and_not_the_number_of_the_sample() {
        // Twice as long between two samples, and so twice as much; two samples of the same moment have no slope.
        let at = [0.0, 10.0, 30.0, 40.0, 40.0, 60.0, 70.0, 90.0, 100.0];
        let points = at.map(|seconds| Point { seconds, value: 40.0 + seconds / 10.0 });
        let verdict = judge(&points, 0.5).expect("enough samples");
        assert!((verdict.growth - 6.0).abs() < 1e-9 && verdict.grows, "{verdict:?}");
    }

    #[test]
    fn too_few_samples_are_no_verdict() {
        assert_eq!(judge(&points((0..rounds() - 1).map(|round| round as f64)), 0.5), None);
        assert!(judge(&points((0..rounds()).map(|round| round as f64)), 0.5).is_some());
    }
}
