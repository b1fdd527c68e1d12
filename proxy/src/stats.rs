//! Stats with Envoy's names.
//!
//! Each kind of block ([`ClusterStats`], [`ListenerStats`], …) is declared once, as a table, in `blocks.rs`.
//! [`Stats`] hands out handles by name; handles are cheap to clone and are meant to be kept. The hot path writes
//! `cluster.upstream_cx_total().inc()`: one relaxed add to a cache line that only this worker writes.
//!
//! A block lives as long as its handles and guards do, so a cluster's stats go when the last connection and the
//! last snapshot that know it are gone, and survive updates in between.

mod block;
mod blocks;
mod declare;
mod histogram;
mod prometheus;
mod query;
mod text;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use block::Layout;

pub use block::{Block, Counter, Gauge, GaugeGuard, Kind, SharedCounter, SharedGauge, Stat, Text, set_shard};
pub use blocks::{
    AccessLogStats, AdminListenerStats, ClientTlsStats, ClusterManagerStats, ClusterStats, ConfigStats,
    ControlPlaneStats, FilesystemStats, HealthCheckStats, HttpInspectorStats, HttpStats,
    ListenerManagerStats, ListenerStats, MaglevStats, OutlierStats, ProxyProtocolStats, PumpStats, RdsStats,
    RingHashStats, RootStats, RuntimeStats, SdsStats, ServerStats, TcpProxyStats, TcpStats,
    TlsInspectorStats,
};
pub use histogram::{Histogram, HistogramValue};
pub(crate) use query::regex;
pub use query::{Format, Query, QueryError};

/// The scope of what the kernel counts.
const INTERCEPT: &str = "tidegate.intercept.";

/// All stats of the process. Kept by the main thread in an [`Arc`]; look-ups by name take a lock, so workers keep
/// the handles that their snapshot carries.
pub struct Stats {
    workers: usize,
    blocks: Mutex<Blocks>,
    intercept: Mutex<BTreeMap<String, (Kind, u64)>>,
    /// Blocks that exist once, kept from the start.
    single: Single,
    /// `proxy_proto.<stat_prefix>.*`, kept to the end: a connection looks them up, and no listener holds them.
    proxy_protocol: RwLock<BTreeMap<Box<str>, ProxyProtocolStats>>,
}

/// By what they have in common with others of their kind ([`kind`]) and the scope's own name.
type Blocks = BTreeMap<((&'static str, &'static str), Box<str>), Weak<Block>>;

/// Tells kinds of blocks apart: the first part of their names, which two may share, and their first stat.
fn kind(layout: &Layout) -> (&'static str, &'static str) {
    (layout.root, layout.stats.first().map_or("", |stat| stat.name))
}

struct Single {
    root: RootStats,
    admin_listener: AdminListenerStats,
    runtime: RuntimeStats,
    server: ServerStats,
    listener_manager: ListenerManagerStats,
    cluster_manager: ClusterManagerStats,
    control_plane: ControlPlaneStats,
    tls_inspector: TlsInspectorStats,
    http_inspector: HttpInspectorStats,
    proxy_protocol: ProxyProtocolStats,
    filesystem: FilesystemStats,
    access_log: AccessLogStats,
    pump: PumpStats,
    config: ConfigStats,
}

