use proptest::prelude::*;

use super::*;
use crate::config::filter_chain::{FilterChainMatch, SourceType};

fn cidr(text: &str) -> Cidr {
    let (address, len) = text.split_once('/').unwrap();
    Cidr { address: address.parse().unwrap(), prefix_len: len.parse().unwrap() }
}

fn chain(name: &str, matches: FilterChainMatch) -> Arc<FilterChain> {
    Arc::new(FilterChain {
        name: name.into(),
        matches,
        terminal: None,
        content: 0,
        ignored_filters: Vec::new(),
    })
}

fn names(list: &[&str]) -> Vec<Arc<str>> {
    list.iter().map(|name| (*name).into()).collect()
}

fn input<'a>(destination: &str, source: &str) -> MatchInput<'a> {
    let source: SocketAddr = source.parse().unwrap();
    MatchInput {
        destination: destination.parse().unwrap(),
        source,
        direct_source: source.ip(),
        transport_protocol: "",
        server_name: "",
        application_protocols: &[],
    }
}

/// A matcher and the names of its chains, the default chain last.
struct Built(Matcher, Vec<Arc<str>>);

fn build(chains: &[Arc<FilterChain>], default: Option<&Arc<FilterChain>>) -> Result<Built, MatchError> {
    let matcher = Matcher::build(chains, default)?;
    Ok(Built(matcher, chains.iter().chain(default).map(|chain| chain.name.clone()).collect()))
}

fn found<'m>(Built(matcher, names): &'m Built, input: &MatchInput<'_>) -> Option<&'m str> {
    matcher.find(input).map(|index| &*names[index])
}

#[test]
fn a_specific_port_without_a_match_does_not_fall_back_to_any_port() {
    let matcher = build(
        &[
            chain(
                "port",
                FilterChainMatch {
                    destination_port: Some(443),
                    server_names: names(&["a.example"]),
                    ..FilterChainMatch::default()
                },
            ),
            chain("any", FilterChainMatch::default()),
        ],
        None,
    )
    .unwrap();
    assert_eq!(found(&matcher, &input("10.0.0.1:443", "10.0.0.2:1")), None);
    assert_eq!(found(&matcher, &input("10.0.0.1:80", "10.0.0.2:1")), Some("any"));
}

#[test]
fn the_longest_prefix_wins_even_when_a_later_step_then_fails() {
    let matcher = build(
        &[
            chain(
                "wide",
                FilterChainMatch { prefix_ranges: vec![cidr("10.0.0.0/8")], ..FilterChainMatch::default() },
            ),
            chain(
                "narrow",
                FilterChainMatch {
                    prefix_ranges: vec![cidr("10.1.0.0/16")],
                    source_ports: vec![7],
                    ..FilterChainMatch::default()
                },
            ),
        ],
        Some(&chain("default", FilterChainMatch::default())),
    )
    .unwrap();
    assert_eq!(found(&matcher, &input("10.2.0.1:80", "1.1.1.1:7")), Some("wide"));
    assert_eq!(found(&matcher, &input("10.1.0.1:80", "1.1.1.1:7")), Some("narrow"));
    assert_eq!(found(&matcher, &input("10.1.0.1:80", "1.1.1.1:8")), Some("default"));
    assert_eq!(found(&matcher, &input("11.0.0.1:80", "1.1.1.1:7")), Some("default"));
    assert_eq!(found(&matcher, &input("[::ffff:10.1.0.1]:80", "1.1.1.1:7")), Some("narrow"));
}

/// First addresses and chains.
type Ranges<'m> = Vec<(String, Option<&'m str>)>;

fn by_source<'m>(Built(matcher, names): &'m Built, destination: &str) -> Result<Ranges<'m>, &'static str> {
    let ranges = matcher.find_by_source(destination.parse().unwrap())?;
    Ok(ranges.iter().map(|it| (it.first.to_string(), it.chain.map(|index| &*names[index]))).collect())
}

