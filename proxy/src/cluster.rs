//! Clusters at run time: which endpoints they have now, how one is picked, how a connection to it is made.
//!
//! The main thread builds a [`Cluster`] from its configuration and replaces its [`HostSet`] as a whole when
//! endpoints change. Workers pick through balancers of their own ([`WorkerBalancers`]). Neither ever touches an
//! established connection.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use tokio::sync::mpsc::UnboundedSender;

use crate::config;
use crate::config::cluster::Discovery;
use crate::config::endpoint::{ClusterLoadAssignment, HealthStatus};
use crate::secret::Credentials;
use crate::stats::{ClusterStats, Stats};

pub mod circuit_breaker;
pub mod connect;
pub mod dns;
mod edf;
pub mod endpoint;
pub mod hashing;
pub mod health_check;
pub mod host;
pub mod load_balancer;
pub mod original_dst;
pub mod outlier;
pub mod priority;
pub mod removal;
pub mod shared_count;

use circuit_breaker::CircuitBreaker;
use endpoint::{Endpoint, HostSet};
use hashing::Gauges;
use health_check::Checks;
use host::{HealthFlag, HostRegistry};
pub use load_balancer::WorkerBalancers;
use original_dst::OriginalDstHosts;
use outlier::Detector;
use removal::Lost;

/// Identifies a [`Cluster`] object: a successor of the same name has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClusterId(u64);

/// A cluster. Shared by snapshots, workers and the connections that use it.
pub struct Cluster {
    id: ClusterId,
    config: Arc<config::cluster::Cluster>,
    stats: ClusterStats,
    breaker: CircuitBreaker,
    registry: Arc<HostRegistry>,
    hosts: ArcSwap<HostSet>,
    /// Of the assignment in force, in percent.
    overprovisioning_factor: AtomicU32,
    /// It is in force, or was.
    announced: AtomicBool,
    /// Who ends connections to endpoints that are gone. Empty if nobody has to.
    losses: OnceLock<UnboundedSender<Lost>>,
    /// Who wants to know of every new host set. Empty if nobody does.
    watcher: OnceLock<UnboundedSender<Arc<str>>>,
    /// Only with active health checks.
    health_check: Option<Box<Checks>>,
    /// Only with outlier detection.
    outlier: Option<Box<Detector>>,
    /// It replaces another version, whose findings about hosts it may not look for itself.
    inherits: bool,
    /// Only with RING_HASH and MAGLEV.
    hashing: Option<Gauges>,
    /// Only for ORIGINAL_DST.
    original_dst: Option<Arc<OriginalDstHosts>>,
    /// Only of clusters with TLS.
    credentials: Option<Credentials>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);
/// Versions are unique in the process, so that no two host sets ever look alike.
static NEXT_VERSION: AtomicU64 = AtomicU64::new(1);

impl Cluster {
    /// Builds a cluster. Its endpoints are those that the configuration gives as addresses; names (STRICT_DNS) come
    /// in with [`dns::Watch`].
    ///
    /// `previous` is the cluster of the same name that this one replaces: live endpoint state and what is in use
    /// under the circuit breakers carry over.
    pub fn build(config: Arc<config::cluster::Cluster>, stats: &Stats, previous: Option<&Self>) -> Arc<Self> {
        let cluster = Self::build_warming(config, stats, previous, None);
        cluster.announce();
        cluster
    }

