use std::collections::HashSet;

use proptest::prelude::*;

use super::super::endpoint::tests::endpoint;
use super::super::host::HostRegistry;
use super::*;
use crate::config::cluster::{HashFunction, Maglev as MaglevConfig, RingHash};
use crate::config::endpoint::HealthStatus;

const PLAIN: ConsistentHashing = ConsistentHashing {
    use_hostname_for_hashing: false,
    hash_balance_factor: None,
    hash_policy: ClusterHashPolicy::Unset,
};

fn ring(minimum: u64, maximum: u64) -> LbPolicy {
    LbPolicy::RingHash(RingHash {
        minimum_ring_size: minimum,
        maximum_ring_size: maximum,
        hash_function: HashFunction::XxHash,
        hashing: PLAIN,
    })
}

fn maglev(table_size: u64, hashing: ConsistentHashing) -> LbPolicy {
    LbPolicy::Maglev(MaglevConfig { table_size, hashing })
}

fn weighted(registry: &HostRegistry, weights: &[u32]) -> HostSet {
    let endpoints =
        weights.iter().enumerate().map(|(index, weight)| endpoint(registry, index as u16 + 1, *weight, 0));
    HostSet::new(1, endpoints.collect(), 140, 50.0)
}

fn shares(table: &Table, hosts: usize) -> Vec<usize> {
    let mut shares = vec![0; hosts];
    for hash in 0..20_000_u64 {
        let hash = xxh64(&hash.to_le_bytes(), 0);
        let port = table.pick(hash).unwrap().address().ip().unwrap().port();
        shares[usize::from(port) - 1] += 1;
    }
    shares
}

#[test]
fn addresses_hash_by_their_text() {
    for (address, text) in [
        ("127.0.0.1:80", "127.0.0.1"),
        ("10.1.2.3:0", "10.1.2.3"),
        ("[fd00::12]:7", "fd00::12"),
        ("[::ffff:10.1.2.3]:7", "::ffff:10.1.2.3"),
        ("[::]:7", "::"),
        ("[::1]:7", "::1"),
        ("[::1:2]:7", "::0.1.0.2"),
        ("[fe80::1%3]:7", "fe80::1%3"),
        ("[1111:2222:3333:4444:5555:6666:7777:8888]:7", "1111:2222:3333:4444:5555:6666:7777:8888"),
    ] {
        assert_eq!(of_source(address.parse().unwrap()), xxh64(text.as_bytes(), 0), "{address}");
    }
}

#[test]
fn the_clusters_own_hash_policy_wins() {
    let source: SocketAddr = "10.0.0.1:5".parse().unwrap();
    let hash = of_source(source);
    let with = |hash_policy| maglev(3, ConsistentHashing { hash_policy, ..PLAIN });
    let filter_state = HashPolicy::FilterState("x".into());
    use ClusterHashPolicy::{Nothing, SourceIp, Unset};
    for (policy, tcp_proxy, expected) in [
        (LbPolicy::Random, Some(&HashPolicy::SourceIp), None),
        (with(Unset), Some(&HashPolicy::SourceIp), Some(hash)),
        (with(Unset), Some(&filter_state), None),
        (with(Unset), None, None),
        (with(SourceIp(1)), None, Some(hash)),
        (with(SourceIp(2)), None, Some(hash.rotate_left(1) ^ hash)),
        (with(Nothing), Some(&HashPolicy::SourceIp), None),
    ] {
        assert_eq!(of_connection(&policy, tcp_proxy, source), expected, "{policy:?}, {tcp_proxy:?}");
    }
}

#[test]
fn murmur_is_the_one_of_libstdcxx() {
    // What std::hash<std::string> of GCC 12 gives on x86-64.
    for (text, hash) in [
        (&b""[..], 0x553e_9390_1e46_2a6e),
        (b"a", 0x454d_dee4_88c1_ed6b),
        (b"1234567", 0x6d7a_4e79_e8a2_cbf6),
        (b"12345678", 0x8c5b_90a3_3a04_dca5),
        (b"127.0.0.1:80_0", 0xf46e_f02b_be93_9e15),
        (b"[fd00::1]:8080_1023", 0x779c_cc5b_fa01_c76c),
        (b"\xff\xfe\xfd", 0xa1fc_41df_7d29_b44d),
    ] {
        assert_eq!(murmur::hash(text, murmur::SEED), hash, "{text:?}");
    }
}

