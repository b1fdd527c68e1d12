//! `upstream_bind_config` and `socket_options`: what they mean, and what is refused.

use serde_json::{Value, json};
use tidegate::config::upstream_bind::UpstreamBind;
use tidegate::sys::socket::{SocketOption, SocketState};

use super::build::*;

const C: &str = "static_resources.clusters[0]";
const L: &str = "static_resources.listeners[0]";

fn bound(bind: &Value) -> Value {
    bootstrap(vec![], vec![with(cluster("c"), json!({"upstream_bind_config": bind}))])
}

fn source(address: &str) -> Value {
    json!({"address": address, "port_value": 0})
}

fn of_first(bootstrap: &Value) -> Option<UpstreamBind> {
    warned(bootstrap, &[]);
    load_json(bootstrap).unwrap().bootstrap.clusters[0].upstream_bind.as_deref().cloned()
}

fn mark(value: i32) -> SocketOption {
    let value = value.to_ne_bytes().into();
    SocketOption { level: 1, name: 36, value, state: SocketState::Prebind, ipv6: None }
}

#[test]
fn sources_and_options_of_a_cluster() {
    let bind = of_first(&bound(&json!({
        "source_address": source("10.0.0.1"),
        "extra_source_addresses": [{
            "address": source("fd00::1"),
            "socket_options": {"socket_options": [{"level": 41, "name": 1, "buf_value": "AQI=", "state": "STATE_BOUND",
                "ip_version": "SOCKET_IP_VERSION_IPV6", "type": {"stream": {}}}]},
        }],
        "freebind": true,
        "socket_options": [
            {"description": "SO_MARK", "level": 1, "name": 36, "int_value": 7},
            {"level": 1, "name": 36, "int_value": 8, "type": {"datagram": {}}},
        ],
    })))
    .unwrap();
    assert!(bind.freebind);
    let to = |endpoint: &str| bind.for_endpoint(endpoint.parse().unwrap());
    assert_eq!(to("10.9.9.9:80"), (Some("10.0.0.1:0".parse().unwrap()), &[mark(7)][..]));
    let own = SocketOption {
        level: 41,
        name: 1,
        value: [1, 2].into(),
        state: SocketState::Bound,
        ipv6: Some(true),
    };
    assert_eq!(to("[fd00::9]:80"), (Some("[fd00::1]:0".parse().unwrap()), &[own][..]));
    // The deprecated name of the second one.
    let old = bound(&json!({
        "source_address": source("fd00::1"),
        "additional_source_addresses": [source("10.0.0.2")],
    }));
    let at = format!("{C}.upstream_bind_config.additional_source_addresses");
    warned(&old, &[&format!("{at}: \"additional_source_addresses\" is deprecated since Envoy 3.0")]);
    let bind = load_json(&old).unwrap().bootstrap.clusters[0].upstream_bind.clone().unwrap();
    assert_eq!(bind.for_endpoint("10.9.9.9:80".parse().unwrap()).0, Some("10.0.0.2:0".parse().unwrap()));
}

#[test]
fn the_cluster_manager_s_is_every_cluster_s_default() {
    let options = json!([{"level": 1, "name": 36, "int_value": 7}]);
    let manager =
        json!({"upstream_bind_config": {"source_address": source("10.0.0.1"), "socket_options": options}});
    let all = with(bootstrap(vec![], vec![cluster("c")]), json!({"cluster_manager": manager}));
    let endpoint = "10.9.9.9:80".parse().unwrap();
    let bind = of_first(&all).unwrap();
    assert_eq!(bind.for_endpoint(endpoint), (Some("10.0.0.1:0".parse().unwrap()), &[mark(7)][..]));
    let own = with(bound(&json!({"freebind": true})), json!({"cluster_manager": manager}));
    let bind = of_first(&own).unwrap();
    assert_eq!((bind.for_endpoint(endpoint), bind.freebind), ((None, &[mark(7)][..]), true));
    assert_eq!(of_first(&bootstrap(vec![], vec![cluster("c")])), None);
}

