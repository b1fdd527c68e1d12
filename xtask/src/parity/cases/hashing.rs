//! Consistent hashing: the same sources come to the same endpoints.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{Echo, Read, ReadToEnd, ShutdownWrite};
use tidegate_tests::script::write;

use super::super::case::{Case, Client, Endpoint};

/// Clients of a case, each with an address of its own. With three endpoints, chance agrees with Envoy for all of them
/// once in 3^24 runs.
const SOURCES: u8 = 24;

/// Connections at the same time from one address.
const CONNECTIONS: usize = 12;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = tables();
    cases.extend(membership());
    cases.extend(hashes());
    cases.push(nested(three(maglev("MAGLEV with hash_balance_factor")).cluster(balanced(100))));
    cases.push(nested(
        weighted(ring("RING_HASH with hash_balance_factor and weights")).cluster(balanced(130)),
    ));
    cases
}

/// What places endpoints.
fn tables() -> Vec<Case> {
    let murmur = json!({"ring_hash_lb_config":
        {"minimum_ring_size": 7, "maximum_ring_size": 20, "hash_function": "MURMUR_HASH_2"}});
    let by_name = || {
        let hashing = json!({"use_hostname_for_hashing": true});
        json!({"type": "STRICT_DNS", "common_lb_config": {"consistent_hashing_lb_config": hashing}})
    };
    vec![
        sources(three(ring("RING_HASH by source address"))),
        sources(three(maglev("MAGLEV by source address"))),
        sources(weighted(ring("RING_HASH with weights"))),
        sources(weighted(maglev("MAGLEV with weights"))),
        sources(weighted(ring("RING_HASH with MURMUR_HASH_2 and sizes")).cluster(murmur)),
        sources(
            weighted(maglev("MAGLEV with a small table"))
                .cluster(json!({"maglev_lb_config": {"table_size": 7}})),
        ),
        sources(named(ring("RING_HASH by hash_key and host name")).cluster(by_name())),
        sources(named(maglev("MAGLEV by hash_key and host name")).cluster(by_name())),
    ]
}

/// Which endpoints are placed.
fn membership() -> Vec<Case> {
    let healths = |case: Case, healths: &[&str]| {
        healths.iter().fold(case, |case, health| serves(case, json!({"health_status": health})))
    };
    let over = |case: Case| {
        let case = serves(serves(case, json!({})), json!({"health_status": "UNHEALTHY"}));
        serves(serves(case, json!({"priority": 1})), json!({"priority": 1}))
    };
    vec![
        sources(localities(ring("RING_HASH with weighted localities"))),
        sources(localities(maglev("MAGLEV with weighted localities"))),
        sources(over(ring("RING_HASH over priorities"))),
        sources(over(maglev("MAGLEV over priorities"))),
        sources(healths(maglev("MAGLEV in panic mode"), &["HEALTHY", "UNHEALTHY", "UNHEALTHY"])),
        sources(healths(maglev("MAGLEV without panic mode"), &["HEALTHY", "HEALTHY", "UNHEALTHY"])),
        sources(healths(maglev("MAGLEV with degraded endpoints"), &["HEALTHY", "HEALTHY", "DEGRADED"])),
        healths(ring("RING_HASH with degraded endpoints only"), &["DEGRADED", "DEGRADED"]).does([ReadToEnd]),
    ]
}

