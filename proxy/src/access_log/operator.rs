//! The operators of format strings: what each is called, what it may be given, what it prints.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use crate::connection::record::{CloseType, Record, Upstream};
use crate::response_flag::ResponseFlags;

use super::HttpExchange;
use super::format::{Entry, quote_from};
use super::time::TimeFormat;

/// `%NAME(PARAMETERS):LENGTH%`, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Syntax<'a> {
    pub(super) name: &'a str,
    pub(super) parameters: Option<&'a str>,
    pub(super) max_length: Option<usize>,
    /// Bytes that it takes, percent signs included.
    pub(super) length: usize,
}

impl<'a> Syntax<'a> {
    /// Parses an operator at the start of `text`. Parameters may contain `)` and `%`: they end at the first `)`
    /// that is followed by the operator's end.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let inside = text.strip_prefix('%')?;
        let name_end = inside.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
        if name_end == 0 {
            return None;
        }
        let (name, rest) = inside.split_at(name_end);
        let Some(after) = rest.strip_prefix('(') else {
            let (max_length, end) = operator_end(rest)?;
            return Some(Self { name, parameters: None, max_length, length: 1 + name_end + end });
        };
        after.match_indices(')').find_map(|(at, _)| {
            let (max_length, end) = operator_end(&after[at + 1..])?;
            let length = 1 + name_end + 1 + at + 1 + end;
            Some(Self { name, parameters: Some(&after[..at]), max_length, length })
        })
    }
}

/// `%` or `:LENGTH%`: the length, and how many bytes that took.
fn operator_end(text: &str) -> Option<(Option<usize>, usize)> {
    let Some(length) = text.strip_prefix(':') else {
        return text.starts_with('%').then_some((None, 1));
    };
    let end = length.find('%')?;
    if end == 0 || !length[..end].bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((Some(length[..end].parse().ok()?), end + 2))
}

/// A value of an entry. It borrows; nothing is copied before it is written.
pub(super) enum Value<'a> {
    /// Prints `-`, in JSON `null`.
    Unset,
    Number(u64),
    Text(&'a str),
    Address(SocketAddr),
    Ip(IpAddr),
    /// An address cut to a prefix.
    Prefix(IpAddr, u8),
    Flags {
        flags: ResponseFlags,
        long: bool,
    },
    Time(&'a TimeFormat, SystemTime),
    Uuid(u128),
    /// A server name from the wire: what no host name has becomes `_`.
    ServerName(&'a str),
    /// All hosts tried, with commas.
    Attempted(&'a Record, Attempted),
}

impl Value<'_> {
    /// Writes it as text; `Unset` writes nothing.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        // Writing to a Vec can't fail.
        let _ = match self {
            Self::Unset => Ok(()),
            Self::Number(number) => write!(out, "{number}"),
            Self::Text(text) => out.write_all(text.as_bytes()),
            Self::Address(address) => write!(out, "{address}"),
            Self::Ip(ip) => write!(out, "{ip}"),
            Self::Prefix(ip, bits) => write!(out, "{}/{bits}", masked(*ip, *bits)),
            Self::Flags { flags, long } => {
                write_flags(*flags, *long, out);
                Ok(())
            }
            Self::Time(format, time) => {
                format.write(*time, out);
                Ok(())
            }
            Self::Uuid(bits) => write_uuid(*bits, out),
            Self::ServerName(name) => {
                let keep = |byte: u8| {
                    if byte.is_ascii_alphanumeric() || b".-".contains(&byte) { byte } else { b'_' }
                };
                out.extend(name.bytes().map(keep));
                Ok(())
            }
            Self::Attempted(record, what) => {
                write_attempted(record, *what, out);
                Ok(())
            }
        };
    }

    /// Writes it as JSON: numbers as numbers, everything else as a string, `Unset` as `null`.
    pub(super) fn write_json(&self, out: &mut Vec<u8>) {
        match self {
            Self::Unset => out.extend_from_slice(b"null"),
            Self::Number(_) => self.write(out),
            _ => {
                let start = out.len();
                self.write(out);
                quote_from(out, start);
            }
        }
    }
}

/// What `UPSTREAM_…_ATTEMPTED` lists.
#[derive(Clone, Copy, Debug)]
pub(super) enum Attempted {
    Hosts,
    HostsWithoutPort,
    Names,
    NamesWithoutPort,
    ConnectionIds,
}

/// Which address of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    DownstreamLocal,
    DownstreamRemote,
    DownstreamDirectLocal,
    DownstreamDirectRemote,
    UpstreamLocal,
    UpstreamRemote,
}

