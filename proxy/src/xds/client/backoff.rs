//! How often: waits between attempts, and token buckets for requests.

use std::time::{Duration, Instant};

use crate::config::config_source::RateLimit;
use crate::xds::{BACKOFF_BASE, BACKOFF_MAX};

/// Rejections of one kind of resource: ten at once, then ten a second. A server that sends the same bad response again
/// as soon as it was rejected costs no more than that.
pub(super) const REJECTIONS: RateLimit = RateLimit { max_tokens: 10, fill_rate_milli: 10_000 };

/// Waits that double, with jitter: each is between half of the interval and all of it.
#[derive(Debug)]
pub(super) struct Backoff {
    interval: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { interval: BACKOFF_BASE }
    }
}

impl Backoff {
    /// How long to wait now. `share` is the jitter: random, from 0 to 1.
    pub(super) fn next(&mut self, share: f64) -> Duration {
        let interval = self.interval;
        self.interval = (interval * 2).min(BACKOFF_MAX);
        interval.mul_f64(f64::midpoint(1.0, share.clamp(0.0, 1.0)))
    }

    /// It worked: the next wait is the shortest again.
    pub(super) fn reset(&mut self) {
        self.interval = BACKOFF_BASE;
    }
}

/// A token bucket. It starts full.
#[derive(Debug)]
pub(super) struct Bucket {
    limit: RateLimit,
    /// In thousandths.
    tokens: u64,
    /// When `tokens` was right. None: never used, full.
    at: Option<Instant>,
}

/// What one request takes.
const TOKEN: u64 = 1000;

impl Bucket {
    pub(super) fn new(limit: RateLimit) -> Self {
        Self { limit, tokens: u64::from(limit.max_tokens) * TOKEN, at: None }
    }

    /// When the next token is there; none: now.
    pub(super) fn ready_at(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        let missing = TOKEN.saturating_sub(self.tokens);
        (missing > 0).then(|| {
            let micros = (missing * 1_000_000).div_ceil(self.limit.fill_rate_milli.max(1));
            now + Duration::from_micros(micros)
        })
    }

    /// Takes a token, which must be there.
    pub(super) fn take(&mut self) {
        self.tokens = self.tokens.saturating_sub(TOKEN);
    }

    fn fill(&mut self, now: Instant) {
        let Some(at) = self.at else {
            self.at = Some(now);
            return;
        };
        let micros = u64::try_from(now.saturating_duration_since(at).as_micros()).unwrap_or(u64::MAX);
        let earned = micros.saturating_mul(self.limit.fill_rate_milli) / 1_000_000;
        // The fraction that was not earned yet stays in `at`.
        if earned > 0 {
            self.tokens = (self.tokens.saturating_add(earned)).min(u64::from(self.limit.max_tokens) * TOKEN);
            self.at = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p44_waits_double_from_half_a_second_to_thirty_with_jitter_and_start_over() {
        let mut backoff = Backoff::default();
        let longest: Vec<u64> = (0..8).map(|_| backoff.next(1.0).as_millis() as u64).collect();
        assert_eq!(longest, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        backoff.reset();
        let shortest: Vec<u64> = (0..8).map(|_| backoff.next(0.0).as_millis() as u64).collect();
        assert_eq!(shortest, [250, 500, 1000, 2000, 4000, 8000, 15_000, 15_000]);
    }

    #[test]
    fn a_bucket_gives_what_it_holds_and_then_what_flows_in() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RateLimit { max_tokens: 3, fill_rate_milli: 10_000 });
        let mut taken = 0;
        // A second in steps of a millisecond.
        for millis in 0..1000 {
            let now = start + Duration::from_millis(millis);
            while bucket.ready_at(now).is_none() {
                bucket.take();
                taken += 1;
            }
        }
        assert!((12..=13).contains(&taken), "{taken}");
        let now = start + Duration::from_millis(999);
        let at = bucket.ready_at(now).unwrap();
        assert!(at > now && at <= now + Duration::from_millis(100));
        assert_eq!(bucket.ready_at(at), None, "the wait is as long as it says");
    }

    #[test]
    fn a_slow_bucket_loses_no_fraction() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RateLimit { max_tokens: 1, fill_rate_milli: 1 });
        assert_eq!(bucket.ready_at(start), None);
        bucket.take();
        for seconds in 1..1000 {
            assert!(bucket.ready_at(start + Duration::from_millis(seconds * 1000)).is_some(), "{seconds}");
        }
        assert_eq!(bucket.ready_at(start + Duration::from_secs(1000)), None);
    }
}
