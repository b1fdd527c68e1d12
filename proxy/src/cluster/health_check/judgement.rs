//! From the results of checks to the health of a host, and to the time of the next check.

use std::time::Duration;

use fastrand::Rng;

use crate::config::health_check::Intervals;

/// How often a host passed and failed.
#[derive(Clone, Debug)]
pub(super) struct Judgement {
    /// It is unhealthy.
    pub(super) failed: bool,
    /// It was not checked yet.
    pub(super) first: bool,
    passes: u32,
    failures: u32,
}

/// What a result changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    /// Nothing.
    Unchanged,
    /// It is healthy now and was not, or the other way round.
    Changed,
    /// It will, if the next results are like this one.
    Pending,
}

impl Judgement {
    /// Of a host that is thought to be healthy, or not.
    pub(super) fn new(failed: bool) -> Self {
        Self { failed, first: true, passes: 0, failures: 0 }
    }

    /// A check succeeded. The very first success is enough, so that a start is fast.
    pub(super) fn passed(&mut self, healthy_threshold: u32) -> Transition {
        self.failures = 0;
        let first = std::mem::replace(&mut self.first, false);
        if !self.failed {
            return Transition::Unchanged;
        }
        if !first {
            self.passes = self.passes.saturating_add(1);
        }
        if !first && self.passes != healthy_threshold {
            return Transition::Pending;
        }
        self.failed = false;
        Transition::Changed
    }

    /// A check failed. `at_once`: that is enough, whatever the threshold.
    pub(super) fn failed(&mut self, unhealthy_threshold: u32, at_once: bool) -> Transition {
        self.passes = 0;
        self.first = false;
        if self.failed {
            return Transition::Unchanged;
        }
        if !at_once {
            self.failures = self.failures.saturating_add(1);
            if self.failures != unhealthy_threshold {
                return Transition::Pending;
            }
        }
        self.failed = true;
        Transition::Changed
    }
}

impl Intervals {
    /// How long to wait after a check that `passed` or did not.
    pub(super) fn next(
        &self,
        passed: bool,
        transition: Transition,
        has_traffic: bool,
        rng: &mut Rng,
    ) -> Duration {
        let pending = transition == Transition::Pending;
        let base = match (has_traffic, passed) {
            (true, false) if pending => self.unhealthy_edge,
            (true, false) => self.unhealthy,
            (true, true) if pending => self.healthy_edge,
            (true, true) => self.healthy,
            (false, true) if !pending => self.no_traffic_healthy,
            (false, _) => self.no_traffic,
        };
        self.with_jitter(base, self.jitter, rng)
    }

    /// How long to wait before the first check of a host.
    pub(super) fn first(&self, rng: &mut Rng) -> Duration {
        if self.initial_jitter.is_zero() {
            return Duration::ZERO;
        }
        self.with_jitter(Duration::ZERO, self.initial_jitter, rng)
    }

