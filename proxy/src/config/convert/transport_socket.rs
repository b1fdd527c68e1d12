//! Transport sockets: plaintext, TLS to control planes, and nothing else may silently become plaintext.

use tidegate_api::cluster::cluster::TransportSocketMatch;
use tidegate_api::core::{self, transport_socket::ConfigType};
use tidegate_api::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use tidegate_api::tls::UpstreamTlsContext;

use super::Report;
use super::extension::Extension;
use super::tls::upstream_tls;
use crate::config::proto::FieldPath;
use crate::config::tls::UpstreamTls;
use crate::config::transport_socket::TransportSocketMatches;

/// Whether it is plaintext. Without a `typed_config`, Envoy goes by the name.
fn is_raw_buffer(socket: &core::TransportSocket) -> bool {
    const RAW_BUFFER: &str = "envoy.transport_sockets.raw_buffer";
    let core::TransportSocket { name, config_type } = socket;
    match config_type {
        None => name == RAW_BUFFER,
        Some(ConfigType::TypedConfig(any)) => Extension::new(any.clone()).is::<RawBuffer>(),
    }
}

/// TLS of a cluster that reaches a control plane; for other clusters what is not plaintext is refused.
pub(super) fn cluster_tls(
    cluster: &str,
    socket: Option<core::TransportSocket>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<UpstreamTls> {
    if report.server_clusters.contains(cluster)
        && let Some(core::TransportSocket { config_type: Some(ConfigType::TypedConfig(any)), .. }) = &socket
    {
        let socket_path = path.field("transport_socket");
        let path = socket_path.field("typed_config");
        let config = Extension::new(any.clone());
        if config.is::<UpstreamTlsContext>() {
            let context = config.decode(&path, report)?;
            return upstream_tls(context, &path, report);
        }
    }
    require_raw_buffer(socket, path, "sending to upstreams", report);
    None
}

/// Refuses what is not plaintext, saying what would go wrong.
pub(super) fn require_raw_buffer(
    socket: Option<core::TransportSocket>,
    path: &FieldPath<'_>,
    side: &str,
    report: &mut Report<'_>,
) {
    let Some(socket) = socket else { return };
    let path = path.field("transport_socket");
    if !is_raw_buffer(&socket) {
        report.unsupported(
            &path,
            format!("transport socket {:?} is not supported in this version, and {side} in plaintext instead would \
                     be unsafe; remove it if plaintext is meant", socket.name),
        );
    }
}

/// `transport_socket_matches`, with what is needed to judge endpoints.
pub(super) fn matches(matches: Vec<TransportSocketMatch>) -> TransportSocketMatches {
    let entry = |entry| {
        let TransportSocketMatch { name, r#match, transport_socket } = entry;
        let raw = transport_socket.is_none_or(|socket| is_raw_buffer(&socket));
        (r#match.unwrap_or_default(), raw, name)
    };
    TransportSocketMatches::new(matches.into_iter().map(entry).collect())
}
