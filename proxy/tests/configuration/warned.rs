//! What is accepted, with or without a warning, and what it then means.

use serde_json::{Value, json};
use tidegate::config::bootstrap::Exclusions;
use tidegate::config::cluster::{
    ClusterHashPolicy, ConsistentHashing, HashFunction, LbPolicy, Maglev, RingHash, Thresholds,
};
use tidegate::config::filter_chain::Terminal;
use tidegate::config::listener::{Cidr, ListenerFilter};
use tidegate::config::outlier::OutlierDetection;
use tidegate::config::route::HttpRouting;
use tidegate::config::tcp_proxy::ClusterChoice;

use super::build::*;

const F: &str = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";

fn routing(bootstrap: &Value) -> std::sync::Arc<HttpRouting> {
    let loaded = load_json(bootstrap).unwrap_or_else(|error| panic!("{error}"));
    match &loaded.bootstrap.listeners[0].filter_chains[0].terminal {
        Some(Terminal::HttpAsTcp(routing)) => routing.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn inactive_fields_are_named_once_with_a_count() {
    let clusters = ["a", "b", "c"].map(|name| with(cluster(name), json!({"preconnect_policy": {}})));
    warned(
        &bootstrap(vec![], clusters.into()),
        &[
            "static_resources.clusters[0].preconnect_policy: parsed, not active in this version (and 2 more like this)",
        ],
    );
}

#[test]
fn connections_are_balanced_over_workers_exactly_or_by_the_kernel() {
    let balance = |config: Value| {
        let loaded = load_json(&bootstrap(
            vec![with(listener("a", 1), json!({"connection_balance_config": config}))],
            vec![],
        ));
        let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
        (loaded.bootstrap.listeners[0].exact_balance, loaded.warnings.len())
    };
    assert_eq!(balance(json!({"exact_balance": {}})), (true, 0));
    assert_eq!(balance(json!({"cpu_locality_balance": {}})), (false, 1));
    let typed = json!({"@type": "type.googleapis.com/google.protobuf.Struct"});
    assert_eq!(balance(json!({"extend_balance": {"name": "x", "typed_config": typed}})), (false, 1));
}

#[test]
fn a_typed_struct_stands_for_the_message() {
    let url = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    let proxy =
        in_struct("any name", url, json!({"stat_prefix": "a", "cluster": "c", "maxConnectAttempts": 3}));
    let loaded = load_json(&filters(vec![proxy])).unwrap_or_else(|error| panic!("{error}"));
    let Some(Terminal::TcpProxy(proxy)) = &loaded.bootstrap.listeners[0].filter_chains[0].terminal else {
        panic!()
    };
    assert_eq!((&*proxy.stat_prefix, proxy.max_connect_attempts), ("a", 3));
}

#[test]
fn istio_filters_are_ignored_whatever_their_type() {
    let wasm = in_struct(
        "istio.stats",
        "type.googleapis.com/envoy.extensions.filters.network.wasm.v3.Wasm",
        json!({}),
    );
    let stats = extension("istio.stats", "stats.PluginConfig", json!({"disable_host_header_fallback": true}));
    let exchange = in_struct(
        "istio.metadata_exchange",
        "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange",
        json!({}),
    );
    let loaded = load_json(&filters(vec![wasm, stats, exchange, tcp_proxy(json!({}))]))
        .unwrap_or_else(|error| panic!("{error}"));
    let counts: Vec<_> = loaded.ignored_filters.into_iter().collect();
    assert_eq!(counts, [("istio.metadata_exchange".to_owned(), 1), ("istio.stats".to_owned(), 2)]);
    assert_eq!(loaded.bootstrap.listeners[0].filter_chains[0].ignored_filters.len(), 3);
}

#[test]
fn defaults_are_envoys() {
    let loaded = load_json(&one_listener(json!({"name": null}))).unwrap();
    let listener = &loaded.bootstrap.listeners[0];
    assert_eq!(&*listener.name, "127.0.0.1:10000");
    assert_eq!(listener.listener_filters_timeout.unwrap().as_secs(), 15);
    assert_eq!(listener.per_connection_buffer_limit_bytes, 1024 * 1024);
    assert!(listener.bind_to_port && listener.enable_reuse_port);
    let Some(Terminal::TcpProxy(proxy)) = &listener.filter_chains[0].terminal else { panic!() };
    assert_eq!((proxy.idle_timeout.unwrap().as_secs(), proxy.max_connect_attempts), (3600, 1));
    let cluster = &loaded.bootstrap.clusters[0];
    assert_eq!((cluster.connect_timeout.as_secs(), cluster.lb_policy), (5, LbPolicy::RoundRobin));
    assert_eq!(cluster.circuit_breakers, Thresholds { max_connections: 1024, max_pending_requests: 1024 });
}

#[test]
fn zero_turns_timeouts_off() {
    let listener = with(
        listener("l", 1),
        json!({"listener_filters_timeout": "0s", "filter_chains": [{"filters": [tcp_proxy(json!({"idle_timeout": "0s"}))]}]}),
    );
    let loaded = load_json(&bootstrap(vec![listener], vec![])).unwrap();
    let listener = &loaded.bootstrap.listeners[0];
    assert_eq!(listener.listener_filters_timeout, None);
    let Some(Terminal::TcpProxy(proxy)) = &listener.filter_chains[0].terminal else { panic!() };
    assert_eq!(proxy.idle_timeout, None);
}

#[test]
fn listener_spellings() {
    let inspector = extension(
        "t",
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        json!({"max_client_hello_size": 8192}),
    );
    let listener = json!({
        "deprecated_v1": {"bind_to_port": false},
        "use_original_dst": true,
        "additional_addresses": [{"address": address("::1", 10000)}, {"address": address("127.0.0.1", 10000)}],
        "listener_filters": [inspector],
    });
    let runtime = json!({"layers": [
        {"name": "a", "static_layer": {"envoy.resource_limits.listener.l.connection_limit": 5}},
        {"name": "b", "static_layer": {"envoy": {"resource_limits": {"listener": {"l": {"connection_limit": 7}}}}}},
    ]});
    let loaded = load_json(&with(one_listener(listener), json!({"layered_runtime": runtime}))).unwrap();
    let listener = &loaded.bootstrap.listeners[0];
    assert!(!listener.bind_to_port);
    assert_eq!(listener.addresses, ["127.0.0.1:10000".parse().unwrap(), "[::1]:10000".parse().unwrap()]);
    assert_eq!(listener.connection_limit, Some(7));
    assert_eq!(
        listener.listener_filters,
        [
            ListenerFilter::OriginalDst,
            ListenerFilter::TlsInspector {
                max_client_hello_size: 8192,
                close_connection_on_client_hello_parsing_errors: false
            }
        ]
    );
}

#[test]
fn hashing_load_balancers() {
    let policy = |cluster: serde_json::Value| {
        load_json(&one_cluster(cluster)).unwrap().bootstrap.clusters[0].lb_policy
    };
    let plain = ConsistentHashing::default();
    assert_eq!(
        policy(json!({"lb_policy": "MAGLEV"})),
        LbPolicy::Maglev(Maglev { table_size: 65_537, hashing: plain })
    );
    assert_eq!(
        policy(json!({"lb_policy": "RING_HASH"})),
        LbPolicy::RingHash(RingHash {
            minimum_ring_size: 1024,
            maximum_ring_size: 8 << 20,
            hash_function: HashFunction::XxHash,
            hashing: plain,
        })
    );
    let hashing = ConsistentHashing { hash_balance_factor: Some(150), ..plain };
    let common = json!({"consistent_hashing_lb_config": {"hash_balance_factor": 150}});
    assert_eq!(
        policy(
            json!({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 251}, "common_lb_config": common})
        ),
        LbPolicy::Maglev(Maglev { table_size: 251, hashing })
    );
    let ring = LbPolicy::RingHash(RingHash {
        minimum_ring_size: 5,
        maximum_ring_size: 7,
        hash_function: HashFunction::MurmurHash2,
        hashing,
    });
    let fields = json!({"minimum_ring_size": 5, "maximum_ring_size": 7, "hash_function": "MURMUR_HASH_2"});
    assert_eq!(
        policy(json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": fields, "common_lb_config": common})),
        ring
    );
    let typed = |kind: &str, fields| {
        let config = extension("x", &format!("envoy.extensions.load_balancing_policies.{kind}"), fields);
        policy(json!({"load_balancing_policy": {"policies": [{"typed_extension_config": config}]}}))
    };
    let mut fields = fields;
    fields["consistent_hashing_lb_config"] = json!({"hash_balance_factor": 150});
    assert_eq!(typed("ring_hash.v3.RingHash", fields), ring);
    let by_name = json!({"consistent_hashing_lb_config": {"use_hostname_for_hashing": true}});
    let named = ConsistentHashing { use_hostname_for_hashing: true, ..plain };
    assert_eq!(
        typed("maglev.v3.Maglev", by_name),
        LbPolicy::Maglev(Maglev { table_size: 65_537, hashing: named })
    );
    let source_ip = json!({"connection_properties": {"source_ip": true}});
    let header = json!({"header": {"header_name": "x"}});
    for (policies, hash_policy) in [
        (json!([]), ClusterHashPolicy::Unset),
        (json!([source_ip]), ClusterHashPolicy::SourceIp(1)),
        (json!([header, source_ip, source_ip]), ClusterHashPolicy::SourceIp(2)),
        (json!([header]), ClusterHashPolicy::Nothing),
    ] {
        let fields = json!({"table_size": 7, "consistent_hashing_lb_config": {"hash_policy": policies}});
        let hashing = ConsistentHashing { hash_policy, ..plain };
        assert_eq!(typed("maglev.v3.Maglev", fields), LbPolicy::Maglev(Maglev { table_size: 7, hashing }));
    }
}

#[test]
fn typed_load_balancing_policies() {
    let policy = |kind: &str, fields| {
        extension("x", &format!("envoy.extensions.load_balancing_policies.{kind}"), fields)
    };
    let policies = json!({"policies": [
        {"typed_extension_config": in_struct("new", "type.googleapis.com/envoy.not.Yet", json!({}))},
        {"typed_extension_config": policy("least_request.v3.LeastRequest", json!({"choice_count": 4}))},
    ]});
    let loaded =
        load_json(&one_cluster(json!({"lb_policy": "RANDOM", "load_balancing_policy": policies}))).unwrap();
    assert_eq!(
        loaded.bootstrap.clusters[0].lb_policy,
        LbPolicy::LeastRequest { choice_count: 4, active_request_bias: 1.0 }
    );
}

#[test]
fn the_lower_of_connections_and_requests_holds() {
    let breakers = json!({"thresholds": [
        {"priority": "HIGH", "max_connections": 1},
        {"max_connections": 100, "max_requests": 50, "max_pending_requests": 7, "max_retries": 4_294_967_295_u32},
        {"max_connections": 9},
    ]});
    let loaded = load_json(&one_cluster(json!({"circuit_breakers": breakers}))).unwrap();
    assert_eq!(
        loaded.bootstrap.clusters[0].circuit_breakers,
        Thresholds { max_connections: 50, max_pending_requests: 7 }
    );
}

#[test]
fn http_hosts_that_address_and_route_can_be_decided() {
    let weighted = json!({"name": "split", "match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [
        {"name": "c", "weight": 3}, {"name": "c", "weight": 0}, {"name": "d", "weight": 1}]}}});
    let listener = with(
        listener("l", 1),
        json!({"filter_chains": [{"filters": [http(vec![
            virtual_host("a", &["a.b", "10.0.0.1:80"], vec![weighted]),
            virtual_host("any", &["*"], vec![route("c")]),
        ])]}]}),
    );
    let bootstrap = bootstrap(vec![listener], vec![cluster("c"), cluster("d")]);
    warned(&bootstrap, &[]);
    let routing = routing(&bootstrap);
    let host = routing.virtual_host("10.0.0.1:80".parse().unwrap()).unwrap();
    let ClusterChoice::Weighted(clusters) = &host.proxy.as_ref().unwrap().clusters else {
        panic!("{host:?}")
    };
    let weights: Vec<_> = clusters.iter().map(|cluster| (&*cluster.name, cluster.weight)).collect();
    assert_eq!((&*host.route_name, weights), ("split", vec![("c", 3), ("d", 1)]));
}

