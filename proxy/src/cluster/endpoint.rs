//! Endpoints: their live state ([`Host`]) and the immutable sets that balancers pick from ([`HostSet`]).

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::priority::{Availability, Loads};
use crate::addr::EndpointAddr;
use crate::config::endpoint::{
    ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, Locality, LocalityLbEndpoints,
};

/// The live state of one address of one cluster. It survives updates of the cluster and its endpoints for as long
/// as a host set or a connection refers to it. Written by every worker.
#[derive(Debug)]
pub struct Host {
    address: EndpointAddr,
    cx_active: AtomicU64,
    cx_total: AtomicU64,
    cx_connect_fail: AtomicU64,
    rq_active: AtomicU64,
    rq_total: AtomicU64,
    health_flags: AtomicU32,
    /// ORIGINAL_DST: picked since the last sweep.
    recently_picked: AtomicBool,
    /// ORIGINAL_DST: dropped by a sweep, so a worker that still remembers it asks the cluster again.
    swept: AtomicBool,
}

/// What health checks and outlier detection found; bits of [`Host::health_flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HealthFlag {
    /// Active health checks fail.
    FailedActive = 1 << 0,
    /// Ejected by outlier detection.
    FailedOutlier = 1 << 1,
    /// Active health checks report it degraded.
    DegradedActive = 1 << 2,
    /// Not yet checked; does not count as a host.
    PendingActive = 1 << 3,
}

impl Host {
    /// A host that nothing is known of yet.
    pub fn new(address: EndpointAddr) -> Self {
        Self {
            address,
            cx_active: AtomicU64::new(0),
            cx_total: AtomicU64::new(0),
            cx_connect_fail: AtomicU64::new(0),
            rq_active: AtomicU64::new(0),
            rq_total: AtomicU64::new(0),
            health_flags: AtomicU32::new(0),
            recently_picked: AtomicBool::new(true),
            swept: AtomicBool::new(false),
        }
    }

    /// Where it is.
    pub fn address(&self) -> EndpointAddr {
        self.address
    }

    /// Connections to it that are open or being opened (`cx_active`).
    pub fn cx_active(&self) -> u64 {
        self.cx_active.load(Relaxed)
    }

    /// Connection attempts ever made (`cx_total`).
    pub fn cx_total(&self) -> u64 {
        self.cx_total.load(Relaxed)
    }

    /// Attempts that failed (`cx_connect_fail`).
    pub fn cx_connect_fail(&self) -> u64 {
        self.cx_connect_fail.load(Relaxed)
    }

    /// Connections that are established and in use (`rq_active`).
    pub fn rq_active(&self) -> u64 {
        self.rq_active.load(Relaxed)
    }

    /// Connections that were ever established (`rq_total`).
    pub fn rq_total(&self) -> u64 {
        self.rq_total.load(Relaxed)
    }

    /// Bits of [`HealthFlag`].
    pub fn health_flags(&self) -> u32 {
        self.health_flags.load(Relaxed)
    }

    /// Sets or clears a health flag. The cluster has to be refreshed for balancers to see it.
    pub fn set_health_flag(&self, flag: HealthFlag, on: bool) {
        if on {
            self.health_flags.fetch_or(flag as u32, Relaxed);
        } else {
            self.health_flags.fetch_and(!(flag as u32), Relaxed);
        }
    }

    /// Counts an attempt to connect; it is active until the guard goes.
    pub fn connecting(self: &Arc<Self>) -> ActiveConnection {
        self.cx_total.fetch_add(1, Relaxed);
        self.cx_active.fetch_add(1, Relaxed);
        ActiveConnection { host: Arc::clone(self), established: false }
    }

    pub(super) fn note_connect_fail(&self) {
        self.cx_connect_fail.fetch_add(1, Relaxed);
    }

    pub(super) fn note_picked(&self) {
        if !self.recently_picked.load(Relaxed) {
            self.recently_picked.store(true, Relaxed);
        }
    }

