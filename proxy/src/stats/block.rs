//! The storage under every block of stats: plain atomics, one shard per worker, no lock.
//!
//! A [`Block`] has two parts. *Shared* cells are written by the main thread (membership, config updates) and exist
//! once. *Sharded* cells are written on the hot path: each thread adds to its own shard, which starts on its own
//! cache line and is allocated at that thread's first write, so a cluster that carries no traffic costs only its
//! shared cells. Readers sum the shards.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::histogram::{self, Histogram, HistogramValue};

thread_local! {
    /// The shard that this thread writes to; above the last one: the shard that all other threads share.
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Makes this thread write to shard `worker` from now on: its index among the workers, from 0. Threads that
/// never call it (main, DNS, tests) share one more shard, which is correct too, only not free of contention.
pub fn set_shard(worker: usize) {
    SHARD.set(worker);
}

/// What one stat of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values by bucket.
    Histogram,
}

/// Where the value of a stat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// One cell (or a histogram's run of cells) per shard, from this index.
    Shard(u16),
    /// One cell for all threads.
    Shared(u16),
    /// Envoy prints it and we can never change it (HTTP, features of later versions): always 0, no memory.
    Zero,
}

/// One stat of a kind of block.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Its name below the scope, dotted: `upstream_cx_total`.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Where its value is.
    pub home: Home,
}

/// What all blocks of a kind have in common.
#[derive(Debug)]
pub struct Layout {
    /// First part of every name: `cluster`.
    pub root: &'static str,
    /// The Prometheus label that carries the scope's own name: `envoy_cluster_name`; empty when there is one
    /// block only.
    pub label: &'static str,
    /// Scopes that have two names, with this between them (`rds`), and the label of the second.
    pub part: Option<(&'static str, &'static str)>,
    /// The stats, sorted by name.
    pub stats: &'static [Stat],
    /// Cells in a shard.
    pub shard_cells: usize,
    /// Shared cells.
    pub shared_cells: usize,
    /// Also printed per worker, as `worker_N.<name>`.
    pub per_worker: &'static [&'static str],
    /// Stats that are texts.
    pub texts: &'static [&'static str],
}

/// Sharded gauges are the first cells of a shard, after the cell that notes which of them were ever written.
pub(super) const FIRST_CELL: usize = 1;

const CELLS_PER_LINE: usize = 8;

/// A cache line of cells.
#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; CELLS_PER_LINE]);

/// One thread's cells.
pub(super) struct Shard(Box<[Line]>);

impl Shard {
    fn new(cells: usize) -> Self {
        Self((0..cells.div_ceil(CELLS_PER_LINE)).map(|_| Line::default()).collect())
    }

    pub(super) fn cell(&self, index: usize) -> &AtomicU64 {
        &self.0[index / CELLS_PER_LINE].0[index % CELLS_PER_LINE]
    }

    /// Notes that the gauge in `index` was written, for `usedonly`: its value may well be 0 again.
    fn note_used(&self, index: usize) {
        let bit = 1 << (index % 64);
        let used = self.cell(0);
        if used.load(Relaxed) & bit == 0 {
            used.fetch_or(bit, Relaxed);
        }
    }
}

/// The stats of one scope, for example of one cluster. Held by [`Arc`] in typed handles.
pub struct Block {
    layout: &'static Layout,
    name: Box<str>,
    shared: Box<[AtomicU64]>,
    /// Which shared cells were ever written (bit = index), for `usedonly`.
    shared_used: AtomicU64,
    /// Empty where nothing was written yet. Written and read by the main thread and the admin server's.
    texts: Box<[Mutex<Option<Arc<str>>>]>,
    /// One per worker, then the one that all other threads share.
    shards: Box<[OnceLock<Shard>]>,
}