#[test]
fn http_conditions_are_warnings_that_name_them() {
    let api = json!({"match": {"prefix": "/api"}, "route": {"cluster": "c"}});
    let header = json!({"match": {"prefix": "/", "headers": [{"name": "x", "present_match": true}]}, "route": {"cluster": "c"}});
    let bootstrap = filters(vec![http(vec![virtual_host("a", &["*"], vec![api, header, route("c")])])]);
    let at = format!("{F}.route_config.virtual_hosts[0].routes");
    let why = "can't be decided without reading HTTP: no connection takes this route";
    warned(&bootstrap, &[&format!("{at}[0].match.prefix: {why}"), &format!("{at}[1].match.headers: {why}")]);
    assert!(routing(&bootstrap).virtual_hosts[0].proxy.is_some());
}

#[test]
fn http_denials_close_the_virtual_host() {
    let deny = json!({"match": {"prefix": "/admin"}, "direct_response": {"status": 403}});
    let redirect = json!({"match": {"prefix": "/"}, "redirect": {"https_redirect": true}});
    let bootstrap = filters(vec![http(vec![
        virtual_host("denies", &["10.0.0.1"], vec![deny, route("c")]),
        virtual_host("redirects", &["10.0.0.2"], vec![redirect]),
        with(virtual_host("tls", &["10.0.0.3"], vec![route("c")]), json!({"require_tls": "ALL"})),
        virtual_host("none", &["*"], vec![]),
    ])]);
    let at = format!("{F}.route_config.virtual_hosts");
    warned(
        &bootstrap,
        &[
            &format!(
                "{at}[0].routes[0]: this route denies some requests, which can't be done without reading HTTP: the \
                 connections of the virtual host end with flag NR"
            ),
            &format!(
                "{at}[1].routes[0].redirect: can't be done without speaking HTTP: connections that take this route end \
                 with flag NR"
            ),
            &format!(
                "{at}[2].require_tls: virtual host \"tls\" redirects plaintext to TLS, which can't be done without \
                 reading HTTP: its connections end with flag NR"
            ),
            &format!(
                "{at}[3].routes: no route with `prefix: /` and without other conditions: connections of this virtual \
                 host end with flag NR"
            ),
        ],
    );
    assert!(routing(&bootstrap).virtual_hosts.iter().all(|host| host.proxy.is_none()));
}