/// What of an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Of {
    Whole,
    WithoutPort(Option<u8>),
    Port,
}

/// A moment of a connection (`COMMON_DURATION`).
#[derive(Clone, Copy, Debug)]
pub(super) enum Point {
    DownstreamBegin,
    DownstreamEnd,
    UpstreamConnectBegin,
    UpstreamConnectEnd,
    /// HTTP or TLS: never reached.
    Never,
}

/// An operator, ready to be printed.
#[derive(Debug)]
pub(super) enum Operator {
    /// Can't have a value for TCP: `-`.
    Never,
    /// Always the same.
    Text(Box<str>),
    /// Always this number.
    Number(u64),
    Count(fn(&Record) -> u64),
    Start(TimeFormat),
    Emit(TimeFormat),
    Duration,
    Between {
        from: Point,
        to: Point,
        unit: Duration,
    },
    Flags {
        long: bool,
    },
    String(fn(&Record) -> Option<&str>),
    Address(Side, Of),
    Host,
    HostName {
        port: bool,
    },
    Attempted(Attempted),
    ServerName,
    LogType,
    StreamId,
    UniqueId,
    Retransmitted {
        packets: bool,
    },
    Status,
    Protocol,
    Header(Header),
}

/// A header of an HTTP request or response, or another one when it is not there.
#[derive(Debug)]
pub(super) struct Header {
    of_response: bool,
    names: Vec<Box<str>>,
    max_length: usize,
}

impl Header {
    /// `%REQ(NAME?OTHER):LENGTH%`.
    fn build(syntax: &Syntax<'_>) -> Result<Operator, String> {
        let names: Vec<Box<str>> =
            required(syntax)?.split('?').map(|name| name.to_ascii_lowercase().into()).collect();
        if names.len() > 2 {
            return Err(format!("%{}({})%: more than one alternative", syntax.name, names.join("?")));
        }
        let of_response = syntax.name.starts_with("RESP");
        Ok(Operator::Header(Self { of_response, names, max_length: syntax.max_length.unwrap_or(usize::MAX) }))
    }

    fn value<'a>(&self, http: &'a HttpExchange) -> Value<'a> {
        let named = |name: &str| match name {
            _ if self.of_response => http.response.get(name)?.to_str().ok(),
            ":method" => Some(http.method.as_str()),
            ":path" => Some(http.uri.path_and_query()?.as_str()),
            ":scheme" => Some("http"),
            ":authority" => http.request.get("host")?.to_str().ok(),
            name => http.request.get(name)?.to_str().ok(),
        };
        let found = self.names.iter().find_map(|name| named(name));
        found.map_or(Value::Unset, |text| Value::Text(&text[..text.floor_char_boundary(self.max_length)]))
    }
}

