//! The record of a connection of the kernel path: in the socket's slot of a table, else in its storage.
//!
//! A storage is two allocations, and most of what the programs cost a short connection; a slot is none. The cookie says which one a
//! socket may have. While that is another's, the record goes to the storage: so there is no limit, and a slot that is never given back
//! costs nothing but itself.
//!
//! A slot is its owner's from connect(2) until the connection has ended, or the socket is closed without one. Who looks for a record
//! compares the whole cookie, and no two sockets ever have the same. The record is read and written with the socket's lock held. Only
//! [`released`] runs without it, and so does no more than compare and exchange the owner: that fails once the slot is another's.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xchg},
    ptr::{addr_of, null_mut},
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{bindings::bpf_sock, helpers::generated::bpf_get_socket_cookie};
use tidegate_common::{FLOW_SLOTS, Flow, FlowSlot, Phase};

use crate::maps::{self, FLOWS, kernel_path, store, stored};

const _: () = assert!(FLOW_SLOTS.is_power_of_two());

/// A socket's record.
pub struct Record {
    /// What is known of the connection.
    pub flow: &'static mut Flow,
    /// Of its slot; null when it is in the storage.
    owner: *mut u64,
    /// Of the socket.
    cookie: u64,
}

impl Record {
    /// Gives the slot back: the connection has ended. (A storage goes with its socket.)
    #[inline(always)]
    pub fn free(self) {
        if !self.owner.is_null() {
            free(self.owner);
        }
    }

    /// Whether what has been read of it is the socket's: for a program that runs without the socket's lock.
    #[inline(always)]
    pub fn is_still_there(&self) -> bool {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as in `owner`.
        self.owner.is_null() || unsafe { self.owner.read_volatile() } & !FlowSlot::RELEASED == self.cookie
    }
}

/// The socket's record. `ctx` is the program's, and of this socket.
#[inline(always)]
pub fn find(ctx: *mut c_void, sk: *mut bpf_sock) -> Option<Record> {
    if !kernel_path() {
        return None;
    }
    let cookie = cookie(ctx);
    if let Some(slot) = slot(cookie) {
        let owner = owner(slot);
        if owner & !FlowSlot::RELEASED == cookie {
            // SAFETY: map memory, and this socket's.
            let (flow, word) = unsafe { (&mut (*slot).flow, &raw mut (*slot).owner) };
            if owner != cookie {
                flow.released = 1;
            }
            return Some(Record { flow, owner: word, cookie });
        }
    }
    stored(&FLOWS, sk).map(|flow| Record { flow, owner: null_mut(), cookie })
}

/// Makes `flow` the socket's record, in place of an older one. False when the kernel has no memory for it.
#[inline(always)]
pub fn make(ctx: *mut c_void, sk: *mut bpf_sock, flow: &mut Flow) -> bool {
    let cookie = cookie(ctx);
    if let Some(slot) = slot(cookie) {
        // SAFETY: map memory.
        let owner = unsafe { &raw mut (*slot).owner };
        let former = exchange_if(owner, 0, cookie);
        if former == 0 || former == cookie {
            // SAFETY: map memory, and this socket's from here on.
            unsafe { (*slot).flow = *flow };
            return true;
        }
    }
    store(&FLOWS, sk, flow)
}

/// Removes the socket's record, if there is one: no SYN was sent, or what followed has ended.
#[inline(always)]
pub fn discard(ctx: *mut c_void, sk: *mut bpf_sock) {
    if !kernel_path() {
        return;
    }
    let cookie = cookie(ctx);
    if let Some(slot) = slot(cookie)
        && owner(slot) == cookie
    {
        // SAFETY: map memory.
        free(unsafe { &raw mut (*slot).owner });
    }
    maps::discard(&FLOWS, sk);
}

/// The application has closed its last descriptor: no connect(2) follows. The connection may end at the same time, on another CPU.
/// (The kernel's own sockets, such as MPTCP has, are not heard of here: one that has sent no SYN keeps its slot.)
#[inline(always)]
pub fn released(sk: *mut bpf_sock) {
    let cookie = cookie(sk.cast());
    if let Some(slot) = slot(cookie)
        && owner(slot) == cookie
    {
        // SAFETY: map memory.
        let (owner, phase) = unsafe { (&raw mut (*slot).owner, addr_of!((*slot).flow.phase)) };
        let released = cookie | FlowSlot::RELEASED;
        // SAFETY: map memory, an aligned field. It may be another socket's by now: then the exchange fails.
        if exchange_if(owner, cookie, released) == cookie
            && unsafe { phase.read_volatile() } == Phase::Chosen as u16
        {
            // No SYN was sent, so that nobody else hears of its end.
            exchange_if(owner, released, 0);
        }
    } else if let Some(flow) = stored(&FLOWS, sk) {
        // SAFETY: socket storage, an aligned field that nobody else writes. Volatile: other programs read it.
        unsafe { (&raw mut flow.released).write_volatile(1) };
    }
}

/// The one that a socket may have.
#[inline(always)]
fn slot(cookie: u64) -> Option<*mut FlowSlot> {
    maps::FLOW_SLOTS.get_ptr_mut(cookie as u32 & (FLOW_SLOTS - 1))
}

/// Whose it is.
#[inline(always)]
fn owner(slot: *mut FlowSlot) -> u64 {
    // SAFETY: map memory, an aligned word. Volatile: programs on other CPUs write it.
    unsafe { addr_of!((*slot).owner).read_volatile() }
}

#[inline(always)]
fn cookie(ctx: *mut c_void) -> u64 {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_get_socket_cookie(ctx) }
}

/// Writes `new` over `old`, if that is what is there; what was there.
#[inline(always)]
fn exchange_if(word: *mut u64, old: u64, new: u64) -> u64 {
    // The intrinsic as in counters.rs.
    // SAFETY: an aligned word in a map.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new).0 }
}

/// After all that was written to the record.
#[inline(always)]
fn free(owner: *mut u64) {
    // SAFETY: as in `exchange_if`.
    unsafe { atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(owner, 0) };
}
