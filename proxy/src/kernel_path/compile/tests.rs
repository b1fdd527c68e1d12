use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};

use fastrand::Rng;
use proptest::prelude::*;
use tidegate_common::balance::{NoPick, Table, choose};

use super::*;
use crate::cluster::hashing::Probe;
use crate::cluster::host::{ActiveConnection, HostRegistry};
use crate::cluster::load_balancer::Balancer;
use crate::config::cluster::{ConsistentHashing, HashFunction, Maglev, RingHash};
use crate::config::endpoint::{HealthStatus, Locality};
use crate::intercept::tables::Counts;
use crate::intercept::tables::tests::Memory;

/// Picks of each executor in a comparison.
const PICKS: u32 = 10_000;

/// A compiled cluster, as the kernel has it.
struct Kernel {
    words: Vec<u64>,
    rng: RefCell<Rng>,
    turn: Cell<u32>,
    hash: Cell<u64>,
    /// By index.
    hosts: Vec<Arc<Host>>,
    /// What the programs count, at index + 1. None: nothing.
    counts: Option<Arc<Counts>>,
}

impl Kernel {
    fn new(policy: LbPolicy, set: &HostSet, seed: u64) -> Result<Self, ClusterObstacle> {
        let mut hosts: Vec<Arc<Host>> = Vec::new();
        let words = compile(policy, set, |host| {
            let known = hosts.iter().position(|other| Arc::ptr_eq(other, host));
            known.unwrap_or_else(|| {
                hosts.push(Arc::clone(host));
                hosts.len() - 1
            }) as u32
        })?;
        let mut rng = Rng::with_seed(seed);
        let turn = Cell::new(rng.u32(..));
        Ok(Self { words, rng: RefCell::new(rng), turn, hash: Cell::new(0), hosts, counts: None })
    }

    /// The proxy takes connections to these hosts, too; `active` says how many take the kernel path.
    fn share(&mut self, counts: &Arc<Counts>, active: impl Fn(&Host) -> u64) {
        for (host, entry) in self.hosts.iter().zip(1..) {
            counts.set_active(entry, active(host));
            host.connections().attach(counts, entry);
        }
        self.counts = Some(Arc::clone(counts));
    }

    /// Every endpoint that some route leads to, by port.
    fn reachable(&self) -> BTreeSet<u16> {
        let head = Head::decode(self.words[0]);
        let mut lists: Vec<u32> =
            (1..=usize::from(head.routes)).map(|at| Route::decode(self.words[at]).list).collect();
        let mut ports = BTreeSet::new();
        while let Some(at) = lists.pop() {
            let at = at as usize;
            let list = List::decode(self.words[at]);
            let entries = &self.words[at + 1..=at + list.len as usize];
            let offsets = entries.iter().map(|word| Entry::decode(*word).offset);
            if list.kind == ListKind::Localities as u8 {
                lists.extend(offsets);
            } else {
                ports.extend(offsets.map(|offset| self.words[offset as usize + 2] as u16));
            }
        }
        ports
    }
}

impl Table for Kernel {
    fn word(&self, offset: u32) -> Option<u64> {
        self.words.get(offset as usize).copied()
    }

    fn random(&self) -> u32 {
        self.rng.borrow_mut().u32(..)
    }

    fn turn(&self) -> u32 {
        self.turn.replace(self.turn.get().wrapping_add(1))
    }

    fn active(&self, host: u32) -> u64 {
        match &self.counts {
            Some(counts) => counts.active(host + 1) + counts.proxied(host + 1),
            None => self.hosts[host as usize].load(),
        }
    }

    fn hash(&self) -> u64 {
        self.hash.get()
    }
}

/// How often each outcome came: the port of the endpoint, or none; in panic or not.
type Outcomes = BTreeMap<(Option<u16>, bool), u32>;

