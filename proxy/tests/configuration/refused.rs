//! What is refused beyond Envoy's field rules, with path and words. Where Envoy 1.40 refuses too, its verdict was
//! taken from `envoy --mode validate` of the same configuration.

use serde_json::{Value, json};

use super::build::*;

const L: &str = "static_resources.listeners[0]";
const F: &str = "static_resources.listeners[0].filter_chains[0].filters[0]";
const C: &str = "static_resources.clusters[0]";

#[test]
fn all_problems_are_reported_at_once() {
    let listeners = vec![
        with(listener("a", 1), json!({"address": address("localhost", 1)})),
        with(listener("b", 2), json!({"filter_chains": []})),
    ];
    let clusters = vec![with(cluster("c"), json!({"type": "EDS"})), cluster("d"), cluster("d")];
    assert_eq!(
        problems(&bootstrap(listeners, clusters)),
        [
            "static_resources.clusters[2].name: duplicate cluster \"d\"",
            "static_resources.clusters[0]: required field eds_cluster_config is missing",
            "static_resources.listeners[0].address.socket_address.address: \"localhost\" is not an IP address",
            "static_resources.listeners[1].filter_chains: no filter chains specified; add one, or a default_filter_chain",
        ]
    );
}

#[test]
fn listeners_that_collide() {
    refused(
        &bootstrap(vec![listener("a", 1), listener("a", 2)], vec![]),
        "static_resources.listeners[1].name",
        "duplicate listener \"a\": the later one would replace the earlier one",
    );
    for virtual_too in [json!({}), json!({"bind_to_port": false})] {
        refused(
            &bootstrap(vec![listener("a", 1), with(listener("b", 1), virtual_too)], vec![]),
            "static_resources.listeners[1].address",
            "listener \"b\" has duplicate address 127.0.0.1:1 as existing listener \"a\"",
        );
    }
}

#[test]
fn addresses() {
    let socket = |fields| with(json!({"address": "127.0.0.1", "port_value": 1}), fields);
    let at = format!("{L}.address.socket_address");
    let with_socket = |fields| one_listener(json!({"address": {"socket_address": socket(fields)}}));
    refused(
        &with_socket(json!({"protocol": "UDP"})),
        &format!("{at}.protocol"),
        "UDP is not supported; only TCP is",
    );
    refused(
        &with_socket(json!({"port_value": null, "named_port": "http"})),
        &format!("{at}.named_port"),
        "named ports are not supported; use port_value",
    );
    refused(
        &with_socket(json!({"resolver_name": "x"})),
        &format!("{at}.resolver_name"),
        "custom resolvers are not supported; remove it",
    );
    refused(
        &with_socket(json!({"network_namespace_filepath": "/run/netns/x"})),
        &format!("{at}.network_namespace_filepath"),
        "sockets in another network namespace are not supported, and opening the port in this one would expose it \
         elsewhere; remove it",
    );
    refused(
        &one_listener(json!({"address": {"pipe": {"path": "/tmp/x"}}})),
        &format!("{L}.address.pipe"),
        "nothing listens on unix domain sockets here; use socket_address",
    );
}