impl Stats {
    /// Stats for a process with so many workers.
    pub fn new(workers: usize) -> Arc<Self> {
        fn one(layout: &'static Layout, workers: usize) -> Arc<Block> {
            Block::new(layout, "", workers)
        }
        let single = Single {
            root: RootStats::from_block(one(RootStats::LAYOUT, workers)),
            admin_listener: AdminListenerStats::from_block(one(AdminListenerStats::LAYOUT, workers)),
            runtime: RuntimeStats::from_block(one(RuntimeStats::LAYOUT, workers)),
            server: ServerStats::from_block(one(ServerStats::LAYOUT, workers)),
            listener_manager: ListenerManagerStats::from_block(one(ListenerManagerStats::LAYOUT, workers)),
            cluster_manager: ClusterManagerStats::from_block(one(ClusterManagerStats::LAYOUT, workers)),
            control_plane: ControlPlaneStats::from_block(one(ControlPlaneStats::LAYOUT, workers)),
            tls_inspector: TlsInspectorStats::from_block(one(TlsInspectorStats::LAYOUT, workers)),
            http_inspector: HttpInspectorStats::from_block(one(HttpInspectorStats::LAYOUT, workers)),
            proxy_protocol: ProxyProtocolStats::from_block(one(ProxyProtocolStats::LAYOUT, workers)),
            filesystem: FilesystemStats::from_block(one(FilesystemStats::LAYOUT, workers)),
            access_log: AccessLogStats::from_block(one(AccessLogStats::LAYOUT, workers)),
            pump: PumpStats::from_block(one(PumpStats::LAYOUT, workers)),
            config: ConfigStats::from_block(one(ConfigStats::LAYOUT, workers)),
        };
        let stats = Self {
            workers,
            blocks: Mutex::default(),
            intercept: Mutex::default(),
            single,
            proxy_protocol: RwLock::default(),
        };
        for block in stats.single_blocks() {
            lock(&stats.blocks).insert((kind(block.layout()), "".into()), Arc::downgrade(&block));
        }
        Arc::new(stats)
    }

    /// `cluster.<name>.*`
    pub fn cluster(&self, name: &str) -> ClusterStats {
        ClusterStats::from_block(self.block(ClusterStats::LAYOUT, name))
    }

    /// `cluster.<name>.health_check.*`
    pub fn health_check(&self, name: &str) -> HealthCheckStats {
        HealthCheckStats::from_block(self.block(HealthCheckStats::LAYOUT, name))
    }

    /// `cluster.<name>.ring_hash_lb.*`
    pub fn ring_hash(&self, name: &str) -> RingHashStats {
        RingHashStats::from_block(self.block(RingHashStats::LAYOUT, name))
    }

    /// `cluster.<name>.maglev_lb.*`
    pub fn maglev(&self, name: &str) -> MaglevStats {
        MaglevStats::from_block(self.block(MaglevStats::LAYOUT, name))
    }

    /// `cluster.<name>.tcp_stats.*`
    pub fn tcp_stats(&self, name: &str) -> TcpStats {
        TcpStats::from_block(self.block(TcpStats::LAYOUT, name))
    }

    /// `cluster.<name>.outlier_detection.*`
    pub fn outlier(&self, name: &str) -> OutlierStats {
        OutlierStats::from_block(self.block(OutlierStats::LAYOUT, name))
    }

    /// `cluster.<name>.client_ssl_socket_factory.*`
    pub fn client_tls(&self, name: &str) -> ClientTlsStats {
        ClientTlsStats::from_block(self.block(ClientTlsStats::LAYOUT, name))
    }

    /// `sds.<name>.*`
    pub fn sds(&self, name: &str) -> SdsStats {
        SdsStats::from_block(self.block(SdsStats::LAYOUT, name))
    }

    /// `tcp.<stat_prefix>.*`
    pub fn tcp_proxy(&self, stat_prefix: &str) -> TcpProxyStats {
        TcpProxyStats::from_block(self.block(TcpProxyStats::LAYOUT, stat_prefix))
    }

    /// `http.<stat_prefix>.*`
    pub fn http(&self, stat_prefix: &str) -> HttpStats {
        HttpStats::from_block(self.block(HttpStats::LAYOUT, stat_prefix))
    }

    /// `http.<stat_prefix>.rds.<route configuration>.*`
    pub fn rds(&self, stat_prefix: &str, route: &str) -> RdsStats {
        RdsStats::from_block(self.block(RdsStats::LAYOUT, &format!("{stat_prefix}.rds.{route}")))
    }

    /// `http.<stat_prefix>.rds.vhds.<route configuration>.*`
    pub fn vhds(&self, stat_prefix: &str, route: &str) -> RdsStats {
        RdsStats::from_block(self.block(RdsStats::LAYOUT, &format!("{stat_prefix}.rds.vhds.{route}")))
    }

