//! Endpoints, and the immutable sets of them that balancers pick from ([`HostSet`]).

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::hashing::{Counts, Table};
use super::host::HostRegistry;
pub use super::host::{HealthFlag, Host};
use super::priority::{Availability, Loads};
use crate::addr::EndpointAddr;
use crate::config::cluster::LbPolicy;
use crate::config::endpoint::{ClusterLoadAssignment, EndpointAddress, HealthStatus, Locality};
use crate::config::health_check::EndpointHealthCheck;

/// One entry of a host set: a host and what the configuration says of it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its live state.
    pub host: Arc<Host>,
    /// `hostname`, or the resolved name (STRICT_DNS); empty when it has none.
    pub hostname: Arc<str>,
    /// Load balancing weight, at least 1.
    pub weight: u32,
    /// Where it is. Shared by the endpoints of a locality.
    pub locality: Arc<Locality>,
    /// Of the locality, when localities are weighted.
    pub locality_weight: u32,
    /// 0 is the highest.
    pub priority: u32,
    /// As the control plane sees it.
    pub health_status: HealthStatus,
    /// Where active health checks go, if not to its own address.
    pub health_check: Option<Arc<EndpointHealthCheck>>,
    /// What RING_HASH and MAGLEV know it by, if not by its address.
    pub hash_key: Option<Arc<str>>,
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
    pub fn address(&self) -> &EndpointAddr {
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
    /// By priority; empty unless the policy hashes.
    tables: Vec<Table>,
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
    /// The healthy ones by locality, where localities are weighted.
    pub healthy_localities: Vec<LocalityHosts>,
    /// The degraded ones likewise.
    pub degraded_localities: Vec<LocalityHosts>,
    /// How many of `hosts` are excluded from shares.
    pub excluded: usize,
}

/// Endpoints of one locality that load goes to.
#[derive(Debug)]
pub struct LocalityHosts {
    /// Its share, relative to the others of the list; at least 1.
    pub weight: u32,
    /// At least one.
    pub hosts: Vec<Arc<Endpoint>>,
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
        for at in &mut priorities {
            at.hosts.shrink_to_fit();
            at.healthy.shrink_to_fit();
            at.degraded.shrink_to_fit();
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
        Self { version, priorities, loads, tables: Vec::new() }
    }

    /// Weighs localities: the share of each is its weight times its health, as for priorities.
    #[must_use]
    pub fn weighing_localities(mut self, overprovisioning_factor: u32) -> Self {
        for at in &mut self.priorities {
            at.healthy_localities = localities(&at.hosts, &at.healthy, overprovisioning_factor);
            at.degraded_localities = localities(&at.hosts, &at.degraded, overprovisioning_factor);
        }
        self
    }

    /// Builds the tables of a policy that hashes: once for each host set, by whoever replaces it. What did not change since
    /// `previous` is taken over.
    #[must_use]
    pub fn hashing(mut self, policy: &LbPolicy, locality_weighted: bool, previous: Option<&Self>) -> Self {
        let previous = |priority| previous.and_then(|set| set.table(priority));
        self.tables = (0..self.priorities.len())
            .filter_map(|priority| Table::new(policy, &self, priority, locality_weighted, previous(priority)))
            .collect();
        self
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

    /// What a priority's connections are spread over, if the policy hashes.
    pub fn table(&self, priority: usize) -> Option<&Table> {
        self.tables.get(priority)
    }

    /// What the tables' gauges show: the last priority that has hosts, as in Envoy.
    pub fn hash_counts(&self) -> Option<Counts> {
        self.tables.iter().rev().find_map(Table::counts)
    }

    /// One list of endpoints by locality. Empty where localities are not weighted, or all weights are 0.
    pub fn localities(&self, priority: usize, source: Source) -> &[LocalityHosts] {
        let at = &self.priorities[priority];
        match source {
            Source::All => &[],
            Source::Healthy => &at.healthy_localities,
            Source::Degraded => &at.degraded_localities,
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
                    && a.locality_weight == b.locality_weight
                    && a.health_status == b.health_status
                    && a.health_check == b.health_check
                    && a.hash_key == b.hash_key
            })
    }
}

/// Those of `usable` by locality. A locality of which less than `overprovisioning_factor` percent can be made up for by
/// those that are left gets less than its weight.
fn localities(
    hosts: &[Arc<Endpoint>],
    usable: &[Arc<Endpoint>],
    overprovisioning_factor: u32,
) -> Vec<LocalityHosts> {
    #[derive(Default)]
    struct Group {
        weight: u32,
        counted: usize,
        usable: Vec<Arc<Endpoint>>,
    }
    let mut groups: BTreeMap<&Locality, Group> = BTreeMap::new();
    for endpoint in hosts {
        let group = groups.entry(&endpoint.locality).or_default();
        group.weight = endpoint.locality_weight;
        group.counted += usize::from(!endpoint.is_excluded());
    }
    for endpoint in usable {
        if let Some(group) = groups.get_mut(&*endpoint.locality) {
            group.usable.push(Arc::clone(endpoint));
        }
    }
    let share = |group: &Group| {
        if group.counted == 0 {
            return 0.0;
        }
        let health = group.usable.len() as f64 / group.counted as f64;
        f64::from(group.weight) * (health * f64::from(overprovisioning_factor) / 100.0).min(1.0)
    };
    let shares: Vec<f64> = groups.values().map(share).collect();
    let scale = if shares.iter().all(|share| share.fract() == 0.0) {
        1.0 // exact
    } else {
        f64::from(1 << 30) / shares.iter().copied().fold(1.0, f64::max)
    };
    let groups = groups.into_values().zip(shares).filter(|(_, share)| *share > 0.0);
    groups
        .map(|(group, share)| LocalityHosts {
            weight: ((share * scale).round() as u32).max(1),
            hosts: group.usable,
        })
        .collect()
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
        let locality = Arc::new(group.locality.clone());
        for endpoint in &group.endpoints {
            let (addresses, name) = match &endpoint.address {
                EndpointAddress::Ip(address) => {
                    let name = if resolved { address.ip().to_string().into() } else { Arc::default() };
                    (vec![EndpointAddr::Ip(*address)], name)
                }
                EndpointAddress::Pipe(pipe) => (vec![EndpointAddr::Pipe(pipe.clone())], Arc::default()),
                EndpointAddress::Name(name, port) => {
                    let addresses = resolve(name, *port).into_iter().map(EndpointAddr::Ip).collect();
                    (addresses, Arc::clone(name))
                }
            };
            let hostname = if endpoint.hostname.is_empty() { name } else { Arc::clone(&endpoint.hostname) };
            for address in addresses {
                if !resolved || seen.insert((group.priority, address.clone())) {
                    out.push(Endpoint {
                        host: registry.host(address),
                        hostname: Arc::clone(&hostname),
                        weight: endpoint.load_balancing_weight.max(1),
                        locality: Arc::clone(&locality),
                        locality_weight: group.load_balancing_weight.unwrap_or(0),
                        priority: group.priority,
                        health_status: endpoint.health_status,
                        health_check: endpoint.health_check.clone(),
                        hash_key: endpoint.hash_key.clone(),
                    });
                }
            }
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn endpoint(registry: &HostRegistry, port: u16, weight: u32, priority: u32) -> Endpoint {
        Endpoint {
            host: registry.host(EndpointAddr::Ip(([127, 0, 0, 1], port).into())),
            hostname: "".into(),
            weight,
            locality: Arc::default(),
            locality_weight: 0,
            priority,
            health_status: HealthStatus::Unknown,
            health_check: None,
            hash_key: None,
        }
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
