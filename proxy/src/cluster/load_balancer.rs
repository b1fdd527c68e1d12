//! Choosing an endpoint. Each worker has balancers of its own, one per cluster, so that a pick takes no lock and
//! shares nothing but the hosts' connection counts.
//!
//! - ROUND_ROBIN: in turn from a random start when all weights are equal, else weighted by `edf`.
//! - LEAST_REQUEST: with equal weights, `choice_count` hosts are drawn and the one with the fewest active
//!   connections wins; else earliest deadline first with weight / (active + 1) ^ bias. Active counts include
//!   connections that are still being opened, so that a host that doesn't answer doesn't look idle, and those of the kernel path.
//! - RANDOM: any host of the list, whatever its weight, as in Envoy.
//! - RING_HASH, MAGLEV: the host that a hash of the connection belongs to (`hashing`), by a table that comes with the host set.
//!   A connection of which nothing is hashed gets a random number for it.
//!
//! Where localities are weighted, a locality is drawn by weighted round robin first, and the policy chooses among its hosts.

use std::collections::HashMap;
use std::sync::Arc;

use fastrand::Rng;

use super::edf::{self, Edf, Instant, Turn};
use super::endpoint::{Endpoint, HostSet, LocalityHosts, Source};
use super::hashing::Probe;
use super::original_dst::WorkerHosts;
use super::{Cluster, ClusterId};
use crate::addr::OriginalDst;
use crate::config::cluster::LbPolicy;

/// The balancers of one worker.
#[derive(Debug)]
pub struct WorkerBalancers {
    rng: Rng,
    by_cluster: HashMap<ClusterId, State>,
    probe: Probe,
}

#[derive(Debug)]
enum State {
    Balancer(Balancer),
    OriginalDst(WorkerHosts),
}

impl Default for WorkerBalancers {
    fn default() -> Self {
        Self::with_seed(fastrand::u64(..))
    }
}

impl WorkerBalancers {
    /// Balancers whose random choices follow from a seed.
    pub fn with_seed(seed: u64) -> Self {
        Self { rng: Rng::with_seed(seed), by_cluster: HashMap::new(), probe: Probe::default() }
    }

    /// The endpoint for the next connection. `None`: there is no usable one (flag UH).
    ///
    /// `destination` is the restored original destination, which a cluster of type ORIGINAL_DST needs; `hash` is what
    /// [`hashing::of_connection`](super::hashing::of_connection) says of the connection. A permit for it is taken from the
    /// circuit breaker before.
    pub fn pick(
        &mut self,
        cluster: &Cluster,
        destination: Option<OriginalDst>,
        hash: Option<u64>,
    ) -> Option<Arc<Endpoint>> {
        if let Some(hosts) = cluster.original_dst_hosts() {
            let state = self
                .by_cluster
                .entry(cluster.id())
                .or_insert_with(|| State::OriginalDst(WorkerHosts::default()));
            let State::OriginalDst(known) = state else { return None };
            return Some(known.pick(cluster, hosts, destination?));
        }
        let set = cluster.hosts();
        let state = self.by_cluster.entry(cluster.id()).or_insert_with(|| {
            State::Balancer(Balancer::new(cluster.config().lb_policy, Arc::clone(&set), &mut self.rng))
        });
        let State::Balancer(balancer) = state else { return None };
        balancer.update(&set);
        let pick = if balancer.policy.hashing().is_some() {
            let hash = hash.unwrap_or_else(|| self.rng.u64(..));
            balancer.pick_hashed(hash, cluster.breaker().connections(), &mut self.probe)
        } else {
            balancer.pick(&mut self.rng)
        };
        if pick.panic {
            cluster.stats().lb_healthy_panic().inc();
        }
        pick.endpoint
    }