impl Block {
    pub(super) fn new(layout: &'static Layout, name: &str, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            layout,
            name: name.into(),
            shared: (0..layout.shared_cells).map(|_| AtomicU64::new(0)).collect(),
            shared_used: AtomicU64::new(0),
            texts: layout.texts.iter().map(|_| Mutex::default()).collect(),
            shards: (0..=workers).map(|_| OnceLock::new()).collect(),
        })
    }

    /// The layout that it was built from.
    pub fn layout(&self) -> &'static Layout {
        self.layout
    }

    /// The scope's own name as the operator wrote it, for example of the cluster; empty when there is one block.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.shards.len() - 1
    }

    /// The calling thread's shard.
    pub(super) fn own_shard(&self) -> &Shard {
        let index = SHARD.get().min(self.shards.len() - 1);
        self.shards[index].get_or_init(|| Shard::new(self.layout.shard_cells))
    }

    /// The shards that somebody wrote to.
    pub(super) fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter().filter_map(OnceLock::get)
    }

    /// The sum of a cell over all shards.
    pub(super) fn sum(&self, cell: usize) -> u64 {
        self.shards().fold(0, |sum, shard| sum.wrapping_add(shard.cell(cell).load(Relaxed)))
    }

    /// The value of a counter or gauge. A gauge that is read while it moves between shards never shows below 0.
    pub fn value(&self, stat: &Stat) -> u64 {
        match (stat.home, stat.kind) {
            (Home::Zero, _) | (_, Kind::Histogram) => 0,
            (Home::Shared(cell), _) => self.shared[cell as usize].load(Relaxed),
            (Home::Shard(cell), Kind::Counter) => self.sum(cell as usize),
            (Home::Shard(cell), Kind::Gauge) => not_negative(self.sum(cell as usize)),
        }
    }

    /// The value that one worker contributes.
    pub fn worker_value(&self, stat: &Stat, worker: usize) -> u64 {
        match (stat.home, self.shards[worker].get()) {
            (Home::Shard(cell), Some(shard)) => not_negative(shard.cell(cell as usize).load(Relaxed)),
            _ => 0,
        }
    }

    /// Whether one worker ever wrote it.
    pub fn worker_is_used(&self, stat: &Stat, worker: usize) -> bool {
        match (stat.home, stat.kind, self.shards[worker].get()) {
            (Home::Shard(cell), Kind::Gauge, Some(shard)) => {
                shard.cell(0).load(Relaxed) & (1 << (cell % 64)) != 0
            }
            _ => self.worker_value(stat, worker) != 0,
        }
    }

    /// The first part of its stats' names: `cluster.foo.`
    pub fn scope(&self) -> String {
        match self.name() {
            "" if self.layout.root.is_empty() => String::new(),
            "" => format!("{}.", self.layout.root),
            name => format!("{}.{name}.", self.layout.root),
        }
    }

    /// The text of this index in the layout. None: nobody has written it, and only some blocks of the kind have it.
    pub fn text(&self, index: usize) -> Option<Arc<str>> {
        let text = self.texts[index].lock().unwrap_or_else(PoisonError::into_inner).clone();
        if self.name.is_empty() { Some(text.unwrap_or_default()) } else { text }
    }

    /// The buckets of a histogram.
    pub fn histogram(&self, stat: &Stat) -> HistogramValue {
        let mut value = HistogramValue::default();
        if let Home::Shard(first) = stat.home {
            for (bucket, count) in value.buckets.iter_mut().enumerate() {
                *count = self.sum(first as usize + bucket);
            }
            value.sum = self.sum(first as usize + histogram::BUCKETS);
        }
        value
    }

    /// Whether the stat was ever written (`usedonly`).
    pub fn is_used(&self, stat: &Stat) -> bool {
        match (stat.home, stat.kind) {
            (Home::Zero, _) => false,
            (_, Kind::Histogram) => self.histogram(stat).count() > 0,
            (Home::Shared(cell), _) => self.shared_used.load(Relaxed) & (1 << cell) != 0,
            (Home::Shard(cell), Kind::Counter) => self.sum(cell as usize) != 0,
            (Home::Shard(cell), Kind::Gauge) => {
                self.shards().any(|shard| shard.cell(0).load(Relaxed) & (1 << (cell % 64)) != 0)
            }
        }
    }

    /// Sets every counter to 0. Gauges and histograms keep their values, as in Envoy.
    pub fn reset_counters(&self) {
        for stat in self.layout.stats.iter().filter(|stat| stat.kind == Kind::Counter) {
            match stat.home {
                Home::Zero => {}
                Home::Shared(cell) => self.shared[cell as usize].store(0, Relaxed),
                Home::Shard(cell) => self.shards().for_each(|s| s.cell(cell as usize).store(0, Relaxed)),
            }
        }
    }
}