#[test]
fn the_destination_alone_may_decide() {
    let with = |name: &str, matches| chain(name, matches);
    let any = FilterChainMatch::default;
    let matcher = build(
        &[
            with("port", FilterChainMatch { destination_port: Some(443), ..any() }),
            with(
                "net",
                FilterChainMatch {
                    destination_port: Some(80),
                    prefix_ranges: vec![cidr("10.0.0.0/8")],
                    ..any()
                },
            ),
            with(
                "source",
                FilterChainMatch {
                    destination_port: Some(80),
                    prefix_ranges: vec![cidr("10.1.0.0/16")],
                    source_ports: vec![7],
                    ..any()
                },
            ),
        ],
        Some(&chain("default", any())),
    )
    .unwrap();
    let name = |destination: &str| {
        let ranges = by_source(&matcher, destination)?;
        assert_eq!(ranges.len(), 1, "{ranges:?}");
        Ok(ranges[0].1)
    };
    assert_eq!(name("10.0.0.1:443"), Ok(Some("port")));
    assert_eq!(name("0.0.0.0:443"), Ok(Some("port")));
    assert_eq!(name("[::]:443"), Ok(Some("port")));
    assert_eq!(name("10.2.0.1:80"), Ok(Some("net")));
    assert_eq!(name("[::ffff:10.2.0.1]:80"), Ok(Some("net")));
    assert_eq!(name("11.0.0.1:80"), Ok(Some("default")));
    assert_eq!(name("10.1.0.1:80"), Err("source_ports"));
    assert_eq!(name("0.0.0.0:80"), Err("prefix_ranges"));
    assert_eq!(name("0.0.0.0:81"), Ok(Some("default")));
    assert_eq!(by_source(&build(&[], None).unwrap(), "10.0.0.1:1"), Ok(vec![("0.0.0.0".into(), None)]));
}

