//! The tables of the kernel path in this process's memory, and the records of its connections.
//!
//! The agent writes blocks, settings and the counts of the proxy's connections, the programs add to the tallies. Nothing here is a
//! system call, and nothing waits.

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::Ebpf;
use aya::maps::{Map, MapData, RingBuf};
use tidegate_common::{
    ASLEEP, Addr, ClusterState, ENDING, FLOW_EVENTS_BYTES, FLOW_SLOTS, Flow, FlowEvent, HostState,
    ServiceState, Tally, map,
};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::bpf::Mapped;
use super::error::InterceptError;

mod counts;
mod slots;

pub use counts::Counts;
use counts::Layout;
use slots::Slots;

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
    /// Slots for records of connections: [`FLOW_SLOTS`], as the programs suppose, or fewer, of which they find none.
    pub flow_slots: u32,
    /// Records that wait to be read, bytes: a power of two and a multiple of the page size; 136 bytes each.
    pub events: u32,
}

impl TableSizes {
    /// Nothing is on the kernel path.
    pub const OFF: Self = Self { services: 1, clusters: 1, hosts: 1, arena: 1, flow_slots: 1, events: 4_096 };

    /// About 9 MB of kernel memory, and the records.
    pub const ON: Self = Self {
        services: 4_096,
        clusters: 4_096,
        hosts: 32_768,
        arena: 1 << 18,
        flow_slots: FLOW_SLOTS,
        events: FLOW_EVENTS_BYTES,
    };
}

const SERVICE_WORDS: usize = size_of::<ServiceState>() / 8;
const CLUSTER_WORDS: usize = Layout::CLUSTERS.words;
const HOST_WORDS: usize = Layout::HOSTS.words;

/// The tables.
#[derive(Debug)]
pub struct Tables {
    sizes: TableSizes,
    services: Mapped,
    clusters: Arc<Counts>,
    hosts: Arc<Counts>,
    arena: Mapped,
    slots: Slots,
    /// Whose sockets are ended.
    turn_to_end: Mutex<()>,
    /// The programs are loaded with these descriptors' numbers in their instructions.
    _maps: Vec<MapData>,
}

