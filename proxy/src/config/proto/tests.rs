//! The loader as a whole, against what Envoy 1.40 does.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tidegate_api::cluster::Cluster;
use tidegate_api::listener::{Listener, filter::ConfigType};
use tidegate_api::tcp_proxy::TcpProxy;

use super::*;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn yaml(text: &str) -> Source {
    Source::yaml("t.yaml", text)
}

fn refused<M: Message + Name + Default>(text: &str) -> Vec<String> {
    match parse::<M>(&yaml(text), &Options::default()) {
        Ok(_) => Vec::new(),
        Err(error) => error.to_string().lines().map(str::to_owned).collect(),
    }
}

fn accepted<M: Message + Name + Default>(text: &str) -> Parsed<M> {
    parse(&yaml(text), &Options::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// One line of envoy-1.40-verdicts.jsonl: what `envoy --mode validate` says of a text.
#[derive(serde::Deserialize)]
struct Verdict {
    case: String,
    value: String,
    format: String,
    text: String,
    envoy: String,
}

/// Where we differ from Envoy: the start of the value, by case, and why.
const DIFFERENCES: [(&str, &str, &str); 14] = [
    ("repeated", "[[]]", "a list in a list is a slip"),
    ("rep_scalar", "[[NR]]", "a list in a list is a slip"),
    ("rep_scalar", "[NR, [UH]]", "a list in a list is a slip"),
    ("sockopts", "[[", "a list in a list is a slip"),
    ("any2", "{\"@type\": type.googleapis.com/google.protobuf.Timestamp, value: \"2026-13-", "no such month"),
    ("any2", "{\"@type\": type.googleapis.com/google.protobuf.Timestamp, value: \"2026-02-29", "no such day"),
    (
        "json",
        "{\"static_resources\":{\"listeners\":[{\"name\":\"l\",\"address\":{\"socket_address\":{\"address\":\"127.0.0.1\",\"port_value\":1}},\"filter_chains\":[{}]}]},\"node\":{\"metadata\":{\"a\":1,\"a\"",
        "the last one counts, with a warning",
    ),
    ("json", "\u{feff}", "a byte order mark does no harm"),
    // The following is not about the message; what it means is checked elsewhere.
    ("duration", "315576000000s", "too long for a timer"),
    ("oneof", "type: STATIC\n    type: EDS", "an EDS cluster without eds_cluster_config"),
    (
        "filter",
        "{name: x, typed_config: {\"@type\": type.googleapis.com/google.protobuf.Empty}}",
        "not a filter",
    ),
    ("filter", "{name: envoy.filters.listener.tls_inspector}", "no typed_config"),
    ("filter", "{name: x, typed_config: {\"@type\": type.googleapis.com/google.protobuf.Any", "not a filter"),
    ("filter", "{name: x, typed_config: {}}", "not a filter"),
];

#[test]
fn accepts_and_refuses_what_envoy_does() {
    let text = std::fs::read_to_string(data("envoy-1.40-verdicts.jsonl")).unwrap();
    let mut unexpected = Vec::new();
    let mut seen = [false; DIFFERENCES.len()];
    for line in text.lines() {
        let verdict: Verdict = serde_json::from_str(line).unwrap();
        let format = if verdict.format == "json" { Format::Json } else { Format::Yaml };
        let source = Source { name: "t".into(), text: verdict.text, format };
        let ours = match parse_bootstrap(&source, &[], &Options::default()) {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("bad {error}"),
        };
        let known = DIFFERENCES
            .iter()
            .position(|(case, value, _)| *case == verdict.case && verdict.value.starts_with(value));
        match (ours.starts_with(&verdict.envoy), known) {
            (false, Some(index)) => seen[index] = true,
            (false, None) => {
                unexpected.push(format!(
                    "{} {:?}: Envoy {}, we {ours}",
                    verdict.case, verdict.value, verdict.envoy
                ));
            }
            (true, Some(_)) => {
                unexpected.push(format!("{} {:?}: no difference", verdict.case, verdict.value));
            }
            (true, None) => {}
        }
    }
    assert!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    assert!(seen.iter().all(|seen| *seen), "a difference that is no more");
    assert!(text.lines().count() > 500);
}

/// Every file of the corpus, and what we say of it. Envoy 1.40 accepts the same ones, but for istio.stats,
/// which it does not know.
#[test]
fn corpus_of_bad_files() {
    let tcp = "static_resources.listeners[0].filter_chains[0].filters[1].typed_config";
    let expected: [(&str, String); 15] = [
        ("ok.yaml", String::new()),
        (
            "01-enum-outer.yaml",
            "44: static_resources.clusters[0].type: \"STATICC\" is not a value of \
             envoy.config.cluster.v3.Cluster.DiscoveryType; use one of STATIC, STRICT_DNS, LOGICAL_DNS, EDS, \
             ORIGINAL_DST; did you mean \"STATIC\"?"
                .into(),
        ),
        (
            "02-enum-in-any.yaml",
            format!(
                "33: {tcp}.access_log[0].filter.response_flag_filter.flags[1]: expected a string, found the number 7; \
                 quote the value"
            ),
        ),
        (
            "03-enum-traffic.yaml",
            "40: static_resources.listeners[0].traffic_direction: \"OUTWARD\" is not a value of \
             envoy.config.core.v3.TrafficDirection; use one of UNSPECIFIED, INBOUND, OUTBOUND"
                .into(),
        ),
        (
            "04-unknown-outer.yaml",
            "45: static_resources.clusters[0]: unknown field \"lb_polcy\" in envoy.config.cluster.v3.Cluster; did you \
             mean \"lb_policy\"?"
                .into(),
        ),
        (
            "05-unknown-in-any.yaml",
            format!(
                "26: {tcp}: unknown field \"statPrefx\" in envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy; did \
                 you mean \"stat_prefix\"?"
            ),
        ),
        (
            "06-type-outer.yaml",
            "11: static_resources.listeners[0].address.socket_address.port_value: expected an integer from 0 to \
             4294967295, found the string \"fifty\""
                .into(),
        ),
        (
            "07-type-in-any.yaml",
            format!("29: {tcp}.max_connect_attempts: expected an integer from 0 to 4294967295, found a list"),
        ),
        (
            "08-dur.yaml",
            "43: static_resources.clusters[0].connect_timeout: expected a duration in seconds like \"1.5s\", found the \
             string \"250ms\"; seconds are the only unit: 250ms is 0.25s"
                .into(),
        ),
        (
            "09-range.yaml",
            "57: static_resources.clusters[0].load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.\
             socket_address.port_value: expected an integer from 0 to 4294967295, found the number -1"
                .into(),
        ),
        (
            "10-oneof.yaml",
            "45: static_resources.clusters[0]: only one of \"type\" and \"cluster_type\" may be set (oneof \
             cluster_discovery_type); remove one of them"
                .into(),
        ),
        (
            "11-unknown-type.yaml",
            format!(
                "25: {tcp}: unknown type \"type.googleapis.com/envoy.extensions.filters.network.nope.v3.Nope\"; no \
                 extension of this type is compiled in"
            ),
        ),
        (
            "12-no-at-type.yaml",
            format!(
                "25: {tcp}: @type is missing: an extension needs '@type': type.googleapis.com/<full name of its message>"
            ),
        ),
        ("13-dup-key.yaml", String::new()),
        ("14-yaml-syntax.yaml", "45: not valid YAML: mapping values are not allowed in this context".into()),
    ];
    for (name, message) in &expected {
        let source =
            Source::from_file(*name, std::fs::read(data("config-corpus").join(name)).unwrap()).unwrap();
        let ours = parse_bootstrap(&source, &[], &Options::default()).err().map(|error| error.to_string());
        let message = (!message.is_empty()).then(|| format!("{name}:{message}"));
        assert_eq!(ours, message, "{name}");
    }
    assert_eq!(
        std::fs::read_dir(data("config-corpus")).unwrap().count(),
        expected.len(),
        "a file without a test"
    );
}

#[test]
fn the_last_of_equal_keys_counts_in_either_spelling() {
    let name = "13-dup-key.yaml";
    let source = Source::from_file(name, std::fs::read(data("config-corpus").join(name)).unwrap()).unwrap();
    let parsed = parse_bootstrap(&source, &[], &Options::default()).unwrap();
    assert_eq!(parsed.message.static_resources.unwrap().listeners[0].bind_to_port, Some(true));
    assert_eq!(
        parsed.warnings[0].to_string(),
        "13-dup-key.yaml:13: static_resources.listeners[0]: \"bind_to_port\" is set twice; the last one counts"
    );
    let parsed = accepted::<Cluster>("name: a\nname: b\nconnect_timeout: 1s\n");
    assert_eq!(parsed.message.name, "b");
    assert_eq!(parsed.warnings[0].to_string(), "t.yaml:1: \"name\" is set twice; the last one counts");
}

const TCP_PROXY: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

fn listener_with(filter: &str) -> String {
    format!(
        "name: l\naddress: {{socket_address: {{address: ::1, port_value: 1}}}}\nfilterChains:\n- filters:\n  - {filter}\n"
    )
}

fn typed_config(listener: &Listener) -> &tidegate_api::wkt::Any {
    match &listener.filter_chains[0].filters[0].config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        other => panic!("not a typed_config: {other:?}"),
    }
}

#[test]
fn several_errors_at_once_with_paths_through_any_and_maps() {
    let text = format!(
        "static_resources:
  listeners:
  - name: l
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: 70000 }} }}
    metadata: {{ filterMetadata: {{ a.b: [] }} }}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          max_connect_attempts: 0
          access_log:
          - name: file
            typed_config: {{ '@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccesLog }}
          '@type': {TCP_PROXY}
  clusters:
  - name: c
    lb_polcy: ROUND_ROBIN
    connect_timeout: 250ms
"
    );
    assert_eq!(
        refused::<Bootstrap>(&text),
        [
            "t.yaml:4: static_resources.listeners[0].address.socket_address.port_value: must be at most 65535, is 70000",
            "t.yaml:5: static_resources.listeners[0].metadata.filter_metadata[\"a.b\"]: expected a mapping, found a list",
            "t.yaml:10: static_resources.listeners[0].filter_chains[0].filters[0].typed_config: required field one of \
             cluster, weighted_clusters is missing",
            "t.yaml:10: static_resources.listeners[0].filter_chains[0].filters[0].typed_config.stat_prefix: must not be \
             empty",
            "t.yaml:10: static_resources.listeners[0].filter_chains[0].filters[0].typed_config.max_connect_attempts: must \
             be at least 1, is 0",
            "t.yaml:13: static_resources.listeners[0].filter_chains[0].filters[0].typed_config.access_log[0].\
             typed_config: unknown type \"type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccesLog\"; \
             did you mean \"envoy.extensions.access_loggers.file.v3.FileAccessLog\"?; no extension of this type is \
             compiled in",
            "t.yaml:17: static_resources.clusters[0]: unknown field \"lb_polcy\" in envoy.config.cluster.v3.Cluster; did \
             you mean \"lb_policy\"?",
            "t.yaml:18: static_resources.clusters[0].connect_timeout: expected a duration in seconds like \"1.5s\", found \
             the string \"250ms\"; seconds are the only unit: 250ms is 0.25s",
        ]
    );
}

