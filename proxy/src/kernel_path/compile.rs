//! From the endpoints of a cluster to the words that the eBPF programs choose from (`tidegate_common::balance`), and from the
//! filter chains of a listener (`tidegate_common::selector`).
//!
//! What a worker's `Balancer` draws from at each pick is laid out beforehand: a route for each priority that gets load,
//! with the list that it goes to (healthy, degraded, or all hosts in panic mode), by locality where localities are
//! weighted. The property test has both choose for the same state.

use std::sync::Arc;

use tidegate_common::Addr;
use tidegate_common::balance::{
    self, ENDPOINT_WORDS, Entry, Head, List, ListKind, MAX_ROUTES, Places, Policy, Route, ServiceHead,
};
use tidegate_common::selector::Range;

use super::{ClusterObstacle, Sources};
use crate::addr::EndpointAddr;
use crate::cluster::endpoint::{Endpoint, Host, HostSet, LocalityHosts, Source};
use crate::cluster::hashing::{Indexes, Layout, Table};
use crate::config::cluster::LbPolicy;

/// Weights whose sum does not fit 32 bits are brought down to about this one.
const SCALED_TOTAL: u64 = 1 << 31;

/// The block of a cluster with these endpoints. `index` gives the index of a host in the map of hosts.
///
/// # Errors
/// What `predicate::plan` finds too: the endpoints may have changed since.
pub fn compile(
    policy: LbPolicy,
    set: &HostSet,
    index: impl FnMut(&Arc<Host>) -> u32,
) -> Result<Vec<u64>, ClusterObstacle> {
    let (policy, choices) = match policy {
        LbPolicy::RoundRobin | LbPolicy::ClusterProvided => (Policy::RoundRobin, 0),
        LbPolicy::Random => (Policy::Random, 0),
        LbPolicy::LeastRequest { choice_count, .. } => match u8::try_from(choice_count) {
            Ok(choices) if choice_count <= balance::MAX_CHOICES => (Policy::LeastRequest, choices),
            _ => return Err(ClusterObstacle::ChoiceCount(choice_count)),
        },
        LbPolicy::RingHash(_) | LbPolicy::Maglev(_) => (Policy::Hash, 0),
    };
    let routes = routes(set);
    if routes.len() > MAX_ROUTES as usize {
        return Err(ClusterObstacle::Priorities(set.priorities().len()));
    }
    let mut block = Block { words: vec![0; 1 + routes.len()], policy, index };
    let mut lists: Vec<(usize, Source, u32)> = Vec::new();
    let mut below = 0;
    for (at, Load { percent, priority, source }) in routes.iter().copied().enumerate() {
        // A policy that hashes has one table for all that a priority gets.
        let source = if policy == Policy::Hash { Source::All } else { source };
        // In panic mode healthy and degraded hosts of a priority are the same list.
        let known = lists.iter().find(|(p, s, _)| (*p, *s) == (priority, source)).map(|(_, _, list)| *list);
        let list = match known {
            Some(list) => list,
            None => match set.table(priority) {
                Some(table) => block.table(table)?,
                None => block.source(set, priority, source)?,
            },
        };
        lists.push((priority, source, list));
        below += percent;
        block.words[1 + at] = Route { below, panic: set.loads().panic[priority], list }.encode();
    }
    let mut words = block.words;
    let head = Head { policy: policy as u8, choices, routes: routes.len() as u8, words: words.len() as u32 };
    words[0] = head.encode();
    Ok(words)
}

/// A list of hosts that gets load.
#[derive(Clone, Copy)]
struct Load {
    percent: u8,
    priority: usize,
    source: Source,
}

/// In the order in which `Loads::choose` goes through them.
fn routes(set: &HostSet) -> Vec<Load> {
    let loads = set.loads();
    let of = |(list, usable): (&[u8], Source)| {
        let to = move |(priority, percent): (usize, &u8)| {
            let source = if loads.panic[priority] { Source::All } else { usable };
            Load { percent: *percent, priority, source }
        };
        list.iter().enumerate().map(to).filter(|load| load.percent > 0).collect::<Vec<_>>()
    };
    [(&*loads.healthy, Source::Healthy), (&*loads.degraded, Source::Degraded)]
        .into_iter()
        .flat_map(of)
        .collect()
}

/// The words so far.
struct Block<F> {
    words: Vec<u64>,
    policy: Policy,
    index: F,
}

impl<F: FnMut(&Arc<Host>) -> u32> Block<F> {
    /// Appends one list of a priority. Returns its offset.
    fn source(&mut self, set: &HostSet, priority: usize, source: Source) -> Result<u32, ClusterObstacle> {
        let localities = set.localities(priority, source);
        if localities.is_empty() {
            return self.hosts(set.source(priority, source));
        }
        let lists =
            localities.iter().map(|locality| self.hosts(&locality.hosts)).collect::<Result<Vec<_>, _>>()?;
        let weight = |locality: &LocalityHosts| locality.weight;
        let (total, bounds) = bounds(localities.iter().map(weight));
        let entries = bounds.into_iter().zip(lists).map(|(bound, offset)| Entry { bound, offset });
        Ok(self.list(ListKind::Localities, total, entries.collect()))
    }

