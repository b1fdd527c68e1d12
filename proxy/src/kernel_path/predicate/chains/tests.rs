use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use serde_json::{Value, json};
use tidegate_common::Addr;
use tidegate_common::balance::Table;
use tidegate_common::selector::select;

use super::super::tests::{
    CHAIN, CLUSTER, LISTENER, address, blocked, clear, cluster, data_path, merge, plan_of, snapshot,
    tcp_proxy, with,
};
use super::*;
use crate::access_log::{FlushSettings, Registry};
use crate::config;
use crate::config::filter_chain::{FilterChain, FilterChainMatch, SourceType};
use crate::config::listener::Cidr;
use crate::kernel_path::Plan;
use crate::kernel_path::compile::compile_selector;
use crate::listener::filter_chain::MatchInput;
use crate::stats::Stats;

fn prefix(text: &str) -> Value {
    let (address, len) = text.split_once('/').unwrap();
    json!({"address_prefix": address, "prefix_len": len.parse::<u8>().unwrap()})
}

/// A chain for these sources.
fn chain(name: &str, cluster: &str, sources: &[&str]) -> Value {
    let prefixes: Vec<Value> = sources.iter().map(|text| prefix(text)).collect();
    let matches = json!({"source_prefix_ranges": prefixes});
    json!({"name": name, "filters": [tcp_proxy(cluster)], "filter_chain_match": matches})
}

fn listener(chains: &[Value], fields: Value) -> Value {
    let mut bootstrap = with(LISTENER, json!({"filter_chains": chains}));
    merge(bootstrap.pointer_mut(LISTENER).unwrap(), fields);
    bootstrap
}

/// First addresses, and names of chains.
fn sources(plan: &Plan) -> Vec<(String, Option<&str>)> {
    let name = |chain: usize| &*plan.chains[chain].chain.config.name;
    plan.sources.iter().map(|it| (it.first.to_canonical().to_string(), it.chain.map(name))).collect()
}

fn told<'a>(ranges: &[(&str, Option<&'a str>)]) -> Vec<(String, Option<&'a str>)> {
    ranges.iter().map(|(first, name)| ((*first).to_owned(), *name)).collect()
}

#[test]
fn chains_by_source() {
    let plan = plan_of(&listener(
        &[chain("wide", "c", &["10.0.0.0/8", "192.168.0.0/16"]), chain("narrow", "d", &["10.1.0.0/16"])],
        json!({}),
    ))
    .unwrap();
    let expected = told(&[
        ("::", None),
        ("10.0.0.0", Some("wide")),
        ("10.1.0.0", Some("narrow")),
        ("10.2.0.0", Some("wide")),
        ("11.0.0.0", None),
        ("192.168.0.0", Some("wide")),
        ("192.169.0.0", None),
    ]);
    assert_eq!(sources(&plan), expected);
    let clusters: Vec<_> = plan.chains.iter().map(|plan| &**plan.clusters[0].0.name()).collect();
    assert_eq!(clusters, ["c", "d"]);

    for (field, value, expected) in [
        (
            "direct_source_prefix_ranges",
            json!([prefix("10.0.0.0/8")]),
            told(&[("::", None), ("10.0.0.0", Some("f")), ("11.0.0.0", None)]),
        ),
        (
            "source_type",
            json!("SAME_IP_OR_LOOPBACK"),
            told(&[
                ("::", None),
                ("127.0.0.1", Some("f")),
                ("127.0.0.2", None),
                ("172.16.0.1", Some("f")),
                ("172.16.0.2", None),
            ]),
        ),
    ] {
        let plan = plan_of(&with(CHAIN, json!({"filter_chain_match": {field: value}}))).unwrap();
        assert_eq!(sources(&plan), expected, "{field}");
    }
}

/// Chains that nobody chooses are not looked at.
#[test]
fn the_destination_chooses_first() {
    let mut other = chain("other", "nowhere", &["10.0.0.0/8"]);
    other["filter_chain_match"]["destination_port"] = json!(1);
    other["filter_chain_match"]["source_ports"] = json!([1]);
    let plan = plan_of(&listener(&[other, chain("any", "c", &[])], json!({}))).unwrap();
    assert_eq!(sources(&plan), told(&[("::", Some("any"))]));
    let chains = [chain("one", "c", &["10.0.0.0/8"]), chain("any", "c", &[])];
    let plan = plan_of(&listener(&chains, json!({"address": address("0.0.0.0", 50001)}))).unwrap();
    assert_eq!(
        sources(&plan),
        told(&[("::", Some("any")), ("10.0.0.0", Some("one")), ("11.0.0.0", Some("any"))])
    );
}