#[test]
fn values_not_only_verdicts() {
    let listener = accepted::<Listener>(&listener_with(&format!(
        "{{name: f, typedConfig: {{'@type': {TCP_PROXY}, stat_prefix: 1.50, cluster: ! 17, idle_timeout: 1.5s, max_connect_attempts: 0x1F}}}}"
    )));
    let proxy: TcpProxy = unpack(typed_config(&listener.message)).unwrap();
    assert_eq!(proxy.stat_prefix, "1.50", "a fraction is text until a field wants a number");
    assert_eq!(proxy.max_connect_attempts, Some(31));
    assert_eq!(proxy.idle_timeout, Some(tidegate_api::wkt::Duration { seconds: 1, nanos: 500_000_000 }));
    let cluster = accepted::<Cluster>(
        "name: c\nper_connection_buffer_limit_bytes: 0644\nrespect_dns_ttl: no\ntype: static\ncommon_lb_config: \
         {healthy_panic_threshold: {value: '0x10'}}\nmetadata: {filter_metadata: {m: {i: 1, f: 0.5, n: ~, b: yes, big: \
         5000000000, l: [1, a]}}}",
    );
    assert_eq!(cluster.message.per_connection_buffer_limit_bytes, Some(420));
    let json = to_json(&cluster.dynamic);
    assert_eq!(json["type"], "STATIC");
    assert_eq!(json["common_lb_config"]["healthy_panic_threshold"]["value"], 16.0);
    assert_eq!(
        json["metadata"]["filter_metadata"]["m"],
        serde_json::json!({"i": 1.0, "f": "0.5", "n": null, "b": true, "big": "5000000000", "l": [1.0, "a"]})
    );
}