#[test]
fn sources_fall_into_ranges() {
    let of = |list: &[&str]| FilterChainMatch {
        source_prefix_ranges: list.iter().map(|text| cidr(text)).collect(),
        ..FilterChainMatch::default()
    };
    let ports = FilterChainMatch { source_ports: vec![7], ..of(&["10.2.0.0/16"]) };
    let matcher = build(
        &[
            chain("wide", of(&["10.0.0.0/8", "2001:db8::/32"])),
            chain("narrow", of(&["10.1.0.0/16", "10.0.0.0/32"])),
        ],
        None,
    )
    .unwrap();
    let ranges = |list: &[(&str, Option<&'static str>)]| {
        Ok(list.iter().map(|(first, name)| ((*first).to_owned(), *name)).collect::<Ranges<'_>>())
    };
    let v4 = ranges(&[
        ("0.0.0.0", None),
        ("10.0.0.0", Some("narrow")),
        ("10.0.0.1", Some("wide")),
        ("10.1.0.0", Some("narrow")),
        ("10.2.0.0", Some("wide")),
        ("11.0.0.0", None),
    ]);
    for destination in ["172.16.0.1:80", "0.0.0.0:80", "[::ffff:172.16.0.1]:80"] {
        assert_eq!(by_source(&matcher, destination), v4, "{destination}");
    }
    assert_eq!(
        by_source(&matcher, "[fd00::1]:80"),
        ranges(&[("::", None), ("2001:db8::", Some("wide")), ("2001:db9::", None)])
    );
    // One source of which more has to be known is enough.
    let matcher = build(&[chain("ports", ports), chain("any", FilterChainMatch::default())], None).unwrap();
    assert_eq!(by_source(&matcher, "172.16.0.1:80"), Err("source_ports"));
    assert_eq!(by_source(&matcher, "[fd00::1]:80"), ranges(&[("::", Some("any"))]));
}

#[test]
fn local_sources_depend_on_the_destination() {
    let of = |source_type| FilterChainMatch { source_type, ..FilterChainMatch::default() };
    let matcher = build(
        &[chain("local", of(SourceType::SameIpOrLoopback)), chain("any", FilterChainMatch::default())],
        None,
    )
    .unwrap();
    let ranges = by_source(&matcher, "172.16.0.1:80").unwrap();
    let firsts: Vec<&str> = ranges.iter().map(|(first, _)| &**first).collect();
    assert_eq!(firsts, ["0.0.0.0", "127.0.0.1", "127.0.0.2", "172.16.0.1", "172.16.0.2"]);
    assert_eq!((ranges[1].1, ranges[2].1, ranges[3].1), (Some("local"), Some("any"), Some("local")));
    assert_eq!(by_source(&matcher, "0.0.0.0:80"), Err("source_type"));
    assert_eq!(by_source(&matcher, "255.255.255.255:80").unwrap().len(), 4);
}

#[test]
fn server_names_match_exactly_then_by_the_longest_suffix() {
    let matcher = build(
        &[
            chain(
                "exact",
                FilterChainMatch { server_names: names(&["a.x.y"]), ..FilterChainMatch::default() },
            ),
            chain("xy", FilterChainMatch { server_names: names(&["*.x.y"]), ..FilterChainMatch::default() }),
            chain("y", FilterChainMatch { server_names: names(&["*.y"]), ..FilterChainMatch::default() }),
            chain("any", FilterChainMatch::default()),
        ],
        None,
    )
    .unwrap();
    for (sni, expected) in [
        ("a.x.y", "exact"),
        ("b.x.y", "xy"),
        ("c.b.x.y", "xy"),
        ("x.y", "y"),
        ("y", "any"),
        (".y", "any"),
        ("", "any"),
    ] {
        let input = MatchInput { server_name: sni, ..input("10.0.0.1:1", "10.0.0.2:1") };
        assert_eq!(found(&matcher, &input), Some(expected), "SNI {sni:?}");
    }
}

#[test]
fn only_the_canonical_loopback_address_counts_as_local() {
    let of = |source_type| FilterChainMatch { source_type, ..FilterChainMatch::default() };
    let matcher = build(
        &[chain("local", of(SourceType::SameIpOrLoopback)), chain("external", of(SourceType::External))],
        None,
    )
    .unwrap();
    for (source, destination, expected) in [
        ("127.0.0.1:5", "127.0.0.3:1", "local"),
        ("127.0.0.2:5", "127.0.0.1:1", "external"),
        ("127.0.0.2:5", "127.0.0.2:1", "local"),
        ("[::1]:5", "[2001:db8::1]:1", "local"),
        ("10.0.0.1:5", "10.0.0.1:1", "local"),
        ("10.0.0.2:5", "10.0.0.1:1", "external"),
    ] {
        assert_eq!(found(&matcher, &input(destination, source)), Some(expected), "{source} to {destination}");
    }
}

#[test]
fn the_clients_protocol_order_decides() {
    let of = |alpn: &str| FilterChainMatch {
        application_protocols: names(&[alpn]),
        ..FilterChainMatch::default()
    };
    let matcher = build(&[chain("h1", of("http/1.1")), chain("h2", of("h2"))], None).unwrap();
    let protocols: [Box<str>; 3] = ["x".into(), "h2".into(), "http/1.1".into()];
    let input = MatchInput { application_protocols: &protocols, ..input("10.0.0.1:1", "10.0.0.2:1") };
    assert_eq!(found(&matcher, &input), Some("h2"));
}

#[test]
fn equal_matches_are_refused_and_named() {
    let of = |list: &[&str]| FilterChainMatch { server_names: names(list), ..FilterChainMatch::default() };
    let error =
        build(&[chain("a", of(&["x.com", "y.com"])), chain("b", of(&["y.com"]))], None).err().unwrap();
    assert_eq!(
        error.to_string(),
        "filter chain 'b' has the same matching rules defined as 'a': both match server_names y.com; \
         remove one of them or make its filter_chain_match differ"
    );
    let error =
        build(&[chain("a", FilterChainMatch::default()), chain("b", FilterChainMatch::default())], None)
            .err()
            .unwrap();
    assert!(error.to_string().contains("both match every connection"), "{error}");
    let error = build(&[chain("a", of(&["x.com", "x.com"]))], None).err().unwrap();
    assert!(matches!(error, MatchError::Repeated { .. }), "{error}");
    let error = build(&[chain("a", of(&["*.com"])), chain("b", of(&[".com"]))], None).err().unwrap();
    assert!(error.to_string().contains("server_names *.com"), "{error}");
}

#[test]
fn whole_address_space_prefixes_beat_any() {
    let matcher = build(
        &[
            chain("any", FilterChainMatch::default()),
            chain(
                "zero",
                FilterChainMatch {
                    prefix_ranges: vec![cidr("0.0.0.0/0"), cidr("255.255.255.255/32")],
                    ..FilterChainMatch::default()
                },
            ),
        ],
        None,
    )
    .unwrap();
    assert_eq!(found(&matcher, &input("255.255.255.255:1", "1.1.1.1:1")), Some("zero"));
    assert_eq!(found(&matcher, &input("1.2.3.4:1", "1.1.1.1:1")), Some("zero"));
    assert_eq!(found(&matcher, &input("[2001:db8::1]:1", "1.1.1.1:1")), Some("any"));
}

#[test]
fn no_chain_and_no_default_is_no_match() {
    let matcher = build(&[], None).unwrap();
    assert_eq!(found(&matcher, &input("10.0.0.1:1", "10.0.0.2:1")), None);
}

/// The specification, word for word: a list of candidates that every step narrows.
fn naive(chains: &[Arc<FilterChain>], input: &MatchInput<'_>) -> Option<usize> {
    let mut left: Vec<usize> = (0..chains.len()).collect();
    let of = |i: usize| &chains[i].matches;

    let exact = left.iter().any(|i| of(*i).destination_port == Some(input.destination.port()));
    left.retain(|i| of(*i).destination_port == exact.then_some(input.destination.port()));

    naive_prefix(&mut left, input.destination.ip(), |i| &of(i).prefix_ranges);

    let lists = |i: usize, name: &str| of(i).server_names.iter().any(|n| &**n == name);
    let mut wanted: Vec<String> = Vec::new();
    if !input.server_name.is_empty() {
        wanted.push(input.server_name.into());
        let labels: Vec<&str> = input.server_name.split('.').collect();
        for cut in 1..labels.len() {
            if !labels[..cut].concat().is_empty() {
                wanted.push(format!("*.{}", labels[cut..].join(".")));
            }
        }
    }
    match wanted.iter().find(|name| left.iter().any(|i| lists(*i, name))) {
        Some(name) => left.retain(|i| lists(*i, name)),
        None => left.retain(|i| of(*i).server_names.is_empty()),
    }

    let transport = if input.transport_protocol.is_empty() { "raw_buffer" } else { input.transport_protocol };
    let exact = left.iter().any(|i| &*of(*i).transport_protocol == transport);
    left.retain(|i| &*of(*i).transport_protocol == if exact { transport } else { "" });

    let lists = |i: usize, alpn: &str| of(i).application_protocols.iter().any(|n| &**n == alpn);
    match input.application_protocols.iter().find(|alpn| left.iter().any(|i| lists(*i, alpn))) {
        Some(alpn) => left.retain(|i| lists(*i, alpn)),
        None => left.retain(|i| of(*i).application_protocols.is_empty()),
    }

    naive_prefix(&mut left, input.direct_source, |i| &of(i).direct_source_prefix_ranges);

    let local = input.source.ip() == input.destination.ip()
        || ["127.0.0.1", "::1"].contains(&input.source.ip().to_string().as_str());
    let kind = if local { SourceType::SameIpOrLoopback } else { SourceType::External };
    let exact = left.iter().any(|i| of(*i).source_type == kind);
    left.retain(|i| of(*i).source_type == if exact { kind } else { SourceType::Any });

    naive_prefix(&mut left, input.source.ip(), |i| &of(i).source_prefix_ranges);

    let exact = left.iter().any(|i| of(*i).source_ports.contains(&input.source.port()));
    left.retain(|i| {
        if exact {
            of(*i).source_ports.contains(&input.source.port())
        } else {
            of(*i).source_ports.is_empty()
        }
    });
    assert!(left.len() <= 1, "two chains are equally specific: {left:?}");
    left.first().copied()
}

fn naive_prefix<'a>(left: &mut Vec<usize>, ip: IpAddr, ranges: impl Fn(usize) -> &'a [Cidr]) {
    let contains = |cidr: &Cidr| match (cidr.address, ip) {
        (IpAddr::V4(net), IpAddr::V4(ip)) => {
            (0..cidr.prefix_len).all(|bit| (net.to_bits() ^ ip.to_bits()) >> (31 - bit) & 1 == 0)
        }
        (IpAddr::V6(net), IpAddr::V6(ip)) => {
            (0..cidr.prefix_len).all(|bit| (net.to_bits() ^ ip.to_bits()) >> (127 - bit) & 1 == 0)
        }
        _ => false,
    };
    let longest = left.iter().flat_map(|i| ranges(*i)).filter(|c| contains(c)).map(|c| c.prefix_len).max();
    match longest {
        Some(len) => left.retain(|i| ranges(*i).iter().any(|c| c.prefix_len == len && contains(c))),
        None => left.retain(|i| ranges(*i).is_empty()),
    }
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    // Few bits vary, so that prefixes nest and collide often.
    prop_oneof![
        3 => prop::sample::select(vec![0u32, 1, 2, 3, 0x0000_0100, 0x0001_0001, 0x8000_0000, 0x8000_0001, 0x7f00_0001, u32::MAX])
            .prop_map(|bits| IpAddr::V4(bits.into())),
        1 => prop::sample::select(vec![1u128, 2, 1 << 100, (1 << 100) + 1, u128::MAX])
            .prop_map(|bits| IpAddr::V6(bits.into())),
    ]
}

fn any_cidr() -> impl Strategy<Value = Cidr> {
    (any_ip(), prop::sample::select(vec![0u8, 1, 8, 15, 24, 31, 32])).prop_map(|(ip, len)| match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            Cidr { address: IpAddr::V4((ip.to_bits() & mask).into()), prefix_len: len }
        }
        IpAddr::V6(ip) => {
            let len = len * 4;
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            Cidr { address: IpAddr::V6((ip.to_bits() & mask).into()), prefix_len: len }
        }
    })
}

