//! Consistent hashing (RING_HASH, MAGLEV): the same source comes to the same endpoint as long as it is there, from every
//! worker, every node and every Envoy with the same endpoints.
//!
//! The main thread builds a [`Table`] for each priority with the host set. A pick looks up one place in it
//! (`maglev`) or searches sorted points (`ring`); it takes no lock and allocates nothing. Whoever changes what is hashed
//! here moves connections of running systems to other endpoints: `cargo xtask parity` compares with Envoy.
//!
//! As in Envoy a table has the healthy hosts of its priority, or all of them in panic mode, and never the degraded ones: load
//! that would go to those goes to healthy ones of the same priority. Weights of localities count as they are configured, however many
//! of the locality's hosts are healthy.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use xxhash_rust::xxh64::xxh64;

use super::endpoint::{Endpoint, HostSet, Source};
use crate::addr::EndpointAddr;
use crate::config::cluster::{ClusterHashPolicy, ConsistentHashing, LbPolicy};
use crate::config::endpoint::Locality;
use crate::config::tcp_proxy::HashPolicy;
use crate::stats::{MaglevStats, RingHashStats, Stats};

mod bounded;
mod indexes;
mod maglev;
mod murmur;
mod ring;

pub use bounded::Probe;
pub use indexes::Indexes;
use maglev::Maglev;
use ring::Ring;

/// What is hashed of a connection to a cluster. `None`: nothing, it goes to a random endpoint.
///
/// `source` is the downstream address (after PROXY protocol, when that is in use); its port does not count.
pub fn of_connection(policy: &LbPolicy, tcp_proxy: Option<&HashPolicy>, source: SocketAddr) -> Option<u64> {
    match (policy.hashing()?.hash_policy, tcp_proxy) {
        (ClusterHashPolicy::SourceIp(times), _) => {
            let hash = of_source(source);
            // Envoy's way to mix the hashes of several entries.
            Some((1..times).fold(hash, |mixed, _| mixed.rotate_left(1) ^ hash))
        }
        (ClusterHashPolicy::Unset, Some(HashPolicy::SourceIp)) => Some(of_source(source)),
        // Nothing sets filter state here.
        (ClusterHashPolicy::Unset, Some(HashPolicy::FilterState(_)) | None)
        | (ClusterHashPolicy::Nothing, _) => None,
    }
}

/// Whether the source of connections to a cluster is hashed.
pub fn is_by_source(policy: &LbPolicy, tcp_proxy: Option<&HashPolicy>) -> bool {
    // Of any source.
    of_connection(policy, tcp_proxy, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)).is_some()
}

/// The hash of an address, without its port: of its text.
pub fn of_source(source: SocketAddr) -> u64 {
    let mut text = ShortText::new();
    // An address has at most 45 characters, a scope 11.
    let _ = match source {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => write!(text, "{}%{}", IpText(source.ip()), v6.scope_id()),
        _ => write!(text, "{}", IpText(source.ip())),
    };
    xxh64(text.as_bytes(), 0)
}

/// What the connections to one priority of a cluster are spread over.
#[derive(Debug)]
pub struct Table {
    hosts: Vec<Weighted>,
    places: Places,
    /// In percent.
    balance_factor: Option<u32>,
}

/// A host and its share of the connections, from 0 to 1.
#[derive(Clone, Debug)]
struct Weighted {
    endpoint: Arc<Endpoint>,
    share: f64,
}

/// Which host has which place; shared by the tables of successive host sets with the same hosts.
#[derive(Clone, Debug)]
enum Places {
    Ring(Arc<Ring>),
    Maglev(Arc<Maglev>),
}

/// The places of a table, for another executor of the same choice.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// RING_HASH: points in ascending order, and whose each is.
    Ring(&'a [u64], &'a Indexes),
    /// MAGLEV: whose each place is.
    Table(&'a Indexes),
}

/// What the gauges of a cluster tell of its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// `ring_hash_lb.size`; the table size of Maglev.
    pub size: u64,
    /// `ring_hash_lb.min_hashes_per_host`, `maglev_lb.min_entries_per_host`.
    pub min_per_host: u64,
    /// `ring_hash_lb.max_hashes_per_host`, `maglev_lb.max_entries_per_host`.
    pub max_per_host: u64,
}

