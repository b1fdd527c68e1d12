#![allow(clippy::needless_pass_by_value)] // fields are built in place

use std::net::Ipv6Addr;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::access_log::{FlushSettings, Registry};
use crate::config::proto::Source;
use crate::config::{Sources, load, static_options};
use crate::stats::Stats;

pub(super) const LISTENER: &str = "/static_resources/listeners/1";
pub(super) const CHAIN: &str = "/static_resources/listeners/1/filter_chains/0";
const PROXY: &str = "/static_resources/listeners/1/filter_chains/0/filters/0/typed_config";
pub(in crate::kernel_path) const CLUSTER: &str = "/static_resources/clusters/0";

pub(super) fn address(ip: &str, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

fn filter(name: &str, message: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/{message}").into();
    json!({"name": name, "typed_config": config})
}

pub(super) fn tcp_proxy(cluster: &str) -> Value {
    filter(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({"stat_prefix": "p", "cluster": cluster, "idle_timeout": "0s"}),
    )
}

pub(super) fn data_path(mode: &str) -> Value {
    let typed = filter("", "tidegate.cluster.v1.DataPath", json!({"mode": mode}))["typed_config"].clone();
    json!({"typed_filter_metadata": {"tidegate.data_path": typed}})
}

fn endpoint(ip: &str, fields: Value) -> Value {
    let mut endpoint = json!({"endpoint": {"address": address(ip, 80)}});
    merge(&mut endpoint, fields);
    endpoint
}

pub(super) fn cluster(name: &str, mode: &str) -> Value {
    json!({
        "name": name,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint("10.0.0.1", json!({}))]}]},
        "metadata": data_path(mode),
    })
}

/// Sets these fields; null removes one.
pub(in crate::kernel_path) fn merge(base: &mut Value, fields: Value) {
    for (key, value) in fields.as_object().unwrap() {
        if value.is_null() {
            base.as_object_mut().unwrap().remove(key);
        } else {
            base[key] = value.clone();
        }
    }
}

/// Nothing stands in the way of listener `l`.
pub(in crate::kernel_path) fn clear() -> Value {
    json!({"static_resources": {
        "listeners": [
            {"name": "virtualOutbound", "address": address("127.0.0.1", 15001), "use_original_dst": true,
             "filter_chains": [{"filters": [tcp_proxy("c")]}]},
            {"name": "l", "address": address("172.16.0.1", 50001), "bind_to_port": false,
             "traffic_direction": "OUTBOUND", "filter_chains": [{"name": "f", "filters": [tcp_proxy("c")]}]},
        ],
        "clusters": [cluster("c", "AUTO"), cluster("d", "AUTO")],
    }})
}

/// The same with these fields of one part set.
pub(super) fn with(at: &str, fields: Value) -> Value {
    let mut bootstrap = clear();
    merge(bootstrap.pointer_mut(at).unwrap(), fields);
    bootstrap
}

pub(in crate::kernel_path) fn snapshot(bootstrap: &Value) -> Snapshot {
    let text = serde_json::to_string_pretty(bootstrap).unwrap();
    let sources = Sources { config_path: Some(Source::yaml("test.yaml", text)), config_yaml: None };
    let loaded = load(&sources, &static_options()).unwrap_or_else(|error| panic!("{error}\n{bootstrap:#}"));
    let stats = Stats::new(1);
    let logs = Registry::start(&stats, FlushSettings::default()).unwrap();
    let listener = |it: &Arc<_>| Arc::new(Listener::build(it, &stats, &logs, None).unwrap());
    let cluster = |it: &Arc<_>| Cluster::build(Arc::clone(it), &stats, None);
    let bootstrap = loaded.bootstrap;
    Snapshot::build(
        bootstrap.listeners.iter().map(listener).collect(),
        bootstrap.clusters.iter().map(cluster).collect(),
    )
}

fn plan_in(snapshot: &Snapshot, default: DataPath) -> Result<Plan, Vec<Obstacle>> {
    plan(snapshot.listener("l").unwrap(), snapshot, default)
}