#[test]
fn typed_structs() {
    for wrapper in ["udpa.type.v1", "xds.type.v3"] {
        let known = accepted::<Listener>(&listener_with(&format!(
            "{{name: f, typed_config: {{'@type': type.googleapis.com/{wrapper}.TypedStruct, typeUrl: {TCP_PROXY}, value: {{statPrefix: s, \
             cluster: c}}}}}}"
        )));
        assert_eq!(typed_config(&known.message).type_url, TCP_PROXY, "unwrapped");
        let proxy: TcpProxy = unpack(typed_config(&known.message)).unwrap();
        assert_eq!(proxy.stat_prefix, "s");
        let unknown = accepted::<Listener>(&listener_with(&format!(
            "{{name: istio.stats, typed_config: {{'@type': type.googleapis.com/{wrapper}.TypedStruct, type_url: \
             type.googleapis.com/stats.PluginConfig, value: {{a: b}}}}}}"
        )));
        let kept = typed_config(&unknown.message);
        assert_eq!(type_name(&kept.type_url), format!("{wrapper}.TypedStruct"));
        assert_eq!(inner_type_name(kept), "stats.PluginConfig");
    }
    assert_eq!(
        refused::<Listener>(&listener_with(&format!(
            "name: f\n    typed_config:\n      '@type': type.googleapis.com/xds.type.v3.TypedStruct\n      type_url: {TCP_PROXY}\n      value:\n        \
             statPrefix: s\n        cluster: c\n        max_connect_attempts: -1"
        ))),
        [
            "t.yaml:12: filter_chains[0].filters[0].typed_config.max_connect_attempts: expected an integer from 0 to \
             4294967295, found the number -1"
        ]
    );
}