/// Of paths Envoy refuses what is refused here, in other words; that clients can't be carried there is ours.
#[test]
fn pipes() {
    let with_pipe = |pipe: Value, fields: Value| {
        let endpoint = json!({"endpoint": {"address": {"pipe": pipe}}});
        with(with(cluster("c"), json!({"load_assignment": assignment(vec![endpoint])})), fields)
    };
    let at = format!("{C}.load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.pipe");
    let long = "p".repeat(108);
    for (pipe, field, message) in [
        (json!({"path": ""}), ".path", "must not be empty".to_owned()),
        (
            json!({"path": long}),
            ".path",
            format!(
                "{long:?}: 108 bytes are too many for the path of a Unix domain socket; use at most 107, or a \
                     symbolic link to its directory"
            ),
        ),
        (
            json!({"path": "/run/a\u{0}b"}),
            ".path",
            "\"/run/a\\0b\": it has a NUL character in it, which only an abstract name (@…) may have"
                .to_owned(),
        ),
        (
            json!({"path": "@name", "mode": 0o700}),
            ".mode",
            "an abstract socket (@…) has no file to set it on; remove it".to_owned(),
        ),
        (json!({"path": "/run/a", "mode": 0o1000}), ".mode", "must be at most 511, is 512".to_owned()),
    ] {
        refused(&bootstrap(vec![], vec![with_pipe(pipe, json!({}))]), &format!("{at}{field}"), &message);
    }
    let pipe = json!({"path": "./xds", "mode": 0o700});
    refused(
        &bootstrap(vec![], vec![with_pipe(pipe.clone(), json!({"type": "STRICT_DNS"}))]),
        &at,
        "there is nothing to resolve; set the cluster's type to STATIC",
    );
    let clients = "cluster \"c\" has endpoints on unix domain sockets (pipe), which only control planes are reached \
                   through in this version; name one whose endpoints have a socket_address";
    let unix = || vec![with_pipe(pipe.clone(), json!({}))];
    let serving = |filter: Value| {
        bootstrap(vec![with(listener("l", 1), json!({"filter_chains": [{"filters": [filter]}]}))], unix())
    };
    refused(&serving(tcp_proxy(json!({}))), &format!("{F}.typed_config.cluster"), clients);
    let weighted = json!({"cluster": null, "weighted_clusters": {"clusters": [{"name": "c", "weight": 1}]}});
    refused(
        &serving(tcp_proxy(weighted)),
        &format!("{F}.typed_config.weighted_clusters.clusters[0].name"),
        clients,
    );
    refused(
        &serving(http(vec![virtual_host("v", &["*"], vec![route("c")])])),
        &format!("{F}.typed_config.route_config.virtual_hosts[0].routes[0].route.cluster"),
        clients,
    );
    assert_eq!(
        warnings(&bootstrap(vec![], vec![with_pipe(json!({"path": "unix:///run/x"}), json!({}))])),
        [format!("{at}.path: \"unix:///run/x\" is taken as it is; a path has no \"unix:\"")]
    );
}

#[test]
fn filter_chains_that_could_never_be_found() {
    let chain = |name: &str| json!({"name": name, "filter_chain_match": {"destination_port": 1}, "filters": [tcp_proxy(json!({}))]});
    refused(
        &one_listener(json!({"filter_chains": [chain("a"), chain("b")]})),
        &format!("{L}.filter_chains"),
        "filter chain 'b' has the same matching rules defined as 'a': both match destination_port 1; remove one of them \
         or make its filter_chain_match differ",
    );
}

#[test]
fn filter_chain_matches() {
    let matching = |fields: Value| {
        one_listener(
            json!({"filter_chains": [{"filter_chain_match": fields, "filters": [tcp_proxy(json!({}))]}]}),
        )
    };
    let at = format!("{L}.filter_chains[0].filter_chain_match");
    for name in ["*", "*w.com", "a.*.com"] {
        refused(
            &matching(json!({"server_names": ["ok.com", name]})),
            &format!("{at}.server_names[1]"),
            &format!(
                "partial wildcards are not supported in server_names: {name:?}; use an exact name or \"*.suffix\""
            ),
        );
    }
    refused(
        &matching(json!({"prefix_ranges": [{"address_prefix": "foo", "prefix_len": 8}]})),
        &format!("{at}.prefix_ranges[0].address_prefix"),
        "\"foo\" is not an IP address",
    );
    refused(
        &matching(json!({"address_suffix": "1.2"})),
        &at,
        "address_suffix and suffix_len are implemented by nobody, Envoy included; remove them",
    );
}

#[test]
fn network_filters() {
    let istio = in_struct("istio.stats", "type.googleapis.com/stats.PluginConfig", json!({}));
    refused(
        &filters(vec![tcp_proxy(json!({})), tcp_proxy(json!({}))]),
        F,
        "terminal filter \"envoy.filters.network.tcp_proxy\" must be the last filter of its chain",
    );
    refused(
        &filters(vec![istio]),
        F,
        "non-terminal filter \"istio.stats\" is the last filter of its chain; add envoy.filters.network.tcp_proxy after it",
    );
    refused(
        &filters(vec![in_struct("x", "x.unknown", json!({})), tcp_proxy(json!({}))]),
        &format!("{F}.typed_config"),
        "Didn't find a registered implementation for 'x' with type URL: 'x.unknown'",
    );
    refused(
        &filters(vec![json!({"name": "envoy.filters.network.tcp_proxy"})]),
        F,
        "Didn't find a registered implementation for 'envoy.filters.network.tcp_proxy' with type URL: ''",
    );
    // A name does not make a filter harmless.
    for name in ["rbac", "istio.rbac"] {
        let rbac =
            extension(name, "envoy.extensions.filters.network.rbac.v3.RBAC", json!({"stat_prefix": "x"}));
        refused(
            &filters(vec![rbac, tcp_proxy(json!({}))]),
            &format!("{F}.typed_config"),
            "network filter envoy.extensions.filters.network.rbac.v3.RBAC is not supported in this version, and \
             connections would pass without it; remove it if that is meant",
        );
    }
}

