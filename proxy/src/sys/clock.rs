//! A clock that is cheap enough to read on every wake-up.

use std::time::Duration;

/// Time since boot, in steps of a kernel tick (1 to 10 ms) and never ahead of the exact monotonic clock.
/// Reading it touches one page that the kernel shares: no system call, no read of the hardware counter.
pub fn coarse() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a live, writable timespec. The call can't fail: every kernel since 2.6.32 has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_forward() {
        let before = coarse();
        std::thread::sleep(Duration::from_millis(30));
        assert!(coarse() > before);
    }
}