#[test]
fn unknown_types_and_fields_are_the_callers_choice() {
    let text = listener_with(
        "{name: istio.stats, typed_config: {'@type': type.googleapis.com/stats.PluginConfig, x: [1], nope: {}}}",
    );
    assert_eq!(refused::<Listener>(&text).len(), 1);
    let istio =
        |unknown: &UnknownType<'_>| unknown.extension_name.is_some_and(|name| name.starts_with("istio."));
    let options = Options { unknown_types: UnknownTypes::Ask(istio), ..Options::default() };
    let parsed = parse::<Listener>(&yaml(&text), &options).unwrap();
    assert_eq!(inner_type_name(typed_config(&parsed.message)), "stats.PluginConfig");
    assert_eq!(parsed.warnings[0].reason.label(), "unknown_type");
    assert_eq!(parsed.warnings[0].path, "filter_chains[0].filters[0].typed_config");
    assert!(parse::<Listener>(&yaml(&text.replace("istio.", "other.")), &options).is_err());

    let text = "name: c\nconnect_timeout: 1s\nfrom_the_future: 1\n";
    let options = Options { unknown_fields: UnknownFields::Warn, ..Options::default() };
    let parsed = parse::<Cluster>(&yaml(text), &options).unwrap();
    assert_eq!((parsed.message.name.as_str(), parsed.warnings[0].reason.label()), ("c", "unknown_field"));
}

#[test]
fn deprecated_fields_warn_and_disallowed_ones_are_refused() {
    let text = "name: c\nconnect_timeout: 1s\ndns_lookup_family: V4_ONLY\nuse_tcp_for_dns_lookups: true\n";
    let parsed = accepted::<Cluster>(text);
    assert_eq!(
        parsed.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["t.yaml:4: use_tcp_for_dns_lookups: \"use_tcp_for_dns_lookups\" is deprecated since Envoy 3.0"]
    );
    let text = "name: c\nconnect_timeout: 1s\neds_cluster_config: {eds_config: {api_config_source: {api_type: \
                DEPRECATED_AND_UNAVAILABLE_DO_NOT_USE}}}\n";
    assert_eq!(refused::<Cluster>(text).len(), 1);
}