/// `cluster.<name>.ring_hash_lb.*` or `maglev_lb.*`.
#[derive(Debug)]
pub(super) enum Gauges {
    RingHash(RingHashStats),
    Maglev(MaglevStats),
}

impl Gauges {
    /// `None`: the policy has none.
    pub(super) fn new(policy: &LbPolicy, stats: &Stats, name: &str) -> Option<Self> {
        match policy {
            LbPolicy::RingHash(_) => Some(Self::RingHash(stats.ring_hash(name))),
            LbPolicy::Maglev(_) => Some(Self::Maglev(stats.maglev(name))),
            _ => None,
        }
    }

    pub(super) fn show(&self, counts: Counts) {
        let Counts { size, min_per_host, max_per_host } = counts;
        match self {
            Self::RingHash(stats) => {
                stats.size().set(size);
                stats.min_hashes_per_host().set(min_per_host);
                stats.max_hashes_per_host().set(max_per_host);
            }
            Self::Maglev(stats) => {
                stats.min_entries_per_host().set(min_per_host);
                stats.max_entries_per_host().set(max_per_host);
            }
        }
    }
}

impl Table {
    /// The table of a priority. `None`: the policy does not hash. `previous` is the table that this one replaces, whose
    /// places are taken over if nothing changed for them.
    pub(super) fn new(
        policy: &LbPolicy,
        set: &HostSet,
        priority: usize,
        locality_weighted: bool,
        previous: Option<&Self>,
    ) -> Option<Self> {
        let hashing = policy.hashing()?;
        let source = if set.loads().panic[priority] { Source::All } else { Source::Healthy };
        let hosts = if locality_weighted {
            weigh_with_localities(set, priority, source)
        } else {
            weigh(set.source(priority, source), 1.0)
        };
        let balance_factor = hashing.hash_balance_factor;
        if let Some(previous) = previous.filter(|previous| previous.has_same_hosts(&hosts)) {
            return Some(Self { hosts, places: previous.places.clone(), balance_factor });
        }
        let places = match policy {
            LbPolicy::RingHash(config) => Places::Ring(Arc::new(Ring::new(config, &hosts))),
            LbPolicy::Maglev(config) => Places::Maglev(Arc::new(Maglev::new(config, &hosts))),
            _ => return None,
        };
        Some(Self { hosts, places, balance_factor })
    }

    fn has_same_hosts(&self, hosts: &[Weighted]) -> bool {
        let same = |(a, b): (&Weighted, &Weighted)| {
            a.share.to_bits() == b.share.to_bits()
                && a.endpoint.address() == b.endpoint.address()
                && a.endpoint.hostname == b.endpoint.hostname
                && a.endpoint.hash_key == b.endpoint.hash_key
        };
        self.hosts.len() == hosts.len() && self.hosts.iter().zip(hosts).all(same)
    }

    /// The endpoint at the place that a hash falls on. `None`: there is no host.
    pub fn pick(&self, hash: u64) -> Option<&Arc<Endpoint>> {
        self.hosts.get(self.place(hash)).map(|host| &host.endpoint)
    }

    /// Like [`Table::pick`]; but with a `hash_balance_factor`, an endpoint that has more than its share of the `active` connections
    /// (with the new one) is passed over, for others in an order that follows from the hash.
    pub fn pick_bounded(&self, hash: u64, active: u32, probe: &mut Probe) -> Option<&Arc<Endpoint>> {
        let Some(factor) = self.balance_factor else { return self.pick(hash) };
        let first = self.place(hash);
        if first >= self.hosts.len() {
            return None;
        }
        let load = |host: usize| self.overload(host, factor, active);
        Some(&self.hosts[probe.find(hash, first, self.hosts.len(), load)].endpoint)
    }

    /// The connections of a host in parts of what it may have: up to 1 is in order.
    fn overload(&self, host: usize, factor: u32, active: u32) -> f64 {
        let Weighted { endpoint, share } = &self.hosts[host];
        let slots = (u64::from(active.max(1)) * u64::from(factor)).div_ceil(100);
        let slots = (slots as f64 * share).ceil().max(1.0);
        endpoint.host.load() as f64 / slots
    }

