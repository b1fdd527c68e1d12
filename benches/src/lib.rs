//! What the microbenches measure, made ready: shared by those that take time and those that count instructions.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tidegate::access_log::{FlushSettings, Registry};
use tidegate::cluster::Cluster;
use tidegate::config::cluster::{
    Cluster as ClusterConfig, Discovery, Dns, LbPolicy, LookupFamily, Thresholds,
};
use tidegate::config::endpoint::{
    ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, Locality, LocalityLbEndpoints,
};
use tidegate::config::filter_chain::{FilterChain, FilterChainMatch};
use tidegate::config::listener::{Cidr, Listener as ListenerConfig, TrafficDirection};
use tidegate::config::transport_socket::TransportSocketMatches;
use tidegate::connection::record::{CloseType, Record, Upstream};
use tidegate::listener::Listener;
use tidegate::listener::filter_chain::{MatchInput, Matcher};
use tidegate::snapshot::Snapshot;
use tidegate::stats::Stats;

/// Istio's default access log format.
pub const ISTIO: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// Chains that differ in what they match.
pub fn chains(count: u32, matches: impl Fn(u32) -> FilterChainMatch) -> Vec<Arc<FilterChain>> {
    (0..count)
        .map(|index| {
            Arc::new(FilterChain {
                name: format!("chain-{index}").into(),
                matches: matches(index),
                terminal: None,
                content: 0,
                ignored_filters: Vec::new(),
            })
        })
        .collect()
}

/// By the destination's /24.
pub fn by_prefix(index: u32) -> FilterChainMatch {
    let address = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + (index << 8)));
    FilterChainMatch { prefix_ranges: vec![Cidr { address, prefix_len: 24 }], ..FilterChainMatch::default() }
}

/// By a suffix of the server's name.
pub fn by_name(index: u32) -> FilterChainMatch {
    FilterChainMatch {
        server_names: vec![format!("*.s{index}.example.com").into()],
        transport_protocol: "tls".into(),
        ..FilterChainMatch::default()
    }
}

/// As Istio's inbound listener: by port, then by transport protocol and application protocol.
pub fn by_port(index: u32) -> FilterChainMatch {
    FilterChainMatch {
        destination_port: Some((index / 2) as u16),
        transport_protocol: if index.is_multiple_of(2) { "tls" } else { "raw_buffer" }.into(),
        ..FilterChainMatch::default()
    }
}

/// A number below `count`: all come up in the course of lookups, in no order that a cache would like.
pub fn scattered(lookup: u32, count: u32) -> u32 {
    lookup.wrapping_mul(2_654_435_761) % count
}

/// Connections to the `chains` of [`by_prefix`], [`by_port`], or [`by_name`] (with the servers' names).
#[derive(Debug)]
pub struct Connections {
    matcher: Matcher,
    names: Vec<String>,
    count: u32,
}

impl Connections {
    /// To so many chains.
    pub fn new(count: u32, matches: impl Fn(u32) -> FilterChainMatch) -> Self {
        let matcher = Matcher::build(&chains(count, matches), None).expect("the chains differ");
        let names = (0..count).map(|index| format!("a.b.s{index}.example.com")).collect();
        Self { matcher, names, count }
    }

    /// Finds the chain of one of them.
    pub fn find(&self, lookup: u32) -> Option<usize> {
        let index = scattered(lookup, self.count);
        let destination = Ipv4Addr::from(0x0a00_0007 + (index << 8));
        let source = SocketAddr::from(([10, 9, 8, 7], 4321));
        self.matcher.find(&MatchInput {
            destination: SocketAddr::new(destination.into(), (index / 2) as u16),
            source,
            direct_source: source.ip(),
            transport_protocol: "tls",
            server_name: &self.names[index as usize],
            application_protocols: &[],
        })
    }
}