    /// `listener.<stat_prefix>.*`, or `listener.<address>.*` when the listener has no `stat_prefix`.
    pub fn listener(&self, address: SocketAddr, stat_prefix: Option<&str>) -> ListenerStats {
        let block = match stat_prefix {
            Some(prefix) => self.block(ListenerStats::LAYOUT, prefix),
            None => self.block(ListenerStats::LAYOUT, &address.to_string()),
        };
        ListenerStats::from_block(block)
    }

    /// `server.*`
    pub fn server(&self) -> &ServerStats {
        &self.single.server
    }

    /// `listener_manager.*`
    pub fn listener_manager(&self) -> &ListenerManagerStats {
        &self.single.listener_manager
    }

    /// `cluster_manager.*`
    pub fn cluster_manager(&self) -> &ClusterManagerStats {
        &self.single.cluster_manager
    }

    /// `control_plane.*`
    pub fn control_plane(&self) -> &ControlPlaneStats {
        &self.single.control_plane
    }

    /// `tls_inspector.*`
    pub fn tls_inspector(&self) -> &TlsInspectorStats {
        &self.single.tls_inspector
    }

    /// `http_inspector.*`
    pub fn http_inspector(&self) -> &HttpInspectorStats {
        &self.single.http_inspector
    }

    /// `proxy_proto.*`, or `proxy_proto.<stat_prefix>.*` when there is a prefix. They exist from the first call on.
    pub fn proxy_protocol(&self, stat_prefix: &str) -> ProxyProtocolStats {
        if stat_prefix.is_empty() {
            return self.single.proxy_protocol.clone();
        }
        let known = &self.proxy_protocol;
        if let Some(stats) = known.read().unwrap_or_else(PoisonError::into_inner).get(stat_prefix) {
            return stats.clone();
        }
        let stats = ProxyProtocolStats::from_block(self.block(ProxyProtocolStats::LAYOUT, stat_prefix));
        let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
        known.entry(stat_prefix.into()).or_insert(stats).clone()
    }

    /// Names without a first part.
    pub fn root(&self) -> &RootStats {
        &self.single.root
    }

    /// `listener.admin.*`
    pub fn admin_listener(&self) -> &AdminListenerStats {
        &self.single.admin_listener
    }

    /// `runtime.*`
    pub fn runtime(&self) -> &RuntimeStats {
        &self.single.runtime
    }

    /// `filesystem.*`
    pub fn filesystem(&self) -> &FilesystemStats {
        &self.single.filesystem
    }

    /// `tidegate.access_log.*`
    pub fn access_log(&self) -> &AccessLogStats {
        &self.single.access_log
    }

    /// `tidegate.pump.*`
    pub fn pump(&self) -> &PumpStats {
        &self.single.pump
    }

    /// `tidegate.config.*`
    pub fn config(&self) -> &ConfigStats {
        &self.single.config
    }

    /// Sets `tidegate.intercept.<reason>`, a counter whose total is kept in the kernel. The main thread calls it
    /// with the sum over CPUs.
    pub fn set_intercept_counter(&self, reason: &str, total: u64) {
        lock(&self.intercept).insert(sanitized(reason), (Kind::Counter, total));
    }

