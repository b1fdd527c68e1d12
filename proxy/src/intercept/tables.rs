//! The tables of the kernel path in this process's memory, and the records of its connections.
//!
//! The agent writes blocks and settings, the programs add to the tallies. Nothing here is a system call, and nothing waits.

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use aya::Ebpf;
use aya::maps::{Map, MapData, RingBuf};
use tidegate_common::{
    ASLEEP, Addr, ClusterState, FLOW_EVENTS_BYTES, FlowEvent, HostState, ServiceState, Tally, map,
};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::bpf::Mapped;
use super::error::InterceptError;

/// Sizes of the tables, entries. Entry 0 of each is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSizes {
    /// Filter chains of listeners on the kernel path, and selectors of those.
    pub services: u32,
    /// Their clusters.
    pub clusters: u32,
    /// Hosts of those.
    pub hosts: u32,
    /// Words of 8 bytes for blocks: about five for each endpoint, and room for what was replaced lately.
    pub arena: u32,
    /// Records that wait to be read, bytes: a power of two and a multiple of the page size; 136 bytes each.
    pub events: u32,
}

impl TableSizes {
    /// Nothing is on the kernel path.
    pub const OFF: Self = Self { services: 1, clusters: 1, hosts: 1, arena: 1, events: 4_096 };

    /// About 7 MB of kernel memory.
    pub const ON: Self =
        Self { services: 4_096, clusters: 4_096, hosts: 32_768, arena: 1 << 18, events: FLOW_EVENTS_BYTES };
}

const SERVICE_WORDS: usize = size_of::<ServiceState>() / 8;
const CLUSTER_WORDS: usize = size_of::<ClusterState>() / 8;
const HOST_WORDS: usize = size_of::<HostState>() / 8;

/// The tables.
#[derive(Debug)]
pub struct Tables {
    sizes: TableSizes,
    services: Mapped,
    clusters: Mapped,
    hosts: Mapped,
    arena: Mapped,
    /// The programs are loaded with these descriptors' numbers in their instructions.
    _maps: Vec<MapData>,
}

impl Tables {
    pub(super) fn take(ebpf: &mut Ebpf, sizes: TableSizes) -> Result<Self, InterceptError> {
        let mut maps = Vec::new();
        let mut mapped = |name: &'static str, words: usize| {
            let Some(Map::Array(data)) = ebpf.take_map(name) else {
                return Err(InterceptError::NotInObject(name));
            };
            let mapped =
                Mapped::new(data.fd().as_fd(), words).map_err(InterceptError::pin("mapping", name))?;
            maps.push(data);
            Ok(mapped)
        };
        Ok(Self {
            sizes,
            services: mapped(map::SERVICES, sizes.services as usize * SERVICE_WORDS)?,
            clusters: mapped(map::CLUSTERS, sizes.clusters as usize * CLUSTER_WORDS)?,
            hosts: mapped(map::HOSTS, sizes.hosts as usize * HOST_WORDS)?,
            arena: mapped(map::ARENA, sizes.arena as usize)?,
            _maps: maps,
        })
    }

    /// How much there is room for.
    pub fn sizes(&self) -> TableSizes {
        self.sizes
    }

    /// Writes a block. Nobody may be able to find what was there before.
    pub fn write_block(&self, start: u32, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            set(&self.arena, start as usize + i, *word);
        }
    }

    /// The word of a block.
    pub fn block_word(&self, at: u32) -> Option<u64> {
        self.arena.word(at as usize).map(|word| word.load(Relaxed))
    }

    /// Puts a service's block in force; 0: it has none.
    pub fn set_service(&self, index: u32, key: u64, block: u32) {
        let at = index as usize * SERVICE_WORDS;
        set(&self.services, at + offset_of!(ServiceState, key) / 8, key);
        publish(&self.services, at + offset_of!(ServiceState, block) / 8, block);
    }

    /// A service's entry.
    pub fn service(&self, index: u32) -> ServiceState {
        let at = index as usize * SERVICE_WORDS;
        ServiceState {
            block: get(&self.services, at + offset_of!(ServiceState, block) / 8),
            key: get(&self.services, at + offset_of!(ServiceState, key) / 8),
            tally: tally(&self.services, at + offset_of!(ServiceState, tally) / 8),
        }
    }

    /// Puts a cluster's block and limits in force; block 0: it has none.
    pub fn set_cluster(
        &self,
        index: u32,
        key: u64,
        block: u32,
        max_connections: u32,
        connect_timeout_ms: u32,
    ) {
        let at = index as usize * CLUSTER_WORDS;
        set(&self.clusters, at + offset_of!(ClusterState, key) / 8, key);
        let limits = u64::from(max_connections) | u64::from(connect_timeout_ms) << 32;
        set(&self.clusters, at + offset_of!(ClusterState, max_connections) / 8, limits);
        publish(&self.clusters, at + offset_of!(ClusterState, block) / 8, block);
    }

    /// A cluster's entry.
    pub fn cluster(&self, index: u32) -> ClusterState {
        let at = index as usize * CLUSTER_WORDS;
        let limits = get(&self.clusters, at + offset_of!(ClusterState, max_connections) / 8);
        ClusterState {
            block: get(&self.clusters, at + offset_of!(ClusterState, block) / 8),
            key: get(&self.clusters, at + offset_of!(ClusterState, key) / 8),
            turn: get(&self.clusters, at + offset_of!(ClusterState, turn) / 8),
            max_connections: limits as u32,
            connect_timeout_ms: (limits >> 32) as u32,
            tally: tally(&self.clusters, at + offset_of!(ClusterState, tally) / 8),
        }
    }

    /// Gives an entry to a host; cluster 0: to nobody.
    pub fn set_host(&self, index: u32, addr: Addr, port: u16, cluster: u32) {
        let at = index as usize * HOST_WORDS;
        let words = addr.words().map(u64::from);
        set(&self.hosts, at, words[0] | words[1] << 32);
        set(&self.hosts, at + 1, words[2] | words[3] << 32);
        set(&self.hosts, at + 2, u64::from(port) | u64::from(cluster) << 32);
    }

    /// A host's entry.
    pub fn host(&self, index: u32) -> HostState {
        let at = index as usize * HOST_WORDS;
        let words = [get(&self.hosts, at), get(&self.hosts, at + 1), get(&self.hosts, at + 2)];
        let half = |word: u64| [word as u32, (word >> 32) as u32];
        let [[a, b], [c, d]] = [half(words[0]), half(words[1])];
        HostState {
            addr: Addr::from_words([a, b, c, d]),
            port: words[2] as u16,
            reserved: 0,
            cluster: (words[2] >> 32) as u32,
            tally: tally(&self.hosts, at + offset_of!(HostState, tally) / 8),
        }
    }

    /// Gives an entry back: everything in it is zero. Nobody may be able to find it, and nothing may be active.
    pub fn clear_service(&self, index: u32) {
        clear(&self.services, index, SERVICE_WORDS);
    }

    /// The same for a cluster.
    pub fn clear_cluster(&self, index: u32) {
        clear(&self.clusters, index, CLUSTER_WORDS);
    }

    /// The same for a host.
    pub fn clear_host(&self, index: u32) {
        clear(&self.hosts, index, HOST_WORDS);
    }

    /// Whether the next record of a flow wakes whoever polls [`FlowEvents`]. Look once more before sleeping: a record
    /// that was written in this moment has woken nobody.
    pub fn set_asleep(&self, asleep: bool) {
        if let Some(word) = self.arena.word(ASLEEP as usize) {
            // Not after the look that follows.
            word.store(asleep.into(), SeqCst);
        }
    }
}

