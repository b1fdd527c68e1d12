#![no_std]
//! Types shared by the eBPF programs and the agent.
//!
//! Everything that crosses the kernel boundary is here, once: map keys and values, counters, events, map names
//! and sizes. Rules that hold for all of them:
//!
//! * `repr(C)`, explicit padding that the constructors zero (padding is part of a hash key), sizes asserted.
//! * Addresses are 16 bytes in network order; IPv4 is `::ffff:a.b.c.d` ([`Addr`]).
//! * Ports are `u16` in host order.
//! * A field that the other side could fill with an invalid value is a plain integer with a checked reader, never
//!   a Rust enum.
//!
//! A change of any layout needs a new [`LAYOUT_VERSION`]: a process only reuses maps of its own version.

#![allow(clippy::inline_always, reason = "a BPF program has no call to these: they must disappear")]

mod addr;
pub mod balance;
mod event;
mod flow;
mod kernel_path;
mod limits;
mod policy;
mod reason;
pub mod selector;
pub mod syn;

pub use addr::Addr;
pub use event::NotEnrolled;
pub use flow::{Carrier, FlowKey, InFlight, OriginalDst, OwnSocket, Role};
pub use kernel_path::{
    ASLEEP, ClusterState, ENDING, End, FIRST_BLOCK, Flow, FlowEvent, FlowFlag, FlowSlot, HostState, Phase,
    ServiceState, Tally,
};
pub use limits::{
    ANNOUNCE_INTERVAL_NS, ANNOUNCE_SLOTS, EVENTS_BYTES, FLOW_EVENTS_BYTES, FLOW_SLOTS, LAYOUT_VERSION,
    MAX_DESTINATIONS, MAX_IN_FLIGHT,
};
pub use limits::{MAX_NAMESPACES, global, map};
pub use policy::{Destination, EnrolState, Enrolment, FailMode, Place, RuleValue, Settings, Verdict};
pub use reason::Reason;

/// Lets aya copy a type to and from the kernel.
macro_rules! pod {
    ($($type:ty),+) => { $(
        #[cfg(feature = "user")]
        #[allow(unsafe_code, reason = "aya's marker for plain bytes is an unsafe trait")]
        // SAFETY: repr(C), made of integers only, every byte is a named field (see the size asserts).
        unsafe impl aya::Pod for $type {}
    )+ };
}
pod!(Addr, NotEnrolled, FlowKey, InFlight, OriginalDst, Destination, Enrolment, Settings);
pod!(Tally, ServiceState, ClusterState, HostState, Flow, FlowSlot, FlowEvent);