#[test]
fn overlays_merge_as_protobuf_does() {
    let base = yaml(
        "node: {id: a, cluster: x}\nadmin: {address: {socket_address: {address: ::1, port_value: 1}}}\nstatic_resources:\n  \
         clusters:\n  - {name: a, connect_timeout: 1s}\n",
    );
    let overlay = Source::yaml(
        "--config-yaml",
        "{node: {id: b, metadata: {k: v}}, static_resources: {clusters: [{name: b, connect_timeout: 2s}]}}",
    );
    let parsed = parse_bootstrap(&base, &[overlay], &Options::default()).unwrap();
    let node = parsed.message.node.clone().unwrap();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("b", "x"));
    let clusters = &parsed.message.static_resources.as_ref().unwrap().clusters;
    assert_eq!(clusters.iter().map(|cluster| &*cluster.name).collect::<Vec<_>>(), ["a", "b"]);
    let place = |path| parsed.source_map.place(path).map(|(file, mark)| (file.to_string(), mark.line));
    assert_eq!(place("static_resources.clusters[0].name"), Some(("t.yaml".to_owned(), 5)));
    assert_eq!(place("static_resources.clusters[1].name"), Some(("--config-yaml".to_owned(), 1)));

    // What is incomplete in each text may be complete in the whole, and the other way round.
    let half = |port: u32| {
        Source::yaml("o", format!("admin: {{address: {{socket_address: {{port_value: {port}}}}}}}"))
    };
    assert!(parse_bootstrap(&base, &[half(2)], &Options::default()).is_ok());
    let error = parse_bootstrap(&base, &[half(70000)], &Options::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "o:1: admin.address.socket_address.port_value: must be at most 65535, is 70000"
    );
    let broken = Source::yaml("--config-yaml", "{nope");
    assert!(
        parse_bootstrap(&base, &[broken], &Options::default())
            .unwrap_err()
            .to_string()
            .starts_with("--config-yaml:1:")
    );
}

#[test]
fn anchors_and_aliases() {
    let text = "clusters:\n- &c {name: a, connect_timeout: &t 1s}\n- *c\n- {name: b, connect_timeout: *t}\n";
    let parsed = accepted::<tidegate_api::bootstrap::bootstrap::StaticResources>(text);
    assert_eq!(parsed.message.clusters.len(), 3);
    assert_eq!(parsed.message.clusters[0], parsed.message.clusters[1]);
    assert_eq!(
        refused::<Cluster>("<<: {name: a}\nname: b\nconnect_timeout: 1s\n"),
        ["t.yaml:1: unknown field \"<<\" in envoy.config.cluster.v3.Cluster"]
    );
}

#[test]
fn texts_that_are_no_message() {
    for (text, message) in [
        ("", "t.yaml:1: the text is empty: expected a envoy.config.cluster.v3.Cluster"),
        ("~", "t.yaml:1: the text is empty: expected a envoy.config.cluster.v3.Cluster"),
        ("[]", "t.yaml:1: expected a mapping of fields, found a list"),
        ("x", "t.yaml:1: expected a mapping of fields, found the string \"x\""),
        ("name: c\n\tx: y\n", "t.yaml:1: not valid YAML: while scanning a plain scalar, found a tab"),
    ] {
        assert_eq!(refused::<Cluster>(text).first().map(String::as_str), Some(message), "{text:?}");
    }
    let error = Source::from_file("x.yaml", b"a: b\nc: \xff\n".to_vec()).unwrap_err();
    assert_eq!(error.to_string(), "x.yaml:2: not UTF-8; save the file in that encoding");
    let deep =
        format!("name: c\nmetadata: {{filter_metadata: {{m: {}1{}}}}}", "{a: ".repeat(190), "}".repeat(190));
    assert_eq!(refused::<Cluster>(&deep).len(), 1, "deeper than protobuf can decode");
}

#[test]
fn secrets_are_not_shown() {
    let text = "common_tls_context:\n  tls_certificates:\n  - certificate_chain: {inline_string: public}\n    private_key: \
                {inline_string: secret, watched_directory: {path: /secret}}\n    password: {inline_bytes: c2VjcmV0}\n";
    let parsed = accepted::<tidegate_api::tls::DownstreamTlsContext>(text);
    let json = to_json(&parsed.dynamic);
    let certificate = &json["common_tls_context"]["tls_certificates"][0];
    assert_eq!(certificate["certificate_chain"]["inline_string"], "public");
    assert_eq!(certificate["private_key"]["inline_string"], "[redacted]");
    assert_eq!(certificate["password"]["inline_bytes"], "W3JlZGFjdGVkXQ==");
    assert!(!json.to_string().contains("secret"), "{json}");
    let in_any = core_transport_socket(&parsed.message);
    assert!(!to_json(&to_dynamic(&in_any).unwrap()).to_string().contains("secret"));
}

