//! Which clusters the sources of a bootstrap lead to.

use std::collections::HashSet;

use tidegate_api::bootstrap::Bootstrap;
use tidegate_api::core;
use tidegate_api::core::config_source::ConfigSourceSpecifier;
use tidegate_api::core::grpc_service::TargetSpecifier;
use tidegate_api::core::transport_socket::ConfigType;
use tidegate_api::http_connection_manager::HttpConnectionManager;
use tidegate_api::http_connection_manager::http_connection_manager::RouteSpecifier;
use tidegate_api::listener::filter::ConfigType as FilterConfig;
use tidegate_api::tls::UpstreamTlsContext;
use tidegate_api::tls::common_tls_context::ValidationContextType;

use crate::config::proto::unpack;

/// Names of the clusters through which the bootstrap's own sources reach their servers.
pub(super) fn server_clusters(bootstrap: &Bootstrap) -> HashSet<String> {
    let mut names = HashSet::new();
    let mut api = |api: &core::ApiConfigSource| {
        names.extend(api.cluster_names.iter().cloned());
        names.extend(api.grpc_services.iter().filter_map(|service| match &service.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(target)) => Some(target.cluster_name.clone()),
            _ => None,
        }));
    };
    let mut source = |source: &core::ConfigSource| {
        if let Some(ConfigSourceSpecifier::ApiConfigSource(it)) = &source.config_source_specifier {
            api(it);
        }
    };
    if let Some(dynamic) = &bootstrap.dynamic_resources {
        dynamic.lds_config.iter().for_each(&mut source);
        dynamic.cds_config.iter().for_each(&mut source);
    }
    let clusters = || bootstrap.static_resources.iter().flat_map(|it| &it.clusters);
    clusters()
        .filter_map(|cluster| cluster.eds_cluster_config.as_ref()?.eds_config.as_ref())
        .for_each(&mut source);
    // A server of secrets may ask for TLS, too.
    clusters().flat_map(secret_sources).for_each(|config| source(&config));
    let listeners = bootstrap.static_resources.iter().flat_map(|it| &it.listeners);
    listeners.flat_map(route_sources).for_each(|config| source(&config));
    bootstrap.dynamic_resources.iter().filter_map(|it| it.ads_config.as_ref()).for_each(api);
    names
}

/// Where a listener's routes come from.
fn route_sources(listener: &tidegate_api::listener::Listener) -> Vec<core::ConfigSource> {
    let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
    let managers = chains.flat_map(|chain| &chain.filters).filter_map(|filter| match &filter.config_type {
        // What can't be read is reported when the listener is converted.
        Some(FilterConfig::TypedConfig(any)) => unpack::<HttpConnectionManager>(any).ok(),
        _ => None,
    });
    managers
        .flat_map(|manager| match manager.route_specifier {
            Some(RouteSpecifier::Rds(rds)) => rds.config_source.into_iter().collect(),
            Some(RouteSpecifier::RouteConfig(routes)) => {
                routes.vhds.and_then(|vhds| vhds.config_source).into_iter().collect()
            }
            _ => Vec::new(),
        })
        .collect()
}

/// Where a cluster's secrets come from.
fn secret_sources(cluster: &tidegate_api::cluster::Cluster) -> Vec<core::ConfigSource> {
    let Some(core::TransportSocket { config_type: Some(ConfigType::TypedConfig(any)), .. }) =
        &cluster.transport_socket
    else {
        return Vec::new();
    };
    // What can't be read is reported when the cluster is converted.
    let Ok(context) = unpack::<UpstreamTlsContext>(any) else { return Vec::new() };
    let common = context.common_tls_context.unwrap_or_default();
    let validation = match common.validation_context_type {
        Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => Some(secret),
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            combined.validation_context_sds_secret_config
        }
        _ => None,
    };
    let secrets = common.tls_certificate_sds_secret_configs.into_iter().chain(validation);
    secrets.filter_map(|secret| secret.sds_config).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::proto::{Options, Source as Text, parse_bootstrap};

    #[test]
    fn server_clusters_are_found_wherever_the_bootstrap_has_sources() {
        let yaml = "
dynamic_resources:
  ads_config: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: ads}}]}
  cds_config: {api_config_source: {api_type: REST, cluster_names: [cds], refresh_delay: 1s}}
  lds_config: {api_config_source: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: lds}}]}}
static_resources:
  clusters:
  - name: a
    type: EDS
    eds_cluster_config: {eds_config: {api_config_source: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: eds}}]}}}
  listeners:
  - name: l
    address: {socket_address: {address: 127.0.0.1, port_value: 1}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: s
          rds:
            route_config_name: r
            config_source: {api_config_source: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: rds}}]}}
";
        let parsed = parse_bootstrap(&Text::yaml("t", yaml), &[], &Options::default()).unwrap();
        let names = server_clusters(&parsed.message);
        assert_eq!(names, ["ads", "cds", "lds", "eds", "rds"].map(str::to_owned).into());
    }
}