/// A cluster with so many healthy endpoints.
pub fn cluster(
    discovery: Discovery,
    lb_policy: LbPolicy,
    hosts: u16,
    weight: impl Fn(u16) -> u32,
) -> Arc<Cluster> {
    let endpoint = |port: u16| LbEndpoint {
        address: EndpointAddress::Ip(([10, 0, 0, 1], port).into()),
        hostname: "".into(),
        load_balancing_weight: weight(port),
        health_status: HealthStatus::Healthy,
        health_check: None,
        hash_key: None,
    };
    let config = ClusterConfig {
        name: "bench".into(),
        alt_stat_name: None,
        discovery,
        eds: None,
        has_pipes: false,
        lb_policy,
        locality_weighted: false,
        connect_timeout: Duration::from_secs(5),
        per_connection_buffer_limit_bytes: 1 << 20,
        load_assignment: ClusterLoadAssignment {
            localities: vec![LocalityLbEndpoints {
                locality: Locality::default(),
                priority: 0,
                load_balancing_weight: None,
                endpoints: (1..=hosts).map(endpoint).collect(),
            }],
            overprovisioning_factor: 140,
        },
        transport_sockets: TransportSocketMatches::default(),
        circuit_breakers: Thresholds::default(),
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
        endpoint_removal: None,
        data_path: None,
        close_connections_on_host_health_failure: false,
    };
    Cluster::build(Arc::new(config), &Stats::new(1), None)
}

/// Listeners on addresses 10.x.x.7:80, and one for port 81 of all addresses.
#[derive(Debug)]
pub struct Owners {
    snapshot: Snapshot,
    count: u32,
}

impl Owners {
    /// So many, and the one for all addresses.
    pub fn new(count: u32) -> Self {
        let stats = Stats::new(1);
        let logs = Registry::start(&stats, FlushSettings::default()).expect("a thread");
        let build = |address: SocketAddr| {
            let config = Arc::new(listener(address));
            Arc::new(Listener::build(&config, &stats, &logs, None).expect("a valid listener"))
        };
        let mut listeners: Vec<_> = (0..count).map(|index| build(service(index, 80))).collect();
        listeners.push(build(([0, 0, 0, 0], 81).into()));
        Self { snapshot: Snapshot::build(listeners, Vec::new()), count }
    }

    /// The listener of a destination that has one of its own.
    pub fn exact(&self, lookup: u32) -> Option<&Arc<Listener>> {
        self.snapshot.owner(service(scattered(lookup, self.count), 80))
    }

    /// The listener of a destination that only the one for all addresses has.
    pub fn wildcard(&self, lookup: u32) -> Option<&Arc<Listener>> {
        self.snapshot.owner(service(scattered(lookup, self.count), 81))
    }
}

fn service(index: u32, port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from(0x0a00_0007 + (index << 8)).into(), port)
}

fn listener(address: SocketAddr) -> ListenerConfig {
    ListenerConfig {
        name: address.to_string().into(),
        addresses: vec![address],
        bind_to_port: false,
        use_original_dst: false,
        filter_chains: chains(1, |_| FilterChainMatch::default()),
        default_filter_chain: None,
        listener_filters: Vec::new(),
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: false,
        traffic_direction: TrafficDirection::Outbound,
        access_log: Vec::new(),
        per_connection_buffer_limit_bytes: 1 << 20,
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

/// A connection that has ended well.
pub fn record() -> Record {
    let addr = |text: &str| text.parse().expect("a socket address");
    let (peer, local) = (addr("10.1.2.3:46464"), addr("172.16.0.1:50001"));
    Record {
        duration: Some(Duration::from_millis(12)),
        cluster: Some("outbound|50001|v1|foo-service.foo.svc.cluster.local".into()),
        upstream: Some(Upstream {
            address: addr("10.4.5.6:8080"),
            hostname: "".into(),
            local_address: Some(addr("10.1.2.3:53026")),
            connection_id: Some(1),
        }),
        attempts: 1,
        upstream_close_type: Some(CloseType::Normal),
        bytes_received: 64,
        bytes_sent: 65_536,
        upstream_bytes_sent: 64,
        upstream_bytes_received: 65_536,
        ..Record::new(7, peer, local, None, "172.16.0.1_50001".into())
    }
}