impl Tables {
    pub(super) fn take(ebpf: &mut Ebpf, sizes: TableSizes) -> Result<Self, InterceptError> {
        let take = |name: &'static str| match ebpf.take_map(name) {
            Some(Map::Array(data)) => Ok(data),
            _ => Err(InterceptError::NotInObject(name)),
        };
        let names = [map::SERVICES, map::CLUSTERS, map::HOSTS, map::ARENA, map::FLOW_SLOTS];
        let maps = names.into_iter().map(take).collect::<Result<Vec<_>, _>>()?;
        let this = Self::map(sizes, [0, 1, 2, 3, 4].map(|at: usize| maps[at].fd().as_fd()));
        let this = this.map_err(|(name, error)| InterceptError::pin("mapping", name)(error))?;
        Ok(Self { _maps: maps, ..this })
    }

    /// Maps services, clusters, hosts, the arena and the slots. Fails with the name of the one that can't be mapped.
    fn map(sizes: TableSizes, maps: [BorrowedFd<'_>; 5]) -> Result<Self, (&'static str, io::Error)> {
        let named = |name: &'static str| move |error| (name, error);
        let [services, clusters, hosts, arena, slots] = maps;
        let counts = |map, layout, entries| Counts::new(map, layout, entries).map(Arc::new);
        Ok(Self {
            sizes,
            services: Mapped::new(services, sizes.services as usize * SERVICE_WORDS)
                .map_err(named(map::SERVICES))?,
            clusters: counts(clusters, Layout::CLUSTERS, sizes.clusters).map_err(named(map::CLUSTERS))?,
            hosts: counts(hosts, Layout::HOSTS, sizes.hosts).map_err(named(map::HOSTS))?,
            arena: Mapped::new(arena, sizes.arena as usize).map_err(named(map::ARENA))?,
            slots: Slots::new(slots, sizes.flow_slots).map_err(named(map::FLOW_SLOTS))?,
            turn_to_end: Mutex::default(),
            _maps: Vec::new(),
        })
    }

    /// How much there is room for.
    pub fn sizes(&self) -> TableSizes {
        self.sizes
    }

    /// The counts of clusters.
    pub fn clusters(&self) -> &Arc<Counts> {
        &self.clusters
    }

    /// The counts of hosts.
    pub fn hosts(&self) -> &Arc<Counts> {
        &self.hosts
    }

    /// From here on the counts of the proxy's connections are this process's; those of a predecessor are gone.
    pub fn own(&self) {
        self.clusters.own();
        self.hosts.own();
    }

    /// The counts of the proxy's connections are nobody's from here on; false: they are another process's. They stay until
    /// [`Self::forget_if_nobodys`]: workers that are just writing must have ended before.
    pub fn disown(&self) -> bool {
        let clusters = self.clusters.disown();
        self.hosts.disown() && clusters
    }

    /// Sets the counts of the proxy's connections to 0, unless some process owns them.
    pub fn forget_if_nobodys(&self) {
        for counts in [&self.clusters, &self.hosts] {
            if counts.is_nobodys() {
                counts.forget();
            }
        }
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
        let clusters = &self.clusters.memory;
        set(clusters, at + offset_of!(ClusterState, key) / 8, key);
        let limits = u64::from(max_connections) | u64::from(connect_timeout_ms) << 32;
        set(clusters, at + offset_of!(ClusterState, max_connections) / 8, limits);
        publish(clusters, at + offset_of!(ClusterState, block) / 8, block);
    }

    /// A cluster's entry.
    pub fn cluster(&self, index: u32) -> ClusterState {
        let at = index as usize * CLUSTER_WORDS;
        let clusters = &self.clusters.memory;
        let limits = get(clusters, at + offset_of!(ClusterState, max_connections) / 8);
        ClusterState {
            block: get(clusters, at + offset_of!(ClusterState, block) / 8),
            key: get(clusters, at + offset_of!(ClusterState, key) / 8),
            turn: get(clusters, at + offset_of!(ClusterState, turn) / 8),
            max_connections: limits as u32,
            connect_timeout_ms: (limits >> 32) as u32,
            proxied: self.clusters.proxied(index),
            tally: tally(clusters, at + offset_of!(ClusterState, tally) / 8),
        }
    }

    /// Gives an entry to a host; cluster 0: to nobody.
    pub fn set_host(&self, index: u32, addr: Addr, port: u16, cluster: u32) {
        let at = index as usize * HOST_WORDS;
        let hosts = &self.hosts.memory;
        let words = addr.words().map(u64::from);
        set(hosts, at, words[0] | words[1] << 32);
        set(hosts, at + 1, words[2] | words[3] << 32);
        set(hosts, at + 2, u64::from(port) | u64::from(cluster) << 32);
    }

    /// A host's entry.
    pub fn host(&self, index: u32) -> HostState {
        let at = index as usize * HOST_WORDS;
        let hosts = &self.hosts.memory;
        let words = [get(hosts, at), get(hosts, at + 1), get(hosts, at + 2)];
        let half = |word: u64| [word as u32, (word >> 32) as u32];
        let [[a, b], [c, d]] = [half(words[0]), half(words[1])];
        HostState {
            addr: Addr::from_words([a, b, c, d]),
            port: words[2] as u16,
            reserved: 0,
            cluster: (words[2] >> 32) as u32,
            proxied: self.hosts.proxied(index),
            tally: tally(hosts, at + offset_of!(HostState, tally) / 8),
        }
    }

    /// Gives an entry back: everything in it is zero. Nobody may be able to find it, and nothing may be active.
    pub fn clear_service(&self, index: u32) {
        clear(&self.services, index, SERVICE_WORDS);
    }

    /// The same for a cluster.
    pub fn clear_cluster(&self, index: u32) {
        clear(&self.clusters.memory, index, CLUSTER_WORDS);
    }

    /// The same for a host.
    pub fn clear_host(&self, index: u32) {
        clear(&self.hosts.memory, index, HOST_WORDS);
    }

    /// Whether the next record of a flow wakes whoever polls [`FlowEvents`]. Look once more before sleeping: a record
    /// that was written in this moment has woken nobody.
    pub fn set_asleep(&self, asleep: bool) {
        if let Some(word) = self.arena.word(ASLEEP as usize) {
            // Not after the look that follows.
            word.store(asleep.into(), SeqCst);
        }
    }

    /// The record of a connection, if the socket with this cookie has a slot.
    pub(super) fn flow(&self, cookie: u64) -> Option<Flow> {
        self.slots.flow(cookie)
    }

    /// How many sockets have a slot now. Walks the table.
    pub fn flow_slots_in_use(&self) -> usize {
        self.slots.in_use()
    }

    /// The programs hear that the socket with this cookie is ended by the agent. One at a time: it waits for its turn.
    pub(super) fn ending(&self, cookie: u64) -> Ending<'_> {
        let turn = self.turn_to_end.lock().unwrap_or_else(PoisonError::into_inner);
        let word = self.arena.word(ENDING as usize);
        if let Some(word) = word {
            // Not after the system call that follows.
            word.store(cookie, SeqCst);
        }
        Ending { word, _turn: turn }
    }
}

