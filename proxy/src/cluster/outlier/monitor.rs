//! What outlier detection knows of one host.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::outlier::OutlierDetection;

/// How a connect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is established.
    Connected,
    /// It was refused, or the host can't be reached.
    Failed,
    /// `connect_timeout` passed.
    TimedOut,
}

/// Failures in a row that reached a threshold; bits of what a [`Monitor`] has detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Streak {
    Gateway = 1 << 0,
    Any = 1 << 1,
    LocalOrigin = 1 << 2,
}

/// The bit beside those of [`Streak`]: an active health check succeeded.
const WISH: u8 = 1 << 7;

/// Connects to a host as outlier detection counts them. Written by every worker without a lock; what it leads to is
/// decided by the main thread and kept in [`History`].
#[derive(Debug, Default)]
pub struct Monitor {
    /// Since the last interval: attempts in the lower half, those that succeeded in the upper.
    attempts: AtomicU64,
    gateway: AtomicU32,
    any: AtomicU32,
    local_origin: AtomicU32,
    /// Bits of [`Streak`], and [`WISH`], that the main thread has not seen yet.
    detected: AtomicU8,
    history: Mutex<History>,
}

/// Ejections so far. Main thread only, but for the admin server.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// How often it was ejected.
    pub ejections: u32,
    /// By what the base time is multiplied. Goes up with each ejection, and down with each interval in which it is not
    /// ejected.
    pub multiplier: u32,
    /// Of the ejection that is on.
    pub jitter: Duration,
    /// When it was ejected last.
    pub ejected_at: Option<Instant>,
    /// When that ended.
    pub returned_at: Option<Instant>,
    /// Percent of connects that succeeded in the last interval; none if there were too few.
    pub success_rate: Option<f64>,
}

const ONE: u64 = 1;
const SUCCESS: u64 = 1 << 32;

impl Monitor {
    /// Counts a connect. True: the main thread has to look.
    pub(super) fn count(&self, outcome: Outcome, config: &OutlierDetection) -> bool {
        if outcome == Outcome::Connected {
            self.attempts.fetch_add(ONE + SUCCESS, Relaxed);
            self.reset();
            return false;
        }
        self.attempts.fetch_add(ONE, Relaxed);
        if config.split_external_local_origin_errors {
            return self.failed(Streak::LocalOrigin, config.consecutive_local_origin_failure);
        }
        // Both are gateway errors: 503 and 504.
        let gateway = self.failed(Streak::Gateway, config.consecutive_gateway_failure);
        self.failed(Streak::Any, config.consecutive_5xx) || gateway
    }

    fn failed(&self, streak: Streak, threshold: u32) -> bool {
        let detected = self.streak(streak).fetch_add(1, Relaxed).wrapping_add(1) == threshold;
        if detected {
            self.detected.fetch_or(streak as u8, Relaxed);
        }
        detected
    }

    fn streak(&self, streak: Streak) -> &AtomicU32 {
        match streak {
            Streak::Gateway => &self.gateway,
            Streak::Any => &self.any,
            Streak::LocalOrigin => &self.local_origin,
        }
    }

    /// No failures in a row. Writes only what is not so already: workers do this for every connection.
    pub(super) fn reset(&self) {
        for streak in [&self.gateway, &self.any, &self.local_origin] {
            if streak.load(Relaxed) != 0 {
                streak.store(0, Relaxed);
            }
        }
    }

    pub(super) fn reset_streak(&self, streak: Streak) {
        self.streak(streak).store(0, Relaxed);
    }

    /// What was detected since the last call.
    pub(super) fn take_detected(&self) -> impl Iterator<Item = Streak> + use<> {
        // The swap costs a locked instruction, and most hosts have nothing.
        let any = self.detected.load(Relaxed) & !WISH != 0;
        let detected = if any { self.detected.fetch_and(WISH, Relaxed) } else { 0 };
        [Streak::Gateway, Streak::Any, Streak::LocalOrigin]
            .into_iter()
            .filter(move |streak| detected & *streak as u8 != 0)
    }

    /// An active health check succeeded, which ends an ejection.
    pub(super) fn ask_back(&self) {
        self.detected.fetch_or(WISH, Relaxed);
    }

    /// Whether one did since the last call.
    pub(super) fn take_wish(&self) -> bool {
        self.detected.load(Relaxed) & WISH != 0 && self.detected.fetch_and(!WISH, Relaxed) & WISH != 0
    }