#[test]
fn transport_sockets_never_become_plaintext() {
    let tls = |side: &str| {
        extension(
            "envoy.transport_sockets.tls",
            &format!("envoy.extensions.transport_sockets.tls.v3.{side}TlsContext"),
            json!({}),
        )
    };
    let chain = json!({"transport_socket": tls("Downstream"), "filters": [tcp_proxy(json!({}))]});
    refused(
        &one_listener(json!({"filter_chains": [chain]})),
        &format!("{L}.filter_chains[0].transport_socket"),
        "transport socket \"envoy.transport_sockets.tls\" is not supported in this version, and serving clients in \
         plaintext instead would be unsafe; remove it if plaintext is meant",
    );
    refused(
        &one_cluster(json!({"transport_socket": tls("Upstream")})),
        &format!("{C}.transport_socket"),
        "transport socket \"envoy.transport_sockets.tls\" is not supported in this version, and sending to upstreams in \
         plaintext instead would be unsafe; remove it if plaintext is meant",
    );
    let matches = json!([
        {"name": "tlsMode-istio", "match": {"tlsMode": "istio"}, "transport_socket": tls("Upstream")},
        {"name": "tlsMode-disabled", "match": {}, "transport_socket": {"name": "envoy.transport_sockets.raw_buffer"}},
    ]);
    let labelled = with(
        endpoint("127.0.0.1"),
        json!({"metadata": {"filter_metadata": {"envoy.transport_socket_match": {"tlsMode": "istio"}}}}),
    );
    refused(
        &one_cluster(
            json!({"transport_socket_matches": matches, "load_assignment": assignment(vec![endpoint("127.0.0.1"), labelled])}),
        ),
        &format!("{C}.load_assignment.endpoints[0].lb_endpoints[1].metadata"),
        "this endpoint selects transport_socket_matches \"tlsMode-istio\", which is not supported in this version, and \
         sending in plaintext instead would be unsafe",
    );
    let plain = one_cluster(json!({"transport_socket_matches": matches}));
    assert_eq!(
        warnings(&plain),
        Vec::<String>::new(),
        "an endpoint without the label is served in plaintext"
    );
}

#[test]
fn tcp_proxy_fields() {
    let at = format!("{F}.typed_config");
    let proxy = |fields| filters(vec![tcp_proxy(fields)]);
    refused(
        &proxy(json!({"backoff_options": {"base_interval": "2s", "max_interval": "1s"}})),
        &format!("{at}.backoff_options.max_interval"),
        "max_interval 1s must be at least base_interval 2s",
    );
    refused(
        &proxy(json!({"tunneling_config": {"hostname": "a"}})),
        &format!("{at}.tunneling_config"),
        "HTTP tunnels are not supported, and the bare stream is not what the upstream expects; remove it",
    );
    refused(
        &proxy(
            json!({"access_log_options": {"flush_access_log_on_start": true}, "flush_access_log_on_connected": true}),
        ),
        &at,
        "only one of access_log_options and the deprecated access_log_flush_interval or flush_access_log_on_connected may \
         be set; remove the deprecated ones",
    );
    refused(
        &proxy(json!({"upstream_connect_mode": "ON_DOWNSTREAM_DATA"})),
        &format!("{at}.max_early_data_bytes"),
        "must be set when upstream_connect_mode is ON_DOWNSTREAM_DATA",
    );
}

