//! Listener filters and filter chain matching.

use serde_json::{Value, json};
use tidegate_tests::script::Step::{self, Echo, Pause, Read, ReadToEnd, ShutdownWrite, Write, WriteBytewise};
use tidegate_tests::script::write;

use super::super::case::{Case, Client};
use crate::parity::hello::{client_hello, proxy_v2, proxy_v2_local};

pub(super) fn cases() -> Vec<Case> {
    // An inspector that sees the FIN together with the data may take it for an abort: a race in Envoy.
    let ask = || vec![write("hello"), Pause(150), ShutdownWrite, ReadToEnd];
    let sni = |name: &str, alpn: &[&str]| hello_then_end(client_hello(Some(name), alpn));
    let tls = || json!({"listener_filters": [inspector()]});
    vec![
        Case::new("no filter chain matches")
            .chains(json!([{"filter_chain_match": {"destination_port": 1}, "filters": ["@TCP_PROXY@"]}]))
            .does([ReadToEnd]),
        Case::new("no filter chain matches, the client has sent data")
            .chains(json!([{"filter_chain_match": {"destination_port": 1}, "filters": ["@TCP_PROXY@"]}]))
            .does([write("hello"), ReadToEnd])
            .ignore(&["end"]),
        Case::new("default filter chain")
            .serves([Echo])
            .chains(json!([{"filter_chain_match": {"destination_port": 1}, "filters": []}]))
            .listener(json!({"default_filter_chain": {"name": "the default", "filters": ["@TCP_PROXY@"]}}))
            .does(ask()),
        Case::new("a chain without filters").chains(json!([{"filters": []}])).does([ReadToEnd]),
        Case::new("source prefix and source port")
            .serves([Echo])
            .chains(json!([
                named("by prefix", json!({"source_prefix_ranges": [{"address_prefix": "127.0.0.2", "prefix_len": 32}]})),
                named("by port", json!({"source_ports": [33_333]})),
                named("rest", json!({})),
            ]))
            .client(Client::new(ask()).from("127.0.0.2:0"))
            .client(Client::new(ask()).from("127.0.0.1:33333"))
            .client(Client::new(ask())),
        Case::new("the longest destination prefix wins")
            .serves([Echo])
            .chains(json!([
                named("/8", json!({"prefix_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]})),
                named("/32", json!({"prefix_ranges": [{"address_prefix": "127.0.0.1", "prefix_len": 32}]})),
                named("rest", json!({})),
            ]))
            .does(ask()),
        Case::new("source type local")
            .serves([Echo])
            .chains(json!([
                named("local", json!({"source_type": "SAME_IP_OR_LOOPBACK"})),
                named("external", json!({"source_type": "EXTERNAL"})),
            ]))
            .does(ask()),
        Case::new("SNI: exact, wildcard, none")
            .serves([ReadToEnd])
            .listener(tls())
            .chains(json!([
                named("exact", json!({"server_names": ["a.example.com"]})),
                named("deep wildcard", json!({"server_names": ["*.b.example.com"]})),
                named("wildcard", json!({"server_names": ["*.example.com"]})),
                named("none", json!({})),
            ]))
            .does(sni("a.example.com", &[]))
            .does(sni("x.b.example.com", &[]))
            .does(sni("b.example.com", &[]))
            .does(sni("x.y.b.example.com", &[]))
            .does(sni("example.com", &[]))
            .does(sni("A.Example.COM", &[]))
            .does(hello_then_end(client_hello(None, &[])))
            .does(ask()),
        Case::new("SNI that no chain has")
            .listener(tls())
            .chains(json!([named("exact", json!({"server_names": ["a.example.com"]}))]))
            .does(sni("other.example.com", &[])),
        Case::new("transport protocol tls or raw")
            .serves([ReadToEnd])
            .listener(tls())
            .chains(json!([
                named("tls", json!({"transport_protocol": "tls"})),
                named("raw", json!({"transport_protocol": "raw_buffer"})),
            ]))
            .does(sni("x.example.com", &[]))
            .does(ask()),
        Case::new("ALPN")
            .serves([ReadToEnd])
            .listener(tls())
            .chains(json!([
                named("h2", json!({"transport_protocol": "tls", "application_protocols": ["h2"]})),
                named("istio", json!({"transport_protocol": "tls", "application_protocols": ["istio", "istio-peer-exchange"]})),
                named("rest", json!({})),
            ]))
            .does(sni("x.example.com", &["h2", "http/1.1"]))
            .does(sni("x.example.com", &["istio"]))
            .does(sni("x.example.com", &["http/1.1"])),
        Case::new("a ClientHello in small pieces")
            .serves([ReadToEnd])
            .listener(tls())
            .chains(json!([named("exact", json!({"server_names": ["a.example.com"]})), named("rest", json!({}))]))
            .does(in_pieces(&client_hello(Some("a.example.com"), &["h2"]))),
        Case::new("inspector: nothing arrives, the connection is closed")
            .listener(tls())
            .listener(json!({"listener_filters_timeout": "0.3s"}))
            .does([ReadToEnd]),
        Case::new("inspector: nothing arrives, go on")
            .serves([write("banner"), Echo])
            .listener(tls())
            .listener(json!({"listener_filters_timeout": "0.3s", "continue_on_listener_filters_timeout": true}))
            .does([Read(6), write("hello"), ShutdownWrite, ReadToEnd]),
        Case::new("inspector: half a ClientHello, then a timeout")
            .listener(tls())
            .listener(json!({"listener_filters_timeout": "0.3s"}))
            .does([Write(client_hello(Some("a.example.com"), &[])[..20].to_vec()), ReadToEnd]),
        Case::new("inspector: the client leaves before a decision")
            .listener(tls())
            .does([Write(client_hello(Some("a.example.com"), &[])[..20].to_vec()), Pause(100), ShutdownWrite, ReadToEnd]),
        Case::new("inspector: 1 byte of plain text, then a FIN")
            .serves([Echo])
            .listener(tls())
            .does([write("h"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("inspector: 2 bytes of plain text, then a FIN")
            .serves([Echo])
            .listener(tls())
            .does([write("he"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("inspector: 3 bytes of plain text, then a FIN")
            .serves([Echo])
            .listener(tls())
            .does([write("hel"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("inspector: 4 bytes of plain text, then a FIN")
            .serves([Echo])
            .listener(tls())
            .does([write("helo"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("PROXY protocol v1")
            .serves([Echo])
            .listener(proxy_protocol(&json!({})))
            .does([write("PROXY TCP4 192.0.2.7 192.0.2.8 1111 2222\r\nhello"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("PROXY protocol v1, unknown")
            .serves([Echo])
            .listener(proxy_protocol(&json!({})))
            .does([write("PROXY UNKNOWN\r\nhello"), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("PROXY protocol v1, IPv6, byte by byte")
            .serves([Echo])
            .listener(proxy_protocol(&json!({})))
            .does([
                WriteBytewise(b"PROXY TCP6 2001:db8::7 2001:db8::8 1111 2222\r\n".to_vec()),
                write("hello"),
                Pause(150), ShutdownWrite, ReadToEnd,
            ]),
        Case::new("PROXY protocol v2")
            .serves([Echo])
            .listener(proxy_protocol(&json!({})))
            .does([Write(proxy_v2(b"hello")), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("PROXY protocol v2, LOCAL")
            .serves([Echo])
            .listener(proxy_protocol(&json!({})))
            .does([Write(proxy_v2_local(b"hello")), Pause(150), ShutdownWrite, ReadToEnd]),
        Case::new("PROXY protocol, malformed")
            .listener(proxy_protocol(&json!({})))
            .does([write("PROXY TCP4 nonsense\r\n"), ReadToEnd]),
        Case::new("PROXY protocol missing").listener(proxy_protocol(&json!({}))).does([
            write("GET / HTTP/1.1\r\nhost: example.com\r\n\r\n"),
            ReadToEnd,
        ]),
        Case::new("PROXY protocol missing, allowed")
            .serves([Echo])
            .listener(proxy_protocol(&json!({"allow_requests_without_proxy_protocol": true})))
            .does(ask()),
        Case::new("PROXY protocol v1 disallowed")
            .listener(proxy_protocol(&json!({"disallowed_versions": ["V1"]})))
            .does([write("PROXY TCP4 192.0.2.7 192.0.2.8 1111 2222\r\nhello"), ReadToEnd]),
    ]
}

#[allow(clippy::needless_pass_by_value)] // a json!() literal at every call
fn named(name: &str, matches: Value) -> Value {
    json!({"name": name, "filter_chain_match": matches, "filters": ["@TCP_PROXY@"]})
}

fn inspector() -> Value {
    json!({
        "name": "envoy.filters.listener.tls_inspector",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        },
    })
}

fn proxy_protocol(fields: &Value) -> Value {
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    json!({"listener_filters": [{"name": "envoy.filters.listener.proxy_protocol", "typed_config": config}]})
}

fn hello_then_end(hello: Vec<u8>) -> Vec<Step> {
    vec![Write(hello), Pause(150), ShutdownWrite, ReadToEnd]
}

fn in_pieces(hello: &[u8]) -> Vec<Step> {
    let pieces = hello.chunks(40).flat_map(|piece| [Write(piece.to_vec()), Pause(20)]);
    pieces.chain([Pause(150), ShutdownWrite, ReadToEnd]).collect()
}
