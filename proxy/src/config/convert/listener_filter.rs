//! Listener filters.

use tidegate_api::core::proxy_protocol_config::Version;
use tidegate_api::envoy::extensions::filters::listener::{
    http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst, proxy_protocol::v3::ProxyProtocol,
    tls_inspector::v3::TlsInspector,
};
use tidegate_api::listener as api;
use tidegate_api::listener::listener_filter::ConfigType;

use super::extension::{Extension, unregistered};
use super::{Report, each, inactive};
use crate::config::listener::{ListenerFilter, ProxyProtocolVersion};
use crate::config::proto::FieldPath;

/// Envoy's default of `max_client_hello_size`, bytes.
const MAX_CLIENT_HELLO_SIZE: u32 = 16 * 1024;

pub(super) fn listener_filter(
    filter: api::ListenerFilter,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ListenerFilter> {
    let api::ListenerFilter { name, filter_disabled, config_type } = filter;
    if filter_disabled.is_some() {
        report.warn(
            &path.field("filter_disabled"),
            "parsed, not active in this version: the filter runs on every connection",
        );
    }
    let any = match config_type {
        Some(ConfigType::TypedConfig(any)) => any,
        Some(ConfigType::ConfigDiscovery(_)) => {
            report.unsupported(
                &path.field("config_discovery"),
                "filter discovery needs xDS, which is not active in this version; use typed_config",
            );
            return None;
        }
        None => {
            unregistered(&name, "", path, report);
            return None;
        }
    };
    let path = path.field("typed_config");
    let filter = Extension::new(any);
    if filter.is::<OriginalDst>() {
        let OriginalDst {} = filter.decode(&path, report)?;
        Some(ListenerFilter::OriginalDst)
    } else if filter.is::<TlsInspector>() {
        Some(tls_inspector(filter.decode(&path, report)?, &path, report))
    } else if filter.is::<HttpInspector>() {
        let HttpInspector {} = filter.decode(&path, report)?;
        Some(ListenerFilter::HttpInspector)
    } else if filter.is::<ProxyProtocol>() {
        Some(proxy_protocol(filter.decode(&path, report)?, &path, report))
    } else if filter.known {
        report.unsupported(
            &path,
            format!(
                "listener filter {} is not supported in this version, and connections would not be treated \
                     as it says; remove it",
                filter.type_name
            ),
        );
        None
    } else {
        unregistered(&name, filter.type_url(), &path, report);
        None
    }
}

fn tls_inspector(filter: TlsInspector, path: &FieldPath<'_>, report: &mut Report<'_>) -> ListenerFilter {
    let TlsInspector {
        enable_ja3_fingerprinting,
        enable_ja4_fingerprinting,
        // How much is read is decided by the ClientHello itself.
        initial_read_buffer_size: _,
        close_connection_on_client_hello_parsing_errors,
        max_client_hello_size,
    } = filter;
    inactive!(report, path, "TlsInspector"; enable_ja3_fingerprinting, enable_ja4_fingerprinting);
    ListenerFilter::TlsInspector {
        max_client_hello_size: max_client_hello_size
            .unwrap_or(MAX_CLIENT_HELLO_SIZE)
            .min(MAX_CLIENT_HELLO_SIZE),
        close_connection_on_client_hello_parsing_errors,
    }
}

pub(super) fn proxy_protocol(
    filter: ProxyProtocol,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> ListenerFilter {
    let ProxyProtocol {
        rules,
        allow_requests_without_proxy_protocol,
        pass_through_tlvs,
        disallowed_versions,
        stat_prefix,
        tlv_location,
    } = filter;
    inactive!(report, path, "ProxyProtocol"; rules, pass_through_tlvs, tlv_location);
    let disallowed_versions = each(disallowed_versions, path, "disallowed_versions", |version, path| {
        match Version::try_from(version) {
            Ok(Version::V1) => Some(ProxyProtocolVersion::V1),
            Ok(Version::V2) => Some(ProxyProtocolVersion::V2),
            Err(_) => {
                report.invalid(path, format!("{version} is not a version of the PROXY protocol"));
                None
            }
        }
    });
    ListenerFilter::ProxyProtocol {
        allow_requests_without_proxy_protocol,
        disallowed_versions,
        stat_prefix: stat_prefix.into(),
    }
}