pub(super) fn plan_of(bootstrap: &Value) -> Result<Plan, Vec<Obstacle>> {
    plan_in(&snapshot(bootstrap), DataPath::Proxy)
}

fn of_cluster(obstacle: ClusterObstacle) -> Obstacle {
    Obstacle::Cluster { cluster: "c".into(), obstacle }
}

/// Exactly this stands in the way.
#[track_caller]
pub(super) fn blocked(bootstrap: &Value, obstacle: Obstacle) {
    let found = plan_of(bootstrap).map(|_| "no obstacle");
    assert_eq!(found, Err(vec![obstacle]), "{bootstrap:#}");
}

#[test]
fn a_plain_listener_has_a_plan() {
    let plan = plan_of(&clear()).unwrap();
    let [ChainPlan { listener, chain, proxy, clusters }] = &plan.chains[..] else { panic!("{plan:?}") };
    assert_eq!((&*listener.config.name, &*chain.config.name), ("l", "f"));
    assert_eq!(&*proxy.config.stat_prefix, "p");
    assert_eq!(plan.sources, [super::Sources { first: Ipv6Addr::UNSPECIFIED, chain: Some(0) }]);
    let [(cluster, 1)] = &clusters[..] else { panic!("{clusters:?}") };
    assert_eq!(&**cluster.name(), "c");
}