fn core_transport_socket(
    tls: &tidegate_api::tls::DownstreamTlsContext,
) -> tidegate_api::core::TransportSocket {
    tidegate_api::core::TransportSocket {
        name: "tls".into(),
        config_type: Some(tidegate_api::core::transport_socket::ConfigType::TypedConfig(
            tidegate_api::wkt::Any::from_msg(tls).unwrap(),
        )),
    }
}

#[test]
fn our_own_extension_has_rules_too() {
    use tidegate_api::interception::Interception;
    assert_eq!(
        refused::<Interception>("cgroups: [a, a]\ncapture_port: 0\npin_path: relative\nfail_mode: MAYBE\n"),
        [
            "t.yaml:1: cgroups: elements must be different, but \"a\" is there twice",
            "t.yaml:2: capture_port: must be at least 1 and at most 65535, is 0",
            "t.yaml:3: pin_path: must start with \"/\", is \"relative\"",
            "t.yaml:4: fail_mode: \"MAYBE\" is not a value of tidegate.bootstrap.v1.Interception.FailMode; use one of \
             OPEN, CLOSED",
        ]
    );
}

/// A large configuration is not refused. (An unoptimized build gets a tenth of it.)
#[test]
fn ten_megabytes() {
    use std::fmt::Write;
    let mut text = String::from("static_resources:\n  clusters:\n");
    let (size, clusters) = if cfg!(debug_assertions) { (1_000_000, 500) } else { (10_000_000, 5_000) };
    while text.len() < size {
        let n = text.len();
        writeln!(text, "  - name: outbound|{n}||service.namespace.svc.cluster.local\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: c{n}\n      endpoints:\n      - lb_endpoints:").unwrap();
        for port in 1..=10 {
            writeln!(text, "        - endpoint:\n            address: {{ socket_address: {{ address: 10.0.0.1, port_value: {port} }} }}").unwrap();
        }
    }
    let parsed = accepted::<Bootstrap>(&text);
    let json = to_json(&parsed.dynamic).to_string();
    assert!(parsed.message.static_resources.unwrap().clusters.len() > clusters);
    // All on one line: the cost of finding a column must not grow with it.
    for format in [Format::Json, Format::Yaml] {
        let source = Source { name: "t".into(), text: json.clone(), format };
        let parsed = parse_bootstrap(&source, &[], &Options::default()).unwrap();
        assert!(parsed.message.static_resources.unwrap().clusters.len() > clusters);
    }
}

/// A message of any shape that the descriptors allow, without `Any` of unknown types.
fn arbitrary_message(
    descriptor: &prost_reflect::MessageDescriptor,
    depth: u32,
) -> BoxedStrategy<DynamicMessage> {
    use prost_reflect::Kind;
    let name = descriptor.full_name().to_owned();
    let empty = DynamicMessage::new(descriptor.clone());
    match name.as_str() {
        "google.protobuf.Any" => {
            let inner =
                tidegate_api::descriptors().get_message_by_name("envoy.config.core.v3.Locality").unwrap();
            return arbitrary_message(&inner, 1)
                .prop_map(|inner| {
                    any::pack("type.googleapis.com/envoy.config.core.v3.Locality", &inner).unwrap()
                })
                .boxed();
        }
        "google.protobuf.Duration" | "google.protobuf.Timestamp" => {
            return (-62_000_000_000_i64..200_000_000_000, 0..1_000_000_000_i32)
                .prop_map(move |(seconds, nanos)| {
                    let duration = name == "google.protobuf.Duration";
                    let mut message = empty.clone();
                    message.set_field_by_number(1, prost_reflect::Value::I64(seconds));
                    let nanos = if duration && seconds < 0 { -nanos } else { nanos };
                    message.set_field_by_number(2, prost_reflect::Value::I32(nanos));
                    message
                })
                .boxed();
        }
        "google.protobuf.FieldMask" => return Just(empty).boxed(),
        "google.protobuf.Value" => {
            return prop_oneof![
                any::<String>().prop_map(|text| (3, prost_reflect::Value::String(text))),
                any::<bool>().prop_map(|value| (4, prost_reflect::Value::Bool(value))),
                any::<i32>().prop_map(|value| (2, prost_reflect::Value::F64(value.into()))),
                Just((1, prost_reflect::Value::EnumNumber(0))),
            ]
            .prop_map(move |(number, value)| {
                let mut message = empty.clone();
                message.set_field_by_number(number, value);
                message
            })
            .boxed();
        }
        _ => {}
    }
    // Each oneof gets at most one member: later fields would clear earlier ones.
    let fields: Vec<_> =
        descriptor.fields().filter(|field| depth > 0 || !matches!(field.kind(), Kind::Message(_))).collect();
    if fields.is_empty() {
        return Just(empty).boxed();
    }
    prop::collection::vec(prop::sample::select(fields), 0..6)
        .prop_flat_map(move |fields| {
            let values: Vec<_> = fields.iter().map(|field| arbitrary_field(field, depth)).collect();
            let empty = empty.clone();
            values.prop_map(move |values| {
                let mut message = empty.clone();
                for (field, value) in fields.iter().zip(values) {
                    message.set_field(field, value);
                }
                message
            })
        })
        .boxed()
}

