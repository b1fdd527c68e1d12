//! Fills the tables of the kernel path, and brings stats up to date with what the programs count. Owned by the main
//! thread.
//!
//! Entries of listeners, clusters and hosts that are gone stay until the last of their connections has ended, so that
//! nothing is counted for somebody else.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_common::balance::Head;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::arena::{Arena, Block};
use super::compile::compile;
use super::mirror::Seen;
use super::predicate::{canonical, clusters_of, is_candidate, plan};
use super::removal::Doomed;
use super::slots::Slots;
use super::{Board, Obstacle, State};
use crate::addr::EndpointAddr;
use crate::cluster::Cluster;
use crate::cluster::endpoint::HostSet;
use crate::cluster::host::Host;
use crate::cluster::removal::Loss;
use crate::config::cluster::DataPath;
use crate::intercept::flows::FlowHost;
use crate::intercept::tables::Tables;
use crate::snapshot::Snapshot;
use crate::stats::Stats;

mod services;
mod target;

pub(super) use services::Service;
use services::{OnPath, Placed, Selector, ServiceKey, service_block};
pub(super) use target::Target;
use target::{HostEntry, is_over};

/// An entry that is gone and has no connection is kept so long at the least: records of its last connections may wait to be read, and
/// workers that were just writing its count of proxied connections have to end.
const KEEP: Duration = Duration::from_secs(2);

/// What nothing happens to is looked at once in so many looks.
const RARELY: u32 = 16;

/// The tables, and whose entries are whose.
#[derive(Debug)]
pub struct Manager {
    tables: Arc<Tables>,
    board: Board,
    stats: Arc<Stats>,
    default: DataPath,
    arena: Arena,
    free_services: Slots<u64>,
    free_clusters: Slots<u64>,
    free_hosts: Slots<HostKey>,
    /// Listeners that are on the kernel path.
    listeners: HashMap<Arc<str>, OnPath>,
    services: HashMap<ServiceKey, Service>,
    /// By listener.
    selectors: HashMap<Arc<str>, Selector>,
    targets: HashMap<Arc<str>, Target>,
    /// Their names, by index.
    names: Names,
    /// Listeners by the clusters that they lead to, also those that go through the proxy.
    users: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// How often was looked.
    looks: u32,
    /// Since when the rules are ours, so that what a predecessor left and nobody asked for can go.
    settled: Option<Instant>,
    /// Something may be gone, and take an entry yet.
    untidy: bool,
    changed: UnboundedSender<Arc<str>>,
}

#[derive(Debug, Default)]
struct Names {
    services: HashMap<u32, ServiceKey>,
    targets: HashMap<u32, Arc<str>>,
}

/// A host of a cluster: index of the cluster, address and port.
type HostKey = (u32, SocketAddr);

impl Manager {
    /// Over tables that may hold what a predecessor left. `default` is for clusters that have no `data_path`. What comes
    /// out of the receiver goes into [`Manager::clusters_changed`].
    pub fn new(
        tables: Arc<Tables>,
        board: Board,
        stats: Arc<Stats>,
        default: DataPath,
    ) -> (Self, UnboundedReceiver<Arc<str>>) {
        tables.own();
        let sizes = tables.sizes();
        let services = (1..sizes.services).filter_map(|index| service_block(&tables, index));
        let clusters = (1..sizes.clusters).filter_map(|index| cluster_block(&tables, index));
        let in_use = services.chain(clusters);
        let arena = Arena::new(sizes.arena, in_use.collect::<Vec<_>>());
        let named = |key: u64| (key != 0).then_some(key);
        let host_key = |index| {
            let host = tables.host(index);
            (host.cluster != 0).then(|| (host.cluster, SocketAddr::new(host.addr.to_ip(), host.port)))
        };
        let (changed, changes) = unbounded_channel();
        let this = Self {
            arena,
            free_services: Slots::new(sizes.services, |index| named(tables.service(index).key)),
            free_clusters: Slots::new(sizes.clusters, |index| named(tables.cluster(index).key)),
            free_hosts: Slots::new(sizes.hosts, host_key),
            listeners: HashMap::new(),
            services: HashMap::new(),
            selectors: HashMap::new(),
            targets: HashMap::new(),
            names: Names::default(),
            users: HashMap::new(),
            looks: 0,
            settled: None,
            untidy: true,
            changed,
            tables,
            board,
            stats,
            default,
        };
        (this, changes)
    }

