//! The kernel path in connect(2): which endpoint a connection goes to.

use core::ptr::addr_of;

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use tidegate_common::{
    Addr, ClusterState, HostState, Reason, ServiceState,
    balance::{ENDPOINT_WORDS, Endpoint, Located, NoPick, ServiceHead, Table, choose_cluster, locate},
    selector::select,
};

use crate::{
    connect::Source,
    counters::add,
    maps::{ARENA, CLUSTERS, HOSTS, SERVICES},
};

/// What was chosen, or refused. Index 0: none.
#[derive(Clone, Copy)]
pub struct Choice {
    pub service: u32,
    pub cluster: u32,
    pub outcome: Result<Endpoint, Reason>,
}

/// A block in the arena. The agent writes a block before anybody can find it, and does not touch it again before every
/// program that may have found it has ended.
struct Block {
    start: u32,
    turn: u32,
    hash: u64,
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
        let Some(host) = host_state(host) else { return u64::MAX };
        // SAFETY: aligned words of a map that others write to.
        let (active, proxied) = unsafe {
            (addr_of!((*host).tally.active).read_volatile(), addr_of!((*host).proxied).read_volatile())
        };
        active.wrapping_add(proxied)
    }

    #[inline(always)]
    fn hash(&self) -> u64 {
        self.hash
    }
}

/// A function of its own, and global: so the verifier goes through it once, and not for every way that leads to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn locate_endpoint(start: u32, turn: u32, hash: u64) -> u64 {
    Located::encode(locate(&Block { start, turn, hash }))
}

/// The service of a filter chain: this one, or the one that it leads connections from this source to ([`Addr::halves`];
/// zeroes: it is not known). 0: only the proxy can choose. Global for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn service_of(service: u32, upper: u64, lower: u64) -> u64 {
    let Some(start) = service_block(service) else { return service.into() };
    match ARENA.get(start) {
        Some(head) if ServiceHead::decode(*head).is_selector() => {}
        _ => return service.into(),
    }
    if upper | lower == 0 {
        return 0;
    }
    select(&Block { start, turn: 0, hash: 0 }, [upper, lower]).unwrap_or(0).into()
}

/// Where the block of a service starts.
#[inline(always)]
fn service_block(service: u32) -> Option<u32> {
    let service = SERVICES.get_ptr_mut(service)?;
    // SAFETY: an aligned word of a map; blocks are replaced as one word.
    let start = unsafe { addr_of!((*service).block).read_volatile() } as u32;
    if start == 0 { None } else { Some(start) }
}

/// Chooses the endpoint for a connection to `addr` that belongs to a service. Counts what it refuses. None: only the proxy
/// can choose.
#[inline(always)]
pub fn balance(service: u32, addr: &Addr, source: &Source<'_>, refusal: Reason) -> Option<Choice> {
    let [upper, lower] = source.address().halves();
    let service = service_of(service, upper, lower) as u32;
    if service == 0 {
        return None;
    }
    let mut choice = Choice { service, cluster: 0, outcome: Err(refusal) };
    let Some(start) = service_block(service) else { return Some(choice) };
    let Some(service) = SERVICES.get_ptr_mut(service) else { return Some(choice) };
    let Some(member) = choose_cluster(&Block { start, turn: 0, hash: 0 }) else { return Some(choice) };
    let index = member.cluster;
    // Whatever is done with it: the verifier goes through the rest once then, and not once for each case.
    let hash = if member.by_source { source.hash() } else { random_hash() };
    if hash == 0 {
        return None;
    }
    let Some(cluster) = CLUSTERS.get_ptr_mut(index) else { return Some(choice) };
    // SAFETY (here and below): aligned words of maps; blocks are replaced as one word.
    let (start, max, active, proxied, turn) = unsafe {
        (
            addr_of!((*cluster).block).read_volatile() as u32,
            addr_of!((*cluster).max_connections).read_volatile(),
            addr_of!((*cluster).tally.active).read_volatile(),
            addr_of!((*cluster).proxied).read_volatile(),
            addr_of!((*cluster).turn).read_volatile(),
        )
    };
    if start == 0 {
        return Some(choice);
    }
    choice.cluster = index;
    // What a process that was killed had through the proxy is gone. Asked last, since the answer is dear.
    let max = max as u64;
    if active >= max || (active.wrapping_add(proxied) >= max && source.agent_lives()) {
        // SAFETY: as above.
        unsafe {
            add(&raw mut (*cluster).tally.overflow, 1);
            add(&raw mut (*service).tally.overflow, 1);
        }
        choice.outcome = Err(Reason::Overflow);
        return Some(choice);
    }
    // Two picks at one moment may have the same turn, as two workers of a proxy may.
    // SAFETY: as above.
    add(unsafe { &raw mut (*cluster).turn }, 1);
    // If this program is held up for seconds, what it reads may be another's block already: then once more, from the new
    // one.
    let mut block = Block { start, turn: turn as u32, hash };
    // Plain words: the compiler may pass on what it thinks undefined, and the verifier does not let it.
    let mut located = Located::encode(Err(NoPick::Broken));
    let mut words = [0; ENDPOINT_WORDS as usize];
    for _ in 0..2 {
        located = locate_endpoint(block.start, block.turn, block.hash);
        words = Endpoint::words(&block, located as u32).unwrap_or([0; ENDPOINT_WORDS as usize]);
        // SAFETY: as above.
        let now = unsafe { addr_of!((*cluster).block).read_volatile() } as u32;
        if now == block.start {
            break;
        }
        block.start = now;
    }
    match Located::decode(located) {
        Ok(Located { panic, .. }) => {
            if panic {
                // SAFETY: as above.
                add(unsafe { &raw mut (*cluster).tally.panics }, 1);
            }
            let endpoint = Endpoint::decode(words);
            // Host 0 is nobody's: there were no such words.
            if endpoint.host != 0 && endpoint.addr.is_v4() == addr.is_v4() {
                choice.outcome = Ok(endpoint);
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
    Some(choice)
}

/// Anything but 0, evenly from all numbers.
#[inline(always)]
fn random_hash() -> u64 {
    // SAFETY: no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    (u64::from(random) | 1 << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
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