fn arbitrary_field(
    field: &prost_reflect::FieldDescriptor,
    depth: u32,
) -> BoxedStrategy<prost_reflect::Value> {
    use prost_reflect::{Kind, Value};
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else { unreachable!() };
        let keys = arbitrary_value(&entry.map_entry_key_field().kind(), 0);
        let values = arbitrary_value(&entry.map_entry_value_field().kind(), depth.saturating_sub(1));
        return prop::collection::vec((keys, values), 0..3)
            .prop_map(|entries| {
                Value::Map(
                    entries.into_iter().map(|(key, value)| (key.into_map_key().unwrap(), value)).collect(),
                )
            })
            .boxed();
    }
    let value = arbitrary_value(&field.kind(), depth.saturating_sub(1));
    if field.is_list() { prop::collection::vec(value, 0..3).prop_map(Value::List).boxed() } else { value }
}

fn arbitrary_value(kind: &prost_reflect::Kind, depth: u32) -> BoxedStrategy<prost_reflect::Value> {
    use prost_reflect::{Kind, Value};
    match kind {
        Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => any::<i32>().prop_map(Value::I32).boxed(),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => any::<i64>().prop_map(Value::I64).boxed(),
        Kind::Uint32 | Kind::Fixed32 => any::<u32>().prop_map(Value::U32).boxed(),
        Kind::Uint64 | Kind::Fixed64 => any::<u64>().prop_map(Value::U64).boxed(),
        Kind::Float => any::<f32>().prop_map(Value::F32).boxed(),
        Kind::Double => any::<f64>().prop_map(Value::F64).boxed(),
        Kind::String => any::<String>().prop_map(Value::String).boxed(),
        Kind::Bytes => any::<Vec<u8>>().prop_map(|bytes| Value::Bytes(bytes.into())).boxed(),
        Kind::Enum(descriptor) => {
            let usable = descriptor.values().filter(|value| {
                schema::enum_value_deprecation(value).is_none_or(|deprecation| !deprecation.disallowed)
            });
            prop::sample::select(usable.map(|value| value.number()).collect::<Vec<_>>())
                .prop_map(Value::EnumNumber)
                .boxed()
        }
        Kind::Message(descriptor) => arbitrary_message(descriptor, depth).prop_map(Value::Message).boxed(),
    }
}

