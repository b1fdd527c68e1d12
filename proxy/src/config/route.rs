//! Route configurations of HTTP listeners, as far as L4 can serve them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::config_source::ConfigSource;
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
    /// Domains that are addresses, each with the index of its virtual host.
    by_address: HashMap<SocketAddr, usize>,
    /// Domains that are IP addresses without a port.
    by_ip: HashMap<IpAddr, usize>,
    /// The virtual host with the domain `*`.
    any: Option<usize>,
}

/// `http_connection_manager` with `rds`, served as L4.
#[derive(Clone, Debug)]
pub struct RdsRouting {
    /// What the connection manager says of connections; the clusters are the routes'.
    pub proxy: TcpProxy,
    /// `route_config_name`.
    pub route_config_name: Arc<str>,
    /// From where.
    pub config: ConfigSource,
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

/// What a domain means to a proxy that sees addresses only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Domain {
    /// `ip:port`.
    Address(SocketAddr),
    /// `ip`; IPv6 with or without brackets.
    Ip(IpAddr),
    /// `*`.
    Any,
    /// A host name, or a wildcard of host names: no address matches it.
    Name,
}

impl Domain {
    pub(super) fn new(domain: &str) -> Self {
        let bare = domain.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(domain);
        match (domain, domain.parse(), bare.parse()) {
            ("*", _, _) => Self::Any,
            (_, Ok(address), _) => Self::Address(address),
            (_, _, Ok(ip)) => Self::Ip(ip),
            _ => Self::Name,
        }
    }
}

impl HttpRouting {
    /// Prepares the look-up by address. Of virtual hosts with the same domain, the first has it.
    pub fn new(stat_prefix: Arc<str>, route_config: Arc<str>, virtual_hosts: Vec<VirtualHost>) -> Self {
        let (mut by_address, mut by_ip, mut any) = (HashMap::new(), HashMap::new(), None);
        for (index, host) in virtual_hosts.iter().enumerate() {
            for domain in &host.domains {
                match Domain::new(domain) {
                    Domain::Address(address) => _ = by_address.entry(address).or_insert(index),
                    Domain::Ip(ip) => _ = by_ip.entry(ip).or_insert(index),
                    Domain::Any => _ = any.get_or_insert(index),
                    Domain::Name => {}
                }
            }
        }
        Self { stat_prefix, route_config, virtual_hosts, by_address, by_ip, any }
    }

    /// Index of the virtual host for an original destination: the one with the domain `ip:port`, else `ip`,
    /// else `*`. Allocates nothing.
    pub fn virtual_host_index(&self, original_dst: SocketAddr) -> Option<usize> {
        let original_dst = crate::addr::unmapped(original_dst);
        let by_ip = || self.by_ip.get(&original_dst.ip()).copied();
        self.by_address.get(&original_dst).copied().or_else(by_ip).or(self.any)
    }

    /// The virtual host for an original destination.
    pub fn virtual_host(&self, original_dst: SocketAddr) -> Option<&VirtualHost> {
        self.virtual_host_index(original_dst).map(|index| &self.virtual_hosts[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, domains: &[&str]) -> VirtualHost {
        VirtualHost {
            name: name.into(),
            domains: domains.iter().map(|domain| (*domain).into()).collect(),
            route_name: "".into(),
            proxy: None,
        }
    }

    fn found(routing: &HttpRouting, address: &str) -> Option<String> {
        routing.virtual_host(address.parse().unwrap()).map(|host| host.name.to_string())
    }

    #[test]
    fn the_most_specific_domain_wins_whatever_the_order() {
        let routing = HttpRouting::new(
            "p".into(),
            "r".into(),
            vec![
                host("any", &["*"]),
                host("ip", &["foo", "172.16.0.1", "[2001:db8::1]"]),
                host("port", &["foo:50001", "172.16.0.1:50001", "[2001:db8::1]:50001"]),
            ],
        );
        for (address, name) in [
            ("172.16.0.1:50001", "port"),
            ("172.16.0.1:50002", "ip"),
            ("172.16.0.2:50001", "any"),
            ("[::ffff:172.16.0.1]:50001", "port"),
            ("[2001:db8::1]:50001", "port"),
            ("[2001:db8::1]:1", "ip"),
        ] {
            assert_eq!(found(&routing, address).as_deref(), Some(name), "{address}");
        }
    }

    #[test]
    fn wildcards_of_names_match_no_address() {
        let routing = HttpRouting::new(
            "p".into(),
            "r".into(),
            vec![host("w", &["172.*", "*.0.0.1", "*:80", "foo.com"])],
        );
        assert_eq!(found(&routing, "172.16.0.1:80"), None);
    }
}