    /// Whether a sweep may drop it: no connection now, and none picked it since the last sweep.
    pub(super) fn sweep(&self) -> bool {
        let unused = !self.recently_picked.swap(false, Relaxed) && self.cx_active() == 0;
        if unused {
            self.swept.store(true, Relaxed);
        }
        unused
    }

    pub(super) fn is_swept(&self) -> bool {
        self.swept.load(Relaxed)
    }
}

/// Holds a host's `cx_active`, and `rq_active` once established.
#[derive(Debug)]
pub struct ActiveConnection {
    host: Arc<Host>,
    established: bool,
}

impl ActiveConnection {
    /// The attempt succeeded.
    pub fn establish(&mut self) {
        if !self.established {
            self.established = true;
            self.host.rq_total.fetch_add(1, Relaxed);
            self.host.rq_active.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for ActiveConnection {
    fn drop(&mut self) {
        self.host.cx_active.fetch_sub(1, Relaxed);
        if self.established {
            self.host.rq_active.fetch_sub(1, Relaxed);
        }
    }
}

/// The hosts of one cluster by address. Held by the cluster and its successors of the same name.
#[derive(Debug, Default)]
pub struct HostRegistry(Mutex<HashMap<SocketAddr, Weak<Host>>>);

impl HostRegistry {
    /// The host at this address: the one that is still referred to, else a new one.
    pub fn host(&self, address: EndpointAddr) -> Arc<Host> {
        let mut hosts = self.lock();
        if let Some(host) = hosts.get(&address.0).and_then(Weak::upgrade) {
            return host;
        }
        let host = Arc::new(Host::new(address));
        hosts.insert(address.0, Arc::downgrade(&host));
        host
    }

    /// A host for an ORIGINAL_DST destination: the one that is still referred to unless a sweep dropped it.
    pub(super) fn fresh(&self, address: EndpointAddr) -> Arc<Host> {
        let host = self.host(address);
        if !host.is_swept() {
            return host;
        }
        let host = Arc::new(Host::new(address));
        self.lock().insert(address.0, Arc::downgrade(&host));
        host
    }

    /// Forgets hosts that nothing refers to.
    pub fn prune(&self) {
        self.lock().retain(|_, host| host.strong_count() > 0);
    }

    /// How many addresses it knows, for tests and `/memory`.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Weak<Host>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One entry of a host set: a host and what the configuration says of it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its live state.
    pub host: Arc<Host>,
    /// `hostname`, or the resolved name (STRICT_DNS); empty when it has none.
    pub hostname: Arc<str>,
    /// Load balancing weight, at least 1.
    pub weight: u32,
    /// Where it is.
    pub locality: Locality,
    /// 0 is the highest.
    pub priority: u32,
    /// As the control plane sees it.
    pub health_status: HealthStatus,
}

/// Whether a balancer may use an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Healthy,
    /// When there are not enough healthy ones.
    Degraded,
    /// Only in panic mode.
    Unhealthy,
}

impl Endpoint {
    /// Where it is.
    pub fn address(&self) -> EndpointAddr {
        self.host.address()
    }

    /// What the control plane, health checks and outlier detection say together.
    pub fn health(&self) -> Health {
        let flags = self.host.health_flags();
        let has = |flag: HealthFlag| flags & flag as u32 != 0;
        let down = matches!(
            self.health_status,
            HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout
        );
        if down || has(HealthFlag::FailedActive) || has(HealthFlag::FailedOutlier) {
            Health::Unhealthy
        } else if self.health_status == HealthStatus::Degraded || has(HealthFlag::DegradedActive) {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    /// Left out when shares of healthy hosts are computed: it is leaving, or was never checked.
    pub fn is_excluded(&self) -> bool {
        self.health_status == HealthStatus::Draining
            || self.host.health_flags() & HealthFlag::PendingActive as u32 != 0
    }
}

/// The endpoints of a cluster at one moment. Replaced as a whole.
#[derive(Debug)]
pub struct HostSet {
    version: u64,
    priorities: Vec<PriorityHosts>,
    loads: Loads,
}

/// The endpoints of one priority.
#[derive(Debug, Default)]
pub struct PriorityHosts {
    /// All of them, by locality, in configuration order.
    pub hosts: Vec<Arc<Endpoint>>,
    /// The healthy ones.
    pub healthy: Vec<Arc<Endpoint>>,
    /// The degraded ones.
    pub degraded: Vec<Arc<Endpoint>>,
    /// How many of `hosts` are excluded from shares.
    pub excluded: usize,
}

/// Which list of a priority a balancer picks from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Source {
    /// All hosts (panic mode).
    All,
    /// Healthy hosts.
    Healthy,
    /// Degraded hosts.
    Degraded,
}

impl HostSet {
    /// Sorts endpoints into priorities and computes how load spreads over them.
    ///
    /// `version` has to differ from that of every earlier set of the cluster.
    pub fn new(
        version: u64,
        endpoints: Vec<Endpoint>,
        overprovisioning_factor: u32,
        healthy_panic_threshold: f64,
    ) -> Self {
        let last = endpoints.iter().map(|endpoint| endpoint.priority as usize).max().unwrap_or(0);
        let mut priorities: Vec<PriorityHosts> = (0..=last).map(|_| PriorityHosts::default()).collect();
        for endpoint in endpoints {
            let at = &mut priorities[endpoint.priority as usize];
            let endpoint = Arc::new(endpoint);
            match endpoint.health() {
                Health::Healthy => at.healthy.push(Arc::clone(&endpoint)),
                Health::Degraded => at.degraded.push(Arc::clone(&endpoint)),
                Health::Unhealthy => {}
            }
            at.excluded += usize::from(endpoint.is_excluded());
            at.hosts.push(endpoint);
        }
        let availability: Vec<Availability> = priorities
            .iter()
            .map(|at| Availability {
                hosts: at.hosts.len(),
                excluded: at.excluded,
                healthy: at.healthy.len(),
                degraded: at.degraded.len(),
            })
            .collect();
        let loads = Loads::new(&availability, overprovisioning_factor, healthy_panic_threshold);
        Self { version, priorities, loads }
    }

    /// Differs from that of every other set of the cluster.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// By priority, 0 first; never empty.
    pub fn priorities(&self) -> &[PriorityHosts] {
        &self.priorities
    }

    /// How load spreads over the priorities.
    pub fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Every endpoint.
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.priorities.iter().flat_map(|at| &at.hosts)
    }

    /// One list of endpoints.
    pub fn source(&self, priority: usize, source: Source) -> &[Arc<Endpoint>] {
        let at = &self.priorities[priority];
        match source {
            Source::All => &at.hosts,
            Source::Healthy => &at.healthy,
            Source::Degraded => &at.degraded,
        }
    }

    /// `membership_total`, `_healthy`, `_degraded`, `_excluded`.
    pub fn membership(&self) -> [u64; 4] {
        self.priorities.iter().fold([0; 4], |[total, healthy, degraded, excluded], at| {
            [
                total + at.hosts.len() as u64,
                healthy + at.healthy.len() as u64,
                degraded + at.degraded.len() as u64,
                excluded + at.excluded as u64,
            ]
        })
    }

    /// Whether both sets have the same members with the same settings, health aside.
    pub fn same_members(&self, other: &Self) -> bool {
        self.endpoints().count() == other.endpoints().count()
            && self.endpoints().zip(other.endpoints()).all(|(a, b)| {
                Arc::ptr_eq(&a.host, &b.host)
                    && a.weight == b.weight
                    && a.priority == b.priority
                    && a.hostname == b.hostname
                    && a.locality == b.locality
                    && a.health_status == b.health_status
            })
    }
}

/// The endpoints of an assignment. `resolve` gives the addresses of a name.
///
/// Where endpoints are resolved (STRICT_DNS), an address is its own name, and one that comes up twice in a priority
/// counts once. Elsewhere it stays twice, with a weight of its own each time, as in Envoy.
pub(super) fn endpoints_of<'a>(
    assignment: &'a ClusterLoadAssignment,
    registry: &HostRegistry,
    resolved: bool,
    resolve: impl Fn(&'a str, u16) -> Vec<SocketAddr>,
) -> Vec<Endpoint> {
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    for group in &assignment.localities {
        for endpoint in &group.endpoints {
            let (addresses, name) = match &endpoint.address {
                EndpointAddress::Ip(address) if resolved => (vec![*address], address.ip().to_string().into()),
                EndpointAddress::Ip(address) => (vec![*address], "".into()),
                EndpointAddress::Name(name, port) => (resolve(name, *port), Arc::clone(name)),
            };
            let hostname = if endpoint.hostname.is_empty() { name } else { Arc::clone(&endpoint.hostname) };
            for address in addresses {
                if !resolved || seen.insert((group.priority, address)) {
                    out.push(endpoint_at(address, Arc::clone(&hostname), endpoint, group, registry));
                }
            }
        }
    }
    out
}

fn endpoint_at(
    address: SocketAddr,
    hostname: Arc<str>,
    endpoint: &LbEndpoint,
    group: &LocalityLbEndpoints,
    registry: &HostRegistry,
) -> Endpoint {
    Endpoint {
        host: registry.host(EndpointAddr(address)),
        hostname,
        weight: endpoint.load_balancing_weight.max(1),
        locality: group.locality.clone(),
        priority: group.priority,
        health_status: endpoint.health_status,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn endpoint(registry: &HostRegistry, port: u16, weight: u32, priority: u32) -> Endpoint {
        Endpoint {
            host: registry.host(EndpointAddr(([127, 0, 0, 1], port).into())),
            hostname: "".into(),
            weight,
            locality: Locality::default(),
            priority,
            health_status: HealthStatus::Unknown,
        }
    }

    #[test]
    fn a_host_is_kept_while_a_connection_uses_it_and_forgotten_after() {
        let registry = HostRegistry::default();
        let set = HostSet::new(1, vec![endpoint(&registry, 1, 1, 0)], 140, 50.0);
        let mut active = set.priorities()[0].hosts[0].host.connecting();
        active.establish();
        drop(set);
        registry.prune();
        assert_eq!(registry.len(), 1);
        let again = endpoint(&registry, 1, 1, 0);
        assert_eq!((again.host.cx_active(), again.host.rq_active(), again.host.cx_total()), (1, 1, 1));
        drop(active);
        assert_eq!((again.host.cx_active(), again.host.rq_active(), again.host.cx_total()), (0, 0, 1));
        drop(again);
        registry.prune();
        assert!(registry.is_empty());
    }

    #[test]
    fn health_is_the_worst_of_what_is_known() {
        let registry = HostRegistry::default();
        let mut e = endpoint(&registry, 1, 1, 0);
        for (status, health, excluded) in [
            (HealthStatus::Unknown, Health::Healthy, false),
            (HealthStatus::Healthy, Health::Healthy, false),
            (HealthStatus::Degraded, Health::Degraded, false),
            (HealthStatus::Unhealthy, Health::Unhealthy, false),
            (HealthStatus::Timeout, Health::Unhealthy, false),
            (HealthStatus::Draining, Health::Unhealthy, true),
        ] {
            e.health_status = status;
            assert_eq!((e.health(), e.is_excluded()), (health, excluded), "{status:?}");
        }
        e.health_status = HealthStatus::Healthy;
        e.host.set_health_flag(HealthFlag::FailedOutlier, true);
        assert_eq!(e.health(), Health::Unhealthy);
        e.host.set_health_flag(HealthFlag::FailedOutlier, false);
        assert_eq!(e.health(), Health::Healthy);
    }
}
