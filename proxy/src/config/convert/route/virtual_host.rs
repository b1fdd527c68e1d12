//! A virtual host: the cluster behind its `prefix: /` route.

use std::sync::Arc;

use tidegate_api::route as api;
use tidegate_api::route::route::Action;
use tidegate_api::route::route_action::ClusterSpecifier;
use tidegate_api::route::route_match::PathSpecifier;
use tidegate_api::route::virtual_host::TlsRequirementType;

use crate::config::convert::{Report, enumeration, inactive, tcp_proxy};
use crate::config::proto::FieldPath;
use crate::config::route::VirtualHost;
use crate::config::tcp_proxy::{ClusterChoice, TcpProxy, WeightedCluster};

/// What all virtual hosts of a route configuration share.
pub(super) struct Of<'a> {
    /// What the connection manager says of connections; the clusters are the route's.
    pub(super) proxy: &'a TcpProxy,
    /// Whether routes may only name clusters that exist.
    pub(super) validate_clusters: bool,
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn virtual_host(
    host: api::VirtualHost,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> VirtualHost {
    let api::VirtualHost {
        name,
        domains,
        routes,
        matcher,
        require_tls,
        virtual_clusters: _, // stats of requests
        rate_limits,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        cors,
        typed_per_filter_config,
        include_request_attempt_count,
        include_attempt_count_in_response,
        retry_policy,
        retry_policy_typed_config,
        hedge_policy,
        include_is_timeout_retry_header,
        per_request_buffer_limit_bytes,
        request_body_buffer_limit,
        request_mirror_policies,
        metadata,
        route_specifiers,
    } = host;
    inactive!(report, path, "VirtualHost";
        rate_limits, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
        response_headers_to_remove, cors, typed_per_filter_config, include_request_attempt_count,
        include_attempt_count_in_response, retry_policy, retry_policy_typed_config, hedge_policy,
        include_is_timeout_retry_header, per_request_buffer_limit_bytes, request_body_buffer_limit,
        request_mirror_policies, metadata, route_specifiers);
    let mut found = first_served(routes, of, path, report);
    let mut close = |field: &str, why: &str, report: &mut Report<'_>| {
        found = None;
        report.warn(
            &path.field(field),
            format!(
                "virtual host {name:?} {why}, which can't be done without reading HTTP: its connections end \
                     with flag NR"
            ),
        );
    };
    if matcher.is_some() {
        close("matcher", "chooses its route by a matcher tree", report);
    }
    let require_tls = enumeration(require_tls, path, "require_tls", report);
    if require_tls.unwrap_or(TlsRequirementType::None) != TlsRequirementType::None {
        close("require_tls", "redirects plaintext to TLS", report);
    }
    let (route_name, proxy) = match found {
        None => (Arc::from(""), None),
        Some((route_name, clusters)) => {
            (route_name, Some(Arc::new(TcpProxy { clusters, ..of.proxy.clone() })))
        }
    };
    VirtualHost {
        name: Arc::from(name),
        domains: domains.into_iter().map(|domain| Arc::from(domain.to_ascii_lowercase())).collect(),
        route_name,
        proxy,
    }
}

