//! Which listeners may take the kernel path, and what stands in the way of the others.
//!
//! A listener may when its connections would fare the same: what is known at connect(2), their destination and their source
//! address, chooses the filter chain, and nothing between there and the endpoint needs a proxy, whichever chain it is. Every obstacle is *hard*, but for a few that only cost what a
//! cluster with `mode: KERNEL` says it can do without ([`Obstacle::is_soft`]).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::cluster::Cluster;
use crate::config;
use crate::config::cluster::DataPath;
use crate::config::filter_chain::Terminal;
use crate::config::listener::{ListenerFilter, TrafficDirection};
use crate::config::tcp_proxy::ClusterChoice;
use crate::intercept::destinations::is_black_hole;
use crate::listener::{Chain, Listener, Service, TcpProxy};
use crate::snapshot::Snapshot;

mod chains;
mod cluster;
mod obstacle;
mod tcp_proxy;

pub use chains::Sources;
pub use obstacle::{ClusterObstacle, Obstacle};

/// Clusters that a `tcp_proxy` may choose from by weight.
pub const MAX_CLUSTERS: usize = tidegate_common::balance::MAX_CLUSTERS as usize;

/// How connections to a listener get to their endpoints.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Those that its connections choose, each of them once; not empty.
    pub chains: Vec<ChainPlan>,
    /// Who chooses which, in ascending order; not empty, at most [`MAX_RANGES`](tidegate_common::selector::MAX_RANGES). One:
    /// all sources have the first chain.
    pub sources: Vec<Sources>,
}

/// How connections of a filter chain get to their endpoints.
#[derive(Clone, Debug)]
pub struct ChainPlan {
    /// Whose chain it is.
    pub listener: Arc<Listener>,
    /// The chain.
    pub chain: Arc<Chain>,
    /// Its filter.
    pub proxy: Arc<TcpProxy>,
    /// Drawn by weight, at least 1 each; not empty, at most [`MAX_CLUSTERS`].
    pub clusters: Vec<(Arc<Cluster>, u32)>,
}

/// Obstacles, each of them once.
#[derive(Default)]
struct Obstacles(Vec<Obstacle>);

impl Obstacles {
    fn add(&mut self, obstacle: Obstacle) {
        if !self.0.contains(&obstacle) {
            self.0.push(obstacle);
        }
    }

    /// Adds these, but for the soft ones if everybody does without what is lost.
    fn add_all(&mut self, others: Self, modes: &[DataPath]) {
        let waives = modes.iter().all(|mode| *mode == DataPath::Kernel);
        others.0.into_iter().filter(|obstacle| !(waives && obstacle.is_soft())).for_each(|it| self.add(it));
    }
}

/// Whether a listener could take the kernel path at all: connections reach it only because they were captured.
pub fn is_candidate(listener: &config::listener::Listener) -> bool {
    !listener.bind_to_port && listener.traffic_direction != TrafficDirection::Inbound
}

/// The plan for a listener, or everything that stands in its way. `default` is for clusters that have no `data_path`.
///
/// It depends on the endpoints that the clusters have now.
pub fn plan(listener: &Arc<Listener>, snapshot: &Snapshot, default: DataPath) -> Result<Plan, Vec<Obstacle>> {
    if !is_candidate(&listener.config) {
        return Err(vec![Obstacle::NotVirtual]);
    }
    let mut found = Obstacles::default();
    let chosen = chains::of(listener, &mut found);
    let proxies = chosen.as_ref().and_then(|chosen| {
        let proxies: Vec<_> = chosen.chains.iter().map(|chain| proxy_of(chain, &mut found)).collect();
        proxies.into_iter().collect::<Option<Vec<_>>>()
    });
    // By chain, if all of those are known.
    let targets: Vec<Targets> = match &proxies {
        Some(proxies) => proxies.iter().map(|proxy| targets(&proxy.config.clusters)).collect(),
        None => vec![all_targets(listener)],
    };
    let modes_of = |targets: &Targets| -> Vec<DataPath> {
        let mode =
            |name: &str| snapshot.cluster(name).and_then(|it| it.config().data_path).unwrap_or(default);
        targets.iter().map(|(name, _)| mode(name)).chain(targets.is_empty().then_some(default)).collect()
    };
    let modes: Vec<Vec<DataPath>> = targets.iter().map(modes_of).collect();
    let all_modes = modes.concat();
    if all_modes.iter().all(|mode| *mode == DataPath::Proxy) {
        return Err(vec![Obstacle::NotWanted]);
    }
    if refuses(listener, snapshot) {
        return Err(vec![Obstacle::BlackHole]);
    }
    if all_modes.contains(&DataPath::Proxy) {
        found.add(Obstacle::MixedDataPath);
    }
    let mut of_listener = Obstacles::default();
    look_at_listener(&listener.config, snapshot, &mut of_listener);
    found.add_all(of_listener, &all_modes);
    let mut clusters = Vec::with_capacity(targets.len());
    for (index, (targets, modes)) in targets.iter().zip(&modes).enumerate() {
        let mut of_chain = Obstacles::default();
        if let Some(proxies) = &proxies {
            tcp_proxy::look_at(&proxies[index].config, &mut of_chain);
        }
        clusters.push(cluster::look_at(&listener.config, targets, snapshot, &mut of_chain));
        found.add_all(of_chain, modes);
    }
    match (chosen, proxies) {
        (Some(chosen), Some(proxies)) if found.0.is_empty() => {
            let chain = |((chain, proxy), clusters): ((&Arc<Chain>, &Arc<TcpProxy>), _)| ChainPlan {
                listener: Arc::clone(listener),
                chain: Arc::clone(chain),
                proxy: Arc::clone(proxy),
                clusters,
            };
            let chains = chosen.chains.into_iter().zip(proxies).zip(clusters).map(chain).collect();
            Ok(Plan { chains, sources: chosen.sources })
        }
        _ => Err(found.0),
    }
}

