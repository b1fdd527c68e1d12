//! A listener at run time: its filter chains ready to be matched, its stats, its access logs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use crate::access_log::{AccessLogError, AccessLogs};
use crate::config;
use crate::config::filter_chain::Terminal;
use crate::config::listener::ListenerFilter;
use crate::config::route::{HttpRouting, RdsRouting};
use crate::stats::{HttpStats, ListenerStats, Stats, TcpProxyStats};

pub mod balance;
pub mod filter;
pub mod filter_chain;

use balance::Balance;
use filter_chain::{MatchError, Matcher, SourceRange};

/// One listener, shared by every connection that it serves. Replaced as a whole when its configuration changes.
#[derive(Debug)]
pub struct Listener {
    /// What it was built from.
    pub config: Arc<config::listener::Listener>,
    /// `listener.<address or stat_prefix>.`.
    pub stats: ListenerStats,
    /// The listener's own access logs.
    pub access_log: AccessLogs,
    matcher: Matcher,
    /// In the order of `config.filter_chains`, then the default chain if there is one.
    chains: Vec<Arc<Chain>>,
    /// Connections that this listener serves now, for its connection limit.
    active: Arc<AtomicU64>,
    /// Its connections by worker, with `exact_balance` only.
    balance: Option<Arc<Balance>>,
}

/// Identifies a [`Chain`]: its successor after an update has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChainId(NonZeroU64);

static NEXT_CHAIN: AtomicU64 = AtomicU64::new(1);

/// A filter chain at run time.
#[derive(Debug)]
pub struct Chain {
    /// Unique in the process.
    pub id: ChainId,
    /// Its connections were told to end: it was drained.
    ended: AtomicBool,
    /// What it was built from.
    pub config: Arc<config::filter_chain::FilterChain>,
    /// What it does with a connection.
    pub service: Service,
}

/// What a chain does with a connection.
#[derive(Debug)]
pub enum Service {
    /// Closes it: the chain has no filters.
    Nothing,
    /// Proxies it to the cluster of its `tcp_proxy`.
    Tcp(Arc<TcpProxy>),
    /// Proxies it to the cluster of the virtual host that its original destination chooses.
    Http(HttpAsTcp),
}

/// A `tcp_proxy` filter at run time.
#[derive(Debug)]
pub struct TcpProxy {
    /// What it was built from.
    pub config: Arc<config::tcp_proxy::TcpProxy>,
    /// `tcp.<stat_prefix>.`.
    pub stats: TcpProxyStats,
    /// The filter's access logs.
    pub access_log: AccessLogs,
}

/// An `http_connection_manager` served as L4.
#[derive(Debug)]
pub struct HttpAsTcp {
    /// `http.<stat_prefix>.`.
    pub stats: HttpStats,
    /// Where its routes come from; none: they are part of the listener.
    pub rds: Option<Arc<RdsRouting>>,
    /// Empty until RDS brings some: connections end with flag NR then.
    routes: ArcSwapOption<Routes>,
}

/// Virtual hosts at run time. Replaced as a whole by RDS.
#[derive(Debug)]
struct Routes {
    routing: Arc<HttpRouting>,
    /// One for each virtual host, in their order; none where no route can be served.
    proxies: Vec<Option<Arc<TcpProxy>>>,
}

/// Why a listener can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// Two filter chains are the same to the matcher.
    #[error("listener '{listener}': {source}")]
    Match {
        /// Its name.
        listener: Arc<str>,
        /// Which chains.
        source: MatchError,
    },
    /// An access log can't be opened.
    #[error("listener '{listener}': {source}")]
    AccessLog {
        /// Its name.
        listener: Arc<str>,
        /// Which, and why.
        source: AccessLogError,
    },
}