/// What looks as if it were in the way, and is not.
#[test]
fn what_is_no_obstacle() {
    let log = json!([{"name": "envoy.access_loggers.stdout", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"}}]);
    let two = |weights: [u32; 2]| {
        let endpoints = weights
            .map(|weight| endpoint(&format!("10.0.0.{weight}"), json!({"load_balancing_weight": weight})));
        json!({"cluster_name": "c", "endpoints": [{"lb_endpoints": endpoints}]})
    };
    let weighted = json!({"clusters": [{"name": "c", "weight": 3}, {"name": "d", "weight": 1}]});
    for (at, fields) in [
        (PROXY, json!({"access_log": log})),
        (LISTENER, json!({"access_log": log})),
        // Without a log there is nothing to flush.
        (PROXY, json!({"access_log_options": {"flush_access_log_on_start": true}})),
        (PROXY, json!({"cluster": null, "weighted_clusters": weighted})),
        (PROXY, json!({"hash_policy": [{"source_ip": {}}]})),
        (LISTENER, json!({"use_original_dst": true})),
        (LISTENER, json!({"additional_addresses": [{"address": address("172.16.0.2", 50001)}]})),
        (LISTENER, json!({"address": address("0.0.0.0", 50001)})),
        (LISTENER, json!({"address": address("::ffff:172.16.0.1", 50001)})),
        (LISTENER, json!({"traffic_direction": null})),
        (
            CHAIN,
            json!({"filter_chain_match": {"destination_port": 50001, "prefix_ranges": [
            {"address_prefix": "172.16.0.0", "prefix_len": 12}]}}),
        ),
        (CLUSTER, json!({"load_assignment": two([1, 2])})),
        (CLUSTER, json!({"load_assignment": two([2, 2]), "lb_policy": "LEAST_REQUEST"})),
        (CLUSTER, json!({"lb_policy": "RANDOM"})),
        (CLUSTER, json!({"lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 8}})),
        (CLUSTER, json!({"load_assignment": null, "type": "STRICT_DNS"})),
        (
            CLUSTER,
            json!({"outlier_detection": {}, "health_checks": [{"timeout": "1s", "interval": "1s",
            "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}]}),
        ),
        (
            CLUSTER,
            json!({"circuit_breakers": {"thresholds": [{"max_connections": 1, "max_pending_requests": 1}]}}),
        ),
        (
            CLUSTER,
            json!({"common_lb_config": {"healthy_panic_threshold": {"value": 10},
            "locality_weighted_lb_config": {}}}),
        ),
    ] {
        let bootstrap = with(at, fields);
        assert_eq!(plan_of(&bootstrap).map(|_| ()), Ok(()), "{bootstrap:#}");
    }
}

#[test]
fn who_wants_it() {
    use DataPath::{Auto, Kernel, Proxy};
    let wants = |modes: [Option<&str>; 2], default| {
        let mut bootstrap = clear();
        for (cluster, mode) in
            bootstrap["static_resources"]["clusters"].as_array_mut().unwrap().iter_mut().zip(modes)
        {
            merge(cluster, json!({"metadata": mode.map(data_path)}));
        }
        let weighted = json!({"clusters": [{"name": "c", "weight": 3}, {"name": "d", "weight": 1}]});
        merge(bootstrap.pointer_mut(PROXY).unwrap(), json!({"cluster": null, "weighted_clusters": weighted}));
        plan_in(&snapshot(&bootstrap), default).map(|plan| plan.chains[0].clusters.len())
    };
    assert_eq!(wants([None, None], Proxy), Err(vec![Obstacle::NotWanted]));
    assert_eq!(wants([None, None], Auto), Ok(2));
    assert_eq!(wants([None, None], Kernel), Ok(2));
    assert_eq!(wants([Some("PROXY"), Some("PROXY")], Kernel), Err(vec![Obstacle::NotWanted]));
    assert_eq!(wants([Some("KERNEL"), Some("AUTO")], Proxy), Ok(2));
    assert_eq!(wants([Some("KERNEL"), None], Proxy), Err(vec![Obstacle::MixedDataPath]));
    assert_eq!(wants([Some("PROXY"), None], Auto), Err(vec![Obstacle::MixedDataPath]));
}

#[test]
fn what_is_not_wanted_says_nothing_else() {
    let mut bootstrap = with(PROXY, json!({"max_connect_attempts": 3, "idle_timeout": null}));
    merge(bootstrap.pointer_mut(CLUSTER).unwrap(), json!({"metadata": null}));
    blocked(&bootstrap, Obstacle::NotWanted);
    let http = with(
        CHAIN,
        json!({"filters": [http_connection_manager(json!({"rds": {"route_config_name": "r",
        "config_source": {"path_config_source": {"path": "/dev/null"}}}}))]}),
    );
    blocked(&http, Obstacle::NotWanted);
}

fn http_connection_manager(routes: Value) -> Value {
    let router =
        filter("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}));
    let mut config = json!({"stat_prefix": "h", "http_filters": [router]});
    merge(&mut config, routes);
    filter(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

#[test]
fn listeners() {
    let inspector = |kind: &str, message: &str| {
        let message = format!("envoy.extensions.filters.listener.{kind}.v3.{message}");
        json!([filter(&format!("envoy.filters.listener.{kind}"), &message, json!({}))])
    };
    let filter_of = |filter, listener: &str| Obstacle::ListenerFilter { filter, listener: listener.into() };
    for (kind, message) in [
        ("tls_inspector", "TlsInspector"),
        ("http_inspector", "HttpInspector"),
        ("proxy_protocol", "ProxyProtocol"),
    ] {
        let filters = json!({"listener_filters": inspector(kind, message)});
        blocked(&with(LISTENER, filters.clone()), filter_of(kind, "l"));
        blocked(&with("/static_resources/listeners/0", filters), filter_of(kind, "virtualOutbound"));
    }
    blocked(&with(LISTENER, json!({"bind_to_port": true})), Obstacle::NotVirtual);
    blocked(&with(LISTENER, json!({"traffic_direction": "INBOUND"})), Obstacle::NotVirtual);
    blocked(&with(LISTENER, json!({"tcp_keepalive": {"keepalive_time": 5}})), Obstacle::ListenerKeepalive);
    blocked(&with(LISTENER, json!({"address": address("172.16.0.1", 0)})), {
        Obstacle::NoPort("172.16.0.1:0".parse().unwrap())
    });
    let mut limited = clear();
    limited["layered_runtime"] = json!({"layers": [{"name": "s", "static_layer": {
        "envoy.resource_limits.listener.l.connection_limit": 5}}]});
    blocked(&limited, Obstacle::ConnectionLimit(5));
}

#[test]
fn filter_chains() {
    for (field, value) in [
        ("server_names", json!(["a.example"])),
        ("transport_protocol", json!("tls")),
        ("application_protocols", json!(["h2"])),
        ("source_ports", json!([7])),
    ] {
        blocked(&with(CHAIN, json!({"filter_chain_match": {field: value}})), Obstacle::ChainMatch(field));
    }
    let prefix = json!({"filter_chain_match": {"prefix_ranges": [{"address_prefix": "172.16.0.1", "prefix_len": 32}]}});
    let wildcard = |address| {
        let mut bootstrap = with(CHAIN, prefix.clone());
        merge(bootstrap.pointer_mut(LISTENER).unwrap(), address);
        bootstrap
    };
    blocked(&wildcard(json!({"address": address("0.0.0.0", 50001)})), Obstacle::ChainMatch("prefix_ranges"));
    let unmatched = wildcard(json!({"address": address("172.16.0.9", 50001)}));
    blocked(&unmatched, Obstacle::NoChain("172.16.0.9:50001".parse().unwrap()));
    blocked(
        &wildcard(json!({
            "additional_addresses": [{"address": address("172.16.0.2", 50001)}],
            "default_filter_chain": {"name": "other", "filters": [tcp_proxy("c")]},
        })),
        Obstacle::DifferentChains,
    );
    blocked(&with(CHAIN, json!({"filters": []})), Obstacle::NotWanted);
    let empty = snapshot(&with(CHAIN, json!({"filters": []})));
    assert_eq!(plan_in(&empty, DataPath::Kernel).map(|_| ()), Err(vec![Obstacle::EmptyChain("f".into())]));
    let routes = json!({"route_config": {"name": "r", "virtual_hosts": [
        {"name": "v", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]}]}});
    let http = snapshot(&with(CHAIN, json!({"filters": [http_connection_manager(routes)]})));
    let found = plan_in(&http, DataPath::Proxy).map(|_| ()).unwrap_err();
    assert_eq!(found, [Obstacle::HttpChain("f".into())]);
}

#[test]
fn tcp_proxies() {
    let log = |format: &str| {
        json!([{"name": "envoy.access_loggers.stdout", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": {"a": ["x %BYTES_SENT%", {"b": format}]}}}}])
    };
    for (fields, obstacle) in [
        (json!({"idle_timeout": null}), Obstacle::IdleTimeout(Duration::from_hours(1))),
        (json!({"idle_timeout": "5s"}), Obstacle::IdleTimeout(Duration::from_secs(5))),
        (json!({"max_connect_attempts": 2}), Obstacle::ConnectAttempts(2)),
        (
            json!({"max_downstream_connection_duration": "60s"}),
            Obstacle::ConnectionDuration(Duration::from_mins(1)),
        ),
        (
            json!({"access_log": log("%DURATION%"), "access_log_options": {"access_log_flush_interval": "1s"}}),
            Obstacle::EarlyLog("access_log_flush_interval"),
        ),
        (
            json!({"access_log": log("%DURATION%"), "access_log_options": {"flush_access_log_on_connected": true}}),
            Obstacle::EarlyLog("flush_access_log_on_connected"),
        ),
        (
            json!({"access_log": log("%DURATION%"), "access_log_options": {"flush_access_log_on_start": true}}),
            Obstacle::EarlyLog("flush_access_log_on_start"),
        ),
        (
            json!({"access_log": log("%UPSTREAM_TRANSPORT_FAILURE_REASON%")}),
            Obstacle::LogOperator("UPSTREAM_TRANSPORT_FAILURE_REASON"),
        ),
    ] {
        blocked(&with(PROXY, fields), obstacle);
    }
    blocked(
        &with(LISTENER, json!({"access_log": log("%DOWNSTREAM_DIRECT_LOCAL_PORT%")})),
        Obstacle::LogOperator("DOWNSTREAM_DIRECT_LOCAL_PORT"),
    );
    let weighted: Vec<Value> = (0..17).map(|_| json!({"name": "c", "weight": 1})).collect();
    blocked(
        &with(PROXY, json!({"cluster": null, "weighted_clusters": {"clusters": weighted}})),
        Obstacle::TooManyClusters(17),
    );
}

#[test]
fn kernel_waives_what_is_soft_and_nothing_else() {
    let log = json!([{"name": "envoy.access_loggers.stdout", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
        "log_format": {"text_format_source": {"inline_string": "%BYTES_RETRANSMITTED%\n"}}}}]);
    let of = |mode: &str, attempts: u32| {
        let mut bootstrap =
            with(PROXY, json!({"idle_timeout": null, "access_log": log, "max_connect_attempts": attempts}));
        merge(bootstrap.pointer_mut(CLUSTER).unwrap(), json!({"metadata": data_path(mode)}));
        let closes = json!({"close_connections_on_host_health_failure": true});
        merge(bootstrap.pointer_mut(CLUSTER).unwrap(), closes);
        plan_of(&bootstrap).map(|_| ())
    };
    let soft = [
        Obstacle::IdleTimeout(Duration::from_hours(1)),
        Obstacle::LogOperator("BYTES_RETRANSMITTED"),
        of_cluster(ClusterObstacle::HealthFailureCloses),
    ];
    assert!(soft.iter().all(Obstacle::is_soft));
    assert_eq!(of("AUTO", 1), Err(soft.to_vec()));
    assert_eq!(of("KERNEL", 1), Ok(()));
    assert_eq!(of("KERNEL", 2), Err(vec![Obstacle::ConnectAttempts(2)]));
}

#[test]
fn clusters() {
    use ClusterObstacle as O;
    let removal = |action: &str| {
        let policy = filter("", "tidegate.cluster.v1.EndpointRemoval", json!({"action": action}));
        let mut metadata = data_path("AUTO");
        metadata["typed_filter_metadata"]["tidegate.endpoint_removal"] = policy["typed_config"].clone();
        json!({"metadata": metadata})
    };
    plan_of(&with(CLUSTER, removal("RESET"))).unwrap();
    let assignment = |localities: Vec<Value>| json!({"cluster_name": "c", "endpoints": localities});
    let weighted = [1, 2].map(|weight| endpoint("10.0.0.1", json!({"load_balancing_weight": weight})));
    let priorities: Vec<Value> = (0..9)
        .map(|priority| json!({"priority": priority, "lb_endpoints": [endpoint("10.0.0.1", json!({}))]}))
        .collect();
    let source_ip = json!({"connection_properties": {"source_ip": true}});
    let maglev = json!({"consistent_hashing_lb_config": {"hash_policy": [source_ip, source_ip]}});
    let maglev = filter("m", "envoy.extensions.load_balancing_policies.maglev.v3.Maglev", maglev);
    let twice = json!({"policies": [{"typed_extension_config": maglev}]});
    for (fields, obstacle) in [
        (
            json!({"lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 9}}),
            O::ChoiceCount(9),
        ),
        (
            json!({"lb_policy": "LEAST_REQUEST", "load_assignment": assignment(vec![json!({"lb_endpoints": weighted})])}),
            O::LeastRequestWeights,
        ),
        (
            json!({"lb_policy": "MAGLEV", "common_lb_config":
                {"consistent_hashing_lb_config": {"hash_balance_factor": 150}}}),
            O::HashBalanceFactor,
        ),
        (json!({"load_balancing_policy": twice}), O::HashPolicy),
        (
            json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 65_537}}),
            O::RingSize(65_537),
        ),
        (
            json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "load_assignment": null}),
            O::OriginalDst,
        ),
        (json!({"upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 5}}}), O::Keepalive),
        (json!({"upstream_bind_config": {"freebind": true}}), O::BindConfig),
        (removal("CLOSE"), O::RemovalCloses),
        (json!({"close_connections_on_host_health_failure": true}), O::HealthFailureCloses),
        (json!({"load_assignment": assignment(priorities)}), O::Priorities(9)),
        (
            json!({"load_assignment": assignment(vec![json!({"lb_endpoints": [endpoint("::1", json!({}))]})])}),
            O::Family { service: "172.16.0.1:50001".parse().unwrap(), endpoint: "[::1]:80".parse().unwrap() },
        ),
    ] {
        blocked(&with(CLUSTER, fields), of_cluster(obstacle));
    }
    blocked(
        &with(LISTENER, json!({"address": address("::", 50001)})),
        of_cluster(O::Family {
            service: "[::]:50001".parse().unwrap(),
            endpoint: "10.0.0.1:80".parse().unwrap(),
        }),
    );
}

/// What the configuration file may not say, and a control plane may.
#[test]
fn clusters_that_are_not_for_clients_or_not_there() {
    let mut snapshot = snapshot(&clear());
    let stats = Stats::new(1);
    let original = Arc::clone(snapshot.cluster("c").unwrap().config());
    let mut put = |change: fn(&mut config::cluster::Cluster)| {
        let mut config = config::cluster::Cluster::clone(&original);
        change(&mut config);
        snapshot.set_cluster(Cluster::build(Arc::new(config), &stats, None));
        plan_in(&snapshot, DataPath::Proxy).map(|_| ())
    };
    assert_eq!(put(|_| {}), Ok(()));
    assert_eq!(put(|cluster| cluster.has_pipes = true), Err(vec![of_cluster(ClusterObstacle::Pipe)]));
    assert_eq!(put(|cluster| cluster.tls = Some(any_tls())), Err(vec![of_cluster(ClusterObstacle::Tls)]));
    snapshot.remove_cluster("c");
    assert_eq!(
        plan_in(&snapshot, DataPath::Auto).map(|_| ()),
        Err(vec![of_cluster(ClusterObstacle::Missing)])
    );
}

/// Of a cluster for a control plane.
fn any_tls() -> Arc<config::tls::UpstreamTls> {
    let mut bootstrap = clear();
    let mut server = cluster("server", "AUTO");
    server["transport_socket"] = filter(
        "tls",
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        json!({"sni": "a", "auto_sni_san_validation": true,
            "common_tls_context": {"validation_context": {"trusted_ca": {"filename": "/ca.pem"}}}}),
    );
    bootstrap["static_resources"]["clusters"].as_array_mut().unwrap().push(server);
    bootstrap["dynamic_resources"] = json!({
        "ads_config": {"api_type": "GRPC", "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "server"}}]},
        "cds_config": {"ads": {}, "resource_api_version": "V3"},
    });
    let text = serde_json::to_string_pretty(&bootstrap).unwrap();
    let sources = Sources { config_path: Some(Source::yaml("test.yaml", text)), config_yaml: None };
    let loaded = load(&sources, &static_options()).unwrap();
    loaded.bootstrap.clusters[2].tls.clone().unwrap()
}

#[test]
fn the_black_hole_stays_one() {
    let mut bootstrap = clear();
    let mut black_hole = cluster("BlackHoleCluster", "KERNEL");
    merge(&mut black_hole, json!({"load_assignment": null}));
    bootstrap["static_resources"]["clusters"].as_array_mut().unwrap().push(black_hole);
    merge(bootstrap.pointer_mut(PROXY).unwrap(), json!({"cluster": "BlackHoleCluster"}));
    blocked(&bootstrap, Obstacle::BlackHole);
}

#[test]
fn every_obstacle_is_told() {
    let mut bootstrap = with(PROXY, json!({"max_connect_attempts": 2, "idle_timeout": "1s"}));
    merge(bootstrap.pointer_mut(LISTENER).unwrap(), json!({"tcp_keepalive": {}}));
    merge(bootstrap.pointer_mut(CLUSTER).unwrap(), json!({"close_connections_on_host_health_failure": true}));
    let found = plan_of(&bootstrap).map(|_| ()).unwrap_err();
    assert_eq!(
        found,
        [
            Obstacle::ListenerKeepalive,
            Obstacle::IdleTimeout(Duration::from_secs(1)),
            Obstacle::ConnectAttempts(2),
            of_cluster(ClusterObstacle::HealthFailureCloses),
        ]
    );
    for obstacle in found {
        let text = obstacle.to_string();
        assert!(text.len() < 200 && !text.ends_with('.'), "{text}");
    }
}
