//! Route configurations of HTTP listeners, as far as L4 can serve them.

use std::sync::Arc;

use super::tcp_proxy::TcpProxy;

/// `http_connection_manager` with an inline `route_config`, served as L4.
#[derive(Clone, Debug)]
pub struct HttpRouting {
    /// `stat_prefix` of the connection manager.
    pub stat_prefix: Arc<str>,
    /// Name of the route configuration.
    pub route_config: Arc<str>,
    /// Virtual hosts in file order.
    pub virtual_hosts: Vec<VirtualHost>,
}

/// A virtual host and what its `prefix: /` route does.
#[derive(Clone, Debug)]
pub struct VirtualHost {
    /// `name`.
    pub name: Arc<str>,
    /// `domains`, lower case; `*` matches everything.
    pub domains: Vec<Arc<str>>,
    /// The route's name, for `%ROUTE_NAME%`.
    pub route_name: Arc<str>,
    /// How connections are proxied. `None`: the host has no route that L4 can serve (flag NR).
    pub proxy: Option<Arc<TcpProxy>>,
}