fn subset<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![2 => Just(Vec::new()), 1 => prop::sample::subsequence(values, 1..=2)]
}

fn cidrs() -> impl Strategy<Value = Vec<Cidr>> {
    prop_oneof![
        2 => Just(Vec::new()),
        1 => prop::collection::hash_set(any_cidr(), 1..3).prop_map(|set| set.into_iter().collect()),
    ]
}

fn any_match() -> impl Strategy<Value = FilterChainMatch> {
    (
        prop::option::of(0..3u16),
        cidrs(),
        subset(names(&["a.x.y", "b.x.y", "*.x.y", "*.y", "x.y"])),
        prop::sample::select(vec!["", "", "tls", "raw_buffer"]),
        subset(names(&["h2", "http/1.1", "istio"])),
        cidrs(),
        prop::sample::select(vec![
            SourceType::Any,
            SourceType::Any,
            SourceType::SameIpOrLoopback,
            SourceType::External,
        ]),
        cidrs(),
        subset(vec![1u16, 2, 3]),
    )
        .prop_map(|(port, dst, sni, transport, alpn, direct, source_type, src, ports)| {
            FilterChainMatch {
                destination_port: port,
                prefix_ranges: dst,
                server_names: sni,
                transport_protocol: transport.into(),
                application_protocols: alpn,
                direct_source_prefix_ranges: direct,
                source_type,
                source_prefix_ranges: src,
                source_ports: ports,
            }
        })
}

