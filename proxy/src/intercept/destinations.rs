//! What is captured: which destinations of a configuration go to the proxy, which are refused in the kernel, and
//! what happens to all others. A pure function of listeners and clusters.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tidegate_common::{Destination, RuleValue, Verdict};

use crate::config::cluster::{Cluster, Discovery};
use crate::config::filter_chain::{FilterChain, FilterChainMatch, Terminal};
use crate::config::listener::{Listener, TrafficDirection};
use crate::config::tcp_proxy::{ClusterChoice, TcpProxy};

/// Istio's name for the cluster that refuses: STATIC, without endpoints.
pub const BLACK_HOLE: &str = "BlackHoleCluster";

/// The rules of one configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destinations {
    /// By destination; an unspecified address is every address of its family.
    pub rules: BTreeMap<SocketAddr, Rule>,
    /// What happens to a destination that no rule names.
    pub everything_else: EverythingElse,
}

/// What happens to one destination, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Capture, balance or refuse.
    pub verdict: Verdict,
    /// Index of the service; 0 where it is not balanced in the kernel.
    pub service: u32,
    /// The listener that says so.
    pub listener: Arc<str>,
}

/// What happens to the destinations that no rule names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EverythingElse {
    /// There is no catch-all: it stays in the kernel, untouched.
    #[default]
    Passes,
    /// To the proxy, for this listener.
    Captured(Arc<str>),
    /// Refused: the chain of this listener leads to the black hole only.
    Refused(Arc<str>),
}

impl EverythingElse {
    /// For the kernel.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Passes => Verdict::Leave,
            Self::Captured(_) => Verdict::Capture,
            Self::Refused(_) => Verdict::Refuse,
        }
    }
}

/// Where the connections of a listener or chain end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leads {
    /// To the black hole, all of them.
    Nowhere,
    /// Anywhere else: the proxy decides, and logs.
    ToProxy,
}

impl Leads {
    fn verdict(self) -> Verdict {
        match self {
            Self::Nowhere => Verdict::Refuse,
            Self::ToProxy => Verdict::Capture,
        }
    }
}

impl Destinations {
    /// Decides for a configuration. Of two listeners with one address the first has it, as at hand-off.
    /// `black_hole` is the cluster called `BlackHoleCluster`, if there is one: no other matters.
    pub fn of(listeners: &[Arc<Listener>], black_hole: Option<&Cluster>) -> Self {
        let mut this = Self::default();
        let black_hole = black_hole.is_some_and(is_black_hole);
        let outbound = || listeners.iter().filter(|l| l.traffic_direction != TrafficDirection::Inbound);
        for listener in outbound().filter(|listener| !listener.bind_to_port) {
            let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
            let verdict = leads(chains, black_hole).verdict();
            for address in &listener.addresses {
                this.add(*address, verdict, &listener.name);
            }
        }
        this.widen_ipv6_wildcards();
        if let Some(catch_all) =
            outbound().find(|listener| listener.use_original_dst && listener.bind_to_port)
        {
            this.add_catch_all(catch_all, black_hole);
        }
        this
    }

    /// For the kernel's map.
    pub fn kernel_rules(&self) -> HashMap<Destination, RuleValue> {
        let value = |rule: &Rule| RuleValue { verdict: rule.verdict, service: rule.service };
        self.rules.iter().map(|(address, rule)| (Destination::from(*address), value(rule))).collect()
    }

    /// Puts the listeners of the kernel path there: `service` gives their index. What `[::]` takes of IPv4 stays with the
    /// proxy: an application's IPv4 socket can't be connected to the endpoints of an IPv6 service.
    #[must_use]
    pub fn balanced(mut self, service: impl Fn(&str) -> Option<u32>) -> Self {
        let widened: HashSet<_> = self
            .rules
            .iter()
            .filter(|(address, _)| address.ip() == Ipv6Addr::UNSPECIFIED)
            .map(|(address, rule)| (address.port(), Arc::clone(&rule.listener)))
            .collect();
        for (address, rule) in self.rules.iter_mut().filter(|(_, rule)| rule.verdict == Verdict::Capture) {
            let is_widened = address.ip() == Ipv4Addr::UNSPECIFIED
                && widened.contains(&(address.port(), Arc::clone(&rule.listener)));
            if let Some(service) = service(&rule.listener).filter(|_| !is_widened) {
                (rule.verdict, rule.service) = (Verdict::Balance, service);
            }
        }
        self
    }

    fn add(&mut self, address: SocketAddr, verdict: Verdict, listener: &Arc<str>) {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if address.port() != 0 {
            let rule = Rule { verdict, service: 0, listener: Arc::clone(listener) };
            self.rules.entry(address).or_insert(rule);
        }
    }

