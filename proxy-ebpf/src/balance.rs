//! The kernel path in connect(2): which endpoint a connection goes to.

use core::ptr::addr_of;

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use tidegate_common::{
    Addr, ClusterState, HostState, Reason, ServiceState,
    balance::{Endpoint, NoPick, Table, choose, choose_cluster},
};

use crate::{
    counters::add,
    maps::{ARENA, CLUSTERS, HOSTS, SERVICES},
};

/// What was chosen, or refused. Index 0: none.
#[derive(Clone, Copy)]
pub struct Choice {
    pub cluster: u32,
    pub outcome: Result<Endpoint, Reason>,
}

/// A block in the arena. The agent writes a block before anybody can find it, and does not touch it again before every
/// program that may have found it has ended.
struct Block {
    start: u32,
    turn: u32,
}

impl Table for Block {
    #[inline(always)]
    fn word(&self, offset: u32) -> Option<u64> {
        ARENA.get(self.start.wrapping_add(offset)).copied()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn turn(&self) -> u32 {
        self.turn
    }

    #[inline(always)]
    fn active(&self, host: u32) -> u64 {
        // SAFETY: an aligned word of a map that others add to.
        host_state(host).map_or(u64::MAX, |host| unsafe { addr_of!((*host).tally.active).read_volatile() })
    }
}

/// Chooses the endpoint for a connection to `addr` that belongs to a service. Counts what it refuses.
#[inline(always)]
pub fn balance(service: u32, addr: &Addr, refusal: Reason) -> Choice {
    let mut choice = Choice { cluster: 0, outcome: Err(refusal) };
    let Some(service) = SERVICES.get_ptr_mut(service) else { return choice };
    // SAFETY (here and below): aligned words of maps; blocks are replaced as one word.
    let start = unsafe { addr_of!((*service).block).read_volatile() } as u32;
    if start == 0 {
        return choice;
    }
    let Some(index) = choose_cluster(&Block { start, turn: 0 }) else { return choice };
    let Some(cluster) = CLUSTERS.get_ptr_mut(index) else { return choice };
    // SAFETY: as above.
    let (start, max, active, turn) = unsafe {
        (
            addr_of!((*cluster).block).read_volatile() as u32,
            addr_of!((*cluster).max_connections).read_volatile(),
            addr_of!((*cluster).tally.active).read_volatile(),
            addr_of!((*cluster).turn).read_volatile(),
        )
    };
    if start == 0 {
        return choice;
    }
    choice.cluster = index;
    if active >= max as u64 {
        // SAFETY: as above.
        unsafe {
            add(&raw mut (*cluster).tally.overflow, 1);
            add(&raw mut (*service).tally.overflow, 1);
        }
        choice.outcome = Err(Reason::Overflow);
        return choice;
    }
    // Two picks at one moment may have the same turn, as two workers of a proxy may.
    // SAFETY: as above.
    add(unsafe { &raw mut (*cluster).turn }, 1);
    // If this program is held up for seconds, what it reads may be another's block already: then once more, from the new
    // one.
    let mut block = Block { start, turn: turn as u32 };
    let mut picked = Err(NoPick::Broken);
    for _ in 0..2 {
        picked = choose(&block);
        // SAFETY: as above.
        let now = unsafe { addr_of!((*cluster).block).read_volatile() } as u32;
        if now == block.start {
            break;
        }
        block.start = now;
    }
    match picked {
        Ok(pick) => {
            if pick.panic {
                // SAFETY: as above.
                add(unsafe { &raw mut (*cluster).tally.panics }, 1);
            }
            if pick.endpoint.addr.is_v4() == addr.is_v4() {
                choice.outcome = Ok(pick.endpoint);
            }
        }
        Err(NoPick::NoHost { panic }) => {
            // SAFETY: as above.
            unsafe {
                if panic {
                    add(&raw mut (*cluster).tally.panics, 1);
                }
                add(&raw mut (*cluster).tally.no_host, 1);
                add(&raw mut (*service).tally.no_host, 1);
            }
            choice.outcome = Err(Reason::NoHost);
        }
        Err(NoPick::Broken) => {}
    }
    choice
}

#[inline(always)]
pub fn service_state(index: u32) -> Option<*mut ServiceState> {
    SERVICES.get_ptr_mut(index)
}

#[inline(always)]
pub fn cluster_state(index: u32) -> Option<*mut ClusterState> {
    CLUSTERS.get_ptr_mut(index)
}

#[inline(always)]
pub fn host_state(index: u32) -> Option<*mut HostState> {
    HOSTS.get_ptr_mut(index)
}