#[test]
fn clusters() {
    refused(
        &one_cluster(json!({"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED"})),
        &format!("{C}.load_assignment"),
        "ORIGINAL_DST clusters must have no load assignment configured; remove it",
    );
    refused(
        &one_cluster(json!({"type": "ORIGINAL_DST", "load_assignment": null})),
        &format!("{C}.lb_policy"),
        "only CLUSTER_PROVIDED is allowed with cluster type ORIGINAL_DST",
    );
    refused(
        &one_cluster(json!({"lb_policy": "CLUSTER_PROVIDED"})),
        &format!("{C}.lb_policy"),
        "cluster provided LB specified but cluster \"c\" did not provide one; use CLUSTER_PROVIDED with type ORIGINAL_DST only",
    );
    refused(
        &one_cluster(json!({"load_assignment": assignment(vec![endpoint("localhost")])})),
        &format!("{C}.load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address"),
        "malformed IP address: localhost. Consider setting cluster type to 'STRICT_DNS'",
    );
    refused(
        &one_cluster(json!({"lb_policy": "LOAD_BALANCING_POLICY_CONFIG"})),
        &format!("{C}.lb_policy"),
        "LOAD_BALANCING_POLICY_CONFIG needs the field load_balancing_policy; set it",
    );
    refused(
        &one_cluster(json!({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 65_536}})),
        &format!("{C}.maglev_lb_config.table_size"),
        "the table size of Maglev must be a prime number, and 65536 is not one",
    );
    let by_name = json!({"consistent_hashing_lb_config": {"use_hostname_for_hashing": true}});
    refused(
        &one_cluster(json!({"lb_policy": "MAGLEV", "common_lb_config": by_name})),
        &format!("{C}.common_lb_config.consistent_hashing_lb_config.use_hostname_for_hashing"),
        "Envoy takes this with type STRICT_DNS only; give endpoints a hash_key in the metadata envoy.lb, or set \
         use_hostname_for_hashing in load_balancing_policy",
    );
    refused(
        &one_cluster(json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"maximum_ring_size": 1023}})),
        &format!("{C}.ring_hash_lb_config"),
        "ring hash: minimum_ring_size (1024) > maximum_ring_size (1023)",
    );
    refused(
        &one_cluster(
            json!({"load_balancing_policy": {"policies": [{"typed_extension_config": in_struct("x", "x.y", json!({}))}]}}),
        ),
        &format!("{C}.load_balancing_policy"),
        "none of these load balancing policies is supported in this version: [x]; use round_robin, least_request, random, ring_hash or maglev",
    );
    refused(
        &one_cluster(
            json!({"load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [{"endpoint_name": "a"}]}]}}),
        ),
        &format!("{C}.load_assignment.endpoints[0].lb_endpoints[0].endpoint_name"),
        "named_endpoints has no \"a\"",
    );
}

#[test]
fn access_logs() {
    let at = format!("{F}.typed_config.access_log[0]");
    let log = |log: Value| filters(vec![tcp_proxy(json!({"access_log": [log]}))]);
    let logger = in_struct("x", "x.y", json!({}));
    refused(
        &log(logger),
        &format!("{at}.typed_config"),
        "Didn't find a registered implementation for 'x' with type URL: 'x.y'",
    );
    refused(
        &log(access_log(json!({}), json!({"log_format": {"text_format_source": {"filename": "/nope"}}}))),
        &format!("{at}.typed_config.log_format.text_format_source.filename"),
        "formats from files are not supported; use inline_string",
    );
    let found = problems(&log(access_log(
        json!({}),
        json!({"log_format": {"text_format_source": {"inline_string": "%NO_SUCH_OPERATOR%"}}}),
    )));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with(&format!("{at}: ")) && found[0].contains("NO_SUCH_OPERATOR"),
        "{}",
        found[0]
    );
}

