//! Waiting for time, on whatever engine runs.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::{Engine, engine, ring};

/// Completes at a moment. Only the task that polled it last is woken.
#[derive(Debug)]
pub struct Sleep {
    at: Instant,
    timer: Timer,
}

#[derive(Debug)]
enum Timer {
    /// Not asked yet.
    Idle,
    /// Of the ring's executor.
    Ring(usize),
    /// Of tokio.
    Tokio(Pin<Box<tokio::time::Sleep>>),
}

impl Sleep {
    /// Changes when it completes, also if it has.
    pub fn reset(&mut self, at: Instant) {
        self.at = at;
        match &mut self.timer {
            Timer::Idle => {}
            Timer::Ring(_) => self.forget(),
            Timer::Tokio(sleep) => sleep.as_mut().reset(at.into()),
        }
    }

    fn forget(&mut self) {
        if let Timer::Ring(key) = std::mem::replace(&mut self.timer, Timer::Idle) {
            // Without a running executor its timers are gone already.
            ring::try_with(|driver| driver.timers().remove(key));
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let at = self.at;
        match &mut self.timer {
            Timer::Ring(key) => ring::with(|driver| driver.timers().poll(*key, cx)),
            Timer::Tokio(sleep) => sleep.as_mut().poll(cx),
            Timer::Idle if engine() == Engine::IoUring => {
                if Instant::now() >= at {
                    return Poll::Ready(());
                }
                self.timer = Timer::Ring(ring::with(|driver| driver.timers().insert(at, cx.waker())));
                Poll::Pending
            }
            Timer::Idle => {
                let mut sleep = Box::pin(tokio::time::sleep_until(at.into()));
                let polled = sleep.as_mut().poll(cx);
                self.timer = Timer::Tokio(sleep);
                polled
            }
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Completes after `duration`, or a tick later.
pub fn sleep(duration: Duration) -> Sleep {
    let now = Instant::now();
    // Longer than the clock can say is as good as for ever.
    sleep_until(now.checked_add(duration).unwrap_or(now + Duration::from_hours(24 * 365)))
}

/// Completes at `at`.
pub fn sleep_until(at: Instant) -> Sleep {
    Sleep { at, timer: Timer::Idle }
}

/// A time limit passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not in time")]
pub struct Elapsed;

/// The future's output, if that comes in time.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let (mut future, mut limit) = (pin!(future), sleep(duration));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        ready!(Pin::new(&mut limit).poll(cx));
        Poll::Ready(Err(Elapsed))
    })
    .await
}

/// Completes again and again.
#[derive(Debug)]
pub struct Interval {
    period: Duration,
    sleep: Sleep,
}

/// For the first time after one `period`, which must not be zero.
pub fn interval(period: Duration) -> Interval {
    assert!(!period.is_zero(), "an interval of no time");
    Interval { period, sleep: sleep(period) }
}

impl Interval {
    /// Completes at the next tick. Ticks that nobody waited for are left out. May be dropped and called again.
    pub async fn tick(&mut self) {
        (&mut self.sleep).await;
        let next = self.sleep.at + self.period;
        let now = Instant::now();
        self.sleep.reset(if next > now { next } else { now + self.period });
    }
}
