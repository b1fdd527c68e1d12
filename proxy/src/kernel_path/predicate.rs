//! Which listeners may take the kernel path, and what stands in the way of the others.
//!
//! A listener may when its connections would fare the same: what is known at connect(2) chooses the filter chain, and
//! nothing between there and the endpoint needs a proxy. Every obstacle is *hard*, but for a few that only cost what a
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

mod cluster;
mod obstacle;
mod tcp_proxy;

pub use obstacle::{ClusterObstacle, Obstacle};

/// Clusters that a `tcp_proxy` may choose from by weight.
pub const MAX_CLUSTERS: usize = tidegate_common::balance::MAX_CLUSTERS as usize;

/// How connections to a listener get to their endpoints.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whose addresses they are.
    pub listener: Arc<Listener>,
    /// The chain of all its connections.
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
    let chain = chain_of(listener, &mut found);
    let proxy = chain.and_then(|chain| proxy_of(chain, &mut found));
    let targets = match proxy {
        Some(proxy) => targets(&proxy.config.clusters),
        None => all_targets(listener),
    };
    let modes: Vec<DataPath> = targets
        .iter()
        .map(|(name, _)| snapshot.cluster(name).and_then(|it| it.config().data_path).unwrap_or(default))
        .chain(targets.is_empty().then_some(default))
        .collect();
    if modes.iter().all(|mode| *mode == DataPath::Proxy) {
        return Err(vec![Obstacle::NotWanted]);
    }
    if refuses(listener, snapshot) {
        return Err(vec![Obstacle::BlackHole]);
    }
    if modes.contains(&DataPath::Proxy) {
        found.add(Obstacle::MixedDataPath);
    }
    look_at_listener(&listener.config, snapshot, &mut found);
    if let Some(proxy) = proxy {
        tcp_proxy::look_at(&proxy.config, &mut found);
    }
    let clusters = cluster::look_at(&listener.config, &targets, snapshot, &mut found);
    let waives = modes.iter().all(|mode| *mode == DataPath::Kernel);
    found.0.retain(|obstacle| !(waives && obstacle.is_soft()));
    match (chain, proxy) {
        (Some(chain), Some(proxy)) if found.0.is_empty() => Ok(Plan {
            listener: Arc::clone(listener),
            chain: Arc::clone(chain),
            proxy: Arc::clone(proxy),
            clusters,
        }),
        _ => Err(found.0),
    }
}

/// The one chain that every connection to the listener chooses.
fn chain_of<'a>(listener: &'a Listener, found: &mut Obstacles) -> Option<&'a Arc<Chain>> {
    let mut chosen: Option<&Arc<Chain>> = None;
    for address in &listener.config.addresses {
        let address = canonical(*address);
        if address.port() == 0 {
            found.add(Obstacle::NoPort(address));
        }
        match listener.chain_by_destination(address) {
            Err(field) => found.add(Obstacle::ChainMatch(field)),
            Ok(None) => found.add(Obstacle::NoChain(address)),
            Ok(Some(chain)) if chosen.is_some_and(|other| other.id != chain.id) => {
                found.add(Obstacle::DifferentChains);
            }
            Ok(Some(chain)) => chosen = Some(chain),
        }
    }
    let undecided = |obstacle: &Obstacle| {
        matches!(obstacle, Obstacle::ChainMatch(_) | Obstacle::NoChain(_) | Obstacle::DifferentChains)
    };
    chosen.filter(|_| !found.0.iter().any(undecided))
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
        addresses: _, // the chain is chosen by each of them
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
        tcp_keepalive,
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
    if tcp_keepalive.is_some() {
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

fn targets(choice: &ClusterChoice) -> Vec<(Arc<str>, u32)> {
    match choice {
        ClusterChoice::Single(name) => vec![(Arc::clone(name), 1)],
        ClusterChoice::Weighted(all) => all.iter().map(|it| (Arc::clone(&it.name), it.weight)).collect(),
    }
}

/// Where any of its chains leads, as far as that is known.
fn all_targets(listener: &Listener) -> Vec<(Arc<str>, u32)> {
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
mod tests;
