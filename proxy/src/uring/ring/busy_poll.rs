//! Whether a worker that has nothing to do looks for the next message for a moment before it sleeps.
//!
//! Where one conversation goes back and forth between neighbours, going to sleep and being woken (in a virtual machine: by
//! an interrupt from another CPU) takes longer than the answer does. Where several do, there is mostly more to do
//! already, and where an answer takes long, looking for it would be a waste. So a worker looks for the next message only
//! when a number of them have come in quick succession, all for one task, and only while nobody else wants the CPU.

use std::time::{Duration, Instant};

/// How many quick waits of one task, remembered, make its next one worth a look.
const ENOUGH: u8 = 16;
/// How many are remembered.
const MOST: u8 = 32;
/// How many of them a wait costs that was not quick: so that at most one look in nine is in vain for long.
const PRICE: u8 = 8;
/// Who keeps the CPU that was offered for so many times the length of a look has work of its own, and is not one end of
/// the conversation.
const LONG: u32 = 4;
/// For how long the CPU is left to it then.
const REST: Duration = Duration::from_millis(100);

/// What one worker has learnt of its waits.
#[derive(Debug, Default)]
pub(super) struct BusyPoll {
    /// How long to look; zero: never.
    window: Duration,
    /// Whom the last completion has woken, by the address of its waker's data, which is never followed.
    task: usize,
    /// That was another one than before, or moves bulk.
    changed: bool,
    /// Quick waits of `task`, less those that were not.
    quick: u8,
    /// Somebody else needs the CPU.
    rests_until: Option<Instant>,
}

impl BusyPoll {
    pub(super) fn set_window(&mut self, window: Duration) {
        *self = Self { window, ..Self::default() };
    }

    /// A completion wakes a task.
    #[inline]
    pub(super) fn wakes(&mut self, task: usize, for_bulk: bool) {
        if task != self.task || for_bulk {
            (self.task, self.changed) = (task, true);
        }
    }

    /// A wait begins. True if something is to be learnt from it: tell [`Self::waited`] how long it was.
    #[inline]
    pub(super) fn begins(&mut self) -> bool {
        if std::mem::take(&mut self.changed) {
            self.quick = 0;
            return false;
        }
        !self.window.is_zero()
    }

    /// Whether a wait that begins now begins with a look.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.quick >= ENOUGH && self.rests_until.is_none_or(|until| now >= until)
    }

    /// Whether a look since `began`, which has found nothing so far, goes on: at `before` the CPU was offered to others,
    /// and at `now` it was back.
    pub(super) fn goes_on(&mut self, began: Instant, before: Instant, now: Instant) -> bool {
        if now.saturating_duration_since(before) >= LONG * self.window {
            self.rests_until = Some(now + REST);
            return false;
        }
        now.saturating_duration_since(began) < self.window
    }

    /// A wait has ended, with a look or without.
    pub(super) fn waited(&mut self, time: Duration) {
        // Who sleeps learns of it later than who looks.
        self.quick = if time < 2 * self.window {
            (self.quick + 1).min(MOST)
        } else {
            self.quick.saturating_sub(PRICE)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_micros(50);
    const QUICK: Duration = WINDOW;
    const SLOW: Duration = Duration::from_micros(100);

    /// One conversation, after so many waits of that length.
    fn after(count: u8, time: Duration) -> BusyPoll {
        let mut busy = BusyPoll::default();
        busy.set_window(WINDOW);
        busy.wakes(1, false);
        assert!(!busy.begins(), "nothing is to be learnt from a new task's first wait");
        for _ in 0..count {
            busy.wakes(1, false);
            assert!(busy.begins());
            busy.waited(time);
        }
        busy
    }

    fn looks(busy: &mut BusyPoll) -> bool {
        busy.begins() && busy.is_due(Instant::now())
    }

    #[test]
    fn only_quick_succession_is_looked_for() {
        assert!(looks(&mut after(ENOUGH, QUICK)));
        assert!(!looks(&mut after(ENOUGH - 1, QUICK)));
        assert!(!looks(&mut after(200, SLOW)));
    }

    #[test]
    fn of_nine_looks_at_most_one_is_in_vain() {
        let mut busy = after(200, QUICK);
        let (mut looked, mut in_vain) = (0, 0);
        for turn in 0..900 {
            let is_quick = turn % 2 == 0;
            if looks(&mut busy) {
                looked += 1;
                in_vain += i32::from(!is_quick);
            }
            busy.waited(if is_quick { QUICK } else { SLOW });
        }
        assert!(looked < 10 && in_vain < 5, "{in_vain} of {looked}: every other wait is slow");

        let mut busy = after(200, QUICK);
        for turn in 0..900 {
            assert!(looks(&mut busy), "one wait in nine is slow: {turn}");
            busy.waited(if turn % 9 == 0 { SLOW } else { QUICK });
        }
    }

    #[test]
    fn several_conversations_and_bulk_are_slept_for() {
        let mut busy = after(ENOUGH, QUICK);
        busy.wakes(2, false);
        busy.wakes(1, false);
        assert!(!looks(&mut busy));
        assert!(!looks(&mut busy), "counted anew");
        let mut busy = after(ENOUGH, QUICK);
        busy.wakes(1, true);
        assert!(!looks(&mut busy));
    }

    #[test]
    fn a_look_ends_with_its_time() {
        let mut busy = after(ENOUGH, QUICK);
        let began = Instant::now();
        assert!(busy.goes_on(began, began, began + WINDOW / 2));
        assert!(!busy.goes_on(began, began + WINDOW / 2, began + WINDOW));
        assert!(busy.is_due(began + WINDOW), "nobody else wanted the CPU");
    }

    #[test]
    fn who_keeps_the_cpu_is_left_alone() {
        let mut busy = after(ENOUGH, QUICK);
        let began = Instant::now();
        let back = began + LONG * WINDOW;
        assert!(!busy.goes_on(began, began, back));
        assert!(!busy.is_due(back));
        assert!(!busy.is_due(back + REST / 2));
        assert!(busy.is_due(back + REST));
    }

    #[test]
    fn without_a_window_nothing_is_learnt() {
        let mut busy = BusyPoll::default();
        for _ in 0..2 * ENOUGH {
            busy.wakes(1, false);
            assert!(!busy.begins());
        }
    }
}
