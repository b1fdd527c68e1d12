//! `envoy.config.core.v3.HealthCheck` with a `tcp_health_check`, an `http_health_check` or a `grpc_health_check`.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::USER_AGENT;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method};
use prost::Message as _;

use super::runtime::Runtime;
use super::tls::StringMatch;

/// Active health checks with every default applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// How long a check may take. Never 0.
    pub timeout: Duration,
    /// When the next ones are due.
    pub intervals: Intervals,
    /// Failures in a row that make a healthy host unhealthy. 0: none do, as in Envoy.
    pub unhealthy_threshold: u32,
    /// Successes in a row that make an unhealthy host healthy. 0: none do. The first check of a host needs one only.
    pub healthy_threshold: u32,
    /// A connection serves several checks. Default true. One that sends nothing has a connection for each.
    pub reuse_connection: bool,
    /// `event_log_path`, and the paths of file sinks.
    pub event_logs: Vec<PathBuf>,
    /// Each failed check is an event, and not only the first one of a host.
    pub always_log_failures: bool,
    /// Each check that succeeds is one.
    pub always_log_success: bool,
    /// New hosts do not count in shares of healthy ones before their first check
    /// (`common_lb_config.ignore_new_hosts_until_first_hc`).
    pub ignore_new_hosts: bool,
    /// Hosts that are removed while they are healthy go at once, and not when they fail
    /// (`ignore_health_on_host_removal`).
    pub remove_healthy_hosts: bool,
    /// What is sent and expected.
    pub check: Check,
}

/// What a check does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// `tcp_health_check`
    Tcp(TcpHealthCheck),
    /// `http_health_check`
    Http(Box<HttpHealthCheck>),
    /// `grpc_health_check`: this request, whose response is that of `grpc.health.v1.Health/Check`.
    Grpc(Box<HttpHealthCheck>),
}

/// What `http_health_check` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpHealthCheck {
    /// Default GET.
    pub method: Method,
    /// With its query, if it has one.
    pub path: PathAndQuery,
    /// `Host`, or `:authority`. Default the cluster's name.
    pub host: HeaderValue,
    /// Every other header of the request.
    pub headers: HeaderMap,
    /// Its body, if it is not empty.
    pub send: Vec<u8>,
    /// `codec_client_type: HTTP2`, without TLS. Default false.
    pub http2: bool,
    /// Statuses that are a success. Empty: 200.
    pub expected: Vec<Range<u16>>,
    /// Other statuses after which an endpoint is unhealthy only at the threshold, and not at once.
    pub retriable: Vec<Range<u16>>,
    /// Blocks that the body has to have in this order, with anything between them.
    pub receive: Vec<Vec<u8>>,
    /// Where in the body they are looked for: in its first bytes. None: in all of it.
    pub response_buffer_size: Option<usize>,
    /// What `x-envoy-upstream-healthchecked-cluster` of the response has to be.
    pub service_name: Option<ServiceName>,
}

impl HttpHealthCheck {
    /// GET, and every default.
    pub fn get(host: HeaderValue, path: PathAndQuery) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static("Envoy/HC"));
        Self {
            method: Method::GET,
            path,
            host,
            headers,
            send: Vec::new(),
            http2: false,
            expected: Vec::new(),
            retriable: Vec::new(),
            receive: Vec::new(),
            response_buffer_size: Some(1024),
            service_name: None,
        }
    }
}

/// `grpc.health.v1.HealthCheckRequest`
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HealthCheckRequest {
    /// Empty: the whole server.
    #[prost(string, tag = "1")]
    pub service: String,
}

impl HealthCheckRequest {
    /// As it is sent: not compressed, its length, then itself.
    pub fn framed(&self) -> Vec<u8> {
        let message = self.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap_or_default().to_be_bytes();
        [&[0][..], &length, &message].concat()
    }
}