    /// Like [`Cluster::build`], for a cluster that is not in force yet: the membership gauges stay with the one that
    /// is, until [`Cluster::announce`]. One with TLS needs `credentials` to be connected to.
    pub fn build_warming(
        config: Arc<config::cluster::Cluster>,
        stats: &Stats,
        previous: Option<&Self>,
        credentials: Option<Credentials>,
    ) -> Arc<Self> {
        let stat_name = config.alt_stat_name.as_ref().unwrap_or(&config.name);
        let in_use = previous.map(|cluster| Arc::clone(cluster.breaker.in_use())).unwrap_or_default();
        let original_dst = (config.discovery == Discovery::OriginalDst)
            .then(|| previous.and_then(|cluster| cluster.original_dst.clone()).unwrap_or_default());
        let detector = |detection: &config::outlier::OutlierDetection| {
            Box::new(Detector::new(detection.clone(), stats.outlier(stat_name)))
        };
        let checks = |check: &config::health_check::HealthCheck| {
            Box::new(Checks::new(check.clone(), stats.health_check(stat_name)))
        };
        let cluster = Arc::new(Self {
            health_check: config.health_check.as_deref().map(checks),
            outlier: config.outlier_detection.as_deref().map(detector),
            inherits: previous.is_some(),
            hashing: Gauges::new(&config.lb_policy, stats, stat_name),
            id: ClusterId(NEXT_ID.fetch_add(1, Relaxed)),
            stats: stats.cluster(stat_name),
            breaker: CircuitBreaker::new(config.circuit_breakers, in_use),
            registry: previous.map(|cluster| Arc::clone(&cluster.registry)).unwrap_or_default(),
            hosts: ArcSwap::from_pointee(HostSet::new(0, Vec::new(), 140, 0.0)),
            original_dst,
            credentials,
            announced: AtomicBool::new(false),
            losses: OnceLock::new(),
            watcher: OnceLock::new(),
            overprovisioning_factor: AtomicU32::new(config.load_assignment.overprovisioning_factor),
            config,
        });
        cluster.set_resolved(|_, _| Vec::new());
        cluster
    }

    /// Replaces the endpoints: those of the configuration, with the addresses that `resolve` knows for names.
    /// Returns whether anything changed.
    pub fn set_resolved<'a>(&'a self, resolve: impl Fn(&'a str, u16) -> Vec<SocketAddr>) -> bool {
        let config = &self.config;
        let resolved = config.discovery == Discovery::StrictDns;
        let endpoints = endpoint::endpoints_of(&config.load_assignment, &self.registry, resolved, resolve);
        self.replace_endpoints(endpoints)
    }

    /// EDS: replaces the endpoints by those of an assignment. Returns whether anything changed.
    pub fn set_assignment(&self, assignment: &ClusterLoadAssignment) -> bool {
        let endpoints = endpoint::endpoints_of(assignment, &self.registry, false, |_, _| Vec::new());
        let factor = assignment.overprovisioning_factor;
        let same_factor = self.overprovisioning_factor.swap(factor, Relaxed) == factor;
        if self.replace_endpoints(endpoints) {
            return true;
        }
        if !same_factor {
            self.refresh_health();
        }
        !same_factor
    }

    /// Replaces the endpoints. Connections to endpoints that are gone live on; so does the state of endpoints
    /// that stay. Returns whether anything changed.
    pub fn replace_endpoints(&self, mut endpoints: Vec<Endpoint>) -> bool {
        let old = self.hosts.load_full();
        self.hold_on_to_healthy(&old, &mut endpoints);
        self.adopt(&endpoints);
        let new = self.host_set(endpoints);
        if new.same_members(&old) && old.version() != 0 {
            return false;
        }
        if !new.same_members(&old) && self.announced.load(Relaxed) {
            self.stats.membership_change().inc();
        }
        if self.outlier.is_some() {
            new.endpoints().for_each(|endpoint| endpoint.host.watch_for_outliers());
        }
        self.let_go(&old, &new);
        self.publish(new);
        if let Some(outlier) = &self.outlier {
            outlier.members_changed();
        }
        if let Some(checks) = &self.health_check {
            checks.members_changed();
        }
        self.registry.prune();
        true
    }