#[test]
fn hosts_are_known_by_their_key_or_name_or_address() {
    let registry = HostRegistry::default();
    let named = ConsistentHashing { use_hostname_for_hashing: true, ..PLAIN };
    let mut host = Endpoint { hostname: "a.example".into(), ..endpoint(&registry, 80, 1, 0) };
    assert_eq!((&*key(&host, &PLAIN), &*key(&host, &named)), ("127.0.0.1:80", "a.example"));
    host.hash_key = Some("pod-1".into());
    assert_eq!((&*key(&host, &PLAIN), &*key(&host, &named)), ("pod-1", "pod-1"));
    for address in ["[fd00::1]:80", "[::ffff:10.0.0.1]:80"] {
        let host = Endpoint {
            host: registry.host(EndpointAddr::Ip(address.parse().unwrap())),
            ..endpoint(&registry, 80, 1, 0)
        };
        assert_eq!(&*key(&host, &PLAIN), address);
    }
}

#[test]
fn shares_follow_weights() {
    let registry = HostRegistry::default();
    let weights = [1, 2, 5];
    for policy in [ring(10_000, 8 << 20), maglev(65_537, PLAIN)] {
        let set = weighted(&registry, &weights).hashing(&policy, false, None);
        let shares = shares(set.table(0).unwrap(), 3);
        for (share, weight) in shares.iter().zip(weights) {
            let expected = 20_000 * weight as usize / 8;
            assert!(share.abs_diff(expected) < expected / 8, "{policy:?}: {shares:?}");
        }
    }
}

#[test]
fn counts_are_those_of_the_places() {
    let registry = HostRegistry::default();
    let counts = |policy: LbPolicy, weights: &[u32]| {
        weighted(&registry, weights).hashing(&policy, false, None).hash_counts()
    };
    let all = |size, min_per_host, max_per_host| Some(Counts { size, min_per_host, max_per_host });
    // 1,024 for three equal hosts: 342 for each.
    assert_eq!(counts(ring(1024, 8 << 20), &[1, 1, 1]), all(1026, 342, 342));
    assert_eq!(counts(ring(1024, 8 << 20), &[1, 3]), all(1024, 256, 768));
    assert_eq!(counts(ring(1, 6), &[1, 1, 1, 1]), all(4, 1, 1));
    // 1.5 for each: 2, 1, 2, 1.
    assert_eq!(counts(ring(6, 6), &[1, 1, 1, 1]), all(6, 1, 2));
    assert_eq!(counts(ring(1024, 8 << 20), &[]), None);
    assert_eq!(counts(maglev(7, PLAIN), &[1, 1]), all(7, 3, 4));
    // The first host has a turn in every round, the second in the first and every fourth after it.
    assert_eq!(
        counts(maglev(11, PLAIN), &[4, 1]).map(|counts| counts.min_per_host + counts.max_per_host),
        Some(11)
    );
    assert_eq!(counts(maglev(2, PLAIN), &[1, 1, 1]), all(2, 0, 1));
    assert_eq!(counts(maglev(7, PLAIN), &[]), None);
}

/// The point of the whole.
#[test]
fn a_host_that_leaves_moves_its_own_connections_only() {
    let registry = HostRegistry::default();
    let with = |ports: &[u16]| {
        let endpoints = ports.iter().map(|port| endpoint(&registry, *port, 1, 0)).collect();
        HostSet::new(1, endpoints, 140, 50.0)
    };
    // A ring of 1,024 points for five has 205 of each, for four 256: of those that are new, some take over.
    for (policy, allowed) in [(ring(1, 8 << 20), 0), (ring(1024, 8 << 20), 700), (maglev(65_537, PLAIN), 300)]
    {
        let all = with(&[1, 2, 3, 4, 5]).hashing(&policy, false, None);
        let rest = with(&[5, 4, 2, 1]).hashing(&policy, false, None);
        let mut moved = 0; // of 5,000
        for hash in (0..5000_u64).map(|number| xxh64(&number.to_le_bytes(), 0)) {
            let address = |set: &HostSet| set.table(0).unwrap().pick(hash).unwrap().address().clone();
            let before = address(&all);
            moved += usize::from(before.ip().unwrap().port() != 3 && before != address(&rest));
        }
        assert!(moved <= allowed, "{policy:?}: {moved}");
    }
}

