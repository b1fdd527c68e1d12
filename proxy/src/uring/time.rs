//! Waiting for time, on whatever engine runs.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::{Engine, engine, ring};

/// Completes at a moment. Only the task that polled it last is woken.
#[derive(Debug)]
pub struct Sleep(Timer);

#[derive(Debug)]
enum Timer {
    /// Not asked yet, or asked too late to wait.
    Idle(Instant),
    /// Of the ring's executor.
    Ring(u32),
    /// Of tokio.
    Tokio(Pin<Box<tokio::time::Sleep>>),
}

impl Sleep {
    /// Changes when it completes, also if it has.
    pub fn reset(&mut self, at: Instant) {
        if let Timer::Tokio(sleep) = &mut self.0 {
            sleep.as_mut().reset(at.into());
        } else {
            self.forget();
            self.0 = Timer::Idle(at);
        }
    }

    fn forget(&self) {
        if let Timer::Ring(key) = self.0 {
            // Without a running executor its timers are gone already.
            ring::try_with(|driver| driver.timers().remove(key));
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Timer::Ring(key) => ring::with(|driver| driver.timers().poll(*key, cx)),
            Timer::Tokio(sleep) => sleep.as_mut().poll(cx),
            Timer::Idle(at) if engine() == Engine::IoUring => {
                let at = *at;
                if Instant::now() >= at {
                    return Poll::Ready(());
                }
                self.0 = Timer::Ring(ring::with(|driver| driver.timers().insert(at, cx.waker())));
                Poll::Pending
            }
            Timer::Idle(at) => {
                let mut sleep = Box::pin(tokio::time::sleep_until((*at).into()));
                let polled = sleep.as_mut().poll(cx);
                self.0 = Timer::Tokio(sleep);
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
    sleep_until(after(duration))
}

fn after(duration: Duration) -> Instant {
    let now = Instant::now();
    // Longer than the clock can say is as good as for ever.
    now.checked_add(duration).unwrap_or(now + Duration::from_hours(24 * 365))
}

/// Completes at `at`.
pub fn sleep_until(at: Instant) -> Sleep {
    Sleep(Timer::Idle(at))
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
    /// Of the next tick.
    at: Instant,
    sleep: Sleep,
}

/// For the first time after one `period`, which must not be zero.
pub fn interval(period: Duration) -> Interval {
    assert!(!period.is_zero(), "an interval of no time");
    let at = after(period);
    Interval { period, at, sleep: sleep_until(at) }
}

impl Interval {
    /// Completes at the next tick. Ticks that nobody waited for are left out. May be dropped and called again.
    pub async fn tick(&mut self) {
        (&mut self.sleep).await;
        let next = self.at + self.period;
        self.at = if next > Instant::now() { next } else { after(self.period) };
        self.sleep.reset(self.at);
    }
}