impl Operator {
    /// The operator that the syntax names.
    ///
    /// # Errors
    /// A reason, when there is none of that name or it can't be given these parameters.
    pub(super) fn build(syntax: &Syntax<'_>) -> Result<Self, String> {
        let name = syntax.name;
        let parameters = syntax.parameters.unwrap_or_default();
        let plain = |operator| no_parameters(syntax).map(|()| operator);
        let timed = |build: fn(TimeFormat) -> Self, default: TimeFormat, local: bool| {
            if syntax.max_length.is_some() {
                return Err(format!("%{name}% does not allow a length"));
            }
            Ok(build(if parameters.is_empty() { default } else { TimeFormat::parse(parameters, local) }))
        };
        match name {
            "START_TIME" => timed(Self::Start, TimeFormat::iso8601(), false),
            "START_TIME_LOCAL" => timed(Self::Start, TimeFormat::iso8601_local(), true),
            "EMIT_TIME" => timed(Self::Emit, TimeFormat::iso8601(), false),
            "EMIT_TIME_LOCAL" => timed(Self::Emit, TimeFormat::iso8601_local(), true),
            "BYTES_RECEIVED" | "DOWNSTREAM_WIRE_BYTES_RECEIVED" => plain(Self::Count(|r| r.bytes_received)),
            "BYTES_SENT" | "DOWNSTREAM_WIRE_BYTES_SENT" => plain(Self::Count(|r| r.bytes_sent)),
            "UPSTREAM_WIRE_BYTES_SENT" => plain(Self::Count(|r| r.upstream_bytes_sent)),
            "UPSTREAM_WIRE_BYTES_RECEIVED" => plain(Self::Count(|r| r.upstream_bytes_received)),
            "CONNECTION_ID" => plain(Self::Count(|r| r.id)),
            "UPSTREAM_CONNECTION_ID" => {
                plain(Self::Count(|r| r.upstream.as_ref().and_then(|u| u.connection_id).unwrap_or(0)))
            }
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => plain(Self::Count(|r| u64::from(r.attempts))),
            "DURATION" => plain(Self::Duration),
            "COMMON_DURATION" => between(syntax),
            "UPSTREAM_CONNECTION_POOL_READY_DURATION" => plain(Self::Between {
                from: Point::UpstreamConnectBegin,
                to: Point::UpstreamConnectEnd,
                unit: Duration::from_millis(1),
            }),
            "BYTES_RETRANSMITTED" => plain(Self::Retransmitted { packets: false }),
            "PACKETS_RETRANSMITTED" => plain(Self::Retransmitted { packets: true }),
            "RESPONSE_FLAGS" => plain(Self::Flags { long: false }),
            "RESPONSE_FLAGS_LONG" => plain(Self::Flags { long: true }),
            "CONNECTION_TERMINATION_DETAILS" => plain(Self::String(|r| r.details().termination_details)),
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => {
                plain(Self::String(|r| r.details().upstream_transport_failure.as_deref()))
            }
            "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => {
                plain(Self::String(|r| r.details().downstream_transport_failure.as_deref()))
            }
            "DOWNSTREAM_LOCAL_CLOSE_REASON" => {
                plain(Self::String(|r| r.details().downstream_local_close_reason.as_deref()))
            }
            "UPSTREAM_LOCAL_CLOSE_REASON" => {
                plain(Self::String(|r| r.details().upstream_local_close_reason.as_deref()))
            }
            "DOWNSTREAM_DETECTED_CLOSE_TYPE" => plain(Self::String(|r| Some(r.downstream_close_type.name()))),
            "UPSTREAM_DETECTED_CLOSE_TYPE" => {
                plain(Self::String(|r| r.upstream_close_type.map(CloseType::name)))
            }
            // An optional parameter chooses how spaces are written; ours have none.
            "RESPONSE_CODE_DETAILS" => Ok(Self::String(|r| r.details().response_code_details)),
            "UPSTREAM_CLUSTER" => {
                plain(Self::String(|r| r.details().cluster_alt_stat_name.as_deref().or(r.cluster.as_deref())))
            }
            "UPSTREAM_CLUSTER_RAW" => plain(Self::String(|r| r.cluster.as_deref())),
            "ROUTE_NAME" => plain(Self::String(|r| r.details().route_name.as_deref())),
            "FILTER_CHAIN_NAME" => plain(Self::String(|r| Some(&*r.filter_chain).filter(|s| !s.is_empty()))),
            "LISTENER_NAME" => plain(Self::String(|r| Some(&r.listener))),
            "ACCESS_LOG_TYPE" => plain(Self::LogType),
            "STREAM_ID" => plain(Self::StreamId),
            "UNIQUE_ID" => plain(Self::UniqueId),
            "UPSTREAM_HOST" => plain(Self::Host),
            "UPSTREAM_HOST_NAME" => plain(Self::HostName { port: true }),
            "UPSTREAM_HOST_NAME_WITHOUT_PORT" => plain(Self::HostName { port: false }),
            "UPSTREAM_HOSTS_ATTEMPTED" => plain(Self::Attempted(Attempted::Hosts)),
            "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT" => plain(Self::Attempted(Attempted::HostsWithoutPort)),
            "UPSTREAM_HOST_NAMES_ATTEMPTED" => plain(Self::Attempted(Attempted::Names)),
            "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT" => {
                plain(Self::Attempted(Attempted::NamesWithoutPort))
            }
            "UPSTREAM_CONNECTION_IDS_ATTEMPTED" => plain(Self::Attempted(Attempted::ConnectionIds)),
            "REQUESTED_SERVER_NAME" => server_name(parameters),
            "HOSTNAME" => plain(Self::Text(hostname())),
            "ENVIRONMENT" => environment(syntax),
            // HTTP's sizes and texts, which Envoy prints as 0 and empty for TCP.
            "RESPONSE_CODE" => plain(Self::Status),
            "PROTOCOL" => plain(Self::Protocol),
            "REQ" | "REQUEST_HEADER" | "RESP" | "RESPONSE_HEADER" => Header::build(syntax),
            "REQUEST_HEADERS_BYTES" | "RESPONSE_HEADERS_BYTES" | "RESPONSE_TRAILERS_BYTES" => {
                plain(Self::Number(0))
            }
            _ if name.ends_with("_HEADER_BYTES_SENT") || name.ends_with("_HEADER_BYTES_RECEIVED") => {
                let side = name.strip_prefix("UPSTREAM_").or(name.strip_prefix("DOWNSTREAM_"));
                match side.map(|side| side.strip_prefix("DECOMPRESSED_").unwrap_or(side)) {
                    Some("HEADER_BYTES_SENT" | "HEADER_BYTES_RECEIVED") => plain(Self::Number(0)),
                    _ => Err(unknown(name)),
                }
            }
            "LOCAL_REPLY_BODY"
            | "CUSTOM_FLAGS"
            | "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID"
            | "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID" => plain(Self::Text("".into())),
            _ => address(syntax).unwrap_or_else(|| never(syntax)),
        }
    }

    /// Whether it prints what was sent again.
    pub(super) fn is_retransmitted(&self) -> bool {
        matches!(self, Self::Retransmitted { .. })
    }

    /// Whether it prints our own address of the upstream connection.
    pub(super) fn is_upstream_local_address(&self) -> bool {
        matches!(self, Self::Address(Side::UpstreamLocal, _))
    }

    /// Its value in an entry.
    pub(super) fn value<'a>(&'a self, entry: Entry<'a>) -> Value<'a> {
        let Entry { record, log_type, http, now } = entry;
        let text = |text: Option<&'a str>| text.map_or(Value::Unset, Value::Text);
        match self {
            Self::Never => Value::Unset,
            Self::Text(constant) => Value::Text(constant),
            Self::Number(number) => Value::Number(*number),
            Self::Count(count) => Value::Number(count(record)),
            Self::Start(format) => Value::Time(format, record.start_time),
            Self::Emit(format) => Value::Time(format, now.wall),
            Self::Duration => Value::Number(record.lasted(now.monotonic).as_millis() as u64),
            Self::Between { from, to, unit } => match (from.of(record), to.of(record)) {
                (Some(from), Some(to)) => {
                    Value::Number((to.saturating_sub(from).as_nanos() / unit.as_nanos()) as u64)
                }
                _ => Value::Unset,
            },
            Self::Flags { long } => Value::Flags { flags: record.flags, long: *long },
            Self::String(string) => text(string(record)),
            Self::Address(side, of) => side.of(record).map_or(Value::Unset, |address| of.value(address)),
            Self::Host => record.upstream.as_ref().map_or(Value::Unset, |host| Value::Address(host.address)),
            Self::HostName { port } => {
                record.upstream.as_ref().map_or(Value::Unset, |host| host_name(host, *port))
            }
            Self::Attempted(_) if record.upstream.is_none() => Value::Unset,
            Self::Attempted(what) => Value::Attempted(record, *what),
            Self::ServerName => {
                record.details().requested_server_name.as_deref().map_or(Value::Unset, Value::ServerName)
            }
            Self::LogType if http.is_some() => Value::Text("DownstreamEnd"),
            Self::LogType => Value::Text(log_type.name()),
            Self::Status => Value::Number(http.map_or(0, |http| http.status.into())),
            Self::Protocol => http.map_or(Value::Unset, |http| Value::Text(http.protocol())),
            Self::Header(header) => http.map_or(Value::Unset, |http| header.value(http)),
            Self::StreamId => Value::Uuid(stream_id(record)),
            Self::UniqueId => Value::Uuid(fastrand::u128(..)),
            Self::Retransmitted { packets } => {
                let again = record.details().retransmitted;
                Value::Number(if *packets { again.packets } else { again.bytes })
            }
        }
    }
}