/// While it is held, what closes a certain socket is the agent.
pub(super) struct Ending<'a> {
    word: Option<&'a AtomicU64>,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Some(word) = self.word {
            word.store(0, SeqCst);
        }
    }
}

// `set_host` and the limits of `set_cluster` write words that hold several fields.
const _: () = assert!(
    offset_of!(HostState, port) == 16
        && offset_of!(HostState, cluster) == 20
        && offset_of!(HostState, proxied) == 24
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

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;

    use super::*;

    /// What the kernel would have.
    pub(crate) struct Memory([File; 5]);

    impl Memory {
        const SIZES: TableSizes =
            TableSizes { services: 8, clusters: 8, hosts: 16, arena: 256, ..TableSizes::OFF };

        pub(crate) fn new() -> Self {
            let words = [8 * SERVICE_WORDS, 8 * CLUSTER_WORDS, 16 * HOST_WORDS, 256, slots::WORDS];
            Self(words.map(|words| {
                let file = tempfile::tempfile().unwrap();
                file.set_len(words as u64 * 8).unwrap();
                file
            }))
        }

        /// The tables, as one more process has them.
        pub(crate) fn tables(&self) -> Arc<Tables> {
            Arc::new(Tables::map(Self::SIZES, self.0.each_ref().map(|file| file.as_fd())).unwrap())
        }
    }

    #[test]
    fn entries_keep_what_is_written_and_nothing_else() {
        let memory = Memory::new();
        let tables = memory.tables();
        tables.own();
        let addr = Addr::from(std::net::IpAddr::from([10, 0, 0, 1]));
        tables.set_host(1, addr, 80, 2);
        tables.set_cluster(2, 77, 9, 5, 250);
        tables.hosts().set_proxied(1, 3);
        tables.clusters().set_proxied(2, 4);
        tables.hosts().set_active(1, 6);
        let host = memory.tables().host(1);
        assert_eq!((host.addr, host.port, host.cluster), (addr, 80, 2));
        assert_eq!((host.proxied, host.tally), (3, Tally { active: 6, ..Tally::default() }));
        let cluster = tables.cluster(2);
        assert_eq!((cluster.key, cluster.block, cluster.turn), (77, 9, 0));
        assert_eq!((cluster.max_connections, cluster.connect_timeout_ms, cluster.proxied), (5, 250, 4));
        tables.clear_host(1);
        tables.clear_cluster(2);
        assert_eq!((tables.host(1).proxied, tables.host(1).tally), (0, Tally::default()));
        assert_eq!((tables.host(1).cluster, tables.cluster(2).key, tables.cluster(2).proxied), (0, 0, 0));
    }
}
