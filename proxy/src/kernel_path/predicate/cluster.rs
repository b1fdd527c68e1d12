//! Which clusters the eBPF programs can choose an endpoint of.

use std::net::SocketAddr;
use std::sync::Arc;

use tidegate_common::balance;

use super::{ClusterObstacle as O, MAX_CLUSTERS, Obstacle, Obstacles, canonical};
use crate::addr::EndpointAddr;
use crate::cluster::Cluster;
use crate::cluster::endpoint::HostSet;
use crate::cluster::hashing::Layout;
use crate::config;
use crate::config::cluster::{ClusterHashPolicy, Discovery, LbPolicy};
use crate::snapshot::Snapshot;

/// Priorities whose load the programs can spread.
const MAX_PRIORITIES: usize = balance::MAX_ROUTES as usize / 2;

/// The clusters of these names that there are, with their weights.
pub(super) fn look_at(
    listener: &config::listener::Listener,
    targets: &[(Arc<str>, u32)],
    snapshot: &Snapshot,
    found: &mut Obstacles,
) -> Vec<(Arc<Cluster>, u32)> {
    if targets.len() > MAX_CLUSTERS {
        found.add(Obstacle::TooManyClusters(targets.len()));
    }
    let mut clusters = Vec::with_capacity(targets.len());
    for (name, weight) in targets {
        let mut add = |obstacle| found.add(Obstacle::Cluster { cluster: Arc::clone(name), obstacle });
        let Some(cluster) = snapshot.cluster(name) else {
            add(O::Missing);
            continue;
        };
        look_at_config(cluster.config(), &mut add);
        look_at_hosts(cluster.config(), &cluster.hosts(), &listener.addresses, &mut add);
        clusters.push((Arc::clone(cluster), *weight));
    }
    clusters
}

fn look_at_config(cluster: &config::cluster::Cluster, add: &mut impl FnMut(O)) {
    let config::cluster::Cluster {
        name: _,
        alt_stat_name: _,
        discovery,
        eds: _, // endpoints come from anywhere
        lb_policy,
        locality_weighted: _,
        connect_timeout: _,                   // the kernel keeps it
        per_connection_buffer_limit_bytes: _, // nothing is buffered
        load_assignment: _,                   // the hosts in force count
        transport_sockets: _,                 // endpoints that select encryption are refused
        // The programs count connections. Nobody waits for a connection here, so that `max_pending_requests` has
        // nothing to limit.
        circuit_breakers: _,
        // Health is compiled in.
        health_check: _,
        outlier_detection: _,
        healthy_panic_threshold: _,
        upstream_keepalive,
        upstream_bind,
        dns: _,
        cleanup_interval: _, // only ORIGINAL_DST
        endpoint_removal,
        data_path: _,
        close_connections_on_host_health_failure,
        tls,
        has_pipes,
    } = cluster;
    if tls.is_some() {
        add(O::Tls);
    }
    if *has_pipes {
        add(O::Pipe);
    }
    if *discovery == Discovery::OriginalDst {
        add(O::OriginalDst);
    }
    if let LbPolicy::LeastRequest { choice_count, .. } = lb_policy
        && *choice_count > balance::MAX_CHOICES
    {
        add(O::ChoiceCount(*choice_count));
    }
    if let Some(hashing) = lb_policy.hashing() {
        if hashing.hash_balance_factor.is_some() {
            add(O::HashBalanceFactor);
        }
        if matches!(hashing.hash_policy, ClusterHashPolicy::SourceIp(2..)) {
            add(O::HashPolicy);
        }
    }
    if upstream_keepalive.is_some() {
        add(O::Keepalive);
    }
    if upstream_bind.is_some() {
        add(O::BindConfig);
    }
    if endpoint_removal.is_some_and(|policy| !policy.reset) {
        add(O::RemovalCloses);
    }
    if *close_connections_on_host_health_failure {
        add(O::HealthFailureCloses);
    }
}

/// What the endpoints of the moment say.
fn look_at_hosts(
    config: &config::cluster::Cluster,
    hosts: &HostSet,
    services: &[SocketAddr],
    add: &mut impl FnMut(O),
) {
    let priorities = hosts.priorities();
    if priorities.len() > MAX_PRIORITIES {
        add(O::Priorities(priorities.len()));
    }
    if let LbPolicy::LeastRequest { .. } = config.lb_policy
        && priorities.iter().any(|at| at.hosts.windows(2).any(|pair| pair[0].weight != pair[1].weight))
    {
        add(O::LeastRequestWeights);
    }
    for table in (0..priorities.len()).filter_map(|priority| hosts.table(priority)) {
        if let Layout::Ring(points, _) = table.layout()
            && points.len() > balance::MAX_POINTS as usize
        {
            add(O::RingSize(points.len()));
        }
    }
    let count = priorities.iter().map(|at| at.hosts.len()).max().unwrap_or(0);
    if count > balance::MAX_ENTRIES as usize {
        add(O::TooManyEndpoints(count));
    }
    for service in services.iter().map(|address| canonical(*address)) {
        let mut addresses = hosts.endpoints().filter_map(|endpoint| match endpoint.address() {
            EndpointAddr::Ip(address) => Some(canonical(*address)),
            EndpointAddr::Pipe(_) => None,
        });
        if let Some(endpoint) = addresses.find(|address| address.is_ipv4() != service.is_ipv4()) {
            add(O::Family { service, endpoint });
        }
    }
}