fn no_parameters(syntax: &Syntax<'_>) -> Result<(), String> {
    if syntax.parameters.is_some_and(|parameters| !parameters.is_empty()) || syntax.max_length.is_some() {
        return Err(format!("%{}% takes no parameters and no length", syntax.name));
    }
    Ok(())
}

fn unknown(name: &str) -> String {
    format!("there is no operator %{name}%")
}

fn hostname() -> Box<str> {
    nix::unistd::gethostname()
        .map_or_else(|_| "-".into(), |name| name.to_string_lossy().into_owned().into_boxed_str())
}

fn server_name(parameters: &str) -> Result<Operator, String> {
    // A Host header, which the other choices mean, is not read here: what is left is the SNI.
    let mut options = parameters.split(':');
    match options.next() {
        Some("" | "SNI_ONLY" | "SNI_FIRST" | "HOST_FIRST") => Ok(Operator::ServerName),
        _ => Err(format!(
            "%REQUESTED_SERVER_NAME({parameters})%: only SNI_ONLY, SNI_FIRST and HOST_FIRST are allowed"
        )),
    }
}

/// The environment is fixed, so it is read when the format is parsed.
fn environment(syntax: &Syntax<'_>) -> Result<Operator, String> {
    let name = required(syntax)?;
    let mut value =
        std::env::var_os(name).map_or_else(|| "-".into(), |value| value.to_string_lossy().into_owned());
    if let Some(max) = syntax.max_length {
        value.truncate(value.floor_char_boundary(max));
    }
    Ok(Operator::Text(value.into()))
}