    /// With active health checks, discovery alone does not remove a host that is healthy.
    fn hold_on_to_healthy(&self, old: &HostSet, endpoints: &mut Vec<Endpoint>) {
        if self.health_check.as_ref().is_none_or(|checks| checks.config().remove_healthy_hosts) {
            return;
        }
        let stays: HashSet<_> = endpoints.iter().map(|endpoint| Arc::as_ptr(&endpoint.host)).collect();
        for endpoint in endpoints.iter() {
            endpoint.host.set_health_flag(HealthFlag::PendingRemoval, false);
        }
        let is_alive = |endpoint: &&Arc<Endpoint>| {
            let failed = endpoint.host.has(HealthFlag::FailedActive)
                || matches!(endpoint.health_status, HealthStatus::Unhealthy | HealthStatus::Timeout);
            !failed && health_check::target(endpoint).is_some()
        };
        for endpoint in old.endpoints().filter(|endpoint| !stays.contains(&Arc::as_ptr(&endpoint.host))) {
            if is_alive(&endpoint) {
                endpoint.host.set_health_flag(HealthFlag::PendingRemoval, true);
                endpoints.push(Endpoint::clone(endpoint));
            }
        }
    }

    /// Hosts that were not endpoints before have to prove themselves, if there are active health checks.
    fn adopt(&self, endpoints: &[Endpoint]) {
        if let Some(checks) = &self.health_check {
            for endpoint in endpoints {
                checks.adopt(endpoint);
            }
        }
        for endpoint in endpoints {
            endpoint.host.set_health_flag(HealthFlag::Member, true);
        }
    }

    /// What was found of hosts that are no endpoints any more is forgotten.
    fn let_go(&self, old: &HostSet, new: &HostSet) {
        if self.health_check.is_none() || !self.announced.load(Relaxed) {
            return;
        }
        let stays: HashSet<_> = new.endpoints().map(|endpoint| Arc::as_ptr(&endpoint.host)).collect();
        for endpoint in old.endpoints().filter(|endpoint| !stays.contains(&Arc::as_ptr(&endpoint.host))) {
            endpoint.host.forget_checks();
            endpoint.host.set_health_flag(HealthFlag::Member, false);
        }
    }

    /// Active health checks have found another health of a host: it is used, or not, and it may go at last if
    /// discovery has removed it.
    fn active_health_changed(&self) {
        let set = self.hosts.load_full();
        let is_over = |endpoint: &Arc<Endpoint>| {
            endpoint.host.has(HealthFlag::PendingRemoval) && endpoint.host.has(HealthFlag::FailedActive)
        };
        if !set.endpoints().any(is_over) {
            self.refresh_health();
            return;
        }
        let rest =
            set.endpoints().filter(|endpoint| !is_over(endpoint)).map(|it| Endpoint::clone(it)).collect();
        let new = self.host_set(rest);
        if self.announced.load(Relaxed) {
            self.stats.membership_change().inc();
        }
        self.let_go(&set, &new);
        self.publish(new);
        self.registry.prune();
        if let Some(outlier) = &self.outlier {
            outlier.members_changed();
        }
        if let Some(checks) = &self.health_check {
            checks.members_changed();
        }
    }

    /// Sorts the endpoints again after health flags changed.
    pub fn refresh_health(&self) {
        let endpoints = self.hosts.load().endpoints().map(|endpoint| Endpoint::clone(endpoint)).collect();
        self.publish(self.host_set(endpoints));
    }

    fn host_set(&self, endpoints: Vec<Endpoint>) -> HostSet {
        let factor = match self.overprovisioning_factor.load(Relaxed) {
            0 => 140,
            factor => factor,
        };
        let version = NEXT_VERSION.fetch_add(1, Relaxed);
        let config = &self.config;
        let set = HostSet::new(version, endpoints, factor, config.healthy_panic_threshold);
        if config.lb_policy.hashing().is_some() {
            let previous = self.hosts.load();
            return set.hashing(&config.lb_policy, config.locality_weighted, Some(&previous));
        }
        if config.locality_weighted { set.weighing_localities(factor) } else { set }
    }