fn not_negative(sum: u64) -> u64 {
    if sum > i64::MAX as u64 { 0 } else { sum }
}

/// A counter of the hot path.
#[derive(Clone, Copy)]
pub struct Counter<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) cell: u16,
}

impl Counter<'_> {
    /// Adds 1.
    pub fn inc(self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(self, n: u64) {
        self.block.own_shard().cell(self.cell as usize).fetch_add(n, Relaxed);
    }

    /// The sum over all threads.
    pub fn value(self) -> u64 {
        self.block.sum(self.cell as usize)
    }
}

/// A gauge of the hot path. Prefer [`Gauge::guard`]: a +1 that is held by a value can't be forgotten.
#[derive(Clone, Copy)]
pub struct Gauge<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) cell: u16,
}

impl Gauge<'_> {
    /// Adds 1.
    pub fn inc(self) {
        self.add(1);
    }

    /// Subtracts 1.
    pub fn dec(self) {
        self.sub(1);
    }

    /// Adds `n`.
    pub fn add(self, n: u64) {
        let shard = self.block.own_shard();
        shard.cell(self.cell as usize).fetch_add(n, Relaxed);
        shard.note_used(self.cell as usize);
    }

    /// Subtracts `n`; the thread that added need not be the one that subtracts.
    pub fn sub(self, n: u64) {
        self.block.own_shard().cell(self.cell as usize).fetch_sub(n, Relaxed);
    }

    /// The sum over all threads.
    pub fn value(self) -> u64 {
        not_negative(self.block.sum(self.cell as usize))
    }

    /// Adds 1 for as long as the returned value lives.
    #[must_use = "the gauge goes down again when this is dropped"]
    pub fn guard(self) -> GaugeGuard {
        self.inc();
        GaugeGuard { block: Arc::clone(self.block), cell: self.cell }
    }
}

/// Holds a gauge's +1; dropping it subtracts 1. Keeps the block alive.
pub struct GaugeGuard {
    block: Arc<Block>,
    cell: u16,
}

impl std::fmt::Debug for GaugeGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GaugeGuard({})", self.block.name())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        Gauge { block: &self.block, cell: self.cell }.dec();
    }
}

/// A counter that the main thread writes.
#[derive(Clone, Copy)]
pub struct SharedCounter<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) cell: u16,
}

impl SharedCounter<'_> {
    /// Adds 1.
    pub fn inc(self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(self, n: u64) {
        note_shared(self.block, self.cell).fetch_add(n, Relaxed);
    }

    /// Takes over a count that is kept elsewhere.
    pub fn set(self, total: u64) {
        note_shared(self.block, self.cell).store(total, Relaxed);
    }

    /// Its value.
    pub fn value(self) -> u64 {
        self.block.shared[self.cell as usize].load(Relaxed)
    }
}

/// A gauge that exists once for all threads.
#[derive(Clone, Copy)]
pub struct SharedGauge<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) cell: u16,
}

impl SharedGauge<'_> {
    /// Sets it.
    pub fn set(self, value: u64) {
        note_shared(self.block, self.cell).store(value, Relaxed);
    }

    /// Adds 1.
    pub fn inc(self) {
        note_shared(self.block, self.cell).fetch_add(1, Relaxed);
    }

    /// Subtracts 1.
    pub fn dec(self) {
        note_shared(self.block, self.cell).fetch_sub(1, Relaxed);
    }

    /// Its value.
    pub fn value(self) -> u64 {
        self.block.shared[self.cell as usize].load(Relaxed)
    }
}

/// A text that the main thread writes.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    pub(super) block: &'a Arc<Block>,
    pub(super) index: usize,
}

impl Text<'_> {
    /// Replaces it.
    pub fn set(self, text: &Arc<str>) {
        let place = &self.block.texts[self.index];
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(text));
    }

    /// What it is now.
    pub fn value(self) -> Option<Arc<str>> {
        self.block.text(self.index)
    }
}