/// `service_name_matcher`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceName {
    /// What it has to be.
    pub pattern: StringMatch,
    /// Case does not count.
    pub ignore_case: bool,
}

/// What `tcp_health_check` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpHealthCheck {
    /// What is sent once connected, if something is expected.
    pub send: Vec<u8>,
    /// Blocks that have to come in this order, with anything between them. Empty: to be connected is enough.
    pub receive: Vec<Vec<u8>>,
    /// A header before `send`.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// With the addresses of the check's connection.
    V1,
    /// LOCAL, without addresses.
    V2,
}

/// Times from the end of one check to the begin of the next. None is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intervals {
    /// Of healthy hosts.
    pub healthy: Duration,
    /// Of unhealthy hosts. Default `healthy`.
    pub unhealthy: Duration,
    /// Of healthy hosts that have failed, but not often enough to be unhealthy. Default `unhealthy`.
    pub unhealthy_edge: Duration,
    /// Of unhealthy hosts that have succeeded, but not often enough to be healthy. Default `healthy`.
    pub healthy_edge: Duration,
    /// While the cluster never had a connection. Default 60 s.
    pub no_traffic: Duration,
    /// The same, of healthy hosts. Default `no_traffic`.
    pub no_traffic_healthy: Duration,
    /// The first check of a host begins up to so much later. Default 0.
    pub initial_jitter: Duration,
    /// Each interval is up to so much longer. Default 0.
    pub jitter: Duration,
    /// And up to so many percent longer. Default 0.
    pub jitter_percent: u32,
    /// Runtime `health_check.min_interval`. Default 1 ms.
    pub min: Duration,
    /// Runtime `health_check.max_interval`. Default none.
    pub max: Duration,
}

impl HealthCheck {
    /// Puts the runtime keys `health_check.*` in force.
    pub fn apply_runtime(&mut self, runtime: &Runtime) {
        if let Some(min) = runtime.number("health_check.", "min_interval") {
            self.intervals.min = Duration::from_millis(min.max(1));
        }
        if let Some(max) = runtime.number("health_check.", "max_interval") {
            self.intervals.max = Duration::from_millis(max.max(1));
        }
    }
}

/// `Endpoint.health_check_config`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointHealthCheck {
    /// Where it is checked instead of at its own address; the port counts unless `port` is set.
    pub address: Option<SocketAddr>,
    /// The port it is checked at; 0 stands for that of the address.
    pub port: u16,
    /// It is not checked.
    pub disabled: bool,
}

impl EndpointHealthCheck {
    /// Where an endpoint at `own` is checked; none if it isn't.
    pub fn target(this: Option<&Arc<Self>>, own: SocketAddr) -> Option<SocketAddr> {
        let Some(this) = this else { return Some(own) };
        let mut target = this.address.unwrap_or(own);
        if this.port != 0 {
            target.set_port(this.port);
        }
        (!this.disabled).then_some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_an_endpoint_is_checked() {
        let own: SocketAddr = ([10, 0, 0, 1], 80).into();
        let target = |check: EndpointHealthCheck| {
            EndpointHealthCheck::target(Some(&Arc::new(check)), own).map(|it| it.to_string())
        };
        let none = EndpointHealthCheck::default;
        let address = Some(([10, 0, 0, 2], 81).into());
        assert_eq!(EndpointHealthCheck::target(None, own), Some(own));
        assert_eq!(target(none()).as_deref(), Some("10.0.0.1:80"));
        assert_eq!(target(EndpointHealthCheck { port: 9, ..none() }).as_deref(), Some("10.0.0.1:9"));
        assert_eq!(target(EndpointHealthCheck { address, ..none() }).as_deref(), Some("10.0.0.2:81"));
        assert_eq!(target(EndpointHealthCheck { address, port: 9, ..none() }).as_deref(), Some("10.0.0.2:9"));
        assert_eq!(target(EndpointHealthCheck { disabled: true, ..none() }), None);
    }
}