    /// Attempts, and how many of them succeeded, since the last call.
    pub(super) fn take_attempts(&self) -> (u32, u32) {
        if self.attempts.load(Relaxed) == 0 {
            return (0, 0);
        }
        let attempts = self.attempts.swap(0, Relaxed);
        (attempts as u32, (attempts >> 32) as u32)
    }

    /// Ejections so far.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl History {
    /// It is ejected from now on.
    pub(super) fn eject(&mut self, now: Instant, jitter: Duration, config: &OutlierDetection) {
        self.ejections += 1;
        self.ejected_at = Some(now);
        self.jitter = jitter;
        let (base, max) = (config.base_ejection_time, config.max_ejection_time);
        if base.saturating_mul(self.multiplier) < max.saturating_add(base) {
            self.multiplier += 1;
        }
    }

    /// Whether an ejection is over.
    pub(super) fn is_over(&self, now: Instant, config: &OutlierDetection) -> bool {
        let Some(ejected_at) = self.ejected_at else { return true };
        let time = config.base_ejection_time.saturating_mul(self.multiplier).min(config.max_ejection_time);
        now.saturating_duration_since(ejected_at) >= time.saturating_add(self.jitter)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(split: bool) -> OutlierDetection {
        OutlierDetection {
            consecutive_5xx: 3,
            consecutive_gateway_failure: 2,
            consecutive_local_origin_failure: 4,
            split_external_local_origin_errors: split,
            ..OutlierDetection::default()
        }
    }

    fn detected(monitor: &Monitor) -> Vec<Streak> {
        monitor.take_detected().collect()
    }

    #[test]
    fn failures_in_a_row_are_detected_once() {
        let (monitor, config) = (Monitor::default(), config(false));
        let wakes: Vec<bool> = (0..5).map(|_| monitor.count(Outcome::Failed, &config)).collect();
        assert_eq!(wakes, [false, true, true, false, false]);
        assert_eq!(detected(&monitor), [Streak::Gateway, Streak::Any]);
        assert_eq!(detected(&monitor), []);
        monitor.count(Outcome::Connected, &config);
        assert!(!monitor.count(Outcome::TimedOut, &config));
        assert!(monitor.count(Outcome::TimedOut, &config));
        assert_eq!(detected(&monitor), [Streak::Gateway]);
        assert_eq!(monitor.take_attempts(), (8, 1));
        assert_eq!(monitor.take_attempts(), (0, 0));
    }

    #[test]
    fn split_failures_have_a_count_of_their_own() {
        let (monitor, config) = (Monitor::default(), config(true));
        let wakes: Vec<bool> = (0..5).map(|_| monitor.count(Outcome::TimedOut, &config)).collect();
        assert_eq!(wakes, [false, false, false, true, false]);
        assert_eq!(detected(&monitor), [Streak::LocalOrigin]);
    }

    #[test]
    fn ejections_get_longer_up_to_the_maximum() {
        let config = OutlierDetection {
            base_ejection_time: Duration::from_secs(10),
            max_ejection_time: Duration::from_secs(25),
            ..OutlierDetection::default()
        };
        let (mut history, mut now) = (History::default(), Instant::now());
        for seconds in [10, 20, 25, 25, 25] {
            let jitter = Duration::from_millis(500);
            history.eject(now, jitter, &config);
            let end = now + Duration::from_secs(seconds) + jitter;
            assert!(!history.is_over(end - Duration::from_millis(1), &config), "{seconds} {history:?}");
            assert!(history.is_over(end, &config), "{seconds} {history:?}");
            now = end;
        }
        // Not more than it takes to reach the maximum, or coming down would take too long.
        assert_eq!((history.multiplier, history.ejections), (4, 5));
    }

    proptest! {
        /// What is detected is what a model of Envoy's counters detects.
        #[test]
        fn streaks_are_those_of_the_outcomes(
            outcomes in prop::collection::vec(any::<bool>(), 0..60),
            threshold in 1..6u32,
        ) {
            let config = OutlierDetection { consecutive_5xx: threshold, ..OutlierDetection::default() };
            let monitor = Monitor::default();
            let mut row = 0;
            for success in outcomes {
                row = if success { 0 } else { row + 1 };
                monitor.count(if success { Outcome::Connected } else { Outcome::Failed }, &config);
                let found = detected(&monitor).contains(&Streak::Any);
                prop_assert_eq!(found, row == threshold);
            }
        }
    }
}