fn note_shared(block: &Block, cell: u16) -> &AtomicU64 {
    let bit = 1 << cell;
    if block.shared_used.load(Relaxed) & bit == 0 {
        block.shared_used.fetch_or(bit, Relaxed);
    }
    &block.shared[cell as usize]
}

impl Histogram<'_> {
    /// Counts a value.
    pub fn record(self, value: u64) {
        let shard = self.block.own_shard();
        let first = self.cell as usize;
        shard.cell(first + histogram::bucket_of(value)).fetch_add(1, Relaxed);
        shard.cell(first + histogram::BUCKETS).fetch_add(value, Relaxed);
    }

    /// Its buckets, summed over all threads.
    pub fn value(self) -> HistogramValue {
        let home = Home::Shard(self.cell);
        self.block.histogram(&Stat { name: "", kind: Kind::Histogram, home })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Stats;
    use super::*;

    #[test]
    fn shards_add_up_and_exist_only_where_somebody_wrote() {
        let stats = Stats::new(4);
        let cluster = stats.cluster("c");
        assert_eq!(cluster.block().shards().count(), 0);
        let threads: Vec<_> = (0..4)
            .map(|worker| {
                let cluster = cluster.clone();
                std::thread::spawn(move || {
                    set_shard(worker);
                    (0..1000).for_each(|_| cluster.upstream_cx_total().inc());
                    cluster.upstream_cx_tx_bytes_total().add(worker as u64);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(cluster.upstream_cx_total().value(), 4000);
        assert_eq!(cluster.upstream_cx_tx_bytes_total().value(), 6);
        assert_eq!(cluster.block().shards().count(), 4);
    }

    #[test]
    fn threads_without_a_shard_share_one_and_lose_nothing() {
        let stats = Stats::new(1);
        let tcp = stats.tcp_proxy("t");
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let tcp = tcp.clone();
                std::thread::spawn(move || (0..10_000).for_each(|_| tcp.downstream_cx_total().inc()))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(tcp.downstream_cx_total().value(), 80_000);
    }

    #[test]
    fn a_guard_holds_its_gauge_and_may_drop_on_another_thread() {
        let stats = Stats::new(2);
        let cluster = stats.cluster("c");
        set_shard(0);
        let guard = cluster.upstream_cx_active().guard();
        let second = cluster.upstream_cx_active().guard();
        assert_eq!(cluster.upstream_cx_active().value(), 2);
        std::thread::spawn(move || {
            set_shard(1);
            drop(guard);
        })
        .join()
        .unwrap();
        assert_eq!(cluster.upstream_cx_active().value(), 1);
        drop(second);
        assert_eq!(cluster.upstream_cx_active().value(), 0);
    }

    #[test]
    fn shards_start_on_their_own_cache_line() {
        assert_eq!(align_of::<Line>(), 64);
        assert_eq!(size_of::<Line>(), 64);
    }

    /// 10,000 clusters must stay cheap.
    #[test]
    fn a_cluster_with_traffic_on_one_worker_costs_less_than_1536_bytes() {
        let layout = super::super::ClusterStats::LAYOUT;
        let texts = layout.texts.len() * size_of::<Mutex<Option<Arc<str>>>>();
        let idle =
            size_of::<Block>() + 16 + layout.shared_cells * 8 + texts + 2 * size_of::<OnceLock<Shard>>();
        let shard = layout.shard_cells.div_ceil(CELLS_PER_LINE) * 64;
        assert!(idle < 400, "{idle}");
        assert!(idle + shard < 1536, "{idle} + {shard}");
    }

    #[test]
    fn reset_leaves_gauges_and_histograms() {
        let stats = Stats::new(1);
        let cluster = stats.cluster("c");
        cluster.upstream_cx_total().add(3);
        cluster.upstream_cx_active().inc();
        cluster.membership_total().set(2);
        cluster.membership_change().inc();
        cluster.upstream_cx_connect_ms().record(7);
        stats.reset_counters();
        assert_eq!(cluster.upstream_cx_total().value(), 0);
        assert_eq!(cluster.membership_change().value(), 0);
        assert_eq!(cluster.upstream_cx_active().value(), 1);
        assert_eq!(cluster.membership_total().value(), 2);
        assert_eq!(cluster.upstream_cx_connect_ms().value().count(), 1);
    }
}
