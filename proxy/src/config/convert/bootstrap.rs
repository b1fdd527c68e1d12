//! `Bootstrap`.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tidegate_api::bootstrap as api;
use tidegate_api::bootstrap::bootstrap as parts;
use tidegate_api::cluster::cluster::{ClusterDiscoveryType, DiscoveryType};
use tidegate_api::core;
use tidegate_api::interception as extension_api;

use super::access_log::access_logs;
use super::bind::bind_config;
use super::cluster::{cluster, data_path_mode};
use super::config_source::{ads_config, config_source};
use super::extension::{Extension, unregistered};
use super::listener::listener;
use super::net::{cidr, socket_addr};
use super::runtime::runtime;
use super::servers::server_clusters;
use super::tls::check_secret_servers;
use super::{Report, each, enumeration, inactive, optional_duration, port};
use crate::config::bootstrap::{
    Admin, Bootstrap, DynamicResources, Exclusions, FailMode, Interception, KernelPathCapacity, Node, OnExit,
};
use crate::config::cluster::Cluster;
use crate::config::listener::Listener;
use crate::config::proto::FieldPath;
use crate::config::upstream_bind::BindConfig;

/// Envoy's default of `stats_flush_interval`.
const STATS_FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// How large the buffers of internal listeners are. Those are refused where they are named.
const INTERNAL_LISTENER: &str = "envoy.extensions.bootstrap.internal_listener.v3.InternalListener";

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(in crate::config) fn bootstrap(bootstrap: api::Bootstrap, report: &mut Report<'_>) -> Bootstrap {
    let root = FieldPath::ROOT;
    let path = &root;
    let server_clusters = server_clusters(&bootstrap);
    let api::Bootstrap {
        node,
        node_context_params,
        static_resources,
        dynamic_resources,
        cluster_manager,
        hds_config,
        flags_path,
        stats_sinks,
        deferred_stat_options: _, // how Envoy saves memory on stats
        stats_config,
        stats_flush_interval,
        watchdog,
        watchdogs,
        tracing,
        layered_runtime,
        admin,
        overload_manager,
        enable_dispatcher_stats,
        header_prefix,
        stats_server_version_override,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        bootstrap_extensions,
        fatal_actions,
        config_sources,
        default_config_source,
        default_socket_interface,
        certificate_provider_instances,
        inline_headers,
        perf_tracing_file_path,
        default_regex_engine: _, // there are no regular expressions
        xds_delegate_extension,
        xds_config_tracker_extension,
        listener_manager,
        application_log_config,
        grpc_async_client_manager_config: _, // how Envoy caches gRPC clients
        memory_allocator_manager: _,         // tcmalloc
        enable_worker_cpu_affinity,
        stats_flush,
        stats_eviction,
    } = bootstrap;
    inactive!(report, path, "Bootstrap";
        node_context_params, hds_config, flags_path, stats_sinks, stats_config, watchdog, watchdogs,
        tracing, overload_manager, enable_dispatcher_stats, header_prefix, stats_server_version_override,
        use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config, fatal_actions, config_sources,
        default_config_source, default_socket_interface, certificate_provider_instances, inline_headers,
        perf_tracing_file_path, xds_delegate_extension, xds_config_tracker_extension, listener_manager,
        application_log_config, enable_worker_cpu_affinity, stats_flush, stats_eviction);
    report.is_bootstrap = true;
    report.server_clusters = server_clusters;
    let runtime = runtime(layered_runtime, path, report);
    let parts::StaticResources { listeners, clusters, secrets } = static_resources.unwrap_or_default();
    let resources = path.field("static_resources");
    report.secrets = super::secret::secrets(secrets, &resources, report);
    // Routes are checked against these names.
    let names: HashSet<_> = clusters.iter().map(|cluster| cluster.name.clone()).collect();
    report.set_clusters(move |name| names.contains(name));
    check_cluster_names(&clusters, &resources, report);
    check_servers(&clusters, dynamic_resources.as_ref(), report);
    let dynamic = dynamic(dynamic_resources, path, report);
    let (outlier_event_log, upstream_bind) = cluster_manager
        .map(|it| self::cluster_manager(it, &path.field("cluster_manager"), report))
        .unwrap_or_default();
    report.set_upstream_bind(upstream_bind.clone());
    let order: Vec<_> = clusters.iter().map(|cluster| cluster.name.clone()).collect();
    let clusters: Vec<Arc<Cluster>> =
        each(clusters, &resources, "clusters", |it, path| cluster(it, path, report).map(Arc::new));
    let path_of = |name: &str| order.iter().position(|other| other == name);
    check_secret_servers(&clusters, &dynamic, path_of, &resources, report);
    let pipes: HashSet<_> =
        clusters.iter().filter(|it| it.has_pipes).map(|it| Arc::clone(&it.name)).collect();
    report.set_pipes(move |name| pipes.contains(name));
    let mut known = Known::default();
    let listeners: Vec<Arc<Listener>> = each(listeners, &resources, "listeners", |it, path| {
        let it = listener(it, &runtime, path, report)?;
        known.check(&it, path, report);
        Some(Arc::new(it))
    });
    Bootstrap {
        node: node.map(|it| self::node(it, &path.field("node"), report)).unwrap_or_default(),
        admin: admin.and_then(|it| self::admin(it, &path.field("admin"), report)),
        listeners,
        clusters,
        dynamic,
        runtime,
        outlier_event_log,
        upstream_bind,
        interception: extensions(bootstrap_extensions, path, report),
        stats_flush_interval: optional_duration(stats_flush_interval, path, "stats_flush_interval", report)
            .unwrap_or(STATS_FLUSH_INTERVAL),
    }
}