    /// The configuration is this from now on. The kernel's rules have to follow ([`Manager::service`]).
    pub fn apply(&mut self, snapshot: &Snapshot) {
        self.untidy = true;
        self.users.clear();
        let candidates = || snapshot.listeners().filter(|listener| is_candidate(&listener.config));
        for listener in candidates() {
            for cluster in clusters_of(listener) {
                self.users.entry(cluster).or_default().push(Arc::clone(&listener.config.name));
            }
        }
        for cluster in self.users.keys().filter_map(|name| snapshot.cluster(name)) {
            cluster.tell_changes(&self.changed);
        }
        let names: Vec<_> = candidates().map(|listener| Arc::clone(&listener.config.name)).collect();
        for name in &names {
            self.decide(name, snapshot);
        }
        let there: HashSet<&str> = names.iter().map(|name| &**name).collect();
        self.board.retain(|listener| there.contains(listener));
        let now = Instant::now();
        let gone: Vec<_> = self.listeners.keys().filter(|name| !there.contains(&***name)).cloned().collect();
        for listener in gone {
            self.leave(&listener, now);
        }
        self.let_go(now);
    }

    /// These clusters have other endpoints, or others of them are healthy. Whether the kernel's rules have to follow.
    pub fn clusters_changed(&mut self, clusters: &BTreeSet<Arc<str>>, snapshot: &Snapshot) -> bool {
        self.untidy = true;
        let listeners: BTreeSet<Arc<str>> =
            clusters.iter().filter_map(|cluster| self.users.get(cluster)).flatten().cloned().collect();
        let (mut changed, mut any_left) = (false, false);
        for listener in &listeners {
            let before = self.service(listener);
            self.decide(listener, snapshot);
            changed |= self.service(listener) != before;
            any_left |= self.service(listener).is_none();
        }
        // Looks through all of them: not for each endpoint that comes or goes.
        if any_left {
            self.let_go(Instant::now());
        }
        changed
    }

    /// The index of a listener that is on the kernel path.
    pub fn service(&self, listener: &str) -> Option<u32> {
        self.listeners.get(listener).map(|on_path| on_path.index)
    }

    /// A filter chain of a listener that is on the kernel path, or was until lately.
    pub(super) fn service_at(&self, index: u32) -> Option<&Service> {
        self.services.get(self.names.services.get(&index)?)
    }

    /// A cluster of those.
    pub(super) fn target_at(&self, index: u32) -> Option<&Target> {
        self.targets.get(self.names.targets.get(&index)?)
    }

    /// Those of these hosts that connections of the kernel path may lead to.
    pub fn doomed(&self, cluster: &Arc<str>, loss: Loss, hosts: &[Arc<Host>]) -> Option<Doomed> {
        let target = self.targets.get(cluster)?;
        let entry = |host: &Arc<Host>| {
            let address = canonical(host.address().ip()?);
            let at = target.hosts.get(&address)?;
            Some((Arc::clone(host), FlowHost { address, cluster: target.index, host: at.index }))
        };
        let hosts: Vec<_> = hosts.iter().filter_map(entry).collect();
        (!hosts.is_empty()).then(|| Doomed { cluster: Arc::clone(cluster), loss, hosts })
    }

    /// Puts a listener on the path that it can take.
    fn decide(&mut self, name: &Arc<str>, snapshot: &Snapshot) {
        let now = Instant::now();
        let Some(listener) = snapshot.listener(name) else { return };
        let decided = plan(listener, snapshot, self.default).and_then(|plan| self.serve(name, plan, now));
        let state = match decided {
            Ok(()) => State::Kernel,
            Err(obstacles) => {
                self.leave(name, now);
                State::Proxy(obstacles)
            }
        };
        self.board.set(name, state);
    }