fn required<'a>(syntax: &Syntax<'a>) -> Result<&'a str, String> {
    syntax
        .parameters
        .filter(|parameters| !parameters.is_empty())
        .ok_or_else(|| format!("%{}% needs a parameter: %{0}(…)%", syntax.name))
}

fn between(syntax: &Syntax<'_>) -> Result<Operator, String> {
    let parameters = required(syntax)?;
    let mut parts = parameters.split(':');
    let (Some(from), Some(to), Some(unit), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(format!("%COMMON_DURATION({parameters})%: expected START:END:PRECISION"));
    };
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "us" => Duration::from_micros(1),
        "ns" => Duration::from_nanos(1),
        _ => {
            return Err(format!("%COMMON_DURATION({parameters})%: precision '{unit}' is none of ms, us, ns"));
        }
    };
    let point = |name| match name {
        "DS_CX_BEG" => Point::DownstreamBegin,
        "DS_CX_END" => Point::DownstreamEnd,
        "US_CX_BEG" => Point::UpstreamConnectBegin,
        "US_CX_END" => Point::UpstreamConnectEnd,
        _ => Point::Never,
    };
    Ok(Operator::Between { from: point(from), to: point(to), unit })
}

/// The operators that print an address or a part of it.
fn address(syntax: &Syntax<'_>) -> Option<Result<Operator, String>> {
    const SIDES: [(&str, Side); 6] = [
        ("DOWNSTREAM_DIRECT_LOCAL", Side::DownstreamDirectLocal),
        ("DOWNSTREAM_DIRECT_REMOTE", Side::DownstreamDirectRemote),
        ("DOWNSTREAM_LOCAL", Side::DownstreamLocal),
        ("DOWNSTREAM_REMOTE", Side::DownstreamRemote),
        ("UPSTREAM_LOCAL", Side::UpstreamLocal),
        ("UPSTREAM_REMOTE", Side::UpstreamRemote),
    ];
    let (part, side) =
        SIDES.into_iter().find_map(|(prefix, side)| Some((syntax.name.strip_prefix(prefix)?, side)))?;
    let of = match part {
        "_ADDRESS" => Of::Whole,
        "_PORT" => Of::Port,
        "_ADDRESS_WITHOUT_PORT" => {
            // As in Envoy, a parameter that is no number is ignored.
            let bits = syntax.parameters.and_then(|parameters| parameters.parse().ok());
            return Some(Ok(Operator::Address(side, Of::WithoutPort(bits))));
        }
        _ => return None,
    };
    Some(no_parameters(syntax).map(|()| Operator::Address(side, of)))
}