    /// Appends a list of hosts, and the hosts themselves.
    fn hosts(&mut self, hosts: &[Arc<Endpoint>]) -> Result<u32, ClusterObstacle> {
        if hosts.len() > balance::MAX_ENTRIES as usize {
            return Err(ClusterObstacle::TooManyEndpoints(hosts.len()));
        }
        let weighs = hosts.windows(2).any(|pair| pair[0].weight != pair[1].weight);
        let (kind, (total, bounds)) = match self.policy {
            Policy::RoundRobin if weighs => {
                (ListKind::Weighted, bounds(hosts.iter().map(|endpoint| endpoint.weight)))
            }
            Policy::LeastRequest if weighs => return Err(ClusterObstacle::LeastRequestWeights),
            Policy::RoundRobin | Policy::LeastRequest | Policy::Random | Policy::Hash => {
                (ListKind::Even, (0, vec![0; hosts.len()]))
            }
        };
        let first = self.endpoints(hosts.iter())?;
        let offsets = (0..).map(|at: u32| first + at * ENDPOINT_WORDS);
        let entries = bounds.into_iter().zip(offsets).map(|(bound, offset)| Entry { bound, offset });
        Ok(self.list(kind, total, entries.collect()))
    }

    /// Appends endpoints. Returns the offset of the first.
    fn endpoints<'a>(
        &mut self,
        hosts: impl Iterator<Item = &'a Arc<Endpoint>>,
    ) -> Result<u32, ClusterObstacle> {
        let first = self.offset();
        for endpoint in hosts {
            let EndpointAddr::Ip(address) = endpoint.address() else { return Err(ClusterObstacle::Pipe) };
            let addr = Addr::from(address.ip());
            let host = (self.index)(&endpoint.host);
            self.words.extend(balance::Endpoint { addr, port: address.port(), host }.encode());
        }
        Ok(first)
    }

    /// Appends a table or a ring, and its hosts.
    fn table(&mut self, table: &Table) -> Result<u32, ClusterObstacle> {
        let len = table.hosts().len();
        if len > balance::MAX_ENTRIES as usize {
            return Err(ClusterObstacle::TooManyEndpoints(len));
        }
        let (kind, points, indexes) = match table.layout() {
            Layout::Ring(points, _) if points.len() > balance::MAX_POINTS as usize => {
                return Err(ClusterObstacle::RingSize(points.len()));
            }
            Layout::Ring(points, indexes) => (ListKind::Ring, points, indexes),
            Layout::Table(indexes) => (ListKind::Table, &[][..], indexes),
        };
        let endpoints = self.endpoints(table.hosts())?;
        let offset = self.offset();
        let total = indexes.len() as u32;
        self.words.push(List { kind: kind as u8, len: len as u32, total }.encode());
        let places = Places { endpoints, wide: !matches!(indexes, Indexes::Bytes(_)) };
        self.words.push(places.encode());
        self.words.extend(points);
        let indexes: Vec<u64> =
            (0..indexes.len()).filter_map(|at| indexes.at(at)).map(|it| it as u64).collect();
        let bits = 64 / places.per_word();
        let pack = |word, (at, index): (usize, &u64)| word | index << (at * bits);
        let words = indexes.chunks(places.per_word()).map(|chunk| chunk.iter().enumerate().fold(0, pack));
        self.words.extend(words);
        Ok(offset)
    }

    fn list(&mut self, kind: ListKind, total: u32, entries: Vec<Entry>) -> u32 {
        let offset = self.offset();
        self.words.push(List { kind: kind as u8, len: entries.len() as u32, total }.encode());
        self.words.extend(entries.into_iter().map(Entry::encode));
        offset
    }

    fn offset(&self) -> u32 {
        self.words.len() as u32
    }
}

/// The block of a selector. `chains` are the indexes of the services of a plan's chains.
pub fn compile_selector(sources: &[Sources], chains: &[u32]) -> Vec<u64> {
    let head = ServiceHead { clusters: 0, total: sources.len() as u32 };
    let range = |sources: &Sources| {
        // Without a chain the proxy closes the connection, and says why.
        let service = sources.chain.and_then(|chain| chains.get(chain)).copied().unwrap_or_default();
        Range { first: sources.first.into(), service }.encode()
    };
    std::iter::once(head.encode()).chain(sources.iter().flat_map(range)).collect()
}

/// The sum of these weights (at least 1 each), and how far each of them reaches.
fn bounds(weights: impl Iterator<Item = u32> + Clone) -> (u32, Vec<u32>) {
    let total: u64 = weights.clone().map(u64::from).sum();
    let scaled = |weight: u32| match u32::try_from(total) {
        Ok(_) => weight,
        // Nobody's share gets lost.
        Err(_) => ((u128::from(weight) * u128::from(SCALED_TOTAL) / u128::from(total)) as u32).max(1),
    };
    let mut bound = 0;
    let bounds: Vec<u32> = weights
        .map(|weight| {
            bound += scaled(weight);
            bound
        })
        .collect();
    (bound, bounds)
}

#[cfg(test)]
mod tests;
