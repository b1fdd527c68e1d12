//! Original destinations, virtual listeners, load balancing, cluster choice.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{self, Echo, Pause, Read, ReadToEnd, ShutdownWrite, Write};
use tidegate_tests::script::write;

use super::super::case::{Case, Client, Comparison, OUTSIDE, access_log, socket_address};

pub(super) fn cases() -> Vec<Case> {
    let ask = || vec![write("hello"), ShutdownWrite, ReadToEnd];
    let asks = |case: Case, times: usize| (0..times).fold(case, |case, _| case.does(ask()));
    vec![
        // The capture listeners that the other cases of this file share.
        capture("direct connection to the capture port")
            .client(Client::new([ReadToEnd]).to(&format!("{OUTSIDE}:15001"))),
        Case::new("original destination: exact virtual listener")
            .serves([Echo])
            .listener(json!({"bind_to_port": false, "address": socket_address("172.16.0.1", 50_001)}))
            .client(Client::new(ask()).captured("172.16.0.1:50001")),
        Case::new("original destination: wildcard virtual listener")
            .serves([Echo])
            .listener(json!({"bind_to_port": false, "address": socket_address("0.0.0.0", 50_002)}))
            .client(Client::new(ask()).captured("172.16.0.2:50002"))
            .client(Client::new(ask()).captured("172.16.0.3:50002")),
        Case::new("original destination: the exact one before the wildcard")
            .serves([Echo])
            .listener(json!({"bind_to_port": false, "address": socket_address("172.16.0.4", 50_002)}))
            .client(Client::new(ask()).captured("172.16.0.4:50002")),
        Case::new("original destination: chains by prefix on a wildcard listener")
            .serves([Echo])
            .listener(json!({"bind_to_port": false, "address": socket_address("0.0.0.0", 50_003)}))
            .chains(json!([
                {"name": "by prefix", "filters": ["@TCP_PROXY@"],
                 "filter_chain_match": {"prefix_ranges": [{"address_prefix": "172.16.0.5", "prefix_len": 32}]}},
                {"name": "by port", "filters": ["@TCP_PROXY@"], "filter_chain_match": {"destination_port": 50_003}},
            ]))
            .client(Client::new(ask()).captured("172.16.0.5:50003"))
            .client(Client::new(ask()).captured("172.16.0.6:50003")),
        Case::new("original destination: no chain of the virtual listener matches")
            .listener(json!({"bind_to_port": false, "address": socket_address("172.16.0.7", 50_004)}))
            .chains(json!([{"filters": ["@TCP_PROXY@"], "filter_chain_match": {"source_ports": [1]}}]))
            .client(Client::new([ReadToEnd]).captured("172.16.0.7:50004")),
        Case::new("original destination: IPv6")
            .serves([Echo])
            .listener(json!({"bind_to_port": false, "address": socket_address("fd00:172::1", 50_001)}))
            .client(Client::new(ask()).captured("[fd00:172::1]:50001")),
        Case::new("a black hole")
            .listener(json!({"bind_to_port": false, "address": socket_address("172.16.0.8", 50_005)}))
            .client(Client::new([ReadToEnd]).captured("172.16.0.8:50005")),
        Case::new("an inspector on a virtual listener")
            .serves([ReadToEnd])
            .listener(json!({
                "bind_to_port": false,
                "address": socket_address("172.16.0.9", 50_006),
                "listener_filters": [{"name": "envoy.filters.listener.tls_inspector", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}}],
            }))
            .chains(json!([
                {"name": "sni", "filters": ["@TCP_PROXY@"], "filter_chain_match": {"server_names": ["a.example.com"]}},
                {"name": "rest", "filters": ["@TCP_PROXY@"]},
            ]))
            .client(
                Client::new([
                    Write(crate::parity::hello::client_hello(Some("a.example.com"), &[])),
                    Pause(150),
                    ShutdownWrite,
                    ReadToEnd,
                ])
                .captured("172.16.0.9:50006"),
            )
            .client(
                Client::new([write("hello"), Pause(150), ShutdownWrite, ReadToEnd]).captured("172.16.0.9:50006"),
            ),
        pass_through(),
        Case::new("additional addresses")
            .serves([Echo])
            .listener(json!({"additional_addresses": [{"address": socket_address("127.0.0.1", 9_001)}]}))
            .does(ask())
            .client(Client::new(ask()).to("127.0.0.1:9001")),
        asks(
            Case::new("round robin: equal shares").serves([Echo]).serves([Echo]).serves([Echo]),
            12,
        )
        .compare(Comparison::Shares),
        asks(
            Case::new("weighted clusters: both are used")
                .serves([Echo])
                .tcp_proxy(json!({
                    "cluster": null,
                    "weighted_clusters": {"clusters": [
                        {"name": "weighted-a", "weight": 1}, {"name": "weighted-b", "weight": 1},
                    ]},
                }))
                .also_cluster(empty("weighted-a"))
                .also_cluster(empty("weighted-b")),
            40,
        )
        .compare(Comparison::Distinct)
        .ignore(&["end", "rx", "downstream_wire_rx", "downstream_cx_rx_bytes_total"]),
        asks(
            Case::new("LEAST_REQUEST").serves([Echo]).cluster(json!({"lb_policy": "LEAST_REQUEST"})),
            2,
        ),
        asks(Case::new("RANDOM").serves([Echo]).cluster(json!({"lb_policy": "RANDOM"})), 2),
        Case::new("least request avoids the busy endpoint")
            .serves([Echo])
            .serves([Echo])
            .cluster(json!({"lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 30}}))
            .client(
                Client::new([write("a"), Read(1)]).meanwhile(
                    Client::new([write("b"), Read(1)]).meanwhile(
                        Client::new([write("c"), Read(1)])
                            .meanwhile(Client::new([write("d"), Read(1)]), [ShutdownWrite, ReadToEnd]),
                        [ShutdownWrite, ReadToEnd],
                    ),
                    [ShutdownWrite, ReadToEnd],
                ),
            )
            .compare(Comparison::Shares),
        Case::new("listener connection limit")
            .serves([Echo])
            .runtime(json!({"envoy.resource_limits.listener.limited.connection_limit": 1}))
            .listener(json!({"name": "limited"}))
            .client(Client::new([write("a"), Read(1)]).meanwhile(Client::new([ReadToEnd]), ends())),
        typed_struct(),
    ]
}

fn ends() -> [Step; 2] {
    [ShutdownWrite, ReadToEnd]
}

/// Capture listeners on port 15001, as Istio lays them out: a chain that catches direct connections, and one
/// that passes everything else through.
fn capture(name: &'static str) -> Case {
    let listener = |name: &str, address: &str| {
        json!({
            "name": name,
            "traffic_direction": "OUTBOUND",
            "address": socket_address(address, 15_001),
            "use_original_dst": true,
            "filter_chains": [
                {"name": "virtualOutbound-blackhole", "filter_chain_match": {"destination_port": 15_001},
                 "filters": [tcp_proxy("BlackHoleCluster")]},
                {"name": "virtualOutbound-catchall-tcp", "filters": [tcp_proxy("PassthroughCluster")]},
            ],
        })
    };
    Case::new(name)
        .no_listener()
        .log("BlackHoleCluster.log")
        .also_listener(listener("virtualOutbound", "0.0.0.0"))
        .also_listener(listener("virtualOutbound6", "::"))
        .also_cluster(empty("BlackHoleCluster"))
        .also_cluster(json!({
            "name": "PassthroughCluster", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "0.5s",
        }))
}

/// Reads the access log of the capture listeners' chains as its own.
fn pass_through() -> Case {
    let ask = || vec![Read(8), write("hello"), ShutdownWrite, ReadToEnd];
    Case::new("pass-through, IPv4 and IPv6, and to where nobody answers")
        .no_listener()
        .log("PassthroughCluster.log")
        .client(Client::new(ask()).captured(&format!("{OUTSIDE}:7777")))
        .client(Client::new(ask()).captured("[fd00:9::9]:7777"))
        .client(Client::new([ReadToEnd]).captured(&format!("{OUTSIDE}:7778")))
        .client(Client::new([ReadToEnd]).captured("10.9.9.9:7777"))
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
            "access_log": [access_log(&format!("{cluster}.log"))],
        },
    })
}

fn empty(name: &str) -> Value {
    json!({"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name}})
}

/// The tcp_proxy wrapped in a TypedStruct, as Istio's EnvoyFilters write it.
fn typed_struct() -> Case {
    Case::new("a tcp_proxy inside a TypedStruct")
        .serves([Echo])
        .also_cluster(empty("typed-struct"))
        .chains(json!([{"filters": [{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/xds.type.v3.TypedStruct",
                "type_url": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "value": {"stat_prefix": "typed-struct", "cluster": "typed-struct"},
            },
        }]}]))
        .does([ReadToEnd])
}
