//! Tells the agent about a namespace that it doesn't know, or should look at anew, at once and not at its next walk.

use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use tidegate_common::{ANNOUNCE_INTERVAL_NS, ANNOUNCE_SLOTS, NotEnrolled, Reason};

use crate::{
    counters::count,
    maps::{ANNOUNCED, EVENTS},
};

/// When a namespace was last announced. Two namespaces that share a slot push each other out, which costs an event
/// too many and never one too few; a hash keyed by namespace would leak those that were never enrolled.
#[repr(C)]
pub struct Slot {
    netns_cookie: u64,
    at_ns: u64,
}

const _: () = assert!(ANNOUNCE_SLOTS.is_power_of_two());

/// The process that connects is in a namespace that is not enrolled.
#[inline(always)]
pub fn announce_connect(netns_cookie: u64) {
    // SAFETY (both): no preconditions.
    let (cgroup_id, tgid) =
        unsafe { (bpf_get_current_cgroup_id(), (bpf_get_current_pid_tgid() >> 32) as u32) };
    announce(netns_cookie, cgroup_id, tgid);
}

/// Announces the namespace unless that was done within [`ANNOUNCE_INTERVAL_NS`].
#[inline(always)]
pub fn announce(netns_cookie: u64, cgroup_id: u64, tgid: u32) {
    let Some(slot) = ANNOUNCED.get_ptr_mut(netns_cookie as u32 & (ANNOUNCE_SLOTS - 1)) else { return };
    // SAFETY: the helper has no preconditions; the slot is map memory, and a torn update only costs an event.
    let (slot, now) = unsafe { (&mut *slot, bpf_ktime_get_ns()) };
    if slot.netns_cookie == netns_cookie && now - slot.at_ns < ANNOUNCE_INTERVAL_NS {
        return;
    }
    let event = NotEnrolled { netns_cookie, cgroup_id, tgid, reserved: 0 };
    if EVENTS.output(event, 0).is_ok() {
        slot.netns_cookie = netns_cookie;
        slot.at_ns = now;
        count(Reason::Announced);
    } else {
        count(Reason::AnnouncementLost);
    }
}