fn proxy_of<'a>(chain: &'a Chain, found: &mut Obstacles) -> Option<&'a Arc<TcpProxy>> {
    let name = || Arc::clone(&chain.config.name);
    match &chain.service {
        Service::Tcp(proxy) => return Some(proxy),
        Service::Nothing => found.add(Obstacle::EmptyChain(name())),
        Service::Http(_) => found.add(Obstacle::HttpChain(name())),
    }
    None
}

/// What connections pass before a chain is chosen, and what counts or watches them.
fn look_at_listener(listener: &config::listener::Listener, snapshot: &Snapshot, found: &mut Obstacles) {
    let config::listener::Listener {
        name: _,
        addresses: _, // the chains are those of each of them
        bind_to_port: _,
        use_original_dst: _, // restores what is known here
        filter_chains: _,
        default_filter_chain: _,
        listener_filters,
        // Only filters that wait for bytes take time.
        listener_filters_timeout: _,
        continue_on_listener_filters_timeout: _,
        traffic_direction: _,
        access_log,
        per_connection_buffer_limit_bytes: _, // nothing is buffered
        // A virtual listener has no listening socket.
        tcp_backlog_size: _,
        enable_reuse_port: _,
        transparent: _,
        freebind: _,
        tcp_fast_open_queue_length: _,
        max_connections_to_accept_per_socket_event: _,
        exact_balance: _, // no worker has them
        tcp_keepalive,
        socket_options: _,
        overrides,
        stat_prefix: _,
        connection_limit,
        ignore_global_conn_limit: _, // there is no global limit
        content: _,
    } = listener;
    // Captured connections pass those of the capture listener first.
    let capture = snapshot.capture().map(|capture| &capture.config);
    let of_capture =
        capture.iter().flat_map(|it| it.listener_filters.iter().map(|filter| (filter, &it.name)));
    for (filter, listener) in listener_filters.iter().map(|filter| (filter, &listener.name)).chain(of_capture)
    {
        let filter = match filter {
            ListenerFilter::OriginalDst => continue,
            ListenerFilter::TlsInspector { .. } => "tls_inspector",
            ListenerFilter::HttpInspector => "http_inspector",
            ListenerFilter::ProxyProtocol { .. } => "proxy_protocol",
        };
        found.add(Obstacle::ListenerFilter { filter, listener: Arc::clone(listener) });
    }
    if tcp_keepalive.is_some() || overrides.iter().any(|own| own.tcp_keepalive.is_some()) {
        found.add(Obstacle::ListenerKeepalive);
    }
    if let Some(limit) = connection_limit {
        found.add(Obstacle::ConnectionLimit(*limit));
    }
    tcp_proxy::look_at_logs(access_log, found);
}

/// Whether the eBPF programs refuse what the listener owns, because all of its chains lead to the black hole.
fn refuses(listener: &Listener, snapshot: &Snapshot) -> bool {
    let targets = all_targets(listener);
    let is_black_hole = |(name, _): &(Arc<str>, u32)| {
        snapshot.cluster(name).is_some_and(|cluster| is_black_hole(cluster.config()))
    };
    !targets.is_empty() && targets.iter().all(is_black_hole)
}

/// Names of clusters, and their weights.
type Targets = Vec<(Arc<str>, u32)>;

fn targets(choice: &ClusterChoice) -> Targets {
    match choice {
        ClusterChoice::Single(name) => vec![(Arc::clone(name), 1)],
        ClusterChoice::Weighted(all) => all.iter().map(|it| (Arc::clone(&it.name), it.weight)).collect(),
    }
}

/// Where any of its chains leads, as far as that is known.
fn all_targets(listener: &Listener) -> Targets {
    let of_chain = |chain: &Arc<Chain>| match &chain.config.terminal {
        Some(Terminal::TcpProxy(proxy)) => targets(&proxy.clusters),
        Some(Terminal::HttpAsTcp(routing)) => {
            let proxies = routing.virtual_hosts.iter().filter_map(|host| host.proxy.as_ref());
            proxies.flat_map(|proxy| targets(&proxy.clusters)).collect()
        }
        Some(Terminal::HttpFromRds(_)) | None => Vec::new(),
    };
    listener.chains().iter().flat_map(of_chain).collect()
}

/// Names of the clusters that a listener may lead to.
pub(super) fn clusters_of(listener: &Listener) -> BTreeSet<Arc<str>> {
    all_targets(listener).into_iter().map(|(name, _)| name).collect()
}

/// As the wire has it: IPv4 is never `::ffff:a.b.c.d`.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
pub(super) mod tests;
