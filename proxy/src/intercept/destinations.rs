//! What is captured: which destinations of a configuration go to the proxy, which are refused in the kernel, and
//! what happens to all others. A pure function of listeners and clusters.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tidegate_common::{Destination, RuleValue, Verdict};

use crate::config::bootstrap::Exclusions;
use crate::config::cluster::{Cluster, Discovery};
use crate::config::filter_chain::{FilterChain, FilterChainMatch, Terminal};
use crate::config::listener::{Cidr, Listener, TrafficDirection};
use crate::config::tcp_proxy::{ClusterChoice, TcpProxy};

/// Istio's name for the cluster that refuses: STATIC, without endpoints.
pub const BLACK_HOLE: &str = "BlackHoleCluster";

/// The rules of one configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destinations {
    /// By destination; an unspecified address is every address of its family.
    pub rules: BTreeMap<SocketAddr, Rule>,
    /// What happens to a destination that no rule names.
    pub everything_else: EverythingElse,
}

/// What happens to one destination, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Capture, balance or refuse; leave alone only where the rest is not.
    pub verdict: Verdict,
    /// Index of the service; 0 where it is not balanced in the kernel.
    pub service: u32,
    /// The listener that says so; nobody's name where it is left alone.
    pub listener: Arc<str>,
}

/// What happens to the destinations that no rule names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EverythingElse {
    /// There is no catch-all: it stays in the kernel, untouched.
    #[default]
    Passes,
    /// To the proxy, for this listener.
    Captured(Arc<str>),
    /// Refused: the chain of this listener leads to the black hole only.
    Refused(Arc<str>),
}

impl EverythingElse {
    /// For the kernel.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Passes => Verdict::Leave,
            Self::Captured(_) => Verdict::Capture,
            Self::Refused(_) => Verdict::Refuse,
        }
    }
}

/// Where the connections of a listener or chain end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leads {
    /// To the black hole, all of them.
    Nowhere,
    /// Anywhere else: the proxy decides, and logs.
    ToProxy,
}

impl Leads {
    fn verdict(self) -> Verdict {
        match self {
            Self::Nowhere => Verdict::Refuse,
            Self::ToProxy => Verdict::Capture,
        }
    }
}

impl Destinations {
    /// Decides for a configuration. Of two listeners with one address the first has it, as at hand-off.
    /// `black_hole` is the cluster called `BlackHoleCluster`, if there is one: no other matters.
    pub fn of(listeners: &[Arc<Listener>], black_hole: Option<&Cluster>) -> Self {
        let mut this = Self::default();
        let black_hole = black_hole.is_some_and(is_black_hole);
        let outbound = || listeners.iter().filter(|l| l.traffic_direction != TrafficDirection::Inbound);
        for listener in outbound().filter(|listener| !listener.bind_to_port) {
            let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
            let verdict = leads(chains, black_hole).verdict();
            for address in &listener.addresses {
                this.add(*address, verdict, &listener.name);
            }
        }
        this.widen_ipv6_wildcards();
        if let Some(catch_all) =
            outbound().find(|listener| listener.use_original_dst && listener.bind_to_port)
        {
            this.add_catch_all(catch_all, black_hole);
        }
        this
    }

    /// Takes out what is never captured. A network cuts holes into rules for any address, and into the rest, which only
    /// the kernel can look at ([`super::programs::Options::excluded`]).
    #[must_use]
    pub fn excluding(mut self, Exclusions { cidrs, ports }: &Exclusions) -> Self {
        self.rules.retain(|address, _| {
            let is_inside = |network: &Cidr| !address.ip().is_unspecified() && network.contains(address.ip());
            !ports.contains(&address.port()) && !cidrs.iter().any(is_inside)
        });
        if self.everything_else != EverythingElse::Passes {
            let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
            let everywhere = ports.iter().flat_map(|port| any.map(|ip| SocketAddr::new(ip, *port)));
            let leave = Rule { verdict: Verdict::Leave, service: 0, listener: "".into() };
            self.rules.extend(everywhere.map(|address| (address, leave.clone())));
        }
        self
    }