/// Name and clusters of the first route that every request takes.
fn first_served(
    routes: Vec<api::Route>,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(Arc<str>, ClusterChoice)> {
    let routes_path = path.field("routes");
    let mut denial = None;
    for (index, entry) in routes.into_iter().enumerate() {
        let path = routes_path.index(index);
        let api::Route { r#match, action, name, .. } = entry.clone();
        if let Some(condition) = r#match.as_ref().and_then(condition) {
            match action {
                Some(Action::DirectResponse(response)) if response.status >= 400 => denial = Some(index),
                _ => report.warn(
                    &path.field("match").field(condition),
                    "can't be decided without reading HTTP: no connection takes this route",
                ),
            }
            continue;
        }
        if let Some(denial) = denial {
            report.warn(
                &routes_path.index(denial),
                "this route denies some requests, which can't be done without reading HTTP: the connections of the \
                 virtual host end with flag NR",
            );
            return None;
        }
        warn_of_http_fields(entry, &path, report);
        return Some((Arc::from(name), clusters(action, of, &path, report)?));
    }
    report.warn(
        &routes_path,
        "no route with `prefix: /` and without other conditions: connections of this virtual host end with flag NR",
    );
    None
}

/// The first thing in a match that not every request fulfils.
fn condition(matches: &api::RouteMatch) -> Option<&'static str> {
    let api::RouteMatch {
        case_sensitive: _,
        runtime_fraction,
        headers,
        query_parameters,
        cookies,
        grpc,
        tls_context,
        dynamic_metadata,
        filter_state,
        path_specifier,
    } = matches;
    let path = match path_specifier {
        Some(PathSpecifier::Prefix(prefix)) if prefix.is_empty() || prefix == "/" => None,
        Some(PathSpecifier::Prefix(_)) => Some("prefix"),
        Some(PathSpecifier::Path(_)) => Some("path"),
        Some(PathSpecifier::SafeRegex(_)) => Some("safe_regex"),
        Some(PathSpecifier::ConnectMatcher(_)) => Some("connect_matcher"),
        Some(PathSpecifier::PathSeparatedPrefix(_)) => Some("path_separated_prefix"),
        Some(PathSpecifier::PathMatchPolicy(_)) => Some("path_match_policy"),
        None => Some("path_specifier"),
    };
    let others = [
        (runtime_fraction.is_some(), "runtime_fraction"),
        (!headers.is_empty(), "headers"),
        (!query_parameters.is_empty(), "query_parameters"),
        (!cookies.is_empty(), "cookies"),
        (grpc.is_some(), "grpc"),
        (tls_context.is_some(), "tls_context"),
        (!dynamic_metadata.is_empty(), "dynamic_metadata"),
        (!filter_state.is_empty(), "filter_state"),
    ];
    path.or_else(|| others.into_iter().find(|(present, _)| *present).map(|(_, field)| field))
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn warn_of_http_fields(route: api::Route, path: &FieldPath<'_>, report: &mut Report<'_>) {
    let api::Route {
        name: _,
        r#match: _,
        metadata,
        decorator,
        typed_per_filter_config,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        tracing,
        per_request_buffer_limit_bytes,
        stat_prefix,
        request_body_buffer_limit,
        route_specifiers,
        action: _,
    } = route;
    inactive!(report, path, "Route";
        metadata, decorator, typed_per_filter_config, request_headers_to_add, request_headers_to_remove,
        response_headers_to_add, response_headers_to_remove, tracing, per_request_buffer_limit_bytes, stat_prefix,
        request_body_buffer_limit, route_specifiers);
}

fn clusters(
    action: Option<Action>,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ClusterChoice> {
    let mut unserved = |field: &str| {
        report.warn(
            &path.field(field),
            "can't be done without speaking HTTP: connections that take this route end with flag NR",
        );
        None
    };
    match action {
        Some(Action::Route(action)) => route_action(action, of, &path.field("route"), report),
        Some(Action::Redirect(_)) => unserved("redirect"),
        Some(Action::DirectResponse(_)) => unserved("direct_response"),
        Some(Action::FilterAction(_)) => unserved("filter_action"),
        Some(Action::NonForwardingAction(_)) => unserved("non_forwarding_action"),
        None => {
            report.missing(path, "route");
            None
        }
    }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn route_action(
    action: api::RouteAction,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ClusterChoice> {
    let api::RouteAction {
        cluster_not_found_response_code: _, // there is no response
        metadata_match,
        prefix_rewrite,
        regex_rewrite,
        path_rewrite_policy,
        path_rewrite,
        append_x_forwarded_host,
        timeout,
        idle_timeout,
        flush_timeout,
        early_data_policy,
        retry_policy,
        retry_policy_typed_config,
        request_mirror_policies,
        priority,
        rate_limits,
        include_vh_rate_limits,
        hash_policy,
        cors,
        max_grpc_timeout,
        grpc_timeout_offset,
        upgrade_configs,
        internal_redirect_policy,
        internal_redirect_action,
        max_internal_redirects,
        hedge_policy,
        max_stream_duration,
        cluster_specifier,
        host_rewrite_specifier,
    } = action;
    inactive!(report, path, "RouteAction";
        metadata_match, prefix_rewrite, regex_rewrite, path_rewrite_policy, path_rewrite, append_x_forwarded_host,
        timeout, idle_timeout, flush_timeout, early_data_policy, retry_policy, retry_policy_typed_config,
        request_mirror_policies, priority, rate_limits, include_vh_rate_limits, hash_policy, cors,
        max_grpc_timeout, grpc_timeout_offset, upgrade_configs, internal_redirect_policy,
        internal_redirect_action, max_internal_redirects, hedge_policy, max_stream_duration,
        host_rewrite_specifier);
    let mut unserved = |field: &str| {
        report.warn(
            &path.field(field),
            "can't be decided without reading HTTP: connections that take this route end with flag NR",
        );
        None
    };
    match cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => {
            check_cluster(&name, of, &path.field("cluster"), report);
            Some(ClusterChoice::Single(Arc::from(name)))
        }
        Some(ClusterSpecifier::WeightedClusters(clusters)) => {
            weighted_clusters(clusters, of, &path.field("weighted_clusters"), report)
        }
        Some(ClusterSpecifier::ClusterHeader(_)) => unserved("cluster_header"),
        Some(ClusterSpecifier::ClusterSpecifierPlugin(_)) => unserved("cluster_specifier_plugin"),
        Some(ClusterSpecifier::InlineClusterSpecifierPlugin(_)) => {
            unserved("inline_cluster_specifier_plugin")
        }
        None => {
            report.missing(path, "cluster");
            None
        }
    }
}

fn check_cluster(name: &str, of: &Of<'_>, path: &FieldPath<'_>, report: &mut Report<'_>) {
    report.check_for_clients(name, path);
    if of.validate_clusters && !(report.is_cluster)(name) {
        report.invalid(
            path,
            format!("route: unknown cluster {name:?}; define it, or set validate_clusters of the route_config to false"),
        );
    }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn weighted_clusters(
    weighted: api::WeightedCluster,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ClusterChoice> {
    let api::WeightedCluster {
        clusters,
        total_weight: _, // Envoy ignores it too
        runtime_key_prefix,
        random_value_specifier,
    } = weighted;
    inactive!(report, path, "WeightedCluster"; runtime_key_prefix, random_value_specifier);
    let clusters = super::super::each(clusters, path, "clusters", |cluster, path| {
        let api::weighted_cluster::ClusterWeight {
            name,
            cluster_header,
            weight,
            metadata_match,
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            typed_per_filter_config,
            host_rewrite_specifier,
        } = cluster;
        inactive!(report, path, "WeightedCluster.ClusterWeight";
            metadata_match, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
            response_headers_to_remove, typed_per_filter_config, host_rewrite_specifier);
        if !cluster_header.is_empty() {
            report.warn(
                &path.field("cluster_header"),
                "can't be decided without reading HTTP: this entry gets no connections",
            );
            return None;
        }
        check_cluster(&name, of, &path.field("name"), report);
        Some(WeightedCluster { name: Arc::from(name), weight: weight.unwrap_or(0) })
    });
    tcp_proxy::weighted(clusters, path, report)
}