    /// Compiles a cluster, unless it is what was compiled. Returns its index.
    fn compile(&mut self, cluster: &Arc<Cluster>, now: Instant) -> Result<u32, Obstacle> {
        let name = cluster.name();
        let hosts = cluster.hosts();
        if let Some(target) = self.targets.get_mut(name) {
            let same = Arc::ptr_eq(&target.cluster, cluster) && target.version == hosts.version();
            let was_gone = target.gone.take().is_some();
            if same {
                if was_gone {
                    target.share(&self.tables);
                }
                return Ok(target.index);
            }
        }
        let key = key_of(name);
        let (index, mut entries) = match self.targets.get_mut(name) {
            Some(target) => (target.index, std::mem::take(&mut target.hosts)),
            None => {
                let entries = self.tables.sizes().clusters;
                let full = Obstacle::TableFull { table: "clusters", entries };
                (self.free_clusters.take(&key).ok_or(full)?, HashMap::new())
            }
        };
        for entry in entries.values_mut() {
            entry.gone.get_or_insert(now);
        }
        let compiled = self.compile_hosts(cluster, &hosts, index, &mut entries);
        let written = compiled.and_then(|words| write(&self.tables, &mut self.arena, &words, now));
        let target = self.targets.get_mut(name);
        let block = match (written, &target) {
            (Ok(block), _) => block,
            (Err(obstacle), Some(_)) => {
                // What is in force stays, and is gone if nobody else needs it.
                if let Some(target) = target {
                    target.hosts = entries;
                }
                return Err(obstacle);
            }
            (Err(obstacle), None) => {
                self.free_clusters.give_back(index);
                for entry in entries.into_values() {
                    self.tables.clear_host(entry.index);
                    self.free_hosts.give_back(entry.index);
                }
                return Err(obstacle);
            }
        };
        let config = cluster.config();
        let timeout = u32::try_from(config.connect_timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        self.tables.set_cluster(index, key, block.start, config.circuit_breakers.max_connections, timeout);
        let version = hosts.version();
        match target {
            Some(target) => {
                self.arena.retire(std::mem::replace(&mut target.block, block), now);
                if !Arc::ptr_eq(target.cluster.breaker().in_use(), cluster.breaker().in_use()) {
                    // It was removed and has come again: the connections of the former one are nobody's limit.
                    target.connections().detach();
                }
                (target.cluster, target.version, target.hosts) = (Arc::clone(cluster), version, entries);
                target.share(&self.tables);
            }
            None => {
                let mut target = Target {
                    index,
                    cluster: Arc::clone(cluster),
                    tcp_stats: self.stats.tcp_stats(name),
                    version,
                    block,
                    hosts: entries,
                    seen: Seen::default(),
                    quiet: false,
                    gone: None,
                    parted: None,
                };
                target.share(&self.tables);
                self.names.targets.insert(index, Arc::clone(name));
                self.targets.insert(Arc::clone(name), target);
            }
        }
        Ok(index)
    }

    /// The words of a cluster. Hosts that are new get an entry.
    fn compile_hosts(
        &mut self,
        cluster: &Arc<Cluster>,
        hosts: &HostSet,
        cluster_index: u32,
        entries: &mut HashMap<SocketAddr, HostEntry>,
    ) -> Result<Vec<u64>, Obstacle> {
        let mut full = false;
        let words = compile(cluster.config().lb_policy, hosts, |host| {
            let EndpointAddr::Ip(address) = host.address() else { return 0 };
            let address = canonical(*address);
            if let Some(entry) = entries.get_mut(&address) {
                entry.gone = None;
                if !Arc::ptr_eq(&entry.host, host) {
                    entry.host.connections().detach();
                    entry.host = Arc::clone(host);
                }
                return entry.index;
            }
            let Some(index) = self.free_hosts.take(&(cluster_index, address)) else {
                full = true;
                return 0;
            };
            self.tables.set_host(index, address.ip().into(), address.port(), cluster_index);
            let entry = HostEntry {
                index,
                hostname: Arc::default(),
                host: Arc::clone(host),
                seen: Seen::default(),
                gone: None,
                parted: None,
            };
            entries.insert(address, entry);
            index
        });
        for endpoint in hosts.endpoints() {
            if let EndpointAddr::Ip(address) = endpoint.address()
                && let Some(entry) = entries.get_mut(&canonical(*address))
                && entry.hostname != endpoint.hostname
            {
                entry.hostname = Arc::clone(&endpoint.hostname);
            }
        }
        if full {
            return Err(Obstacle::TableFull { table: "hosts", entries: self.tables.sizes().hosts });
        }
        words.map_err(|obstacle| Obstacle::Cluster { cluster: Arc::clone(cluster.name()), obstacle })
    }

    /// Clusters that no listener leads to any more are gone.
    fn let_go(&mut self, now: Instant) {
        let used: HashSet<Arc<str>> = self
            .services
            .values()
            .filter(|service| service.gone.is_none())
            .flat_map(|service| service.plan.clusters.iter().map(|(cluster, _)| Arc::clone(cluster.name())))
            .collect();
        for (_, target) in self.targets.iter_mut().filter(|(name, _)| !used.contains(*name)) {
            target.gone.get_or_insert(now);
        }
    }

    /// The kernel's rules have followed for the first time: what a predecessor left, and nobody asked for, can go.
    pub fn settle(&mut self) {
        self.settled.get_or_insert_with(Instant::now);
    }

    /// Brings stats up to date.
    pub fn observe(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        let tables = &self.tables;
        for service in self.services.values_mut() {
            service.seen.news(tables.service(service.placed.index).tally).of_service(&service.plan);
        }
        for target in self.targets.values_mut() {
            let news = target.seen.news(tables.cluster(target.index).tally);
            news.of_cluster(&target.cluster);
            target.connections().restore();
            // What happens to a host is counted for its cluster first: the look after the last news may find more of it.
            let was_quiet = std::mem::replace(&mut target.quiet, news.is_nothing());
            let is_due = target.index % RARELY == self.looks % RARELY;
            if !(was_quiet && target.quiet) || is_due {
                target.observe_hosts(tables);
            }
        }
    }

    /// The same for what outlier detection waits for.
    pub fn observe_outliers(&mut self) {
        for target in self.targets.values_mut().filter(|target| target.cluster.outlier().is_some()) {
            target.observe_hosts(&self.tables);
        }
    }

    /// Gives back entries whose last connection has ended.
    pub fn sweep(&mut self) {
        self.sweep_at(Instant::now());
    }

    /// Whether [`Self::sweep`] may have anything to do, now or soon.
    pub fn is_untidy(&self) -> bool {
        self.untidy
    }

    fn sweep_at(&mut self, now: Instant) {
        let old = |gone: Option<Instant>| gone.is_some_and(|since| now.duration_since(since) >= KEEP);
        let Self { tables, arena, names, free_services, free_clusters, free_hosts, .. } = self;
        let mut clear = |placed: &Placed| {
            tables.clear_service(placed.index);
            free_services.give_back(placed.index);
            arena.retire(placed.block, now);
        };
        self.services.retain(|_, service| {
            let over = old(service.gone) && tables.service(service.placed.index).tally.active == 0;
            if over {
                names.services.remove(&service.placed.index);
                clear(&service.placed);
            }
            !over
        });
        self.selectors.retain(|_, selector| {
            let over = old(selector.gone);
            if over {
                clear(&selector.placed);
            }
            !over
        });
        self.targets.retain(|_, target| {
            let cluster_is_gone = target.gone.is_some();
            target.hosts.retain(|_, entry| {
                let active = tables.host(entry.index).tally.active;
                let over = (cluster_is_gone || entry.gone.is_some())
                    && is_over(active, &mut entry.parted, entry.host.connections(), now);
                if over {
                    tables.clear_host(entry.index);
                    free_hosts.give_back(entry.index);
                }
                !over
            });
            let active = tables.cluster(target.index).tally.active;
            let shared = target.cluster.breaker().in_use().connections();
            let over = cluster_is_gone
                && is_over(active, &mut target.parted, shared, now)
                && target.hosts.is_empty();
            if over {
                tables.clear_cluster(target.index);
                names.targets.remove(&target.index);
                free_clusters.give_back(target.index);
                arena.retire(target.block, now);
            }
            !over
        });
        if old(self.settled) {
            self.reclaim(now);
        }
        self.untidy = self.services.values().any(|service| service.gone.is_some())
            || self.selectors.values().any(|selector| selector.gone.is_some())
            || self.targets.values().any(Target::is_untidy)
            || self.free_services.are_left()
            || self.free_clusters.are_left()
            || self.free_hosts.are_left();
    }

    /// What a predecessor left.
    fn reclaim(&mut self, now: Instant) {
        let tables = &self.tables;
        let arena = &mut self.arena;
        self.free_services.reclaim(|index| {
            let over = tables.service(index).tally.active == 0;
            if over {
                let block = service_block(tables, index);
                tables.clear_service(index);
                arena.retire_all(block, now);
            }
            over
        });
        self.free_clusters.reclaim(|index| {
            let over = tables.cluster(index).tally.active == 0;
            if over {
                let block = cluster_block(tables, index);
                tables.clear_cluster(index);
                arena.retire_all(block, now);
            }
            over
        });
        self.free_hosts.reclaim(|index| {
            let over = tables.host(index).tally.active == 0;
            if over {
                tables.clear_host(index);
            }
            over
        });
    }
}

/// The block of a cluster's entry, if it has one.
fn cluster_block(tables: &Tables, index: u32) -> Option<Block> {
    let start = tables.cluster(index).block as u32;
    let head = (start != 0).then(|| tables.block_word(start))??;
    Some(Block { start, len: Head::decode(head).words }).filter(|block| block.len != 0)
}

fn write(tables: &Tables, arena: &mut Arena, words: &[u64], now: Instant) -> Result<Block, Obstacle> {
    let len = words.len() as u32;
    let full = || Obstacle::TableFull { table: "arena", entries: tables.sizes().arena };
    let block = arena.allocate(len, now).ok_or_else(full)?;
    tables.write_block(block.start, words);
    Ok(block)
}

/// Tells a successor whose entry it is; never 0.
fn key_of(name: &str) -> u64 {
    xxhash_rust::xxh64::xxh64(name.as_bytes(), 0).max(1)
}

#[cfg(test)]
mod tests;
