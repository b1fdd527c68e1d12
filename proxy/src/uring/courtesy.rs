//! Offers the CPU to others, as long as that does not cost too much.

use std::time::{Duration, Instant};

/// What the ends of a connection take to read a megabyte and to write one, or less: up to a quarter of a millisecond, and twice
/// that where CPUs are slow. Below every time slice.
const SHORT: Duration = Duration::from_micros(500);
/// Time that others may keep beyond that, in all: they have something to catch up with, when they got nothing for long.
const CREDIT: Duration = Duration::from_millis(100);
/// Of the time that passes, one part in so many is credited again.
const PART: u32 = 8;

/// What one worker has lost by offering its CPU to others.
///
/// The ends of its connections have little to do each time. Who has work of its own keeps the CPU for a time slice: for the kernel,
/// who yields has had its share, and who does it again and again next to a busy loop gets next to nothing.
#[derive(Debug)]
pub(super) struct Courtesy {
    /// As of `counted`; it shrinks as time passes.
    lost: Duration,
    counted: Instant,
}

impl Courtesy {
    pub(super) fn new(now: Instant) -> Self {
        Self { lost: Duration::ZERO, counted: now }
    }

    /// Offers the CPU, if that is due.
    pub(super) fn offer(&mut self) {
        let before = Instant::now();
        if self.is_due(before) {
            std::thread::yield_now();
            self.returned(before, Instant::now());
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.lost.is_zero() || self.lost_by(now) < CREDIT
    }

    /// The CPU was offered at `before`, and is back at `now`.
    fn returned(&mut self, before: Instant, now: Instant) {
        let taken = now.saturating_duration_since(before);
        if taken >= SHORT {
            (self.lost, self.counted) = (self.lost_by(now) + taken, now);
        }
    }

    fn lost_by(&self, now: Instant) -> Duration {
        self.lost.saturating_sub(now.saturating_duration_since(self.counted) / PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long others had the CPU in one second, when each of them keeps it for so long, and the worker works as long as said
    /// in between.
    fn given(others: Duration, own: Duration) -> Duration {
        let start = Instant::now();
        let mut courtesy = Courtesy::new(start);
        let (mut now, mut given) = (start, Duration::ZERO);
        while now < start + Duration::from_secs(1) {
            now += own;
            if courtesy.is_due(now) {
                courtesy.returned(now, now + others);
                (now, given) = (now + others, given + others);
            }
        }
        given
    }

    #[test]
    fn who_gives_it_back_soon_has_it_each_time() {
        let own = Duration::from_micros(200);
        for others in [Duration::ZERO, own, SHORT / 2] {
            let all =
                Duration::from_secs(1).as_secs_f64() * others.as_secs_f64() / (others + own).as_secs_f64();
            assert!((given(others, own).as_secs_f64() - all).abs() < 0.01, "{others:?}");
        }
    }

    #[test]
    fn who_has_work_of_its_own_gets_an_eighth() {
        for millis in [1, 3, 10] {
            let others = Duration::from_millis(millis);
            let given = given(others, Duration::from_micros(200));
            assert!(given <= Duration::from_secs(1) / PART + CREDIT + 2 * others, "{millis} ms: {given:?}");
            assert!(given >= Duration::from_secs(1) / PART / 2, "{millis} ms: {given:?}");
        }
    }
}
