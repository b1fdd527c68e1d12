//! `envoy.config.listener.v3.Listener`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::access_log::AccessLog;
use super::filter_chain::FilterChain;
use crate::sys::socket::SocketOption;

/// A listener with every default applied.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Unique name; made up from the address when the configuration gives none.
    pub name: Arc<str>,
    /// `address`, then `additional_addresses`. Never empty. Hand-off keys on each of them.
    pub addresses: Vec<SocketAddr>,
    /// `false`: a virtual listener, reached only by hand-off of a restored original destination.
    pub bind_to_port: bool,
    /// Adds the `original_dst` listener filter and hands the connection to the owner of the restored address.
    pub use_original_dst: bool,
    /// Chains in file order; matching is by specificity, not by order.
    pub filter_chains: Vec<Arc<FilterChain>>,
    /// Used when no chain matches.
    pub default_filter_chain: Option<Arc<FilterChain>>,
    /// Listener filters in file order, the implicit `original_dst` of `use_original_dst` included.
    pub listener_filters: Vec<ListenerFilter>,
    /// How long listener filters may take together. `None`: no limit (`0s`). Envoy's default is 15 s.
    pub listener_filters_timeout: Option<Duration>,
    /// After that timeout: go on with what is known (`true`), or close the connection.
    pub continue_on_listener_filters_timeout: bool,
    /// `INBOUND`, `OUTBOUND` or unspecified.
    pub traffic_direction: TrafficDirection,
    /// Listener access logs, written at the end of every connection that this listener accepted.
    pub access_log: Vec<AccessLog>,
    /// Soft limit of bytes buffered per direction. Default 1 MiB.
    pub per_connection_buffer_limit_bytes: u32,
    /// Accept backlog; `None`: the kernel's somaxconn.
    pub tcp_backlog_size: Option<u32>,
    /// One listening socket per worker (default) or one shared by all.
    pub enable_reuse_port: bool,
    /// IP_TRANSPARENT on the listening socket (TPROXY).
    pub transparent: bool,
    /// IP_FREEBIND on the listening socket.
    pub freebind: bool,
    /// Keepalive of downstream connections.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Options by number, for the listening sockets; accepted ones inherit most of them.
    pub socket_options: Vec<SocketOption>,
    /// What `additional_addresses` have of their own.
    pub overrides: Vec<AddressOverride>,
    /// TCP Fast Open queue length; `None` leaves the socket as it is.
    pub tcp_fast_open_queue_length: Option<u32>,
    /// At most so many accepts per wakeup of the listening socket; `None`: until the queue is empty.
    pub max_connections_to_accept_per_socket_event: Option<u32>,
    /// `connection_balance_config.exact_balance`: a connection goes to the worker that has the fewest of this listener.
    /// A destination that only the PROXY protocol tells is known too late for that: it stays where it was accepted.
    pub exact_balance: bool,
    /// Replaces the address in `listener.<…>.` stats.
    pub stat_prefix: Option<Arc<str>>,
    /// Runtime key `envoy.resource_limits.listener.<name>.connection_limit`; `None`: unlimited.
    pub connection_limit: Option<u64>,
    /// `ignore_global_conn_limit`.
    pub ignore_global_conn_limit: bool,
    /// Hash of the message without its filter chains: an update that leaves it the same is made in place.
    pub content: u64,
}

impl Listener {
    /// The first address, which names the listener in stats.
    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }
}

/// How sockets at one of the `additional_addresses` are opened, if it says more of that than the listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressOverride {
    /// Which.
    pub address: SocketAddr,
    /// Its own options, else the listener's.
    pub socket_options: Vec<SocketOption>,
    /// Its own keepalive, which may be none, else the listener's.
    pub tcp_keepalive: Option<TcpKeepalive>,
}

/// `traffic_direction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficDirection {
    /// Not stated.
    #[default]
    Unspecified,
    /// Towards the local service.
    Inbound,
    /// From the local service.
    Outbound,
}

/// A listener filter that runs before a filter chain is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerFilter {
    /// Restores the original destination.
    OriginalDst,
    /// Reads the ClientHello for transport protocol, SNI and ALPN.
    TlsInspector {
        /// A ClientHello that does not end within so many bytes closes the connection. Envoy's default, and its
        /// maximum, is 16,384.
        max_client_hello_size: u32,
        /// What is not a valid ClientHello closes the connection, instead of being served as plaintext.
        close_connection_on_client_hello_parsing_errors: bool,
    },
    /// Recognises HTTP/1.x and HTTP/2 prefaces for `application_protocols`.
    HttpInspector,
    /// Reads a PROXY protocol header.
    ProxyProtocol {
        /// Connections without a header are served as they are (else closed).
        allow_requests_without_proxy_protocol: bool,
        /// Header versions that are refused.
        disallowed_versions: Vec<ProxyProtocolVersion>,
        /// Goes between `proxy_proto.` and the names of the stats; empty when not given.
        stat_prefix: Arc<str>,
    },
}

impl ListenerFilter {
    /// `proxy_protocol` with Envoy's defaults: a header of either version is required.
    pub fn proxy_protocol() -> Self {
        Self::ProxyProtocol {
            allow_requests_without_proxy_protocol: false,
            disallowed_versions: vec![],
            stat_prefix: Arc::from(""),
        }
    }
}

/// Version of a PROXY protocol header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocolVersion {
    /// The text form.
    V1,
    /// The binary form.
    V2,
}

/// `envoy.config.core.v3.TcpKeepalive`; `None` leaves the kernel's setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Unanswered probes before the connection is dropped.
    pub probes: Option<u32>,
    /// Idle time before the first probe, seconds.
    pub time: Option<u32>,
    /// Time between probes, seconds.
    pub interval: Option<u32>,
}

/// An IP prefix; the host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// Network address.
    pub address: IpAddr,
    /// Prefix length in bits: 0–32 or 0–128.
    pub prefix_len: u8,
}

impl Cidr {
    /// Whether the address is in it. IPv4 in either form is the same address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        // All bits for a prefix of no length would be shifted out.
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(ip)) => {
                let bits = u32::from(network) ^ u32::from(ip);
                bits.checked_shr(32 - u32::from(self.prefix_len)).unwrap_or(0) == 0
            }
            (IpAddr::V6(network), IpAddr::V6(ip)) => {
                let bits = u128::from(network) ^ u128::from(ip);
                bits.checked_shr(128 - u32::from(self.prefix_len)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_prefix_contains() {
        for (network, prefix_len, ip, contained) in [
            ("10.1.2.0", 24, "10.1.2.255", true),
            ("10.1.2.0", 24, "10.1.3.0", false),
            ("10.1.2.3", 32, "10.1.2.3", true),
            ("10.1.2.3", 32, "10.1.2.2", false),
            ("0.0.0.0", 0, "255.255.255.255", true),
            ("0.0.0.0", 0, "::1", false),
            ("10.1.2.0", 24, "::ffff:10.1.2.9", true),
            ("fd99::", 16, "fd99:ffff::1", true),
            ("fd99::", 16, "fd98::1", false),
            ("::", 0, "fd98::1", true),
            ("::", 0, "10.0.0.1", false),
            ("fd99::1", 128, "fd99::1", true),
            ("fd99::1", 128, "fd99::2", false),
        ] {
            let cidr = Cidr { address: network.parse().unwrap(), prefix_len };
            assert_eq!(cidr.contains(ip.parse().unwrap()), contained, "{network}/{prefix_len} {ip}");
        }
    }
}