fn kernel_picks(kernel: &Kernel, picks: u32) -> Outcomes {
    let mut outcomes = Outcomes::new();
    for _ in 0..picks {
        let outcome = match choose(kernel) {
            Ok(pick) => {
                let address = kernel.hosts[pick.endpoint.host as usize].address().ip().unwrap();
                assert_eq!(
                    (pick.endpoint.addr, pick.endpoint.port),
                    (Addr::from(address.ip()), address.port())
                );
                (Some(pick.endpoint.port), pick.panic)
            }
            Err(NoPick::NoHost { panic }) => (None, panic),
            Err(NoPick::Broken) => panic!("a broken block: {:?}", kernel.words),
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    outcomes
}

fn proxy_picks(policy: LbPolicy, set: &Arc<HostSet>, seed: u64, picks: u32) -> Outcomes {
    let mut rng = Rng::with_seed(seed);
    let mut balancer = Balancer::new(policy, Arc::clone(set), &mut rng);
    let mut outcomes = Outcomes::new();
    for _ in 0..picks {
        let pick = balancer.pick(&mut rng);
        let port = pick.endpoint.map(|endpoint| endpoint.address().ip().unwrap().port());
        *outcomes.entry((port, pick.panic)).or_default() += 1;
    }
    outcomes
}

/// What is known of one endpoint.
#[derive(Clone, Copy, Debug)]
struct Member {
    weight: u32,
    health: HealthStatus,
    priority: u32,
    locality: usize,
    /// Connections to it through the proxy.
    active: usize,
    /// And those of the kernel path.
    balanced: u64,
}

/// The state of a cluster.
#[derive(Clone, Debug)]
struct State {
    members: Vec<Member>,
    /// Weights of localities, where they count.
    localities: Option<[u32; 3]>,
    overprovisioning: u32,
    panic_threshold: f64,
}

impl State {
    /// Endpoints have ports from 1 in their order. The guards hold their connections.
    fn build(&self, registry: &HostRegistry) -> (Arc<HostSet>, Vec<ActiveConnection>) {
        let mut localities: HashMap<usize, Arc<Locality>> = HashMap::new();
        let endpoint = |(at, member): (usize, &Member)| {
            let locality = localities.entry(member.locality).or_insert_with(|| {
                Arc::new(Locality { zone: member.locality.to_string().into(), ..Locality::default() })
            });
            Endpoint {
                host: registry.host(EndpointAddr::Ip(([10, 0, 0, 1], at as u16 + 1).into())),
                hostname: Arc::default(),
                weight: member.weight,
                locality: Arc::clone(locality),
                locality_weight: self.localities.map_or(0, |weights| weights[member.locality]),
                priority: member.priority,
                health_status: member.health,
                health_check: None,
                hash_key: None,
            }
        };
        let endpoints: Vec<_> = self.members.iter().enumerate().map(endpoint).collect();
        let active = endpoints.iter().zip(&self.members);
        let active = active
            .flat_map(|(endpoint, member)| (0..member.active).map(|_| endpoint.host.connecting()))
            .collect();
        let set = HostSet::new(1, endpoints, self.overprovisioning, self.panic_threshold);
        let weighed = self.localities.is_some();
        let set = if weighed { set.weighing_localities(self.overprovisioning) } else { set };
        (Arc::new(set), active)
    }
}

fn any_member(same_weights: bool) -> impl Strategy<Value = Member> {
    use HealthStatus::{Degraded, Draining, Healthy, Timeout, Unhealthy, Unknown};
    let health =
        prop::sample::select(vec![Unknown, Unknown, Healthy, Degraded, Unhealthy, Draining, Timeout]);
    let weight = if same_weights { 3..4_u32 } else { 1..6 };
    (weight, health, 0..3_u32, 0..3_usize, 0..4_usize, 0..4_u64).prop_map(
        |(weight, health, priority, locality, active, balanced)| Member {
            weight,
            health,
            priority,
            locality,
            active,
            balanced,
        },
    )
}

fn any_state(same_weights: bool) -> impl Strategy<Value = State> {
    (
        prop::collection::vec(any_member(same_weights), 0..12),
        prop::option::of(prop::array::uniform3(0..4_u32)),
        100..200_u32,
        prop::sample::select(vec![0.0, 10.0, 50.0, 100.0]),
    )
        .prop_map(|(members, localities, overprovisioning, panic_threshold)| State {
            members,
            localities,
            overprovisioning,
            panic_threshold,
        })
}

/// A policy with a state that it may have on the kernel path.
fn any_policy_and_state() -> impl Strategy<Value = (LbPolicy, State)> {
    let least = (2..=8_u32)
        .prop_map(|choice_count| LbPolicy::LeastRequest { choice_count, active_request_bias: 1.0 });
    prop_oneof![
        (Just(LbPolicy::RoundRobin), any_state(false)),
        (Just(LbPolicy::RoundRobin), any_state(true)),
        (Just(LbPolicy::Random), any_state(false)),
        (least, any_state(true)),
    ]
}

fn any_hashing_policy() -> impl Strategy<Value = LbPolicy> {
    let hashing = ConsistentHashing::default();
    let ring = move |(minimum_ring_size, more)| {
        let (maximum_ring_size, hash_function) = (minimum_ring_size + more, HashFunction::XxHash);
        LbPolicy::RingHash(RingHash { minimum_ring_size, maximum_ring_size, hash_function, hashing })
    };
    let table = prop::sample::select(vec![2_u64, 3, 251, 65_537]);
    prop_oneof![
        (1..2_000_u64, 0..2_000_u64).prop_map(ring),
        table.prop_map(move |table_size| LbPolicy::Maglev(Maglev { table_size, hashing })),
    ]
}

/// Whether two counts of `PICKS` may come of the same chance: six standard deviations of their difference apart at most,
/// and as much more as the kernel's turns may be uneven.
fn alike(a: u32, b: u32) -> bool {
    let share = f64::from(a + b) / f64::from(2 * PICKS);
    let deviation = (2.0 * f64::from(PICKS) * share * (1.0 - share)).sqrt();
    f64::from(a.abs_diff(b)) <= 6.0 * deviation + 12.0
}

proptest! {
    #[test]
    fn both_executors_choose_alike((policy, state) in any_policy_and_state(), seed in any::<u64>()) {
        let registry = HostRegistry::default();
        let (set, _active) = state.build(&registry);
        let mut kernel = Kernel::new(policy, &set, seed).unwrap();
        let tables = Memory::new().tables();
        tables.own();
        kernel.share(tables.hosts(), |host| {
            let port = host.address().ip().unwrap().port();
            state.members[usize::from(port) - 1].balanced
        });
        let by_kernel = kernel_picks(&kernel, PICKS);
        let by_proxy = proxy_picks(policy, &set, seed, PICKS);
        let outcomes: BTreeSet<_> = by_kernel.keys().chain(by_proxy.keys()).copied().collect();
        for outcome in outcomes {
            let count = |outcomes: &Outcomes| outcomes.get(&outcome).copied().unwrap_or(0);
            let (kernel, proxy) = (count(&by_kernel), count(&by_proxy));
            prop_assert!(alike(kernel, proxy), "{outcome:?}: {kernel} and {proxy} of {PICKS}\n{by_kernel:?}\n{by_proxy:?}");
        }
        // Neither draws what the other can't.
        let reachable = kernel.reachable();
        for (port, _) in by_proxy.keys() {
            prop_assert!(port.is_none_or(|port| reachable.contains(&port)), "{port:?} is not in {reachable:?}");
        }
        // What is drawn seldom may not come up: a priority with little load, a locality with little weight, a host with
        // more connections than others.
        let loads = set.loads();
        let all_often = !loads.healthy.iter().chain(&loads.degraded).any(|load| (1..10).contains(load))
            && state.localities.is_none()
            && !matches!(policy, LbPolicy::LeastRequest { .. });
        for port in reachable.iter().filter(|_| all_often) {
            let drawn = by_proxy.keys().any(|(other, _)| *other == Some(*port));
            prop_assert!(drawn, "{port} is never drawn: {by_proxy:?}");
        }
    }

    /// Where nothing is drawn at random, a whole cycle has exactly the shares of the proxy.
    #[test]
    fn equal_hosts_take_turns(hosts in 1..40_usize, cycles in 1..5_u32, seed in any::<u64>()) {
        let member = Member { weight: 2, health: HealthStatus::Healthy, priority: 0, locality: 0, active: 0, balanced: 0 };
        let state = State { members: vec![member; hosts], localities: None, overprovisioning: 140, panic_threshold: 50.0 };
        let registry = HostRegistry::default();
        let (set, _active) = state.build(&registry);
        let mut kernel = Kernel::new(LbPolicy::RoundRobin, &set, seed).unwrap();
        // A counter that wraps takes one turn out of order, once in four thousand million.
        *kernel.turn.get_mut() >>= 1;
        let picks = hosts as u32 * cycles;
        prop_assert_eq!(
            kernel_picks(&kernel, picks),
            proxy_picks(LbPolicy::RoundRobin, &set, seed, picks)
        );
    }

    /// Where a hash decides, both choose the same endpoint for the same hash, each time.
    #[test]
    fn the_same_hash_the_same_endpoint(
        state in any_state(false),
        policy in any_hashing_policy(),
        hashes in prop::collection::vec(any::<u64>(), 300),
    ) {
        let registry = HostRegistry::default();
        let (set, _active) = state.build(&registry);
        let set = HostSet::new(2, set.endpoints().map(|it| Endpoint::clone(it)).collect(), state.overprovisioning, state.panic_threshold);
        let set = Arc::new(set.hashing(&policy, state.localities.is_some(), None));
        let kernel = Kernel::new(policy, &set, 1).unwrap();
        let balancer = Balancer::new(policy, Arc::clone(&set), &mut Rng::with_seed(1));
        for hash in hashes.into_iter().chain([0, u64::MAX]) {
            kernel.hash.set(hash);
            let by_kernel = match choose(&kernel) {
                Ok(pick) => (Some(pick.endpoint.port), pick.panic),
                Err(NoPick::NoHost { panic }) => (None, panic),
                Err(NoPick::Broken) => panic!("a broken block: {:?}", kernel.words),
            };
            let pick = balancer.pick_hashed(hash, 1, &mut Probe::default());
            let port = pick.endpoint.map(|endpoint| endpoint.address().ip().unwrap().port());
            prop_assert_eq!(by_kernel, (port, pick.panic), "{:#x}", hash);
        }
    }

    /// Weighted turns are never more than a few away from those of the proxy.
    #[test]
    fn weighted_turns_keep_close(
        weights in prop::collection::vec(1..200_u32, 2..10),
        picks in 1..5_000_u32,
        seed in any::<u64>(),
    ) {
        let member = Member { weight: 1, health: HealthStatus::Healthy, priority: 0, locality: 0, active: 0, balanced: 0 };
        let members = weights.iter().map(|weight| Member { weight: *weight, ..member }).collect();
        let state = State { members, localities: None, overprovisioning: 140, panic_threshold: 50.0 };
        let registry = HostRegistry::default();
        let (set, _active) = state.build(&registry);
        let kernel = kernel_picks(&Kernel::new(LbPolicy::RoundRobin, &set, seed).unwrap(), picks);
        let proxy = proxy_picks(LbPolicy::RoundRobin, &set, seed, picks);
        for port in 1..=weights.len() as u16 {
            let count = |outcomes: &Outcomes| outcomes.get(&(Some(port), false)).copied().unwrap_or(0);
            prop_assert!(count(&kernel).abs_diff(count(&proxy)) <= 6, "{port}: {kernel:?} {proxy:?}");
        }
    }
}

fn one(weight: u32, health: HealthStatus, priority: u32) -> Member {
    Member { weight, health, priority, locality: 0, active: 0, balanced: 0 }
}

fn state(members: Vec<Member>) -> State {
    State { members, localities: None, overprovisioning: 140, panic_threshold: 50.0 }
}

const LEAST: LbPolicy = LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 1.0 };

#[test]
fn nothing_to_choose_from() {
    let registry = HostRegistry::default();
    for (panic_threshold, panic) in [(50.0, true), (0.0, false)] {
        let empty = State { panic_threshold, ..state(vec![]) };
        let kernel = Kernel::new(LbPolicy::RoundRobin, &empty.build(&registry).0, 1).unwrap();
        assert_eq!(choose(&kernel), Err(NoPick::NoHost { panic }));
        assert_eq!(kernel.words.len(), 3, "head, route, list");
    }
}

#[test]
fn a_panicking_priority_has_one_list() {
    let registry = HostRegistry::default();
    let (healthy, degraded, down) = (HealthStatus::Healthy, HealthStatus::Degraded, HealthStatus::Unhealthy);
    let mut members = vec![one(1, down, 0); 18];
    members.extend([one(1, healthy, 0), one(1, degraded, 0)]);
    let (set, _active) = state(members).build(&registry);
    assert_eq!(set.loads().panic, [true]);
    let kernel = Kernel::new(LbPolicy::RoundRobin, &set, 1).unwrap();
    let routes = usize::from(Head::decode(kernel.words[0]).routes);
    assert_eq!(kernel.words.len(), 1 + routes + 1 + 20 + 20 * ENDPOINT_WORDS as usize);
    assert_eq!(kernel.reachable().len(), 20);
}

#[test]
fn weights_that_overflow_keep_their_shares() {
    let (total, bounds) = bounds([u32::MAX, u32::MAX, u32::MAX / 2, 1].into_iter());
    assert_eq!(bounds.last(), Some(&total));
    let widths: Vec<u32> =
        bounds.iter().scan(0, |from, to| Some(to - std::mem::replace(from, *to))).collect();
    assert_eq!(widths[3], 1);
    for (width, share) in widths.iter().zip([0.4, 0.4, 0.2]) {
        assert!((f64::from(*width) / f64::from(total) - share).abs() < 1e-6, "{widths:?}");
    }
    assert_eq!(super::bounds([2, 3].into_iter()), (5, vec![2, 5]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let registry = HostRegistry::default();
    let healthy = HealthStatus::Healthy;
    let refused = |policy, members| {
        let (set, _active) = state(members).build(&registry);
        compile(policy, &set, |_| 0).unwrap_err()
    };
    let weights = vec![one(1, healthy, 0), one(2, healthy, 0)];
    assert_eq!(refused(LEAST, weights), ClusterObstacle::LeastRequestWeights);
    let nine = LbPolicy::LeastRequest { choice_count: 9, active_request_bias: 1.0 };
    assert_eq!(refused(nine, vec![]), ClusterObstacle::ChoiceCount(9));
    // 17 priorities, each of them with a little load: half of its hosts are healthy, and the others are in panic.
    let priorities: Vec<Member> = (0..17)
        .flat_map(|priority| {
            let mut members = vec![one(1, HealthStatus::Unhealthy, priority); 30];
            members.push(one(1, healthy, priority));
            members
        })
        .collect();
    assert_eq!(refused(LbPolicy::RoundRobin, priorities), ClusterObstacle::Priorities(17));
}

/// More endpoints than 8 bits tell apart.
#[test]
fn many_endpoints_have_wide_indexes() {
    let registry = HostRegistry::default();
    let (set, _active) = state(vec![one(1, HealthStatus::Healthy, 0); 300]).build(&registry);
    let endpoints: Vec<_> = set.endpoints().map(|it| Endpoint::clone(it)).collect();
    let policy = LbPolicy::Maglev(Maglev { table_size: 1009, hashing: ConsistentHashing::default() });
    let set = Arc::new(HostSet::new(1, endpoints, 140, 50.0).hashing(&policy, false, None));
    let kernel = Kernel::new(policy, &set, 1).unwrap();
    assert_eq!(kernel.words.len(), 1 + 1 + 300 * ENDPOINT_WORDS as usize + 2 + 1009_usize.div_ceil(4));
    for hash in 0..1009 {
        kernel.hash.set(hash);
        let port = set.table(0).unwrap().pick(hash).unwrap().address().ip().unwrap().port();
        assert_eq!(choose(&kernel).unwrap().endpoint.port, port);
    }
}

#[test]
fn rings_that_are_too_large_are_refused() {
    let registry = HostRegistry::default();
    let ring = |size| {
        LbPolicy::RingHash(RingHash {
            minimum_ring_size: size,
            maximum_ring_size: size,
            hash_function: HashFunction::XxHash,
            hashing: ConsistentHashing::default(),
        })
    };
    let compiled = |size| {
        let (set, _active) = state(vec![one(1, HealthStatus::Healthy, 0)]).build(&registry);
        let endpoints = set.endpoints().map(|it| Endpoint::clone(it)).collect();
        compile(ring(size), &HostSet::new(1, endpoints, 140, 50.0).hashing(&ring(size), false, None), |_| 0)
    };
    assert!(compiled(65_536).is_ok());
    assert_eq!(compiled(65_537), Err(ClusterObstacle::RingSize(65_537)));
}

#[test]
fn ipv6_and_mapped_addresses() {
    let registry = HostRegistry::default();
    let endpoint = |address: &str| Endpoint {
        host: registry.host(EndpointAddr::Ip(address.parse().unwrap())),
        hostname: Arc::default(),
        weight: 1,
        locality: Arc::default(),
        locality_weight: 0,
        priority: 0,
        health_status: HealthStatus::Healthy,
        health_check: None,
        hash_key: None,
    };
    let addresses = ["[2001:db8::1]:1", "[::ffff:10.0.0.1]:2", "10.0.0.1:3"];
    let set = Arc::new(HostSet::new(1, addresses.map(endpoint).into(), 140, 50.0));
    let kernel = Kernel::new(LbPolicy::Random, &set, 1).unwrap();
    assert_eq!(kernel_picks(&kernel, 1_000).len(), 3);
}