#[test]
fn both_families_are_in_one_order() {
    let addresses = json!({"additional_addresses": [{"address": address("fd00::1", 50001)}]});
    let chains = [
        chain("a", "empty", &["10.0.0.0/8", "::/64", "2001:db8::/32"]),
        chain("b", "empty", &["10.1.0.0/16", "::5/128", "::ffff:ffff:0:0/96"]),
        chain("any", "empty", &[]),
    ];
    let mut bootstrap = listener(&chains, addresses);
    let mut empty = cluster("empty", "KERNEL");
    merge(&mut empty, json!({"load_assignment": null}));
    bootstrap["static_resources"]["clusters"].as_array_mut().unwrap().push(empty);
    let plan = plan_of(&bootstrap).unwrap();
    let expected = told(&[
        ("::", Some("a")),
        ("::5", Some("b")),
        ("::6", Some("a")),
        ("0.0.0.0", Some("any")),
        ("10.0.0.0", Some("a")),
        ("10.1.0.0", Some("b")),
        ("10.2.0.0", Some("a")),
        ("11.0.0.0", Some("any")),
        // Past ::ffff:255.255.255.255, where ::/64 goes on.
        ("::1:0:0:0", Some("a")),
        ("::ffff:ffff:0:0", Some("b")),
        ("::ffff:ffff:1:0:0", Some("any")),
    ]);
    let found = sources(&plan);
    assert_eq!(found[..8], expected[..8]);
    assert!(found[8..].contains(&("2001:db8::".to_owned(), Some("a"))), "{found:?}");
    assert_eq!(found[8].1, Some("a"), "{found:?}");
}

#[test]
fn what_every_chain_has_to_be() {
    let two = |fields: Value| {
        let mut second = chain("second", "d", &[]);
        merge(second.pointer_mut("/filters/0/typed_config").unwrap(), fields);
        listener(&[chain("first", "c", &["10.0.0.0/8"]), second], json!({}))
    };
    plan_of(&two(json!({}))).unwrap();
    blocked(&two(json!({"max_connect_attempts": 2})), Obstacle::ConnectAttempts(2));
    let mut http = two(json!({}));
    merge(http.pointer_mut(&format!("{LISTENER}/filter_chains/1")).unwrap(), json!({"filters": []}));
    blocked(&http, Obstacle::EmptyChain("second".into()));
    let mut mixed = two(json!({}));
    merge(mixed.pointer_mut(CLUSTER).unwrap(), json!({"metadata": data_path("PROXY")}));
    blocked(&mixed, Obstacle::MixedDataPath);

    // What is soft is waived for the chains of clusters that do without it.
    let soft = two(json!({"idle_timeout": "1s"}));
    let timeout = Obstacle::IdleTimeout(std::time::Duration::from_secs(1));
    let kernel = |bootstrap: &Value, cluster: usize| {
        let mut bootstrap = bootstrap.clone();
        let at = format!("/static_resources/clusters/{cluster}");
        merge(bootstrap.pointer_mut(&at).unwrap(), json!({"metadata": data_path("KERNEL")}));
        bootstrap
    };
    blocked(&kernel(&soft, 0), timeout);
    plan_of(&kernel(&soft, 1)).unwrap();
}

#[test]
fn addresses_with_different_sources() {
    let additional = json!({"additional_addresses": [{"address": address("172.16.0.2", 50001)}]});
    let chains = [chain("one", "c", &["10.0.0.0/8"]), chain("any", "d", &[])];
    plan_of(&listener(&chains, additional.clone())).unwrap();
    // Of 172.16.0.1 and 172.16.0.2 another one is local for each.
    let mut local = chains[0].clone();
    local["filter_chain_match"] = json!({"source_type": "SAME_IP_OR_LOOPBACK"});
    blocked(&listener(&[local, chains[1].clone()], additional), Obstacle::DifferentChains);
}

#[test]
fn more_ranges_than_the_programs_search() {
    let of = |count: usize| {
        let prefixes: Vec<String> = (0..count).map(|i| format!("10.{}.{}.0/25", i >> 8, i & 255)).collect();
        let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
        listener(&[chain("one", "c", &prefixes), chain("any", "d", &[])], json!({}))
    };
    assert_eq!(plan_of(&of(511)).unwrap().sources.len(), 1023);
    blocked(&of(512), Obstacle::TooManySources(1025));
}

/// A compiled selector, as the kernel has it.
struct Kernel(Vec<u64>);

impl Table for Kernel {
    fn word(&self, offset: u32) -> Option<u64> {
        self.0.get(offset as usize).copied()
    }
    fn random(&self) -> u32 {
        unreachable!("nothing is drawn")
    }
    fn turn(&self) -> u32 {
        unreachable!("nobody takes turns")
    }
    fn active(&self, _host: u32) -> u64 {
        unreachable!("nobody is compared")
    }
    fn hash(&self) -> u64 {
        unreachable!("nothing is hashed")
    }
}

/// Few bits vary, so that prefixes nest and collide often.
fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        3 => prop::sample::select(vec![0_u32, 1, 2, 0x0a00_0001, 0x0a00_0100, 0x0a01_0001, 0x7f00_0001, u32::MAX])
            .prop_map(|bits| IpAddr::V4(bits.into())),
        2 => prop::sample::select(vec![1_u128, 2, 1 << 47, 1 << 48, 1 << 100, (1 << 100) + 1, u128::MAX])
            .prop_map(|bits| IpAddr::V6(bits.into())),
    ]
}

