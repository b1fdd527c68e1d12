//! Moments that tasks wait for, in order.
//!
//! Nearly every connection has a timer, which nearly always is taken back before it fires. So the order is a heap of
//! numbers, in which each entry knows its place: 36 bytes per timer in all.

use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::pages::Pages;

/// The timers of one executor.
#[derive(Debug)]
pub(super) struct Timers {
    /// What moments are counted from.
    origin: Instant,
    entries: Pages<Entry>,
    /// A binary heap of those that have not fired: the parent of number `i` is number `(i - 1) / 2`, and is not later.
    order: Vec<u32>,
}

#[derive(Debug)]
struct Entry {
    /// In nanoseconds after the origin.
    at: u64,
    /// Where it is in the heap. Nothing once it has fired.
    place: u32,
    fired: bool,
    waker: Option<Waker>,
}

impl Default for Timers {
    fn default() -> Self {
        Self { origin: Instant::now(), entries: Pages::new(), order: Vec::new() }
    }
}

impl Timers {
    /// Begins to wait.
    pub(super) fn insert(&mut self, at: Instant, waker: &Waker) -> u32 {
        // What does not fit is in 584 years.
        let at = u64::try_from(at.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX);
        let place = self.order.len() as u32;
        let key = self.entries.insert(Entry { at, place, fired: false, waker: Some(waker.clone()) });
        self.order.push(key);
        self.raise(place as usize);
        key
    }

    /// Whether it has fired; otherwise the task of `cx` is woken when it does.
    pub(super) fn poll(&mut self, key: u32, cx: &Context<'_>) -> Poll<()> {
        let entry = &mut self.entries[key];
        match &mut entry.waker {
            _ if entry.fired => return Poll::Ready(()),
            Some(waker) => waker.clone_from(cx.waker()),
            None => entry.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Ends a wait, fired or not.
    pub(super) fn remove(&mut self, key: u32) {
        let entry = self.entries.remove(key);
        if !entry.fired {
            self.take_out(entry.place as usize);
        }
    }

    /// When the next one fires.
    pub(super) fn next(&self) -> Option<Instant> {
        let first = *self.order.first()?;
        Some(self.origin + Duration::from_nanos(self.entries[first].at))
    }

    /// Fires one that is due.
    pub(super) fn fire(&mut self, now: Instant) -> Option<Waker> {
        if self.next()? > now {
            return None;
        }
        let key = self.order[0];
        self.take_out(0);
        let entry = &mut self.entries[key];
        entry.fired = true;
        entry.waker.take()
    }

    fn at(&self, place: usize) -> u64 {
        self.entries[self.order[place]].at
    }

    /// Takes what is at `place` out of the heap. Its entry may be gone already.
    fn take_out(&mut self, place: usize) {
        self.order.swap_remove(place);
        if place < self.order.len() {
            self.settle(place);
            self.lower(place);
            self.raise(place);
        }
    }

    /// Moves what is at `place` towards the root, until its parent is not later.
    fn raise(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.at(parent) <= self.at(place) {
                return;
            }
            self.swap(place, parent);
            place = parent;
        }
    }

    /// Moves what is at `place` away from the root, until no child is earlier.
    fn lower(&mut self, mut place: usize) {
        loop {
            let children = 2 * place + 1..(2 * place + 3).min(self.order.len());
            let Some(earliest) = children.min_by_key(|child| self.at(*child)) else { return };
            if self.at(place) <= self.at(earliest) {
                return;
            }
            self.swap(place, earliest);
            place = earliest;
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.order.swap(a, b);
        self.settle(a);
        self.settle(b);
    }

    /// Tells the entry that is at `place` so.
    fn settle(&mut self, place: usize) {
        self.entries[self.order[place]].place = place as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    proptest! {
        /// Whatever is begun and taken back: they fire by time, each once, and none that was taken back.
        #[test]
        fn they_fire_by_time(steps in prop::collection::vec((0_u64..50, 0_usize..4), 0..200)) {
            let mut timers = Timers::default();
            let start = timers.origin;
            let mut waiting: Vec<(u64, u32)> = Vec::new();
            for (at, step) in steps {
                if step == 0 && !waiting.is_empty() {
                    let (_, key) = waiting.swap_remove(at as usize % waiting.len());
                    timers.remove(key);
                } else {
                    waiting.push((at, timers.insert(start + Duration::from_millis(at), Waker::noop())));
                }
            }
            let mut fired = Vec::new();
            for now in 0..50 {
                let now = start + Duration::from_millis(now);
                while timers.fire(now).is_some() {
                    let (at, _) = waiting.iter().find(|(_, key)| {
                        timers.entries[*key].fired && !fired.contains(key)
                    }).copied().unwrap();
                    prop_assert_eq!(start + Duration::from_millis(at), now);
                    fired.extend(waiting.iter().map(|(_, key)| *key).filter(|key| timers.entries[*key].fired));
                    fired.sort_unstable();
                    fired.dedup();
                }
            }
            prop_assert_eq!(fired.len(), waiting.len());
            prop_assert!(timers.order.is_empty());
        }
    }
}
