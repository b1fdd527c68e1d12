//! `Listener`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tidegate_api::core;
use tidegate_api::listener as api;

use super::access_log::access_logs;
use super::filter_chain::filter_chain;
use super::listener_filter::listener_filter;
use super::net::{keepalive, socket_addr};
use super::{Report, bind, each, enumeration, inactive, optional_duration};
use crate::config::filter_chain::FilterChain;
use crate::config::listener::{AddressOverride, Listener, ListenerFilter, TcpKeepalive, TrafficDirection};
use crate::config::proto::FieldPath;
use crate::config::runtime::Runtime;
use crate::listener::filter_chain::Matcher;
use crate::sys::socket::SocketOption;

/// Envoy's default of `listener_filters_timeout`.
const LISTENER_FILTERS_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's default of `per_connection_buffer_limit_bytes`.
pub(super) const BUFFER_LIMIT: u32 = 1024 * 1024;

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(in crate::config) fn listener(
    mut listener: api::Listener,
    runtime: &Runtime,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Listener> {
    let chains = std::mem::take(&mut listener.filter_chains);
    let default_chain = listener.default_filter_chain.take();
    let content = super::content_hash(&listener);
    let api::Listener {
        name,
        address,
        additional_addresses,
        stat_prefix,
        stats_matcher,
        filter_chains: _, // taken
        fcds_config,
        filter_chain_matcher,
        use_original_dst,
        default_filter_chain: _, // taken
        per_connection_buffer_limit_bytes,
        per_connection_buffer_high_watermark_timeout,
        metadata,
        deprecated_v1,
        drain_type,
        listener_filters,
        listener_filters_timeout,
        continue_on_listener_filters_timeout,
        transparent,
        freebind,
        socket_options,
        tcp_fast_open_queue_length,
        traffic_direction,
        udp_listener_config,
        api_listener,
        connection_balance_config,
        // Spelled enable_reuse_port now; true is the default, and false can't be told from absent.
        reuse_port: _,
        enable_reuse_port,
        access_log,
        tcp_backlog_size,
        max_connections_to_accept_per_socket_event,
        bind_to_port,
        enable_mptcp,
        ignore_global_conn_limit,
        bypass_overload_manager,
        tcp_keepalive,
        listener_specifier,
    } = listener;
    inactive!(report, path, "Listener";
        stats_matcher, per_connection_buffer_high_watermark_timeout, metadata, drain_type,
        enable_mptcp, bypass_overload_manager);
    let kinds = [
        ("fcds_config", fcds_config.is_some(), "filter chain discovery"),
        ("filter_chain_matcher", filter_chain_matcher.is_some(), "a matcher tree"),
        ("udp_listener_config", udp_listener_config.is_some(), "a UDP listener"),
        ("api_listener", api_listener.is_some(), "an API listener"),
        ("internal_listener", listener_specifier.is_some(), "an internal listener"),
    ];
    for (field, _, what) in kinds.into_iter().filter(|(_, present, _)| *present) {
        report.unsupported(&path.field(field), format!("{what} is not supported in this version"));
    }
    let socket_options = bind::socket_options(socket_options, path, report);
    let tcp_keepalive = tcp_keepalive.and_then(keepalive);
    let inherited = (&socket_options[..], tcp_keepalive);
    let addresses = addresses(address, additional_addresses, inherited, path, report);
    let use_proxy_proto = chains.first().is_some_and(|chain| chain.use_proxy_proto == Some(true));
    let chains: Vec<Arc<FilterChain>> =
        each(chains, path, "filter_chains", |chain, path| filter_chain(chain, path, report).map(Arc::new));
    let default = default_chain
        .and_then(|chain| filter_chain(chain, &path.field("default_filter_chain"), report).map(Arc::new));
    check_chains(&chains, default.as_ref(), path, report);

    let use_original_dst = use_original_dst.unwrap_or(false);
    let mut filters = each(listener_filters, path, "listener_filters", |filter, path| {
        listener_filter(filter, path, report)
    });
    if use_original_dst && !filters.contains(&ListenerFilter::OriginalDst) {
        filters.insert(0, ListenerFilter::OriginalDst);
    }
    if use_proxy_proto {
        filters.push(ListenerFilter::proxy_protocol());
    }
    let timeout = match listener_filters_timeout {
        None => Some(LISTENER_FILTERS_TIMEOUT),
        Some(_) => optional_duration(listener_filters_timeout, path, "listener_filters_timeout", report)
            .filter(|timeout| !timeout.is_zero()),
    };
    let traffic_direction = match enumeration(traffic_direction, path, "traffic_direction", report) {
        Some(core::TrafficDirection::Inbound) => TrafficDirection::Inbound,
        Some(core::TrafficDirection::Outbound) => TrafficDirection::Outbound,
        Some(core::TrafficDirection::Unspecified) | None => TrafficDirection::Unspecified,
    };
    let access_log = access_logs(access_log, path, report);
    let exact_balance =
        connection_balance_config.as_ref().is_some_and(|config| exact_balance(config, path, report));
    let (addresses, overrides) = addresses?;
    let name: Arc<str> = if name.is_empty() { addresses[0].to_string().into() } else { name.into() };
    Some(Listener {
        bind_to_port: bind_to_port.or(deprecated_v1.and_then(|old| old.bind_to_port)).unwrap_or(true),
        connection_limit: runtime.connection_limit(&name),
        name,
        addresses,
        use_original_dst,
        filter_chains: chains,
        default_filter_chain: default,
        listener_filters: filters,
        listener_filters_timeout: timeout,
        continue_on_listener_filters_timeout,
        traffic_direction,
        access_log,
        per_connection_buffer_limit_bytes: per_connection_buffer_limit_bytes.unwrap_or(BUFFER_LIMIT),
        tcp_backlog_size,
        enable_reuse_port: enable_reuse_port.unwrap_or(true),
        transparent: transparent.unwrap_or(false),
        freebind: freebind.unwrap_or(false),
        tcp_keepalive,
        socket_options,
        overrides,
        tcp_fast_open_queue_length,
        max_connections_to_accept_per_socket_event,
        exact_balance,
        stat_prefix: Some(stat_prefix).filter(|prefix| !prefix.is_empty()).map(Arc::from),
        ignore_global_conn_limit,
        content,
    })
}

/// Whether that is how connections are balanced over the workers. Other ways are the kernel's, as without any.
fn exact_balance(
    config: &api::listener::ConnectionBalanceConfig,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> bool {
    use api::listener::connection_balance_config::BalanceType;
    let path = path.field("connection_balance_config");
    let inactive = match config.balance_type {
        Some(BalanceType::ExactBalance(_)) => return true,
        Some(BalanceType::ExtendBalance(_)) => "extend_balance",
        Some(BalanceType::CpuLocalityBalance(_)) => "cpu_locality_balance",
        None => return false, // refused by the rules of the message
    };
    report.inactive("Listener.ConnectionBalanceConfig", &path, inactive);
    false
}

/// `address` and then the additional ones, each of them once; and those of the latter that have something of their own.
fn addresses(
    address: Option<core::Address>,
    additional: Vec<api::AdditionalAddress>,
    (options, tcp_keepalive): (&[SocketOption], Option<TcpKeepalive>),
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(Vec<SocketAddr>, Vec<AddressOverride>)> {
    let first = socket_addr(address, path, "address", report);
    let others = each(additional, path, "additional_addresses", |additional, path| {
        let api::AdditionalAddress { address, socket_options, tcp_keepalive: own_keepalive } = additional;
        let address = socket_addr(address, path, "address", report)?;
        let has_own = socket_options.is_some() || own_keepalive.is_some();
        let socket_options =
            socket_options.map_or_else(|| options.to_vec(), |it| bind::overriding(it, path, report));
        let tcp_keepalive = own_keepalive.map_or(tcp_keepalive, keepalive);
        Some((AddressOverride { address, socket_options, tcp_keepalive }, has_own))
    });
    let mut addresses = vec![first?];
    let mut overrides = Vec::new();
    for (other, has_own) in others {
        if addresses.contains(&other.address) {
            continue;
        }
        addresses.push(other.address);
        if has_own {
            overrides.push(other);
        }
    }
    Some((addresses, overrides))
}

/// Envoy refuses a listener without a chain, and chains of which one could never be found.
fn check_chains(
    chains: &[Arc<FilterChain>],
    default: Option<&Arc<FilterChain>>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) {
    let path = path.field("filter_chains");
    if chains.is_empty() && default.is_none() {
        report.invalid(&path, "no filter chains specified; add one, or a default_filter_chain");
    }
    if let Err(error) = Matcher::build(chains, default) {
        report.invalid(&path, error.to_string());
    }
}
