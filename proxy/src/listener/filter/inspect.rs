//! One look of one filter at the bytes that are there: what follows, what is counted, what is learnt.

use super::{Inspected, http_inspector, proxy_protocol, tls_inspector};
use crate::config::listener::{ListenerFilter, ProxyProtocolVersion};
use crate::stats::Stats;

/// What follows from a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The filter is done; nothing is taken.
    Done,
    /// The filter is done; so many bytes are taken off the stream.
    Consume(usize),
    /// Asking again makes sense once so many bytes are there in total.
    NeedMore(usize),
    /// The connection ends.
    Refuse,
}

/// Most bytes that the filter looks at.
pub(super) fn limit(filter: &ListenerFilter) -> usize {
    match filter {
        ListenerFilter::OriginalDst => 0,
        ListenerFilter::TlsInspector { max_client_hello_size, .. } => *max_client_hello_size as usize,
        ListenerFilter::HttpInspector => http_inspector::MAX_INSPECT_SIZE,
        ListenerFilter::ProxyProtocol { .. } => proxy_protocol::MAX_HEADER,
    }
}

/// One look at the first bytes of the stream.
pub(super) fn step(filter: &ListenerFilter, bytes: &[u8], stats: &Stats, inspected: &mut Inspected) -> Step {
    match filter {
        // Restored by whoever accepted the connection.
        ListenerFilter::OriginalDst => Step::Done,
        ListenerFilter::TlsInspector {
            max_client_hello_size,
            close_connection_on_client_hello_parsing_errors: close,
        } => tls(
            tls_inspector::inspect(bytes, *max_client_hello_size as usize),
            *close,
            bytes.len(),
            stats,
            inspected,
        ),
        // Envoy's does not look at what is known to be TLS.
        ListenerFilter::HttpInspector if inspected.transport_protocol == "tls" => Step::Done,
        ListenerFilter::HttpInspector => http(http_inspector::inspect(bytes), stats, inspected),
        ListenerFilter::ProxyProtocol {
            allow_requests_without_proxy_protocol,
            disallowed_versions,
            stat_prefix,
            ..
        } => proxy(
            stat_prefix,
            proxy_protocol::inspect(bytes, disallowed_versions, *allow_requests_without_proxy_protocol),
            *allow_requests_without_proxy_protocol,
            stats,
            inspected,
        ),
    }
}

fn tls(
    outcome: tls_inspector::Outcome,
    close_on_errors: bool,
    seen: usize,
    stats: &Stats,
    inspected: &mut Inspected,
) -> Step {
    use tls_inspector::Outcome as O;
    let stats = stats.tls_inspector();
    let next = match outcome {
        O::NeedMore(total) => return Step::NeedMore(total),
        O::NotTls if close_on_errors => Step::Refuse,
        O::NotTls => {
            stats.tls_not_found().inc();
            Step::Done
        }
        O::TooLarge => {
            stats.client_hello_too_large().inc();
            Step::Refuse
        }
        O::Tls(hello) => {
            stats.tls_found().inc();
            match &hello.server_name {
                Some(_) => stats.sni_found().inc(),
                None => stats.sni_not_found().inc(),
            }
            if hello.application_protocols.is_empty() {
                stats.alpn_not_found().inc();
            } else {
                stats.alpn_found().inc();
            }
            inspected.transport_protocol = "tls";
            inspected.server_name = hello.server_name;
            inspected.application_protocols = hello.application_protocols;
            Step::Done
        }
    };
    stats.bytes_processed().record(seen as u64);
    next
}

fn http(outcome: http_inspector::Outcome, stats: &Stats, inspected: &mut Inspected) -> Step {
    use http_inspector::Outcome as O;
    let stats = stats.http_inspector();
    let (counter, protocol) = match outcome {
        O::NeedMore(total) => return Step::NeedMore(total),
        O::TooLarge => {
            stats.read_error().inc();
            return Step::Refuse;
        }
        O::NotHttp => {
            stats.http_not_found().inc();
            return Step::Done;
        }
        O::Http10 => (stats.http10_found(), "http/1.0"),
        O::Http11 => (stats.http11_found(), "http/1.1"),
        O::Http2 => (stats.http2_found(), "h2c"),
    };
    counter.inc();
    inspected.application_protocols = vec![protocol.into()];
    Step::Done
}

fn proxy(
    stat_prefix: &str,
    outcome: proxy_protocol::Outcome,
    optional: bool,
    all: &Stats,
    inspected: &mut Inspected,
) -> Step {
    use ProxyProtocolVersion::{V1, V2};
    use proxy_protocol::Outcome as O;
    let stats = all.proxy_protocol(stat_prefix);
    match outcome {
        O::NeedMore(total) => Step::NeedMore(total),
        O::NoHeader if optional => {
            stats.not_found_allowed().inc();
            Step::Done
        }
        O::NoHeader => {
            stats.not_found_disallowed().inc();
            all.root().downstream_cx_proxy_proto_error().inc();
            Step::Refuse
        }
        O::Disallowed(version) => {
            // Envoy counts it as found too.
            match version {
                V1 => {
                    stats.v1_found().inc();
                    stats.v1_disallowed().inc();
                }
                V2 => {
                    stats.v2_found().inc();
                    stats.v2_disallowed().inc();
                }
            }
            Step::Refuse
        }
        O::Malformed(version) => {
            match version {
                V1 => stats.v1_error().inc(),
                V2 => stats.v2_error().inc(),
            }
            all.root().downstream_cx_proxy_proto_error().inc();
            Step::Refuse
        }
        O::Header(header) => {
            match header.version {
                V1 => stats.v1_found().inc(),
                V2 => stats.v2_found().inc(),
            }
            if let Some((source, destination)) = header.addresses {
                inspected.source = Some(source);
                inspected.destination = Some(destination);
            }
            Step::Consume(header.len)
        }
    }
}