#[test]
fn routes_from_xds_are_named_by_their_listener() {
    let base = http(vec![]);
    let file = json!({"path_config_source": {"path": "/etc/r.yaml"}, "resource_api_version": "V3"});
    let rds = json!({"route_config_name": "r", "config_source": file});
    let config = with(base["typed_config"].clone(), json!({"route_config": null, "rds": rds}));
    let bootstrap = filters(vec![with(base, json!({"typed_config": config}))]);
    warned(&bootstrap, &[]);
    let loaded = load_json(&bootstrap).unwrap_or_else(|error| panic!("{error}"));
    let Some(Terminal::HttpFromRds(rds)) = &loaded.bootstrap.listeners[0].filter_chains[0].terminal else {
        panic!()
    };
    assert_eq!(&*rds.route_config_name, "r");
}

#[test]
fn access_log_filters_that_tcp_can_not_evaluate() {
    let header = json!({"filter": {"header_filter": {"header": {"name": "x", "present_match": true}}}});
    let bootstrap = filters(vec![tcp_proxy(json!({"access_log": [access_log(header, json!({}))]}))]);
    warned(
        &bootstrap,
        &[&format!(
            "{F}.access_log[0].filter.header_filter: this filter can't be evaluated for TCP in this version: it lets every \
             entry through"
        )],
    );
}