/// Where the outlier event log is, and what sockets to endpoints are bound to.
fn cluster_manager(
    manager: api::ClusterManager,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> (Option<PathBuf>, Option<Arc<BindConfig>>) {
    let api::ClusterManager {
        local_cluster_name,
        outlier_detection,
        upstream_bind_config,
        load_stats_config,
        enable_deferred_cluster_creation: _, // how Envoy saves memory on clusters without traffic
    } = manager;
    inactive!(report, path, "ClusterManager"; local_cluster_name, load_stats_config);
    let upstream_bind = bind_config(upstream_bind_config, path, report).map(Arc::new);
    let Some(outlier_detection) = outlier_detection else { return (None, upstream_bind) };
    let api::cluster_manager::OutlierDetection { event_log_path, event_service } = outlier_detection;
    let path = path.field("outlier_detection");
    inactive!(report, &path, "ClusterManager.OutlierDetection"; event_service);
    ((!event_log_path.is_empty()).then(|| event_log_path.into()), upstream_bind)
}

fn dynamic(
    resources: Option<parts::DynamicResources>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> DynamicResources {
    let Some(resources) = resources else { return DynamicResources::default() };
    let parts::DynamicResources {
        lds_config,
        lds_resources_locator,
        cds_config,
        cds_resources_locator,
        ads_config: ads,
    } = resources;
    let path = path.field("dynamic_resources");
    for (field, locator) in
        [("lds_resources_locator", lds_resources_locator), ("cds_resources_locator", cds_resources_locator)]
    {
        if !locator.is_empty() {
            report
                .unsupported(&path.field(field), "xdstp resource locators are not supported in this version");
        }
    }
    let mut source = |config: Option<core::ConfigSource>, field: &str| {
        config.and_then(|config| config_source(config, &path.field(field), report))
    };
    let (cds, lds) = (source(cds_config, "cds_config"), source(lds_config, "lds_config"));
    let ads = ads.and_then(|config| ads_config(config, &path.field("ads_config"), report));
    DynamicResources { ads, cds, lds }
}

/// What sources of configuration may refer to.
fn check_servers(
    clusters: &[tidegate_api::cluster::Cluster],
    resources: Option<&parts::DynamicResources>,
    report: &mut Report<'_>,
) {
    let eds = ClusterDiscoveryType::Type(DiscoveryType::Eds as i32);
    let servers: HashSet<String> = clusters
        .iter()
        .filter(|cluster| cluster.cluster_discovery_type.as_ref() != Some(&eds))
        .map(|cluster| cluster.name.clone())
        .collect();
    report.is_server = Box::new(move |name| servers.contains(name));
    report.has_ads = resources.is_some_and(|resources| resources.ads_config.is_some());
}

fn check_cluster_names(
    clusters: &[tidegate_api::cluster::Cluster],
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) {
    let path = path.field("clusters");
    let mut names = HashSet::new();
    for (index, cluster) in clusters.iter().enumerate() {
        if !names.insert(&cluster.name) {
            report.invalid(&path.index(index).field("name"), format!("duplicate cluster {:?}", cluster.name));
        }
    }
}

/// Names and addresses of the listeners so far.
#[derive(Default)]
struct Known {
    names: HashSet<Arc<str>>,
    addresses: HashMap<SocketAddr, Arc<str>>,
}

impl Known {
    fn check(&mut self, listener: &Listener, path: &FieldPath<'_>, report: &mut Report<'_>) {
        if !self.names.insert(listener.name.clone()) {
            report.invalid(
                &path.field("name"),
                format!(
                    "duplicate listener {:?}: the later one would replace the earlier one",
                    &*listener.name
                ),
            );
            return;
        }
        for address in listener.addresses.iter().filter(|address| address.port() != 0) {
            if let Some(other) = self.addresses.insert(*address, listener.name.clone()) {
                report.invalid(
                    &path.field("address"),
                    format!(
                        "listener {:?} has duplicate address {address} as existing listener {:?}",
                        &*listener.name, &*other
                    ),
                );
            }
        }
    }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn node(node: core::Node, path: &FieldPath<'_>, report: &mut Report<'_>) -> Node {
    let proto = node.clone();
    let core::Node {
        id,
        cluster,
        // What a control plane is told; the proxy overwrites the last ones itself, as Envoy does.
        metadata: _,
        dynamic_parameters: _,
        locality,
        user_agent_name: _,
        extensions: _,
        client_features: _,
        listening_addresses,
        user_agent_version_type: _,
    } = node;
    inactive!(report, path, "Node"; listening_addresses);
    let core::Locality { region: _, zone, sub_zone: _ } = locality.unwrap_or_default();
    Node { id, cluster, zone, proto }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn admin(admin: api::Admin, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Admin> {
    let api::Admin {
        access_log,
        access_log_path,
        profile_path: _, // Envoy's own profiler
        address,
        socket_options,
        ignore_global_conn_limit: _, // there is no global limit yet
        allow_paths,
    } = admin;
    inactive!(report, path, "Admin"; socket_options);
    if !allow_paths.is_empty() {
        report.unsupported(
            &path.field("allow_paths"),
            "not supported in this version, and every path would be open; remove it",
        );
    }
    let mut access_log = access_logs(access_log, path, report);
    if !access_log_path.is_empty() {
        access_log.extend(super::access_log::plain_file(access_log_path));
    }
    // Without an address Envoy has no admin server either.
    address.as_ref()?;
    Some(Admin { address: socket_addr(address, path, "address", report)?, access_log })
}

fn extensions(
    extensions: Vec<core::TypedExtensionConfig>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Interception> {
    let mut found = None;
    let extensions_path = path.field("bootstrap_extensions");
    for (index, extension) in extensions.into_iter().enumerate() {
        let path = extensions_path.index(index);
        let core::TypedExtensionConfig { name, typed_config } = extension;
        let config = Extension::new(typed_config.unwrap_or_default());
        let path = path.field("typed_config");
        if config.is::<extension_api::Interception>() {
            if found.is_some() {
                report.invalid(&path, "a second Interception; there can be only one");
            }
            found = config.decode(&path, report).map(|it| interception(it, &path, report));
        } else if config.type_name.starts_with("istio.") || config.type_name == INTERNAL_LISTENER {
            report
                .warn(&path, format!("bootstrap extension {} is accepted without effect", config.type_name));
        } else if config.known {
            report.unsupported(
                &path,
                format!("bootstrap extension {} is not supported in this version", config.type_name),
            );
        } else {
            unregistered(&name, config.type_url(), &path, report);
        }
    }
    found
}

fn interception(
    interception: extension_api::Interception,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Interception {
    let extension_api::Interception {
        cgroups,
        intercept_host_namespace,
        host_cgroups,
        fail_mode,
        capture_port,
        exclude,
        in_flight_capacity,
        pin_path,
        map_sizes,
        data_path,
        on_exit,
    } = interception;
    let extension_api::interception::MapSizes {
        destinations,
        namespaces,
        services,
        clusters,
        hosts,
        balancing_words,
    } = map_sizes.unwrap_or_default();
    let exclude = exclude.map(|exclude| {
        let extension_api::interception::Exclusions { cidrs, ports } = exclude;
        let path = path.field("exclude");
        Exclusions {
            cidrs: each(cidrs, &path, "cidrs", |range, path| cidr(range, path, report)),
            ports: each(ports, &path, "ports", |number, path| port(number, path, report)),
        }
    });
    let fail_mode = match enumeration(fail_mode, path, "fail_mode", report) {
        Some(extension_api::interception::FailMode::Open) | None => FailMode::Open,
        Some(extension_api::interception::FailMode::Closed) => FailMode::Closed,
    };
    let on_exit = match enumeration(on_exit, path, "on_exit", report) {
        Some(extension_api::interception::OnExit::Release) | None => OnExit::Release,
        Some(extension_api::interception::OnExit::Keep) => OnExit::Keep,
    };
    let data_path = data_path.and_then(|it| data_path_mode(it, &path.field("data_path"), report));
    if !pin_path.is_empty() && !pin_path.starts_with('/') {
        report.invalid(&path.field("pin_path"), format!("{pin_path:?} is not an absolute path"));
    }
    Interception {
        cgroups: cgroups.into_iter().map(PathBuf::from).collect(),
        host_namespace: intercept_host_namespace,
        host_cgroups: host_cgroups.into_iter().map(PathBuf::from).collect(),
        fail_mode,
        capture_port: capture_port.and_then(|number| port(number, &path.field("capture_port"), report)),
        exclude: exclude.unwrap_or_default(),
        pin_path: Some(pin_path).filter(|path| !path.is_empty()).map(PathBuf::from),
        in_flight_capacity,
        destination_capacity: destinations,
        namespace_capacity: namespaces,
        kernel_path: KernelPathCapacity { services, clusters, hosts, balancing_words },
        data_path: data_path.unwrap_or_default(),
        on_exit,
    }
}