/// The operators of HTTP, TLS and metadata, which have no value for plain TCP.
fn never(syntax: &Syntax<'_>) -> Result<Operator, String> {
    const WITHOUT_PARAMETERS: &[&str] = &[
        "DOWNSTREAM_HANDSHAKE_DURATION",
        "GRPC_STATUS_NUMBER",
        "REQUEST_DURATION",
        "REQUEST_TX_DURATION",
        "RESPONSE_DURATION",
        "RESPONSE_TX_DURATION",
        "ROUNDTRIP_DURATION",
        "SPAN_ID",
        "TLS_JA3_FINGERPRINT",
        "TLS_JA4_FINGERPRINT",
        "TRACE_ID",
        "UPSTREAM_PROTOCOL",
        "UPSTREAM_SERVER_NAME",
        "VIRTUAL_CLUSTER_NAME",
    ];
    const OPTIONAL_PARAMETERS: &[&str] = &["GRPC_STATUS", "PATH", "QUERY_PARAMS"];
    const WITH_PARAMETERS: &[&str] = &[
        "CLUSTER_METADATA",
        "DYNAMIC_METADATA",
        "FILTER_STATE",
        "METADATA",
        "QUERY_PARAM",
        "RESPONSE_TRAILER",
        "TRAILER",
        "UPSTREAM_FILTER_STATE",
        "UPSTREAM_METADATA",
    ];
    const TLS: &[&str] = &[
        "CIPHER",
        "SESSION_ID",
        "VERSION",
        "CERT",
        "CERT_V_END",
        "CERT_V_START",
        "CHAIN_FINGERPRINTS_1",
        "CHAIN_FINGERPRINTS_256",
        "CHAIN_SERIALS",
        "DNS_SAN",
        "EMAIL_SAN",
        "FINGERPRINT_1",
        "FINGERPRINT_256",
        "IP_SAN",
        "ISSUER",
        "OTHERNAME_SAN",
        "SERIAL",
        "SUBJECT",
        "URI_SAN",
    ];
    let name = syntax.name;
    let tls = [
        "DOWNSTREAM_TLS_",
        "UPSTREAM_TLS_",
        "DOWNSTREAM_PEER_",
        "UPSTREAM_PEER_",
        "DOWNSTREAM_LOCAL_",
        "UPSTREAM_LOCAL_",
    ]
    .into_iter()
    .find_map(|prefix| name.strip_prefix(prefix))
    .is_some_and(|field| TLS.contains(&field));
    if WITHOUT_PARAMETERS.contains(&name) {
        no_parameters(syntax)?;
    } else if WITH_PARAMETERS.contains(&name) {
        check_parameters(name, required(syntax)?)?;
    } else if matches!(name, "CEL" | "COALESCE") {
        return Err(format!(
            "%{name}% is not supported: write the operator that you need, or filter downstream"
        ));
    } else if !tls && !OPTIONAL_PARAMETERS.contains(&name) {
        return Err(unknown(name));
    }
    Ok(Operator::Never)
}