#[test]
fn exclusions() {
    let exclude = json!({"cidrs": [{"address_prefix": "169.254.0.0", "prefix_len": 16}], "ports": [22]});
    let interception = extension("i", "tidegate.bootstrap.v1.Interception", json!({"exclude": exclude}));
    let bootstrap = with(bootstrap(vec![], vec![]), json!({"bootstrap_extensions": [interception]}));
    warned(&bootstrap, &[]);
    let exclude = load_json(&bootstrap).unwrap().bootstrap.interception.clone().unwrap().exclude;
    let network = Cidr { address: "169.254.0.0".parse().unwrap(), prefix_len: 16 };
    assert_eq!(exclude, Exclusions { cidrs: vec![network], ports: vec![22] });
}

#[test]
fn outlier_detection_has_envoys_defaults() {
    let of = |fields: Value| {
        let bootstrap = bootstrap(vec![], vec![with(cluster("c"), json!({"outlier_detection": fields}))]);
        warned(&bootstrap, &[]);
        load_json(&bootstrap).unwrap().bootstrap.clusters[0].outlier_detection.clone().unwrap()
    };
    assert_eq!(*of(json!({})), OutlierDetection::default());
    let seconds = std::time::Duration::from_secs;
    let long = of(json!({"base_ejection_time": "400s", "consecutive_5xx": 0, "always_eject_one_host": true}));
    assert_eq!((long.base_ejection_time, long.max_ejection_time), (seconds(400), seconds(400)));
    assert_eq!((long.consecutive_5xx, long.always_eject_one_host), (0, true));
    let split = of(json!({"split_external_local_origin_errors": true, "max_ejection_time_jitter": "2s"}));
    assert!(split.split_external_local_origin_errors);
    assert_eq!(split.max_ejection_time_jitter, seconds(2));
}