    /// A random number below `bound` (at least 1), for draws that go with a pick.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.rng.u64(..bound)
    }

    /// Drops the state of clusters that are gone. Called when a worker takes a new snapshot.
    pub fn retain(&mut self, mut is_known: impl FnMut(ClusterId) -> bool) {
        self.by_cluster.retain(|id, _| is_known(*id));
    }
}

/// What a pick gave.
#[derive(Debug)]
pub struct Pick {
    /// The endpoint, if there is a usable one.
    pub endpoint: Option<Arc<Endpoint>>,
    /// It was chosen regardless of health.
    pub panic: bool,
}

/// One worker's balancer of one cluster.
#[derive(Debug)]
pub struct Balancer {
    policy: LbPolicy,
    set: Arc<HostSet>,
    /// Indexed by priority and source.
    schedules: Vec<Option<Schedule>>,
    /// The same, where localities are weighted.
    localities: Vec<Option<LocalityTurns>>,
    /// Where round robin stands in each list; survives updates.
    turns: Vec<usize>,
    /// Where everything starts.
    start: u64,
}

/// How one list of endpoints is picked from. Built at the first pick from it.
#[derive(Debug)]
enum Schedule {
    /// All weights are equal: in turn, or drawn.
    Even,
    /// Round robin with different weights.
    Weighted(Edf<Turn>),
    /// Least request with different weights.
    LeastLoaded(Edf<Instant>),
}

/// How one list of localities is picked from. Built at the first pick from it.
#[derive(Debug)]
struct LocalityTurns {
    order: Edf<Turn>,
    /// How each locality's own list is picked from, and where round robin stands in it.
    hosts: Vec<(Schedule, usize)>,
}

const SOURCES: usize = 3;

impl Balancer {
    /// A balancer over a host set.
    pub fn new(policy: LbPolicy, set: Arc<HostSet>, rng: &mut Rng) -> Self {
        // As in Envoy the start is far enough out to be anywhere in any cycle.
        let start = u64::from(rng.u32(..));
        let mut balancer =
            Self { policy, set, schedules: Vec::new(), localities: Vec::new(), turns: Vec::new(), start };
        balancer.reset();
        balancer
    }

    /// Takes over a newer host set. Does nothing when it is the same one.
    pub fn update(&mut self, set: &Arc<HostSet>) {
        if self.set.version() != set.version() {
            self.set = Arc::clone(set);
            self.reset();
        }
    }

    fn reset(&mut self) {
        let lists = self.set.priorities().len() * SOURCES;
        self.schedules.clear();
        self.schedules.resize_with(lists, || None);
        self.localities.clear();
        self.localities.resize_with(lists, || None);
        if self.turns.len() < lists {
            self.turns.resize(lists, self.start as usize);
        }
    }

    /// The endpoint for the next connection.
    pub fn pick(&mut self, rng: &mut Rng) -> Pick {
        let loads = self.set.loads();
        let (priority, degraded) = match loads.only() {
            Some(priority) => (priority, false),
            None => loads.choose(rng.u8(..100)),
        };
        let panic = loads.panic[priority];
        let source = match (panic, degraded) {
            (true, _) => Source::All,
            (false, false) => Source::Healthy,
            (false, true) => Source::Degraded,
        };
        Pick { endpoint: self.pick_from(priority, source, rng), panic }
    }

    /// The endpoint for a hash, by the set's tables. `active` are the connections of the cluster, with the new one.
    pub fn pick_hashed(&self, hash: u64, active: u32, probe: &mut Probe) -> Pick {
        let loads = self.set.loads();
        let (priority, _) = match loads.only() {
            Some(priority) => (priority, false),
            None => loads.choose((hash % 100) as u8),
        };
        let table = self.set.table(priority);
        let endpoint = table.and_then(|table| table.pick_bounded(hash, active, probe)).cloned();
        Pick { endpoint, panic: loads.panic[priority] }
    }