    /// For the kernel's map.
    pub fn kernel_rules(&self) -> HashMap<Destination, RuleValue> {
        let value = |rule: &Rule| RuleValue { verdict: rule.verdict, service: rule.service };
        self.rules.iter().map(|(address, rule)| (Destination::from(*address), value(rule))).collect()
    }

    /// Puts the listeners of the kernel path there: `service` gives their index. What `[::]` takes of IPv4 stays with the
    /// proxy: an application's IPv4 socket can't be connected to the endpoints of an IPv6 service.
    #[must_use]
    pub fn balanced(mut self, service: impl Fn(&str) -> Option<u32>) -> Self {
        let widened: HashSet<_> = self
            .rules
            .iter()
            .filter(|(address, _)| address.ip() == Ipv6Addr::UNSPECIFIED)
            .map(|(address, rule)| (address.port(), Arc::clone(&rule.listener)))
            .collect();
        for (address, rule) in self.rules.iter_mut().filter(|(_, rule)| rule.verdict == Verdict::Capture) {
            let is_widened = address.ip() == Ipv4Addr::UNSPECIFIED
                && widened.contains(&(address.port(), Arc::clone(&rule.listener)));
            if let Some(service) = service(&rule.listener).filter(|_| !is_widened) {
                (rule.verdict, rule.service) = (Verdict::Balance, service);
            }
        }
        self
    }

    fn add(&mut self, address: SocketAddr, verdict: Verdict, listener: &Arc<str>) {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if address.port() != 0 {
            let rule = Rule { verdict, service: 0, listener: Arc::clone(listener) };
            self.rules.entry(address).or_insert(rule);
        }
    }

    /// `[::]:port` answers for IPv4 too, where nobody has `0.0.0.0:port`.
    fn widen_ipv6_wildcards(&mut self) {
        let wildcards = self.rules.iter().filter(|(address, _)| address.ip() == Ipv6Addr::UNSPECIFIED);
        for (address, rule) in wildcards.map(|(a, r)| (*a, r.clone())).collect::<Vec<_>>() {
            self.rules.entry(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())).or_insert(rule);
        }
    }

    /// The listener that a captured connection arrives on: its chains decide about what no other listener owns.
    fn add_catch_all(&mut self, listener: &Listener, black_hole: bool) {
        let name = &listener.name;
        // A chain that matches everything hides the default chain.
        let (all, some): (Vec<_>, Vec<_>) =
            listener.filter_chains.iter().partition(|chain| chain.matches == FilterChainMatch::default());
        let last = all.first().copied().or(listener.default_filter_chain.as_ref());
        let last = last.map(|chain| leads([chain], black_hole));
        let some: Vec<_> = some
            .into_iter()
            .map(|chain| (exact_destinations(&chain.matches), leads([chain], black_hole)))
            // Refused whether it matches or not.
            .filter(|(exact, leads)| {
                exact.is_some() || last != Some(Leads::Nowhere) || *leads != Leads::Nowhere
            })
            .collect();
        // The kernel can't tell which connections such a chain takes: the proxy has to look at each.
        let undecidable = some.iter().any(|(exact, _)| exact.is_none());
        self.everything_else = match last {
            _ if undecidable => EverythingElse::Captured(Arc::clone(name)),
            None => EverythingElse::Passes,
            Some(Leads::Nowhere) => EverythingElse::Refused(Arc::clone(name)),
            Some(Leads::ToProxy) => EverythingElse::Captured(Arc::clone(name)),
        };
        // A virtual listener that owns a port of every address comes before the chains.
        let owned: HashSet<_> =
            self.rules.keys().filter(|address| address.ip().is_unspecified()).map(wildcard_key).collect();
        for (exact, leads) in some.into_iter().filter(|_| !undecidable) {
            for address in
                exact.into_iter().flatten().filter(|address| !owned.contains(&wildcard_key(address)))
            {
                self.add(address, leads.verdict(), name);
            }
        }
    }
}