#[test]
fn outlier_detection_does_nothing_where_clients_choose() {
    let fields = json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "load_assignment": null, "outlier_detection": {}});
    let cluster = with(cluster("c"), fields);
    warned(
        &bootstrap(vec![], vec![cluster]),
        &[
            "static_resources.clusters[0].outlier_detection: no effect on a cluster of type ORIGINAL_DST, where clients choose the endpoint",
        ],
    );
}

#[test]
fn the_outlier_event_log_has_a_path() {
    let mut bootstrap = bootstrap(vec![], vec![]);
    bootstrap["cluster_manager"] =
        json!({"outlier_detection": {"event_log_path": "/dev/null"}, "local_cluster_name": "x"});
    warned(&bootstrap, &["cluster_manager.local_cluster_name: parsed, not active in this version"]);
    let path = load_json(&bootstrap).unwrap().bootstrap.outlier_event_log.unwrap();
    assert_eq!(path.to_str(), Some("/dev/null"));
}

#[test]
fn localities_are_weighted_where_that_is_asked_for() {
    let weighted = |fields: Value| {
        let bootstrap = bootstrap(vec![], vec![with(cluster("c"), fields)]);
        warned(&bootstrap, &[]);
        load_json(&bootstrap).unwrap().bootstrap.clusters[0].locality_weighted
    };
    let common = json!({"locality_weighted_lb_config": {}});
    let typed = |name: &str, fields: Value| {
        let message = format!("envoy.extensions.load_balancing_policies.{name}");
        json!({"policies": [{"typed_extension_config": extension("x", &message, fields)}]})
    };
    let plain = typed("round_robin.v3.RoundRobin", json!({}));
    let own = typed("random.v3.Random", json!({"locality_lb_config": common}));
    let wrr = typed("wrr_locality.v3.WrrLocality", json!({"endpoint_picking_policy": plain}));
    assert!(!weighted(json!({})));
    assert!(weighted(json!({"common_lb_config": common})));
    assert!(weighted(json!({"load_balancing_policy": own})));
    assert!(weighted(json!({"load_balancing_policy": wrr})));
    // A policy does not look at common_lb_config.
    assert!(!weighted(json!({"load_balancing_policy": plain, "common_lb_config": common})));
}