/// The walk alone: what comes out of a text, without the rules of the API.
fn walked(source: &Source, descriptor: &prost_reflect::MessageDescriptor) -> (DynamicMessage, Vec<String>) {
    let (tree, _) = read(source).unwrap_or_else(|problem| panic!("{problem}: {}", source.text));
    let map = SourceMap::new(source.name.clone(), tree);
    let options = Options::default();
    let mut walker = Walker::new(&map, &options);
    let message = walker.root(&MessageSchema::of(descriptor));
    (message, walker.finish().problems.iter().map(ToString::to_string).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Except that NaN differs from itself.
    #[test]
    fn json_that_we_print_is_read_back(
        message in prop::sample::select(vec![
            "envoy.config.cluster.v3.Cluster",
            "envoy.config.listener.v3.Listener",
            "envoy.config.route.v3.RouteConfiguration",
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "envoy.config.accesslog.v3.AccessLogFilter",
            "envoy.config.core.v3.Metadata",
            "google.protobuf.Struct",
        ])
        .prop_flat_map(|name| {
            arbitrary_message(&tidegate_api::descriptors().get_message_by_name(name).unwrap(), 4)
        })
    ) {
        use prost_reflect::ReflectMessage;
        let text = to_json::to_json_with_secrets(&message).to_string();
        for format in [Format::Json, Format::Yaml] {
            // YAML gives the numbers of a Struct other types than JSON does: there only problems count.
            let source = Source { name: "t".into(), text: text.clone(), format };
            let (back, problems) = walked(&source, &message.descriptor());
            let deprecated = problems.iter().all(|problem| problem.contains("is deprecated"));
            prop_assert!(deprecated, "{:?}\n{}", problems, text);
            if problems.is_empty() && format == Format::Json {
                let again = to_json::to_json_with_secrets(&back).to_string();
                prop_assert_eq!(&again, &text);
                let nan = text.contains("NaN");
                // Decoded anew, a field that was set to its default is unset.
                let anew = |message: &DynamicMessage| {
                    DynamicMessage::decode(message.descriptor(), &message.encode_to_vec()[..]).unwrap()
                };
                prop_assert!(nan || anew(&back) == anew(&message), "{}", text);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_text_is_refused_without_panic(text in any::<String>()) {
        for format in [Format::Yaml, Format::Json] {
            let source = Source { name: "t".into(), text: text.clone(), format };
            if let Err(error) = parse_bootstrap(&source, &[], &Options::default()) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }

    /// Slices of a real file put together anew, with syntax thrown in.
    #[test]
    fn mutated_yaml_is_refused_without_panic(
        cuts in prop::collection::vec((0..2100_usize, 0..200_usize, "[\\-:{}\\[\\]&*!|>'\"%@`?, \n\ta0#~<]{0,4}"), 1..8)
    ) {
        let original = std::fs::read_to_string(data("config-corpus/ok.yaml")).unwrap();
        let mut text = original.clone();
        for (at, length, insert) in cuts {
            let at = at.min(text.len());
            let end = (at + length).min(text.len());
            text.replace_range(at..end, &insert);
        }
        if let Err(error) = parse_bootstrap(&yaml(&text), &[], &Options::default()) {
            for problem in error.problems() {
                let line = problem.at.map_or(1, |at| at.line as usize);
                prop_assert!(line >= 1 && line <= text.lines().count() + 1, "{}", problem);
            }
        }
    }

    /// Bytes from the wire.
    #[test]
    fn any_bytes_are_unpacked_without_panic(bytes in any::<Vec<u8>>(), wrapped in any::<bool>()) {
        let type_url = if wrapped { "type.googleapis.com/xds.type.v3.TypedStruct" } else { TCP_PROXY };
        let any = tidegate_api::wkt::Any { type_url: type_url.into(), value: bytes };
        let _ = unpack::<TcpProxy>(&any);
        let _ = inner_type_name(&any);
        let _ = check(&any, "resource");
        if let Ok(dynamic) = to_dynamic(&any) {
            to_json(&dynamic);
        }
    }
}

#[test]
fn a_message_survives_the_release_of_its_descriptors() {
    let text = "static_resources: {clusters: [{name: a, connect_timeout: 2s, typed_extension_protocol_options: {}}]}";
    let parsed = parse_bootstrap(&Source::yaml("a.yaml", text), &[], &Options::default()).unwrap();
    let (shown, encoded) = (to_json(&parsed.dynamic), Encoded::new(&parsed.dynamic));
    assert_eq!(shown["static_resources"]["clusters"][0]["name"], "a");
    assert!(release_descriptors());
    assert_eq!(to_json(&parsed.dynamic), shown, "a message of the former descriptors");
    assert_eq!(encoded.to_json(), shown, "one that is decoded with new ones");
    // A text is checked against the rules as before.
    let wrong = parse_bootstrap(
        &Source::yaml("a.yaml", "static_resources: {clusters: [{}]}"),
        &[],
        &Options::default(),
    );
    assert!(wrong.is_err());
}