/// Refuses what Envoy refuses, so that a configuration that is accepted here is accepted there.
fn check_parameters(name: &str, parameters: &str) -> Result<(), String> {
    match name {
        "REQ" | "RESP" | "TRAILER" | "REQUEST_HEADER" | "RESPONSE_HEADER" | "RESPONSE_TRAILER" => {
            if parameters.matches('?').count() > 1 {
                return Err(format!("%{name}({parameters})% has more than one alternative"));
            }
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:?".contains(&byte);
            if !parameters.bytes().all(allowed) {
                return Err(format!("%{name}({parameters})%: that is no header name"));
            }
        }
        "FILTER_STATE" | "UPSTREAM_FILTER_STATE" => {
            if let Some(kind) =
                parameters.split(':').nth(1).filter(|k| !["PLAIN", "TYPED", "FIELD"].contains(k))
            {
                return Err(format!("%{name}({parameters})%: '{kind}' is none of PLAIN, TYPED, FIELD"));
            }
        }
        "METADATA" => {
            const KINDS: [&str; 7] = [
                "DYNAMIC",
                "CLUSTER",
                "ROUTE",
                "UPSTREAM_HOST",
                "LISTENER",
                "VIRTUAL_HOST",
                "LISTENER_FILTER_CHAIN",
            ];
            let kind = parameters.split(':').next().unwrap_or_default();
            if !KINDS.contains(&kind) {
                return Err(format!("%METADATA({parameters})%: '{kind}' is none of {}", KINDS.join(", ")));
            }
        }
        _ => {}
    }
    Ok(())
}

impl Side {
    fn of(self, record: &Record) -> Option<SocketAddr> {
        Some(match self {
            Self::DownstreamLocal => record.downstream_local,
            Self::DownstreamRemote => record.downstream_remote,
            Self::DownstreamDirectLocal => record.downstream_direct_local,
            Self::DownstreamDirectRemote => record.downstream_direct_remote,
            Self::UpstreamLocal => record.upstream.as_ref()?.local_address?,
            // Known once it is connected; the host that was chosen is UPSTREAM_HOST.
            Self::UpstreamRemote => {
                record.upstream.as_ref().filter(|host| host.connection_id.is_some())?.address
            }
        })
    }
}

impl Of {
    fn value(self, address: SocketAddr) -> Value<'static> {
        match self {
            Self::Whole => Value::Address(address),
            Self::Port => Value::Number(address.port().into()),
            Self::WithoutPort(Some(bits)) if bits <= if address.is_ipv4() { 32 } else { 128 } => {
                Value::Prefix(address.ip(), bits)
            }
            Self::WithoutPort(_) => Value::Ip(address.ip()),
        }
    }
}

impl Point {
    fn of(self, record: &Record) -> Option<Duration> {
        match self {
            Self::DownstreamBegin => Some(Duration::ZERO),
            Self::DownstreamEnd => record.duration,
            Self::UpstreamConnectBegin => record.connect_begin,
            Self::UpstreamConnectEnd => record.connect_end,
            Self::Never => None,
        }
    }
}

fn masked(ip: IpAddr, bits: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            IpAddr::V4((ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0)).into())
        }
        IpAddr::V6(ip) => {
            IpAddr::V6((ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)).into())
        }
    }
}

