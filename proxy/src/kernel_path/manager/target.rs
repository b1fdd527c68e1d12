//! Clusters of listeners on the kernel path, their hosts, and the counts that both paths share.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::KEEP;
use crate::cluster::Cluster;
use crate::cluster::host::Host;
use crate::cluster::shared_count::SharedCount;
use crate::intercept::tables::Tables;
use crate::kernel_path::arena::Block;
use crate::kernel_path::mirror::Seen;
use crate::stats::TcpStats;

/// A cluster of listeners on the kernel path.
#[derive(Debug)]
pub(in crate::kernel_path) struct Target {
    pub(in crate::kernel_path) index: u32,
    pub(in crate::kernel_path) cluster: Arc<Cluster>,
    pub(in crate::kernel_path) tcp_stats: TcpStats,
    /// Of the host set that is compiled.
    pub(super) version: u64,
    pub(super) block: Block,
    pub(in crate::kernel_path) hosts: HashMap<SocketAddr, HostEntry>,
    pub(super) seen: Seen,
    /// Nothing had happened at the last look.
    pub(super) quiet: bool,
    pub(super) gone: Option<Instant>,
    /// Since when the two paths don't share its count any more.
    pub(super) parted: Option<Instant>,
}

impl Target {
    pub(super) fn observe_hosts(&mut self, tables: &Tables) {
        for entry in self.hosts.values_mut() {
            entry.seen.news(tables.host(entry.index).tally).of_host(&entry.host, &self.cluster);
            entry.host.connections().restore();
        }
    }

    /// It is gone, or one of its hosts.
    pub(super) fn is_untidy(&self) -> bool {
        self.gone.is_some() || self.hosts.values().any(|entry| entry.gone.is_some())
    }

    /// What counts the connections through the proxy.
    pub(super) fn connections(&self) -> &SharedCount {
        self.cluster.breaker().in_use().connections()
    }

    /// The two paths share its count and those of its hosts.
    pub(super) fn share(&mut self, tables: &Tables) {
        self.parted = None;
        self.connections().attach(tables.clusters(), self.index);
        for entry in self.hosts.values_mut().filter(|entry| entry.gone.is_none()) {
            entry.parted = None;
            entry.host.connections().attach(tables.hosts(), entry.index);
        }
    }
}

/// A host of such a cluster.
#[derive(Debug)]
pub(in crate::kernel_path) struct HostEntry {
    pub(super) index: u32,
    /// Of the endpoint.
    pub(in crate::kernel_path) hostname: Arc<str>,
    pub(super) host: Arc<Host>,
    pub(super) seen: Seen,
    pub(super) gone: Option<Instant>,
    /// As in [`Target`].
    pub(super) parted: Option<Instant>,
}

/// Whether an entry that is gone can be somebody else's. Without connections on the kernel path, it parts first.
pub(super) fn is_over(active: u64, parted: &mut Option<Instant>, shared: &SharedCount, now: Instant) -> bool {
    active == 0
        && now.duration_since(*parted.get_or_insert_with(|| {
            shared.detach();
            now
        })) >= KEEP
}
