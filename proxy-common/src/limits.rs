/// Version of every layout in this crate; names the pin directory of the maps.
pub const LAYOUT_VERSION: u32 = 7;

/// Default size of the in-flight map, entries. One per handshake in progress whose SYN can't carry its original
/// destination ([`crate::Carrier::Map`]). The memory is taken up front (about 1 MB).
pub const MAX_IN_FLIGHT: u32 = 8_192;

/// Default size of the namespaces map, entries (pods of one node; Kubernetes' own limit is 110 by default).
pub const MAX_NAMESPACES: u32 = 4_096;

/// Default size of the destinations map, entries.
pub const MAX_DESTINATIONS: u32 = 65_536;

/// Size of the events ring buffer, bytes: a power of two and a multiple of the page size.
pub const EVENTS_BYTES: u32 = 65_536;

/// Size of the ring buffer of flows, bytes: 30,000 connections that end between two looks of the agent.
pub const FLOW_EVENTS_BYTES: u32 = 4 << 20;

/// Slots for connections of the kernel path (direct-mapped by socket cookie; a power of two): 1.2 MB.
pub const FLOW_SLOTS: u32 = 16_384;

/// Slots of the table that limits announcements (direct-mapped by netns cookie; a power of two).
pub const ANNOUNCE_SLOTS: u32 = 1_024;

/// A namespace is announced at most once in this time, nanoseconds.
pub const ANNOUNCE_INTERVAL_NS: u64 = 100_000_000;

/// Names of the maps, as in the object and in the pin directory.
pub mod map {
    /// SK_STORAGE → [`crate::OriginalDst`].
    pub const ORIGINAL_DST: &str = "ORIGINAL_DST";
    /// SK_STORAGE → `u32`, an [`crate::OwnSocket`]: this socket is the agent's own.
    pub const OWN_SOCKET: &str = "OWN_SOCKET";
    /// HASH [`crate::FlowKey`] → [`crate::InFlight`].
    pub const IN_FLIGHT: &str = "IN_FLIGHT";
    /// HASH netns cookie (`u64`) → [`crate::Enrolment`].
    pub const NAMESPACES: &str = "NAMESPACES";
    /// LPM_TRIE [`crate::Addr::prefix_key`] → `u8`, 1: destinations that only exact rules take. Not pinned.
    pub const EXCLUDED: &str = "EXCLUDED";
    /// HASH [`crate::Destination`] → [`crate::RuleValue`] as `u32`.
    pub const DESTINATIONS: &str = "DESTINATIONS";
    /// ARRAY of one [`crate::Settings`].
    pub const SETTINGS: &str = "SETTINGS";
    /// PERCPU_ARRAY of `u64`, indexed by [`crate::Reason`].
    pub const COUNTERS: &str = "COUNTERS";
    /// RINGBUF of [`crate::NotEnrolled`]. Not pinned: each process has its own.
    pub const EVENTS: &str = "EVENTS";
    /// ARRAY that limits announcements. Not pinned.
    pub const ANNOUNCED: &str = "ANNOUNCED";
    /// SK_STORAGE → [`crate::Flow`], of those that have no slot.
    pub const FLOWS: &str = "FLOWS";
    /// ARRAY of [`crate::FlowSlot`], indexed by the socket's cookie modulo its length. The agent maps it into its memory.
    pub const FLOW_SLOTS: &str = "FLOW_SLOTS";
    /// ARRAY of `u64`: the blocks of services and clusters ([`crate::balance`]). The agent maps it into its memory.
    pub const ARENA: &str = "ARENA";
    /// ARRAY of [`crate::ServiceState`], likewise.
    pub const SERVICES: &str = "SERVICES";
    /// ARRAY of [`crate::ClusterState`], likewise.
    pub const CLUSTERS: &str = "CLUSTERS";
    /// ARRAY of [`crate::HostState`], likewise.
    pub const HOSTS: &str = "HOSTS";
    /// RINGBUF of [`crate::FlowEvent`]. Not pinned.
    pub const FLOW_EVENTS: &str = "FLOW_EVENTS";
}

/// Names of the globals that are fixed when the object is loaded.
pub mod global {
    /// `u8`: 1 when the kernel has `bpf_set_retval` (5.18), so that a refused connect gets its own errno.
    pub const HAS_SET_RETVAL: &str = "HAS_SET_RETVAL";
    /// `u8`: 1 when there are excluded networks. Without, the programs don't look for them.
    pub const EXCLUDES: &str = "EXCLUDES";
    /// `u8`: 1 when the kernel path is on. Off, the programs don't contain it.
    pub const KERNEL_PATH: &str = "KERNEL_PATH";
    /// `u8`: 1 when the kernel drops what a socket has to send before it tells that an ICMP message has ended its handshake
    /// (6.11), so that one that still has its SYN was given up by the application.
    pub const ERRORS_PURGE: &str = "ERRORS_PURGE";
}
