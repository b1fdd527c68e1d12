//! Every map. Sizes are defaults: the agent sets its own when it loads the object.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, SkStorage, lpm_trie},
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::btf_map,
};
use tidegate_common::{
    ANNOUNCE_SLOTS, Addr, ClusterState, Destination, EVENTS_BYTES, Enrolment, FLOW_EVENTS_BYTES, Flow,
    FlowEvent, FlowKey, FlowSlot, HostState, InFlight, MAX_DESTINATIONS, MAX_IN_FLIGHT, MAX_NAMESPACES,
    NotEnrolled, OriginalDst, Reason, ServiceState, Settings,
};

use crate::announce::Slot;

/// Where a socket meant to connect. See [`tidegate_common::Role`] for whose socket.
#[btf_map]
pub static ORIGINAL_DST: SkStorage<OriginalDst> = SkStorage::new();

/// The agent's own upstream sockets and capture listeners ([`tidegate_common::OwnSocket`]). Written by file descriptor
/// only, which a pod can't do: unlike SO_MARK, which any pod with CAP_NET_RAW may set.
#[btf_map]
pub static OWN_SOCKET: SkStorage<u32> = SkStorage::new();

/// Captured connections between SYN and accepted socket. A plain hash: an LRU would evict a live handshake.
#[btf_map]
pub static IN_FLIGHT: HashMap<FlowKey, InFlight, { MAX_IN_FLIGHT as usize }> = HashMap::new();

/// Enrolled namespaces by netns cookie.
#[btf_map]
pub static NAMESPACES: HashMap<u64, Enrolment, { MAX_NAMESPACES as usize }> = HashMap::new();

/// Rules by destination; values are [`tidegate_common::RuleValue`].
#[btf_map]
pub static DESTINATIONS: HashMap<Destination, u32, { MAX_DESTINATIONS as usize }> = HashMap::new();

/// Networks that only exact rules take.
#[btf_map]
pub static EXCLUDED: LpmTrie<[u32; 5], u8, 1> = LpmTrie::new();

/// One entry.
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

/// One counter per [`Reason`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Reason::COUNT }> = PerCpuArray::new();

/// Hints to the agent.
#[btf_map]
pub static EVENTS: RingBuf<NotEnrolled, { EVENTS_BYTES as usize }> = RingBuf::new();

/// Which namespaces were announced lately.
#[btf_map]
pub static ANNOUNCED: Array<Slot, { ANNOUNCE_SLOTS as usize }> = Array::new();

/// Sockets of applications that are connected straight to an endpoint, see [`crate::record`].
#[btf_map]
pub static FLOW_SLOTS: Array<FlowSlot, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Those whose slot was another's.
#[btf_map]
pub static FLOWS: SkStorage<Flow> = SkStorage::new();

/// Blocks of services and clusters. The agent has these four, and the slots, in its memory: an update is no system call.
#[btf_map]
pub static ARENA: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Filter chains of listeners on the kernel path, and what chooses among those of one.
#[btf_map]
pub static SERVICES: Array<ServiceState, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Their clusters.
#[btf_map]
pub static CLUSTERS: Array<ClusterState, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Hosts of those.
#[btf_map]
pub static HOSTS: Array<HostState, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Connections of the kernel path that have ended.
#[btf_map]
pub static FLOW_EVENTS: RingBuf<FlowEvent, { FLOW_EVENTS_BYTES as usize }> = RingBuf::new();

/// 1 when the kernel has `bpf_set_retval`. Read-only for the verifier: it drops the branch that isn't taken, so
/// an older kernel never sees the helper.
#[unsafe(no_mangle)]
pub static HAS_SET_RETVAL: Global<u8> = Global::new(0);

/// 1 when there are excluded networks. Otherwise the verifier drops the search.
#[unsafe(no_mangle)]
pub static EXCLUDES: Global<u8> = Global::new(0);

/// 1 when the kernel path is on. Off, the verifier drops it, and it costs nothing.
#[unsafe(no_mangle)]
pub static KERNEL_PATH: Global<u8> = Global::new(0);

/// 1 when the kernel drops what a socket has to send before it tells that an ICMP message has ended its handshake.
#[unsafe(no_mangle)]
pub static ERRORS_PURGE: Global<u8> = Global::new(0);

/// Whether a destination is in an excluded network.
#[inline(always)]
pub fn is_excluded(addr: Addr) -> bool {
    EXCLUDES.load() != 0
        && EXCLUDED.get(&lpm_trie::Key::new(Addr::PREFIX_KEY_HEAD + 128, addr.prefix_key())).is_some()
}

/// Whether connections may go straight to endpoints.
#[inline(always)]
pub fn kernel_path() -> bool {
    KERNEL_PATH.load() != 0
}

/// The value that `map` holds for the socket.
#[inline(always)]
pub fn stored<T>(map: &SkStorage<T>, sk: *mut bpf_sock) -> Option<&mut T> {
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: both pointers are what the helper takes (the verifier checks them); a null answer is "none", and what
    // it returns lives at least as long as the program runs.
    unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), 0).cast::<T>().as_mut() }
}

/// Stores `value` for the socket, over an older one. False when the kernel has no memory for it.
#[inline(always)]
pub fn store<T: Copy>(map: &SkStorage<T>, sk: *mut bpf_sock, value: &mut T) -> bool {
    let map = core::ptr::from_ref(map).cast_mut().cast();
    let new = core::ptr::from_mut(value);
    // SAFETY: as in `stored`; `new` points to the program's stack.
    match unsafe {
        bpf_sk_storage_get(map, sk.cast(), new.cast(), BPF_SK_STORAGE_GET_F_CREATE.into())
            .cast::<T>()
            .as_mut()
    } {
        // The helper ignores the new value when there was an old one.
        Some(slot) => {
            *slot = *value;
            true
        }
        None => false,
    }
}

/// Removes what the socket has in `map`, if anything.
#[inline(always)]
pub fn discard<T>(map: &SkStorage<T>, sk: *mut bpf_sock) {
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: as in `stored`. The only error is "there was none".
    unsafe { bpf_sk_storage_delete(map, sk.cast()) };
}