    /// Whole milliseconds, as in Envoy.
    fn with_jitter(&self, base: Duration, jitter: Duration, rng: &mut Rng) -> Duration {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let base = millis(base);
        let share = base.saturating_mul(u64::from(self.jitter_percent)) / 100;
        let mut time = base;
        for most in [share, millis(jitter)] {
            if most > 0 {
                time = time.saturating_add(rng.u64(..most));
            }
        }
        let time = time.min(millis(self.max)).max(millis(self.min)).max(1);
        Duration::from_millis(time)
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    pub(crate) fn intervals() -> Intervals {
        Intervals {
            healthy: seconds(1),
            unhealthy: seconds(2),
            unhealthy_edge: seconds(3),
            healthy_edge: seconds(4),
            no_traffic: seconds(5),
            no_traffic_healthy: seconds(6),
            initial_jitter: Duration::ZERO,
            jitter: Duration::ZERO,
            jitter_percent: 0,
            min: Duration::from_millis(1),
            max: Duration::MAX,
        }
    }

    #[test]
    fn the_first_success_is_enough_and_later_ones_need_a_row() {
        let mut judgement = Judgement::new(true);
        assert_eq!(judgement.passed(3), Transition::Changed);
        assert_eq!(judgement.passed(3), Transition::Unchanged);
        assert_eq!(judgement.failed(2, false), Transition::Pending);
        assert_eq!(judgement.passed(3), Transition::Unchanged);
        assert_eq!(judgement.failed(2, false), Transition::Pending);
        assert_eq!(judgement.failed(2, false), Transition::Changed);
        assert!(judgement.failed);
        let results = [true, true, false, true, true, true]
            .map(|passed| if passed { judgement.passed(3) } else { judgement.failed(2, false) });
        use Transition::{Changed, Pending, Unchanged};
        assert_eq!(results, [Pending, Pending, Unchanged, Pending, Pending, Changed]);
        assert!(!judgement.failed);
    }

    #[test]
    fn a_new_host_that_fails_stays_unhealthy() {
        let mut judgement = Judgement::new(true);
        assert_eq!(judgement.failed(3, false), Transition::Unchanged);
        assert!(judgement.failed && !judgement.first);
        assert_eq!(judgement.passed(2), Transition::Pending);
    }

    #[test]
    fn one_failure_may_be_enough() {
        let mut judgement = Judgement::new(false);
        assert_eq!(judgement.failed(3, false), Transition::Pending);
        assert_eq!(judgement.failed(3, true), Transition::Changed);
        assert_eq!(judgement.failed(3, true), Transition::Unchanged);
        assert!(judgement.failed);
    }

    #[test]
    fn intervals_follow_health_and_traffic() {
        use Transition::{Changed, Pending, Unchanged};
        let mut rng = Rng::with_seed(1);
        for (passed, transition, traffic, expected) in [
            (true, Unchanged, true, 1),
            (true, Changed, true, 1),
            (false, Unchanged, true, 2),
            (false, Changed, true, 2),
            (false, Pending, true, 3),
            (true, Pending, true, 4),
            (false, Unchanged, false, 5),
            (false, Pending, false, 5),
            (true, Pending, false, 5),
            (true, Unchanged, false, 6),
        ] {
            let next = intervals().next(passed, transition, traffic, &mut rng);
            assert_eq!(next, seconds(expected), "{passed} {transition:?} {traffic}");
        }
        assert_eq!(intervals().first(&mut rng), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn jitter_only_adds_and_stays_within_bounds(
            jitter in 0..5000u64,
            percent in 0..300u32,
            min in 1..3000u64,
            max in 1..9000u64,
            seed in any::<u64>(),
        ) {
            let (jitter, min, max) =
                (Duration::from_millis(jitter), Duration::from_millis(min), Duration::from_millis(max));
            let intervals = Intervals { jitter, jitter_percent: percent, min, max, ..intervals() };
            let next = intervals.next(true, Transition::Unchanged, true, &mut Rng::with_seed(seed));
            let most = seconds(1) + jitter + seconds(1) * percent / 100;
            prop_assert!(next >= seconds(1).min(max).max(min));
            prop_assert!(next <= most.min(max).max(min));
        }

        /// A host changes its health exactly when Envoy's counters say so.
        #[test]
        fn health_is_that_of_the_last_row(
            results in prop::collection::vec(any::<bool>(), 1..80),
            healthy in 1..4u32,
            unhealthy in 1..4u32,
        ) {
            let mut judgement = Judgement::new(true);
            let (mut failed, mut row) = (true, 0);
            for (at, passed) in results.iter().copied().enumerate() {
                // A row against what it is thought to be.
                row = if passed == failed { row + 1 } else { 0 };
                if row == if passed { healthy } else { unhealthy } || (at == 0 && passed) {
                    (failed, row) = (!passed, 0);
                }
                let transition =
                    if passed { judgement.passed(healthy) } else { judgement.failed(unhealthy, false) };
                prop_assert_eq!(judgement.failed, failed, "at {}: {:?}", at, results);
                prop_assert_eq!(transition == Transition::Pending, row > 0);
            }
        }
    }
}
