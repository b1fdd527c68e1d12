//! Which filter chain serves a connection.
//!
//! The criteria apply in a fixed order: destination port, destination prefix, server name, transport
//! protocol, application protocol, directly connected source prefix, source type, source prefix, source
//! port. At each step only the most specific matches stay, and a step is never taken back: a chain that would
//! have matched on a less specific destination prefix is not reconsidered when a later step fails.
//!
//! The chains are compiled into a tree with one level per criterion that is in use. A level is a hash map, a
//! sorted array, or (prefixes) sorted disjoint address intervals, so a lookup allocates nothing and costs
//! a hash or a binary search per level, however many chains there are.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use crate::config::filter_chain::FilterChain;
use crate::config::listener::Cidr;

mod prefixes;
mod rules;
mod sources;

use prefixes::Prefixes;
use rules::{Key, Name, Row, rows_of};
pub use sources::SourceRange;

/// What is known of a connection when its filter chain is chosen.
#[derive(Clone, Copy, Debug)]
pub struct MatchInput<'a> {
    /// The restored original destination, else the accepting socket's own address.
    pub destination: SocketAddr,
    /// The downstream address (after PROXY protocol).
    pub source: SocketAddr,
    /// The directly connected peer.
    pub direct_source: IpAddr,
    /// What an inspector detected (`tls`); empty stands for `raw_buffer`.
    pub transport_protocol: &'a str,
    /// SNI in lower case; empty when there is none.
    pub server_name: &'a str,
    /// ALPN or sniffed protocols in the client's order.
    pub application_protocols: &'a [Box<str>],
}

/// Two chains (or one chain twice) match exactly the same connections.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatchError {
    /// Two chains.
    #[error(
        "filter chain '{second}' has the same matching rules defined as '{first}': both match {rules}; remove one of them \
         or make its filter_chain_match differ"
    )]
    Chains {
        /// Name of the chain that comes first in the configuration.
        first: Arc<str>,
        /// Name of the later one.
        second: Arc<str>,
        /// The shared criteria.
        rules: String,
    },
    /// One chain lists a criterion twice.
    #[error(
        "filter chain '{chain}' defines the same matching rules twice: {rules}; remove the repeated entry"
    )]
    Repeated {
        /// Name of the chain.
        chain: Arc<str>,
        /// The repeated criteria.
        rules: String,
    },
}

/// The compiled chains of one listener.
#[derive(Debug)]
pub struct Matcher {
    root: Option<Node>,
    default: Option<usize>,
}

impl Matcher {
    /// Compiles the chains of a listener.
    ///
    /// # Errors
    /// When two chains match the same connections, which would make the choice arbitrary.
    pub fn build(
        chains: &[Arc<FilterChain>],
        default: Option<&Arc<FilterChain>>,
    ) -> Result<Self, MatchError> {
        let mut rows: Vec<Row<'_>> = chains
            .iter()
            .enumerate()
            .flat_map(|(index, chain)| rows_of(&chain.matches, index as u32))
            .collect();
        rows.sort_unstable();
        if let Some((a, b)) = rows.iter().zip(&rows[1.min(rows.len())..]).find(|(a, b)| a.key == b.key) {
            return Err(same_match(chains, a, b));
        }
        let root = (!rows.is_empty()).then(|| compile(&rows, Step::DestinationPort));
        Ok(Self { root, default: default.map(|_| chains.len()) })
    }

    /// The chain that serves this connection, as its index in the list that the matcher was built from; one past
    /// its end for the default chain. `None`: nothing matches, close the connection (flag NR).
    pub fn find(&self, input: &MatchInput<'_>) -> Option<usize> {
        self.root.as_ref().and_then(|root| root.find(input)).map(|index| index as usize).or(self.default)
    }
}

/// The criteria in the order in which they apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    DestinationPort,
    Destination,
    ServerName,
    TransportProtocol,
    ApplicationProtocol,
    DirectSource,
    SourceType,
    Source,
    SourcePort,
}

impl Step {
    /// The field of `filter_chain_match`.
    fn field(self) -> &'static str {
        match self {
            Self::DestinationPort => "destination_port",
            Self::Destination => "prefix_ranges",
            Self::ServerName => "server_names",
            Self::TransportProtocol => "transport_protocol",
            Self::ApplicationProtocol => "application_protocols",
            Self::DirectSource => "direct_source_prefix_ranges",
            Self::SourceType => "source_type",
            Self::Source => "source_prefix_ranges",
            Self::SourcePort => "source_ports",
        }
    }
}

fn same_match(chains: &[Arc<FilterChain>], a: &Row<'_>, b: &Row<'_>) -> MatchError {
    let rules = a.key.to_string();
    // Equal keys sort by the chain's position.
    if a.chain == b.chain {
        return MatchError::Repeated { chain: chains[a.chain as usize].name.clone(), rules };
    }
    let name = |row: &Row<'_>| chains[row.chain as usize].name.clone();
    MatchError::Chains { first: name(a), second: name(b), rules }
}

/// One step of the compiled tree. Levels that no chain uses are left out.
#[derive(Debug)]
enum Node {
    Chain(u32),
    Level { step: Step, table: Table, children: Vec<Node>, any: Option<Box<Node>> },
}

/// From what a step looks at to the index of a child.
#[derive(Debug)]
enum Table {
    /// Sorted by port.
    Ports(Vec<(u16, u32)>),
    Prefixes(Prefixes),
    Names {
        exact: HashMap<Box<str>, u32>,
        suffix: HashMap<Box<str>, u32>,
    },
    Words(HashMap<Box<str>, u32>),
    SourceType {
        local: Option<u32>,
        external: Option<u32>,
    },
}

