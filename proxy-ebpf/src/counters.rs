//! Counters by reason.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use tidegate_common::Reason;

use crate::maps::COUNTERS;

/// Adds one. Atomic although the counter is this CPU's own: a connect(2) can be preempted by another one, or
/// interrupted by sockops.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        add(counter, 1);
    }
}

/// Adds to a counter in a map.
#[inline(always)]
pub fn add(counter: *mut u64, amount: u64) {
    // The intrinsic, since `AtomicU64` has no `fetch_add` on a target without compare-and-swap. The result is not used, so
    // this is one `lock add` instruction.
    // SAFETY: an aligned u64 in a map, which programs only add to.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, amount) };
}

/// Takes one from a counter in a map.
#[inline(always)]
pub fn subtract(counter: *mut u64) {
    add(counter, u64::MAX);
}