#[test]
fn http_listeners() {
    let at = format!("{F}.typed_config.route_config.virtual_hosts");
    let hosts = |hosts| filters(vec![http(hosts)]);
    refused(
        &hosts(vec![
            virtual_host("a", &["10.0.0.1"], vec![route("c")]),
            virtual_host("b", &["*", "10.0.0.1"], vec![route("c")]),
        ]),
        &format!("{at}[1].domains[1]"),
        "only unique values for domains are permitted; duplicate entry of domain \"10.0.0.1\" in route \"r\"",
    );
    refused(
        &hosts(vec![
            virtual_host("a", &["*"], vec![route("c")]),
            virtual_host("b", &["*"], vec![route("c")]),
        ]),
        &format!("{at}[1].domains[0]"),
        "only a single wildcard domain is permitted in route \"r\"",
    );
    refused(
        &hosts(vec![virtual_host("a", &["*"], vec![route("nope")])]),
        &format!("{at}[0].routes[0].route.cluster"),
        "route: unknown cluster \"nope\"; define it, or set validate_clusters of the route_config to false",
    );
    let weightless = json!({"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [{"name": "c", "weight": 0}]}}});
    refused(
        &hosts(vec![virtual_host("a", &["*"], vec![weightless])]),
        &format!("{at}[0].routes[0].route.weighted_clusters.clusters"),
        "at least one cluster must have a weight of 1 or more",
    );
}

#[test]
fn what_has_no_meaning_yet_and_no_safe_substitute() {
    let grpc = json!({"envoy_grpc": {"cluster_name": "nobody"}});
    let api = json!({"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [grpc]});
    let dynamic = json!({"cds_config": {"api_config_source": api, "resource_api_version": "V3"}});
    refused(
        &with(bootstrap(vec![], vec![]), json!({"dynamic_resources": dynamic})),
        "dynamic_resources.cds_config.api_config_source",
        "cluster \"nobody\" was either not defined statically or is an EDS cluster; add it to static_resources.clusters \
         with its addresses",
    );
    let dynamic = json!({"cds_config": {"ads": {}, "resource_api_version": "V3"}});
    refused(
        &with(bootstrap(vec![], vec![]), json!({"dynamic_resources": dynamic})),
        "dynamic_resources.cds_config.ads",
        "ADS must be configured to support an ADS config source; add dynamic_resources.ads_config",
    );
    let source = extension("o", "envoy.extensions.filters.listener.original_src.v3.OriginalSrc", json!({}));
    refused(
        &one_listener(json!({"listener_filters": [source]})),
        &format!("{L}.listener_filters[0].typed_config"),
        "listener filter envoy.extensions.filters.listener.original_src.v3.OriginalSrc is not supported in this version, \
         and connections would not be treated as it says; remove it",
    );
}

#[test]
fn bootstrap_extensions_and_runtime() {
    let ours = || extension("i", "tidegate.bootstrap.v1.Interception", json!({}));
    refused(
        &with(bootstrap(vec![], vec![]), json!({"bootstrap_extensions": [ours(), ours()]})),
        "bootstrap_extensions[1].typed_config",
        "a second Interception; there can be only one",
    );
    let layer = |value: Value| json!({"name": "s", "static_layer": {"envoy.resource_limits.listener.l.connection_limit": value}});
    refused(
        &with(
            bootstrap(vec![], vec![]),
            json!({"layered_runtime": {"layers": [layer(json!(1)), layer(json!(2))]}}),
        ),
        "layered_runtime.layers[1].name",
        "duplicate layer name \"s\"",
    );
    let found = problems(&with(
        bootstrap(vec![], vec![]),
        json!({"layered_runtime": {"layers": [layer(json!("many"))]}}),
    ));
    assert!(found[0].ends_with("must be a whole number of connections"), "{found:?}");
}

/// A control plane behind TLS whose certificate comes from there, with static secrets and more clusters.
fn secure(sds: &Value, secrets: &Value, more: Vec<Value>) -> Value {
    let tls = json!({"transport_socket": {"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "a", "auto_sni_san_validation": true,
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [sds],
            "validation_context": {"trusted_ca": {"filename": "/ca.pem"}},
        },
    }}});
    let mut clusters = vec![with(cluster("xds"), tls)];
    clusters.extend(more);
    let mut bootstrap = bootstrap(vec![], clusters);
    bootstrap["static_resources"]["secrets"] = secrets.clone();
    bootstrap["dynamic_resources"] =
        json!({"ads_config": grpc("xds"), "cds_config": {"ads": {}, "resource_api_version": "V3"}});
    bootstrap
}

fn grpc(cluster: &str) -> Value {
    json!({"api_type": "GRPC", "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": cluster}}]})
}

#[test]
fn secrets_that_nobody_can_bring() {
    let socket = format!("{C}.transport_socket");
    let name = format!("{socket}.typed_config.common_tls_context.tls_certificate_sds_secret_configs[0].name");
    refused(
        &secure(&json!({"name": "nope"}), &json!([]), vec![]),
        &name,
        "Unknown static secret: \"nope\"; add it to static_resources.secrets, or say in sds_config where it comes from",
    );
    let ca = json!([{"name": "ca", "validation_context": {"trusted_ca": {"filename": "/ca.pem"}}}]);
    refused(
        &secure(&json!({"name": "ca"}), &ca, vec![]),
        &name,
        "the static secret \"ca\" is a validation_context",
    );
    // Envoy 1.40 takes these two. It never gets connected with the first, and crashes with the second.
    let itself = "the secret \"me\" of cluster \"xds\" can only be fetched through that cluster itself, which needs it to \
                  connect; take it from a file (path_config_source), or from a server that is reached without it";
    for source in [json!({"api_config_source": grpc("xds")}), json!({"ads": {}})] {
        let sds = json!({"name": "me", "sds_config": with(source, json!({"resource_api_version": "V3"}))});
        refused(&secure(&sds, &json!([]), vec![]), &socket, itself);
    }
}