impl Listener {
    /// Builds a listener. Opens its access logs; binds nothing.
    ///
    /// `previous` is the listener that it replaces. When only filter chains differ, those that are the same live on,
    /// and so do their connections; see [`Listener::is_in_place_update_of`].
    pub fn build(
        config: &Arc<config::listener::Listener>,
        stats: &Stats,
        logs: &crate::access_log::Registry,
        previous: Option<&Self>,
    ) -> Result<Self, ListenerError> {
        for filter in &config.listener_filters {
            if let ListenerFilter::ProxyProtocol { stat_prefix, .. } = filter {
                stats.proxy_protocol(stat_prefix); // shown before the first connection
            }
        }
        let access_log_error =
            |source| ListenerError::AccessLog { listener: Arc::clone(&config.name), source };
        let matcher = Matcher::build(&config.filter_chains, config.default_filter_chain.as_ref())
            .map_err(|source| ListenerError::Match { listener: Arc::clone(&config.name), source })?;
        let in_place = previous.filter(|previous| previous.config.content == config.content);
        let chains = config
            .filter_chains
            .iter()
            .chain(&config.default_filter_chain)
            .map(|chain| match in_place.and_then(|previous| previous.same_chain(chain)) {
                Some(same) => Ok(same),
                None => Chain::build(chain, stats, logs).map(Arc::new),
            })
            .collect::<Result<_, _>>()
            .map_err(access_log_error)?;
        Ok(Self {
            config: Arc::clone(config),
            stats: stats.listener(config.address(), config.stat_prefix.as_deref()),
            access_log: AccessLogs::open(&config.access_log, logs).map_err(access_log_error)?,
            matcher,
            chains,
            active: in_place.map(|previous| Arc::clone(&previous.active)).unwrap_or_default(),
            balance: config.exact_balance.then(|| {
                let known = in_place.and_then(|previous| previous.balance.clone());
                known.unwrap_or_else(|| Arc::new(Balance::new(stats.workers())))
            }),
        })
    }

    /// Whether it differs from `other` in nothing but its filter chains, so that connections of chains that both have
    /// need not be drained.
    pub fn is_in_place_update_of(&self, other: &Self) -> bool {
        self.config.content == other.config.content
    }

    /// Its filter chains.
    pub fn chains(&self) -> &[Arc<Chain>] {
        &self.chains
    }

    /// Its HTTP chains with routes from RDS.
    pub fn rds_chains(&self) -> impl Iterator<Item = (&Arc<Chain>, &Arc<RdsRouting>)> {
        self.chains.iter().filter_map(|chain| match &chain.service {
            Service::Http(HttpAsTcp { rds: Some(rds), .. }) => Some((chain, rds)),
            _ => None,
        })
    }

    fn same_chain(&self, config: &config::filter_chain::FilterChain) -> Option<Arc<Chain>> {
        self.chains.iter().find(|chain| chain.config.content == config.content).cloned()
    }

    /// The filter chain for a connection; none when nothing matches and there is no default chain.
    pub fn find_chain(&self, input: &filter_chain::MatchInput<'_>) -> Option<&Arc<Chain>> {
        self.chains.get(self.matcher.find(input)?)
    }