#[test]
fn sources_that_contradict_each_other() {
    let at = format!("{C}.upstream_bind_config");
    let extra = |addresses: &[&str]| -> Vec<Value> {
        addresses.iter().map(|address| json!({"address": source(address)})).collect()
    };
    refused(
        &bound(&json!({"extra_source_addresses": extra(&["10.0.0.1"])})),
        &at,
        "has extra_source_addresses and no source_address; give the first address there",
    );
    let first = |more: Value| bound(&with(json!({"source_address": source("10.0.0.1")}), more));
    refused(
        &first(json!({"extra_source_addresses": extra(&["10.0.0.2"])})),
        &at,
        "source addresses 10.0.0.1 and 10.0.0.2 are of one family; only the first would be used",
    );
    refused(
        &first(json!({"extra_source_addresses": extra(&["fd00::1", "fd00::2"])})),
        &at,
        "more than one extra source address; one of each family is all that can be used",
    );
    refused(
        &first(json!({
            "extra_source_addresses": extra(&["fd00::1"]), "additional_source_addresses": [source("fd00::1")],
        })),
        &format!("{at}.additional_source_addresses"),
        "can't be given beside extra_source_addresses; put the address there",
    );
    refused(
        &bound(&json!({"source_address": source("here")})),
        &format!("{at}.source_address.address"),
        "\"here\" is not an IP address",
    );
    let manager = json!({"upstream_bind_config": {"extra_source_addresses": extra(&["10.0.0.1"])}});
    refused(
        &with(bootstrap(vec![], vec![]), json!({"cluster_manager": manager})),
        "cluster_manager.upstream_bind_config",
        "has extra_source_addresses and no source_address; give the first address there",
    );
    let selector =
        json!({"name": "mine", "typed_config": {"@type": "type.googleapis.com/google.protobuf.Struct"}});
    refused(
        &first(json!({"local_address_selector": selector})),
        &format!("{at}.local_address_selector"),
        "Didn't find a registered implementation for 'mine' with type URL: 'type.googleapis.com/google.protobuf.Struct'",
    );
}

#[test]
fn options_that_no_kernel_could_take() {
    let options = |options: Value| one_listener(json!({"socket_options": options}));
    refused(
        &options(json!([{"level": 1, "name": 4_294_967_296_u64, "int_value": 1}])),
        &format!("{L}.socket_options[0].name"),
        "4294967296 does not fit a C int, which setsockopt(2) takes",
    );
    let own = json!({"socket_options": [{"level": 4_294_967_296_u64, "name": 1, "int_value": 1}]});
    let address = json!({"socket_address": {"address": "127.0.0.1", "port_value": 9001}});
    refused(
        &one_listener(json!({"additional_addresses": [{"address": address, "socket_options": own}]})),
        &format!("{L}.additional_addresses[0].socket_options.socket_options[0].level"),
        "4294967296 does not fit a C int, which setsockopt(2) takes",
    );
    refused(
        &bound(&json!({"socket_options": [{"level": 1, "name": 36, "int_value": -2_147_483_649_i64}]})),
        &format!("{C}.upstream_bind_config.socket_options[0].int_value"),
        "-2147483649 does not fit a C int, which setsockopt(2) takes",
    );
}

#[test]
fn options_of_a_listener_and_of_its_further_addresses() {
    let listener = one_listener(json!({
        "socket_options": [{"level": 1, "name": 36, "int_value": 7}],
        "additional_addresses": [
            {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9001}}},
            {
                "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9002}},
                "socket_options": {},
                "tcp_keepalive": {"keepalive_time": 5},
            },
        ],
    }));
    warned(&listener, &[]);
    let listener = load_json(&listener).unwrap().bootstrap.listeners[0].clone();
    assert_eq!(listener.socket_options, [mark(7)]);
    let [own] = &listener.overrides[..] else { panic!("{:?}", listener.overrides) };
    assert_eq!((own.address.port(), &own.socket_options[..]), (9002, &[][..]));
    assert_eq!(own.tcp_keepalive.unwrap().time, Some(5));
}

/// A 0 turns it off in Envoy; the kernel would refuse it.
#[test]
fn keepalive_of_nothing_is_none() {
    let listener = one_listener(json!({
        "socket_options": [{"level": 1, "name": 36, "int_value": 7}],
        "tcp_keepalive": {"keepalive_time": 5},
        "additional_addresses": [{
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9001}},
            "tcp_keepalive": {"keepalive_probes": 0},
        }],
    }));
    let listener = load_json(&listener).unwrap().bootstrap.listeners[0].clone();
    assert_eq!(listener.tcp_keepalive.unwrap().time, Some(5));
    assert_eq!(
        (listener.overrides[0].tcp_keepalive, &listener.overrides[0].socket_options[..]),
        (None, &[mark(7)][..])
    );
    for field in ["keepalive_time", "keepalive_interval", "keepalive_probes"] {
        let mut options =
            json!({"tcp_keepalive": {"keepalive_time": 5, "keepalive_interval": 6, "keepalive_probes": 7}});
        options["tcp_keepalive"][field] = json!(0);
        let cluster = with(cluster("c"), json!({"upstream_connection_options": options}));
        let loaded = load_json(&bootstrap(vec![], vec![cluster])).unwrap();
        assert_eq!(loaded.bootstrap.clusters[0].upstream_keepalive, None, "{field}");
    }
}
