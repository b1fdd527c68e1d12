//! Filter chains and their network filters.

use std::sync::Arc;

use tidegate_api::http_connection_manager::HttpConnectionManager;
use tidegate_api::listener as api;
use tidegate_api::listener::filter::ConfigType;
use tidegate_api::listener::filter_chain_match::ConnectionSourceType;
use tidegate_api::tcp_proxy::TcpProxy;

use super::extension::{Extension, unregistered};
use super::net::cidr;
use super::route::http_terminal;
use super::tcp_proxy::tcp_proxy;
use super::transport_socket::require_raw_buffer;
use super::{Report, each, enumeration, inactive, port};
use crate::config::filter_chain::{FilterChain, FilterChainMatch, SourceType, Terminal};
use crate::config::proto::FieldPath;

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn filter_chain(
    chain: api::FilterChain,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<FilterChain> {
    let content = super::content_hash(&chain);
    let api::FilterChain {
        filter_chain_match,
        filters,
        // Of the first chain it adds a listener filter; see the listener.
        use_proxy_proto: _,
        metadata,
        transport_socket,
        transport_socket_connect_timeout,
        name,
    } = chain;
    inactive!(report, path, "FilterChain"; metadata, transport_socket_connect_timeout);
    require_raw_buffer(transport_socket, path, "serving clients", report);
    let matches = match filter_chain_match {
        None => Some(FilterChainMatch::default()),
        Some(matches) => chain_match(matches, &path.field("filter_chain_match"), report),
    };
    let (terminal, ignored_filters) = network_filters(filters, path, report);
    Some(FilterChain { name: Arc::from(name), matches: matches?, terminal, content, ignored_filters })
}

fn chain_match(
    matches: api::FilterChainMatch,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<FilterChainMatch> {
    let api::FilterChainMatch {
        destination_port,
        prefix_ranges,
        address_suffix,
        suffix_len,
        direct_source_prefix_ranges,
        source_type,
        source_prefix_ranges,
        source_ports,
        server_names,
        transport_protocol,
        application_protocols,
    } = matches;
    if !address_suffix.is_empty() || suffix_len.is_some() {
        report.unsupported(
            path,
            "address_suffix and suffix_len are implemented by nobody, Envoy included; remove them",
        );
    }
    let source_type = match enumeration(source_type, path, "source_type", report)? {
        ConnectionSourceType::Any => SourceType::Any,
        ConnectionSourceType::SameIpOrLoopback => SourceType::SameIpOrLoopback,
        ConnectionSourceType::External => SourceType::External,
    };
    let destination_port = match destination_port {
        None => None,
        Some(number) => Some(port(number, &path.field("destination_port"), report)?),
    };
    Some(FilterChainMatch {
        destination_port,
        prefix_ranges: each(prefix_ranges, path, "prefix_ranges", |range, path| cidr(range, path, report)),
        server_names: each(server_names, path, "server_names", |name, path| server_name(&name, path, report)),
        transport_protocol: Arc::from(transport_protocol),
        application_protocols: application_protocols.into_iter().map(Arc::from).collect(),
        direct_source_prefix_ranges: each(
            direct_source_prefix_ranges,
            path,
            "direct_source_prefix_ranges",
            |range, path| cidr(range, path, report),
        ),
        source_type,
        source_prefix_ranges: each(source_prefix_ranges, path, "source_prefix_ranges", |range, path| {
            cidr(range, path, report)
        }),
        source_ports: each(source_ports, path, "source_ports", |number, path| port(number, path, report)),
    })
}

fn server_name(name: &str, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Arc<str>> {
    let host = name.strip_prefix("*.").unwrap_or(name);
    if host.is_empty() || host.contains('*') {
        report.invalid(
            path,
            format!("partial wildcards are not supported in server_names: {name:?}; use an exact name or \"*.suffix\""),
        );
        return None;
    }
    Some(Arc::from(name.to_ascii_lowercase()))
}

/// A network filter, known by its type.
enum NetworkFilter {
    Terminal(Terminal),
    /// Accepted, without effect.
    Ignored(Arc<str>),
}

/// The terminal filter and the names of those that are ignored. Exactly one terminal filter is allowed, at the
/// end; an empty list closes every connection, as in Envoy.
fn network_filters(
    filters: Vec<api::Filter>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> (Option<Terminal>, Vec<Arc<str>>) {
    let last = filters.len().saturating_sub(1);
    let filters_path = path.field("filters");
    let (mut terminal, mut ignored) = (None, Vec::new());
    for (index, filter) in filters.into_iter().enumerate() {
        let (path, name) = (filters_path.index(index), filter.name.clone());
        match network_filter(filter, &path, report) {
            None => {}
            Some(NetworkFilter::Terminal(filter)) if index == last => terminal = Some(filter),
            Some(NetworkFilter::Terminal(_)) => {
                report
                    .invalid(&path, format!("terminal filter {name:?} must be the last filter of its chain"));
            }
            Some(NetworkFilter::Ignored(_)) if index == last => {
                report.invalid(
                    &path,
                    format!(
                        "non-terminal filter {name:?} is the last filter of its chain; add \
                             envoy.filters.network.tcp_proxy after it"
                    ),
                );
            }
            Some(NetworkFilter::Ignored(name)) => ignored.push(name),
        }
    }
    (terminal, ignored)
}

fn network_filter(
    filter: api::Filter,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<NetworkFilter> {
    let api::Filter { name, config_type } = filter;
    let any = match config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(_)) => {
            report.unsupported(
                &path.field("config_discovery"),
                "filter discovery (ECDS) is not supported in this version; use typed_config",
            );
            return None;
        }
        None => {
            unregistered(&name, "", path, report);
            return None;
        }
    };
    let config_path = path.field("typed_config");
    let config = Extension::new(any);
    if config.is::<TcpProxy>() {
        let proxy = tcp_proxy(config.decode(&config_path, report)?, &config_path, report)?;
        Some(NetworkFilter::Terminal(Terminal::TcpProxy(Arc::new(proxy))))
    } else if config.is::<HttpConnectionManager>() {
        let terminal = http_terminal(config.decode(&config_path, report)?, &config_path, report)?;
        Some(NetworkFilter::Terminal(terminal))
    } else if is_istio_telemetry(&name, &config) {
        report.ignore_filter(path, &name);
        Some(NetworkFilter::Ignored(Arc::from(name)))
    } else if config.known {
        report.unsupported(
            &config_path,
            format!(
                "network filter {} is not supported in this version, and connections would pass without it; \
                     remove it if that is meant",
                config.type_name
            ),
        );
        None
    } else {
        unregistered(&name, config.type_url(), &config_path, report);
        None
    }
}

/// Istio's telemetry and metadata exchange, which stock Envoy does not have either. A filter that is known here
/// under another name (rbac, say) is never taken for one.
fn is_istio_telemetry(name: &str, config: &Extension) -> bool {
    const TYPES: [&str; 4] = [
        "stats.PluginConfig",
        "envoy.tcp.metadataexchange.config.MetadataExchange",
        "io.istio.network.metadata_exchange.Config",
        "envoy.extensions.filters.network.wasm.v3.Wasm",
    ];
    name.starts_with("istio.") && (!config.known || TYPES.contains(&config.type_name.as_str()))
}
