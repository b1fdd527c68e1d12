//! `FilterChain` and `FilterChainMatch`.

use std::sync::Arc;

use super::listener::Cidr;
use super::route::{HttpRouting, RdsRouting};
use super::tcp_proxy::TcpProxy;

/// One filter chain: when it applies, and what it does with the connection.
#[derive(Clone, Debug)]
pub struct FilterChain {
    /// `name`; empty when the configuration gives none.
    pub name: Arc<str>,
    /// When it applies; the default value matches everything.
    pub matches: FilterChainMatch,
    /// The terminal filter. `None`: an empty filter list, which closes the connection.
    pub terminal: Option<Terminal>,
    /// Hash of the message: a chain that has the same one after an update keeps its connections.
    pub content: u64,
    /// Names of `istio.*` filters that were accepted and have no effect.
    pub ignored_filters: Vec<Arc<str>>,
}

/// The filter that ends a chain.
#[derive(Clone, Debug)]
pub enum Terminal {
    /// `envoy.filters.network.tcp_proxy`.
    TcpProxy(Arc<TcpProxy>),
    /// `http_connection_manager`, served as L4: the original destination chooses the virtual host.
    HttpAsTcp(Arc<HttpRouting>),
    /// The same, with routes from RDS.
    HttpFromRds(Arc<RdsRouting>),
}

/// `FilterChainMatch`; an empty list or `None` means "any".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterChainMatch {
    /// Destination port.
    pub destination_port: Option<u16>,
    /// Destination IP prefixes.
    pub prefix_ranges: Vec<Cidr>,
    /// SNI: exact or `*.suffix`, lower case.
    pub server_names: Vec<Arc<str>>,
    /// `raw_buffer` or `tls`; empty: any.
    pub transport_protocol: Arc<str>,
    /// ALPN or sniffed protocols.
    pub application_protocols: Vec<Arc<str>>,
    /// Prefixes of the directly connected peer.
    pub direct_source_prefix_ranges: Vec<Cidr>,
    /// Whether the source must be local or remote.
    pub source_type: SourceType,
    /// Source IP prefixes.
    pub source_prefix_ranges: Vec<Cidr>,
    /// Source ports.
    pub source_ports: Vec<u16>,
}

/// `ConnectionSourceType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceType {
    /// Any source.
    #[default]
    Any,
    /// Source and destination address are the same, or the source is loopback.
    SameIpOrLoopback,
    /// Any other source.
    External,
}
