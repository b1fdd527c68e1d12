//! `http_health_check` and `grpc_health_check`.

use std::ops::Range;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use tidegate_api::core;
use tidegate_api::core::RequestMethod;
use tidegate_api::core::header_value_option::HeaderAppendAction;
use tidegate_api::core::health_check::{GrpcHealthCheck as Grpc, HttpHealthCheck as Http};
use tidegate_api::envoy_type::{CodecClientType, Int64Range};

use super::super::secret::string_match;
use super::super::{Report, each, enumeration};
use super::health_check::bytes;
use crate::config::health_check::{HealthCheckRequest, HttpHealthCheck, ServiceName};
use crate::config::proto::FieldPath;

/// Statuses that there are.
const STATUSES: Range<i64> = 100..600;

/// `cluster` is the name of the cluster.
pub(super) fn http_check(
    check: Http,
    cluster: &str,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<HttpHealthCheck> {
    let Http {
        host,
        path: target,
        send,
        receive,
        response_buffer_size,
        request_headers_to_add,
        request_headers_to_remove,
        expected_statuses,
        retriable_statuses,
        codec_client_type,
        service_name_matcher,
        method,
    } = check;
    let Ok(target) = target.parse::<PathAndQuery>() else {
        report.invalid(&path.field("path"), format!("{target:?} is not a path"));
        return None;
    };
    let http2 = match enumeration(codec_client_type, path, "codec_client_type", report)? {
        CodecClientType::Http1 => false,
        CodecClientType::Http2 => true,
        CodecClientType::Http3 => {
            report
                .unsupported(&path.field("codec_client_type"), "HTTP/3 is not supported; use HTTP1 or HTTP2");
            return None;
        }
    };
    let host = authority(&host, cluster, http2, &path.field("host"), report)?;
    let mut http = HttpHealthCheck { http2, ..HttpHealthCheck::get(host, target) };
    http.method = request_method(method, path, report)?;
    http.send = send.and_then(|payload| bytes(payload, &path.field("send"), report)).unwrap_or_default();
    http.receive = each(receive, path, "receive", |payload, path| bytes(payload, path, report));
    if let Some(size) = response_buffer_size {
        http.response_buffer_size = usize::try_from(size).ok().filter(|size| *size != 0);
    }
    // Envoy removes first, and then adds.
    for name in request_headers_to_remove {
        http.headers.remove(&name);
    }
    add_all(&mut http.headers, request_headers_to_add, path, "request_headers_to_add", report);
    http.expected = each(expected_statuses, path, "expected_statuses", |it, path| range(it, path, report));
    http.retriable = each(retriable_statuses, path, "retriable_statuses", |it, path| range(it, path, report));
    http.service_name = service_name_matcher.and_then(|matcher| {
        let (pattern, ignore_case) = string_match(matcher, &path.field("service_name_matcher"), report)?;
        Some(ServiceName { pattern, ignore_case })
    });
    Some(http)
}

/// `timeout` is that of the check.
pub(super) fn grpc_check(
    check: Grpc,
    cluster: &str,
    timeout: Duration,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<HttpHealthCheck> {
    let Grpc { service_name, authority: host, initial_metadata } = check;
    let host = authority(&host, cluster, true, &path.field("authority"), report)?;
    let target = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let mut http = HttpHealthCheck { http2: true, ..HttpHealthCheck::get(host, target) };
    http.method = Method::POST;
    http.headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    http.headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    // At most eight digits.
    let millis = timeout.as_millis().min(99_999_999);
    if let Ok(timeout) = HeaderValue::from_str(&format!("{millis}m")) {
        http.headers.insert("grpc-timeout", timeout);
    }
    add_all(&mut http.headers, initial_metadata, path, "initial_metadata", report);
    http.send = HealthCheckRequest { service: service_name }.framed();
    Some(http)
}

/// The host to send: the cluster's name, unless another one is given.
fn authority(
    host: &str,
    cluster: &str,
    http2: bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<HeaderValue> {
    let sent = if host.is_empty() { cluster } else { host };
    match HeaderValue::from_str(sent) {
        Ok(value) if !http2 || sent.parse::<http::uri::Authority>().is_ok() => Some(value),
        _ => {
            let message = format!("{sent:?} can't be sent as the host (it is the cluster's name by default)");
            report.invalid(path, message);
            None
        }
    }
}

fn request_method(method: i32, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Method> {
    Some(match enumeration(method, path, "method", report)? {
        RequestMethod::MethodUnspecified | RequestMethod::Get => Method::GET,
        RequestMethod::Head => Method::HEAD,
        RequestMethod::Post => Method::POST,
        RequestMethod::Put => Method::PUT,
        RequestMethod::Delete => Method::DELETE,
        RequestMethod::Options => Method::OPTIONS,
        RequestMethod::Trace => Method::TRACE,
        RequestMethod::Patch => Method::PATCH,
        RequestMethod::Connect => {
            report.invalid(
                &path.field("method"),
                "CONNECT makes a tunnel, and no response; use another method",
            );
            return None;
        }
    })
}

/// Statuses from `start` to one before `end`.
fn range(range: Int64Range, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Range<u16>> {
    let Int64Range { start, end } = range;
    if start >= end || start < STATUSES.start || end > STATUSES.end {
        report.invalid(
            path,
            format!("no range of statuses: {start} to below {end}; they are 100 to below 600"),
        );
        return None;
    }
    Some(u16::try_from(start).ok()?..u16::try_from(end).ok()?)
}

/// None: it is not added.
fn header(
    option: core::HeaderValueOption,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(HeaderAppendAction, HeaderName, HeaderValue)> {
    #[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
    let core::HeaderValueOption { header, append, append_action, keep_empty_value } = option;
    let core::HeaderValue { key, value, raw_value } = header.unwrap_or_default();
    let action = match append {
        Some(true) => HeaderAppendAction::AppendIfExistsOrAdd,
        Some(false) => HeaderAppendAction::OverwriteIfExistsOrAdd,
        None => enumeration(append_action, path, "append_action", report)?,
    };
    let path = path.field("header");
    let name = match key.parse::<HeaderName>() {
        Ok(name) if name != http::header::HOST => name,
        _ => {
            report.invalid(&path.field("key"), format!("{key:?} is not a header that can be added"));
            return None;
        }
    };
    if value.contains('%') {
        report.unsupported(
            &path.field("value"),
            "command operators (%…%) are not supported here in this version; write the value itself",
        );
        return None;
    }
    let bytes = if raw_value.is_empty() { value.into_bytes() } else { raw_value };
    if bytes.is_empty() && !keep_empty_value {
        return None;
    }
    let Ok(value) = HeaderValue::from_bytes(&bytes) else {
        report.invalid(&path.field("value"), format!("header {name}: not a value that can be sent"));
        return None;
    };
    Some((action, name, value))
}

fn add_all(
    headers: &mut HeaderMap,
    options: Vec<core::HeaderValueOption>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) {
    for (action, name, value) in each(options, path, field, |option, path| header(option, path, report)) {
        add(headers, action, name, value);
    }
}

fn add(headers: &mut HeaderMap, action: HeaderAppendAction, name: HeaderName, value: HeaderValue) {
    match (action, headers.contains_key(&name)) {
        (HeaderAppendAction::AppendIfExistsOrAdd, _) => drop(headers.append(name, value)),
        (HeaderAppendAction::AddIfAbsent, false)
        | (HeaderAppendAction::OverwriteIfExistsOrAdd, _)
        | (HeaderAppendAction::OverwriteIfExists, true) => drop(headers.insert(name, value)),
        (HeaderAppendAction::AddIfAbsent, true) | (HeaderAppendAction::OverwriteIfExists, false) => {}
    }
}
