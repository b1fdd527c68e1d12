use std::time::Duration;

use super::*;
use crate::config::cluster::{Dns, LbPolicy, LookupFamily, Thresholds};
use crate::config::endpoint::{
    ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, LocalityLbEndpoints,
};
use crate::config::route::{HttpRouting, VirtualHost};
use crate::config::tcp_proxy::WeightedCluster;
use crate::config::transport_socket::TransportSocketMatches;

fn cluster(name: &str, discovery: Discovery, endpoint: Option<&str>) -> Arc<Cluster> {
    let endpoints = endpoint.iter().map(|address| LbEndpoint {
        address: EndpointAddress::Ip(address.parse().unwrap()),
        hostname: "".into(),
        load_balancing_weight: 1,
        health_status: HealthStatus::default(),
        health_check: None,
        hash_key: None,
    });
    let locality = LocalityLbEndpoints { endpoints: endpoints.collect(), ..Default::default() };
    Arc::new(Cluster {
        name: name.into(),
        alt_stat_name: None,
        discovery,
        eds: None,
        lb_policy: LbPolicy::RoundRobin,
        locality_weighted: false,
        connect_timeout: Duration::from_secs(5),
        per_connection_buffer_limit_bytes: 0,
        load_assignment: ClusterLoadAssignment { localities: vec![locality], overprovisioning_factor: 140 },
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
            lookup_family: LookupFamily::default(),
        },
        cleanup_interval: Duration::from_secs(5),
        tls: None,
        has_pipes: false,
    })
}

fn black_hole(clusters: &[Arc<Cluster>]) -> Option<&Cluster> {
    clusters.iter().find(|cluster| &*cluster.name == BLACK_HOLE).map(|cluster| &**cluster)
}

fn clusters() -> Vec<Arc<Cluster>> {
    vec![
        cluster("BlackHoleCluster", Discovery::Static, None),
        cluster("PassthroughCluster", Discovery::OriginalDst, None),
        cluster("foo", Discovery::Static, Some("10.0.0.1:80")),
    ]
}

fn proxy(clusters: ClusterChoice) -> Arc<TcpProxy> {
    Arc::new(TcpProxy {
        stat_prefix: "t".into(),
        clusters,
        idle_timeout: None,
        max_connect_attempts: 1,
        backoff: None,
        max_downstream_connection_duration: None,
        max_downstream_connection_duration_jitter_percentage: None,
        access_log: Vec::new(),
        access_log_flush_interval: None,
        flush_access_log_on_connected: false,
        flush_access_log_on_start: false,
        hash_policy: None,
    })
}

fn chain(matches: FilterChainMatch, terminal: Option<Terminal>) -> Arc<FilterChain> {
    Arc::new(FilterChain { name: "".into(), matches, terminal, content: 0, ignored_filters: Vec::new() })
}

fn to(cluster: &str) -> Arc<FilterChain> {
    on(FilterChainMatch::default(), cluster)
}

fn on(matches: FilterChainMatch, cluster: &str) -> Arc<FilterChain> {
    chain(matches, Some(Terminal::TcpProxy(proxy(ClusterChoice::Single(cluster.into())))))
}