/// What is hashed.
fn hashes() -> Vec<Case> {
    let proxied = three(maglev("MAGLEV by the source of the PROXY protocol")).listener(json!({
        "listener_filters": [{"name": "envoy.filters.listener.proxy_protocol", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"}}],
    }));
    let says = |case: Case, header: &str| {
        case.does([write(&format!("{header}\r\nhello")), Read(5), ShutdownWrite, ReadToEnd])
    };
    let proxied = (0..SOURCES / 2).fold(proxied, |case, source| {
        let case = says(case, &format!("PROXY TCP4 192.0.2.{source} 192.0.2.8 1111 2222"));
        says(case, &format!("PROXY TCP6 2001:db8::{source:x} 2001:db8::8 1111 2222"))
    });
    let source_ip = json!([{"header": {"header_name": "x"}}, {"connection_properties": {"source_ip": true}}]);
    vec![
        proxied,
        sources(typed(
            "typed ring_hash",
            "ring_hash.v3.RingHash",
            json!({"minimum_ring_size": 64}),
            &source_ip,
        )),
        sources(typed("typed maglev", "maglev.v3.Maglev", json!({"table_size": 251}), &source_ip)),
    ]
}

fn ring(name: &'static str) -> Case {
    Case::new(name).cluster(json!({"lb_policy": "RING_HASH"})).tcp_proxy(source_ip())
}

fn maglev(name: &'static str) -> Case {
    Case::new(name).cluster(json!({"lb_policy": "MAGLEV"})).tcp_proxy(source_ip())
}

fn source_ip() -> Value {
    json!({"hash_policy": [{"source_ip": {}}]})
}

/// A policy with a hash policy of its own.
fn typed(name: &'static str, policy: &str, mut fields: Value, hash_policy: &Value) -> Case {
    fields["@type"] = json!(format!("type.googleapis.com/envoy.extensions.load_balancing_policies.{policy}"));
    fields["consistent_hashing_lb_config"] = json!({"hash_policy": hash_policy});
    three(Case::new(name)).cluster(json!({"load_balancing_policy": {"policies": [
        {"typed_extension_config": {"name": "typed", "typed_config": fields}},
    ]}}))
}

fn balanced(factor: u32) -> Value {
    json!({"common_lb_config": {"consistent_hashing_lb_config": {"hash_balance_factor": factor}}})
}

fn serves(case: Case, fields: Value) -> Case {
    case.endpoint(Endpoint::Serves(vec![Echo]), fields)
}

fn three(case: Case) -> Case {
    (0..3).fold(case, |case, _| serves(case, json!({})))
}

fn weighted(case: Case) -> Case {
    [1, 3, 7].iter().fold(case, |case, weight| serves(case, json!({"load_balancing_weight": weight})))
}

/// Addresses are their own names in clusters of type STRICT_DNS.
fn named(case: Case) -> Case {
    let key = |key: &str| json!({"metadata": {"filter_metadata": {"envoy.lb": {"hash_key": key}}}});
    let case = serves(serves(case, key("one")), json!({"endpoint": {"hostname": "two"}}));
    serves(case, json!({"endpoint": {"hostname": "three"}}))
}

/// One endpoint of zone a is unhealthy, and zone c has no weight.
fn localities(case: Case) -> Case {
    let case = case.cluster(json!({"common_lb_config": {"locality_weighted_lb_config": {}}}));
    [
        ("a", 2, "HEALTHY"),
        ("a", 2, "UNHEALTHY"),
        ("b", 3, "HEALTHY"),
        ("b", 3, "HEALTHY"),
        ("c", 0, "HEALTHY"),
    ]
    .iter()
    .fold(case, |case, (zone, weight, health)| {
        let mut group = json!({"locality": {"zone": zone}, "load_balancing_weight": weight});
        if *weight == 0 {
            group["load_balancing_weight"] = Value::Null;
        }
        serves(case, json!({"group": group, "health_status": health}))
    })
}

/// A client from each of the addresses, one after the other.
fn sources(case: Case) -> Case {
    (1..=SOURCES).fold(case, |case, source| {
        let asks = [write("hello"), ShutdownWrite, ReadToEnd];
        case.client(Client::new(asks).from(&format!("127.0.{}.{source}:0", source % 7)))
    })
}

/// Connections from one address, all open at the same time.
fn nested(case: Case) -> Case {
    let open = || Client::new([write("hello"), Read(5)]);
    let close = || [ShutdownWrite, ReadToEnd];
    let last = Client::new([write("hello"), Read(5), ShutdownWrite, ReadToEnd]);
    case.client((1..CONNECTIONS).fold(last, |inner, _| open().meanwhile(inner, close())))
}