impl Node {
    fn find(&self, input: &MatchInput<'_>) -> Option<u32> {
        let mut node = self;
        loop {
            match node {
                Self::Chain(index) => return Some(*index),
                Self::Level { step, table, children, any } => {
                    node = match table.find(*step, input) {
                        Some(child) => &children[child as usize],
                        None => any.as_deref()?,
                    };
                }
            }
        }
    }
}

impl Table {
    /// The most specific child that matches, or `None` for the child that asks for nothing here.
    fn find(&self, step: Step, input: &MatchInput<'_>) -> Option<u32> {
        match self {
            Self::Ports(ports) => {
                let port =
                    if step == Step::SourcePort { input.source.port() } else { input.destination.port() };
                ports.binary_search_by_key(&port, |(port, _)| *port).ok().map(|at| ports[at].1)
            }
            Self::Prefixes(prefixes) => prefixes.find(match step {
                Step::Destination => input.destination.ip(),
                Step::DirectSource => input.direct_source,
                _ => input.source.ip(),
            }),
            Self::Names { exact, suffix } => find_name(exact, suffix, input.server_name),
            Self::Words(words) if step == Step::ApplicationProtocol => {
                input.application_protocols.iter().find_map(|alpn| words.get(&**alpn)).copied()
            }
            Self::Words(words) => {
                let transport = input.transport_protocol;
                words.get(if transport.is_empty() { "raw_buffer" } else { transport }).copied()
            }
            Self::SourceType { local, external } => {
                if is_local(input) {
                    *local
                } else {
                    *external
                }
            }
        }
    }
}

/// Exact, then the longest suffix. A suffix stands for at least one character before its dot.
fn find_name(exact: &HashMap<Box<str>, u32>, suffix: &HashMap<Box<str>, u32>, name: &str) -> Option<u32> {
    if name.is_empty() {
        return None;
    }
    exact.get(name).copied().or_else(|| {
        name.match_indices('.').filter(|(at, _)| *at > 0).find_map(|(at, _)| suffix.get(&name[at..])).copied()
    })
}

/// Envoy's rule: the canonical loopback address (other addresses of 127.0.0.0/8 are external), or the same
/// address at both ends.
fn is_local(input: &MatchInput<'_>) -> bool {
    let source = input.source.ip().to_canonical();
    source == IpAddr::V4(Ipv4Addr::LOCALHOST)
        || source == IpAddr::V6(Ipv6Addr::LOCALHOST)
        || source == input.destination.ip().to_canonical()
}

/// Compiles sorted rows that agree on every earlier step.
fn compile(rows: &[Row<'_>], step: Step) -> Node {
    match step {
        Step::DestinationPort => {
            level(rows, step, Some(Step::Destination), |key| key.destination_port, ports)
        }
        Step::Destination => level(rows, step, Some(Step::ServerName), |key| key.destination, prefixes),
        Step::ServerName => level(rows, step, Some(Step::TransportProtocol), |key| key.server_name, names),
        Step::TransportProtocol => {
            level(rows, step, Some(Step::ApplicationProtocol), |key| key.transport_protocol, words)
        }
        Step::ApplicationProtocol => {
            level(rows, step, Some(Step::DirectSource), |key| key.application_protocol, words)
        }
        Step::DirectSource => level(rows, step, Some(Step::SourceType), |key| key.direct_source, prefixes),
        Step::SourceType => level(rows, step, Some(Step::Source), |key| key.local_source, source_types),
        Step::Source => level(rows, step, Some(Step::SourcePort), |key| key.source, prefixes),
        Step::SourcePort => level(rows, step, None, |key| key.source_port, ports),
    }
}

/// Splits the rows by one criterion. The rows are sorted, so equal values are neighbours and "any" is first.
fn level<'a, K: PartialEq + Copy>(
    rows: &[Row<'a>],
    step: Step,
    next: Option<Step>,
    key: impl Fn(&Key<'a>) -> Option<K>,
    table: impl FnOnce(Vec<(K, u32)>) -> Table,
) -> Node {
    let below = |rows: &[Row<'a>]| match next {
        Some(next) => compile(rows, next),
        None => Node::Chain(rows[0].chain),
    };
    let mut any = None;
    let mut keys = Vec::new();
    let mut children = Vec::new();
    for group in rows.chunk_by(|a, b| key(&a.key) == key(&b.key)) {
        match key(&group[0].key) {
            None => any = Some(below(group)),
            Some(key) => {
                keys.push((key, children.len() as u32));
                children.push(below(group));
            }
        }
    }
    match any {
        Some(any) if keys.is_empty() => any,
        any => Node::Level { step, table: table(keys), children, any: any.map(Box::new) },
    }
}

fn ports(keys: Vec<(u16, u32)>) -> Table {
    Table::Ports(keys)
}

fn prefixes(keys: Vec<(Cidr, u32)>) -> Table {
    Table::Prefixes(Prefixes::new(keys.into_iter()))
}

fn names(keys: Vec<(Name<'_>, u32)>) -> Table {
    let mut exact = HashMap::new();
    let mut suffix = HashMap::new();
    for (name, child) in keys {
        match name {
            Name::Exact(name) => exact.insert(name.into(), child),
            Name::Suffix(name) => suffix.insert(name.into(), child),
        };
    }
    Table::Names { exact, suffix }
}

fn words(keys: Vec<(&str, u32)>) -> Table {
    Table::Words(keys.into_iter().map(|(word, child)| (word.into(), child)).collect())
}

fn source_types(keys: Vec<(bool, u32)>) -> Table {
    let (mut local, mut external) = (None, None);
    for (is_local, child) in keys {
        *(if is_local { &mut local } else { &mut external }) = Some(child);
    }
    Table::SourceType { local, external }
}

#[cfg(test)]
mod tests;
