//! `envoy.config.core.v3.BindConfig`: what sockets to endpoints are bound to.

use std::net::SocketAddr;

use crate::sys::socket::SocketOption;

/// What one `upstream_bind_config` says: a cluster's, or the cluster manager's, which is every cluster's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BindConfig {
    /// `source_address` and the extra one: at most two, of different families.
    pub sources: Vec<UpstreamSource>,
    /// The addresses need not be there (`IP_FREEBIND`).
    pub freebind: Option<bool>,
    /// For every socket.
    pub socket_options: Vec<SocketOption>,
}

/// What sockets of one cluster are bound to: those of clients' connections (of captured ones in the network namespace of the pod,
/// where the addresses have to be), of health checks, and to control planes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamBind {
    sources: Vec<UpstreamSource>,
    /// The addresses need not be there (`IP_FREEBIND`).
    pub freebind: bool,
    socket_options: Vec<SocketOption>,
}

/// An address to connect from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSource {
    /// Port 0: the kernel's choice.
    pub address: SocketAddr,
    /// Instead of the options for every socket.
    pub socket_options: Option<Vec<SocketOption>>,
}

impl UpstreamBind {
    /// Of a cluster and of the cluster manager, if either says something. As in Envoy, a cluster that has an
    /// `upstream_bind_config` of its own has no address of the cluster manager's; freebind and options come from there as far as
    /// the cluster says nothing of them.
    pub fn of(cluster: Option<BindConfig>, manager: Option<&BindConfig>) -> Option<Self> {
        let (own, manager) = match (cluster, manager) {
            (None, None) => return None,
            (None, Some(manager)) => (manager.clone(), None),
            (Some(own), manager) => (own, manager),
        };
        let BindConfig { sources, freebind, mut socket_options } = own;
        if let Some(manager) = manager
            && socket_options.is_empty()
        {
            socket_options.clone_from(&manager.socket_options);
        }
        let freebind = freebind.or(manager.and_then(|manager| manager.freebind)).unwrap_or(false);
        let bind = Self { sources, freebind, socket_options };
        (bind != Self::default()).then_some(bind)
    }

    /// The address and the options for a connection to this endpoint. Where no address is of its family it is the first one, as
    /// in Envoy: then bind(2) fails, instead of a connection that comes from anywhere.
    pub fn for_endpoint(&self, endpoint: SocketAddr) -> (Option<SocketAddr>, &[SocketOption]) {
        let fits = |source: &&UpstreamSource| source.address.is_ipv4() == endpoint.is_ipv4();
        let source = self.sources.iter().find(fits).or(self.sources.first());
        let options = source.and_then(|source| source.socket_options.as_deref());
        (source.map(|source| source.address), options.unwrap_or(&self.socket_options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::SocketState;

    fn option(name: i32) -> SocketOption {
        SocketOption { level: 1, name, value: Box::default(), state: SocketState::Prebind, ipv6: None }
    }

    fn source(address: &str) -> UpstreamSource {
        UpstreamSource { address: address.parse().unwrap(), socket_options: None }
    }

    #[test]
    fn a_cluster_s_own_goes_before_the_manager_s() {
        let manager = BindConfig {
            sources: vec![source("10.0.0.1:0")],
            freebind: Some(true),
            socket_options: vec![option(1)],
        };
        let endpoint = "10.9.9.9:80".parse().unwrap();
        let all = UpstreamBind::of(None, Some(&manager)).unwrap();
        assert_eq!(all.for_endpoint(endpoint), (Some("10.0.0.1:0".parse().unwrap()), &[option(1)][..]));
        assert!(all.freebind);
        let own = |own| UpstreamBind::of(Some(own), Some(&manager)).unwrap();
        let bare = own(BindConfig::default());
        assert_eq!(bare.for_endpoint(endpoint), (None, &[option(1)][..]));
        let otherwise = own(BindConfig {
            sources: vec![source("10.0.0.2:0")],
            freebind: Some(false),
            socket_options: vec![option(2)],
        });
        assert_eq!(otherwise.for_endpoint(endpoint), (Some("10.0.0.2:0".parse().unwrap()), &[option(2)][..]));
        assert!(!otherwise.freebind);
        assert_eq!(UpstreamBind::of(Some(BindConfig::default()), None), None);
    }

    #[test]
    fn the_source_is_of_the_endpoint_s_family_if_there_is_one() {
        let mut second = source("[fd00::1]:0");
        second.socket_options = Some(vec![]);
        let config =
            |sources| BindConfig { sources, socket_options: vec![option(1)], ..BindConfig::default() };
        let both = UpstreamBind::of(Some(config(vec![source("10.0.0.1:0"), second])), None).unwrap();
        let (address, options) = both.for_endpoint("[fd00::9]:80".parse().unwrap());
        assert_eq!((address, options), (Some("[fd00::1]:0".parse().unwrap()), &[][..]));
        let one = UpstreamBind::of(Some(config(vec![source("10.0.0.1:0")])), None).unwrap();
        assert_eq!(one.for_endpoint("[fd00::9]:80".parse().unwrap()).0, Some("10.0.0.1:0".parse().unwrap()));
    }
}
