//! Every file in `config/` loads and means what it says.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tidegate::access_log::{FlushSettings, Registry};
use tidegate::cluster::Cluster;
use tidegate::config::bootstrap::{Bootstrap, FailMode};
use tidegate::config::cluster::{Discovery, LbPolicy};
use tidegate::config::config_source::{ApiSource, ConfigSource, Protocol, Source};
use tidegate::config::endpoint::EndpointAddress;
use tidegate::config::filter_chain::Terminal;
use tidegate::config::health_check::Check;
use tidegate::config::listener::{ListenerFilter, TrafficDirection};
use tidegate::config::proto::Source as Text;
use tidegate::config::tcp_proxy::ClusterChoice;
use tidegate::config::tls::{DataSource, Provided, UpstreamTls, Use};
use tidegate::config::{Loaded, Sources, load, static_options};
use tidegate::kernel_path::{Obstacle, plan};
use tidegate::listener::Listener;
use tidegate::snapshot::Snapshot;
use tidegate::stats::Stats;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../config")
}

fn file(name: &str) -> Loaded {
    let content = std::fs::read(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let sources = Sources { config_path: Some(Text::from_file(name, content).unwrap()), config_yaml: None };
    load(&sources, &static_options()).unwrap_or_else(|error| panic!("{error}"))
}

fn warnings(loaded: &Loaded) -> Vec<String> {
    loaded.warnings.iter().map(ToString::to_string).collect()
}

/// Listener name → address, whether it has a socket, and where connections without any match go.
fn listeners(bootstrap: &Bootstrap) -> Vec<(String, String, bool)> {
    let row = |l: &std::sync::Arc<tidegate::config::listener::Listener>| {
        (l.name.to_string(), l.address().to_string(), l.bind_to_port)
    };
    bootstrap.listeners.iter().map(row).collect()
}

fn endpoints(bootstrap: &Bootstrap) -> BTreeMap<String, Vec<String>> {
    let address = |address: &EndpointAddress| match address {
        EndpointAddress::Ip(address) => address.to_string(),
        EndpointAddress::Name(name, port) => format!("{name}:{port}"),
        EndpointAddress::Pipe(pipe) => pipe.to_string(),
    };
    bootstrap
        .clusters
        .iter()
        .map(|cluster| {
            let all = cluster.load_assignment.localities.iter().flat_map(|group| &group.endpoints);
            (cluster.name.to_string(), all.map(|endpoint| address(&endpoint.address)).collect())
        })
        .collect()
}

fn chosen(terminal: Option<&Terminal>) -> &ClusterChoice {
    match terminal {
        Some(Terminal::TcpProxy(proxy)) => &proxy.clusters,
        other => panic!("{other:?}"),
    }
}

fn virtual_host(bootstrap: &Bootstrap, listener: usize, destination: &str) -> (String, String) {
    let chain = &bootstrap.listeners[listener].filter_chains[0];
    let Some(Terminal::HttpAsTcp(routing)) = &chain.terminal else { panic!("{chain:?}") };
    let host = routing.virtual_host(destination.parse().unwrap()).unwrap();
    let ClusterChoice::Single(cluster) = &host.proxy.as_ref().unwrap().clusters else { panic!("{host:?}") };
    (host.name.to_string(), cluster.to_string())
}

#[test]
fn every_file_has_a_test() {
    let mut names: Vec<_> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let known = [
        "health.yaml",
        "istio-outbound.yaml",
        "kernel-path.yaml",
        "rr-static.yaml",
        "seed-listener-http.yaml",
        "seed-outbound.yaml",
        "seed-routes.yaml",
        "seed-sidecar.yaml",
        "tidegate.yaml",
        "xds-ads.yaml",
        "xds-delta.yaml",
        "xds-files.yaml",
        "xds-istio-agent.yaml",
        "xds-istio-mtls.yaml",
        "xds-istio.yaml",
        "xds-rest.yaml",
        "xds-sds.yaml",
        "xds-spire.yaml",
    ];
    assert_eq!(names, known, "add a test for the new file here");
}

#[test]
fn seed_outbound() {
    let loaded = file("seed-outbound.yaml");
    assert_eq!(
        listeners(&loaded.bootstrap),
        [
            ("172.16.0.1_50001".into(), "172.16.0.1:50001".into(), false),
            ("172.16.0.2_50002".into(), "172.16.0.2:50002".into(), false),
            ("172.16.0.3_50003".into(), "172.16.0.3:50003".into(), false),
        ]
    );
    for (listener, service) in loaded.bootstrap.listeners.iter().zip(["foo", "bar", "baz"]) {
        let name = format!(
            "outbound|{}|v1|{service}-service.{service}.svc.cluster.local",
            listener.address().port()
        );
        let chain = &listener.filter_chains[0];
        assert_eq!(chosen(chain.terminal.as_ref()), &ClusterChoice::Single(name.as_str().into()));
        assert_eq!(chain.ignored_filters, ["istio.stats".into()]);
        assert_eq!(listener.traffic_direction, TrafficDirection::Outbound);
        assert_eq!(listener.access_log.len(), 1);
        assert!(endpoints(&loaded.bootstrap).contains_key(&name), "{name}");
    }
    let all: Vec<_> = endpoints(&loaded.bootstrap).into_values().flatten().collect();
    assert_eq!(
        all,
        ["10.0.0.1:80", "10.0.0.2:80", "11.0.0.1:80", "11.0.0.2:80", "12.0.0.1:80", "12.0.0.2:80"]
    );
    assert_eq!(loaded.bootstrap.admin.as_ref().unwrap().address, "127.0.0.1:15000".parse().unwrap());
    assert_eq!(loaded.ignored_filters, BTreeMap::from([("istio.stats".to_owned(), 3)]));
    assert_eq!(
        warnings(&loaded),
        ["seed-outbound.yaml:31: static_resources.listeners[0].filter_chains[0].filters[0]: network filter \
          \"istio.stats\" is accepted without effect (and 2 more like this)"]
    );
}

#[test]
fn seed_routes() {
    let loaded = file("seed-routes.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    for (index, (ip, port, service)) in
        [("172.16.0.1", 50001, "foo"), ("172.16.0.2", 50002, "bar"), ("172.16.0.3", 50003, "baz")]
            .into_iter()
            .enumerate()
    {
        let name = format!("{service}-service.{service}-namespace.svc.cluster.local");
        let expected = (format!("{name}:{port}"), format!("outbound|{port}|v1|{name}"));
        assert_eq!(virtual_host(&loaded.bootstrap, index, &format!("{ip}:{port}")), expected);
        assert_eq!(virtual_host(&loaded.bootstrap, index, &format!("{ip}:1")), expected);
        let other = ("allow_any".to_owned(), "PassthroughCluster".to_owned());
        assert_eq!(virtual_host(&loaded.bootstrap, index, "192.0.2.1:80"), other);
    }
}

#[test]
fn seed_listener_http() {
    let loaded = file("seed-listener-http.yaml");
    let addresses: Vec<_> = listeners(&loaded.bootstrap).into_iter().map(|(_, address, _)| address).collect();
    assert_eq!(addresses, ["127.0.0.1:10000", "127.0.0.1:10001", "127.0.0.1:10002"]);
    for (index, address) in addresses.iter().enumerate() {
        let host = virtual_host(&loaded.bootstrap, index, address);
        assert_eq!(host, ("allow_any".to_owned(), "PassthroughCluster".to_owned()));
    }
    let warnings = warnings(&loaded);
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    for (warning, name) in warnings.iter().zip(["foo-host", "bar-host", "baz-host"]) {
        assert!(
            warning.contains(&format!(
                "virtual_hosts[0].domains: virtual host \"{name}\" has no address among its domains, and host names can't \
                 be seen without reading HTTP: their connections go to the virtual host \"allow_any\""
            )),
            "{warning}"
        );
    }
    assert_eq!(endpoints(&loaded.bootstrap)["foo-cluster"], ["10.0.0.1:80", "10.0.0.2:80"]);
    let passthrough = loaded.bootstrap.clusters.last().unwrap();
    assert_eq!(
        (passthrough.discovery, passthrough.lb_policy),
        (Discovery::OriginalDst, LbPolicy::ClusterProvided)
    );
}

#[test]
fn seed_sidecar() {
    let loaded = file("seed-sidecar.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    assert_eq!(listeners(&loaded.bootstrap), [("listener_0".into(), "0.0.0.0:10000".into(), true)]);
    assert_eq!(
        virtual_host(&loaded.bootstrap, 0, "10.1.2.3:10000"),
        ("local_service".to_owned(), "local_app_cluster".to_owned())
    );
    assert_eq!(loaded.bootstrap.clusters[0].discovery, Discovery::StrictDns);
    assert_eq!(endpoints(&loaded.bootstrap)["local_app_cluster"], ["127.0.0.1:8080"]);
}

#[test]
fn istio_outbound() {
    let loaded = file("istio-outbound.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    let outbound = &loaded.bootstrap.listeners[0];
    assert_eq!(
        (&*outbound.name, outbound.use_original_dst, outbound.bind_to_port),
        ("virtualOutbound", true, true)
    );
    assert_eq!(outbound.listener_filters, [ListenerFilter::OriginalDst]);
    let names: Vec<_> = outbound.filter_chains.iter().map(|chain| &*chain.name).collect();
    assert_eq!(names, ["virtualOutbound-blackhole", "virtualOutbound-catchall-tcp"]);
    let wildcard = &loaded.bootstrap.listeners[2];
    assert_eq!(
        chosen(wildcard.default_filter_chain.as_ref().unwrap().terminal.as_ref()),
        &ClusterChoice::Single("PassthroughCluster".into())
    );
    assert_eq!(endpoints(&loaded.bootstrap)["BlackHoleCluster"], Vec::<String>::new());
}

#[test]
fn rr_static() {
    let loaded = file("rr-static.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    let Some(Terminal::TcpProxy(proxy)) = &loaded.bootstrap.listeners[0].filter_chains[0].terminal else {
        panic!()
    };
    assert_eq!(proxy.max_connect_attempts, 2);
    assert_eq!(proxy.idle_timeout, Some(std::time::Duration::from_secs(5)));
}

#[test]
fn health() {
    let loaded = file("health.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    assert_eq!(loaded.bootstrap.outlier_event_log, Some("/dev/stdout".into()));
    let cluster = &loaded.bootstrap.clusters[0];
    let seconds = std::time::Duration::from_secs;
    let detection = cluster.outlier_detection.as_ref().unwrap();
    assert_eq!((detection.consecutive_5xx, detection.max_ejection_percent), (3, 50));
    let check = cluster.health_check.as_ref().unwrap();
    assert_eq!((check.timeout, check.intervals.no_traffic), (seconds(1), seconds(5)));
    let Check::Tcp(tcp) = &check.check else { panic!("{check:?}") };
    assert_eq!((&tcp.send[..], &tcp.receive[..]), (&b"PING\r\n"[..], &[b"+PONG".to_vec()][..]));
    let endpoints = &cluster.load_assignment.localities[0].endpoints;
    let port = endpoints.iter().map(|it| it.health_check.as_ref().map(|it| it.port)).collect::<Vec<_>>();
    assert_eq!(port, [None, Some(16380)]);
    let web = loaded.bootstrap.clusters[1].health_check.as_ref().unwrap();
    assert!(matches!(&web.check, Check::Http(check) if check.path == "/healthz"), "{web:?}");
}

#[test]
fn kernel_path() {
    let Loaded { bootstrap, warnings, .. } = file("kernel-path.yaml");
    assert_eq!(warnings, []);
    let default = bootstrap.interception.unwrap().data_path;
    let stats = Stats::new(1);
    let logs = Registry::start(&stats, FlushSettings::default()).unwrap();
    let snapshot = Snapshot::build(
        bootstrap
            .listeners
            .iter()
            .map(|it| Arc::new(Listener::build(it, &stats, &logs, None).unwrap()))
            .collect(),
        bootstrap.clusters.iter().map(|it| Cluster::build(Arc::clone(it), &stats, None)).collect(),
    );
    let of = |name: &str| {
        plan(snapshot.listener(name).unwrap(), &snapshot, default).map(|plan| plan.chains[0].clusters.len())
    };
    assert_eq!((of("foo"), of("bar")), (Ok(1), Ok(1)));
    assert_eq!(of("baz"), Err(vec![Obstacle::ConnectAttempts(2)]));
}

#[test]
fn tidegate() {
    let loaded = file("tidegate.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    let interception = loaded.bootstrap.interception.unwrap();
    assert_eq!(interception.fail_mode, FailMode::Open);
    assert_eq!(interception.capture_port, Some(15001));
    assert_eq!(interception.cgroups, Vec::<PathBuf>::new());
}

/// Where listeners and clusters come from, and which cluster leads there.
fn sources(name: &str) -> (Source, Source, Option<ApiSource>, Vec<String>) {
    let loaded = file(name);
    assert_eq!(warnings(&loaded), Vec::<String>::new(), "{name}");
    let dynamic = &loaded.bootstrap.dynamic;
    let source = |config: &Option<ConfigSource>| config.as_ref().unwrap().source.clone();
    let ads = dynamic.ads.as_deref().cloned();
    let clusters = loaded.bootstrap.clusters.iter().map(|cluster| cluster.name.to_string()).collect();
    (source(&dynamic.lds), source(&dynamic.cds), ads, clusters)
}

#[test]
fn xds_over_one_stream() {
    for (name, protocol, cluster) in [
        ("xds-ads.yaml", Protocol::AggregatedGrpc, "control_plane"),
        ("xds-delta.yaml", Protocol::AggregatedDeltaGrpc, "control_plane"),
        ("xds-istio.yaml", Protocol::AggregatedDeltaGrpc, "xds-grpc"),
        ("xds-istio-mtls.yaml", Protocol::AggregatedDeltaGrpc, "xds-grpc"),
    ] {
        let (lds, cds, ads, clusters) = sources(name);
        assert_eq!((lds, cds), (Source::Ads, Source::Ads), "{name}");
        let ads = ads.unwrap();
        assert_eq!(
            (ads.protocol, &*ads.cluster, ads.set_node_on_first_message_only),
            (protocol, cluster, true)
        );
        assert_eq!(clusters, [cluster]);
    }
}

#[test]
fn xds_istio_is_a_sidecar_for_istiod() {
    let loaded = file("xds-istio.yaml");
    let node = &loaded.bootstrap.node;
    let parts: Vec<_> = node.id.split('~').collect();
    let metadata = &node.proto.metadata.as_ref().unwrap().fields;
    let text = |key: &str| match &metadata[key].kind {
        Some(tidegate_api::wkt::value::Kind::StringValue(text)) => text.as_str(),
        other => panic!("{key}: {other:?}"),
    };
    let pod = format!("{}.{}", text("NAME"), text("NAMESPACE"));
    let domain = format!("{}.svc.cluster.local", text("NAMESPACE"));
    assert_eq!(parts, ["sidecar", text("INSTANCE_IPS"), &pod, &domain]);
    assert_eq!(text("DNS_CAPTURE"), "false");
    let lds = loaded.bootstrap.dynamic.lds.unwrap();
    assert_eq!(lds.initial_fetch_timeout, None, "nothing is served before istiod has spoken");
}

/// TLS of the cluster of this name.
fn tls(bootstrap: &Bootstrap, cluster: &str) -> UpstreamTls {
    let found = bootstrap.clusters.iter().find(|it| &*it.name == cluster).unwrap();
    UpstreamTls::clone(found.tls.as_ref().unwrap())
}

#[test]
fn xds_istio_mtls_reads_what_pilot_agent_writes() {
    let loaded = file("xds-istio-mtls.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    let tls = tls(&loaded.bootstrap, "xds-grpc");
    let path = |source: &DataSource| source.path().map(|path| path.display().to_string());
    let Some(Provided::Here(own)) = &tls.certificate else { panic!("{tls:?}") };
    let files = [path(&own.chain), path(&own.private_key), tls.validation.trusted_ca.as_ref().and_then(path)];
    let expected = ["cert-chain.pem", "key.pem", "root-cert.pem"];
    assert_eq!(files, expected.map(|name| Some(format!("/etc/istio-output-certs/{name}"))));
    assert_eq!((tls.sni.as_deref(), tls.validation.names.len()), (Some("istiod.istio-system.svc"), 1));
}

#[test]
fn xds_sds_takes_secrets_from_a_server_and_from_a_file() {
    let loaded = file("xds-sds.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    let tls = tls(&loaded.bootstrap, "control_plane");
    let mut secrets = tls.secrets();
    let (own, wanted) = secrets.next().unwrap();
    assert_eq!((&*own.name, wanted), ("node-1", Use::Certificate));
    let Source::Api(api) = &own.config.source else { panic!("{own:?}") };
    assert_eq!((api.protocol, &*api.cluster), (Protocol::Grpc, "secrets"));
    let (ca, wanted) = secrets.next().unwrap();
    assert_eq!((&*ca.name, wanted), ("control-plane-ca", Use::Validation { has_ca: false }));
    assert!(matches!(&ca.config.source, Source::Path(path) if path.path.ends_with("control-plane-ca.yaml")));
}

#[test]
fn xds_istio_agent_is_reached_through_its_sockets() {
    let loaded = file("xds-istio-agent.yaml");
    let ads = loaded.bootstrap.dynamic.ads.as_ref().unwrap();
    assert_eq!((ads.protocol, &*ads.cluster), (Protocol::AggregatedDeltaGrpc, "xds-grpc"));
    let endpoints = endpoints(&loaded.bootstrap);
    assert_eq!(endpoints["xds-grpc"], ["./etc/istio/proxy/XDS"]);
    assert_eq!(endpoints["sds-grpc"], ["./var/run/secrets/workload-spiffe-uds/socket"]);
    assert!(loaded.bootstrap.clusters.iter().all(|cluster| !cluster.is_for_clients()));
    let warnings = warnings(&loaded);
    let extensions: Vec<_> = warnings.iter().filter(|it| it.contains("bootstrap_extensions")).collect();
    assert_eq!(extensions.len(), 2, "{warnings:#?}");
    assert!(extensions[0].ends_with("istio.workload.BootstrapExtension is accepted without effect"));
}

#[test]
fn xds_spire_takes_secrets_from_the_agent_s_socket() {
    let loaded = file("xds-spire.yaml");
    assert_eq!(warnings(&loaded), Vec::<String>::new());
    assert_eq!(endpoints(&loaded.bootstrap)["spire_agent"], ["/run/spire/sockets/agent.sock"]);
    let tls = tls(&loaded.bootstrap, "control_plane");
    let secrets: Vec<_> = tls.secrets().map(|(secret, wanted)| (&*secret.name, wanted)).collect();
    let expected = [
        ("spiffe://example.org/tidegate", Use::Certificate),
        ("spiffe://example.org", Use::Validation { has_ca: false }),
    ];
    assert_eq!(secrets, expected);
}

#[test]
fn xds_rest() {
    let (lds, cds, ads, clusters) = sources("xds-rest.yaml");
    assert_eq!((&lds, ads, clusters), (&cds, None, vec!["control_plane".to_owned()]));
    let Source::Api(api) = lds else { panic!("{lds:?}") };
    assert_eq!((api.protocol, &*api.cluster), (Protocol::Rest, "control_plane"));
    assert_eq!((api.refresh_delay.as_secs(), api.request_timeout.as_secs()), (5, 1));
}

#[test]
fn xds_files() {
    let (lds, cds, ..) = sources("xds-files.yaml");
    for (source, file) in [(lds, "lds.yaml"), (cds, "cds.yaml")] {
        let Source::Path(path) = source else { panic!("{source:?}") };
        assert_eq!(path.path, PathBuf::from("/etc/tidegate/xds").join(file));
        assert_eq!(path.watched_directory.as_deref(), Some("/etc/tidegate/xds".as_ref()));
    }
}

#[test]
fn an_overlay_is_merged_over_the_file() {
    let content = std::fs::read(directory().join("rr-static.yaml")).unwrap();
    let sources = Sources {
        config_path: Some(Text::from_file("rr-static.yaml", content).unwrap()),
        config_yaml: Some(Text::yaml(
            "--config-yaml",
            "node: {id: laptop}\nadmin: {address: {socket_address: {port_value: 9}}}",
        )),
    };
    let bootstrap = load(&sources, &static_options()).unwrap().bootstrap;
    assert_eq!(bootstrap.node.id, "laptop");
    assert_eq!(bootstrap.admin.unwrap().address, "127.0.0.1:9".parse().unwrap());
    assert_eq!(bootstrap.listeners.len(), 1);
}