fn listener(name: &str, addresses: &[&str], chains: Vec<Arc<FilterChain>>) -> Listener {
    Listener {
        name: name.into(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        bind_to_port: false,
        use_original_dst: false,
        filter_chains: chains,
        default_filter_chain: None,
        listener_filters: Vec::new(),
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: false,
        traffic_direction: TrafficDirection::Outbound,
        access_log: Vec::new(),
        per_connection_buffer_limit_bytes: 0,
        tcp_backlog_size: None,
        enable_reuse_port: true,
        transparent: false,
        freebind: false,
        tcp_keepalive: None,
        socket_options: vec![],
        overrides: vec![],
        tcp_fast_open_queue_length: None,
        max_connections_to_accept_per_socket_event: None,
        exact_balance: false,
        stat_prefix: None,
        connection_limit: None,
        ignore_global_conn_limit: false,
        content: 0,
    }
}

fn virtual_outbound(chains: Vec<Arc<FilterChain>>, default: Option<Arc<FilterChain>>) -> Listener {
    Listener {
        bind_to_port: true,
        use_original_dst: true,
        default_filter_chain: default,
        ..listener("virtualOutbound", &["0.0.0.0:15001"], chains)
    }
}

fn explain(listeners: Vec<Listener>) -> Vec<String> {
    let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
    Destinations::of(&listeners, black_hole(&clusters())).to_string().lines().map(str::to_owned).collect()
}

fn port(port: u16) -> FilterChainMatch {
    FilterChainMatch { destination_port: Some(port), ..Default::default() }
}

#[test]
fn listeners_of_the_kernel_path_are_balanced_and_what_an_ipv6_wildcard_takes_of_ipv4_is_captured() {
    let listeners = [
        listener("one", &["172.16.0.1:80"], vec![to("foo")]),
        listener("any", &["[::]:81"], vec![to("foo")]),
        listener("black", &["172.16.0.3:80"], vec![to("BlackHoleCluster")]),
    ]
    .map(Arc::new);
    let clusters = clusters();
    let rules = Destinations::of(&listeners, black_hole(&clusters))
        .balanced(|name| ["one", "any", "black"].iter().position(|it| *it == name).map(|at| at as u32 + 1));
    let rule = |address: &str| {
        let rule = &rules.rules[&address.parse::<SocketAddr>().unwrap()];
        (rule.verdict, rule.service)
    };
    assert_eq!(rule("172.16.0.1:80"), (Verdict::Balance, 1));
    assert_eq!(rule("[::]:81"), (Verdict::Balance, 2));
    assert_eq!(rule("0.0.0.0:81"), (Verdict::Capture, 0));
    assert_eq!(rule("172.16.0.3:80"), (Verdict::Refuse, 0));
}

#[test]
fn virtual_listeners_are_captured_and_nothing_else() {
    let bound = Listener { bind_to_port: true, ..listener("bound", &["0.0.0.0:80"], vec![to("foo")]) };
    let inbound = Listener {
        traffic_direction: TrafficDirection::Inbound,
        ..listener("inbound", &["10.9.9.9:1"], vec![to("foo")])
    };
    let lines = explain(vec![
        listener("172.16.0.1_50001", &["172.16.0.1:50001", "[fd00::1]:50001"], vec![to("foo")]),
        listener("second", &["172.16.0.1:50001", "0.0.0.0:9090"], vec![to("foo")]),
        listener("gone", &["172.16.0.9:1"], vec![to("BlackHoleCluster")]),
        bound,
        inbound,
    ]);
    assert_eq!(
        lines,
        [
            "captures 0.0.0.0:9090 -> listener second",
            "captures 172.16.0.1:50001 -> listener 172.16.0.1_50001",
            "refuses 172.16.0.9:1 (listener gone leads to BlackHoleCluster)",
            "captures [fd00::1]:50001 -> listener 172.16.0.1_50001",
            "everything else: passes untouched",
        ]
    );
}

#[test]
fn ipv6_wildcards_answer_for_ipv4_unless_somebody_else_does() {
    let lines = explain(vec![listener("a", &["[::]:80", "[::]:81"], vec![to("foo")]), {
        listener("b", &["0.0.0.0:81"], vec![to("foo")])
    }]);
    assert_eq!(
        lines[..4],
        [
            "captures 0.0.0.0:80 -> listener a",
            "captures 0.0.0.0:81 -> listener b",
            "captures [::]:80 -> listener a",
            "captures [::]:81 -> listener a",
        ]
    );
}

#[test]
fn istios_layout_captures_the_rest() {
    let guard = on(port(15001), "BlackHoleCluster");
    let lines = explain(vec![
        virtual_outbound(vec![guard.clone()], Some(to("PassthroughCluster"))),
        listener("172.16.0.1_50001", &["172.16.0.1:50001"], vec![to("foo")]),
    ]);
    assert_eq!(
        lines,
        [
            "refuses 0.0.0.0:15001 (listener virtualOutbound leads to BlackHoleCluster)",
            "captures 172.16.0.1:50001 -> listener 172.16.0.1_50001",
            "refuses [::]:15001 (listener virtualOutbound leads to BlackHoleCluster)",
            "everything else: captured -> listener virtualOutbound",
        ]
    );
    // REGISTRY_ONLY.
    let lines = explain(vec![virtual_outbound(vec![guard], Some(to("BlackHoleCluster")))]);
    assert_eq!(
        lines.last().unwrap(),
        "everything else: refused (listener virtualOutbound leads to BlackHoleCluster)"
    );
}

#[test]
fn a_chain_that_matches_everything_hides_the_default_chain() {
    let lines = explain(vec![virtual_outbound(vec![to("BlackHoleCluster")], Some(to("PassthroughCluster")))]);
    assert_eq!(lines, ["everything else: refused (listener virtualOutbound leads to BlackHoleCluster)"]);
}

#[test]
fn chains_without_a_catch_all_are_captured_one_by_one_where_the_kernel_can_tell() {
    let cidr = |text: &str, prefix_len| Cidr { address: text.parse().unwrap(), prefix_len };
    let exact = FilterChainMatch {
        destination_port: Some(443),
        prefix_ranges: vec![cidr("10.1.1.1", 32), cidr("fd00::1", 128)],
        ..Default::default()
    };
    let lines = explain(vec![virtual_outbound(vec![on(exact, "foo"), on(port(3306), "foo")], None)]);
    assert_eq!(
        lines,
        [
            "captures 0.0.0.0:3306 -> listener virtualOutbound",
            "captures 10.1.1.1:443 -> listener virtualOutbound",
            "captures [::]:3306 -> listener virtualOutbound",
            "captures [fd00::1]:443 -> listener virtualOutbound",
            "everything else: passes untouched",
        ]
    );
    // A prefix, or a match on the source, can't be looked up: all of it goes to the proxy, refusals too.
    let wide = FilterChainMatch { prefix_ranges: vec![cidr("10.0.0.0", 8)], ..port(443) };
    let guarded = vec![on(wide, "foo"), on(port(443), "BlackHoleCluster")];
    let lines = explain(vec![virtual_outbound(guarded, Some(to("BlackHoleCluster")))]);
    assert_eq!(lines, ["everything else: captured -> listener virtualOutbound"]);
    let sources = FilterChainMatch { source_ports: vec![1], ..port(443) };
    let lines =
        explain(vec![virtual_outbound(vec![on(sources, "BlackHoleCluster")], Some(to("BlackHoleCluster")))]);
    assert_eq!(lines, ["everything else: refused (listener virtualOutbound leads to BlackHoleCluster)"]);
}

#[test]
fn a_virtual_listener_comes_before_the_chains_of_the_catch_all() {
    let lines = explain(vec![
        virtual_outbound(vec![on(port(80), "BlackHoleCluster")], None),
        listener("http", &["0.0.0.0:80"], vec![to("foo")]),
    ]);
    assert_eq!(lines[0], "captures 0.0.0.0:80 -> listener http");
}

#[test]
fn only_a_black_hole_that_exists_refuses() {
    let listeners = [Arc::new(listener("l", &["10.0.0.1:1"], vec![to("BlackHoleCluster")]))];
    let verdict = |clusters: &[Arc<Cluster>]| {
        Destinations::of(&listeners, black_hole(clusters)).rules.into_values().next().unwrap().verdict
    };
    assert_eq!(verdict(&clusters()), Verdict::Refuse);
    assert_eq!(verdict(&[]), Verdict::Capture);
    assert_eq!(verdict(&[cluster(BLACK_HOLE, Discovery::Static, Some("10.0.0.1:1"))]), Verdict::Capture);
    assert_eq!(verdict(&[cluster(BLACK_HOLE, Discovery::StrictDns, None)]), Verdict::Capture);
}

#[test]
fn every_way_out_must_lead_to_the_black_hole() {
    let weighted = |names: [&str; 2]| {
        let all = names.map(|name| WeightedCluster { name: name.into(), weight: 1 });
        Some(Terminal::TcpProxy(proxy(ClusterChoice::Weighted(all.into()))))
    };
    let http = |clusters: &[&str]| {
        let host = |name: &&str| VirtualHost {
            name: "v".into(),
            domains: vec!["*".into()],
            route_name: "".into(),
            proxy: Some(proxy(ClusterChoice::Single((*name).into()))),
        };
        Some(Terminal::HttpAsTcp(Arc::new(HttpRouting::new(
            "h".into(),
            "r".into(),
            clusters.iter().map(host).collect(),
        ))))
    };
    for (terminal, verdict) in [
        (weighted([BLACK_HOLE, BLACK_HOLE]), Verdict::Refuse),
        (weighted([BLACK_HOLE, "foo"]), Verdict::Capture),
        (http(&[BLACK_HOLE]), Verdict::Refuse),
        (http(&[BLACK_HOLE, "foo"]), Verdict::Capture),
        (http(&[]), Verdict::Capture),
        (None, Verdict::Capture),
    ] {
        let shown = format!("{terminal:?}");
        let listeners = [Arc::new(listener("l", &["10.0.0.1:1"], vec![chain(port(1), terminal)]))];
        let got =
            Destinations::of(&listeners, black_hole(&clusters())).rules.into_values().next().unwrap().verdict;
        assert_eq!(got, verdict, "{shown}");
    }
}

#[test]
fn kernel_rules_keep_the_families_apart() {
    let listeners = [
        Arc::new(listener("a", &["0.0.0.0:80", "10.0.0.1:1"], vec![to("foo")])),
        Arc::new(listener("b", &["[::]:80"], vec![to("BlackHoleCluster")])),
    ];
    let rules = Destinations::of(&listeners, black_hole(&clusters())).kernel_rules();
    let rule = |address: &str| rules.get(&address.parse::<SocketAddr>().unwrap().into()).copied();
    assert_eq!(rules.len(), 3);
    assert_eq!(rule("0.0.0.0:80"), Some(Verdict::Capture.into()));
    assert_eq!(rule("[::]:80"), Some(Verdict::Refuse.into()));
    assert_eq!(rule("10.0.0.1:1"), Some(Verdict::Capture.into()));
}

#[test]
fn what_is_excluded_is_left_alone() {
    let cidr = |text: &str| {
        let (address, bits) = text.split_once('/').unwrap();
        Cidr { address: address.parse().unwrap(), prefix_len: bits.parse().unwrap() }
    };
    let mut all = listener("all", &["0.0.0.0:15001"], vec![to("foo")]);
    (all.use_original_dst, all.bind_to_port) = (true, true);
    let own = listener(
        "own",
        &["172.16.0.1:80", "172.16.9.1:80", "172.16.0.1:22", "[fd99::1]:80", "0.0.0.0:81", "[::]:22"],
        vec![to("foo")],
    );
    let exclude = Exclusions { cidrs: vec![cidr("172.16.9.0/24"), cidr("fd99::/16")], ports: vec![22] };
    let shown = |listeners: Vec<Listener>| {
        let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        let destinations = Destinations::of(&listeners, black_hole(&clusters())).excluding(&exclude);
        destinations.to_string().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        shown(vec![own.clone()]),
        [
            "captures 0.0.0.0:81 -> listener own",
            "captures 172.16.0.1:80 -> listener own",
            "everything else: passes untouched"
        ]
    );
    assert_eq!(
        shown(vec![own, all]),
        [
            "leaves 0.0.0.0:22 alone (exclude)",
            "captures 0.0.0.0:81 -> listener own",
            "captures 172.16.0.1:80 -> listener own",
            "leaves [::]:22 alone (exclude)",
            "everything else: captured -> listener all"
        ]
    );
}
