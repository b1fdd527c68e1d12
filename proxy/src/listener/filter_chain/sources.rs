//! Which filter chain serves a connection, by its source alone: for those who know nothing else of it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{MatchInput, Matcher, Node, Step, Table};

/// Source addresses of one family whose connections choose the same chain. It ends where the next range starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRange<C> {
    /// The first of them.
    pub first: IpAddr,
    /// What [`Matcher::find`] finds; none: nothing matches.
    pub chain: Option<C>,
}

impl Matcher {
    /// What [`Matcher::find`] finds for connections to a destination (an unspecified address: to any address with this
    /// port), by their source address, which is the directly connected peer's too. In ascending order; two ranges in a row
    /// differ; the first one starts with the first address of the destination's family.
    ///
    /// # Errors
    /// The field of `filter_chain_match` that more would have to be known for.
    pub fn find_by_source(&self, destination: SocketAddr) -> Result<Vec<SourceRange<usize>>, &'static str> {
        let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
        let known = Known { destination };
        let mut starts = BTreeSet::from([match destination.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }]);
        if let Some(root) = &self.root {
            known.add_starts(root, &mut starts);
        }
        let mut ranges: Vec<SourceRange<usize>> = Vec::new();
        for first in starts {
            let found = self.root.as_ref().map(|root| known.find(root, first)).transpose()?.flatten();
            let chain = found.map(|index| index as usize).or(self.default);
            if ranges.last().is_none_or(|last| last.chain != chain) {
                ranges.push(SourceRange { first, chain });
            }
        }
        Ok(ranges)
    }
}

/// All that is known of connections besides their source.
struct Known {
    destination: SocketAddr,
}

impl Known {
    fn input(&self, source: IpAddr) -> MatchInput<'static> {
        MatchInput {
            destination: self.destination,
            source: SocketAddr::new(source, 0),
            direct_source: source,
            // Nothing looks at these.
            transport_protocol: "",
            server_name: "",
            application_protocols: &[],
        }
    }

    fn is_enough_for(&self, step: Step) -> bool {
        match step {
            Step::DestinationPort | Step::DirectSource | Step::Source => true,
            // A source is local if it is the destination.
            Step::Destination | Step::SourceType => !self.destination.ip().is_unspecified(),
            Step::ServerName | Step::TransportProtocol | Step::ApplicationProtocol | Step::SourcePort => {
                false
            }
        }
    }

    /// Adds every address from which on another chain may be found than for the one before it.
    fn add_starts(&self, node: &Node, starts: &mut BTreeSet<IpAddr>) {
        let Node::Level { step, table, children, any } = node else { return };
        if !self.is_enough_for(*step) {
            return;
        }
        let destination = self.destination.ip();
        match (step, table) {
            (Step::DestinationPort | Step::Destination, _) => {
                let found = table.find(*step, &self.input(destination));
                let below = found.map(|child| &children[child as usize]).or(any.as_deref());
                if let Some(below) = below {
                    self.add_starts(below, starts);
                }
                return;
            }
            (_, Table::Prefixes(prefixes)) => starts.extend(prefixes.starts(destination.is_ipv4())),
            (_, Table::SourceType { .. }) => {
                let loopback = match destination {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                for local in [destination, loopback] {
                    starts.insert(local);
                    starts.extend(next(local));
                }
            }
            _ => {}
        }
        for below in children.iter().chain(any.as_deref()) {
            self.add_starts(below, starts);
        }
    }

    /// As [`Node::find`].
    fn find(&self, root: &Node, source: IpAddr) -> Result<Option<u32>, &'static str> {
        let input = self.input(source);
        let mut node = root;
        loop {
            match node {
                Node::Chain(index) => return Ok(Some(*index)),
                Node::Level { step, .. } if !self.is_enough_for(*step) => return Err(step.field()),
                Node::Level { step, table, children, any } => {
                    node = match (table.find(*step, &input), any) {
                        (Some(child), _) => &children[child as usize],
                        (None, Some(any)) => any,
                        (None, None) => return Ok(None),
                    };
                }
            }
        }
    }
}

/// The address that follows.
fn next(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(ip) => ip.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}