    fn publish(&self, set: HostSet) {
        let set = Arc::new(set);
        let old = self.hosts.swap(Arc::clone(&set));
        self.note_losses(&old, &set);
        if let Some(watcher) = self.watcher.get() {
            // Whoever wanted to know is gone at the end of the process.
            let _ = watcher.send(Arc::clone(self.name()));
        }
        if self.announced.load(Relaxed) {
            self.show(&set);
        }
    }

    /// Its name is sent there whenever other endpoints are in force, or others of them are healthy. The first who asks is
    /// the one who is told.
    pub fn tell_changes(&self, to: &UnboundedSender<Arc<str>>) {
        self.watcher.get_or_init(|| to.clone());
    }

    /// It is in force: from here on its endpoints are what the stats of its name tell.
    pub fn announce(&self) {
        if !self.announced.swap(true, Relaxed) {
            self.disown();
            let set = self.hosts.load();
            if set.membership()[0] > 0 {
                self.stats.membership_change().inc();
            }
            self.show(&set);
        }
    }

    /// Flags that a former version has set, and that nobody would take back any more, go.
    fn disown(&self) {
        if !self.inherits {
            return;
        }
        let mut changed = false;
        for host in self.hosts.load().endpoints().map(|endpoint| &endpoint.host) {
            let flags = host.health_flags();
            if self.outlier.is_none() {
                host.set_health_flag(HealthFlag::FailedOutlier, false);
            }
            if self.health_check.is_none() {
                host.forget_checks();
            }
            changed |= host.health_flags() != flags;
        }
        if changed {
            self.refresh_health();
        }
    }

    fn show(&self, set: &HostSet) {
        if let (Some(gauges), Some(counts)) = (&self.hashing, set.hash_counts()) {
            gauges.show(counts);
        }
        let [total, healthy, degraded, excluded] = set.membership();
        if self.original_dst.is_none() {
            self.stats.membership_total().set(total);
            self.stats.membership_healthy().set(healthy);
            self.stats.membership_degraded().set(degraded);
            self.stats.membership_excluded().set(excluded);
        }
    }