    fn pick_from(&mut self, priority: usize, source: Source, rng: &mut Rng) -> Option<Arc<Endpoint>> {
        let at = priority * SOURCES + source as usize;
        let (policy, start) = (self.policy, self.start);
        let localities = self.set.localities(priority, source);
        if !localities.is_empty() {
            let turns = self.localities[at].get_or_insert_with(|| {
                LocalityTurns::new(policy, localities, self.turns[at] as u64, start, rng)
            });
            self.turns[at] = self.turns[at].wrapping_add(1);
            let locality = turns.order.pick(|_, turn| turn.following())? as usize;
            let (schedule, turn) = &mut turns.hosts[locality];
            return schedule.pick(policy, &localities[locality].hosts, turn, rng);
        }
        let hosts = self.set.source(priority, source);
        let schedule = self.schedules[at].get_or_insert_with(|| Schedule::new(policy, hosts, start, rng));
        schedule.pick(policy, hosts, &mut self.turns[at], rng)
    }
}

impl LocalityTurns {
    /// `picks` is how often was picked from the list before.
    fn new(policy: LbPolicy, localities: &[LocalityHosts], picks: u64, start: u64, rng: &mut Rng) -> Self {
        let weights: Vec<u32> = localities.iter().map(|locality| locality.weight).collect();
        let hosts = localities.iter().map(|locality| &locality.hosts);
        Self {
            order: edf::weighted(&weights, picks),
            hosts: hosts.map(|hosts| (Schedule::new(policy, hosts, start, rng), start as usize)).collect(),
        }
    }
}

impl Schedule {
    fn new(policy: LbPolicy, hosts: &[Arc<Endpoint>], start: u64, rng: &mut Rng) -> Self {
        if hosts.windows(2).all(|pair| pair[0].weight == pair[1].weight) {
            return Self::Even;
        }
        match policy {
            LbPolicy::RoundRobin => {
                let weights: Vec<u32> = hosts.iter().map(|endpoint| endpoint.weight).collect();
                Self::Weighted(edf::weighted(&weights, start))
            }
            LbPolicy::LeastRequest { active_request_bias, .. } => {
                // A random phase for each, so that workers don't move in step.
                let first = |endpoint| rng.f64() * later(Instant(0.0), endpoint, active_request_bias).0;
                Self::LeastLoaded(Edf::new(hosts.iter().map(first).map(Instant)))
            }
            // Those that hash do not come here.
            LbPolicy::Random | LbPolicy::RingHash(_) | LbPolicy::Maglev(_) | LbPolicy::ClusterProvided => {
                Self::Even
            }
        }
    }

    /// `turn` is where round robin stands.
    fn pick(
        &mut self,
        policy: LbPolicy,
        hosts: &[Arc<Endpoint>],
        turn: &mut usize,
        rng: &mut Rng,
    ) -> Option<Arc<Endpoint>> {
        let index = match (self, policy) {
            (_, _) if hosts.is_empty() => return None,
            (Self::Weighted(edf), _) => edf.pick(|_, turn| turn.following())? as usize,
            (Self::LeastLoaded(edf), LbPolicy::LeastRequest { active_request_bias, .. }) => {
                edf.pick(|index, now| later(*now, &hosts[index as usize], active_request_bias))? as usize
            }
            (_, LbPolicy::LeastRequest { choice_count, .. }) => least_of(hosts, choice_count, rng),
            (_, LbPolicy::Random | LbPolicy::RingHash(_) | LbPolicy::Maglev(_)) => rng.usize(..hosts.len()),
            (_, LbPolicy::RoundRobin | LbPolicy::ClusterProvided) => {
                let index = *turn % hosts.len();
                *turn = turn.wrapping_add(1);
                index
            }
        };
        Some(Arc::clone(&hosts[index]))
    }
}