fn host_name(host: &Upstream, port: bool) -> Value<'_> {
    if host.hostname.is_empty() {
        return if port { Value::Address(host.address) } else { Value::Ip(host.address.ip()) };
    }
    match host.hostname.rsplit_once(':') {
        Some((name, _)) if !port => Value::Text(name),
        _ => Value::Text(&host.hostname),
    }
}

fn write_flags(flags: ResponseFlags, long: bool, out: &mut Vec<u8>) {
    if flags.is_empty() {
        out.push(b'-');
    }
    for (index, (_, short_name, long_name)) in flags.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(if long { long_name } else { short_name }.as_bytes());
    }
}

fn write_attempted(record: &Record, what: Attempted, out: &mut Vec<u8>) {
    for (index, host) in record.details().earlier_attempts.iter().chain(&record.upstream).enumerate() {
        if index > 0 {
            out.push(b',');
        }
        match what {
            Attempted::Hosts => Value::Address(host.address),
            Attempted::HostsWithoutPort => Value::Ip(host.address.ip()),
            Attempted::Names => host_name(host, true),
            Attempted::NamesWithoutPort => host_name(host, false),
            Attempted::ConnectionIds => Value::Number(host.connection_id.unwrap_or(0)),
        }
        .write(out);
    }
}

/// A version 4 UUID from random bits.
fn write_uuid(bits: u128, out: &mut Vec<u8>) -> std::io::Result<()> {
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    write!(
        out,
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        bits >> 96,
        bits >> 80 & 0xffff,
        bits >> 64 & 0xffff,
        bits >> 48 & 0xffff,
        bits & 0xffff_ffff_ffff
    )
}

/// The same for every entry of a connection, and for no other connection: its number and when it began,
/// spread over all bits (the finaliser of SplitMix64, which is a bijection).
fn stream_id(record: &Record) -> u128 {
    fn spread(mut x: u64) -> u64 {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    let began =
        record.start_time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let high = spread(record.id ^ began);
    u128::from(high) << 64
        | u128::from(spread(high ^ record.id.rotate_left(32) ^ u64::from(std::process::id())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_takes_an_operator_apart() {
        let parsed = |text| Syntax::parse(text).map(|s| (s.name, s.parameters, s.max_length, s.length));
        assert_eq!(parsed("%A_1%x"), Some(("A_1", None, None, 5)));
        assert_eq!(parsed("%A(b):12%x"), Some(("A", Some("b"), Some(12), 9)));
        assert_eq!(parsed("%A(%H:%M)%%"), Some(("A", Some("%H:%M"), None, 10)));
        assert_eq!(parsed("%A(a(b)c)%"), Some(("A", Some("a(b)c"), None, 10)));
        assert_eq!(parsed("%A(é)%"), Some(("A", Some("é"), None, 7)));
        assert_eq!(parsed("%A(b)c%"), None);
        assert_eq!(parsed("%A:%"), None);
    }

    #[test]
    fn prefixes_cut_both_families() {
        assert_eq!(masked("10.1.2.3".parse().unwrap(), 24), "10.1.2.0".parse::<IpAddr>().unwrap());
        assert_eq!(masked("10.1.2.3".parse().unwrap(), 0), "0.0.0.0".parse::<IpAddr>().unwrap());
        assert_eq!(masked("2001:db8::1".parse().unwrap(), 32), "2001:db8::".parse::<IpAddr>().unwrap());
        assert_eq!(masked("::1".parse().unwrap(), 128), "::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn stream_ids_are_stable_per_connection_and_differ_between_them() {
        let record = super::super::tests::record();
        let mut other = record.clone();
        other.id += 1;
        assert_eq!(stream_id(&record), stream_id(&record.clone()));
        assert_ne!(stream_id(&record), stream_id(&other));
        let mut out = Vec::new();
        write_uuid(u128::MAX, &mut out).unwrap();
        assert_eq!(out, b"ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