    /// Unique in the process.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.config.name
    }

    /// What it was built from.
    pub fn config(&self) -> &Arc<config::cluster::Cluster> {
        &self.config
    }

    /// `cluster.<name>.*`
    pub fn stats(&self) -> &ClusterStats {
        &self.stats
    }

    /// For TLS handshakes, if it has TLS.
    pub fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    /// Its limits.
    pub fn breaker(&self) -> &CircuitBreaker {
        &self.breaker
    }

    /// Its active health checks, if it has any.
    pub fn health_check(&self) -> Option<&Checks> {
        self.health_check.as_deref()
    }

    /// Its outlier detection, if it has any.
    pub fn outlier(&self) -> Option<&Detector> {
        self.outlier.as_deref()
    }

    /// Its endpoints now. Cheap: no lock, and no write to shared memory in the usual case.
    pub fn hosts(&self) -> arc_swap::Guard<Arc<HostSet>> {
        self.hosts.load()
    }

    /// Every endpoint, for the admin server; for ORIGINAL_DST the destinations seen lately.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        match &self.original_dst {
            Some(hosts) => hosts.endpoints(),
            None => self.hosts.load().endpoints().cloned().collect(),
        }
    }

    /// Brings `circuit_breakers.*` up to date. Called before stats are rendered: computing these gauges when they
    /// are read keeps the hot path free of them, and they can't go stale.
    pub fn observe(&self) {
        self.stats.circuit_breakers_default_cx_open().set(u64::from(self.breaker.cx_open()));
        self.stats.circuit_breakers_default_rq_pending_open().set(u64::from(self.breaker.rq_pending_open()));
    }

    /// ORIGINAL_DST: drops unused hosts. Called by the main thread every `cleanup_interval`.
    pub fn sweep(&self) {
        let Some(hosts) = &self.original_dst else { return };
        if hosts.sweep() > 0 {
            self.note_membership(hosts.len() as u64);
            self.registry.prune();
        }
    }

    /// ORIGINAL_DST: its hosts.
    pub fn original_dst_hosts(&self) -> Option<&OriginalDstHosts> {
        self.original_dst.as_deref()
    }

    pub(crate) fn registry(&self) -> &HostRegistry {
        &self.registry
    }

    fn note_membership(&self, total: u64) {
        self.stats.membership_change().inc();
        self.stats.membership_total().set(total);
        self.stats.membership_healthy().set(total);
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("config", &self.config)
            .field("hosts", &self.hosts.load())
            .field("breaker", &self.breaker)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::addr::OriginalDst;
    use crate::config::cluster::{Cluster as Config, Dns, LbPolicy, LookupFamily, Thresholds};
    use crate::config::endpoint::{
        ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, Locality, LocalityLbEndpoints,
    };
    use crate::config::transport_socket::TransportSocketMatches;

    pub(crate) fn config(name: &str, discovery: Discovery, addresses: &[EndpointAddress]) -> Config {
        let endpoint = |address: &EndpointAddress| LbEndpoint {
            address: address.clone(),
            hostname: "".into(),
            load_balancing_weight: 1,
            health_status: HealthStatus::Unknown,
            health_check: None,
            hash_key: None,
        };
        Config {
            name: name.into(),
            alt_stat_name: None,
            discovery,
            eds: None,
            lb_policy: LbPolicy::RoundRobin,
            locality_weighted: false,
            connect_timeout: Duration::from_secs(5),
            per_connection_buffer_limit_bytes: 1 << 20,
            load_assignment: ClusterLoadAssignment {
                localities: vec![LocalityLbEndpoints {
                    locality: Locality::default(),
                    priority: 0,
                    load_balancing_weight: None,
                    endpoints: addresses.iter().map(endpoint).collect(),
                }],
                overprovisioning_factor: 140,
            },
            transport_sockets: TransportSocketMatches::default(),
            circuit_breakers: Thresholds::default(),
            endpoint_removal: None,
            data_path: None,
            close_connections_on_host_health_failure: false,
            health_check: None,
            outlier_detection: None,
            healthy_panic_threshold: 50.0,
            upstream_keepalive: None,
            upstream_bind: None,
            dns: Dns {
                refresh_rate: Duration::from_secs(5),
                respect_ttl: false,
                lookup_family: LookupFamily::Auto,
            },
            cleanup_interval: Duration::from_secs(5),
            tls: None,
            has_pipes: addresses.iter().any(|address| matches!(address, EndpointAddress::Pipe(_))),
        }
    }

    pub(crate) fn ip(port: u16) -> EndpointAddress {
        EndpointAddress::Ip(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn an_update_keeps_the_state_of_endpoints_that_stay() {
        let stats = Stats::new(1);
        let old = Cluster::build(Arc::new(config("c", Discovery::Static, &[ip(1), ip(2)])), &stats, None);
        assert_eq!(old.stats().membership_total().value(), 2);
        assert_eq!(old.stats().membership_change().value(), 1);
        let active = old.endpoints()[1].host.connecting();
        let permit = old.breaker().connection();
        let mut changed = config("c", Discovery::Static, &[ip(2), ip(3)]);
        changed.circuit_breakers.max_connections = 1;
        let new = Cluster::build(Arc::new(changed), &stats, Some(&old));
        drop(old);
        let hosts = new.endpoints();
        assert_eq!((hosts[0].host.cx_active(), hosts[1].host.cx_active()), (1, 0));
        new.observe();
        assert_eq!(new.stats().circuit_breakers_default_cx_open().value(), 1);
        drop((active, permit));
        new.observe();
        assert_eq!((hosts[0].host.cx_active(), new.breaker().connections()), (0, 0));
        assert_eq!(new.stats().circuit_breakers_default_cx_open().value(), 0);
    }

    #[test]
    fn equal_endpoints_are_no_change() {
        let stats = Stats::new(1);
        let cluster = Cluster::build(Arc::new(config("c", Discovery::Static, &[ip(1)])), &stats, None);
        let version = cluster.hosts().version();
        assert!(!cluster.set_resolved(|_, _| Vec::new()));
        assert_eq!(cluster.hosts().version(), version);
        assert!(cluster.replace_endpoints(Vec::new()));
        assert_eq!(cluster.stats().membership_total().value(), 0);
        assert_eq!(cluster.stats().membership_change().value(), 2);
    }

    #[test]
    fn workers_see_a_new_host_set_at_their_next_pick() {
        let stats = Stats::new(1);
        let cluster = Cluster::build(Arc::new(config("c", Discovery::Static, &[ip(1)])), &stats, None);
        let mut balancers = WorkerBalancers::with_seed(1);
        let port = |balancers: &mut WorkerBalancers| {
            balancers.pick(&cluster, None, None).map(|endpoint| endpoint.address().ip().unwrap().port())
        };
        assert_eq!(port(&mut balancers), Some(1));
        cluster.replace_endpoints(vec![endpoint::tests::endpoint(cluster.registry(), 9, 1, 0)]);
        assert_eq!(port(&mut balancers), Some(9));
        cluster.replace_endpoints(Vec::new());
        assert_eq!(port(&mut balancers), None);
        assert_eq!(cluster.stats().lb_healthy_panic().value(), 1);
        balancers.retain(|_| false);
    }

    #[test]
    fn health_flags_count_after_a_refresh() {
        let stats = Stats::new(1);
        let cluster =
            Cluster::build(Arc::new(config("c", Discovery::Static, &[ip(1), ip(2), ip(3)])), &stats, None);
        let host = Arc::clone(&cluster.endpoints()[0].host);
        host.set_health_flag(host::HealthFlag::FailedActive, true);
        cluster.refresh_health();
        assert_eq!(cluster.stats().membership_healthy().value(), 2);
        let mut balancers = WorkerBalancers::with_seed(1);
        for _ in 0..20 {
            assert_ne!(balancers.pick(&cluster, None, None).unwrap().address(), host.address());
        }
    }

    #[test]
    fn original_destinations_become_hosts_until_unused_for_a_sweep() {
        let stats = Stats::new(1);
        let cluster = Cluster::build(Arc::new(config("Pass", Discovery::OriginalDst, &[])), &stats, None);
        let mut balancers = [WorkerBalancers::with_seed(1), WorkerBalancers::with_seed(2)];
        let destination = |n: u8| Some(OriginalDst(([10, 0, 0, n], 80).into()));
        assert!(balancers[0].pick(&cluster, None, None).is_none(), "no restored address, no host");

        let first = balancers[0].pick(&cluster, destination(1), None).unwrap();
        assert_eq!(&*first.hostname, "Pass10.0.0.1:80");
        let same = balancers[1].pick(&cluster, destination(1), None).unwrap();
        assert!(Arc::ptr_eq(&first, &same), "workers share hosts");
        let used = balancers[0].pick(&cluster, destination(2), None).unwrap().host.connecting();
        assert_eq!(cluster.stats().membership_total().value(), 2);

        cluster.sweep();
        assert_eq!(cluster.endpoints().len(), 2, "picked since the last sweep");
        cluster.sweep();
        assert_eq!(cluster.endpoints().len(), 1, "the one with a connection stays");
        assert_eq!(cluster.stats().membership_total().value(), 1);

        let again = balancers[1].pick(&cluster, destination(1), None).unwrap();
        assert!(!Arc::ptr_eq(&first.host, &again.host), "a swept host is not used again");
        drop(used);
        cluster.sweep();
        cluster.sweep();
        assert_eq!(cluster.endpoints().len(), 0);
    }
}