/// The next deadline of a host whose weight falls with its load.
fn later(now: Instant, endpoint: &Arc<Endpoint>, bias: f64) -> Instant {
    let active = (endpoint.host.load() as f64) + 1.0;
    // Most configurations have one of these two.
    let slow_down = if bias == 0.0 {
        1.0
    } else if (bias - 1.0).abs() < f64::EPSILON {
        active
    } else {
        active.powf(bias)
    };
    Instant(now.0 + slow_down / f64::from(endpoint.weight))
}

/// The least loaded of `choices` random hosts, which need not differ; the first drawn on a tie.
fn least_of(hosts: &[Arc<Endpoint>], choices: u32, rng: &mut Rng) -> usize {
    let mut best = rng.usize(..hosts.len());
    let mut load = hosts[best].host.load();
    for _ in 1..choices {
        let index = rng.usize(..hosts.len());
        let other = hosts[index].host.load();
        if other < load {
            (best, load) = (index, other);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use proptest::prelude::*;

    use super::super::endpoint::tests::endpoint;
    use super::super::host::HostRegistry;
    use super::*;
    use crate::config::endpoint::{HealthStatus, Locality};

    const LEAST: LbPolicy = LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 1.0 };

    fn set(registry: &HostRegistry, version: u64, hosts: &[(u16, u32, HealthStatus)]) -> Arc<HostSet> {
        let endpoints = hosts
            .iter()
            .map(|(port, weight, health_status)| Endpoint {
                health_status: *health_status,
                ..endpoint(registry, *port, *weight, 0)
            })
            .collect();
        Arc::new(HostSet::new(version, endpoints, 140, 50.0))
    }

    fn healthy(registry: &HostRegistry, version: u64, weights: &[u32]) -> Arc<HostSet> {
        let hosts: Vec<_> =
            weights.iter().enumerate().map(|(i, w)| (i as u16 + 1, *w, HealthStatus::Unknown)).collect();
        set(registry, version, &hosts)
    }

    fn port(pick: &Pick) -> u16 {
        pick.endpoint.as_ref().unwrap().address().ip().unwrap().port()
    }

    fn shares(balancer: &mut Balancer, rng: &mut Rng, picks: usize, hosts: usize) -> Vec<usize> {
        let mut shares = vec![0; hosts];
        (0..picks).for_each(|_| shares[port(&balancer.pick(rng)) as usize - 1] += 1);
        shares
    }

    #[test]
    fn round_robin_goes_on_where_it_was_after_an_update() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(1);
        let mut balancer = Balancer::new(LbPolicy::RoundRobin, healthy(&registry, 1, &[1, 1, 1]), &mut rng);
        let first = port(&balancer.pick(&mut rng));
        balancer.update(&healthy(&registry, 2, &[1, 1, 1]));
        assert_eq!(port(&balancer.pick(&mut rng)), first % 3 + 1);
    }

    #[test]
    fn workers_start_at_different_hosts() {
        let registry = HostRegistry::default();
        for weights in [[1, 1, 1, 1], [1, 2, 3, 4]] {
            let set = healthy(&registry, 1, &weights);
            let first: std::collections::HashSet<u16> = (0..64)
                .map(|seed| {
                    let mut rng = Rng::with_seed(seed);
                    port(&Balancer::new(LbPolicy::RoundRobin, Arc::clone(&set), &mut rng).pick(&mut rng))
                })
                .collect();
            assert_eq!(first.len(), 4, "{weights:?}");
        }
    }

    #[test]
    fn weighted_round_robin_gives_exact_shares() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(7);
        let mut balancer = Balancer::new(LbPolicy::RoundRobin, healthy(&registry, 1, &[3, 1, 6]), &mut rng);
        for _ in 0..5 {
            assert_eq!(shares(&mut balancer, &mut rng, 10, 3), [3, 1, 6]);
        }
    }

    #[test]
    fn least_request_avoids_the_loaded_host() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        let set = healthy(&registry, 1, &[1, 1]);
        let _busy: Vec<_> = (0..5).map(|_| set.priorities()[0].hosts[0].host.connecting()).collect();
        let mut balancer = Balancer::new(LEAST, set, &mut rng);
        // Only when both draws hit the busy host: a quarter.
        let shares = shares(&mut balancer, &mut rng, 4000, 2);
        assert!((800..1200).contains(&shares[0]), "{shares:?}");
    }

    #[test]
    fn least_request_with_weights_follows_weight_over_load() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        let set = healthy(&registry, 1, &[2, 1]);
        let mut balancer = Balancer::new(LEAST, Arc::clone(&set), &mut rng);
        assert_eq!(shares(&mut balancer, &mut rng, 3000, 2), [2000, 1000]);
        // Weight 2 with 3 active is 2 / 4 against 1.
        let _busy: Vec<_> = (0..3).map(|_| set.priorities()[0].hosts[0].host.connecting()).collect();
        let mut balancer = Balancer::new(LEAST, Arc::clone(&set), &mut rng);
        assert_eq!(shares(&mut balancer, &mut rng, 3000, 2), [1000, 2000]);
        let unbiased = LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 0.0 };
        let mut balancer = Balancer::new(unbiased, set, &mut rng);
        assert_eq!(shares(&mut balancer, &mut rng, 3000, 2), [2000, 1000]);
    }

    #[test]
    fn random_ignores_weights() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        let mut balancer = Balancer::new(LbPolicy::Random, healthy(&registry, 1, &[1000, 1]), &mut rng);
        let shares = shares(&mut balancer, &mut rng, 4000, 2);
        assert!((1800..2200).contains(&shares[0]), "{shares:?}");
    }

    #[test]
    fn panic_uses_every_host_and_says_so() {
        use HealthStatus::{Healthy, Unhealthy};
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        let hosts = [(1, 1, Healthy), (2, 1, Unhealthy), (3, 1, Unhealthy)];
        let mut balancer = Balancer::new(LbPolicy::RoundRobin, set(&registry, 1, &hosts), &mut rng);
        assert!(balancer.pick(&mut rng).panic);
        assert_eq!(shares(&mut balancer, &mut rng, 30, 3), [10, 10, 10]);
        // Two of three are enough.
        let hosts = [(1, 1, Healthy), (2, 1, Healthy), (3, 1, Unhealthy)];
        balancer.update(&set(&registry, 2, &hosts));
        assert!(!balancer.pick(&mut rng).panic);
        assert_eq!(shares(&mut balancer, &mut rng, 30, 3), [15, 15, 0]);
    }

    /// Two hosts in each of these localities: weight, and how many of the two are healthy.
    fn in_localities(registry: &HostRegistry, localities: &[(u32, usize)]) -> Arc<HostSet> {
        let endpoints = localities.iter().enumerate().flat_map(|(at, (weight, healthy))| {
            let locality = Arc::new(Locality { zone: format!("zone {at}").into(), ..Locality::default() });
            (0..2).map(move |host| Endpoint {
                locality: Arc::clone(&locality),
                locality_weight: *weight,
                health_status: if host < *healthy { HealthStatus::Unknown } else { HealthStatus::Unhealthy },
                ..endpoint(registry, (2 * at + host) as u16 + 1, 1, 0)
            })
        });
        Arc::new(HostSet::new(1, endpoints.collect(), 140, 0.0).weighing_localities(140))
    }

    #[test]
    fn localities_get_shares_by_weight_and_health() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        for (localities, expected) in [
            (&[(3, 2), (1, 2)][..], [300, 300, 100, 100]),
            // Half of its hosts: 70 % of its weight.
            (&[(1, 2), (1, 1)], [235, 235, 330, 0]),
            (&[(1, 2), (1, 0)], [400, 400, 0, 0]),
            (&[(1, 2), (0, 2)], [400, 400, 0, 0]),
            // No weights at all: as if they were not weighted.
            (&[(0, 2), (0, 2)], [200, 200, 200, 200]),
        ] {
            let set = in_localities(&registry, localities);
            let mut balancer = Balancer::new(LbPolicy::RoundRobin, set, &mut rng);
            let shares = shares(&mut balancer, &mut rng, 800, 4);
            let is_near = |(share, expected): (&usize, &usize)| share.abs_diff(*expected) <= 1;
            assert!(shares.iter().zip(&expected).all(is_near), "{localities:?}: {shares:?}");
        }
    }

    #[test]
    fn localities_go_on_where_they_were_after_an_update() {
        let registry = HostRegistry::default();
        let mut rng = Rng::with_seed(3);
        let set = in_localities(&registry, &[(3, 2), (1, 2)]);
        let mut balancer = Balancer::new(LEAST, Arc::clone(&set), &mut rng);
        let mut shares = [0; 2];
        for version in 2..402 {
            shares[(usize::from(port(&balancer.pick(&mut rng))) - 1) / 2] += 1;
            let endpoints = set.endpoints().map(|endpoint| Endpoint::clone(endpoint)).collect();
            let set = HostSet::new(version, endpoints, 140, 0.0).weighing_localities(140);
            balancer.update(&Arc::new(set));
        }
        assert_eq!(shares, [300, 100]);
    }

    #[test]
    fn an_empty_cluster_gives_nothing() {
        let mut rng = Rng::with_seed(3);
        for policy in [LbPolicy::RoundRobin, LEAST, LbPolicy::Random] {
            let mut balancer = Balancer::new(policy, Arc::new(HostSet::new(1, vec![], 140, 50.0)), &mut rng);
            let pick = balancer.pick(&mut rng);
            assert!(pick.endpoint.is_none() && pick.panic);
        }
    }

    fn any_health() -> impl Strategy<Value = HealthStatus> {
        use HealthStatus::{Degraded, Draining, Healthy, Timeout, Unhealthy, Unknown};
        prop::sample::select(vec![Unknown, Healthy, Unhealthy, Draining, Timeout, Degraded])
    }

    proptest! {
        #[test]
        fn only_usable_hosts_are_picked_and_all_of_them(
            hosts in prop::collection::vec((1..5u32, any_health(), 0..3u32), 1..10),
            policy in prop::sample::select(vec![LbPolicy::RoundRobin, LEAST, LbPolicy::Random]),
            seed in any::<u64>(),
        ) {
            let registry = HostRegistry::default();
            let endpoints: Vec<Endpoint> = hosts.iter().enumerate().map(|(index, (weight, health, priority))| Endpoint {
                health_status: *health,
                ..endpoint(&registry, index as u16 + 1, *weight, *priority)
            }).collect();
            let set = Arc::new(HostSet::new(1, endpoints, 140, 50.0));
            let mut rng = Rng::with_seed(seed);
            let mut balancer = Balancer::new(policy, Arc::clone(&set), &mut rng);
            let mut seen = std::collections::HashSet::new();
            for _ in 0..4000 {
                let pick = balancer.pick(&mut rng);
                let Some(endpoint) = pick.endpoint else { continue };
                let usable = set.priorities()[endpoint.priority as usize]
                    .healthy.iter().chain(&set.priorities()[endpoint.priority as usize].degraded)
                    .any(|other| Arc::ptr_eq(other, &endpoint));
                prop_assert!(usable || pick.panic, "{:?} was picked without panic", endpoint);
                seen.insert(endpoint.address().clone());
            }
            for (priority, at) in set.priorities().iter().enumerate() {
                let lists = [
                    (set.loads().healthy[priority], if set.loads().panic[priority] { &at.hosts } else { &at.healthy }),
                    (set.loads().degraded[priority], &at.degraded),
                ];
                for (load, list) in lists {
                    for endpoint in list.iter().filter(|_| load >= 10) {
                        prop_assert!(seen.contains(endpoint.address()), "{:?} starves", endpoint);
                    }
                }
            }
        }
    }
}