/// Without what is said by clients; seldom with ports.
fn any_match_of_addresses() -> impl Strategy<Value = FilterChainMatch> {
    (any_match(), prop::bool::weighted(0.05)).prop_map(|(matches, ports)| FilterChainMatch {
        server_names: Vec::new(),
        transport_protocol: "".into(),
        application_protocols: Vec::new(),
        source_ports: if ports { matches.source_ports } else { Vec::new() },
        ..matches
    })
}

#[derive(Debug, Clone)]
struct Probe {
    destination: SocketAddr,
    source: SocketAddr,
    direct: IpAddr,
    transport: &'static str,
    sni: &'static str,
    alpn: Vec<Box<str>>,
}

fn any_probe() -> impl Strategy<Value = Probe> {
    (
        (any_ip(), 0..4u16),
        (any_ip(), 0..4u16),
        any_ip(),
        prop::sample::select(vec!["", "tls", "raw_buffer", "other"]),
        prop::sample::select(vec!["", "a.x.y", "b.x.y", "c.x.y", "d.c.x.y", "x.y", "y", "z"]),
        prop::collection::vec(
            prop::sample::select(vec!["h2", "http/1.1", "other"]).prop_map(Box::from),
            0..3,
        ),
    )
        .prop_map(|(destination, source, direct, transport, sni, alpn)| Probe {
            destination: destination.into(),
            source: source.into(),
            direct,
            transport,
            sni,
            alpn,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn matches_as_the_specification_says(
        matches in prop::collection::vec(any_match(), 0..12),
        probes in prop::collection::vec(any_probe(), 16),
    ) {
        // Drop chains that collide with an earlier one: the matcher has to refuse those.
        let mut chains: Vec<Arc<FilterChain>> = Vec::new();
        for (index, m) in matches.into_iter().enumerate() {
            chains.push(chain(&index.to_string(), m));
            if build(&chains, None).is_err() {
                chains.pop();
            }
        }
        let matcher = build(&chains, None).unwrap();
        for probe in &probes {
            let input = MatchInput {
                destination: probe.destination,
                source: probe.source,
                direct_source: probe.direct,
                transport_protocol: probe.transport,
                server_name: probe.sni,
                application_protocols: &probe.alpn,
            };
            let expected = naive(&chains, &input).map(|index| &*chains[index].name);
            prop_assert_eq!(found(&matcher, &input), expected, "{:?} of {:#?}", probe, chains);
        }
    }

    #[test]
    fn ranges_of_sources_find_what_is_found_for_each(
        matches in prop::collection::vec(any_match_of_addresses(), 0..12),
        destinations in prop::collection::vec((any_ip(), 0..4u16), 4),
        sources in prop::collection::vec(any_ip(), 16),
    ) {
        let mut chains: Vec<Arc<FilterChain>> = Vec::new();
        for (index, m) in matches.into_iter().enumerate() {
            chains.push(chain(&index.to_string(), m));
            if build(&chains, None).is_err() {
                chains.pop();
            }
        }
        let Built(matcher, _) = build(&chains, None).unwrap();
        for destination in destinations.into_iter().map(SocketAddr::from) {
            let ranges = match matcher.find_by_source(destination) {
                Ok(ranges) => ranges,
                Err(field) => {
                    prop_assert!(field == "source_ports" || destination.ip().is_unspecified(), "{field}");
                    continue;
                }
            };
            prop_assert!(ranges.windows(2).all(|pair| pair[0].first < pair[1].first), "{ranges:?}");
            prop_assert!(ranges.windows(2).all(|pair| pair[0].chain != pair[1].chain), "{ranges:?}");
            let edges = ranges.iter().map(|range| range.first);
            for source in sources.iter().copied().chain(edges) {
                if source.is_ipv4() != destination.is_ipv4() {
                    continue;
                }
                let input = MatchInput {
                    destination,
                    source: (source, 9).into(),
                    direct_source: source,
                    transport_protocol: "tls",
                    server_name: "a.x.y",
                    application_protocols: &["h2".into()],
                };
                let range = ranges.iter().rfind(|range| range.first <= source).unwrap();
                prop_assert_eq!(range.chain, matcher.find(&input), "{} to {} of {:#?}", source, destination, chains);
            }
        }
    }
}