    /// The same for all connections to a destination, by their source; see [`Matcher::find_by_source`].
    pub fn chains_by_source(
        &self,
        destination: SocketAddr,
    ) -> Result<Vec<SourceRange<&Arc<Chain>>>, &'static str> {
        let chain = |range: SourceRange<usize>| SourceRange {
            first: range.first,
            chain: range.chain.and_then(|index| self.chains.get(index)),
        };
        Ok(self.matcher.find_by_source(destination)?.into_iter().map(chain).collect())
    }

    /// Where its connections are balanced over the workers, if they are.
    pub fn balance(&self) -> Option<&Arc<Balance>> {
        self.balance.as_ref()
    }

    /// Whether it looks for the original destination of its connections.
    pub fn restores_destination(&self) -> bool {
        self.config.listener_filters.contains(&config::listener::ListenerFilter::OriginalDst)
    }

    /// Takes a place within the connection limit, for [`Listener::release`] to give back. False when it is full.
    #[must_use]
    pub fn admit(&self) -> bool {
        let before = self.active.fetch_add(1, Ordering::Relaxed);
        let full = self.config.connection_limit.is_some_and(|limit| before >= limit);
        if full {
            self.release();
        }
        !full
    }

    /// Gives a place back that [`Listener::admit`] has taken.
    pub fn release(&self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Chain {
    fn build(
        config: &Arc<config::filter_chain::FilterChain>,
        stats: &Stats,
        logs: &crate::access_log::Registry,
    ) -> Result<Self, AccessLogError> {
        let service = match &config.terminal {
            None => Service::Nothing,
            Some(Terminal::TcpProxy(proxy)) => Service::Tcp(TcpProxy::build(proxy, stats, logs)?),
            Some(Terminal::HttpAsTcp(routing)) => {
                let http = HttpAsTcp::new(&routing.stat_prefix, None, stats);
                http.set_routes(Arc::clone(routing), stats, logs)?;
                Service::Http(http)
            }
            Some(Terminal::HttpFromRds(rds)) => {
                Service::Http(HttpAsTcp::new(&rds.proxy.stat_prefix, Some(Arc::clone(rds)), stats))
            }
        };
        // It begins at 1, and 584 years of a chain per nanosecond do not bring it round.
        let id = NEXT_CHAIN.fetch_add(1, Ordering::Relaxed);
        let id = ChainId(NonZeroU64::new(id).unwrap_or(NonZeroU64::MIN));
        Ok(Self { id, ended: AtomicBool::new(false), config: Arc::clone(config), service })
    }

    /// Connections that choose it from now on end at once. Those that it has are the workers' business.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether [`Chain::end`] was called.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Replaces the routes of an HTTP chain, for connections that come from now on.
    pub fn set_routes(
        &self,
        routing: HttpRouting,
        stats: &Stats,
        logs: &crate::access_log::Registry,
    ) -> Result<(), AccessLogError> {
        match &self.service {
            Service::Http(http) => http.set_routes(Arc::new(routing), stats, logs),
            Service::Nothing | Service::Tcp(_) => Ok(()),
        }
    }
}

impl TcpProxy {
    fn build(
        config: &Arc<config::tcp_proxy::TcpProxy>,
        stats: &Stats,
        logs: &crate::access_log::Registry,
    ) -> Result<Arc<Self>, AccessLogError> {
        Ok(Arc::new(Self {
            config: Arc::clone(config),
            stats: stats.tcp_proxy(&config.stat_prefix),
            access_log: AccessLogs::open(&config.access_log, logs)?,
        }))
    }
}

impl HttpAsTcp {
    fn new(stat_prefix: &str, rds: Option<Arc<RdsRouting>>, stats: &Stats) -> Self {
        Self { stats: stats.http(stat_prefix), rds, routes: ArcSwapOption::empty() }
    }

    fn set_routes(
        &self,
        routing: Arc<HttpRouting>,
        stats: &Stats,
        logs: &crate::access_log::Registry,
    ) -> Result<(), AccessLogError> {
        let proxies = routing
            .virtual_hosts
            .iter()
            .map(|host| host.proxy.as_ref().map(|proxy| TcpProxy::build(proxy, stats, logs)).transpose())
            .collect::<Result<_, _>>()?;
        self.routes.store(Some(Arc::new(Routes { routing, proxies })));
        Ok(())
    }

    /// The proxy of the virtual host for this destination, and the host's route name.
    pub fn choose(&self, destination: SocketAddr) -> Option<(Arc<TcpProxy>, Arc<str>)> {
        let routes = self.routes.load();
        let Routes { routing, proxies } = &**routes.as_ref()?;
        let index = routing.virtual_host_index(destination)?;
        let proxy = proxies.get(index)?.clone()?;
        Some((proxy, Arc::clone(&routing.virtual_hosts.get(index)?.route_name)))
    }
}

/// The wildcard address of the same family and port, which a virtual listener may own.
pub fn wildcard_of(address: SocketAddr) -> SocketAddr {
    let any = match address.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(any, address.port())
}