    /// The index of a host, or of none if there is none.
    fn place(&self, hash: u64) -> usize {
        match &self.places {
            Places::Ring(ring) => ring.at(hash),
            Places::Maglev(maglev) => maglev.at(hash),
        }
    }

    /// The hosts, in the order of their indexes.
    pub fn hosts(&self) -> impl ExactSizeIterator<Item = &Arc<Endpoint>> {
        self.hosts.iter().map(|host| &host.endpoint)
    }

    /// Which of the hosts has which place.
    pub fn layout(&self) -> Layout<'_> {
        match &self.places {
            Places::Ring(ring) => Layout::Ring(ring.points(), ring.hosts()),
            Places::Maglev(maglev) => Layout::Table(maglev.hosts()),
        }
    }

    /// `None`: there is no host.
    pub fn counts(&self) -> Option<Counts> {
        match &self.places {
            Places::Ring(ring) => ring.counts(),
            Places::Maglev(maglev) => maglev.counts(),
        }
    }
}

/// Each host's share of `total` by its weight.
fn weigh(hosts: &[Arc<Endpoint>], total: f64) -> Vec<Weighted> {
    let sum: u64 = hosts.iter().map(|endpoint| u64::from(endpoint.weight)).sum();
    // In this order of operations, because the places follow from the last bit, too.
    let share = |endpoint: &Arc<Endpoint>| f64::from(endpoint.weight) * total / sum as f64;
    hosts.iter().map(|endpoint| Weighted { endpoint: Arc::clone(endpoint), share: share(endpoint) }).collect()
}

/// Each host's share of its locality's share. There is none where all localities have weight 0.
fn weigh_with_localities(set: &HostSet, priority: usize, source: Source) -> Vec<Weighted> {
    let mut localities: BTreeMap<&Locality, (u32, Vec<Arc<Endpoint>>)> = BTreeMap::new();
    for endpoint in set.source(priority, Source::All) {
        localities.entry(&endpoint.locality).or_default().0 = endpoint.locality_weight;
    }
    for endpoint in set.source(priority, source) {
        if let Some((_, hosts)) = localities.get_mut(&*endpoint.locality) {
            hosts.push(Arc::clone(endpoint));
        }
    }
    let sum: u64 = localities.values().map(|(weight, _)| u64::from(*weight)).sum();
    localities
        .values()
        .filter(|(weight, _)| *weight > 0)
        .flat_map(|(weight, hosts)| weigh(hosts, f64::from(*weight) / sum as f64))
        .collect()
}

/// What a host is known by.
fn key(endpoint: &Endpoint, hashing: &ConsistentHashing) -> Box<str> {
    match (&endpoint.hash_key, endpoint.address()) {
        (Some(key), _) => (**key).into(),
        (None, _) if hashing.use_hostname_for_hashing => (*endpoint.hostname).into(),
        (None, EndpointAddr::Ip(SocketAddr::V4(address))) => address.to_string().into(),
        (None, EndpointAddr::Ip(SocketAddr::V6(address))) => {
            format!("[{}]:{}", IpText((*address.ip()).into()), address.port()).into()
        }
        (None, EndpointAddr::Pipe(pipe)) => pipe.to_string().into(),
    }
}

/// An address as inet_ntop(3) writes it, which knows one more way to write IPv6 than Rust: `::1.2.3.4` for the addresses below
/// 2^32 (but for `::` and those of 16 bits).
struct IpText(IpAddr);

impl fmt::Display for IpText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(v6) if is_compatible(v6) => write!(f, "::{}", Ipv4Addr::from(u128::from(v6) as u32)),
            ip => ip.fmt(f),
        }
    }
}

fn is_compatible(address: Ipv6Addr) -> bool {
    let bits = u128::from(address);
    bits >> 32 == 0 && bits >> 16 != 0
}

/// Text on the stack. What does not fit is an error.
struct ShortText {
    bytes: [u8; Self::SIZE],
    length: usize,
}

impl ShortText {
    /// More than an IPv6 address (45) and a scope (11) have.
    const SIZE: usize = 64;

    fn new() -> Self {
        Self { bytes: [0; Self::SIZE], length: 0 }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Write for ShortText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