/// One line for each rule, then one for the rest; for the start-up log.
impl fmt::Display for Destinations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (address, Rule { verdict, listener, .. }) in &self.rules {
            match verdict {
                Verdict::Refuse => {
                    writeln!(f, "refuses {address} (listener {listener} leads to {BLACK_HOLE})")?;
                }
                Verdict::Leave => writeln!(f, "leaves {address} alone (exclude)")?,
                Verdict::Balance => writeln!(f, "balances {address} in the kernel -> listener {listener}")?,
                Verdict::Capture => writeln!(f, "captures {address} -> listener {listener}")?,
            }
        }
        match &self.everything_else {
            EverythingElse::Passes => f.write_str("everything else: passes untouched"),
            EverythingElse::Captured(listener) => {
                write!(f, "everything else: captured -> listener {listener}")
            }
            EverythingElse::Refused(listener) => {
                write!(f, "everything else: refused (listener {listener} leads to {BLACK_HOLE})")
            }
        }
    }
}

/// Family and port.
fn wildcard_key(address: &SocketAddr) -> (bool, u16) {
    (address.is_ipv4(), address.port())
}

/// A cluster that can only refuse. One without that shape is the proxy's business, whatever its name.
pub fn is_black_hole(cluster: &Cluster) -> bool {
    let empty = cluster.load_assignment.localities.iter().all(|locality| locality.endpoints.is_empty());
    &*cluster.name == BLACK_HOLE && cluster.discovery == Discovery::Static && empty
}

/// Where these chains lead together.
fn leads<'a>(chains: impl IntoIterator<Item = &'a Arc<FilterChain>>, black_hole: bool) -> Leads {
    let mut chains = chains.into_iter().peekable();
    let refuses = |proxy: &TcpProxy| match &proxy.clusters {
        ClusterChoice::Single(name) => &**name == BLACK_HOLE,
        ClusterChoice::Weighted(all) => all.iter().all(|weighted| &*weighted.name == BLACK_HOLE),
    };
    let all_refuse = chains.peek().is_some()
        && chains.all(|chain| match &chain.terminal {
            Some(Terminal::TcpProxy(proxy)) => refuses(proxy),
            Some(Terminal::HttpAsTcp(routing)) => {
                let mut hosts = routing.virtual_hosts.iter().peekable();
                hosts.peek().is_some() && hosts.all(|host| host.proxy.as_deref().is_some_and(refuses))
            }
            // An empty chain closes the connection after it was accepted; routes from RDS can change.
            None | Some(Terminal::HttpFromRds(_)) => false,
        });
    if black_hole && all_refuse { Leads::Nowhere } else { Leads::ToProxy }
}

/// The destinations that a chain takes, if its match is about nothing else and they can be listed: a port, or single
/// addresses with a port.
fn exact_destinations(matches: &FilterChainMatch) -> Option<Vec<SocketAddr>> {
    let FilterChainMatch { destination_port, prefix_ranges, .. } = matches;
    let only = FilterChainMatch {
        destination_port: *destination_port,
        prefix_ranges: prefix_ranges.clone(),
        ..FilterChainMatch::default()
    };
    let port = (*destination_port).filter(|_| *matches == only)?;
    if prefix_ranges.is_empty() {
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        return Some(any.map(|ip| SocketAddr::new(ip, port)).into());
    }
    prefix_ranges
        .iter()
        .map(|range| {
            let bits = if range.address.is_ipv4() { 32 } else { 128 };
            (range.prefix_len == bits).then(|| SocketAddr::new(range.address, port))
        })
        .collect()
}

#[cfg(test)]
mod tests;
