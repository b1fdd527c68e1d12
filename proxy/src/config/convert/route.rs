//! http_connection_manager and its route configuration, as far as L4 can serve them.

use std::collections::HashMap;
use std::sync::Arc;

use tidegate_api::core;
use tidegate_api::envoy::extensions::filters::http::router::v3::Router;
use tidegate_api::http_connection_manager as api;
use tidegate_api::http_connection_manager::http_connection_manager::{HcmAccessLogOptions, RouteSpecifier};
use tidegate_api::http_connection_manager::http_filter::ConfigType;
use tidegate_api::route::RouteConfiguration;

use super::access_log::access_logs;
use super::extension::{Extension, unregistered};
use super::tcp_proxy::IDLE_TIMEOUT;
use super::{Report, inactive, optional_duration};
use crate::config::filter_chain::Terminal;
use crate::config::proto::FieldPath;
use crate::config::route::{Domain, HttpRouting, RdsRouting, VirtualHost};
use crate::config::tcp_proxy::{ClusterChoice, TcpProxy};

mod virtual_host;

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn http_terminal(
    manager: api::HttpConnectionManager,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Terminal> {
    let api::HttpConnectionManager {
        codec_type: _, // bytes pass as they are
        stat_prefix,
        http_filters,
        add_user_agent,
        tracing,
        common_http_protocol_options,
        http1_safe_max_connection_duration,
        http_protocol_options,
        http2_protocol_options,
        http3_protocol_options,
        server_name,
        server_header_transformation,
        scheme_header_transformation,
        max_request_headers_kb,
        stream_idle_timeout,
        stream_flush_timeout,
        request_timeout,
        request_headers_timeout,
        drain_timeout,
        drain_timeout_jitter,
        delayed_close_timeout,
        access_log,
        access_log_flush_interval,
        flush_access_log_on_new_request,
        access_log_options,
        use_remote_address,
        xff_num_trusted_hops,
        original_ip_detection_extensions,
        early_header_mutation_extensions,
        internal_address_config,
        skip_xff_append,
        via,
        generate_request_id,
        preserve_external_request_id,
        always_set_request_id_in_response,
        forward_client_cert_details,
        set_current_client_cert_details,
        forward_client_cert_matcher,
        proxy_100_continue,
        represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        upgrade_configs,
        normalize_path,
        merge_slashes,
        path_with_escaped_slashes_action,
        request_id_extension,
        local_reply_config,
        strip_matching_host_port,
        stream_error_on_invalid_http_message,
        path_normalization_options,
        strip_trailing_host_dot,
        proxy_status_config,
        typed_header_validation_config,
        append_x_forwarded_port,
        append_local_overload,
        add_proxy_protocol_connection_state,
        forward_proto_config,
        route_specifier,
        strip_port_mode,
    } = manager;
    inactive!(report, path, "HttpConnectionManager";
        add_user_agent, tracing, http1_safe_max_connection_duration, http_protocol_options,
        http2_protocol_options, http3_protocol_options, server_name, server_header_transformation,
        scheme_header_transformation, max_request_headers_kb, stream_idle_timeout, stream_flush_timeout,
        request_timeout, request_headers_timeout, drain_timeout, drain_timeout_jitter, delayed_close_timeout,
        access_log_flush_interval, flush_access_log_on_new_request, use_remote_address, xff_num_trusted_hops,
        original_ip_detection_extensions, early_header_mutation_extensions, internal_address_config,
        skip_xff_append, via, generate_request_id, preserve_external_request_id,
        always_set_request_id_in_response, forward_client_cert_details, set_current_client_cert_details,
        forward_client_cert_matcher, proxy_100_continue, represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
        upgrade_configs, normalize_path, merge_slashes, path_with_escaped_slashes_action, request_id_extension,
        local_reply_config, strip_matching_host_port, stream_error_on_invalid_http_message,
        path_normalization_options, strip_trailing_host_dot, proxy_status_config,
        typed_header_validation_config, append_x_forwarded_port, append_local_overload,
        add_proxy_protocol_connection_state, forward_proto_config, strip_port_mode);
    check_http_filters(http_filters, path, report);
    let mut proxy = TcpProxy {
        stat_prefix: Arc::from(stat_prefix),
        clusters: ClusterChoice::Single(Arc::from("")),
        idle_timeout: Some(IDLE_TIMEOUT),
        max_connect_attempts: 1,
        backoff: None,
        max_downstream_connection_duration: None,
        max_downstream_connection_duration_jitter_percentage: None,
        access_log: access_logs(access_log, path, report),
        access_log_flush_interval: None,
        flush_access_log_on_connected: false,
        flush_access_log_on_start: false,
        hash_policy: None,
    };
    protocol_options(common_http_protocol_options, &mut proxy, path, report);
    if let Some(options) = access_log_options {
        let HcmAccessLogOptions {
            access_log_flush_interval,
            flush_access_log_on_new_request,
            flush_log_on_tunnel_successfully_established,
        } = options;
        let path = path.field("access_log_options");
        inactive!(report, &path, "HcmAccessLogOptions";
            flush_access_log_on_new_request, flush_log_on_tunnel_successfully_established);
        proxy.access_log_flush_interval =
            optional_duration(access_log_flush_interval, &path, "access_log_flush_interval", report);
    }
    match route_specifier {
        Some(RouteSpecifier::RouteConfig(config)) => {
            let path = path.field("route_config");
            let routing = route_config(config, vec![], Validate::Unless, &proxy, &path, report);
            Some(Terminal::HttpAsTcp(Arc::new(routing)))
        }
        Some(RouteSpecifier::Rds(api::Rds { config_source, route_config_name })) => {
            let path = path.field("rds");
            if route_config_name.is_empty() {
                report.missing(&path, "route_config_name");
                return None;
            }
            let Some(config_source) = config_source else {
                report.missing(&path, "config_source");
                return None;
            };
            let config =
                super::config_source::config_source(config_source, &path.field("config_source"), report)?;
            let route_config_name = Arc::from(route_config_name);
            Some(Terminal::HttpFromRds(Arc::new(RdsRouting { proxy, route_config_name, config })))
        }
        Some(RouteSpecifier::ScopedRoutes(_)) => {
            report.warn(
                &path.field("scoped_routes"),
                "scopes are chosen by HTTP headers, which are not read: connections end with flag NR",
            );
            let routing = HttpRouting::new(proxy.stat_prefix.clone(), Arc::from(""), vec![]);
            Some(Terminal::HttpAsTcp(Arc::new(routing)))
        }
        None => {
            report.missing(path, "route_config");
            None
        }
    }
}

/// The limits of a connection that also mean something to TCP.
fn protocol_options(
    options: Option<core::HttpProtocolOptions>,
    proxy: &mut TcpProxy,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) {
    let Some(options) = options else { return };
    let core::HttpProtocolOptions {
        idle_timeout,
        max_connection_duration,
        max_connection_duration_jitter,
        max_headers_count,
        max_response_headers_kb,
        max_stream_duration,
        headers_with_underscores_action,
        max_requests_per_connection,
    } = options;
    let path = path.field("common_http_protocol_options");
    inactive!(report, &path, "HttpProtocolOptions";
        max_headers_count, max_response_headers_kb, max_stream_duration, headers_with_underscores_action,
        max_requests_per_connection);
    if idle_timeout.is_some() {
        proxy.idle_timeout = optional_duration(idle_timeout, &path, "idle_timeout", report)
            .filter(|timeout| !timeout.is_zero());
    }
    proxy.max_downstream_connection_duration =
        optional_duration(max_connection_duration, &path, "max_connection_duration", report);
    proxy.max_downstream_connection_duration_jitter_percentage =
        max_connection_duration_jitter.map(|percent| percent.value);
}

/// HTTP filters are not applied. Those that decide who may pass are refused instead.
fn check_http_filters(filters: Vec<api::HttpFilter>, path: &FieldPath<'_>, report: &mut Report<'_>) {
    const AUTHORISING: [&str; 11] = [
        ".rbac.",
        ".ext_authz.",
        ".jwt_authn.",
        ".oauth2.",
        ".basic_auth.",
        ".api_key_auth.",
        ".csrf.",
        ".ext_proc.",
        ".wasm.",
        ".lua.",
        ".golang.",
    ];
    let filters_path = path.field("http_filters");
    for (index, filter) in filters.into_iter().enumerate() {
        let path = filters_path.index(index);
        let api::HttpFilter { name, is_optional, disabled, config_type } = filter;
        let config = match config_type {
            _ if disabled => continue,
            Some(ConfigType::TypedConfig(any)) => Extension::new(any),
            Some(ConfigType::ConfigDiscovery(_)) => {
                report.unsupported(
                    &path.field("config_discovery"),
                    "filter discovery (ECDS) is not supported in this version; use typed_config",
                );
                continue;
            }
            // Envoy gives the router its defaults.
            None if name == "envoy.filters.http.router" => continue,
            None => {
                unregistered(&name, "", &path, report);
                continue;
            }
        };
        let path = path.field("typed_config");
        if config.is::<Router>() {
            let Some(Router { .. }) = config.decode::<Router>(&path, report) else { continue };
        } else if !name.starts_with("istio.")
            && AUTHORISING.iter().any(|kind| config.type_name.contains(kind))
        {
            report.unsupported(
                &path,
                format!("HTTP filter {} can't be applied to TCP, and connections would pass without it; remove it \
                         if that is meant", config.type_name),
            );
        } else if config.known || is_optional || name.starts_with("istio.") {
            report.warn_once(
                format!("http filter {}", config.type_name),
                &path,
                format!("HTTP filter {name:?} is not applied: HTTP listeners are served as TCP"),
            );
        } else {
            unregistered(&name, config.type_url(), &path, report);
        }
    }
}

/// `validate_clusters` where the configuration doesn't say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Validate {
    /// Routes may only name clusters that exist, unless it says otherwise: Envoy's rule for inline routes.
    Unless,
    /// Any name will do: Envoy's rule for RDS.
    Never,
}