    /// Sets the gauge `tidegate.intercept.<name>`, for example of enrolled pods.
    pub fn set_intercept_gauge(&self, name: &str, value: u64) {
        lock(&self.intercept).insert(sanitized(name), (Kind::Gauge, value));
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// Writes what the query asks for, in its format. Blocks the thread for a while when there are many stats.
    pub fn write(&self, query: &Query, out: &mut impl io::Write) -> io::Result<()> {
        match query.format {
            Format::Text => text::write(self, query, out),
            Format::Json => text::write_json(self, query, out),
            Format::Prometheus => prometheus::write(self, query, out),
        }
    }

    /// `tidegate.intercept.*` as it is now.
    fn intercept(&self) -> Vec<(String, Kind, u64)> {
        lock(&self.intercept).iter().map(|(name, (kind, value))| (name.clone(), *kind, *value)).collect()
    }

    /// Sets every counter to 0, except those of the kernel.
    pub fn reset_counters(&self) {
        self.blocks().iter().for_each(|block| block.reset_counters());
    }

    /// Every block that somebody holds, by kind, then name.
    pub fn blocks(&self) -> Vec<Arc<Block>> {
        let mut blocks = lock(&self.blocks);
        let mut live = Vec::with_capacity(blocks.len());
        blocks.retain(|_, block| block.upgrade().map(|block| live.push(block)).is_some());
        live
    }

    fn block(&self, layout: &'static Layout, name: &str) -> Arc<Block> {
        let mut blocks = lock(&self.blocks);
        let key = (kind(layout), sanitized(name).into_boxed_str());
        if let Some(block) = blocks.get(&key).and_then(Weak::upgrade) {
            return block;
        }
        let block = Block::new(layout, &key.1, self.workers);
        blocks.insert(key, Arc::downgrade(&block));
        block
    }

    fn single_blocks(&self) -> [Arc<Block>; 14] {
        let s = &self.single;
        [
            s.root.block(),
            s.admin_listener.block(),
            s.runtime.block(),
            s.server.block(),
            s.listener_manager.block(),
            s.cluster_manager.block(),
            s.control_plane.block(),
            s.tls_inspector.block(),
            s.http_inspector.block(),
            s.proxy_protocol.block(),
            s.filesystem.block(),
            s.access_log.block(),
            s.pump.block(),
            s.config.block(),
        ]
        .map(Arc::clone)
    }
}

/// What Envoy shows of a version that is a text: its xxHash64.
pub fn version_hash(version: &str) -> u64 {
    xxhash_rust::xxh64::xxh64(version.as_bytes(), 0)
}

/// A name as Envoy writes it in stats: `:` becomes `_`.
fn sanitized(name: &str) -> String {
    name.replace("://", "_").replace(":/", "_").replace([':', '\0'], "_")
}

/// The maps are consistent after every statement, so a panic while one was locked spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_shared_by_name_and_goes_with_its_last_handle() {
        let stats = Stats::new(1);
        let first = stats.cluster("a");
        first.upstream_cx_total().inc();
        let second = stats.cluster("a");
        assert_eq!(second.upstream_cx_total().value(), 1);
        drop(first);
        assert_eq!(stats.cluster("a").upstream_cx_total().value(), 1);
        let guard = second.upstream_cx_active().guard();
        drop(second);
        assert_eq!(stats.cluster("a").upstream_cx_total().value(), 1, "a guard keeps the block");
        drop(guard);
        assert!(!stats.blocks().iter().any(|block| block.layout().root == "cluster"));
        assert_eq!(stats.cluster("a").upstream_cx_total().value(), 0);
    }

    #[test]
    fn addresses_name_listeners_as_in_envoy() {
        let stats = Stats::new(1);
        let name = |addr: &str| stats.listener(addr.parse().unwrap(), None).name().to_owned();
        assert_eq!(name("127.0.0.1:15910"), "127.0.0.1_15910");
        assert_eq!(name("[::1]:15914"), "[__1]_15914");
        let prefixed = stats.listener("127.0.0.1:1".parse().unwrap(), Some("edge"));
        assert_eq!(prefixed.name(), "edge");
    }

    #[test]
    fn every_block_has_sorted_distinct_names() {
        let stats = Stats::new(1);
        let _keep = (stats.cluster("c"), stats.tcp_proxy("t"), stats.http("h"));
        let _listener = stats.listener("127.0.0.1:1".parse().unwrap(), None);
        for block in stats.blocks() {
            let names: Vec<_> = block.layout().stats.iter().map(|stat| stat.name).collect();
            assert!(names.is_sorted_by(|a, b| a < b), "{}: {names:?}", block.layout().root);
        }
    }
}