#[test]
fn only_healthy_hosts_are_in_a_table_and_all_in_panic() {
    use HealthStatus::{Degraded, Healthy, Unhealthy};
    let registry = HostRegistry::default();
    for (statuses, ports) in [
        (&[Healthy, Healthy, Unhealthy][..], &[1, 2][..]),
        (&[Healthy, Healthy, Degraded], &[1, 2]),
        // Envoy's: there is load for degraded hosts, and they are not in the table.
        (&[Degraded, Degraded], &[]),
        (&[Healthy, Unhealthy, Unhealthy], &[1, 2, 3]),
    ] {
        for policy in [ring(1024, 8 << 20), maglev(251, PLAIN)] {
            let endpoints = statuses.iter().enumerate().map(|(index, status)| Endpoint {
                health_status: *status,
                ..endpoint(&registry, index as u16 + 1, 1, 0)
            });
            let set = HostSet::new(1, endpoints.collect(), 140, 50.0).hashing(&policy, false, None);
            let picked: HashSet<u16> = (0..4000_u64)
                .filter_map(|number| set.table(0).unwrap().pick(xxh64(&number.to_le_bytes(), 0)))
                .map(|endpoint| endpoint.address().ip().unwrap().port())
                .collect();
            assert_eq!(picked, ports.iter().copied().collect(), "{policy:?}, {statuses:?}");
        }
    }
}

#[test]
fn localities_get_their_weight_whatever_their_health() {
    let registry = HostRegistry::default();
    let host = |port: u16, zone: &str, locality_weight, health_status| Endpoint {
        locality: Arc::new(Locality { zone: zone.into(), ..Locality::default() }),
        locality_weight,
        health_status,
        ..endpoint(&registry, port, 1, 0)
    };
    use HealthStatus::{Healthy, Unhealthy};
    let endpoints = vec![
        host(1, "a", 3, Healthy),
        host(2, "a", 3, Unhealthy),
        host(3, "b", 1, Healthy),
        host(4, "c", 0, Healthy),
    ];
    let policy = maglev(65_537, PLAIN);
    let set = HostSet::new(1, endpoints, 140, 0.0).hashing(&policy, true, None);
    let shares = shares(set.table(0).unwrap(), 4);
    assert!(shares[0].abs_diff(15_000) < 500 && shares[2].abs_diff(5000) < 500, "{shares:?}");
    assert_eq!((shares[1], shares[3]), (0, 0));
    // As in Envoy nothing is left where no locality has any weight.
    let none = HostSet::new(1, vec![host(1, "a", 0, Healthy)], 140, 0.0).hashing(&policy, true, None);
    assert!(none.table(0).unwrap().pick(1).is_none());
}

#[test]
fn places_are_taken_over_while_the_hosts_stay() {
    let registry = HostRegistry::default();
    let policy = maglev(251, PLAIN);
    let first = weighted(&registry, &[1, 2]).hashing(&policy, false, None);
    let shared = |weights: &[u32]| {
        let next = weighted(&registry, weights).hashing(&policy, false, Some(&first));
        match (&first.table(0).unwrap().places, &next.table(0).unwrap().places) {
            (Places::Maglev(a), Places::Maglev(b)) => Arc::ptr_eq(a, b),
            _ => unreachable!(),
        }
    };
    assert!(shared(&[1, 2]) && shared(&[2, 4]));
    assert!(!shared(&[1, 3]) && !shared(&[1, 2, 1]) && !shared(&[1]));
}

#[test]
fn a_host_with_more_than_its_share_is_passed_over() {
    let registry = HostRegistry::default();
    let policy = maglev(251, ConsistentHashing { hash_balance_factor: Some(100), ..PLAIN });
    let set = weighted(&registry, &[1, 1, 1]).hashing(&policy, false, None);
    let table = set.table(0).unwrap();
    let mut probe = Probe::default();
    // All from one source. A host that has just its share gets one more.
    let connections: Vec<_> = (1..=30)
        .map(|active| table.pick_bounded(42, active, &mut probe).unwrap().host.connecting())
        .collect();
    let active: Vec<u64> = set.endpoints().map(|endpoint| endpoint.host.cx_active()).collect();
    assert!(active.iter().all(|active| *active <= 11), "{active:?}");
    drop(connections);
    let home = table.pick(42).unwrap().address();
    assert_eq!(table.pick_bounded(42, 1, &mut probe).unwrap().address(), home, "there is room again");
}

proptest! {
    #[test]
    fn tables_have_every_host_and_nobody_else(
        weights in prop::collection::vec(1..50_u32, 1..40),
        policy in prop::sample::select(vec![ring(1, 2048), ring(1024, 1024), maglev(251, PLAIN), maglev(65_537, PLAIN)]),
        hash in any::<u64>(),
    ) {
        let registry = HostRegistry::default();
        let set = weighted(&registry, &weights).hashing(&policy, false, None);
        let table = set.table(0).unwrap();
        prop_assert!(table.pick(hash).is_some() && table.pick(0).is_some() && table.pick(u64::MAX).is_some());
        let counts = set.hash_counts().unwrap();
        prop_assert!(counts.max_per_host <= counts.size);
        prop_assert!(counts.min_per_host >= 1 || matches!(policy, LbPolicy::Maglev(m) if m.table_size == 251)
            || matches!(policy, LbPolicy::RingHash(_)));
    }
}