    /// `[::]:port` answers for IPv4 too, where nobody has `0.0.0.0:port`.
    fn widen_ipv6_wildcards(&mut self) {
        let wildcards = self.rules.iter().filter(|(address, _)| address.ip() == Ipv6Addr::UNSPECIFIED);
        for (address, rule) in wildcards.map(|(a, r)| (*a, r.clone())).collect::<Vec<_>>() {
            self.rules.entry(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())).or_insert(rule);
        }
    }

    /// The listener that a captured connection arrives on: its chains decide about what no other listener owns.
    fn add_catch_all(&mut self, listener: &Listener, black_hole: bool) {
        let name = &listener.name;
        // A chain that matches everything hides the default chain.
        let (all, some): (Vec<_>, Vec<_>) =
            listener.filter_chains.iter().partition(|chain| chain.matches == FilterChainMatch::default());
        let last = all.first().copied().or(listener.default_filter_chain.as_ref());
        let last = last.map(|chain| leads([chain], black_hole));
        let some: Vec<_> = some
            .into_iter()
            .map(|chain| (exact_destinations(&chain.matches), leads([chain], black_hole)))
            // Refused whether it matches or not.
            .filter(|(exact, leads)| {
                exact.is_some() || last != Some(Leads::Nowhere) || *leads != Leads::Nowhere
            })
            .collect();
        // The kernel can't tell which connections such a chain takes: the proxy has to look at each.
        let undecidable = some.iter().any(|(exact, _)| exact.is_none());
        self.everything_else = match last {
            _ if undecidable => EverythingElse::Captured(Arc::clone(name)),
            None => EverythingElse::Passes,
            Some(Leads::Nowhere) => EverythingElse::Refused(Arc::clone(name)),
            Some(Leads::ToProxy) => EverythingElse::Captured(Arc::clone(name)),
        };
        // A virtual listener that owns a port of every address comes before the chains.
        let owned: HashSet<_> =
            self.rules.keys().filter(|address| address.ip().is_unspecified()).map(wildcard_key).collect();
        for (exact, leads) in some.into_iter().filter(|_| !undecidable) {
            for address in
                exact.into_iter().flatten().filter(|address| !owned.contains(&wildcard_key(address)))
            {
                self.add(address, leads.verdict(), name);
            }
        }
    }
}

/// One line for each rule, then one for the rest; for the start-up log.
impl fmt::Display for Destinations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (address, Rule { verdict, listener, .. }) in &self.rules {
            match verdict {
                Verdict::Refuse => {
                    writeln!(f, "refuses {address} (listener {listener} leads to {BLACK_HOLE})")?;
                }
                Verdict::Balance => writeln!(f, "balances {address} in the kernel -> listener {listener}")?,
                _ => writeln!(f, "captures {address} -> listener {listener}")?,
            }
        }
        match &self.everything_else {
            EverythingElse::Passes => f.write_str("everything else: passes untouched"),
            EverythingElse::Captured(listener) => {
                write!(f, "everything else: captured -> listener {listener}")
            }
            EverythingElse::Refused(listener) => {
                write!(f, "everything else: refused (listener {listener} leads to {BLACK_HOLE})")
            }
        }
    }
}

/// Family and port.
fn wildcard_key(address: &SocketAddr) -> (bool, u16) {
    (address.is_ipv4(), address.port())
}

/// A cluster that can only refuse. One without that shape is the proxy's business, whatever its name.
pub fn is_black_hole(cluster: &Cluster) -> bool {
    let empty = cluster.load_assignment.localities.iter().all(|locality| locality.endpoints.is_empty());
    &*cluster.name == BLACK_HOLE && cluster.discovery == Discovery::Static && empty
}

/// Where these chains lead together.
fn leads<'a>(chains: impl IntoIterator<Item = &'a Arc<FilterChain>>, black_hole: bool) -> Leads {
    let mut chains = chains.into_iter().peekable();
    let refuses = |proxy: &TcpProxy| match &proxy.clusters {
        ClusterChoice::Single(name) => &**name == BLACK_HOLE,
        ClusterChoice::Weighted(all) => all.iter().all(|weighted| &*weighted.name == BLACK_HOLE),
    };
    let all_refuse = chains.peek().is_some()
        && chains.all(|chain| match &chain.terminal {
            Some(Terminal::TcpProxy(proxy)) => refuses(proxy),
            Some(Terminal::HttpAsTcp(routing)) => {
                let mut hosts = routing.virtual_hosts.iter().peekable();
                hosts.peek().is_some() && hosts.all(|host| host.proxy.as_deref().is_some_and(refuses))
            }
            // An empty chain closes the connection after it was accepted; routes from RDS can change.
            None | Some(Terminal::HttpFromRds(_)) => false,
        });
    if black_hole && all_refuse { Leads::Nowhere } else { Leads::ToProxy }
}

/// The destinations that a chain takes, if its match is about nothing else and they can be listed: a port, or single
/// addresses with a port.
fn exact_destinations(matches: &FilterChainMatch) -> Option<Vec<SocketAddr>> {
    let FilterChainMatch { destination_port, prefix_ranges, .. } = matches;
    let only = FilterChainMatch {
        destination_port: *destination_port,
        prefix_ranges: prefix_ranges.clone(),
        ..FilterChainMatch::default()
    };
    let port = (*destination_port).filter(|_| *matches == only)?;
    if prefix_ranges.is_empty() {
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        return Some(any.map(|ip| SocketAddr::new(ip, port)).into());
    }
    prefix_ranges
        .iter()
        .map(|range| {
            let bits = if range.address.is_ipv4() { 32 } else { 128 };
            (range.prefix_len == bits).then(|| SocketAddr::new(range.address, port))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::cluster::{Dns, LbPolicy, LookupFamily, Thresholds};
    use crate::config::endpoint::{
        ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, LocalityLbEndpoints,
    };
    use crate::config::listener::Cidr;
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
            load_assignment: ClusterLoadAssignment {
                localities: vec![locality],
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
            tcp_fast_open_queue_length: None,
            max_connections_to_accept_per_socket_event: None,
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
        let rules = Destinations::of(&listeners, black_hole(&clusters)).balanced(|name| {
            ["one", "any", "black"].iter().position(|it| *it == name).map(|at| at as u32 + 1)
        });
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
        let lines =
            explain(vec![virtual_outbound(vec![to("BlackHoleCluster")], Some(to("PassthroughCluster")))]);
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
        let lines = explain(vec![virtual_outbound(
            vec![on(sources, "BlackHoleCluster")],
            Some(to("BlackHoleCluster")),
        )]);
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
            let got = Destinations::of(&listeners, black_hole(&clusters()))
                .rules
                .into_values()
                .next()
                .unwrap()
                .verdict;
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
}