/// `discovered` are virtual hosts that came by VHDS.
pub(in crate::config) fn route_config(
    config: RouteConfiguration,
    discovered: Vec<tidegate_api::route::VirtualHost>,
    validate: Validate,
    proxy: &TcpProxy,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> HttpRouting {
    let RouteConfiguration {
        name,
        mut virtual_hosts,
        vhds,
        internal_only_headers,
        response_headers_to_add,
        response_headers_to_remove,
        request_headers_to_add,
        request_headers_to_remove,
        most_specific_header_mutations_wins,
        validate_clusters,
        max_direct_response_body_size_bytes,
        cluster_specifier_plugins,
        request_mirror_policies,
        ignore_port_in_host_matching,
        vhost_header,
        ignore_path_parameters_in_path_matching,
        typed_per_filter_config,
        metadata,
        route_specifiers,
    } = config;
    inactive!(report, path, "RouteConfiguration";
        internal_only_headers, response_headers_to_add, response_headers_to_remove, request_headers_to_add,
        request_headers_to_remove, most_specific_header_mutations_wins, max_direct_response_body_size_bytes,
        cluster_specifier_plugins, request_mirror_policies, ignore_port_in_host_matching, vhost_header,
        ignore_path_parameters_in_path_matching, typed_per_filter_config, metadata, route_specifiers);
    if validate == Validate::Unless {
        // As in Envoy, only routes that come by RDS can have hosts that come by VHDS: whoever keeps them up to date
        // subscribes to it.
        inactive!(report, path, "RouteConfiguration"; vhds);
    }
    let of = virtual_host::Of {
        proxy,
        validate_clusters: validate_clusters.unwrap_or(validate == Validate::Unless),
    };
    virtual_hosts.extend(discovered);
    let hosts = super::each(virtual_hosts, path, "virtual_hosts", |host, path| {
        Some(virtual_host::virtual_host(host, &of, path, report))
    });
    check_domains(&name, &hosts, path, report);
    HttpRouting::new(proxy.stat_prefix.clone(), Arc::from(name), hosts)
}

/// Envoy's rule of unique domains, and what L4 makes of hosts that have names only.
fn check_domains(route: &str, hosts: &[VirtualHost], path: &FieldPath<'_>, report: &mut Report<'_>) {
    let hosts_path = path.field("virtual_hosts");
    let mut owners: HashMap<&str, usize> = HashMap::new();
    let any = hosts.iter().find(|host| host.domains.iter().any(|domain| &**domain == "*"));
    for (index, host) in hosts.iter().enumerate() {
        let path = hosts_path.index(index);
        let domains_path = path.field("domains");
        for (at, domain) in host.domains.iter().enumerate() {
            if owners.insert(domain, index).is_some() {
                let message = if &**domain == "*" {
                    format!("only a single wildcard domain is permitted in route {route:?}")
                } else {
                    format!(
                        "only unique values for domains are permitted; duplicate entry of domain {domain:?} in \
                             route {route:?}"
                    )
                };
                report.invalid(&domains_path.index(at), message);
            }
        }
        if host.domains.iter().all(|domain| Domain::new(domain) == Domain::Name) {
            let instead = match any {
                Some(other) => format!("their connections go to the virtual host {:?}", &*other.name),
                None => "their connections end with flag NR".to_owned(),
            };
            report.warn(
                &domains_path,
                format!("virtual host {:?} has no address among its domains, and host names can't be seen without \
                         reading HTTP: {instead}; add the service's address to its domains", &*host.name),
            );
        }
    }
}