#[test]
fn secrets_round_in_a_circle() {
    let from = |cluster: &str| json!({"name": "me", "sds_config": {"resource_api_version": "V3", "api_config_source": grpc(cluster)}});
    let other = |server: &str| {
        let mut other = secure(&from(server), &json!([]), vec![])["static_resources"]["clusters"][0].clone();
        other["name"] = json!("other");
        other["load_assignment"]["cluster_name"] = json!("other");
        other
    };
    // A server of secrets may have TLS itself.
    let plain = cluster("plain");
    let fine = secure(&from("other"), &json!([]), vec![other("plain"), plain]);
    assert!(load_json(&fine).is_ok());
    let circle = problems(&secure(&from("other"), &json!([]), vec![other("xds")]));
    assert_eq!(circle.len(), 2, "{circle:?}");
    assert!(
        circle[0].starts_with(&format!("{C}.transport_socket: the secret \"me\" of cluster \"xds\"")),
        "{circle:?}"
    );
}

#[test]
fn static_secrets_that_can_not_be() {
    let with_secrets = |secrets: Value| {
        let mut bootstrap = bootstrap(vec![], vec![]);
        bootstrap["static_resources"]["secrets"] = secrets;
        bootstrap
    };
    const S: &str = "static_resources.secrets[0]";
    let certificate = |fields: Value| with_secrets(json!([{"name": "s", "tls_certificate": fields}]));
    let inline = |chain: &str, key: &str| json!({"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}});
    refused(
        &certificate(inline("junk", "hush")),
        &format!("{S}.tls_certificate"),
        "Failed to load certificate chain from <inline>: there is no certificate in it (PEM: -----BEGIN CERTIFICATE-----)",
    );
    refused(
        &certificate(json!({"pkcs12": {"filename": "/a.p12"}})),
        &format!("{S}.tls_certificate.pkcs12"),
        "not supported in this version; use certificate_chain and private_key (PEM)",
    );
    refused(
        &certificate(json!({"certificate_chain": {"filename": "/a"}})),
        &format!("{S}.tls_certificate"),
        "required field private_key is missing",
    );
    refused(
        &with_secrets(json!([{"name": "s", "validation_context": {
            "trusted_ca": {"filename": "/a"}, "crl": {"filename": "/b"}}}])),
        &format!("{S}.validation_context.crl"),
        "not supported in this version; use trusted_ca and match_typed_subject_alt_names",
    );
    refused(
        &with_secrets(json!([{"name": "s"}])),
        S,
        "required field type (one of tls_certificate, validation_context, session_ticket_keys) is missing",
    );
    let generic = json!({"name": "s", "generic_secret": {"secret": {"inline_string": "hush"}}});
    refused(
        &with_secrets(json!([generic.clone(), generic])),
        "static_resources.secrets[1].name",
        "duplicate static generic_secret \"s\"",
    );
    // What is wrong is told; what was there is not.
    let wrong =
        &problems(&certificate(json!({"certificate_chain": {"filename": "/a"}, "private_key": "hush"})));
    assert!(!wrong.iter().any(|problem| problem.contains("hush")), "{wrong:?}");
    assert!(wrong[0].ends_with("found something else (not shown)"), "{wrong:?}");
    // Kinds that nothing uses are taken, files are looked at when they are needed.
    let fine = json!([
        {"name": "a", "session_ticket_keys": {"keys": [{"inline_bytes": "AAAA"}]}},
        {"name": "a", "tls_certificate": {"certificate_chain": {"filename": "/a"}, "private_key": {"filename": "/b"}}},
    ]);
    assert_eq!(warnings(&with_secrets(fine)), Vec::<String>::new());
}

#[test]
fn ejections_that_would_be_longer_than_their_maximum() {
    let cluster = with(cluster("c"), json!({"outlier_detection": {"max_ejection_time": "1s"}}));
    refused(
        &bootstrap(vec![], vec![cluster]),
        &format!("{C}.outlier_detection.max_ejection_time"),
        "outlier detector's max_ejection_time cannot be smaller than base_ejection_time",
    );
}