fn any_cidr() -> impl Strategy<Value = Cidr> {
    (any_ip(), prop::sample::select(vec![0_u8, 1, 8, 12, 20, 24, 31, 32])).prop_map(|(ip, len)| match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            Cidr { address: Ipv4Addr::from_bits(ip.to_bits() & mask).into(), prefix_len: len }
        }
        IpAddr::V6(ip) => {
            let len = len * 4;
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            Cidr { address: Ipv6Addr::from_bits(ip.to_bits() & mask).into(), prefix_len: len }
        }
    })
}

fn any_match() -> impl Strategy<Value = FilterChainMatch> {
    let cidrs = || prop::collection::vec(any_cidr(), 0..3);
    let types = vec![SourceType::Any, SourceType::Any, SourceType::SameIpOrLoopback, SourceType::External];
    (prop::option::weighted(0.2, 1..3_u16), cidrs(), cidrs(), prop::sample::select(types), cidrs()).prop_map(
        |(destination_port, destinations, direct, source_type, sources)| FilterChainMatch {
            destination_port,
            prefix_ranges: destinations,
            direct_source_prefix_ranges: direct,
            source_type,
            source_prefix_ranges: sources,
            ..FilterChainMatch::default()
        },
    )
}

/// What the eBPF programs choose is what the proxy would choose for the same connection.
#[test]
fn both_paths_choose_the_same_chain() {
    let base = snapshot(&clear());
    let base = base.listener("l").unwrap();
    let terminal = base.config.filter_chains[0].terminal.clone();
    let stats = Stats::new(1);
    let logs = Registry::start(&stats, FlushSettings::default()).unwrap();
    let build = |matches: &[FilterChainMatch], addresses: &[SocketAddr]| {
        let chain = |(index, matches): (usize, &FilterChainMatch)| {
            Arc::new(FilterChain {
                name: index.to_string().into(),
                matches: matches.clone(),
                terminal: terminal.clone(),
                content: index as u64,
                ignored_filters: Vec::new(),
            })
        };
        let config = config::listener::Listener {
            filter_chains: matches.iter().enumerate().map(chain).collect(),
            addresses: addresses.to_vec(),
            ..config::listener::Listener::clone(&base.config)
        };
        Listener::build(&Arc::new(config), &stats, &logs, None)
    };
    let cases = (
        prop::collection::vec(any_match(), 1..8),
        prop::collection::vec((any_ip(), 1..4_u16).prop_map(SocketAddr::from), 1..3),
        prop::collection::vec(any_ip(), 20),
    );
    let (compared, selected) = (Cell::new(0), Cell::new(0));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(3_000));
    runner
        .run(&cases, |(mut matches, addresses, ips)| {
            // Chains that match the same connections are refused.
            while build(&matches, &addresses).is_err() {
                matches.pop();
            }
            let listener = build(&matches, &addresses).unwrap();
            let mut found = Obstacles::default();
            let Some(Chosen { chains, sources }) = of(&listener, &mut found) else {
                prop_assert!(!found.0.is_empty());
                return Ok(());
            };
            prop_assert!(found.0.is_empty(), "{:?}", found.0);
            let indexes: Vec<u32> = (1..=chains.len() as u32).collect();
            let kernel = Kernel(compile_selector(&sources, &indexes));
            selected.set(selected.get() + u32::from(sources.len() > 1));
            let edges = sources.iter().map(|it| it.first.to_canonical());
            let around = |ip: IpAddr| {
                let Ok(before) = ip_before(ip) else { return vec![ip] };
                vec![before, ip]
            };
            for (destination, source) in addresses.iter().flat_map(|destination| {
                let all = ips.iter().copied().chain(edges.clone()).flat_map(around);
                all.map(|source| (*destination, source))
            }) {
                if source.is_ipv4() != destination.is_ipv4() {
                    continue;
                }
                let input = MatchInput {
                    destination,
                    source: (source, 40_000).into(),
                    direct_source: source,
                    transport_protocol: "",
                    server_name: "",
                    application_protocols: &[],
                };
                let expected = listener.find_chain(&input).map(|chain| chain.id);
                let service = select(&kernel, Addr::from(source).halves()).unwrap();
                let chosen = service.checked_sub(1).map(|at| chains[at as usize].id);
                prop_assert_eq!(chosen, expected, "{} to {}: {:?}", source, destination, sources);
                compared.set(compared.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    let (compared, selected) = (compared.get(), selected.get());
    assert!(compared > 20_000 && selected > 500, "{compared} compared, {selected} selectors");
}

fn ip_before(ip: IpAddr) -> Result<IpAddr, ()> {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().checked_sub(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(ip) => ip.to_bits().checked_sub(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
    .filter(|before: &IpAddr| before.is_ipv4() || before.to_canonical().is_ipv6())
    .ok_or(())
}
