//! Moments that tasks wait for, in order.

use std::collections::BTreeSet;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use slab::Slab;

/// The timers of one executor.
#[derive(Debug, Default)]
pub(super) struct Timers {
    entries: Slab<Entry>,
    /// Those that have not fired.
    order: BTreeSet<(Instant, usize)>,
}

#[derive(Debug)]
struct Entry {
    at: Instant,
    /// None: it has fired.
    waker: Option<Waker>,
}

impl Timers {
    /// Begins to wait.
    pub(super) fn insert(&mut self, at: Instant, waker: &Waker) -> usize {
        let key = self.entries.insert(Entry { at, waker: Some(waker.clone()) });
        self.order.insert((at, key));
        key
    }

    /// Whether it has fired; otherwise the task of `cx` is woken when it does.
    pub(super) fn poll(&mut self, key: usize, cx: &Context<'_>) -> Poll<()> {
        match &mut self.entries[key].waker {
            Some(waker) => {
                waker.clone_from(cx.waker());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }

    /// Ends a wait, fired or not.
    pub(super) fn remove(&mut self, key: usize) {
        let entry = self.entries.remove(key);
        if entry.waker.is_some() {
            self.order.remove(&(entry.at, key));
        }
    }

    /// When the next one fires.
    pub(super) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Fires one that is due.
    pub(super) fn fire(&mut self, now: Instant) -> Option<Waker> {
        let (at, key) = *self.order.first()?;
        if at > now {
            return None;
        }
        self.order.pop_first();
        self.entries[key].waker.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn fires_in_order_and_only_what_is_due() {
        let mut timers = Timers::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let keys = [30, 10, 20, 10].map(|ms| timers.insert(at(ms), Waker::noop()));
        assert_eq!(timers.next(), Some(at(10)));
        timers.remove(keys[3]);
        assert!(timers.fire(at(9)).is_none());
        assert!(timers.fire(at(10)).is_some());
        assert!(timers.fire(at(10)).is_none(), "the other one was removed");
        let cx = Context::from_waker(Waker::noop());
        assert!(timers.poll(keys[1], &cx).is_ready());
        assert!(timers.poll(keys[2], &cx).is_pending());
        assert!(timers.fire(at(40)).is_some());
        assert!(timers.fire(at(40)).is_some());
        assert_eq!(timers.next(), None);
        for key in &keys[..3] {
            timers.remove(*key);
        }
        assert!(timers.entries.is_empty() && timers.order.is_empty());
    }
}