// `set_host` and the limits of `set_cluster` write words that hold several fields.
const _: () = assert!(
    offset_of!(HostState, port) == 16
        && offset_of!(HostState, cluster) == 20
        && offset_of!(HostState, tally) == 24
        && offset_of!(ClusterState, connect_timeout_ms) == offset_of!(ClusterState, max_connections) + 4
);

/// Indices are checked where they are made; what is beyond the end is nothing.
fn get(table: &Mapped, at: usize) -> u64 {
    table.word(at).map_or(0, |word| word.load(Acquire))
}

fn set(table: &Mapped, at: usize, value: u64) {
    if let Some(word) = table.word(at) {
        word.store(value, Relaxed);
    }
}

fn clear(table: &Mapped, index: u32, words: usize) {
    let at = index as usize * words;
    (at..at + words).for_each(|at| set(table, at, 0));
}

/// After everything that was written before.
fn publish(table: &Mapped, at: usize, block: u32) {
    if let Some(word) = table.word(at) {
        word.store(block.into(), Release);
    }
}

fn tally(table: &Mapped, at: usize) -> Tally {
    let field = |offset: usize| table.word(at + offset / 8).map_or(0, |word: &AtomicU64| word.load(Relaxed));
    Tally {
        attempts: field(offset_of!(Tally, attempts)),
        active: field(offset_of!(Tally, active)),
        established: field(offset_of!(Tally, established)),
        failed: field(offset_of!(Tally, failed)),
        timed_out: field(offset_of!(Tally, timed_out)),
        abandoned: field(offset_of!(Tally, abandoned)),
        closed_by_client: field(offset_of!(Tally, closed_by_client)),
        closed_by_endpoint: field(offset_of!(Tally, closed_by_endpoint)),
        sent: field(offset_of!(Tally, sent)),
        received: field(offset_of!(Tally, received)),
        no_host: field(offset_of!(Tally, no_host)),
        overflow: field(offset_of!(Tally, overflow)),
        panics: field(offset_of!(Tally, panics)),
    }
}

/// Connections of the kernel path that have ended.
pub struct FlowEvents {
    ring: RingBuf<MapData>,
}

impl FlowEvents {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, InterceptError> {
        Ok(Self { ring: super::maps::take(ebpf, map::FLOW_EVENTS)? })
    }

    /// What wakes whoever sleeps ([`Tables::set_asleep`]). In the context of a tokio runtime only.
    pub fn alarm(&self) -> io::Result<Alarm> {
        let ring = self.ring.as_fd().try_clone_to_owned()?;
        // SAFETY: the AsyncFd owns the descriptor: it stays open, and the same, until it is deregistered.
        Ok(Alarm(unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE)? }))
    }

    /// The next record, if one waits. Never blocks.
    pub fn pop(&mut self) -> Option<FlowEvent> {
        loop {
            let item = self.ring.next()?;
            if let Some(event) = super::bpf::read(&item) {
                return Some(event);
            }
        }
    }
}

/// Rings when a record has come after [`Tables::set_asleep`].
#[derive(Debug)]
pub struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// Completes when it has rung since the last time. Nothing is lost when it is dropped before that.
    pub async fn ring(&self) {
        if let Ok(mut ready) = self.0.readable().await {
            ready.clear_ready();
        }
    }
}

impl fmt::Debug for FlowEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowEvents").finish_non_exhaustive()
    }
}
